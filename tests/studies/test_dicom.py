import os
import pickle

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed")

from otdrg.studies.dicom import DICOMSource  # noqa: E402
from otdrg.studies.source import Skipped, StudyEntry  # noqa: E402

RADIOGRAPH = "1.2.840.10008.5.1.4.1.1.1.1"
STRUCTURED_REPORT = "1.2.840.10008.5.1.4.1.1.88.11"


@pytest.fixture
def archive(tmp_path):
    """A folder to put DICOM files and reports in."""
    return Archive(tmp_path / "archive")


class Archive:
    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()

    def image(self, name, study="1.2.3", sop_class=RADIOGRAPH, **elements):
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = sop_class
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = pydicom.uid.generate_uid()
        dataset.StudyInstanceUID = study
        if sop_class == RADIOGRAPH:
            dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 32, 24, 1
            dataset.PhotometricInterpretation = "MONOCHROME2"
            dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
            dataset.PixelData = np.linspace(0, 4095, 32 * 24).astype("<u2").tobytes()
        for element, value in elements.items():
            setattr(dataset, element, value)
        path = self.path(name)
        with pydicom.config.disable_value_validation():
            dataset.save_as(path, enforce_file_format=True)
        return path

    def text(self, name, content="The heart is normal."):
        self.path(name).write_bytes(content if isinstance(content, bytes) else content.encode())

    def path(self, name):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def source(self, **options):
        return DICOMSource(folder=str(self.folder), **options)

    def kept(self, **options):
        """The studies by their ids, after each has been read by a copy of the source."""
        source = self.source(**options)
        copy = pickle.loads(pickle.dumps(source))
        return {entry.id: copy.read(entry) for entry in source.entries() if isinstance(entry, StudyEntry)}

    def skipped(self, **options):
        return [entry for entry in self.source(**options).entries() if isinstance(entry, Skipped)]


def test_dicom_study_in_a_folder_is_read(archive):
    archive.image("s1/b.dcm", "1.1", ViewPosition="LL", InstanceNumber=1)
    archive.image("s1/c.dcm", "1.1", ViewPosition="PA", InstanceNumber=3)
    archive.image("s1/a.dcm", "1.1", ViewPosition="AP", InstanceNumber=20)
    archive.text("s1/report.txt", "FINDINGS: The heart is normal.\nIMPRESSION: No disease.\n")
    archive.image("p2/s2/a.dcm", "1.2")
    archive.text("p2/s2.txt", "A plain report.")
    studies = archive.kept(licence="CC0")
    assert set(studies) == {"s1", "p2/s2"}
    first = studies["s1"]
    assert [os.path.relpath(path, archive.folder) for path in first.images] == ["s1/c.dcm", "s1/a.dcm", "s1/b.dcm"]
    assert (first.views, first.licence) == (["frontal", "frontal", "lateral"], "CC0")
    assert (first.findings, first.impression) == ("The heart is normal.", "No disease.")
    assert studies["p2/s2"].findings == "A plain report."


def test_dicom_studies_in_one_folder_are_separated(archive):
    archive.image("a.dcm", "1.1", ViewPosition="LATERAL")
    archive.image("b.dcm", "1.2", ViewPosition="PA")
    archive.image("c.dcm", "1.1", ViewPosition="PA")
    archive.text("c.txt", "Of the first.")
    archive.text("b.TXT", "Of the second.")
    studies = archive.kept()
    assert {name: study.findings for name, study in studies.items()} == {"a": "Of the first.", "b": "Of the second."}
    assert [os.path.basename(path) for path in studies["a"].images] == ["c.dcm", "a.dcm"]


def test_dicom_study_across_folders_is_joined(archive):
    archive.image("s1/series1/a.dcm", "1.1")
    archive.image("s1/series2/a.dcm", "1.1")
    archive.text("s1/dictated.txt", "Of the first.")
    archive.image("s2/series1/a.dcm", "1.2")
    archive.text("s2/report.txt", "Of the second.")
    studies = archive.kept()
    assert {name: study.findings for name, study in studies.items()} == {
        "s1": "Of the first.",
        "s2/series1": "Of the second.",
    }


