"""What is told of studies: whose they are, on which terms, their views, how often each finding is there."""

import pytest
from otdrg.findings_otdrg import FINDINGS, POSITIVE
from otdrg.studies import load_studies, prepare_studies
from otdrg.studies.card import collection_name
from otdrg.studies.loading import with_column
from otdrg.studies.r2gen import IU_XRAY_LICENCE, MIMIC_LICENCE
from otdrg.studies.streaming import StreamedStudies
from otdrg.training.description import describe_studies

PHANTOMS = {"train": 9, "validation": 3, "test": 0, "image_size": 32, "views": ["frontal", "lateral"], "seed": 3}


@pytest.fixture(scope="module")
def phantoms():
    return load_studies("phantom", **PHANTOMS)


def test_studies_are_counted_and_named(phantoms):
    described = describe_studies(phantoms)
    assert list(described) == ["train", "validation"]
    train = described["train"]
    assert (train["studies"], train["labelled"]) == (9, 9)
    assert (train["collections"], train["licences"]) == (["phantom radiographs"], ["Apache-2.0"])
    assert train["views"] == {"frontal": 9, "lateral": 9} and train["views_a_study"] == {"2": 9}
    counts = {name: 0 for name in FINDINGS}
    for states in phantoms["train"]["finding_states"]:
        for name, state in zip(FINDINGS, states, strict=True):
            counts[name] += state == POSITIVE
    assert train["positives"] == counts and sum(counts.values()) > 0


def test_states_that_are_not_known_are_not_counted(phantoms):
    rows = phantoms["validation"]
    states = [None, *list(rows["finding_states"])[1:]]
    described = describe_studies({"validation": with_column(rows, "finding_states", states)})["validation"]
    assert (described["studies"], described["labelled"]) == (3, 2)
    none = describe_studies({"validation": with_column(rows, "finding_states", [None] * 3)})["validation"]
    assert none["labelled"] == 0 and set(none["positives"].values()) == {0}


def test_streamed_studies_are_told_of_without_their_views(phantoms, tmp_path):
    prepare_studies("phantom", tmp_path / "built", **PHANTOMS)
    streamed = describe_studies({"train": StreamedStudies(tmp_path / "built", "train")})["train"]
    mapped = describe_studies(phantoms)["train"]
    assert streamed == {**mapped, "views": None, "views_a_study": None}


@pytest.mark.parametrize(
    ("source", "licence", "name"),
    [
        ("r2gen", IU_XRAY_LICENCE, "IU X-Ray"),
        ("r2gen", MIMIC_LICENCE, "MIMIC-CXR"),
        ("r2gen", "", "a collection in R2Gen's layout"),
        ("open-i", "CC BY-NC-ND 4.0", "IU X-Ray"),
        ("csv", "CC BY-NC-ND 4.0", "a table of images and reports"),
        ("elsewhere", "", "studies of source elsewhere"),
    ],
)
def test_collections_are_told_by_source_and_licence(source, licence, name):
    assert collection_name(source, licence) == name
