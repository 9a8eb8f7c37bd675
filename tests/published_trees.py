"""Trees of the shape in which collections are published, of a few studies each."""

import csv
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
from PIL import Image

REXGRADIENT_SPLITS = ("train", "valid", "test")


def png(seed, size=(24, 20)):
    pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class ReXGradientDownload:
    """A tree of the shape of rajpurkarlab/ReXGradient-160K; `study` adds studies, `write` puts it on disk."""

    def __init__(self, folder):
        self.root = folder / "ReXGradient-160K"
        self.records = {split: {} for split in REXGRADIENT_SPLITS}
        self.images = {}

    def study(self, number, split="train", views=("PA",), patient=None, images=(), **fields):
        patient = patient or f"GRDNPATIENT{number}"
        folder = f"{patient}/GRDNACCESSION{number}/studies/1.2.{number}/series/1.3/instances"
        names = [f"{folder}/1.4.{place}.png" for place in range(len(views))]
        self.images |= {name: png((number, place)) for place, name in enumerate(names)} | dict(
            zip(names, images, strict=False)
        )
        self.records[split][f"p{patient}_aGRDNACCESSION{number}_s1.2.{number}"] = {
            "PatientID": patient,
            "AccessionNumber": f"GRDNACCESSION{number}",
            "StudyInstanceUid": f"1.2.{number}",
            "StudyDate": 20140300 + number,
            "PatientAge": "036Y",
            "PatientSex": "F",
            "EthnicGroup": float("nan"),
            "Indication": "Cough.",
            "Comparison": "None.",
            "Findings": f"The lungs of {number} are clear.",
            "Impression": "No acute finding.",
            "ImagePath": [f"../deid_png/{name}" for name in names],
            "ImageViewPosition": list(views),
            **fields,
        }

    def archive(self):
        """The zstd tar of the images."""
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name, data in {**self.images, "unlisted.png": png(99)}.items():
                member = tarfile.TarInfo(f"deid_png/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return pa.compress(file.getvalue(), codec="zstd", asbytes=True)

    def write(self, parts=4, packed=None, **options):
        """Write the metadata and the parts of the archive (`packed`); returns the options of the source."""
        (self.root / "metadata").mkdir(parents=True, exist_ok=True)
        for split, records in self.records.items():
            path = self.root / "metadata" / f"{split}_metadata_view_position.json"
            path.write_text(json.dumps(records), encoding="utf-8")
        packed = self.archive() if packed is None else packed
        size = -(-len(packed) // parts)
        for number in range(parts):
            self.part(number).write_bytes(packed[number * size : (number + 1) * size])
        return {"root": str(self.root), **options}

    def part(self, number):
        return self.root / f"deid_png.part{number:02}"

    def unpacked(self):
        return {
            path.relative_to(self.root / "deid_png").as_posix(): path.read_bytes()
            for path in (self.root / "deid_png").rglob("*.png")
        }


class CheXpertPlusDownload:
    """A tree of the shape of CheXpert Plus; `image` adds a line and its file, `write` puts the table on disk."""

    COLUMNS = (
        "path_to_image",
        "path_to_dcm",
        "frontal_lateral",
        "ap_pa",
        "deid_patient_id",
        "patient_report_date_order",
        "report",
        "section_narrative",
        "section_clinical_history",
        "section_history",
        "section_comparison",
        "section_technique",
        "section_procedure_comments",
        "section_findings",
        "section_impression",
        "section_end_of_impression",
        "section_summary",
        "section_accession_number",
        "age",
        "sex",
        "race",
        "ethnicity",
        "interpreter_needed",
        "insurance_type",
        "recent_bmi",
        "deceased",
        "split",
    )

    def __init__(self, folder):
        self.root = folder / "chexpert_plus"
        self.rows = []
        self.labels = []

    def image(self, patient=1, study=1, view=1, kind="Frontal", split="train", data=None, labels=None, **cells):
        """Add a line; `cells` replace its values. Returns the path of the image."""
        path = f"{split}/patient{patient:05}/study{study}/view{view}_{kind.lower()}.jpg"
        findings = f"The lungs of {patient} are clear,\nand the heart is normal."
        row = dict.fromkeys(self.COLUMNS, "") | {
            "path_to_image": path,
            "path_to_dcm": path.replace(".jpg", ".dcm"),
            "frontal_lateral": kind,
            "ap_pa": "AP" if kind == "Frontal" else "",
            "deid_patient_id": f"patient{patient:05}",
            "patient_report_date_order": study,
            "report": f"FINDINGS:\n{findings}",
            "section_clinical_history": "Cough.",
            "section_comparison": "None.",
            "section_findings": findings,
            "section_impression": "1. No acute disease.",
            "age": "82.0",
            "split": split,
        }
        self.rows.append(row | cells)
        if labels is not None:
            self.labels.append({"path_to_image": path, **labels})
        file = self.root / "PNG" / "PNG" / path.replace(".jpg", ".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png((patient, study, view)) if data is None else data)
        return file

    def write(self, columns=COLUMNS, **options):
        """Write the table and, if there are labels, their file; returns the options of the source."""
        with (self.root / "df_chexpert_plus_240401.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)
        if self.labels:
            labels = self.root / "chexbert_labels" / "impression_fixed.json"
            labels.parent.mkdir(exist_ok=True)
            labels.write_text("".join(json.dumps(line) + "\n" for line in self.labels), encoding="utf-8")
            options = {"labels": str(labels), **options}
        return {"root": str(self.root), **options}
