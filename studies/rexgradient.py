"""Source `rexgradient`: ReXGradient-160K as rajpurkarlab/ReXGradient-160K publishes it on the Hub.

Fields and counts are those of its dataset card and of Zhang et al., "ReXGradient-160K" (arXiv:2505.00228).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from ..files_otdrg import read_json, write_json
from ..runtime.output_lock import OutputLock, OutputLockedError
from ..runtime.printable import listed
from .placeholders import shown_value
from .published import ListedCounts
from .source import (
    VIEWS,
    ListedSource,
    Skipped,
    Study,
    StudyEntry,
    TableStudy,
    needed_folder,
    option,
    path_inside,
    table_times,
)
from .tar_parts import find_parts, unpack_images
from .views import view_named

logger = logging.getLogger(__name__)

LICENCE = "ReXGradient-160K Non-Commercial Data Access and Use Agreement"
#: Counts of the dataset card: 160,000 studies, 273,004 images, 109,487 patients.
PUBLISHED: dict[str, dict[str, int]] = {
    "train": {"studies": 140_000, "images": 238_968, "patients": 95_716},
    "validation": {"studies": 10_000, "images": 17_007, "patients": 6_964},
    "test": {"studies": 10_000, "images": 17_029, "patients": 6_807},
}

_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
_METADATA = "{split}_metadata_view_position.json"
#: Fields of the texts, in the order of `TEXTS`.
_TEXT_FIELDS = ("Findings", "Impression", "Indication", "Comparison")
#: Folder of the images, in the archive and on disk.
_TOP = "deid_png"
#: In the folder of the images: sizes of the parts that were unpacked to it, and the listed images that they lack.
_UNPACKED = ".unpacked.json"


@dataclass
class ReXGradientSource(ListedSource):
    """Studies of ReXGradient-160K: sections of the reports, views and the official split, from the metadata's JSON.

    The images are read from the folder `deid_png`. If images are missing there and the parts `deid_png.part00` … are
    in the root, the parts are unpacked to it first, read as one stream. Processes that need the images at the same
    time wait for the one that unpacks. Delete the parts when they are unpacked, if you need the space.

    Ids are the keys of the JSON files, patients their `PatientID`; the `time` of a listed study is its `StudyDate`.
    Frontal views come first.
    """

    name = "rexgradient"
    example = "--root ReXGradient-160K --shorter-side 512 --num-proc 8 --output rexgradient"
    collection = "ReXGradient-160K"

    root: str = option(
        "Folder of the download, with metadata/train_metadata_view_position.json and deid_png.part00 or deid_png.",
        metavar="DIR",
    )
    images: str | None = option(
        "Folder of the images, to which the parts are unpacked if images are missing. Default: deid_png in the root.",
        None,
        "DIR",
    )

    def __post_init__(self):
        self.root = str(needed_folder(self.root, "root", "the download of ReXGradient-160K"))
        self.images = os.path.abspath(self.images or os.path.join(self.root, _TOP))
        if os.path.isfile(self.images):
            raise ValueError(f"{self.images} is a file: option 'images' names the folder of the images")
        self._metadata = _find_metadata(Path(self.root))
        if not os.path.isdir(self.images) and not find_parts(Path(self.root), _TOP):
            raise ValueError(
                f"{self.images} does not exist, and {self.root} has no {_TOP}.part00 to unpack: expected one of them"
            )

    def study_times(self) -> dict[str, date | int]:
        return table_times(self.entries())

    def read(self, entry: StudyEntry) -> Study:
        return entry.location.study(LICENCE)

    def _list(self) -> list[StudyEntry | Skipped]:
        counts = ListedCounts()
        listing = []
        for split, path in self._metadata.items():
            for name, record in read_json(path, limit=2**32).items():
                entry = self._entry(name, record, split, f"{path}, {name}")
                images = record.get("ImagePath") if isinstance(record, dict) else None
                patient = entry.patient_id if isinstance(entry, StudyEntry) else name
                counts.add(split, patient, len(images) if isinstance(images, list) else 0)
                listing.append(entry)
        if not listing:
            names = ", ".join(map(str, self._metadata.values()))
            raise ValueError(f"no study in {names}: expected an object of studies by id")
        self._differences = counts.differences(PUBLISHED)
        self._unpack(image for item in listing if isinstance(item, StudyEntry) for image in item.location.images)
        return listing

    def _entry(self, name: str, record: Any, split: str, place: str) -> StudyEntry | Skipped:
        def malformed(reason: str) -> Skipped:
            return Skipped(name, split, "malformed", f"{place}: {reason}")

        if not isinstance(record, dict):
            return malformed(f"{shown_value(record)}: expected an object with ImagePath and sections of the report")
        paths = record.get("ImagePath")
        if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
            return malformed(f"ImagePath is {shown_value(paths)}: expected a list of paths")
        # "../deid_png/PATIENT/…": relative to the folder of the metadata.
        inside = [re.sub(rf"^(?:\.\./|\./)*{_TOP}/", "", path) for path in paths]
        images = [path_inside(self.images, path) for path in inside]
        if None in images:
            return malformed(f"ImagePath {shown_value(paths[images.index(None)])} leaves the folder of images")
        positions = record.get("ImageViewPosition")
        positions = positions if isinstance(positions, list) else []
        texts = [record.get(field) for field in _TEXT_FIELDS]
        for field, text in zip(_TEXT_FIELDS, texts, strict=True):
            if not (isinstance(text, str) or text is None or text != text):
                return malformed(f"{field} is {shown_value(text)}: expected a text or null")
        views = [view_named(position) if isinstance(position, str) else "unknown" for position in positions]
        views += ["unknown"] * (len(images) - len(views))
        ordered = sorted(zip(images, views, strict=False), key=lambda view: VIEWS.index(view[1]))
        patient = record.get("PatientID")
        study = TableStudy(
            images=tuple(image for image, _ in ordered),
            views=tuple(view for _, view in ordered),
            texts=tuple(text if isinstance(text, str) else "" for text in texts),
            time=_date(record.get("StudyDate")),
        )
        # Without the field, the patient is the first folder of the images.
        return StudyEntry(name, patient if isinstance(patient, str) else inside[0].split("/")[0], split, study)

    def _unpack(self, images: Iterable[str]) -> None:
        """Unpack the parts if images are missing that these parts are not known to lack."""
        folder, parts = Path(self.images), find_parts(Path(self.root), _TOP)
        if not parts:
            return
        wanted = {os.path.relpath(image, folder).replace(os.sep, "/") for image in images}
        if _missing(folder, wanted) <= _lacking(folder, parts):
            return
        with _waiting_lock(folder):
            if _missing(folder, wanted) <= _lacking(folder, parts):
                return
            unpacked = unpack_images(parts, wanted, _TOP, folder)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / _UNPACKED, {"parts": _sizes(parts), "lacking": sorted(_missing(folder, wanted))})
        if unpacked.damaged:
            names = listed(unpacked.damaged, most=3)
            logger.warning("%d images are damaged in the parts and were not unpacked: %s", len(unpacked.damaged), names)


def _find_metadata(root: Path) -> dict[str, Path]:
    """The metadata by split, as far as it is there, in the root or its folder `metadata`."""
    found = {}
    for name, split in _SPLITS.items():
        file = _METADATA.format(split=name)
        paths = [path for path in (root / "metadata" / file, root / file) if path.is_file()]
        if paths:
            found[split] = paths[0]
    if not found:
        file = _METADATA.format(split="train")
        raise ValueError(f"{root} has no metadata/{file}: option 'root' names the download of ReXGradient-160K")
    return found


def _date(value: Any) -> date | None:
    """The date of 20140302 or "20140302"; None if it is none."""
    try:
        return date.fromisoformat(str(value)) if re.fullmatch("[0-9]{8}", str(value)) else None
    except ValueError:
        return None


def _sizes(parts: list[Path]) -> dict[str, int]:
    return {part.name: part.stat().st_size for part in parts}


def _missing(folder: Path, images: set[str]) -> set[str]:
    return {image for image in images if not os.path.isfile(os.path.join(folder, image))}


def _lacking(folder: Path, parts: list[Path]) -> set[str]:
    """Images that were missing after these parts were unpacked to the folder."""
    try:
        content = read_json(folder / _UNPACKED)
        return set(content["lacking"]) if content["parts"] == _sizes(parts) else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _waiting_lock(folder: Path) -> OutputLock:
    """A lock of the folder that waits for its holder, and says so."""
    try:
        with OutputLock(folder):
            pass
    except OutputLockedError:
        logger.warning("another process unpacks images to %s: waiting for it", folder)
    return OutputLock(folder, wait=float("inf"))
