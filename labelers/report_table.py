"""Tables of reports: a CSV with a header, or a file with a JSON object on each line; one report for each id."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TextIO

from ..runtime.csv_files import longest_cell, unescape_cell

_LONGEST_CELL = 2**24


def fold_name(name: str) -> str:
    """A column's name without differences in case, spaces and underscores."""
    return " ".join(name.replace("_", " ").split()).casefold()


def read_reports(path: str | Path, column: str = "report") -> Iterator[tuple[str, str]]:
    """Iterate over the ids and reports of a table: a CSV, or a .jsonl file with these keys; other columns are ignored.

    Raises:
        ValueError: the file is missing, not UTF-8 or no such table, a column is missing or repeated, a row has another
            length, or an id is empty or repeated; one line that names the file and the line.
    """
    path = Path(path)
    lines: dict[str, int] = {}
    if path.suffix.lower() == ".jsonl":
        for row, study, report in _json_reports(path, column):
            check_id(path, row, "id", study, lines)
            yield study, report
        return
    with closing(csv_rows(path, f"a CSV with the columns id and {column}")) as rows:
        _, header = next(rows)
        folded = [fold_name(name) for name in header]
        for name in ("id", column):
            if folded.count(fold_name(name)) != 1:
                found = f"{folded.count(fold_name(name))} columns {name!r}"
                raise ValueError(f"{path}: {found}, expected one; columns: {', '.join(header) or 'none'}")
        id_place, report_place = folded.index("id"), folded.index(fold_name(column))
        for row, cells in rows:
            study = cells[id_place].strip()
            check_id(path, row, header[id_place], study, lines)
            yield study, cells[report_place]


def has_column(path: str | Path, column: str) -> bool:
    """Whether a table of [`read_reports`] has a column; for .jsonl, whether its first object has the key.

    Raises:
        ValueError: as `read_reports`.
    """
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        with closing(csv_rows(path, "a CSV with a header")) as rows:
            return fold_name(column) in map(fold_name, next(rows)[1])
    with _reading(path, "a JSON object a line") as file:
        first = next((line for line in file if line.strip()), "{}")
    try:
        return column in json.loads(first)
    except (ValueError, TypeError):
        return False  # `read_reports` raises the error


def _json_reports(path: Path, column: str) -> Iterator[tuple[int, str, str]]:
    expected = f"an object with the keys id and {column} on each line"
    with _reading(path, expected) as file:
        for row, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
                study, report = record["id"], record[column]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"{path}, line {row}: expected {expected}") from None
            if not isinstance(report, str) or isinstance(study, bool) or not isinstance(study, (str, int)):
                raise ValueError(
                    f"{path}, line {row}: id is {type(study).__name__} and {column} {type(report).__name__}, "
                    "expected strings"
                )
            yield row, str(study).strip(), report


@contextmanager
def _reading(path: Path, expected: str) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError:
        row = _undecodable(path)
        raise ValueError(f"{path}: not UTF-8 (line {row}), expected {expected}, saved as UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}), expected {expected}") from None


def _undecodable(path: Path) -> int | None:
    """The number of the first line that is not UTF-8."""
    with path.open("rb") as file:
        for row, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return row
    return None


def csv_rows(path: Path, expected: str) -> Iterator[tuple[int, list[str]]]:
    """Iterate over the header of a CSV (empty if there is none) and its non-blank rows, each with its first line.

    Cells are unescaped as [`otdrg.runtime.csv_files.write_csv`] escapes them.
    """
    row = 1
    with _reading(path, expected) as file, longest_cell(_LONGEST_CELL):
        reader = csv.reader(file, strict=True)
        try:
            header = [unescape_cell(name) for name in next(reader, [])]
            yield row, header
            row = reader.line_num + 1
            for cells in reader:
                if len(cells) not in (0, len(header)):
                    found = f"{len(cells)} values, expected {len(header)} as in the header"
                    raise ValueError(f"{path}, line {row}: {found}")
                if cells:
                    yield row, [unescape_cell(cell) for cell in cells]
                row = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{path}: not a CSV (line {row}: {error}), expected {expected}") from None


def check_id(path: Path, row: int, column: str, study: str, lines: dict[str, int]) -> None:
    """Raise a `ValueError` for an id that is empty or already in `lines`, and add it there."""
    if not study:
        raise ValueError(f"{path}, line {row}, column {column}: empty, expected a study's id")
    if study in lines:
        raise ValueError(
            f"{path}, line {row}, column {column}: {study!r} is in line {lines[study]} too, "
            "expected one row for each study"
        )
    lines[study] = row
