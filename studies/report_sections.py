"""Sections of a radiology report as it was dictated: free text with headers, as in MIMIC-CXR.

What is decided where reports differ:

- "FINDINGS AND IMPRESSION:" is the findings, and the impression is empty, so that nothing stands in both.
- The name of the views ("PA AND LATERAL VIEWS OF THE CHEST:") or of an organ ("LUNGS:") in place of "FINDINGS:" opens
  the findings; within findings or impression it is a part of their text.
- Without either, the findings are the unlabelled text: the paragraphs that follow the first one of the last section
  before the impression (before the end, if there is none), or, in a report without headers, all of it. It must have
  two words that do not name views, so that a title or a second date under "COMPARISON:" is not taken for findings.
- Wet reads, other preliminary reads and addenda are left out. They end at a rule of underscores or at "FINAL REPORT",
  and where no "FINAL REPORT" follows and nothing has been read yet, at the first header.
- A section that comes twice is joined. Other sections (technique, notification, recommendations...) are left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple


class ReportSections(NamedTuple):
    """Sections of a report, "" where there is none; white space is single spaces, placeholders are left as they are.

    Args:
        findings, impression, indication, comparison: the sections.
        findings_labelled: whether the findings stand under a header; False where they are unlabelled text.
    """

    findings: str = ""
    impression: str = ""
    indication: str = ""
    comparison: str = ""
    findings_labelled: bool = False


# Kinds of passage beside the four sections: text in place of the findings, before the first header, in sections that
# precede the findings, under labels nobody has foreseen, in sections after the impression, and what is not the report.
_VIEWS, _TITLE, _OTHER, _LABEL, _CLOSING, _ASIDE = "views", "title", "other", "label", "closing", "aside"


def _word_set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_AND = r"(?: AND | )"
_CLINICAL = r"(?:(?:BRIEF |PERTINENT |RELEVANT )?(?:CLINICAL|PATIENT|MEDICAL|PROVIDED) )?"
_EXAM = r"(?:EXAM|EXAMS|EXAMINATION|EXAMINATIONS|STUDY|STUDIES|TEST|PROCEDURE|FILM|FILMS|RADIOGRAPH|RADIOGRAPHS)"
_FINDINGS_NAME = r"(?:FINDINGS?|FINDNGS|FINDINS|FINIDNGS|FINDIGNS)"
_IMPRESSION_NAME = r"(?:IMPRESSIONS?|IMPRESSSION|IMPRESION|IMPRSSION|IMPRESSON|CONCLUSIONS?)"
_INDICATION_NAME = (
    r"(?:HISTORY|HX|HISTORIES|INDICATIONS?|INDICTION|INFORMATION|DATA|CONTEXT|QUESTION|CONDITION"
    rf"|(?:INDICATIONS?|REASONS?) FOR (?:(?:THE|THIS) )?{_EXAM})"
)

#: Names of headers, in capitals and without punctuation.
_NAMES = {
    "findings": rf"(?:(?:CHEST|RADIOGRAPHIC|IMAGING) )?{_FINDINGS_NAME}(?: CHEST)?"
    rf"|{_FINDINGS_NAME}{_AND}{_IMPRESSION_NAME}|{_IMPRESSION_NAME}{_AND}{_FINDINGS_NAME}|REPORT|OBSERVATIONS?",
    "impression": rf"(?:FINAL )?{_IMPRESSION_NAME}(?: AND RECOMMENDATIONS?)?|SUMMARY|ASSESSMENT|OPINION",
    # "INFORMATION:" alone says nothing, so such words need "CLINICAL" before them.
    "indication": rf"(?!(?:INFORMATION|DATA|CONTEXT|QUESTION|CONDITION)$){_CLINICAL}{_INDICATION_NAME}"
    rf"(?: AND {_CLINICAL}{_INDICATION_NAME})*|REASON|UNDERLYING MEDICAL CONDITION",
    "comparison": rf"COMPARISONS?(?: {_EXAM}| MADE| DATE)?|COMPARSIONS?|COMPARISION|(?:PRIOR|PREVIOUS) {_EXAM}",
    _OTHER: rf"(?:TYPE OF )?{_EXAM}(?: (?:TYPE|PERFORMED|DESCRIPTION|TITLE))?|TECHNIQUES?|TECHNICAL FACTORS|METHODS?"
    rf"|VIEWS?|NUMBER OF VIEWS|CONTRAST|DATE|DATE OF {_EXAM}|{_EXAM} DATE|TECHNIQUE AND {_EXAM}|{_EXAM} AND TECHNIQUE",
    _CLOSING: r"NOTIFICATIONS?|RECOMMENDATIONS?|RECOMMENDATIONS? AND NOTIFICATIONS?|COMMUNICATIONS?|CRITICAL RESULTS?"
    r"|ATTENDING|RADIOLOGISTS?|DICTATED BY|SIGNED(?: BY)?|APPROVED BY|ELECTRONICALLY SIGNED(?: BY)?",
}
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in _NAMES.items()}

#: Words of a line that names the views, and those of which it must have one.
_VIEW_NAMES = _word_set(
    "VIEW VIEWS CHEST THORAX CXR RADIOGRAPH RADIOGRAPHS RADIOGRAPHY FILM FILMS XRAY RAY RAYS AP PA LATERAL LAT FRONTAL "
    "PORTABLE UPRIGHT SUPINE DECUBITUS"
)
_VIEW_WORDS = _VIEW_NAMES | _word_set(
    "A ABDOMEN AM AN AND AT BEDSIDE BILATERAL DATED ERECT EXAM EXAMINATION EXPIRATORY FOR FOUR FROM HOUR HOURS HRS "
    "IMAGE IMAGES IN INSPIRATORY LEFT LORDOTIC M OBLIQUE OBTAINED OF ON ONE ONLY P PERFORMED PM PROJECTION "
    "PROJECTIONS RADIOGRAPHIC REPEAT RIB RIBS RIGHT S SEATED SEMI SEMIERECT SEMIUPRIGHT SERIES SINGLE SITTING STANDING "
    "STAT STUDY THE THREE TIME TWO VS WITH X"
)
#: A label that begins with one of these is about what is seen.
_ORGANS = _word_set(
    "LUNG LUNGS HEART CARDIAC CARDIOMEDIASTINAL CARDIOMEDIASTINUM MEDIASTINUM MEDIASTINAL PLEURA PLEURAL BONES BONE "
    "OSSEOUS SKELETAL DIAPHRAGM HILA HILAR AIRWAYS PULMONARY VASCULATURE LINES TUBES DEVICES SUPPORT"
)

_LINE_END = re.compile(r"\r\n|\r|\n")
_RULE = re.compile(r"_{10,}|[-=*]{5,}")
_FINAL_REPORT = re.compile(r"\W*FINAL REPORT\W*", re.IGNORECASE)
_ASIDE_NAME = (
    r"(?:FINAL )?ADDENDUM|(?:WET|PRELIMINARY|PRELIM|INTERIM|PROVISIONAL) (?:READ|READING|REPORT)"
    r"|PROVISIONAL FINDINGS IMPRESSION|PFI REPORT"
)
#: In capitals wherever a line begins with it; in other cases it needs a colon or a line of its own.
_ASIDE_START = re.compile(rf"[\W_]*(?:(?:{_ASIDE_NAME})\b|(?i:{_ASIDE_NAME})(?: (?:#|VERSION).*)?\s*(?::|$))")
#: Between words of a line; no longer than two spaces, so that nothing below has to go over a long one.
_GAP = re.compile(r"\t\s*|\s{2,}")
#: A header in capitals in the midst of a line, after the end of a sentence or a gap.
_MIDLINE = re.compile(
    r"(?:(?<=[.?!_])\s+|\s{2,})(?=(?:INDICATION|HISTORY|CLINICAL HISTORY|REASON FOR EXAM|TECHNIQUE|COMPARISONS?"
    r"|FINDINGS|IMPRESSION|FINDINGS AND IMPRESSION|FINDINGS ?/ ?IMPRESSION|CONCLUSION|NOTIFICATION"
    r"|RECOMMENDATION(?:\(S\)|S)?)\s*:)"
)
#: A colon, but not that of a time or a ratio.
_COLON = re.compile(r":(?!(?<=\d:)\d)")
_LONGEST_NAME = 90


@dataclass
class _Passage:
    """Text of one kind, by paragraphs."""

    kind: str
    paragraphs: list[list[str]] = field(default_factory=lambda: [[]])

    def add(self, line: str) -> None:
        if line:
            self.paragraphs[-1].append(line)

    def end_paragraph(self) -> None:
        if self.paragraphs[-1]:
            self.paragraphs.append([])

    def text(self, first: int = 0, last: int | None = None) -> str:
        return " ".join(" ".join(line.split()) for lines in self.paragraphs[first:last] for line in lines)


class _Header(NamedTuple):
    kind: str
    #: What the section's text begins with.
    text: str


def parse_sections(text: str) -> ReportSections:
    """The sections of a report; see the module on what is done where headers are missing.

    Args:
        text: the report with its line ends; lines hold headers.
    """
    passages = _passages(text)
    found = {kind: _joined(passages, kind) for kind in ("findings", "impression", "indication", "comparison")}
    if not found["findings"]:
        found["findings"] = _joined([p for p in passages if _telling_words(p.text())], _VIEWS)
    labelled = bool(found["findings"])
    if not labelled:
        unlabelled = _cut_unlabelled(passages)
        # The section that it stood in has lost it.
        found = {**{kind: _joined(passages, kind) for kind in found}, "findings": unlabelled}
    return ReportSections(**found, findings_labelled=labelled)


def _joined(passages: list[_Passage], kind: str) -> str:
    return " ".join(text for passage in passages if passage.kind == kind and (text := passage.text()))


def _passages(text: str) -> list[_Passage]:
    lines = (_GAP.sub("  ", line) for line in _LINE_END.split(text.lstrip("\ufeff")))
    lines = [part.strip() for line in lines for part in _MIDLINE.split(line)]
    last_final = max((place for place, line in enumerate(lines) if _FINAL_REPORT.fullmatch(line)), default=-1)
    passages = [_Passage(_TITLE)]
    after_break, has_read = True, False
    for place, line in enumerate(lines):
        current = passages[-1]
        if not line or _RULE.fullmatch(line):
            current.end_paragraph()
            if line and current.kind == _ASIDE:
                passages.append(_Passage(_TITLE))
            after_break = True
            continue
        header = _header(line, after_break)
        after_break = line.endswith((".", "?", "!"))
        if _FINAL_REPORT.fullmatch(line):
            passages.append(_Passage(_TITLE))
        elif _ASIDE_START.match(line):
            passages.append(_Passage(_ASIDE))
        elif current.kind == _ASIDE and (header is None or has_read or place < last_final):
            continue
        elif header is None or not _opens(header, current):
            current.add(line)
        else:
            passages.append(_Passage(header.kind))
            passages[-1].add(header.text)
        has_read = has_read or passages[-1].kind in ("findings", "impression", _VIEWS)
    return passages


def _opens(header: _Header, current: _Passage) -> bool:
    """Whether a header opens a passage here: findings and impression are ended by names of sections only."""
    if header.kind == _TITLE and current.kind != _TITLE and not any(current.paragraphs):
        return False  # "EXAMINATION:", and the name on the next line
    return header.kind in _NAMES or current.kind not in ("findings", "impression", _VIEWS)


def _header(line: str, after_break: bool) -> _Header | None:
    """The header that a line begins with.

    Args:
        line: without white space at its ends.
        after_break: whether the line before it is blank or ends a sentence.
    """
    line = line.lstrip("*# ")
    colon = _COLON.search(line, 0, _LONGEST_NAME)
    name, rest = (line[: colon.start()], line[colon.end() :].strip()) if colon else (line, "")
    words = _words(name)
    if not words or len(words) > 15 or not (after_break or name[0].isupper()):
        return None
    phrase, in_capitals = " ".join(words), name.upper() == name
    # Without a colon it must not be the last word of a sentence.
    alone = name[0].isupper() and not name.endswith((".", ",", ";", "?", "!"))
    if colon or alone:
        for kind, pattern in _PATTERNS.items():
            if pattern.fullmatch(phrase):
                return _Header(kind, rest)
    if not (in_capitals or after_break) or not name[0].isupper():
        return None
    if _VIEW_NAMES & set(words) and _VIEW_WORDS.issuperset(word for word in words if word.isalpha()):
        if colon:
            return _Header(_VIEWS, rest)
        return _Header(_TITLE, "") if in_capitals and after_break else None
    if not colon:
        return None
    if words[0] in _ORGANS and len(words) <= 6:
        return _Header(_VIEWS, line)
    # Any other label in capitals ends what does not belong to the findings, as "ORDERING PHYSICIAN:".
    return _Header(_LABEL, rest) if in_capitals and sum(map(str.isalpha, phrase)) > 2 else None


def _words(name: str) -> list[str]:
    name = re.sub(r"\(S\)", "S", name.upper())
    name = re.sub(r"[&/+]", " AND ", name)
    return re.findall(r"[^\W_]+", re.sub(r"\bX-?RAY", "XRAY", name))


def _telling_words(text: str) -> int:
    """Number of words that do not name the views; placeholders and numbers do not count."""
    return sum(word.isalpha() and word not in _VIEW_WORDS for word in _words(text))


def _cut_unlabelled(passages: list[_Passage]) -> str:
    """Take the unlabelled findings out of the passage that they stand in."""
    kinds = [passage.kind for passage in passages]
    end = kinds.index("impression") if "impression" in kinds else len(passages)
    for passage in reversed(passages[:end]):
        if passage.kind in (_ASIDE, _CLOSING, "findings", _VIEWS) or not passage.text():
            continue
        first = 0 if passage.kind == _TITLE else 1
        while first < len(passage.paragraphs) and not _telling_words(passage.text(first, first + 1)):
            first += 1
        text = passage.text(first)
        if _telling_words(text) < 2:
            if passage.kind == _LABEL:
                continue
            return ""
        del passage.paragraphs[first:]
        return text
    return ""


__all__ = ["ReportSections", "parse_sections"]
