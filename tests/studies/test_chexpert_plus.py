import gzip
import json
import os
import pickle

import pytest
from otdrg.findings_otdrg import FINDING_DISPLAY_NAMES, FINDINGS
from otdrg.studies import chexpert_plus as module
from otdrg.studies import load_studies, open_source, prepare_studies
from otdrg.studies.build import BuildOptions, build_share, merge_shares
from otdrg.studies.publish import push_studies
from otdrg.studies.shards import Share
from otdrg.studies.source import Skipped, StudyEntry
from published_trees import CheXpertPlusDownload

LABELS = {FINDING_DISPLAY_NAMES[name]: None for name in FINDINGS}


@pytest.fixture
def download(tmp_path):
    return CheXpertPlusDownload(tmp_path)


def listed(download, **options):
    entries = list(open_source("chexpert-plus", **download.write(**options)).entries())
    return (
        [entry for entry in entries if isinstance(entry, StudyEntry)],
        [entry for entry in entries if isinstance(entry, Skipped)],
    )


def test_chexpert_plus_download_is_read(download):
    lateral = download.image(7, 2, 2, "Lateral")
    frontal = download.image(7, 2, 1)
    download.image(7, 1)
    download.image(64545, 1, split="valid", section_clinical_history="", section_history="Fall.")
    source = open_source("chexpert-plus", **download.write())
    entries = list(source.entries())
    assert [(*entry[:3], entry.location.time) for entry in entries] == [
        ("patient00007_study2", "patient00007", "train", 2),
        ("patient00007_study1", "patient00007", "train", 1),
        ("patient64545_study1", "patient64545", "validation", 1),
    ]
    studies = [pickle.loads(pickle.dumps(source)).read(entry) for entry in entries]
    # The table says .jpg, the files are .png.
    assert studies[0].images == (str(frontal), str(lateral)) and frontal.suffix == ".png"
    assert studies[0].views == ("frontal", "lateral")
    assert studies[0].findings == "The lungs of 7 are clear,\nand the heart is normal."
    assert studies[0].impression == "1. No acute disease."
    assert (studies[0].indication, studies[2].indication, studies[0].comparison) == ("Cough.", "Fall.", "None.")
    assert studies[0].finding_states is None
    assert studies[0].licence == "Stanford University Dataset Research Use Agreement"


@pytest.mark.parametrize("place", ["PNG", "PNGs", "."])
def test_chexpert_plus_images_are_found_in_usual_places(download, place):
    download.image(1)
    os.rename(download.root / "PNG" / "PNG", download.root / "found")
    (download.root / "PNG").rmdir()
    if place == ".":
        os.rename(download.root / "found" / "train", download.root / "train")
    else:
        os.rename(download.root / "found", download.root / place)
    assert len(load_studies("chexpert-plus", **download.write())["train"]) == 1


def test_chexpert_plus_packed_table_and_other_suffix_are_read(download):
    path = download.image(1)
    os.rename(path, path.with_suffix(".jpg"))
    options = download.write(image_suffix=".jpg", images=str(download.root / "PNG"))
    table = download.root / "df_chexpert_plus_240401.csv"
    (download.root / f"{table.name}.gz").write_bytes(gzip.compress(table.read_bytes()))
    table.unlink()
    (entry,) = open_source("chexpert-plus", **options).entries()
    assert entry.location.images == (str(path.with_suffix(".jpg")),)


def test_chexpert_plus_labels_become_finding_states(download):
    download.image(1, labels={**LABELS, "Edema": 1.0, "Fracture": 0.0, "Pneumonia": -1.0, "No Finding": 0.0})
    download.image(2, labels={**LABELS, "No Finding": 1.0})
    train = load_studies("chexpert-plus", **download.write())["train"]
    states = dict(zip(FINDINGS, train[0]["finding_states"], strict=True))
    assert {name: state for name, state in states.items() if state} == {"edema": 1, "fracture": 2, "pneumonia": 3}
    assert train[1]["finding_states"] == [0] * 13 + [1]


