import gzip
import json
import os
import pickle

import numpy as np
import pytest
from datasets import load_from_disk
from otdrg.studies import load_studies, prepare_studies
from otdrg.studies.build import BuildOptions
from otdrg.studies.mimic_cxr import MimicCXRSource
from otdrg.studies.source import Skipped, SkipStudy, StudyEntry
from PIL import Image

REPORT = """                                 FINAL REPORT
 INDICATION:  ___ year old man after a fall.

 COMPARISON:  ___.

 FINDINGS:  The lungs of {study}
 are clear.

 IMPRESSION:  Clear lungs.
"""
SPLIT, METADATA = "mimic-cxr-2.0.0-split.csv", "mimic-cxr-2.0.0-metadata.csv"
HEADER = b"dicom_id,study_id,subject_id,split,ViewPosition\n"


class Release:
    """A tree of MIMIC-CXR's shape, reports and images apart. Lines are added with `image`, others with `lines`."""

    METADATA_COLUMNS = "dicom_id,subject_id,study_id,Procedure,ViewPosition,Rows"

    def __init__(self, folder):
        self.root, self.images = folder / "mimic-cxr", folder / "mimic-cxr-jpg"
        self.lines = []
        self.metadata = []

    def image(self, dicom_id, study=50000001, subject=10000001, split="train", view="PA"):
        self.lines.append(f"{dicom_id},{study},{subject},{split}")
        if view is not None:
            self.metadata.append(f"{dicom_id},{subject},{study},A (B),{view},3056")
        folder = f"files/p{str(subject)[:2]}/p{subject}/s{study}"
        path = self.images / folder / f"{dicom_id}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.linspace(0, 255, 24 * 32).reshape(24, 32).astype(np.uint8)).save(path)
        report = self.root / f"{folder}.txt"
        if not report.exists():
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(REPORT.format(study=study), encoding="utf-8")
        return path, report

    def write(self, packed=True, folder=None, **options):
        """Put the CSV files on disk; returns the source's options."""
        for name, header, lines in (
            (SPLIT, "dicom_id,study_id,subject_id,split", self.lines),
            (METADATA, self.METADATA_COLUMNS, self.metadata),
        ):
            data = "".join(f"{line}\n" for line in (header, *lines)).encode()
            path = (folder or self.images) / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(data) if packed else data)
        return {"root": str(self.root), "images": str(self.images), **options}

    def source(self, **options):
        return MimicCXRSource(**self.write(**options))

    def studies(self, **options):
        """The studies by their ids, each read by a copy of the source."""
        source = self.source(**options)
        copy = pickle.loads(pickle.dumps(source))
        return {entry.id: copy.read(entry) for entry in source.entries() if isinstance(entry, StudyEntry)}

    def listed(self, **options):
        """Ids of the studies that are listed, and the faults."""
        entries = list(self.source(**options).entries())
        return (
            [entry.id for entry in entries if isinstance(entry, StudyEntry)],
            [entry for entry in entries if isinstance(entry, Skipped)],
        )


@pytest.fixture
def release(tmp_path):
    return Release(tmp_path)


def test_mimic_release_is_read(release):
    paths = [
        release.image("02aa804e-bde0afdd", view="LATERAL")[0],
        release.image("f02aa804-e0bde0af", view="AP")[0],
        release.image("a", 50000002, view="PA")[0],
        release.image("b", 50000000, 10000002, "validate", view="")[0],
        release.image("c", 50000009, 10000003, "test", view="LL")[0],
    ]
    source = release.source()
    entries = list(source.entries())
    assert entries == list(source.entries())
    assert [entry[:3] for entry in entries] == [
        ("50000001", "10000001", "train"),
        ("50000002", "10000001", "train"),
        ("50000000", "10000002", "validation"),
        ("50000009", "10000003", "test"),
    ]
    studies = [pickle.loads(pickle.dumps(source)).read(entry) for entry in entries]
    assert [study.views for study in studies] == [["frontal", "lateral"], ["frontal"], ["unknown"], ["lateral"]]
    assert studies[0].images == [str(paths[1]), str(paths[0])]
    first = studies[0]
    assert (first.findings, first.impression) == ("The lungs of 50000001 are clear.", "Clear lungs.")
    assert (first.indication, first.comparison) == ("___ year old man after a fall.", "___.")
    assert first.licence == "PhysioNet Credentialed Health Data License 1.5.0"
    assert source.official_counts == {"train": 270790, "validation": 2130, "test": 3858}
    assert (source.official_unit, source.official_ids("train")) == ("images", None)


