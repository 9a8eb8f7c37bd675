import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from otdrg.studies import load_studies, open_source
from PIL import Image


def entry(name, *paths, **fields):
    return {"id": name, "report": f"Report of {name}.", "image_path": list(paths), **fields}


@pytest.fixture
def collection(tmp_path):
    """A small annotation in R2Gen's form and its images; `write` puts it on disk and returns the options."""
    images = tmp_path / "images"

    def write(annotation, absent=()):
        for study in (study for studies in annotation.values() for study in studies):
            for name in study["image_path"]:
                if name not in absent:
                    (images / name).parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)).save(images / name)
        path = tmp_path / "annotation.json"
        path.write_text(json.dumps(annotation), encoding="utf-8")
        return {"annotation": path, "images": images}

    return write


def test_r2gen_splits_texts_and_images_are_read(collection):
    options = collection(
        {
            "train": [entry("CXR7_IM-0001", "CXR7_IM-0001/0.png", "CXR7_IM-0001/1.png"), entry("b", "b.png")],
            "val": [entry("50414267", "p10/a.png", subject_id=10000032, study_id=50414267)],
            "test": [],
        }
    )
    studies = load_studies("r2gen", **options)
    assert list(studies) == ["train", "validation"]
    first = studies["train"][0]
    assert (first["id"], first["patient_id"], first["source"]) == ("CXR7_IM-0001", "CXR7", "r2gen")
    assert first["report"] == first["findings"] == "Report of CXR7_IM-0001."
    assert first["impression"] == first["indication"] == first["comparison"] == ""
    assert first["finding_states"] is None
    assert [image.size for image in first["images"]] == [(16, 16), (16, 16)]
    assert studies["train"].features["views"].feature.int2str(first["views"]) == ["unknown", "unknown"]
    assert studies["validation"][0]["patient_id"] == "10000032"


def test_r2gen_images_are_referenced(collection):
    options = collection({"train": [entry("a", "a.png")]})
    train = load_studies("r2gen", **options)["train"]
    stored = train.data.column("images")[0].as_py()
    assert stored == [{"bytes": None, "path": str(options["images"] / "a.png")}]
    assert pickle.loads(pickle.dumps(train))[0]["images"][0].getpixel((5, 0)) == 5


def test_r2gen_relative_folder_reads_from_elsewhere(collection, monkeypatch, tmp_path):
    options = collection({"train": [entry("a", "a.png")]})
    monkeypatch.chdir(tmp_path)
    train = load_studies("r2gen", annotation="annotation.json", images="images")["train"]
    monkeypatch.chdir(options["images"])
    assert train[0]["images"][0].size == (16, 16)


def test_r2gen_missing_images_are_skipped_and_listed(collection, caplog):
    options = collection(
        {"train": [entry("a", "a0.png", "a1.png"), entry("b", "b.png")], "val": [entry("c", "c.png")]},
        absent=("a1.png", "c.png"),
    )
    studies = load_studies("r2gen", **options)
    assert list(studies) == ["train"]
    assert studies["train"]["id"] == ["b"]
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("otdrg.studies")]
    assert "r2gen: 2 studies left out" in warning
    assert re.search(r"a \(missing image: .*a1\.png does not exist\); c \(missing image: .*c\.png", warning)


def test_r2gen_wrong_image_folder_is_an_error(collection, tmp_path):
    options = collection({"train": [entry("a", "a.png")]}, absent=("a.png",))
    (tmp_path / "images").mkdir()
    with pytest.raises(
        ValueError, match=r"holds no studies: all 1 were skipped, the first for missing image: .*a\.png"
    ):
        load_studies("r2gen", **options)


@pytest.mark.parametrize("path", ["../secret.png", "a/../../secret.png", "/etc/passwd", "..", "."])
def test_r2gen_path_outside_the_folder_is_not_read(collection, tmp_path, path):
    options = collection({"train": [entry("a", "a.png")]})
    (tmp_path / "secret.png").write_bytes((options["images"] / "a.png").read_bytes())
    options["annotation"].write_text(json.dumps({"train": [entry("a", "a.png"), entry("b", path)]}))
    kept, left_out = open_source("r2gen", **options).entries()
    assert kept.id == "a"
    assert (left_out.id, left_out.split, left_out.kind) == ("b", "train", "malformed")
    assert re.search(r"annotation\.json, train\[1\] has image_path .* leaves the image folder", left_out.reason)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"train": [', "is not valid JSON: Expecting value: line 1 column 12"),
        (b"\xff\xfe{}", "is not UTF-8 text"),
        (b"[]", "is not in R2Gen's form: expected lists under train, val, test"),
        (b'{"train": {}}', "is not in R2Gen's form"),
        (b'{"dev": []}', "unknown split 'dev': expected train, val, test"),
    ],
)
def test_r2gen_malformed_annotation_is_an_error(tmp_path, content, message):
    path = tmp_path / "annotation.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_studies("r2gen", annotation=path, images=tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (3, r"train\[0\] is not a study"),
        ({"report": "r", "image_path": ["a"]}, r"train\[0\] has id None: expected a string"),
        ({"id": "a", "image_path": ["a"]}, r"train\[0\] has report None: expected a string"),
        ({"id": "a", "report": "r", "image_path": "a"}, r"image_path 'a': expected a list"),
        ({"id": "a", "report": "r", "image_path": []}, r"image_path \[\]: expected a list"),
    ],
)
def test_r2gen_malformed_studies_are_skipped(collection, study, message):
    options = collection({"train": [entry("b", "b.png")]})
    options["annotation"].write_text(json.dumps({"train": [study, entry("b", "b.png")]}))
    left_out, kept = open_source("r2gen", **options).entries()
    assert left_out.kind == "malformed" and re.search(message, left_out.reason)
    assert kept.id == "b"