def test_chexpert_plus_damaged_labels_are_skipped_and_counted(download, caplog):
    download.image(1, labels=LABELS)
    download.image(2, labels={**LABELS, "Edema": "yes"})
    download.image(3, labels={"Edema": 1.0})
    download.image(4, labels={**LABELS, "No Finding": -1.0})
    download.image(5)
    options = download.write()
    with open(options["labels"], "a", encoding="utf-8") as file:
        file.write('{"path_to_image": "train/pat\n[]\n{"Edema": 1.0}\n')
    entries = list(open_source("chexpert-plus", **options).entries())
    assert isinstance(entries[0], StudyEntry) and all(isinstance(entry, Skipped) for entry in entries[1:])
    assert [entry.reason.partition("impression_fixed.json ")[2] for entry in entries[1:]] == [
        "has a wrong label in line 2: Edema is 'yes': expected 1, 0, -1 or null",
        "has a wrong label in line 3: no 'Enlarged Cardiomediastinum': expected all 14 findings of CheXpert",
        "has a wrong label in line 4: No Finding is uncertain: expected positive, negative or unmentioned",
        "has no line for its images",
    ]
    assert "impression_fixed.json: 3 lines are damaged, the first is line 5" in caplog.text
    (download.root / "chexbert_labels" / "impression_fixed.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"impression_fixed\.json names no image: expected lines as"):
        list(open_source("chexpert-plus", **options).entries())


@pytest.mark.parametrize(
    ("cells", "study", "reason"),
    [
        ({"path_to_image": ""}, "line 4", "has path_to_image '': expected a path such as train/patient42142"),
        ({"path_to_image": "train/../x/study1/a.jpg"}, "line 4", "expected a path such as train/patient42142"),
        ({"split": ""}, "patient00002_study1", "has split '': expected train"),
        ({"split": "middle"}, "patient00002_study1", "has split 'middle': expected train"),
    ],
)
def test_chexpert_plus_damaged_line_is_skipped_and_counted(download, cells, study, reason):
    download.image(1, section_findings="Clear.", report="Clear.")
    download.image(2)
    download.image(3)
    download.rows[1] |= {"section_findings": "Clear.\n", "report": ""} | cells
    kept, (fault,) = listed(download)
    assert [entry.patient_id for entry in kept] == ["patient00001", "patient00003"]
    assert (fault.id, fault.kind) == (study, "malformed")
    assert "df_chexpert_plus_240401.csv, line 4 " in fault.reason and reason in fault.reason


def test_chexpert_plus_truncated_table_loses_only_its_last_study(download):
    for patient in (1, 2, 3):
        download.image(patient)
    options = download.write()
    table = download.root / "df_chexpert_plus_240401.csv"
    table.write_bytes(table.read_bytes()[:-60])
    entries = list(open_source("chexpert-plus", **options).entries())
    assert [type(entry) for entry in entries] == [StudyEntry, StudyEntry, Skipped]


def test_chexpert_plus_text_that_is_not_utf8_is_skipped_and_counted(download, tmp_path):
    download.image(1)
    download.image(2, section_findings="caf\N{LATIN SMALL LETTER E WITH ACUTE}")
    options = download.write()
    table = download.root / "df_chexpert_plus_240401.csv"
    table.write_bytes(table.read_bytes().replace("é".encode(), b"\xe9"))
    report = prepare_studies("chexpert-plus", tmp_path / "out", **options)
    assert (report.counts["train"].studies, report.counts["train"].skipped) == (1, 1)


def test_chexpert_plus_study_in_two_splits_is_skipped(download):
    download.image(1, view=1)
    download.image(1, view=2, split="valid")
    kept, (fault,) = listed(download)
    assert not kept and "several splits" in fault.reason


def test_chexpert_plus_study_with_a_damaged_line_is_skipped_once(download):
    download.image(1, view=1)
    download.image(1, view=2)
    download.rows[1]["split"] = ""
    kept, faults = listed(download)
    assert not kept and [fault.id for fault in faults] == ["patient00001_study1"]


def test_chexpert_plus_sections_and_columns_that_lack(download, tmp_path):
    download.image(1, section_findings="")
    download.image(2)
    options = download.write()
    assert prepare_studies("chexpert-plus", tmp_path / "f", **options).counts["train"].empty_reports == 1
    impressions = BuildOptions(sections="impression")
    assert prepare_studies("chexpert-plus", tmp_path / "i", build=impressions, **options).counts["train"].studies == 2
    options = download.write(columns=("path_to_image", "split", "section_impression"))
    (tmp_path / "i").rename(tmp_path / "before")
    report = prepare_studies("chexpert-plus", tmp_path / "i", build=impressions, **options)
    assert report.counts["train"].frontal == 2
    with pytest.raises(ValueError, match=r"all 2 were skipped, .* for empty report: the study has no findings"):
        prepare_studies("chexpert-plus", tmp_path / "g", **options)
    options = download.write(columns=("path_to_image", "section_impression"))
    with pytest.raises(ValueError, match="has no column 'split': expected path_to_image, split"):
        prepare_studies("chexpert-plus", tmp_path / "h", **options)


def test_chexpert_plus_seeded_split_keeps_patients_together(download):
    for patient in range(10):
        for study in (1, 2):
            download.image(patient, study)
    kept, faults = listed(download, split="seeded", seed=3)
    splits = {}
    for entry in kept:
        splits.setdefault(entry.patient_id, set()).add(entry.split)
    assert not faults and all(len(found) == 1 for found in splits.values())
    assert set().union(*splits.values()) == {"train", "validation", "test"}


def test_chexpert_plus_published_counts_are_compared(download, tmp_path, monkeypatch):
    download.image(1)
    download.image(1, view=2)
    download.image(2, split="valid")
    build = BuildOptions(sections="impression")
    warnings = prepare_studies("chexpert-plus", tmp_path / "a", build=build, **download.write()).warnings
    assert warnings == [
        "train: 2 images listed; 223,228 images in the published collection",
        "validation: 1 images listed; 234 images in the published collection",
        "all: 2 studies, 3 images, 2 patients listed; "
        "187,711 studies, 223,462 images, 64,725 patients in the published collection",
    ]
    monkeypatch.setattr(module, "PUBLISHED", {"all": {"studies": 2, "images": 3, "patients": 2}})
    report = prepare_studies("chexpert-plus", tmp_path / "b", **download.write(split="seeded"))
    assert report.warnings == []


def test_chexpert_plus_licence_is_not_published(download, tmp_path):
    download.image(1)
    prepare_studies("chexpert-plus", tmp_path / "out", **download.write())
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["licences"] == [module.LICENCE]
    with pytest.raises(ValueError, match="Research Use Agreement, which forbids publishing: remove --public"):
        push_studies(tmp_path / "out", "org/chexpert_plus", public=True)


def test_chexpert_plus_shares_give_the_dataset_of_one_process(download, tmp_path):
    for patient in range(6):
        download.image(patient, split="valid" if patient == 5 else "train")
    options = BuildOptions(studies_per_shard=2, parquet_only=True)
    source = open_source("chexpert-plus", **download.write())
    for index in (2, 1):
        build_share(source, tmp_path / "shares", Share(index, 2), options)
    merged = merge_shares(source, tmp_path / "shares", options)
    whole = prepare_studies("chexpert-plus", tmp_path / "whole", build=options, **download.write())
    assert merged.warnings == whole.warnings and len(merged.warnings) == 3
    files = [sorted(folder.rglob("*.parquet")) for folder in (tmp_path / "shares", tmp_path / "whole")]
    assert len(files[0]) == 4
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": "nowhere"}, "nowhere does not exist: option 'root' names the download"),
        ({"root": "."}, r"has no df_chexpert_plus_240401\.csv: option 'root'"),
        ({"images": "."}, "has no folder train or valid, nor has its folder PNG: option 'images'"),
        ({"labels": "nowhere"}, "nowhere does not exist: option 'labels' names JSON Lines"),
        ({"image_suffix": "png"}, "option 'image_suffix' is 'png': expected .png"),
        ({"split": "dev"}, "option 'split' is 'dev': expected official or seeded"),
        ({"split": "seeded", "split_shares": [1.0]}, "expected three shares"),
    ],
)
def test_chexpert_plus_wrong_options_are_named(download, tmp_path, monkeypatch, options, message):
    download.image(1)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match=message):
        open_source("chexpert-plus", **{**download.write(), **options})