def test_mimic_studies_and_views_are_sorted(release):
    for dicom_id, view in (("z", "LATERAL"), ("d", ""), ("c", "AP"), ("b", "PA"), ("a", "LL")):
        release.image(dicom_id, 50000003, 10000009, view=view)
    release.image("e", 50000007, 10000002)
    release.image("f", 50000001, 10000009)
    assert release.listed()[0] == ["50000007", "50000001", "50000003"]
    names = [os.path.basename(path) for path in release.studies()["50000003"].images]
    assert names == ["b.jpg", "c.jpg", "a.jpg", "z.jpg", "d.jpg"]


def test_mimic_files_are_found_in_usual_places(release, tmp_path):
    path, report = release.image("a")
    for folder, packed in ((release.images, True), (release.images, False), (release.root, True)):
        assert list(release.studies(folder=folder, packed=packed)) == ["50000001"]
        for name in (SPLIT, METADATA):
            for file in folder.glob(f"{name}*"):
                file.unlink()
    elsewhere = tmp_path / "tables"
    elsewhere.mkdir()
    options = release.write(folder=elsewhere, packed=False)
    with pytest.raises(ValueError, match=r"no mimic-cxr-\*-split\.csv or \.csv\.gz in .*mimic-cxr-jpg.*option 'split'"):
        MimicCXRSource(**options)
    with pytest.raises(ValueError, match="option 'metadata' names the metadata CSV"):
        MimicCXRSource(**options, split=str(elsewhere / SPLIT))
    tables = {"split": str(elsewhere / SPLIT), "metadata": str(elsewhere / METADATA)}
    for root, images in ((release.root, release.images), (release.root / "files", release.images / "files")):
        source = MimicCXRSource(str(root), images=str(images), **tables)
        (entry,) = source.entries()
        assert source.read(entry).images == [str(path)]
    # All in one tree.
    together = report.with_suffix("") / "a.png"
    together.parent.mkdir()
    together.write_bytes(path.read_bytes())
    source = MimicCXRSource(str(release.root), image_suffix=".png", **tables)
    (entry,) = source.entries()
    assert source.read(entry).images == [str(together)]


def test_mimic_decompressed_table_keeps_its_name(release):
    release.image("a")
    options = release.write()
    path = release.images / f"{SPLIT}.gz"
    path.write_bytes(gzip.decompress(path.read_bytes()))
    assert [entry.id for entry in MimicCXRSource(**options).entries()] == ["50000001"]


def test_mimic_relative_folders_read_from_elsewhere(release, tmp_path, monkeypatch):
    release.image("a")
    release.write()
    monkeypatch.chdir(tmp_path)
    source = MimicCXRSource(root="mimic-cxr", images="mimic-cxr-jpg")
    monkeypatch.chdir(release.root)
    (entry,) = source.entries()
    assert os.path.isfile(source.read(entry).images[0])


def test_mimic_image_listed_twice_is_used_once(release):
    release.image("a")
    release.image("b")
    release.image("a")
    assert [len(study.images) for study in release.studies().values()] == [2]


def test_mimic_image_without_metadata_has_unknown_view(release):
    release.image("a", view=None)
    release.image("b")
    release.metadata.append("c")  # cut short, and of no image of the split
    assert release.studies()["50000001"].views == ["frontal", "unknown"]