def test_dicom_reports_folder_is_searched(archive, tmp_path):
    archive.image("p1/a.dcm", "1.1")
    archive.image("p1/b.dcm", "1.2")
    (tmp_path / "texts" / "p1").mkdir(parents=True)
    for name in "ab":
        (tmp_path / "texts" / "p1" / f"{name}.txt").write_text(f"Report {name}.")
    studies = archive.kept(reports=str(tmp_path / "texts"))
    assert {name: study.findings for name, study in studies.items()} == {"p1/a": "Report a.", "p1/b": "Report b."}


def test_dicom_files_without_suffix_or_preamble_are_found(archive):
    archive.image("IM0001", "1.1")
    archive.text("IM0001.txt")
    bare = archive.image("old.dcm", "1.2")
    bare.write_bytes(bare.read_bytes()[132:])
    archive.text("old.txt")
    archive.text("README", "Nothing in here is DICOM. " * 20)
    archive.image(".hidden.dcm", "1.3")
    archive.image("DICOMDIR", "", "1.2.840.10008.1.3.10")
    assert set(archive.kept()) == {"IM0001", "old"}
    assert archive.skipped() == []


PHI = {
    "PatientName": "Musterfrau^Erika",
    "PatientID": "PID-8675309",
    "AccessionNumber": "ACC-4711",
    "PatientBirthDate": "19640812",
    "StudyDate": "20190203",
    "StudyInstanceUID": "1.2.276.0.7230010.3.1.2.8323329",
    "InstitutionName": "Musterklinik",
    "ReferringPhysicianName": "Doktor^Dora",
    "SeriesDescription": "Thorax pa Musterfrau",
    "ImageComments": "Musterfrau, room 12",
    "StationName": "ROOM12",
}


def test_dicom_header_only_the_view_is_kept(archive):
    archive.image("a.dcm", **PHI)
    archive.image("b.dcm", **{**PHI, "StudyInstanceUID": "1.2.276.9", "BurnedInAnnotation": "YES"})
    archive.image("c.dcm", **{**PHI, "StudyInstanceUID": "1.2.276.8", "PatientID": "PID-2\\x"})
    archive.image("d.dcm", "1.2.276.7", STRUCTURED_REPORT, **{**PHI, "StudyInstanceUID": "1.2.276.7"})
    for name in "abc":
        archive.text(f"{name}.txt")
    source = archive.source()
    yielded = list(source.entries())
    studies = [source.read(entry) for entry in yielded if isinstance(entry, StudyEntry)]
    assert [study.views for study in studies] == [["frontal"], ["frontal"]]
    for text in (repr(yielded), repr(studies), str(pickle.dumps(yielded)), str(pickle.dumps(source))):
        for value in [*PHI.values(), *PHI["PatientName"].split("^"), "1.2.276", "PID"]:
            assert value not in text


def test_dicom_stored_image_has_no_metadata(archive):
    from otdrg.studies.images import stored_image
    from PIL import Image

    path = archive.image("a.dcm", **PHI)
    stored = stored_image(str(path))
    assert stored["path"] is None
    for value in PHI.values():
        assert value.encode() not in stored["bytes"]
    path.with_suffix(".png").write_bytes(stored["bytes"])
    with Image.open(path.with_suffix(".png")) as image:
        assert (image.format, image.mode, image.size, image.info) == ("PNG", "L", (24, 32), {})
        assert (np.asarray(image).min(), np.asarray(image).max()) == (0, 255)


def test_dicom_patients_are_numbered_and_assigned(archive):
    for index in range(30):
        archive.image(f"{index:02}.dcm", f"1.{index}", PatientID="" if index == 29 else f"ID{index // 3}")
        archive.text(f"{index:02}.txt")
    entries = list(archive.source().entries())
    assert [entry.patient_id for entry in entries] == [f"patient-{1 + index // 3}" for index in range(29)] + [
        "patient-11"
    ]
    splits = {(entry.patient_id, entry.split) for entry in entries}
    assert len(splits) == 11
    assert {split for _, split in splits} == {"train", "validation", "test"}
    assert list(archive.source().entries()) == entries
    assert {entry.split for entry in archive.source(split_shares=[0, 0, 1]).entries()} == {"test"}


