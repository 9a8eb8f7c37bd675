import io
import os
import pickle

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value, load_from_disk
from otdrg.findings_otdrg import FINDING_STATES
from otdrg.studies import load_studies, prepare_studies
from otdrg.studies.hub import HubSource
from otdrg.studies.schema import STUDY_FEATURES
from otdrg.studies.source import Skipped, SkipStudy, StudyEntry
from PIL import Image as PIL


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def png(level=77):
    file = io.BytesIO()
    PIL.fromarray(np.full((8, 8), level, np.uint8)).save(file, "PNG")
    return file.getvalue()


def save(tmp_path, features=None, **splits):
    """A dataset in a folder of `save_to_disk`; what a row does not have of the features is null."""
    folder = tmp_path / "saved"
    if features is not None:
        splits = {name: [dict.fromkeys(features) | row for row in rows] for name, rows in splits.items()}
    DatasetDict({name: Dataset.from_list(rows, features=features) for name, rows in splits.items()}).save_to_disk(
        folder
    )
    return str(folder)


def row(number, **values):
    return {"image": {"bytes": png(number), "path": None}, "report": f"Text {number}.", **values}


PLAIN = Features({"image": Image(), "report": Value("string")})


def read(source):
    return [(entry, source.read(entry)) for entry in source.entries() if isinstance(entry, StudyEntry)]


def test_hub_folder_of_save_to_disk_is_read(tmp_path):
    folder = save(tmp_path, PLAIN, train=[row(1), row(2)], val=[row(3)])
    read_all = read(HubSource(folder))
    assert [(entry.id, entry.patient_id, entry.split) for entry, _ in read_all] == [
        ("train-0", "train-0", "train"),
        ("train-1", "train-1", "train"),
        ("val-0", "val-0", "validation"),
    ]
    study = read_all[1][1]
    assert (study.findings, study.impression, study.views, study.finding_states) == ("Text 2.", "", ["unknown"], None)
    assert study.images == [png(2)]


