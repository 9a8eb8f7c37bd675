"""CSV files that a spreadsheet opens without running what is in their cells."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: Cells that a spreadsheet takes for a formula, and those that were escaped or look so.
_FORMULA = re.compile(r"'*[=+\-@\t\r＝＋－＠]")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


def escape_cell(cell: Any) -> Any:
    """A cell as it is written: an apostrophe is put before text that would be a formula (OWASP, "CSV Injection").

    Numbers stay numbers. [`unescape_cell`] gives the text back.
    """
    if isinstance(cell, str) and _FORMULA.match(cell) and not _NUMBER.fullmatch(cell):
        return f"'{cell}"
    return cell


def unescape_cell(cell: str) -> str:
    """The text that [`escape_cell`] wrote as this cell."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def write_csv(path: str | os.PathLike, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file: UTF-8, cells as of [`escape_cell`]. It is there as a whole or not at all.

    Args:
        path: of the file; one that is there is replaced.
        header: names of the columns.
        rows: their cells.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # The names of files from another system may not be text.
        with unfinished.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([escape_cell(name) for name in header])
            for row in rows:
                writer.writerow([escape_cell(cell) for cell in row])
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_csv(path: str | os.PathLike) -> list[dict[str, str]]:
    """The rows of a CSV file that [`write_csv`] wrote, by the names of its columns.

    Raises:
        ValueError: the file is not CSV in UTF-8, or a row has more or fewer cells than the header.
        OSError: the file cannot be read.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = csv.reader(file)
            return [dict(zip(header, map(unescape_cell, row), strict=True)) for row in rows]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is damaged: expected a CSV file with a header ({error})") from None


__all__ = ["escape_cell", "read_csv", "unescape_cell", "write_csv"]
