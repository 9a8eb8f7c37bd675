"""Source `r2gen`: the `annotation.json` and image folder in which R2Gen published IU X-Ray and MIMIC-CXR."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from .schema import STUDY_FEATURES, VIEWS

_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_IU_XRAY_ID = re.compile(r"CXR\d+(?=_)")
_LISTED = 20

logger = logging.getLogger(__name__)


def load(*, annotation: str | os.PathLike, images: str | os.PathLike, limit: int | None = None) -> DatasetDict:
    """Studies of an R2Gen annotation; the images stay files on disk and are read when a row is.

    R2Gen's reports are the FINDINGS section, so `findings` and `report` hold the same text. The annotation does not
    tell the views apart (in IU X-Ray the order varies), so they are "unknown".

    A study with a missing image is left out; how many were, and which, is logged as one warning.

    Args:
        annotation: path of `annotation.json`: `{"train": [{"id", "report", "image_path": [...]}, ...], "val", "test"}`.
        images: folder to which each `image_path` is relative.
        limit: most studies kept of each split, from its start.

    Raises:
        ValueError: annotation or folder is missing, is not in R2Gen's form, or names an image outside the folder; no
            image at all is found.
    """
    annotation, images = Path(annotation), Path(images)
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"option 'limit' is {limit!r}: expected a positive number of studies")
    if not images.is_dir():
        raise ValueError(f"image folder {images} does not exist: option 'images' names the folder of R2Gen's images")
    # An absolute root, so that the dataset can be read after a change of folder and from another process.
    root = os.path.abspath(images)
    splits, missing = {}, []
    for name, entries in _read_annotation(annotation).items():
        studies = []
        for position, entry in enumerate(entries):
            if len(studies) == limit:
                break
            study = _study(entry, root, f"{annotation}, {name}[{position}]")
            absent = [path for path in study["images"] if not os.path.isfile(path)]
            missing += [(study["id"], path) for path in absent]
            if not absent:
                studies.append(study)
        if studies:
            splits[_SPLITS[name]] = Dataset.from_list(studies, features=STUDY_FEATURES)
    if missing:
        _report_missing(missing, images, none_left=not splits)
    if not splits:
        raise ValueError(f"{annotation} holds no studies: expected lists under {', '.join(_SPLITS)}")
    return DatasetDict({split: splits[split] for split in _SPLITS.values() if split in splits})


def _read_annotation(path: Path) -> dict[str, list]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"annotation {path} does not exist: option 'annotation' names R2Gen's JSON file") from None
    except IsADirectoryError:
        raise ValueError(f"annotation {path} is a folder: option 'annotation' names R2Gen's JSON file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"annotation {path} is not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"annotation {path} is not valid JSON: {error}") from None
    if not isinstance(content, dict) or any(not isinstance(entries, list) for entries in content.values()):
        raise ValueError(f"annotation {path} is not in R2Gen's form: expected lists under {', '.join(_SPLITS)}")
    unknown = [name for name in content if name not in _SPLITS]
    if unknown:
        raise ValueError(f"annotation {path} has an unknown split {unknown[0]!r}: expected {', '.join(_SPLITS)}")
    return content


def _study(entry: Any, root: str, place: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"{place} is not a study: expected an object with id, report and image_path")
    for field, kind, wanted in (("id", (str, int), "a string"), ("report", str, "a string")):
        if not isinstance(entry.get(field), kind):
            raise ValueError(f"{place} has {field} {entry.get(field)!r}: expected {wanted}")
    paths = entry.get("image_path")
    if not isinstance(paths, list) or not paths or any(not isinstance(path, str) for path in paths):
        raise ValueError(f"{place} has image_path {paths!r}: expected a list of file names")
    study_id = str(entry["id"])
    in_iu_xray = _IU_XRAY_ID.match(study_id)
    if "subject_id" in entry:
        patient_id, licence = str(entry["subject_id"]), "PhysioNet Credentialed Health Data License 1.5.0"
    elif in_iu_xray:  # one study a patient: the number after CXR is the patient's
        patient_id, licence = in_iu_xray.group(), "CC BY-NC-ND 4.0"
    else:
        patient_id, licence = study_id, ""
    return {
        "id": study_id,
        "patient_id": patient_id,
        "images": [_inside(root, path, place) for path in paths],
        "views": [VIEWS.index("unknown")] * len(paths),
        "findings": entry["report"],
        "impression": "",
        "indication": "",
        "comparison": "",
        "report": entry["report"],
        "finding_states": None,
        "source": "r2gen",
        "licence": licence,
    }


def _inside(root: str, path: str, place: str) -> str:
    """The image's absolute path. Only the annotation is distrusted: links in the folder are its owner's."""
    full = os.path.normpath(os.path.join(root, path))
    if os.path.isabs(path) or not full.startswith(os.path.join(root, "")):
        raise ValueError(f"{place} has image_path {path!r}, which leaves the image folder: expected a path inside it")
    return full


def _report_missing(missing: list[tuple[str, str]], images: Path, none_left: bool) -> None:
    if none_left:
        raise ValueError(
            f"no study has its images in {images} (the first missing file is {missing[0][1]}): "
            "option 'images' names the folder to which image_path is relative"
        )
    studies = dict.fromkeys(study for study, _ in missing)
    listed = ", ".join(f"{path} (study {study})" for study, path in missing[:_LISTED])
    rest = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
    logger.warning(
        "%d studies left out because %d image files are missing: %s%s", len(studies), len(missing), listed, rest
    )