def test_hub_folder_of_parquet_is_read(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split, rows in {"train": [row(1), row(2)], "test": [row(3)]}.items():
        Dataset.from_list(rows, features=PLAIN).to_parquet(data / f"{split}-00000-of-00001.parquet")
    read_all = read(HubSource(str(tmp_path), licence="CC0"))
    assert [(entry.split, study.images, study.licence) for entry, study in read_all] == [
        ("train", [png(1)], "CC0"),
        ("train", [png(2)], "CC0"),
        ("test", [png(3)], "CC0"),
    ]


def test_hub_image_folder_is_read(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / "a.png").write_bytes(png())
        (tmp_path / "data" / split / "metadata.csv").write_text(f"file_name,text\na.png,Seen in {split}.\n")
    source = HubSource(str(tmp_path / "data"))
    read_all = read(source)
    assert [(entry.split, study.findings) for entry, study in read_all] == [
        ("train", "Seen in train."),
        ("validation", "Seen in validation."),
    ]
    assert read_all[0][1].images == [str(tmp_path / "data" / "train" / "a.png")]


def full_row(**values):
    return {
        "id": "s1",
        "patient_id": "p1",
        "images": [{"bytes": png(1), "path": None}, {"bytes": png(2), "path": None}],
        "views": [1, 0],
        "findings": "Clear.",
        "impression": "Normal.",
        "indication": "Cough.",
        "comparison": "None.",
        "report": "Clear. Normal.",
        "finding_states": [0, 1, 2, 3] * 3 + [0, 0],
        "source": "csv",
        "licence": "CC BY 4.0",
        **values,
    }


def test_hub_own_schema_is_read_unchanged(tmp_path):
    folder = save(
        tmp_path, STUDY_FEATURES, train=[full_row()], test=[full_row(id="s2", finding_states=None, views=None)]
    )
    (entry, study), (other, unlabelled) = read(HubSource(folder))
    assert tuple(entry[:3]) == ("s1", "p1", "train") and other.id == "s2"
    assert (study.images, study.views) == ([png(1), png(2)], ["lateral", "frontal"])
    assert (study.findings, study.impression, study.indication, study.comparison) == (
        "Clear.",
        "Normal.",
        "Cough.",
        "None.",
    )
    assert study.finding_states == [0, 1, 2, 3] * 3 + [0, 0]
    assert study.licence == "CC BY 4.0"
    assert (unlabelled.finding_states, unlabelled.views) == (None, ["unknown", "unknown"])


def test_hub_column_option_maps_names(tmp_path):
    rows = [
        {
            "study": 7,
            "subject": 3,
            "scan": {"bytes": png(), "path": None},
            "words": "Clear.",
            "text": "why",
            "side": "PA",
        }
    ]
    features = Features(
        {
            "study": Value("int64"),
            "subject": Value("int64"),
            "scan": Image(),
            "words": Value("string"),
            "text": Value("string"),
            "side": Value("string"),
        }
    )
    folder = save(tmp_path, features, train=rows, test=rows)
    mapped = ["id=study", "patient_id=subject", "images=scan", "report=words", "indication=text", "views=side"]
    (entry, study), _ = read(HubSource(folder, column=mapped))
    assert tuple(entry[:3]) == ("7", "3", "train")
    assert (study.findings, study.indication, study.views) == ("Clear.", "why", ["frontal"])


def test_hub_mapped_column_is_not_used_twice(tmp_path):
    folder = save(tmp_path, PLAIN, train=[row(1)], test=[row(2)])
    (_, study), _ = read(HubSource(folder, column=["impression=report"]))
    assert (study.findings, study.impression) == ("", "Text 1.")


def test_hub_states_are_matched_by_name(tmp_path):
    names = ["positive", "uncertain", "negative", "unmentioned"]
    features = Features({**PLAIN, "finding_states": List(ClassLabel(names=names))})
    folder = save(tmp_path, features, train=[row(1, finding_states=[0, 1, 2, 3] + [3] * 10)], test=[row(2)])
    (_, study), _ = read(HubSource(folder))
    assert [FINDING_STATES[state] for state in study.finding_states[:4]] == [
        "positive",
        "unclear",
        "negative",
        "unmentioned",
    ]
    (_, study), _ = read(HubSource(folder, column=["finding_states="]))
    assert study.finding_states is None


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_hub_image_paths_are_relative_to_the_option(tmp_path, listed, absolute):
    folder = str(tmp_path / "images") + "/" if absolute else ""
    paths = [folder + "a.png", folder + "b/c.dcm"]
    column = {"images": paths} if listed else {"image": paths[0]}
    saved = save(tmp_path, train=[{**column, "report": "r"}], test=[{**column, "report": "r"}])
    (tmp_path / "images").mkdir()
    (_, study), _ = read(HubSource(saved, images=str(tmp_path / "images")))
    expected = [str(tmp_path / "images" / name) for name in ("a.png", "b/c.dcm")]
    assert study.images == expected[: 2 if listed else 1]


def test_hub_image_paths_are_relative_to_the_dataset(tmp_path, monkeypatch):
    saved = save(tmp_path, train=[{"image": "a.png", "report": "r"}], test=[{"image": "a.png", "report": "r"}])
    monkeypatch.chdir(tmp_path)
    source = HubSource("saved")
    monkeypatch.chdir("/")
    assert read(source)[0][1].images == [f"{saved}/a.png"]


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "a/../../b.png"])
def test_hub_image_path_outside_the_folder_is_skipped(tmp_path, path):
    saved = save(tmp_path, train=[{"image": path, "report": "r"}], test=[{"image": "a.png", "report": "r"}])
    source = HubSource(saved)
    with pytest.raises(SkipStudy, match=r"split train, row 0, column 'image': path .* leaves") as caught:
        source.read(next(source.entries()))
    assert caught.value.kind == "malformed"