@pytest.mark.parametrize(
    ("line", "split", "reason"),
    [
        ("b,50000002,1001,train", "train", "line 3 has subject_id '1001': expected a number of 8 digits"),
        ("b,s5000002,10000001,test", "test", "line 3 has study_id 's5000002': expected a number of 8 digits"),
        ("b,,,", None, "line 3 has study_id '': expected a number of 8 digits"),
        ("b", None, "line 3 has study_id '': expected a number of 8 digits"),
        ("b,50000002,10000001,dev", None, "line 3 has split 'dev': expected train, validate, test"),
        ("b,50000002,10000001", None, "line 3 has split '': expected train, validate, test"),
        ("../b,50000002,10000001,train", "train", "line 3 has dicom_id '../b': expected the name of an image file"),
        ("/b,50000002,10000001,train", "train", "line 3 has dicom_id '/b'"),
        (",50000002,10000001,train", "train", "line 3 has dicom_id ''"),
    ],
)
def test_mimic_malformed_line_is_named(release, line, split, reason):
    release.image("a")
    release.lines.append(line)
    release.image("c", 50000003)
    kept, (fault,) = release.listed()
    assert kept == ["50000001", "50000003"]
    assert (fault.kind, fault.split) == ("malformed", split)
    assert reason in fault.reason and SPLIT in fault.reason


def test_mimic_study_with_malformed_line_is_skipped_once(release):
    release.image("a")
    release.image("b", split="dev")
    release.image("../c")
    release.image("d", 50000002)
    kept, (fault,) = release.listed()
    assert kept == ["50000002"]
    assert fault.id == "50000001" and "line 3 has split 'dev'" in fault.reason


def test_mimic_study_in_two_splits_is_skipped(release):
    release.image("a")
    release.image("b", split="test")
    kept, (fault,) = release.listed()
    assert not kept
    assert fault.kind == "malformed" and fault.reason.endswith("in several splits: test, train")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, r"report .*p10/p10000001/s50000001\.txt is missing"),
        (b"FINDINGS: caf\xe9", r"report .*s50000001\.txt is not UTF-8 text \(byte 13\)"),
    ],
)
def test_mimic_unreadable_report_is_skipped(release, content, reason):
    _, report = release.image("a")
    report.unlink()
    if content is not None:
        report.write_bytes(content)
    source = release.source()
    (entry,) = source.entries()
    with pytest.raises(SkipStudy, match=reason) as caught:
        source.read(entry)
    assert caught.value.kind == "malformed"


def test_mimic_unlabelled_findings_follow_the_option(release):
    _, report = release.image("a")
    report.write_text("HISTORY: Fall.\n\nThe lungs are clear.\n\nIMPRESSION: Well.")
    assert release.studies()["50000001"].findings == "The lungs are clear."
    study = release.studies(labelled_findings=True)["50000001"]
    assert (study.findings, study.impression, study.indication) == ("", "Well.", "Fall.")


