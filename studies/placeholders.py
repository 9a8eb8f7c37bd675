"""Placeholders for missing text: `nan`, `N/A`, `None`, "-", "No report available."."""

from __future__ import annotations

import re

#: Placeholders written by programs, in lower case and without punctuation.
_MACHINE = frozenset(("nan", "nat", "na", "n a", "null", "nul", "undefined", "empty", "blank", "missing", "tbd"))
#: Placeholders written by people.
_WORDS = frozenset(
    (
        "nil",
        "no data",
        "no dictation",
        "no impression",
        "no report",
        "no report available",
        "no report found",
        "no text",
        "none",
        "none available",
        "none given",
        "none provided",
        "not applicable",
        "not available",
        "not dictated",
        "not given",
        "not provided",
        "not reported",
        "pending",
        "report missing",
        "report not available",
        "report pending",
        "report unavailable",
        "unavailable",
        "unknown",
    )
)
_NO_WORD = re.compile(r"[\W_]+")


def present_text(text: str | None, field: str = "report") -> str:
    """The text without white space at its ends; "" if it is a placeholder.

    "Normal." is a report. "None." is neither a report nor an indication, but it is kept as a comparison, where it means
    that there is no earlier study.

    Args:
        text: content of the field.
        field: "indication", "comparison", or a report or one of its sections, which must contain a letter.
    """
    text = (text or "").strip()
    words = _NO_WORD.sub(" ", text).strip().casefold()
    if not words or (field not in ("indication", "comparison") and not any(map(str.isalpha, words))):
        return ""
    # Joining two empty cells gives "nan nan".
    once = " ".join(dict.fromkeys(words.split())) if words not in _MACHINE else words
    for known in (words, once):
        if known in _MACHINE or (known in _WORDS and field != "comparison"):
            return ""
    return text


def shown_value(value: object) -> str:
    """A value for an error message: the type or length of a value that may be the text of a report."""
    if not isinstance(value, str):
        return "None" if value is None else f"of type {type(value).__name__}"
    return repr(value) if len(value) <= 60 and not re.search(r"\s", value) else f"a text of {len(value):,} characters"