def test_hub_one_split_assigns_patients(tmp_path):
    features = Features({**PLAIN, "patient_id": Value("int32")})
    folder = save(tmp_path, features, train=[row(i, patient_id=i // 2) for i in range(40)])
    entries = list(HubSource(folder, seed=3).entries())
    assert {entry.split for entry in entries} == {"train", "validation", "test"}
    assert len({(entry.patient_id, entry.split) for entry in entries}) == 20
    assert entries == list(HubSource(folder, seed=3).entries()) != list(HubSource(folder, seed=4).entries())
    assert {entry.split for entry in HubSource(folder, split_map=["test=train"]).entries()} == {"test"}


def test_hub_dataset_without_splits_is_divided(tmp_path):
    Dataset.from_list([row(i) for i in range(9)], features=PLAIN).save_to_disk(tmp_path / "one")
    entries = list(HubSource(str(tmp_path / "one"), split_shares=[0.5, 0.25, 0.25]).entries())
    assert {entry.split for entry in entries} == {"train", "validation", "test"}


def test_hub_split_map_option_maps_splits(tmp_path):
    folder = save(tmp_path, PLAIN, training=[row(1)], more=[row(2)], held_out=[row(3)], unused=[row(4)])
    source = HubSource(folder, split_map=["test=held_out", "train=training", "train=more"])
    assert [(entry.id, entry.split) for entry in source.entries()] == [
        ("training-0", "train"),
        ("more-0", "train"),
        ("held_out-0", "test"),
    ]
    with pytest.raises(ValueError, match=r"has a split 'training', which is none of train, val, .*--split-map"):
        list(HubSource(folder).entries())
    with pytest.raises(ValueError, match=r"has no split 'nowhere', expected one of training, more, held_out, unused"):
        list(HubSource(folder, split_map=["train=nowhere"]).entries())


def test_hub_pickled_source_reads(tmp_path):
    source = HubSource(save(tmp_path, PLAIN, train=[row(1)] * 50, test=[row(2)]))
    entries = list(source.entries())
    pickled = pickle.dumps(source)
    assert len(pickled) < 2000
    assert pickle.loads(pickled).read(entries[-1]).findings == "Text 2."


@pytest.mark.parametrize(
    ("values", "kind", "reason"),
    [
        ({"image": None}, "missing image", "split train, row 1, column 'image': null"),
        ({"report": None}, "empty report", "split train, row 1: report null"),
        ({"views": ["PA", "LL"]}, "malformed", "row 1, column 'views': 2 views, expected 1"),
        ({"finding_states": [1, 2]}, "malformed", "row 1, column 'finding_states': 2 states, expected 14"),
        ({"finding_states": [9] * 14}, "malformed", "row 1, column 'finding_states': state 9, expected 0 to 3"),
        ({"finding_states": [None] * 14}, "malformed", "state None"),
    ],
)
def test_hub_faulty_row_is_named(tmp_path, values, kind, reason):
    features = Features({**PLAIN, "views": List(Value("string")), "finding_states": List(Value("int8"))})
    source = HubSource(save(tmp_path, features, train=[row(1), row(2, **values)], test=[row(3)]))
    entries = list(source.entries())
    source.read(entries[0])
    with pytest.raises(SkipStudy, match=reason) as caught:
        source.read(entries[1])
    assert caught.value.kind == kind


@pytest.mark.parametrize(("column", "value"), [("id", None), ("id", " "), ("patient_id", None)])
def test_hub_empty_id_is_skipped(tmp_path, column, value):
    rows = [row(i, id=f"s{i}", patient_id=f"p{i}") for i in range(3)]
    rows[1][column] = value
    features = Features({**PLAIN, "id": Value("string"), "patient_id": Value("string")})
    folder = save(tmp_path, features, train=rows, test=[row(5, id="t", patient_id="t")])
    kept = list(HubSource(folder).entries())
    assert [isinstance(item, Skipped) for item in kept] == [False, True, False, False]
    assert (kept[1].kind, kept[1].split) == ("malformed", "train")
    assert f"split train, row 1, column {column!r}: empty" in kept[1].reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"column": ["findings=words"]},
            r"no column 'words', which option 'column' names for findings; its columns: image, re",
        ),
        ({"column": ["words"]}, r"option 'column' has 'words': expected FIELD=COLUMN"),
        ({"column": ["title=report"]}, r"names a field 'title': expected one of id, patient_id, images"),
        ({"column": ["findings=report", "report=report"]}, r"names the field 'findings' twice"),
        ({"column": ["id=report", "id=image"]}, r"names the field 'id' twice"),
        ({"column": ["images="]}, r"no column 'images'; its columns: image, report; .*images=NAME"),
        ({"column": ["findings="]}, r"no column 'report'; its columns: image, report; .*report=NAME"),
        ({"column": ["findings=image", "images=image"]}, r"column 'image' for findings holds Image.*: expected text"),
        (
            {"column": ["finding_states=report", "report=report"]},
            r"column 'report' for finding_states holds .*: expected lists of 14 states",
        ),
        ({"split_map": ["dev=train"]}, r"names a split 'dev': expected one of train, validation, test"),
        ({"split_map": ["train=train", "test=train"]}, r"names 'train' twice"),
        ({"split_shares": [0.5, 0.5]}, r"split_shares=\[0.5, 0.5\]"),
        ({"config": "large"}, r"option 'config' does not apply"),
        ({"revision": "v1"}, r"option 'revision' does not apply"),
        ({"images": "nowhere"}, r"nowhere does not exist: option 'images'"),
    ],
)
def test_hub_wrong_options_are_named(tmp_path, options, message):
    folder = save(tmp_path, PLAIN, train=[row(1)], test=[row(2)])
    with pytest.raises(ValueError, match=message) as caught:
        list(HubSource(folder, **options).entries())
    assert "\n" not in str(caught.value)


