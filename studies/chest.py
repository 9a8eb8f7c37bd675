"""Recognise DICOM objects that are not chest radiographs by Modality, SOP class and BodyPartExamined."""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Mapping
from typing import Any

#: The kind of this fault in `SKIP_KINDS`.
NOT_CHEST = "not a chest radiograph"

#: Elements that are read.
CHEST_TAGS = ("Modality", "BodyPartExamined", "SOPClassUID")

#: Modalities that are not projection radiographs: defined terms of DICOM PS3.3 C.7.3.1.1.1 and other names in use. CR,
#: DX, DR, RF, scanned film and unknown ones are kept.
_OTHER_MODALITIES = re.compile(
    "AR|ASMT|AU|BDUS|BI|BMD|CFM|CS|CT|DG|DMS|DOC|ECG|EEG|EMG|EOG|EPS|ES|FA|FID|FS|GM|HD|IO|IOL|IVOCT|IVUS|KER|KO|LEN|"
    "LP|LS|M3D|MA|MG|MR|MS|NM|OAM|OCT|OP|OPM|OPT|OPTBSV|OPTENF|OPV|OSS|PLAN|PR|PT|PX|REG|RESP|RT(?:DOSE|IMAGE|INTENT|"
    "PLAN|RAD|RECORD|SEGANN|STRUCT)|SEG|SM|SMR|SR|SRF|ST|STAIN|TEXTUREMAP|TG|US|VA|VF|XA|XC|XAPROTOCOL|"
    "CBCT|CTA|CTPT|MAMMO|MRA|MRI|MRT|PET|PETCT|SPECT|ULTRASOUND|USG"
)

#: Content of storage SOP classes, by the part after their root; used if Modality is blank.
_STORAGE = "1.2.840.10008.5.1.4.1.1."
_OTHER_CLASSES = {
    "1.2": "mammography",
    "1.3": "intra-oral radiography",
    "2": "CT",
    "3": "ultrasound",
    "4": "MR",
    "6": "ultrasound",
    "12.1": "angiography",
    "13.1.3": "breast tomosynthesis",
    "20": "nuclear medicine",
    "77": "visible light",
    "128": "PET",
    "130": "PET",
    "481": "radiotherapy",
}

#: The chest in several languages, and values without information about the body part.
_CHEST = re.compile(r"CHEST|CHST|CXR|THORA|TORA|LUNG|PULM|POUMON|PECHO|BRUST|RINTA|BROST|KLATK|ГРУД|ЛЕГК|胸|肺")
_NO_CHEST = re.compile(r"SPINE|SPINAL|VERTEB|WIRBEL|COLUMN|RACHIS|LUMB")
_UNKNOWN = re.compile(
    r"\W*|UNK\w*|OTHERS?|UNSPEC\w*|UNDEFINED|NONE|NA|N A|NULL|DEFAULT|ANY|MISC\w*|BODY|WHOLE ?BODY|TRUNK"
)


def chest_fault(header: Mapping[str, Any]) -> str | None:
    """Why an object is not a chest radiograph; None if it may be one.

    Args:
        header: values of `CHEST_TAGS`, as far as present.
    """
    modality, body_part = (_words(header.get(tag)) for tag in ("Modality", "BodyPartExamined"))
    if any(_OTHER_MODALITIES.fullmatch(word) for word in [*modality.split(), modality.replace(" ", "")]):
        return f"Modality is {modality}, expected a radiograph (CR, DX, DR or RF)"
    branch = str(header.get("SOPClassUID") or "").strip().removeprefix(_STORAGE)
    if not modality:
        for prefix, name in _OTHER_CLASSES.items():
            if branch == prefix or branch.startswith(f"{prefix}."):
                return f"SOPClassUID is that of {name}, expected a radiograph"
    is_chest = _CHEST.search(body_part) and not _NO_CHEST.search(body_part)
    if is_chest or _UNKNOWN.fullmatch(body_part):
        return None
    return f"BodyPartExamined is {body_part}, expected CHEST"


def dicom_chest_fault(data: bytes) -> str | None:
    """As [`chest_fault`], for the bytes of a readable DICOM file."""
    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True, specific_tags=list(CHEST_TAGS), force=True)
        return chest_fault({tag: header_value(header, tag) for tag in CHEST_TAGS})


def header_value(header: Any, tag: str) -> Any | None:
    """The value of an element; None if it is missing or damaged."""
    try:
        return header.get(tag)
    except Exception:  # values are parsed on access and may be damaged
        return None


def _words(value: Any) -> str:
    """A value in capitals, without accents, with single spaces between words."""
    texts = [value] if isinstance(value, str) or value is None else list(value)
    text = " ".join(str(text) for text in texts if text is not None)
    text = "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
    return " ".join(re.findall(r"\w+", text.upper().replace("_", " ")))
