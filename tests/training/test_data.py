import csv
import logging

import pytest
from datasets import DatasetDict
from otdrg.findings_otdrg import FINDING_DISPLAY_NAMES, FINDINGS, POSITIVE
from otdrg.labelers import load_labeler
from otdrg.studies import load_studies, prepare_studies
from otdrg.studies.card import collection_name
from otdrg.studies.loading import uncleaned_reports, with_column
from otdrg.studies.r2gen import IU_XRAY_LICENCE, MIMIC_LICENCE
from otdrg.studies.streaming import StreamedStudies
from otdrg.training import data
from otdrg.training.data import build_studies, describe_studies
from otdrg.training.recipe import LabelsRecipe, StudiesRecipe

OPTIONS = {"train": 5, "validation": 3, "test": 0, "image_size": 32, "views": ["frontal"]}


@pytest.fixture
def phantoms():
    return load_studies("phantom", **OPTIONS)


def studies_recipe(**fields):
    return StudiesRecipe(source="phantom", options=OPTIONS, **fields)


def write_csv(path, states):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *reversed(FINDING_DISPLAY_NAMES.values())])
        written = {0: "", 1: "1", 2: "0", 3: "-1"}
        writer.writerows([[study, *(written[state] for state in reversed(row))] for study, row in states.items()])


def test_build_studies_without_labels_keeps_the_studies_states(phantoms):
    built = build_studies(studies_recipe(), LabelsRecipe())
    assert built["train"]["finding_states"] == phantoms["train"]["finding_states"]


def test_build_studies_states_come_from_csv_then_labeler(phantoms, tmp_path):
    ids = phantoms["train"]["id"]
    named = {ids[1]: [3] * 12 + [2, 1], ids[3]: [0] * 13 + [1]}
    write_csv(tmp_path / "states.csv", named)
    built = build_studies(studies_recipe(), LabelsRecipe(csv=str(tmp_path / "states.csv"), labeler="rules"))
    rules = load_labeler("rules")
    for split in ("train", "validation"):
        read = rules.label(phantoms[split]["report"])
        for study, states, by_rules in zip(built[split]["id"], built[split]["finding_states"], read, strict=True):
            assert states == named.get(study, by_rules.tolist())


def test_build_studies_says_when_a_labeler_replaces_states(phantoms, caplog):
    states = phantoms["train"]["finding_states"]
    with caplog.at_level(logging.WARNING):
        build_studies(studies_recipe(), LabelsRecipe(labeler="rules"))
    replaced = "the labeler rules replaces the states that the dataset has for 5 studies; labels.labeler=null"
    assert replaced in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert build_studies(studies_recipe(), LabelsRecipe())["train"]["finding_states"] == states
    assert not caplog.records


@pytest.mark.parametrize("cleaning", ["r2gen_iu", "none"])
def test_build_studies_cleaned_reports_keep_the_originals(phantoms, monkeypatch, cleaning):
    reports = [f"Scarring/atelectasis {number}." for number in range(5)]
    train = phantoms["train"].remove_columns("report").add_column("report", reports)
    monkeypatch.setattr(data, "load_studies", lambda source, **options: DatasetDict({"train": train}))
    rows = build_studies(studies_recipe(cleaning=cleaning), LabelsRecipe(labeler="rules"))["train"]
    assert uncleaned_reports(rows) == reports
    assert rows["report"][0] == ("scarringatelectasis 0 ." if cleaning == "r2gen_iu" else reports[0])
    assert rows["finding_states"] == load_labeler("rules").label(reports).tolist()


def test_build_studies_placeholder_report_is_skipped(phantoms, monkeypatch, caplog):
    train = phantoms["train"].remove_columns("report").add_column("report", ["nan", "None", ".", "N/A", "Edema."])
    monkeypatch.setattr(data, "load_studies", lambda source, **options: DatasetDict({"train": train}))
    with caplog.at_level(logging.WARNING):
        assert len(build_studies(studies_recipe(), LabelsRecipe())["train"]) == 1
    assert "train: 4 of 5 studies skipped: their report is empty" in caplog.text