def test_hub_images_of_wrong_type_are_refused(tmp_path):
    folder = save(tmp_path, train=[{"image": 3, "report": "r"}], test=[{"image": 3, "report": "r"}])
    with pytest.raises(
        ValueError, match=r"column 'image' for images holds .*int64.*: expected images, paths, or lists"
    ):
        list(HubSource(folder).entries())


def test_hub_unloadable_dataset_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"'nobody/nothing' cannot be loaded: .*folder .*nobody/nothing.*HF_HUB_OFFLINE"
    ):
        list(HubSource("nobody/nothing").entries())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' cannot be loaded: .*searched the folder"):
        list(HubSource(str(tmp_path / "empty")).entries())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"broken' cannot be loaded: .*arquet") as caught:
        list(HubSource(str(tmp_path / "broken")).entries())
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"train\.parquet is a file"):
        HubSource(str(tmp_path / "broken" / "train.parquet"))


def test_hub_rows_are_neither_decoded_nor_copied(tmp_path):
    """A dataset of broken images is listed and read as it is, and no second copy of it is made."""
    broken = [{"image": {"bytes": b"broken", "path": None}, "report": "r"}]
    folder = save(tmp_path, PLAIN, train=broken, test=broken)
    before = sorted(path for path in tmp_path.rglob("*"))
    assert read(HubSource(folder))[0][1].images == [b"broken"]
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert os.path.isdir(folder) and len(load_from_disk(folder)["train"]) == 1


@pytest.mark.parametrize("folder", ["phantoms", "phantoms/data"])
def test_hub_prepared_dataset_is_prepared_again(tmp_path, folder):
    counts = {"train": 5, "validation": 2, "test": 2}
    prepare_studies("phantom", tmp_path / "phantoms", image_size=64, views=["frontal", "lateral"], **counts)
    first = load_studies("prepared", folder=tmp_path / "phantoms")
    prepare_studies("hub", tmp_path / "again", dataset=str(tmp_path / folder))
    again = load_studies("prepared", folder=tmp_path / "again")
    for split, count in counts.items():
        assert len(again[split]) == count
        for before, after in zip(first[split], again[split], strict=True):
            assert [np.asarray(image).tolist() for image in before.pop("images")] == [
                np.asarray(image).tolist() for image in after.pop("images")
            ]
            assert before | {"source": "hub"} == after
