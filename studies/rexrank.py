"""ReXrank's files: a JSON object that has for each study, under its id, its images, context and true report.

The shape of `data/` and `example_files/` in github.com/rajpurkarlab/ReXrank. A file of predictions holds the same
objects with `model_prediction`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files_otdrg import read_json, write_json

PREDICTION, REFERENCE = "model_prediction", "report"
#: Of these ReXrank's own evaluation joins the true report.
_SECTIONS = {"Findings": "section_findings", "Impression": "section_impression"}
_INDICATION = re.compile(r"Indication:\s*(.*?)\s*(?:\b(?:Comparison|History|Technique):|</context>|$)", re.DOTALL)


def read_rexrank(path: str | Path) -> dict[str, dict[str, Any]]:
    """The studies of a file, by id.

    Raises:
        ValueError: the file cannot be read, or is no such object; one line that names the file and the study.
    """
    expected = "a JSON object with an object for each study"
    try:
        studies = read_json(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}), expected {expected}") from None
    if not studies:
        raise ValueError(f"{path}: no study in it, expected {expected}")
    for study, fields in studies.items():
        if not study.strip() or not isinstance(fields, dict):
            raise ValueError(f"{path}, study {study!r}: {type(fields).__name__}, expected {expected}")
    return studies


def study_images(path: str | Path, study: str, fields: Mapping[str, Any], root: str | Path) -> list[str]:
    """The paths of a study's images below `root`.

    Raises:
        ValueError: it has none, or one is not a text.
    """
    images = fields.get("image_path") or fields.get("key_image_path")
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not images or not all(isinstance(image, str) and image for image in images):
        raise ValueError(f"{path}, study {study!r}: image_path is {images!r}, expected a list of paths")
    # Those of MIMIC-CXR begin with a slash.
    return [str(Path(root) / image.lstrip("/")) for image in images]


def study_indication(fields: Mapping[str, Any]) -> str | None:
    """The indication within a study's context; None without one."""
    found = _INDICATION.search(fields.get("context") or "")
    return (found[1] or None) if found else None


def rexrank_reports(path: str | Path, column: str) -> Iterator[tuple[str, str]]:
    """Iterate over the ids and reports of a file.

    Args:
        path: of the file.
        column: key of the reports. A missing `report` is joined from its sections as ReXrank does it.

    Raises:
        ValueError: as [`read_rexrank`], or a study has no such report.
    """
    for study, fields in read_rexrank(path).items():
        report = fields.get(column)
        if column == REFERENCE and column not in fields:
            texts = {title: fields.get(key) for title, key in _SECTIONS.items()}
            report = " ".join(f"{title}: {text.strip()}" for title, text in texts.items() if isinstance(text, str))
        elif column in fields and (report is None or report != report):  # null or NaN, in the place of an empty section
            report = ""
        if not isinstance(report, str) or (column not in fields and not report):
            found = f"is {type(report).__name__}" if column in fields else "is missing"
            raise ValueError(f"{path}, study {study!r}: {column} {found}, expected a text")
        yield study, report


def write_predictions(path: str | Path, source: str | Path, reports: Mapping[str, str]) -> None:
    """Write the studies of the file `source` that have a report, with it as `model_prediction`."""
    studies = {study: fields for study, fields in read_rexrank(source).items() if study in reports}
    write_json(path, {study: {**fields, PREDICTION: reports[study]} for study, fields in studies.items()})


__all__ = [
    "PREDICTION",
    "REFERENCE",
    "read_rexrank",
    "rexrank_reports",
    "study_images",
    "study_indication",
    "write_predictions",
]
