"""Findings and impression as two sections of one report, each below its heading: "Findings: ... Impression: ..."."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

#: The sections in the order in which a report has them.
SECTIONS: tuple[str, ...] = ("findings", "impression")
#: The words that begin each section, which every tokenizer has.
HEADINGS: dict[str, str] = {section: f"{section.capitalize()}:" for section in SECTIONS}

# Not only as written by `join_sections`: tokenizers may lower the case and put a space before the colon.
_NAME = rf"(?<!\S)({'|'.join(SECTIONS)})"
_HEADING = re.compile(rf"{_NAME}\s*:", re.IGNORECASE)
_HEADING_AND_COLONS = re.compile(rf"{_NAME}[\s:]*:", re.IGNORECASE)


class SplitReport(NamedTuple):
    """The sections of a report.

    Args:
        findings, impression: the texts below the headings, "" for a section that the report does not have.
        has_headings: whether the report begins with a heading, and has each at most once and in order. Otherwise all
            of its text is the findings.
    """

    findings: str
    impression: str
    has_headings: bool


def join_sections(findings: str, impression: str) -> str:
    """A report of two sections that [`split_sections`] splits again; a section without text has no heading.

    A heading within a section loses its colon; one that repeats the section's own at its start is left out.
    """
    texts = (_without_inner_headings(*section) for section in zip(SECTIONS, (findings, impression), strict=True))
    return " ".join(f"{HEADINGS[section]} {text}" for section, text in zip(SECTIONS, texts, strict=True) if text)


def _without_inner_headings(section: str, text: str) -> str:
    first = _HEADING.match(text.strip())
    if first is not None and first[1].lower() == section:
        text = text.strip()[first.end() :]
    return _HEADING_AND_COLONS.sub(lambda heading: heading[1], text).strip()


def split_sections(report: str) -> SplitReport:
    """The sections of a report; without headings, or with misplaced ones, all of its text is the findings."""
    report = report.strip()
    headings = list(_HEADING.finditer(report))
    names = [heading[1].lower() for heading in headings]
    if not headings or headings[0].start() > 0 or names != [section for section in SECTIONS if section in names]:
        return SplitReport(report, "", False)
    ends = [*(heading.start() for heading in headings[1:]), len(report)]
    texts = {
        name: report[heading.end() : end].strip() for name, heading, end in zip(names, headings, ends, strict=True)
    }
    return SplitReport(texts.get("findings", ""), texts.get("impression", ""), True)


def has_sections(reports: Iterable[str]) -> bool:
    """Whether reports consist of sections: all have headings, and at least one has both sections."""
    found = False
    for report in reports:
        sections = split_sections(report)
        if not sections.has_headings:
            return False
        found = found or bool(sections.findings and sections.impression)
    return found


def without_headings(report: str) -> str:
    """The text of all sections of a report, by which whole reports are compared and labelled."""
    sections = split_sections(report)
    return " ".join(filter(None, sections[:2])) if sections.has_headings else report


def lay_out_sections(report: str) -> str:
    """A report for people: each section below its heading, with a blank line between them."""
    sections = split_sections(report)
    if not sections.has_headings:
        return report
    texts = zip(SECTIONS, sections[:2], strict=True)
    return "\n\n".join(f"{HEADINGS[section]}\n{text}" for section, text in texts if text)


__all__ = [
    "HEADINGS",
    "SECTIONS",
    "SplitReport",
    "has_sections",
    "join_sections",
    "lay_out_sections",
    "split_sections",
    "without_headings",
]
