"""CSV files whose cells a spreadsheet does not execute as formulas."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ..files_otdrg import write_text

#: Cells that a spreadsheet executes as formulas, and such cells after escaping.
_FORMULA = re.compile(r"'*[=+\-@\t\r＝＋－＠]")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


def escape_cell(cell: Any) -> Any:
    """Put an apostrophe before text that would be a formula (OWASP, "CSV Injection"); numbers are not changed."""
    if isinstance(cell, str) and _FORMULA.match(cell) and not _NUMBER.fullmatch(cell):
        return f"'{cell}"
    return cell


def unescape_cell(cell: str) -> str:
    """Undo [`escape_cell`]."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def write_csv(path: str | os.PathLike, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file in UTF-8 with escaped cells ([`escape_cell`]). The file is complete or not written."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([escape_cell(name) for name in header])
    writer.writerows([escape_cell(cell) for cell in row] for row in rows)
    # File names from another system may not be valid text.
    write_text(path, file.getvalue().encode("utf-8", "backslashreplace").decode("utf-8"))


def read_csv(path: str | os.PathLike) -> list[dict[str, str]]:
    """The rows of a file written by [`write_csv`], each as `{column: cell}`.

    Raises:
        ValueError: the file is not CSV in UTF-8, or a row has another length than the header.
        OSError: the file cannot be read.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = csv.reader(file)
            return [dict(zip(header, map(unescape_cell, row), strict=True)) for row in rows]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is damaged: expected a CSV file with a header ({error})") from None


@contextmanager
def longest_cell(characters: int) -> Iterator[None]:
    """Let `csv.reader` accept cells of this many characters; the limit is global, so it is restored."""
    before = csv.field_size_limit(characters)
    try:
        yield
    finally:
        csv.field_size_limit(before)
