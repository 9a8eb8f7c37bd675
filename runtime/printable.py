"""Text of others as it may be sent to a terminal."""

from __future__ import annotations

import json
import logging
import unicodedata
from typing import TextIO

#: Categories of Unicode of which a character is escaped: controls, formats (which turn the direction of text, or are
#: not seen), surrogates, and separators of lines and paragraphs.
_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str) -> str:
    """Text with control characters, direction overrides and lone surrogates escaped as in JSON.

    Line breaks and tabs are kept. JSON text stays the same JSON.
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
    """Text on a single line, as [`printable`] has it."""
    return printable(" ".join(str(text).split()))


def show(text: str, file: TextIO | None = None) -> None:
    """Print text as [`printable`] has it."""
    print(printable(text), file=file)


class PrintableFormatter(logging.Formatter):
    """Formats log records as [`printable`] has it."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


__all__ = ["PrintableFormatter", "one_line", "printable", "show"]
