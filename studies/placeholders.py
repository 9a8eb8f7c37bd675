"""What stands in a text field where there is no text: `nan`, `N/A`, `None`, "-", "No report available."."""

from __future__ import annotations

import re

#: What programs write for a missing value, in lower case and without punctuation.
_MACHINE = frozenset(("nan", "nat", "na", "n a", "null", "nul", "undefined", "empty", "blank", "missing", "tbd"))
#: What people write.
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
    """The text without white space at its ends; "" where it only says that there is none.

    "Normal." is a report. "None." is neither a report nor an indication, but as a comparison it is kept: there it says
    that there is no earlier study.

    Args:
        text: of the field.
        field: "indication", "comparison", or a report or section of it, which must hold a letter.
    """
    text = (text or "").strip()
    words = _NO_WORD.sub(" ", text).strip().casefold()
    if not words or (field not in ("indication", "comparison") and not any(map(str.isalpha, words))):
        return ""
    # "nan nan" is what joining two empty cells gives.
    once = " ".join(dict.fromkeys(words.split())) if words not in _MACHINE else words
    for known in (words, once):
        if known in _MACHINE or (known in _WORDS and field != "comparison"):
            return ""
    return text


def shown_value(value: object) -> str:
    """A value as a reason for skipping a study quotes it: of what may be a report's text, the type or the length."""
    if not isinstance(value, str):
        return "None" if value is None else f"of type {type(value).__name__}"
    return repr(value) if len(value) <= 60 and not re.search(r"\s", value) else f"a text of {len(value):,} characters"


__all__ = ["present_text", "shown_value"]
