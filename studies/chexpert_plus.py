"""Source `chexpert-plus`: the table, PNG images and labels of CheXpert Plus as Stanford AIMI publishes them.

Columns and counts are those of Chambon et al., "CheXpert Plus" (arXiv:2405.19538), and of the published table.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal, NamedTuple

from .chexpert_states import states_of_values
from .csv_rows import read_columns
from .placeholders import present_text, shown_value
from .published import ALL, ListedCounts
from .source import (
    SPLIT_NAMES,
    VIEWS,
    ListedSource,
    Skipped,
    Study,
    StudyEntry,
    TableStudy,
    needed_file,
    needed_folder,
    option,
    seeded_split,
    table_times,
)
from .views import view_named

logger = logging.getLogger(__name__)

LICENCE = "Stanford University Dataset Research Use Agreement"
#: The paper counts 187,711 studies and 64,725 patients. The table has 223,228 images in train, which the paper counts,
#: and the 234 of valid.
PUBLISHED: dict[str, dict[str, int]] = {ALL: {"studies": 187_711, "images": 223_462, "patients": 64_725}}
PUBLISHED_SPLITS: dict[str, dict[str, int]] = {"train": {"images": 223_228}, "validation": {"images": 234}}

_TABLE = "df_chexpert_plus_240401.csv"
_PATH = re.compile(r"(?:[\w.-]+/)?((?:train|valid|test)/(patient[0-9]+)/(study[0-9]+)/[\w.-]+)\.\w+", re.ASCII)
_COLUMNS = ("path_to_image", "split")
#: Columns that a table may lack; the last ones are sections.
_OPTIONAL = ("deid_patient_id", "patient_report_date_order", "frontal_lateral", "ap_pa")
_SECTIONS = (
    "section_findings",
    "section_impression",
    "section_clinical_history",
    "section_history",
    "section_comparison",
)
#: Folders of the images in the release and in usual copies of it.
_IMAGE_FOLDERS = ("PNG/PNG", "PNG", "PNGs", ".")


class _Row(NamedTuple):
    """A line of the table: an image and the report of its study."""

    study: str
    image: str  # path without its ending
    view: str
    split: str
    patient: str
    order: int | None
    texts: tuple[str, ...]


class _Fault(NamedTuple):
    """A line that cannot be used; `study` is "" if unknown."""

    study: str
    reason: str


@dataclass
class CheXpertPlusSource(ListedSource):
    """Studies of CheXpert Plus: sections of the reports, views and split from its table, images, and labels if given.

    A study has the images of a folder such as train/patient42142/study5. The table names .jpg files; the images are
    found with another ending, by default .png. The indication is the clinical history or, without one, the history. A
    study with a damaged line is skipped.

    The official split has train and validation (`valid`), not test. Ids are as patient42142_study5. The `time` of a
    listed study is its `patient_report_date_order`. The table has no dates to compare it with, and others found that it
    has almost no relation to them, so priors are found by it only with `order_as_time`.
    """

    name = "chexpert-plus"
    example = "--root chexpert_plus --sections impression --shorter-side 512 --num-proc 8 --output studies"
    collection = "CheXpert Plus"

    root: str = option(f"Folder of the download, which contains {_TABLE}.", metavar="DIR")
    images: str | None = option(
        "Folder of the images, which contains train/patient42142. Default: PNG/PNG, PNG, PNGs or the root.", None, "DIR"
    )
    image_suffix: str = option("Suffix of the image files: .png, .jpg or .dcm.", ".png", ".SUFFIX")
    labels: str | None = option(
        "Labels of all images as JSON Lines, such as chexbert_labels/impression_fixed.json: the finding states.",
        None,
        "FILE",
    )
    split: Literal["official", "seeded"] = option("The official split, or a random split of all studies.", "official")
    seed: int = option("Seed of the random split.", 0)
    split_shares: list[float] = option(
        "Shares of the patients in train, validation and test in the random split.", [0.8, 0.1, 0.1], metavar="SHARE"
    )

    order_as_time: bool = option(
        "Let --priors take patient_report_date_order for the order of a patient's studies in time, for which there is "
        "no evidence.",
        False,
    )

    def __post_init__(self):
        if not re.fullmatch(r"\.\w+", self.image_suffix):
            raise ValueError(f"option 'image_suffix' is {self.image_suffix!r}: expected .png, .jpg or .dcm")
        if self.split not in ("official", "seeded"):
            raise ValueError(f"option 'split' is {self.split!r}: expected official or seeded")
        if self.split == "seeded":
            seeded_split([], self.seed, self.split_shares)  # checks the shares before anything is read
        root = needed_folder(self.root, "root", "the download of CheXpert Plus")
        self._table = next((path for path in (root / _TABLE, root / f"{_TABLE}.gz") if path.is_file()), None)
        if self._table is None:
            raise ValueError(f"{root} has no {_TABLE}: option 'root' names the download of CheXpert Plus")
        self._images = _images_folder(root if self.images is None else needed_folder(self.images, "images", _WHAT))
        if self.labels is not None:
            self.labels = os.path.abspath(needed_file(self.labels, "labels", "JSON Lines with CheXpert's labels"))

    def study_times(self) -> dict[str, date | int]:
        if not self.order_as_time:
            raise ValueError(
                "CheXpert Plus has no dates, and its patient_report_date_order may not be the order in time: leave "
                "--priors out, or accept it with --order-as-time"
            )
        return table_times(self.entries())

    def read(self, entry: StudyEntry) -> Study:
        return entry.location.study(LICENCE)

    def _list(self) -> list[StudyEntry | Skipped]:
        studies: dict[str, list[_Row]] = {}
        faults: dict[str, str] = {}
        listing: list[StudyEntry | Skipped] = []
        line = 0
        for line, values in read_columns(self._table, _COLUMNS, (*_OPTIONAL, *_SECTIONS), errors="surrogateescape"):
            row = _parse(values, f"{self._table}, line {line}")
            if isinstance(row, _Row):
                studies.setdefault(row.study, []).append(row)
            elif row.study:
                studies.setdefault(row.study, [])
                faults.setdefault(row.study, row.reason)
            else:
                listing.append(Skipped(f"line {line}", None, "malformed", row.reason))
        if not line:
            raise ValueError(f"{self._table} holds no images: expected a line for each")
        labels = None if self.labels is None else _read_labels(self.labels)
        dealt = {}
        if self.split == "seeded":
            dealt = seeded_split(
                (row.patient for rows in studies.values() for row in rows), self.seed, self.split_shares
            )
        counts = ListedCounts()
        for study, rows in studies.items():
            entry = self._entry(study, rows, faults.get(study), labels, dealt)
            counts.add(entry.split, rows[0].patient if rows else study.split("_")[0], len(rows))
            listing.append(entry)
        official = PUBLISHED_SPLITS if self.split == "official" else {}
        self._differences = counts.differences({**official, **PUBLISHED})
        return listing

    def _entry(
        self,
        study: str,
        rows: list[_Row],
        fault: str | None,
        labels: dict[str, tuple[int, ...] | str] | None,
        dealt: dict[str, str],
    ) -> StudyEntry | Skipped:
        splits = {dealt.get(row.patient, row.split) for row in rows}
        split = splits.pop() if len(splits) == 1 else None
        states = None
        if fault is None and split is None:
            fault = f"{self._table} has its images in several splits"
        if fault is None and labels is not None:
            states = next((labels[row.image] for row in rows if row.image in labels), "has no line for its images")
            if isinstance(states, str):
                fault = f"{self.labels} {states}"
        if fault is not None:
            return Skipped(study, split, "malformed", fault)
        # A dictionary, so that an image that is listed twice is used once.
        views = {row.image: row.view for row in sorted(rows, key=lambda row: (VIEWS.index(row.view), row.image))}
        images = tuple(os.path.join(self._images, image) + self.image_suffix for image in views)
        return StudyEntry(
            study,
            rows[0].patient,
            split,
            TableStudy(images, tuple(views.values()), rows[0].texts, rows[0].order, states),
        )


_WHAT = "the folder of the images of CheXpert Plus"


def _images_folder(folder: Path) -> str:
    """The folder with the folders `train` and `valid` of the images; `folder` may contain it."""
    for name in _IMAGE_FOLDERS:
        if any((folder / name / split).is_dir() for split in ("train", "valid")):
            return os.path.normpath(folder / name)
    raise ValueError(f"{folder} has no folder train or valid, nor has its folder PNG: option 'images' names {_WHAT}")


def _parse(values: list[str], place: str) -> _Row | _Fault:
    path, split, patient, order, frontal_lateral, ap_pa, *sections = values
    match = _PATH.fullmatch(path)
    if match is None:
        expected = "expected a path such as train/patient42142/study5/view1_frontal.jpg"
        return _Fault("", f"{place} has path_to_image {shown_value(path)}: {expected}")
    image, folder, number = match.groups()
    study = f"{folder}_{number}"
    if split.casefold() not in SPLIT_NAMES:
        return _Fault(study, f"{place} has split {shown_value(split)}: expected {', '.join(SPLIT_NAMES)}")
    named = map(view_named, (frontal_lateral, ap_pa, image))
    findings, impression, clinical_history, history, comparison = sections
    indication = present_text(clinical_history, "indication") or history
    return _Row(
        study=study,
        image=image,
        view=next((view for view in named if view != "unknown"), "unknown"),
        split=SPLIT_NAMES[split.casefold()],
        patient=patient or folder,
        order=int(float(order)) if re.fullmatch(r"[0-9]{1,9}(\.0*)?", order) else None,
        texts=(findings, impression, indication, comparison),
    )


def _read_labels(path: str) -> dict[str, tuple[int, ...] | str]:
    """The 14 state ids, or what is wrong with them, by the path of the image without its ending.

    Lines that are no labels of an image are counted in one warning.

    Raises:
        ValueError: no line is one.
    """
    labels: dict[str, tuple[int, ...] | str] = {}
    damaged: list[int] = []
    distinct: dict[tuple[int, ...], tuple[int, ...]] = {}
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                image = _PATH.fullmatch(values["path_to_image"])[1]
            except (ValueError, TypeError, KeyError, RecursionError):
                damaged.append(number)
                continue
            try:
                states = tuple(states_of_values(values))
                labels[image] = distinct.setdefault(states, states)
            except ValueError as error:
                labels[image] = f"has a wrong label in line {number}: {error}"
    if not labels:
        raise ValueError(f'{path} names no image: expected lines as {{"path_to_image": …, "Edema": 1.0, …}}')
    if damaged:
        logger.warning("%s: %d lines are damaged, the first is line %d", path, len(damaged), damaged[0])
    return labels