def test_build_studies_csv_of_other_studies_is_refused(tmp_path):
    write_csv(tmp_path / "states.csv", {"someone": [0] * 14})
    with pytest.raises(ValueError, match=r"labels\.csv=.* names none of the studies"):
        build_studies(studies_recipe(), LabelsRecipe(csv=str(tmp_path / "states.csv")))


def test_build_studies_empty_reports_are_skipped_and_counted(phantoms, monkeypatch, caplog):
    reports = ["", "Heart is normal. No effusion.", "  ", "Clear lungs.", "Edema."]
    train = phantoms["train"].remove_columns("report").add_column("report", reports)
    monkeypatch.setattr(data, "load_studies", lambda source, **options: DatasetDict({"train": train}))
    with caplog.at_level(logging.WARNING):
        built = build_studies(studies_recipe(cleaning="r2gen_iu", limit={"train": 2}), LabelsRecipe())
    assert built["train"]["report"] == ["heart is normal . no effusion .", "clear lungs ."]
    assert "train: 2 of 5 studies skipped: their report is empty" in caplog.text


def test_build_studies_training_study_without_states_is_refused(phantoms, monkeypatch):
    feature = phantoms["train"].features["finding_states"]
    states = [None, *phantoms["train"]["finding_states"][1:]]
    train = phantoms["train"].remove_columns("finding_states").add_column("finding_states", states, feature=feature)
    monkeypatch.setattr(data, "load_studies", lambda source, **options: DatasetDict({"train": train}))
    with pytest.raises(ValueError, match=r"1 of 5 training studies have no finding states: set labels\.labeler"):
        build_studies(studies_recipe(), LabelsRecipe())


# --- described -------------------------------------------------------------------------------------------------------

PHANTOMS = {"train": 9, "validation": 3, "test": 0, "image_size": 32, "views": ["frontal", "lateral"], "seed": 3}


@pytest.fixture(scope="module")
def described_phantoms():
    return load_studies("phantom", **PHANTOMS)


def test_describe_studies_counts_and_names(described_phantoms):
    described = describe_studies(described_phantoms)
    assert list(described) == ["train", "validation"]
    train = described["train"]
    assert (train["studies"], train["labelled"]) == (9, 9)
    assert (train["collections"], train["licences"]) == (["phantom radiographs"], ["Apache-2.0"])
    assert train["views"] == {"frontal": 9, "lateral": 9} and train["views_a_study"] == {"2": 9}
    counts = {name: 0 for name in FINDINGS}
    for states in described_phantoms["train"]["finding_states"]:
        for name, state in zip(FINDINGS, states, strict=True):
            counts[name] += state == POSITIVE
    assert train["positives"] == counts and sum(counts.values()) > 0


def test_describe_studies_unknown_states_are_not_counted(described_phantoms):
    rows = described_phantoms["validation"]
    states = [None, *list(rows["finding_states"])[1:]]
    described = describe_studies({"validation": with_column(rows, "finding_states", states)})["validation"]
    assert (described["studies"], described["labelled"]) == (3, 2)
    none = describe_studies({"validation": with_column(rows, "finding_states", [None] * 3)})["validation"]
    assert none["labelled"] == 0 and set(none["positives"].values()) == {0}


def test_describe_studies_streamed_has_no_view_counts(described_phantoms, tmp_path):
    prepare_studies("phantom", tmp_path / "built", **PHANTOMS)
    streamed = describe_studies({"train": StreamedStudies(tmp_path / "built", "train")})["train"]
    mapped = describe_studies(described_phantoms)["train"]
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
def test_describe_studies_names_collections_by_source_and_licence(source, licence, name):
    assert collection_name(source, licence) == name
