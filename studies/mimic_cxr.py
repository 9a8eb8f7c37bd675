"""Source `mimic-cxr`: the reports of MIMIC-CXR with the images of MIMIC-CXR-JPG, as PhysioNet publishes them."""

from __future__ import annotations

import csv
import gzip
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from .report_sections import parse_sections
from .source import VIEWS, Skipped, SkipStudy, Study, StudyEntry, StudySource, needed_file, needed_folder, option
from .views import view_named

_LICENCE = "PhysioNet Credentialed Health Data License 1.5.0"
_SPLITS = {"train": "train", "validate": "validation", "test": "test"}
_NUMBER = re.compile(r"[0-9]{8}")
_DICOM_ID = re.compile(r"\w[\w.-]*", re.ASCII)
_SUBJECTS_FOLDER = re.compile(r"p[0-9]{2}")
_GZIP_MAGIC = b"\x1f\x8b"


class _Row(NamedTuple):
    """A line of the split CSV, in the order of the listing: numbers of 8 digits sort as text."""

    study: str  # "subject/study"
    view: int  # in VIEWS
    dicom_id: str
    split: str


@dataclass
class MimicCXRSource(StudySource):
    """Studies of MIMIC-CXR: reports cut into sections, images, the official split, views by their metadata.

    Ids are the numbers of the official CSV files, patients the subjects. Studies are in the order of subject and study,
    the views of one study frontal before lateral before unknown, then by `dicom_id`. A study any of whose lines in the
    split is at fault is left out as a whole; an image without metadata is of unknown view.

    The published counts are R2Gen's, of the images of the studies that have findings. R2Gen found these by a parser of
    its own, so a complete collection need not have just as many.
    """

    name = "mimic-cxr"
    example = "--root mimic-cxr --images mimic-cxr-jpg --shorter-side 512 --num-proc 8 --output mimic_cxr"
    collection = "MIMIC-CXR"
    official_counts = {"train": 270790, "validation": 2130, "test": 3858}  # noqa: RUF012
    official_unit = "images"

    root: str = option("Folder of MIMIC-CXR: it holds files/p10/p10000032/s50414267.txt.", metavar="DIR")
    images: str | None = option(
        "Folder of the images: it holds files/p10/p10000032/s50414267/DICOM_ID.jpg; by default the root.", None, "DIR"
    )
    image_suffix: str = option(
        "How the names of the image files end: .jpg (MIMIC-CXR-JPG), .png or .dcm (MIMIC-CXR).", ".jpg", ".SUFFIX"
    )
    split: str | None = option(
        "CSV of the split; by default *-split.csv or .csv.gz in the folder of the images or the root.", None, "FILE"
    )
    metadata: str | None = option(
        "CSV of the metadata; by default *-metadata.csv or .csv.gz in the folder of the images or the root.",
        None,
        "FILE",
    )
    labelled_findings: bool = option(
        "Take findings only from under a header; else text that stands where they would is taken too.", False
    )

    def __post_init__(self):
        if not re.fullmatch(r"\.\w+(\.\w+)*", self.image_suffix):
            raise ValueError(f"option 'image_suffix' is {self.image_suffix!r}: expected .jpg, .png, .dcm or the like")
        self._reports = _files_folder(self.root, "root", "the folder of MIMIC-CXR")
        self._images = self._reports
        if self.images is not None:
            self._images = _files_folder(self.images, "images", "the folder of MIMIC-CXR-JPG")
        # The CSV files lie beside the folder `files`; it may have another name, and they may have been put into it.
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
        #: What is wrong with a study, and its split if that is known.
        faults: dict[str, tuple[str | None, str]] = {}
        columns = ("subject_id", "study_id", "dicom_id", "split")
        line = 0
        for line, values in _read_csv(self._split, columns):
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
            # A study at fault stays in the list, so that it is named once and in its place.
            rows.append(_Row(key, view, dicom_id, _SPLITS.get(split, "")))
        if not line:
            raise ValueError(f"{self._split} holds no images: expected a line for each")
        del views
        rows.sort()
        for key, group in groupby(rows, key=lambda row: row.study):
            yield self._entry(key, list(group), faults.get(key))

    def _entry(self, key: str, rows: list[_Row], fault: tuple[str | None, str] | None) -> StudyEntry | Skipped:
        subject, study = key.split("/")
        splits = sorted({row.split for row in rows})
        if fault is None and len(splits) > 1:
            fault = None, f"{self._split} has its images in several splits: {', '.join(splits)}"
        if fault is not None:
            return Skipped(study, fault[0], "malformed", fault[1])
        # Through a dictionary, so that an image that is listed twice is taken once.
        location = tuple({row.dicom_id: VIEWS[row.view] for row in rows}.items())
        return StudyEntry(study, subject, splits[0], location)

    def read(self, entry: StudyEntry) -> Study:
        folder = os.path.join(f"p{entry.patient_id[:2]}", f"p{entry.patient_id}", f"s{entry.id}")
        sections = parse_sections(_read_report(os.path.join(self._reports, f"{folder}.txt")))
        kept = sections.findings_labelled or not self.labelled_findings
        return Study(
            images=[os.path.join(self._images, folder, dicom_id + self.image_suffix) for dicom_id, _ in entry.location],
            views=[view for _, view in entry.location],
            findings=sections.findings if kept else "",
            impression=sections.impression,
            indication=sections.indication,
            comparison=sections.comparison,
            licence=_LICENCE,
        )


