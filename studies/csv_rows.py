"""Rows of a CSV with the places where they begin, so that each can be read again alone, and what is wrong with it."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

#: Characters a cell may have. A quote that is never closed takes the rest of the table into its cell: this ends it.
_LONGEST_CELL = 2**20


class Place(NamedTuple):
    """Where in the table a row is: its line, from 1, and its byte."""

    line: int
    byte: int


class Row(NamedTuple):
    """A row, where it begins and where the next does; what is wrong with it, if it is no CSV."""

    begin: Place
    end: Place
    cells: list[str]
    fault: str | None = None


class _Lines:
    """Lines of a binary file as text, for `csv.reader`, with the place of the next one."""

    def __init__(self, file: BinaryIO, encoding: str, place: Place):
        self.file, self.encoding, self.place = file, encoding, place
        file.seek(place.byte)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            raise StopIteration
        self.place = Place(self.place.line + 1, self.place.byte + len(line))
        # Bytes that are no text become surrogates, so that they are the fault of one row only.
        return line.decode(self.encoding, "surrogateescape")

    def go_to_second(self, begin: Place) -> None:
        """Back to the line after the one at `begin`."""
        self.file.seek(begin.byte)
        self.place = begin
        next(self)


def read_rows(file: BinaryIO, encoding: str, delimiter: str, begin: Place) -> Iterator[Row]:
    """Rows from a place on, blank ones aside. After a row that is not CSV, it goes on with the next line."""
    lines = _Lines(file, encoding, begin)
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        begin = lines.place
        try:
            cells = next(reader, None)
        except csv.Error as error:
            what = f"not CSV ({error})"
            if lines.place.line > begin.line + 1:
                what += f", read to line {lines.place.line - 1}: a quote that opens in the first line may not be closed"
            lines.go_to_second(begin)
            yield Row(begin, lines.place, [], what)
            continue
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield Row(begin, lines.place, cells)


def check_encoding(encoding: str) -> None:
    """Refuse what is no encoding, and those whose bytes cannot be told into lines: `ValueError`."""
    try:
        plain = '\n,;\t"'.encode(encoding) == b'\n,;\t"'
    except LookupError:
        raise ValueError(f"option 'encoding' is {encoding!r}: expected a text encoding, as utf-8 or cp1252") from None
    if not plain:
        raise ValueError(f"option 'encoding' is {encoding!r}: expected one that contains ASCII, or UTF-8")


__all__ = ["Place", "Row", "check_encoding", "read_rows"]
