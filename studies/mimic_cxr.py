"""Source `mimic-cxr`: the reports of MIMIC-CXR with the images of MIMIC-CXR-JPG, as PhysioNet publishes them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from .csv_rows import read_columns
from .r2gen import MIMIC_COUNTS, MIMIC_LICENCE
from .report_sections import parse_sections
from .source import TEXTS, VIEWS, Skipped, SkipStudy, Study, StudyEntry, StudySource, needed_file, needed_folder, option
from .views import view_named

_SPLITS = {"train": "train", "validate": "validation", "test": "test"}
_NUMBER = re.compile(r"[0-9]{8}")
_DICOM_ID = re.compile(r"\w[\w.-]*", re.ASCII)
_SUBJECTS_FOLDER = re.compile(r"p[0-9]{2}")


class _Row(NamedTuple):
    """A line of the split CSV. Its fields give the order of the listing: numbers of 8 digits sort as text."""

    study: str  # "subject/study"
    view: int  # in VIEWS
    dicom_id: str
    split: str


@dataclass
class MimicCXRSource(StudySource):
    """Studies of MIMIC-CXR: sections of the reports, images, the official split, and views from the metadata.

    Ids are the numbers in the official CSV files; patients are the subjects. Studies are sorted by subject and study,
    views of a study as frontal, lateral, unknown, then by `dicom_id`. A study with a malformed line in the split is
    skipped; an image without metadata has an unknown view. A study was made at the first `StudyDate` and `StudyTime` of
    its images in the metadata.

    The published counts are R2Gen's, of the images of studies with findings. R2Gen used another parser, so the counts
    of a complete collection may differ.
    """

    name = "mimic-cxr"
    example = "--root mimic-cxr --images mimic-cxr-jpg --shorter-side 512 --num-proc 8 --output mimic_cxr"
    collection = "MIMIC-CXR"
    official_counts = MIMIC_COUNTS
    official_unit = "images"

    root: str = option("Folder of MIMIC-CXR, which contains files/p10/p10000032/s50414267.txt.", metavar="DIR")
    images: str | None = option(
        "Folder of the images, which contains files/p10/p10000032/s50414267/DICOM_ID.jpg. Default: the root.",
        None,
        "DIR",
    )
    image_suffix: str = option(
        "Suffix of the image files: .jpg (MIMIC-CXR-JPG), .png or .dcm (MIMIC-CXR).", ".jpg", ".SUFFIX"
    )
    split: str | None = option(
        "CSV of the split. Default: *-split.csv or .csv.gz in the folder of the images or the root.", None, "FILE"
    )
    metadata: str | None = option(
        "CSV of the metadata. Default: *-metadata.csv or .csv.gz in the folder of the images or the root.",
        None,
        "FILE",
    )
    labelled_findings: bool = option(
        "Use only findings under a header, not unlabelled text in the place of findings.", False
    )

    def __post_init__(self):
        if not re.fullmatch(r"\.\w+(\.\w+)*", self.image_suffix):
            raise ValueError(f"option 'image_suffix' is {self.image_suffix!r}: expected .jpg, .png, .dcm or the like")
        self._reports = _files_folder(self.root, "root", "the folder of MIMIC-CXR")
        self._images = self._reports
        if self.images is not None:
            self._images = _files_folder(self.images, "images", "the folder of MIMIC-CXR-JPG")
        # The CSV files are beside the folder `files`, which may have another name, or in it.
        files = (Path(self._images), Path(self._reports))
        folders = list(dict.fromkeys(place for folder in files for place in (folder.parent, folder)))
        self._split, self._metadata = (
            Path(os.path.abspath(needed_file(path, name, f"{name} of MIMIC-CXR-JPG, a CSV")))
            if path is not None
            else _find_csv(folders, name)
            for path, name in ((self.split, "split"), (self.metadata, "metadata"))
        )

    def entries(self) -> Iterator[StudyEntry | Skipped]:
        views = _read_views(self._metadata)
        rows: list[_Row] = []
        # {study: (its split if known, the fault)}
        faults: dict[str, tuple[str | None, str]] = {}
        columns = ("subject_id", "study_id", "dicom_id", "split")
        line = 0
        for line, values in read_columns(self._split, columns):
            subject, study, dicom_id, split = values
            place = f"{self._split}, line {line}"
            if not (_NUMBER.fullmatch(study) and _NUMBER.fullmatch(subject)):
                column, value = ("subject_id", subject) if _NUMBER.fullmatch(study) else ("study_id", study)
                reason = f"{place} has {column} {value!r}: expected a number of 8 digits"
                yield Skipped(study or f"line {line}", _SPLITS.get(split), "malformed", reason)
                continue
            key = f"{subject}/{study}"
            if split not in _SPLITS:
                reason = f"{place} has split {split!r}: expected {', '.join(_SPLITS)}"
                faults.setdefault(key, (None, reason))
            elif not _DICOM_ID.fullmatch(dicom_id):
                reason = f"{place} has dicom_id {dicom_id!r}: expected the name of an image file without its suffix"
                faults.setdefault(key, (_SPLITS[split], reason))
            view = views.get(dicom_id, VIEWS.index("unknown"))
            # A malformed study stays in the list, so that it is reported once, in its place.
            rows.append(_Row(key, view, dicom_id, _SPLITS.get(split, "")))
        if not line:
            raise ValueError(f"{self._split} holds no images: expected a line for each")
        del views
        rows.sort()
        for key, group in groupby(rows, key=lambda row: row.study):
            yield self._entry(key, list(group), faults.get(key))

    def study_times(self) -> dict[str, datetime]:
        times: dict[str, datetime] = {}
        for _, (study, day, clock) in read_columns(self._metadata, ("study_id", "StudyDate", "StudyTime")):
            made = _time(day, clock)
            if made is not None:
                times[study] = min(made, times.get(study, made))
        return times

    def _entry(self, key: str, rows: list[_Row], fault: tuple[str | None, str] | None) -> StudyEntry | Skipped:
        subject, study = key.split("/")
        splits = sorted({row.split for row in rows})
        if fault is None and len(splits) > 1:
            fault = None, f"{self._split} has its images in several splits: {', '.join(splits)}"
        if fault is not None:
            return Skipped(study, fault[0], "malformed", fault[1])
        # A dictionary, so that an image that is listed twice is used once.
        location = tuple({row.dicom_id: VIEWS[row.view] for row in rows}.items())
        return StudyEntry(study, subject, splits[0], location)

    def read(self, entry: StudyEntry) -> Study:
        folder = os.path.join(f"p{entry.patient_id[:2]}", f"p{entry.patient_id}", f"s{entry.id}")
        sections = parse_sections(_read_report(os.path.join(self._reports, f"{folder}.txt")))
        if self.labelled_findings and not sections.findings_labelled:
            sections = sections._replace(findings="")
        return Study(
            images=[os.path.join(self._images, folder, dicom_id + self.image_suffix) for dicom_id, _ in entry.location],
            views=[view for _, view in entry.location],
            **{name: getattr(sections, name) for name in TEXTS},
            licence=MIMIC_LICENCE,
        )


def _files_folder(path: str | os.PathLike, name: str, what: str) -> str:
    """The folder `files` of a release; `path` may be this folder."""
    folder = needed_folder(path, name, what)
    for files in (folder / "files", folder):
        if files.is_dir() and any(_SUBJECTS_FOLDER.fullmatch(path.name) for path in files.iterdir()):
            return str(files)
    raise ValueError(f"{folder} has no folders files/p10 to files/p19: option {name!r} names {what}")


def _find_csv(folders: Iterable[Path], name: str) -> Path:
    for folder in folders:
        # An unpacked file is preferred to its packed original.
        for ending in (".csv", ".csv.gz"):
            found = sorted(folder.glob(f"*-{name}{ending}"))
            if len(found) > 1:
                raise ValueError(
                    f"{folder} contains {found[0].name} and {found[1].name}: choose one with option {name!r}"
                )
            if found:
                return found[0]
    searched = ", ".join(map(str, folders))
    raise ValueError(f"no mimic-cxr-*-{name}.csv or .csv.gz in {searched}: option {name!r} names the {name} CSV")


def _read_views(path: Path) -> dict[str, int]:
    """`{dicom_id: position in VIEWS}` of the images with a known view."""
    views: dict[str, int] = {}
    places: dict[str, int] = {}
    for _, (dicom_id, position) in read_columns(path, ("dicom_id", "ViewPosition")):
        if position not in places:
            places[position] = VIEWS.index(view_named(position))
        if VIEWS[places[position]] != "unknown":
            views[dicom_id] = places[position]
    return views


def _time(day: str, clock: str) -> datetime | None:
    """The time of "21800506" and "82602.25", whose leading zeros are missing; None if it is none."""
    seconds = re.match(r"([0-9]{1,6})(\.[0-9]*)?$", clock)
    try:
        return datetime.strptime(day + seconds[1].zfill(6), "%Y%m%d%H%M%S") if seconds else None
    except ValueError:
        return None


def _read_report(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8-sig")
    except FileNotFoundError:
        raise SkipStudy("malformed", f"report {path} is missing") from None
    except OSError as error:
        raise SkipStudy("malformed", f"report {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SkipStudy("malformed", f"report {path} is not UTF-8 text (byte {error.start})") from None