def test_r2gen_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json does not exist: option 'annotation' names R2Gen's JSON file"):
        load_studies("r2gen", annotation=tmp_path / "nowhere.json", images=tmp_path)
    with pytest.raises(ValueError, match="is a folder: option 'annotation'"):
        load_studies("r2gen", annotation=tmp_path, images=tmp_path)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"nowhere does not exist: option 'images' names the folder"):
        load_studies("r2gen", annotation=tmp_path / "a.json", images=tmp_path / "nowhere")


def test_r2gen_official_counts_follow_the_collection(collection):
    iu_xray = open_source("r2gen", **collection({"train": [entry("CXR7_IM-2263", "a.png")]}))
    assert iu_xray.official_counts == {"train": 2069, "validation": 296, "test": 590}
    assert iu_xray.official_unit == "studies" and "CXR2084_IM-0715-1001" in iu_xray.official_ids("train")
    mimic = open_source("r2gen", **collection({"train": [entry("02aa804e-bde0afdd", "a.png", subject_id=1)]}))
    assert mimic.official_counts == {"train": 270790, "validation": 2130, "test": 3858}
    assert mimic.official_unit == "images" and mimic.official_ids("train") is None
    assert open_source("r2gen", **collection({"train": [entry("mine", "a.png")]})).official_counts is None


def test_r2gen_labels_of_promptmrg_are_finding_states(collection):
    states = [3, 1, 0, 2, *[0] * 9, 1]
    options = collection(
        {
            "train": [
                entry("a", "a.png", subject_id=1, labels=[*states, 1, 0, 0, 1], clip_indices=[5, 7]),
                entry("b", "b.png", subject_id=2, labels=[0] * 13 + [2]),
                entry("c", "c.png", subject_id=3, labels=[0, 1]),
                entry("d", "d.png", subject_id=4, labels=[0] * 13 + [3]),
                entry("e", "e.png", subject_id=5, labels=[4] * 14),
                entry("f", "f.png", subject_id=6),
            ]
        }
    )
    source = open_source("r2gen", **options, labels="labels")
    entries = list(source.entries())
    studies = [source.read(item) for item in entries[:2]]
    assert [study.finding_states for study in studies] == [states, [0] * 14]
    assert [item.reason.partition(" has ")[2] for item in entries[2:]] == [
        "labels of 2 values: expected a list of 14 or 18 states",
        "labels with a wrong state (No Finding is uncertain: expected positive, negative or unmentioned)",
        "labels with a wrong state (unknown finding state 4: expected one of unmentioned, positive, negative, unclear "
        "(or 0 to 3))",
        "labels None: expected a list of 14 or 18 states",
    ]
    assert load_studies("r2gen", **options)["train"]["finding_states"][:] == [None] * 6


def test_r2gen_list_without_splits_is_one_split(collection):
    options = collection({"test": [entry("CXR7_IM-0001", "CXR7_IM-0001/0.png"), entry("CXR8_IM-0002", "b.png")]})
    studies = json.loads(options["annotation"].read_text())["test"]
    options["annotation"].write_text(json.dumps(studies))
    assert list(load_studies("r2gen", **options)) == ["test"]
    source = open_source("r2gen", **options, split="train")
    assert [item.split for item in source.entries()] == ["train", "train"]
    # R2Gen's counts are of its splits.
    assert source.official_counts is None and source.official_ids("train") is None
    assert source.read(next(source.entries())).licence == "CC BY-NC-ND 4.0"
    with pytest.raises(ValueError, match="option 'split' is 'dev': expected one of train, validation, test"):
        open_source("r2gen", **options, split="dev")


def test_r2gen_iu_xray_is_complete():
    folder = os.environ.get("OTDRG_IU_XRAY")
    if not folder:
        pytest.skip("OTDRG_IU_XRAY does not name a folder with IU X-Ray in R2Gen's form")
    studies = load_studies("r2gen", annotation=Path(folder) / "annotation.json", images=Path(folder) / "images")
    assert {split: len(rows) for split, rows in studies.items()} == {"train": 2068, "validation": 295}
    assert sum(len(views) for rows in studies.values() for views in rows["views"]) == 4726
    assert studies["validation"][0]["images"][1].size == (256, 256)


def test_r2gen_details_give_indications_and_tags(collection, tmp_path):
    options = collection({"train": [entry("a", "a.png"), entry("b", "b.png")]})
    details = tmp_path / "details.jsonl"
    details.write_text(
        '{"id": "a", "indication": "Cough", "terms": ["Spine/degenerative"]}\n{"id": null, "terms": []}\n',
        encoding="utf-8",
    )
    train = load_studies("r2gen", **options, details=str(details), tags="terms")["train"]
    assert train["indication"][:] == ["Cough", ""] and train["tags"][:] == [["Spine/degenerative"], None]
    assert load_studies("r2gen", **options, details=str(details))["train"]["tags"][:] == [None, None]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "z", "terms": []}', "names none of the studies by its field id"),
        ('{"id": "a"}', "line 1 .*: expected an object with id and terms"),
        ("no JSON", "line 1 .*: expected an object with id and terms"),
        ('{"id": "a", "terms": "normal"}', "line 1: expected id and indication as strings, and tags as a list"),
    ],
)
def test_r2gen_wrong_details_are_one_line(collection, tmp_path, line, message):
    options = collection({"train": [entry("a", "a.png")]})
    details = tmp_path / "details.jsonl"
    details.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_studies("r2gen", **options, details=str(details), tags="terms")