def _files_folder(path: str | os.PathLike, name: str, what: str) -> str:
    """The folder `files` of a release, which may be given itself."""
    folder = needed_folder(path, name, what)
    for files in (folder / "files", folder):
        if files.is_dir() and any(_SUBJECTS_FOLDER.fullmatch(path.name) for path in files.iterdir()):
            return str(files)
    raise ValueError(f"{folder} holds no files/p10 to files/p19: option {name!r} names {what}")


def _find_csv(folders: Iterable[Path], name: str) -> Path:
    for folder in folders:
        # An unpacked file goes before the packed one it was made of.
        for ending in (".csv", ".csv.gz"):
            found = sorted(folder.glob(f"*-{name}{ending}"))
            if len(found) > 1:
                raise ValueError(f"{folder} holds {found[0].name} and {found[1].name}: option {name!r} says which")
            if found:
                return found[0]
    looked = ", ".join(map(str, folders))
    raise ValueError(f"no mimic-cxr-*-{name}.csv or .csv.gz in {looked}: option {name!r} names the {name} CSV")


def _read_csv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Number and values of each line, packed or not; a value that is not there is ""."""
    try:
        with path.open("rb") as file:
            packed = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        # By its content: browsers unpack files and leave them their names.
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            for column in columns:
                if column not in header:
                    shown = ", ".join(header) or "none"
                    raise ValueError(
                        f"{path} has no column {column!r}: expected {', '.join(columns)}; columns: {shown}"
                    )
            places = [header.index(column) for column in columns]
            for cells in reader:
                if cells:
                    yield reader.line_num, [cells[place].strip() if place < len(cells) else "" for place in places]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start} of a block): expected a CSV") from None
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV ({error}): expected one line an image") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file ({error}): download it again") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _read_views(path: Path) -> dict[str, int]:
    """`{dicom_id: place in VIEWS}` of the images whose view is known."""
    views: dict[str, int] = {}
    places: dict[str, int] = {}
    for _, (dicom_id, position) in _read_csv(path, ("dicom_id", "ViewPosition")):
        if position not in places:
            places[position] = VIEWS.index(view_named(position))
        if VIEWS[places[position]] != "unknown":
            views[dicom_id] = places[position]
    return views


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


__all__ = ["MimicCXRSource"]