def code(meaning):
    item = pydicom.Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = "399348003", "SCT", meaning
    return [item]


@pytest.mark.parametrize(
    ("elements", "view"),
    [
        ({"ViewPosition": "PA"}, "frontal"),
        ({"ViewPosition": "AP"}, "frontal"),
        ({"ViewPosition": "RL"}, "lateral"),
        ({"ViewPosition": "LATERAL"}, "lateral"),
        ({"ViewPosition": "LLD", "SeriesDescription": "Lateral"}, "unknown"),
        ({}, "unknown"),
        ({"ViewPosition": ""}, "unknown"),
        ({"ViewCodeSequence": code("antero-posterior")}, "frontal"),
        ({"ViewCodeSequence": code("left lateral")}, "lateral"),
        ({"ViewCodeSequence": code("left lateral decubitus")}, "unknown"),
        ({"SeriesDescription": "W033 Chest pa"}, "frontal"),
        ({"SeriesDescription": "CHEST_LAT"}, "lateral"),
        ({"SeriesDescription": "Chest PA and lateral"}, "unknown"),
        ({"SeriesDescription": "Chest, patient sitting"}, "unknown"),
    ],
)
def test_dicom_view_is_read_from_the_header(archive, elements, view):
    archive.image("a.dcm", **elements)
    archive.text("a.txt")
    assert archive.kept()["a"].views == [view]


def test_dicom_objects_without_image_are_no_views(archive):
    archive.image("s/a.dcm")
    archive.image("s/b.dcm", sop_class=STRUCTURED_REPORT)
    archive.text("s.txt")
    assert [os.path.basename(path) for path in archive.kept()["s"].images] == ["a.dcm"]


def test_dicom_file_without_pixels_is_skipped(archive):
    archive.image("a.dcm", sop_class=STRUCTURED_REPORT)
    archive.text("a.txt")
    (fault,) = archive.skipped()
    assert (fault.id, fault.kind) == ("a", "unreadable image") and "a.dcm" in fault.reason


def test_dicom_other_file_with_suffix_is_skipped(archive):
    archive.image("a.dcm")
    archive.text("a.txt")
    archive.text("b.dcm", "This is a note about a patient, and no radiograph. " * 9)
    archive.text("b.txt")
    archive.text("c.dcm", b"")
    assert [(fault.id, fault.kind) for fault in archive.skipped()] == [("b", "malformed"), ("c", "malformed")]
    assert list(archive.kept()) == ["a"]


def test_dicom_study_without_report_is_skipped(archive):
    archive.image("s1/a.dcm", "1.1")
    archive.image("s2/a.dcm", "1.2")
    archive.text("s2/a.txt")
    (fault,) = archive.skipped()
    assert (fault.id, fault.kind) == ("s1", "empty report")
    assert "expected s1/a.txt or s1/report.txt" in fault.reason.replace(os.sep, "/")


def test_dicom_report_of_another_study_is_not_used(archive):
    archive.image("a.dcm", "1.1")
    archive.image("b.dcm", "1.2")
    archive.text("report.txt")
    archive.image("s/c.dcm", "1.3")
    archive.text("s/d.dcm", "damaged")
    archive.text("s/d.txt")
    assert archive.kept() == {}
    assert [fault.id for fault in archive.skipped() if fault.kind == "empty report"] == ["a", "b", "s/c"]


@pytest.mark.parametrize("names", [("s/a.txt", "s/b.txt"), ("s/x.txt", "s/y.txt")])
def test_dicom_different_reports_skip_the_study(archive, names):
    from otdrg.studies.source import SkipStudy

    archive.image("s/a.dcm")
    archive.image("s/b.dcm")
    for name in names:
        archive.text(name)
    assert archive.kept()["s"].findings == "The heart is normal."
    archive.text(names[1], "The heart is large.")
    with pytest.raises(SkipStudy, match=r"s/[ax]\.txt and s/[by]\.txt differ: expected one report") as skip:
        archive.kept()
    assert skip.value.kind == "malformed"