@pytest.mark.parametrize("name", [SPLIT, METADATA])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"dicom_id,x\n", "has no column '(subject_id|ViewPosition)': expected .*dicom_id.*; columns: dicom_id, x"),
        (b"", "has no column .*; columns: none"),
        (gzip.compress(HEADER + b"a\n" * 5000, mtime=0)[:-9], "is a damaged gzip file"),
        (gzip.compress(HEADER + b"a\n" * 5000, mtime=0)[:-8] + bytes(8), "is a damaged gzip file"),
        (gzip.compress(HEADER, mtime=0)[:12] + bytes(30), "is a damaged gzip file"),
        (b"\x1f\x8bnot gzip at all", "is a damaged gzip file"),
        (b"\xff\xfed\x00i\x00", "is not UTF-8 text"),
        (HEADER + b'"' + b"a" * 1_100_000, "is not a CSV"),
    ],
)
def test_mimic_malformed_tables_are_named(release, name, content, message):
    release.image("a")
    options = release.write(packed=False)
    (release.images / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(MimicCXRSource(**options).entries())
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_mimic_empty_or_ambiguous_split_is_named(release):
    release.image("a")
    release.lines.clear()
    with pytest.raises(ValueError, match=r"split\.csv\.gz holds no images"):
        release.listed()
    (release.images / f"other-{SPLIT}.gz").touch()
    with pytest.raises(ValueError, match=r"contains .*-split\.csv\.gz and other-.*-split\.csv\.gz: choose one"):
        release.listed()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": "nowhere"}, "nowhere does not exist: option 'root' names the folder of MIMIC-CXR"),
        ({"images": "nowhere"}, "nowhere does not exist: option 'images' names the folder of MIMIC-CXR-JPG"),
        ({"images": "."}, "has no folders files/p10 to files/p19: option 'images'"),
        ({"split": "nowhere.csv"}, r"nowhere\.csv does not exist: option 'split'"),
        ({"metadata": "."}, "is a folder: option 'metadata'"),
        ({"image_suffix": "jpg"}, r"option 'image_suffix' is 'jpg': expected \.jpg, \.png, \.dcm"),
        ({"image_suffix": "./../a"}, "option 'image_suffix' is"),
    ],
)
def test_mimic_wrong_options_are_named(release, tmp_path, monkeypatch, options, message):
    release.image("a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        MimicCXRSource(**{**release.write(), **options})


def test_mimic_dataset_is_built(release, tmp_path):
    release.image("a", view="LATERAL")
    release.image("b")
    release.image("c", 50000002, 10000002, "validate")
    release.image("d", 50000003, 10000003, "test")[1].unlink()
    release.image("e", 50000004, 10000004, "test")[0].unlink()
    release.image("f", 50000005, 10000005, "test")[1].write_text("IMPRESSION: Well.")
    release.image("g", 50000006, 10000006, "test")
    release.image("h", 50000007, 10000006)
    report = prepare_studies("mimic-cxr", tmp_path / "out", **release.write())
    studies = load_from_disk(tmp_path / "out")
    assert {split: rows["id"] for split, rows in studies.items()} == {
        "train": ["50000001"],
        "validation": ["50000002"],
        "test": ["50000006"],
    }
    first = studies["train"][0]
    assert (first["patient_id"], first["source"], first["report"]) == (
        "10000001",
        "mimic-cxr",
        "The lungs of 50000001 are clear.",
    )
    assert [image.size for image in first["images"]] == [(32, 24), (32, 24)] and first["views"] == [0, 1]
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert {fault["id"]: fault["kind"] for fault in skipped} == {
        "50000003": "malformed",
        "50000004": "missing image",
        "50000005": "empty report",
        "50000007": "patient in two splits",
    }
    assert [warning.split(" in ")[0] for warning in report.warnings] == [
        "train: 2 images, 270,790",
        "validation: 1 images, 2,130",
        "test: 1 images, 3,858",
    ]
    assert load_studies("mimic-cxr", sections="findings+impression", **release.write())["train"]["report"] == [
        "Findings: The lungs of 50000001 are clear. Impression: Clear lungs."
    ]


class TimedRelease(Release):
    """A release whose metadata says when studies were made."""

    METADATA_COLUMNS = f"{Release.METADATA_COLUMNS},StudyDate,StudyTime"

    def timed(self, study, day, clock="120000", **options):
        self.image(f"d{study}", study, **options)
        self.metadata[-1] += f",{day},{clock}"


def test_prepare_mimic_priors_are_the_nearest_earlier_studies(tmp_path):
    release = TimedRelease(tmp_path)
    # Not in the order of their numbers; times lack leading zeros; a time that is none.
    release.timed(50000001, "21800507", "82602.25")
    release.timed(50000002, "21800506", "93000")
    release.timed(50000003, "21800506", "1234.5")
    release.timed(50000004, "21800601", "")
    # Only studies of another patient are earlier.
    release.timed(50000005, "21800508", subject=10000002)
    options = release.write()
    report = prepare_studies(
        "mimic-cxr", tmp_path / "studies", build=BuildOptions(priors=True, parquet_only=True), **options
    )
    rows = {row["id"]: row for row in load_studies("prepared", folder=tmp_path / "studies")["train"]}
    days = {study: row["prior_days"] for study, row in rows.items()}
    assert days == {"50000001": 1, "50000002": 0, **dict.fromkeys(("50000003", "50000004", "50000005"))}
    assert rows["50000001"]["prior_report"] == rows["50000002"]["report"]
    assert rows["50000002"]["prior_report"] == rows["50000003"]["report"]
    assert [image.size for image in rows["50000001"]["prior_images"]] == [(32, 24)]
    assert (report.counts["train"].priors, report.counts["train"].unusable_priors) == (2, 0)
    assert "| priors |" in str(report) and "unusable priors" not in str(report)
    # Without the option nothing is looked for, and tables have no column of it.
    plain = prepare_studies("mimic-cxr", tmp_path / "plain", build=BuildOptions(parquet_only=True), **options)
    assert "| priors" not in str(plain)
    assert set(load_studies("prepared", folder=tmp_path / "plain")["train"]["prior_report"]) == {""}
