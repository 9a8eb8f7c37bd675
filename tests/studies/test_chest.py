"""Which DICOM objects are left out of a dataset of chest radiographs."""

import json

import numpy as np
import pytest
from otdrg.studies import prepare_studies
from otdrg.studies.chest import chest_fault


@pytest.mark.parametrize("modality", ["CR", "DX", "DR", "RF", "cr ", "RG", "OT", "XR", "", None])
@pytest.mark.parametrize(
    "body_part",
    [
        "CHEST",
        "Chest",
        "THORAX",
        "Tórax",
        "TORAX",
        "PORT CHEST",
        "chest pa",
        "CHESTABDOMEN",
        "Brustkorb",
        "грудная клетка",
        "胸部",
        "",
        " ",
        None,
        "UNKNOWN",
        "N/A",
        "-",
    ],
)
def test_chest_fault_of_a_chest_radiograph_is_none(modality, body_part):
    assert chest_fault({"Modality": modality, "BodyPartExamined": body_part}) is None


@pytest.mark.parametrize(
    "modality", ["CT", "MR", "US", "ct", " MR ", "MG", "PT", "NM", "XA", "SEG", ["CT", "PT"], "MRI"]
)
def test_chest_fault_names_another_modality(modality):
    assert "Modality is " in chest_fault({"Modality": modality, "BodyPartExamined": "CHEST"})


@pytest.mark.parametrize(
    "body_part",
    [
        "HAND",
        "Knee",
        "FOOT",
        "ANKLE",
        "L_SHOULDER",
        "HIP",
        "PELVIS",
        "ABDOMEN",
        "SKULL",
        "LSPINE",
        "FEMUR",
        "THORACIC SPINE",
        "T-SPINE THORAX SPINE",
        "Knie",
        "RODILLA",
        ["HAND", "WRIST"],
    ],
)
def test_chest_fault_names_another_body_part(body_part):
    assert "BodyPartExamined is " in chest_fault({"Modality": "DX", "BodyPartExamined": body_part})


@pytest.mark.parametrize("branch", ["2", "2.1", "4", "4.1", "6.1", "20", "128", "1.2", "12.1"])
def test_chest_fault_blank_modality_uses_the_sop_class(branch):
    header = {"SOPClassUID": f"1.2.840.10008.5.1.4.1.1.{branch}"}
    assert "SOPClassUID is that of" in chest_fault(header)
    assert chest_fault({**header, "Modality": "DX"}) is None
    for kept in ("1", "1.1", "1.1.1", "7", "12.2"):
        assert chest_fault({"SOPClassUID": f"1.2.840.10008.5.1.4.1.1.{kept}"}) is None


@pytest.mark.parametrize("source", ["dicom", "csv"])
def test_prepare_other_body_part_is_skipped_and_counted(dicom, tmp_path, source):
    pixels = np.linspace(0, 4095, 48 * 40).reshape(48, 40).astype(np.uint16)
    headers = {"chest": {}, "ct": {"Modality": "CT"}, "hand": {"BodyPartExamined": "HAND"}, "thorax": {}}
    headers["thorax"]["BodyPartExamined"] = "Thorax"
    lines = ["image,study_id,report"]
    for number, (name, fields) in enumerate(headers.items()):
        dicom(pixels, name=f"{name}.dcm", StudyInstanceUID=f"1.2.{number}", PatientID=f"p{number}", **fields)
        (tmp_path / f"{name}.txt").write_text("The heart is normal.")
        lines.append(f"{name}.dcm,{name},The heart is normal.")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    options = {"folder": tmp_path} if source == "dicom" else {"table": tmp_path / "table.csv"}
    report = prepare_studies(source, tmp_path / "built", **options)
    assert sum(counts.studies for counts in report.counts.values()) == 2
    assert sum(counts.not_chest for counts in report.counts.values()) == 2
    skipped = [json.loads(line) for line in (tmp_path / "built" / "skipped.jsonl").open(encoding="utf-8")]
    assert {fault["id"]: fault["kind"] for fault in skipped} == dict.fromkeys(("ct", "hand"), "not a chest radiograph")
    assert all("expected" in fault["reason"] and ".dcm" in fault["reason"] for fault in skipped)
