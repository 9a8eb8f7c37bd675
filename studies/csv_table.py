"""Source `csv`: a table of images and reports, as anyone can write one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import BinaryIO, NamedTuple

from .csv_rows import Place, Row, check_encoding, read_rows
from .placeholders import present_text, shown_value
from .source import (
    Skipped,
    SkipStudy,
    Study,
    StudyEntry,
    StudySource,
    needed_file,
    needed_folder,
    option,
    path_inside,
    seeded_split,
)
from .views import view_named

_TEXTS = ("findings", "impression", "indication", "comparison")

#: What a column can be for, and the names by which it is found; `report` is the findings where no column is called so.
_FIELDS: dict[str, tuple[str, ...]] = {
    "image": ("image",),
    "study_id": ("study_id", "id"),
    "patient_id": ("patient_id",),
    "view": ("view",),
    "split": ("split",),
    "report": ("report",),
    **{text: (text,) for text in _TEXTS},
}

_SPLIT_NAMES = {
    "train": "train",
    **dict.fromkeys(("val", "validate", "validation", "valid", "dev"), "validation"),
    "test": "test",
}

#: What `surrogateescape` makes of bytes that are not in the table's encoding.
_NO_TEXT = re.compile("[\udc80-\udcff]")

#: Files that are given for a CSV by mistake, told by their first bytes.
_OTHER_FILES = {
    b"PK\x03\x04": "an Excel workbook or another zip file",
    b"\x1f\x8b": "compressed with gzip",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


@dataclass
class CSVSource(StudySource):
    """Studies of a table with the columns `image` and `report`, or `findings` and/or `impression` for `report`.

    Optional columns are `study_id` (or `id`), `patient_id`, `view` (frontal, lateral, unknown; PA, AP, LL, RL, LAT),
    `split` (train, val, test), `indication` and `comparison`. Names match with case, spaces and underscores aside;
    other columns are ignored. `report` is taken as the findings unless there is a column of findings.

    Rows of one `study_id` are one study, its views in the order of the rows; its texts stand in one row, or the same in
    several. Without the column, a row is a study, and its id is the path of its image without the suffix. Without
    `split`, patients (studies where no patient is named) are dealt to the splits.

    In memory is kept where the rows of each study begin; texts are read when the study is.
    """

    name = "csv"
    example = "--table reports.csv --images images --output studies"
    collection = "a table of images and reports"

    table: str = option(
        "Table of the studies: CSV, separated by commas or semicolons, or by tabs where it is called .tsv.",
        metavar="FILE",
    )
    images: str | None = option(
        "Folder to which the images' paths are relative; the table's own unless given.", None, metavar="FOLDER"
    )
    column: list[str] = option(
        "Columns that have names of their own, as in report=text image=file.", [], metavar="FIELD=COLUMN"
    )
    split_shares: list[float] = option(
        "Shares of the patients in train, validation and test, where the table has no split.",
        [0.8, 0.1, 0.1],
        metavar="SHARE",
    )
    seed: int = option("Seed of that split.", 0)
    licence: str = option("Licence under which the studies are used.", "", metavar="NAME")
    encoding: str = option("Encoding of the table.", "utf-8", metavar="NAME")

    def __post_init__(self):
        self.table = os.path.abspath(needed_file(self.table, "table", "a CSV of images and reports"))
        folder = os.path.dirname(self.table) if self.images is None else self.images
        self.images = str(needed_folder(folder, "images", "the folder of the table's images"))
        seeded_split((), self.seed, self.split_shares)
        self.encoding = "utf-8" if self.encoding.lower() in ("utf-8-sig", "utf_8_sig") else self.encoding
        check_encoding(self.encoding)
        with open(self.table, "rb") as file:
            self._delimiter, header, self._begin = self._header(file)
        self._width = len(header)
        self._columns = self._find_columns(header)

    def entries(self) -> Iterator[StudyEntry | Skipped]:
        studies: dict[str | int, _Listed] = {}
        for row in self._rows():
            key, listed = self._list(row)
            studies[key] = studies[key].with_row(listed) if key in studies else listed
        if not studies:
            raise ValueError(f"{self.table} has no row below its header: expected one an image")
        dealt: dict[str, str] = {}
        if "split" not in self._columns:
            patients = (listed.patient_id or listed.id for listed in studies.values() if not listed.fault)
            dealt = seeded_split(patients, self.seed, self.split_shares)
        for listed in studies.values():
            patient_id = listed.patient_id or listed.id
            split = listed.split or dealt.get(patient_id)
            if listed.fault:
                yield Skipped(listed.id, split, "malformed", f"{self.table}, {listed.fault}")
            else:
                yield StudyEntry(listed.id, patient_id, split, listed.places)

    def read(self, entry: StudyEntry) -> Study:
        images, views, first = [], [], {}
        with open(self.table, "rb") as file:
            for place in entry.location:
                row = next(read_rows(file, self.encoding, self._delimiter, place), None)
                if row is None or row.fault or len(row.cells) != self._width:
                    raise SkipStudy("malformed", f"{self.table}, line {place.line}: it changed since it was listed")
                images.append(self._image(row))
                views.append(view_named(self._cell(row, "view")))
                for text in _TEXTS:
                    value = present_text(self._cell(row, text), text)
                    told, line = first.setdefault(text, (value, place.line)) if value else (value, place.line)
                    if told != value:
                        reason = f"{text} is not the one of line {line}: expected the same or a blank in a study's rows"
                        raise SkipStudy("malformed", f"{self.table}, line {place.line}: {reason}")
        return Study(images, views, **{text: value for text, (value, _) in first.items()}, licence=self.licence)

    def _header(self, file: BinaryIO) -> tuple[str, list[str], Place]:
        """The table's delimiter, its header and where its rows begin."""
        line = file.readline()
        for first_bytes, what in _OTHER_FILES.items():
            if line.startswith(first_bytes):
                raise ValueError(f"{self.table} is {what}: expected a CSV, saved as UTF-8")
        if b"\r" in line.rstrip(b"\r\n"):
            raise ValueError(f"{self.table} ends its lines with CR alone: expected LF, as in Excel's 'CSV UTF-8'")
        delimiter = "\t" if self.table.lower().endswith((".tsv", ".tab")) else ","
        if delimiter == "," and b"," not in line and b";" in line:
            delimiter = ";"
        begin = Place(1, len(b"\xef\xbb\xbf") if line.startswith(b"\xef\xbb\xbf") else 0)
        row = next(read_rows(file, self.encoding, delimiter, begin), None)
        if row is None:
            raise ValueError(f"{self.table} is empty: expected a header with the columns image and report")
        if row.fault:
            raise ValueError(f"{self.table}, header: {row.fault}")
        return delimiter, [cell.strip() for cell in row.cells], row.end

    def _find_columns(self, header: list[str]) -> dict[str, int]:
        """Positions of the columns that are there, by what they are for."""
        places: dict[str, list[int]] = {}
        for place, name in enumerate(header):
            places.setdefault(_fold(name), []).append(place)
        shown = ", ".join(header)
        columns: dict[str, int] = {}

        def find(name: str) -> int | None:
            found = places.get(_fold(name), [])
            if len(found) > 1:
                raise ValueError(f"{self.table} has {len(found)} columns {name!r}, case and spaces aside: expected one")
            return found[0] if found else None

        for pair in self.column:
            field, equals, name = (part.strip() for part in pair.partition("="))
            field = next((known for known in _FIELDS if _fold(field) in map(_fold, _FIELDS[known])), None)
            field = "findings" if field == "report" else field
            if not equals or field is None:
                raise ValueError(f"option 'column' has {pair!r}: expected FIELD=COLUMN, fields: {', '.join(_FIELDS)}")
            if field in columns:
                raise ValueError(f"option 'column' names the field {field!r} twice: expected it once")
            place = find(name)
            if place is None:
                raise ValueError(f"option 'column' has {pair!r}, and {self.table} no such column: {shown}")
            columns[field] = place
        claimed = set(columns.values())
        for field, names in _FIELDS.items():
            found = (find(name) for name in names if field not in columns)
            place = next((place for place in found if place is not None and place not in claimed), None)
            if place is not None:
                columns[field] = place
        report = columns.pop("report", None)
        if report is not None:
            columns.setdefault("findings", report)
        for field, there in (("image", "image" in columns), ("report", columns.keys() & {"findings", "impression"})):
            if not there:
                raise ValueError(
                    f"{self.table} has no column {field!r}; its columns: {shown}; where it has another name, "
                    f"option 'column' tells it: {field}=NAME"
                )
        return columns

    def _rows(self) -> Iterator[Row]:
        with open(self.table, "rb") as file:
            yield from read_rows(file, self.encoding, self._delimiter, self._begin)

    def _cell(self, row: Row, field: str) -> str:
        place = self._columns.get(field)
        return "" if place is None or place >= len(row.cells) else row.cells[place].strip()

    def _image(self, row: Row) -> str | None:
        """The path of a row's image; None where that is not inside the folder."""
        path = self._cell(row, "image")
        if PureWindowsPath(path).anchor:
            return None
        return path_inside(self.images, path.replace("\\", "/"))

    def _list(self, row: Row) -> tuple[str | int, _Listed]:
        """A row as the study it would be alone, and what tells it from other studies: its id, or its place."""
        split = None
        try:
            if row.fault:
                raise ValueError(row.fault)
            if len(row.cells) != self._width:
                raise ValueError(f"{len(row.cells)} cells, expected {self._width} as in the header")
            for field in self._columns:
                self._check(row, field)
            # Below the other checks, so that the split of no faulty row is counted on.
            split = _SPLIT_NAMES[self._cell(row, "split").casefold()] if "split" in self._columns else None
            fault = None
        except ValueError as error:
            first, last = row.begin.line, row.end.line - 1
            fault = f"line {first}: {error}" if first == last else f"lines {first} to {last}: {error}"
        name = self._cell(row, "study_id")
        if fault and not name:
            name = f"line {row.begin.line}"
        key = name if "study_id" in self._columns else row.begin.line
        study_id = name or os.path.splitext(os.path.relpath(self._image(row), self.images))[0].replace(os.sep, "/")
        return key, _Listed(_whole(study_id), _whole(self._cell(row, "patient_id")), split, (row.begin,), fault)

    def _check(self, row: Row, field: str) -> None:
        cell = self._cell(row, field)
        if not cell.isascii() and _NO_TEXT.search(cell):
            raise ValueError(f"{field} is not {self.encoding} text: option 'encoding' says what the table is")
        if "\0" in cell:
            raise ValueError(f"{field} holds a NUL byte: expected text")
        if field in ("image", "study_id") and not cell:
            raise ValueError(f"{field} is blank: expected one in each row")
        if field == "image" and self._image(row) is None:
            raise ValueError(
                f"image {shown_value(cell)} leaves the folder of images: expected a path inside {self.images}"
            )
        if field == "split" and cell.casefold() not in _SPLIT_NAMES:
            raise ValueError(f"split is {shown_value(cell)}: expected one of {', '.join(_SPLIT_NAMES)}")


class _Listed(NamedTuple):
    """A study as far as its rows have been seen; `split` is None where the table does not say it."""

    id: str
    patient_id: str
    split: str | None
    places: tuple[Place, ...]
    fault: str | None

    def with_row(self, other: _Listed) -> _Listed:
        """The study with one row more. The first fault stays: a study without one of its views is another study."""
        fault = self.fault or other.fault
        for field in ("patient_id", "split"):
            mine, its = getattr(self, field), getattr(other, field)
            if not fault and mine != its and (field == "split" or (mine and its)):
                lines = f"lines {self.places[0].line} and {other.places[0].line}"
                fault = f"{lines}: {field.replace('_id', '')} {mine!r} and {its!r} in the study {self.id}, expected one"
        patient_id, split = self.patient_id or other.patient_id, self.split or other.split
        return _Listed(self.id, patient_id, split, self.places + other.places, fault)


def _fold(name: str) -> str:
    return "".join(name.replace("_", " ").split()).casefold()


def _whole(text: str) -> str:
    """Text that can be written: what stands for bytes that are none becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


__all__ = ["CSVSource"]
