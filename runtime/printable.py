"""Text for people: escaped for a terminal, as a list, as a Markdown table."""

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TextIO

#: Unicode categories that are escaped: controls, formats (invisible, or changing the direction of text), surrogates,
#: and separators of lines and paragraphs.
_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str) -> str:
    """Escape control characters, direction overrides and lone surrogates as in JSON.

    Line breaks and tabs are kept. JSON text keeps its meaning.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        json.dumps(character)[1:-1]
        if character not in "\n\t" and unicodedata.category(character) in _ESCAPED
        else character
        for character in text
    )


def one_line(text: object) -> str:
    """Text on a single line, escaped by [`printable`]."""
    return printable(" ".join(str(text).split()))


def listed(names: Sequence[str], most: int = 20, separator: str = ", ") -> str:
    """The first names on one line, and how many more there are."""
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return one_line(separator.join(names[:most])) + rest


def enumerated(names: Sequence[str]) -> str:
    """Names as "a, b and c"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells below a header, with line breaks and column separators in cells escaped."""
    header, *rows = ([" ".join(cell.replace("|", "\\|").split()) for cell in cells] for cells in (header, *rows))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def show(text: str, file: TextIO | None = None) -> None:
    """Print text escaped by [`printable`]."""
    print(printable(text), file=file)


class PrintableFormatter(logging.Formatter):
    """A formatter of log records that escapes them by [`printable`]."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
