"""Source `csv`: a table of images and reports."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import NamedTuple

from .columns import match_columns, without_fraction
from .csv_rows import Row, check_encoding, read_rows
from .placeholders import present_text, shown_value
from .source import (
    SPLIT_NAMES,
    TEXTS,
    ListedSource,
    Prior,
    Skipped,
    SkipStudy,
    Study,
    StudyEntry,
    needed_file,
    needed_folder,
    option,
    path_inside,
    seeded_split,
)
from .views import view_named

#: Fields of a row and the names of their columns, the preferred one first.
_FIELDS: dict[str, tuple[str, ...]] = {
    "image": ("image",),
    "study_id": ("study_id", "id"),
    "patient_id": ("patient_id",),
    "view": ("view",),
    "split": ("split",),
    **{text: (text,) for text in TEXTS},
    "findings": ("findings", "report"),
    "prior_image": ("prior_image",),
    "prior_report": ("prior_report",),
    "prior_days": ("prior_days",),
    "prior_patient_id": ("prior_patient_id",),
}
#: Fields of a prior study that are the same in all rows of a study.
_PRIOR_FIELDS = ("prior_report", "prior_days", "prior_patient_id")

#: `surrogateescape` decodes invalid bytes to these.
_NO_TEXT = re.compile("[\udc80-\udcff]")

#: First bytes of files that are given instead of a CSV by mistake.
_OTHER_FILES = {
    b"PK\x03\x04": "an Excel workbook or another zip file",
    b"\x1f\x8b": "compressed with gzip",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


@dataclass
class CSVSource(ListedSource):
    """Studies from a table with the columns `image` and `report`, or `findings` and/or `impression` for `report`.

    Optional columns are `study_id` (or `id`), `patient_id`, `view` (frontal, lateral, unknown; PA, AP, LL, RL, LAT),
    `split` (train, val, test), `indication` and `comparison`. Names are matched without case, spaces and underscores;
    other columns are ignored. `report` is the findings unless there is a column of findings.

    Rows with the same `study_id` are one study with its views in the order of the rows; its texts are in one row, or
    repeated in several. Without this column, each row is a study, and its id is the path of its image without suffix.
    Without `split`, patients (or studies if no patient is given) are assigned to splits at random.

    An earlier study of the patient is described by `prior_image` (one in each row, or blank), `prior_report`,
    `prior_days` (how many days before the study it was made) and `prior_patient_id` (to be compared with `patient_id`).
    A prior that is later than its study, or of another patient, is left out.

    The table is read into memory.
    """

    name = "csv"
    example = "--table reports.csv --images images --output studies"
    collection = "a table of images and reports"

    table: str = option(
        "Table of the studies: a CSV with commas or semicolons, or with tabs if its name ends in .tsv.", metavar="FILE"
    )
    images: str | None = option(
        "Folder of the images, to which their paths are relative. Default: the folder of the table.",
        None,
        metavar="FOLDER",
    )
    column: list[str] = option("Columns with other names, as in report=text image=file.", [], metavar="FIELD=COLUMN")
    split_shares: list[float] = option(
        "Shares of the patients in train, validation and test, if the table has no split.",
        [0.8, 0.1, 0.1],
        metavar="SHARE",
    )
    seed: int = option("Seed of that split.", 0)
    licence: str = option("Licence of the studies.", "", metavar="NAME")
    encoding: str = option("Encoding of the table.", "utf-8", metavar="NAME")

    def __post_init__(self):
        self.table = os.path.abspath(needed_file(self.table, "table", "a CSV of images and reports"))
        folder = os.path.dirname(self.table) if self.images is None else self.images
        self.images = str(needed_folder(folder, "images", "the folder of the table's images"))
        seeded_split((), self.seed, self.split_shares)
        self.encoding = "utf-8" if self.encoding.lower() in ("utf-8-sig", "utf_8_sig") else self.encoding
        check_encoding(self.encoding)
        header, _ = self._read()
        columns = match_columns(header, _FIELDS, self.column, self.table, image="image")
        self._width, self._columns = len(header), {field: header.index(name) for field, name in columns.items()}

    def report_sections(self) -> tuple[str, ...]:
        return tuple(section for section in super().report_sections() if section in self._columns)

    def read(self, entry: StudyEntry) -> Study:
        texts: dict[str, tuple[str, int]] = {}
        for row in entry.location:
            for name, value in zip(TEXTS, row.texts, strict=True):
                first, line = texts.setdefault(name, (value, row.line)) if value else (value, row.line)
                if first != value:
                    reason = f"{name} differs from line {line}: expected the same or a blank in all rows of a study"
                    raise SkipStudy("malformed", f"{self.table}, line {row.line}: {reason}")
        return Study(
            images=[row.image for row in entry.location],
            views=[row.view for row in entry.location],
            **{name: value for name, (value, _) in texts.items()},
            licence=self.licence,
            prior=self._prior(entry.location),
        )

    def _prior(self, rows: tuple[_View, ...]) -> Prior | None:
        """The prior that the rows of a study describe."""
        images = tuple(dict.fromkeys(row.prior["prior_image"] for row in rows if "prior_image" in row.prior))
        fields: dict[str, str] = {}
        fault = ""
        for row in rows:
            for name in _PRIOR_FIELDS:
                value = row.prior.get(name, "")
                if value and fields.setdefault(name, value) != value:
                    fault = fault or f"line {row.line}: {name} differs from that of another row of the study"
        for image in images:
            if self._image_path(image) is None:
                fault = fault or f"prior_image {shown_value(image)} leaves the folder of images"
        days = without_fraction(fields.get("prior_days", ""))
        if not re.fullmatch(r"-?[0-9]{0,6}", days) or days == "-":
            fault = fault or f"prior_days is {shown_value(days)}: expected a whole number of days"
        if not images and "prior_report" not in fields:
            return None
        return Prior(
            images=[] if fault else [str(self._image_path(image)) for image in images],
            report=fields.get("prior_report", ""),
            days=int(days) if days and not fault else None,
            patient_id=fields.get("prior_patient_id"),
            fault=fault and f"{self.table}, {fault}",
        )

    def _read(self) -> tuple[list[str], Iterator[Row]]:
        """The header of the table, and an iterator over the rows below it."""
        with open(self.table, "rb") as file:
            lines = file.readlines()
        first = lines[0] if lines else b""
        for first_bytes, what in _OTHER_FILES.items():
            if first.startswith(first_bytes):
                raise ValueError(f"{self.table} is {what}: expected a CSV, saved as UTF-8")
        if b"\r" in first.rstrip(b"\r\n"):
            raise ValueError(f"{self.table} ends its lines with CR alone: expected LF, as in Excel's 'CSV UTF-8'")
        delimiter = "\t" if self.table.lower().endswith((".tsv", ".tab")) else ","
        if delimiter == "," and b"," not in first and b";" in first:
            delimiter = ";"
        lines[:1] = [first.removeprefix(b"\xef\xbb\xbf")]
        # Invalid bytes become surrogates, so that only their row is rejected.
        rows = read_rows([line.decode(self.encoding, "surrogateescape") for line in lines], delimiter)
        header = next(rows, None)
        if header is None:
            raise ValueError(f"{self.table} is empty: expected a header with the columns image and report")
        if header.fault:
            raise ValueError(f"{self.table}, header: {header.fault}")
        return [cell.strip() for cell in header.cells], rows

    def _list(self) -> list[StudyEntry | Skipped]:
        studies: dict[str | int, _Listed] = {}
        for row in self._read()[1]:
            key, listed = self._study(row)
            studies[key] = studies[key].with_row(listed) if key in studies else listed
        if not studies:
            raise ValueError(f"{self.table} has no row below its header: expected one for each image")
        dealt: dict[str, str] = {}
        if "split" not in self._columns:
            patients = (listed.patient_id or listed.id for listed in studies.values() if not listed.fault)
            dealt = seeded_split(patients, self.seed, self.split_shares)
        listing: list[StudyEntry | Skipped] = []
        for listed in studies.values():
            patient_id = listed.patient_id or listed.id
            split = listed.split or dealt.get(patient_id)
            if listed.fault:
                listing.append(Skipped(listed.id, split, "malformed", f"{self.table}, {listed.fault}"))
            else:
                listing.append(StudyEntry(listed.id, patient_id, split, listed.views))
        return listing

    def _study(self, row: Row) -> tuple[str | int, _Listed]:
        """A row as a study of its own, and its key, which is the same for all rows of a study."""
        cells = {field: row.cells[place].strip() for field, place in self._columns.items() if place < len(row.cells)}
        split, fault, image = None, row.fault, ""
        try:
            if not fault and len(row.cells) != self._width:
                raise ValueError(f"{len(row.cells)} cells, expected {self._width} as in the header")
            if not fault:
                for field, cell in cells.items():
                    self._check(field, cell)
                image = self._image_path(cells["image"])
                split = SPLIT_NAMES[cells["split"].casefold()] if "split" in cells else None
        except ValueError as error:
            fault = str(error)
        name = cells.get("study_id", "")
        if fault:
            name, fault = name or f"line {row.first}", f"{row.place}: {fault}"
        key = name if "study_id" in self._columns else row.first
        study_id = name or os.path.splitext(os.path.relpath(image, self.images))[0].replace(os.sep, "/")
        texts = tuple(present_text(cells.get(text, ""), text) for text in TEXTS)
        # Checked as an indication is: texts without letters are kept.
        stated = {name: present_text(cells.get(name), "indication") for name in ("prior_image", *_PRIOR_FIELDS)}
        prior = {name: text for name, text in stated.items() if text}
        view = _View(row.first, image, view_named(cells.get("view", "")), texts, prior)
        return key, _Listed(_writable(study_id), _writable(cells.get("patient_id", "")), split, (view,), fault)

    def _check(self, field: str, cell: str) -> None:
        if not cell.isascii() and _NO_TEXT.search(cell):
            raise ValueError(f"{field} is not {self.encoding} text: set option 'encoding' to that of the table")
        if "\0" in cell:
            raise ValueError(f"{field} holds a NUL byte: expected text")
        if field in ("image", "study_id") and not cell:
            raise ValueError(f"{field} is blank: expected one in each row")
        if field == "image" and self._image_path(cell) is None:
            raise ValueError(
                f"image {shown_value(cell)} leaves the folder of images: expected a path inside {self.images}"
            )
        if field == "split" and cell.casefold() not in SPLIT_NAMES:
            raise ValueError(f"split is {shown_value(cell)}: expected one of {', '.join(SPLIT_NAMES)}")

    def _image_path(self, path: str) -> str | None:
        """The full path of an image; None if it is outside the folder."""
        return None if PureWindowsPath(path).anchor else path_inside(self.images, path.replace("\\", "/"))


class _View(NamedTuple):
    """A row of a study."""

    line: int
    image: str
    view: str
    texts: tuple[str, ...]
    prior: dict[str, str]


class _Listed(NamedTuple):
    """A study from the rows read so far; `split` is None if the table has none."""

    id: str
    patient_id: str
    split: str | None
    views: tuple[_View, ...]
    fault: str | None

    def with_row(self, other: _Listed) -> _Listed:
        """The study with another row. A fault in one row is a fault of the study; the first one is kept."""
        fault = self.fault or other.fault
        for field in ("patient_id", "split"):
            mine, its = getattr(self, field), getattr(other, field)
            if not fault and mine != its and (field == "split" or (mine and its)):
                lines = f"lines {self.views[0].line} and {other.views[0].line}"
                fault = f"{lines}: {field.replace('_id', '')} {mine!r} and {its!r} in the study {self.id}, expected one"
        patient_id, split = self.patient_id or other.patient_id, self.split or other.split
        return _Listed(self.id, patient_id, split, self.views + other.views, fault)


def _writable(text: str) -> str:
    """Text with invalid bytes replaced by question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
