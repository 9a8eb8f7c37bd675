"""Report cleaning for scores: R2Gen's cleaners, bit for bit.

Published scores are computed on strings cleaned this way, so its accidents are reproduced: text is substituted a fixed
number of times rather than until nothing changes, "1. " is removed everywhere (also from "T11. "), numbers above 5
are kept, decimal points are removed ("0.5" becomes "05"), empty sentences are kept, and "" becomes " .".
"""

from __future__ import annotations

from ..sections_otdrg import join_sections, split_sections

_ENUMERATION = (
    ("1. ", ""),
    *((f". {number}. ", ". ") for number in range(2, 6)),
    *((f" {number}. ", ". ") for number in range(2, 6)),
)

#: Substitutions in the whole report, in order; a repeated one halves a run of characters each time.
_SUBSTITUTIONS = {
    "r2gen_iu": (*[("..", ".")] * 3, *_ENUMERATION),
    "r2gen_mimic": (
        ("\n", " "),
        *[("__", "_")] * 7,
        *[("  ", " ")] * 6,
        *[("..", ".")] * 8,
        *_ENUMERATION,
    ),
}

#: Characters removed from a sentence before its ends are stripped, and after.
_DROPPED_FIRST = str.maketrans("", "", "\"/\\'")
#: R2Gen's class `[.,?;*!%^&_+():-\[\]{}]` has a range from ":" to "[": it contains "<", "=", ">", "@", not "-".
_DROPPED_LAST = str.maketrans("", "", ".,?;*!%^&_+()[]{}:<=>@")

CLEANING_STYLES: tuple[str, ...] = (*_SUBSTITUTIONS, "none")


def clean_report(text: str, style: str) -> str:
    """A report as R2Gen's tokenizer cleans it before scoring: lower case, sentences joined by " . ".

    Args:
        text: the report.
        style: "r2gen_iu" (R2Gen's cleaner for IU X-Ray), "r2gen_mimic" (for MIMIC-CXR) or "none" (unchanged).

    Source: `clean_report_iu_xray` and `clean_report_mimic_cxr` in R2Gen's `modules/tokenizers.py`
    (Chen et al., "Generating Radiology Reports via Memory-driven Transformer", EMNLP 2020).
    """
    if style == "none":
        return text
    if style not in _SUBSTITUTIONS:
        raise ValueError(f"unknown cleaning style {style!r}: expected one of {', '.join(CLEANING_STYLES)}")
    for old, new in _SUBSTITUTIONS[style]:
        text = text.replace(old, new)
    sentences = (_clean_sentence(sentence) for sentence in text.strip().lower().split(". "))
    return " . ".join(sentences) + " ."


def clean_sections(text: str, style: str) -> str:
    """[`clean_report`] of each section of a report, so that the headings stay; of all of it if it has none."""
    sections = split_sections(text)
    if not sections.has_headings or style == "none":
        return clean_report(text, style)
    return join_sections(*(clean_report(section, style) if section else "" for section in sections[:2]))


def _clean_sentence(sentence: str) -> str:
    return sentence.translate(_DROPPED_FIRST).strip().translate(_DROPPED_LAST)