def test_dicom_encoding_option_decodes_reports(archive):
    from otdrg.studies.source import SkipStudy

    archive.image("a.dcm")
    archive.text("a.txt", b"\xef\xbb\xbfClear.")
    assert archive.kept()["a"].findings == "Clear."
    archive.text("a.txt", "Röntgen".encode("cp1252"))
    assert archive.kept(encoding="cp1252")["a"].findings == "Röntgen"
    with pytest.raises(SkipStudy, match=r"a\.txt is not utf-8 text \(byte 1\): set option 'encoding'"):
        archive.kept()


def test_dicom_burned_in_annotation_skips_the_study(archive):
    archive.image("a.dcm", BurnedInAnnotation="YES")
    archive.text("a.txt")
    (fault,) = archive.skipped()
    assert fault.kind == "malformed" and "a.dcm: BurnedInAnnotation is YES" in fault.reason
    assert list(archive.kept(burned_in=True)) == ["a"]


def test_dicom_invalid_instance_number_is_ignored(archive):
    path = archive.image("a.dcm", InstanceNumber=12345678)
    path.write_bytes(path.read_bytes().replace(b"12345678", b"the 1st "))
    archive.text("a.txt", "Normal.")
    assert archive.kept()["a"].findings == "Normal."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "holds no DICOM file: option 'folder'"),
        ({"reports": "nowhere"}, "nowhere does not exist: option 'reports'"),
        ({"encoding": "utf-9"}, "option 'encoding' is 'utf-9'"),
        ({"split_shares": [1, 1, 1]}, "expected three shares"),
    ],
)
def test_dicom_wrong_options_are_named(archive, options, message):
    archive.text("a.txt")
    with pytest.raises(ValueError, match=message) as error:
        list(archive.source(**options).entries())
    assert "\n" not in str(error.value)


def test_dicom_without_pydicom_names_the_package(archive, monkeypatch):
    monkeypatch.setattr("otdrg.studies.dicom.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'otdrg\[dicom\]'"):
        archive.source()


def test_dicom_dataset_does_not_identify_patients(archive, tmp_path):
    from datasets import load_from_disk
    from otdrg.studies import prepare_studies

    secrets = {"PatientName": "Secret^Person", "PatientID": "MRN4711", "AccessionNumber": "ACC4712"}
    for number in range(4):
        ramp = {"PhotometricInterpretation": ("MONOCHROME2", "MONOCHROME1")[number % 2]}
        person = {name: f"{value}{number}" for name, value in secrets.items()}
        study = f"1.2.840.99.{number}.4713"
        archive.image(f"s{number}/pa.dcm", study, ViewPosition="PA", PatientBirthDate="19470114", **person, **ramp)
        archive.image(f"s{number}/lat.dcm", study, ViewPosition="LL", PatientBirthDate="19470114", **person, **ramp)
        archive.text(f"s{number}/report.txt", "FINDINGS:\nThe heart is normal.\n\nIMPRESSION: No disease.")
    archive.path("s3/lat.dcm").write_bytes(archive.path("s3/lat.dcm").read_bytes()[:900])
    output = tmp_path / "built"
    report = prepare_studies("dicom", output, folder=str(archive.folder))
    rows = {row["id"]: row for split in load_from_disk(output).values() for row in split}
    assert set(rows) == {"s0", "s1", "s2"}
    assert sum(counts.unreadable_images for counts in report.counts.values()) == 1
    white_at = {name: np.asarray(row["images"][0])[-1, -1] for name, row in rows.items()}
    assert white_at == {"s0": 255, "s1": 0, "s2": 255}
    for row in rows.values():
        assert row["views"] == [0, 1] and row["findings"] == row["report"] == "The heart is normal."
        assert [(image.mode, image.size, image.info) for image in row["images"]] == [("L", (24, 32), {})] * 2
    # Arrow files are not compressed: what they hold can be looked for in their bytes.
    written = b"".join(path.read_bytes() for path in output.rglob("*") if path.suffix in (".arrow", ".json", ".md"))
    for secret in (b"Secret", b"MRN4711", b"ACC4712", b"19470114", b"4713"):
        assert secret not in written
