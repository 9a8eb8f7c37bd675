"""Read the rows of a CSV with their line numbers: a whole table, or some columns of a published file."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..runtime.csv_files import longest_cell

#: Most characters of a cell. It limits the cell of a quote that is never closed, which contains the rest of the table.
_LONGEST_CELL = 2**20
_GZIP_MAGIC = b"\x1f\x8b"


class Row(NamedTuple):
    """A row: its first and last line, from 1, its cells, and the reason why it is not CSV, if it is not."""

    first: int
    last: int
    cells: list[str]
    fault: str | None = None

    @property
    def place(self) -> str:
        return f"line {self.first}" if self.first == self.last else f"lines {self.first} to {self.last}"


def read_rows(lines: list[str], delimiter: str) -> Iterator[Row]:
    """Iterate over the rows that are not blank. After a row that is not CSV, continue with the next line."""
    begin = 0
    while begin < len(lines):
        with longest_cell(_LONGEST_CELL):
            reader = csv.reader(map(lines.__getitem__, range(begin, len(lines))), delimiter=delimiter, strict=True)
            first = begin
            try:
                for cells in reader:
                    if any(cell.strip() for cell in cells):
                        yield Row(first + 1, begin + reader.line_num, cells)
                    first = begin + reader.line_num
                return
            except csv.Error as error:
                fault, last = f"not CSV ({error})", begin + reader.line_num
        if last > first + 1:
            fault += f", read to line {last}: a quote that opens in the first line may not be closed"
        yield Row(first + 1, first + 1, [], fault)
        begin = first + 1


def read_columns(
    path: Path, columns: tuple[str, ...], optional: tuple[str, ...] = (), errors: str = "strict"
) -> Iterator[tuple[int, list[str]]]:
    """Number and values of each line of a CSV, compressed or not.

    The values are those of `columns` and then of `optional`, columns that the file may lack; a missing value is "".
    `errors` says what happens to bytes that are not UTF-8, as in `open`.
    """
    try:
        with path.open("rb") as file:
            packed = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        # By the content: browsers decompress files without renaming them.
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig", errors=errors, newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            for column in columns:
                if column not in header:
                    shown = ", ".join(header) or "none"
                    raise ValueError(
                        f"{path} has no column {column!r}: expected {', '.join(columns)}; columns: {shown}"
                    )
            places = [header.index(column) if column in header else None for column in (*columns, *optional)]
            for cells in reader:
                if cells:
                    yield reader.line_num, [_cell(cells, place) for place in places]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start} of a block): expected a CSV") from None
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV ({error}): expected one line for each image") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file ({error}): download it again") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _cell(cells: list[str], place: int | None) -> str:
    return "" if place is None or place >= len(cells) else cells[place].strip()


def check_encoding(encoding: str) -> None:
    """Raise a `ValueError` for an unknown encoding, and for one that is not a superset of ASCII."""
    try:
        plain = '\n,;\t"'.encode(encoding) == b'\n,;\t"'
    except LookupError:
        raise ValueError(f"option 'encoding' is {encoding!r}: expected a text encoding, as utf-8 or cp1252") from None
    if not plain:
        raise ValueError(f"option 'encoding' is {encoding!r}: expected one that contains ASCII, or UTF-8")
