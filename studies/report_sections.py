"""Split a dictated radiology report (free text with headers, as in MIMIC-CXR, CheXpert Plus or VistA) into sections.

Rules for cases in which reports differ:

- "FINDINGS AND IMPRESSION:" is the findings, and the impression is empty, so that no text is in both.
- The names of views ("PA AND LATERAL VIEWS OF THE CHEST:") or of an organ ("LUNGS:") in place of "FINDINGS:" begin
  the findings; within findings or impression they are text.
- Without either, the findings are unlabelled text: the paragraphs after the first one of the last section before the
  impression (or before the end), or, in a report without headers, all of it. Unlabelled findings must have two words
  that do not name views; otherwise they are a title or a second date under "COMPARISON:".
- Wet reads, other preliminary reads and addenda are removed. They end at a rule of underscores or at "FINAL REPORT";
  if no "FINAL REPORT" follows and no section came before, they end at the first header.
- The end of a report is removed: END OF IMPRESSION, diagnostic codes, signatures, names, who dictated, reviewed or
  typed it, accession numbers. After it, only headers of findings, impression, indication or comparison begin a section.
- Headers may be bold (`**FINDINGS:**`), HTML, numbered, misspelt, within a line, or end in a dash. In a sentence
  ("Findings are ...", "the impression of the tube") the same words are text.
- Repeated sections are joined. Other sections (technique, notification, recommendations...) are removed.

Longer than three screens because the rules depend on each other.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from .report_trailers import is_metadata, is_signature_line, is_trailer
from .source import TEXTS


class ReportSections(NamedTuple):
    """Sections of a report, "" if absent, with single spaces as white space; placeholders are not removed.

    Args:
        findings, impression, indication, comparison: the sections.
        findings_labelled: whether the findings have a header; False if they are unlabelled text.
    """

    findings: str = ""
    impression: str = ""
    indication: str = ""
    comparison: str = ""
    findings_labelled: bool = False


# Kinds of passage besides the four sections: text under names of views, text before the first header, sections before
# the findings, sections with unknown labels, sections after the impression, and text that is not the report.
_VIEWS, _TITLE, _OTHER, _LABEL, _CLOSING, _ASIDE = "views", "title", "other", "label", "closing", "aside"


def _word_set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_AND = r"(?: AND | )"
_CLINICAL = r"(?:(?:BRIEF |PERTINENT |RELEVANT )?(?:CLINICAL|PATIENT|MEDICAL|PROVIDED) )?"
_EXAM = r"(?:EXAM|EXAMS|EXAMINATION|EXAMINATIONS|STUDY|STUDIES|TEST|PROCEDURE|FILM|FILMS|RADIOGRAPH|RADIOGRAPHS)"
_FINDINGS_NAME = "FINDINGS?"
_IMPRESSION_NAME = "(?:IMPRESSIONS?|CONCLUSIONS?)"
_INDICATION_NAME = (
    r"(?:HISTORY|HX|HISTORIES|INDICATIONS?|INFORMATION|DATA|CONTEXT|QUESTION|CONDITION"
    rf"|(?:INDICATIONS?|REASONS?) FOR (?:(?:THE|THIS) )?{_EXAM})"
)

#: Names of headers, in capitals and without punctuation.
_NAMES = {
    "findings": rf"(?:(?:CHEST|RADIOGRAPHIC|IMAGING) )?{_FINDINGS_NAME}(?: CHEST)?"
    rf"|{_FINDINGS_NAME}{_AND}{_IMPRESSION_NAME}|{_IMPRESSION_NAME}{_AND}{_FINDINGS_NAME}|REPORT|OBSERVATIONS?",
    "impression": rf"(?:FINAL )?{_IMPRESSION_NAME}(?: AND RECOMMENDATIONS?)?|SUMMARY|ASSESSMENT|OPINION",
    # Words such as "INFORMATION:" are too general without "CLINICAL".
    "indication": rf"(?!(?:INFORMATION|DATA|CONTEXT|QUESTION|CONDITION)$){_CLINICAL}{_INDICATION_NAME}"
    rf"(?: AND {_CLINICAL}{_INDICATION_NAME})*|REASON|UNDERLYING MEDICAL CONDITION",
    "comparison": rf"COMPARISONS?(?: {_EXAM}| MADE| DATE)?|(?:PRIOR|PREVIOUS) {_EXAM}",
    _OTHER: rf"(?:TYPE OF )?{_EXAM}(?: (?:TYPE|PERFORMED|DESCRIPTION|TITLE))?|TECHNIQUES?|TECHNICAL FACTORS|METHODS?"
    rf"|VIEWS?|NUMBER OF VIEWS|CONTRAST|DATE|DATE OF {_EXAM}|{_EXAM} DATE|TECHNIQUE AND {_EXAM}|{_EXAM} AND TECHNIQUE",
    _CLOSING: r"NOTIFICATIONS?|RECOMMENDATIONS?|RECOMMENDATIONS? AND NOTIFICATIONS?|COMMUNICATIONS?|CRITICAL RESULTS?",
}
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in _NAMES.items()}
#: Names that begin a section within a line.
_MIDLINE_NAME = re.compile(
    rf"{_FINDINGS_NAME}(?:{_AND}{_IMPRESSION_NAME})?|{_IMPRESSION_NAME}|(?:CLINICAL )?(?:INDICATIONS?|HISTORY)"
    r"|TECHNIQUE|REASON FOR (?:THIS )?(?:EXAM|EXAMINATION|STUDY)|COMPARISONS?|NOTIFICATIONS?|RECOMMENDATIONS?"
)
#: Names of an impression that are accepted after the end of the report (unlike "SUMMARY:").
_STRICT_IMPRESSION = re.compile(rf"(?:FINAL )?{_IMPRESSION_NAME}(?: AND RECOMMENDATIONS?)?")
#: Words of names that are recognised if they are misspelt.
_SPELT = (
    *("FINDINGS", "IMPRESSION", "IMPRESSIONS", "CONCLUSION", "CONCLUSIONS", "INDICATION", "INDICATIONS", "HISTORY"),
    *("COMPARISON", "COMPARISONS", "TECHNIQUE", "RECOMMENDATION", "RECOMMENDATIONS"),
)

#: Words of a line that names views: it has at least one of the first set, and only words of the second.
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
#: A label that begins with one of these belongs to the findings.
_ORGANS = _word_set(
    "LUNG LUNGS HEART CARDIAC CARDIOMEDIASTINAL CARDIOMEDIASTINUM MEDIASTINUM MEDIASTINAL PLEURA PLEURAL BONES BONE "
    "OSSEOUS SKELETAL DIAPHRAGM HILA HILAR AIRWAYS PULMONARY VASCULATURE LINES TUBES DEVICES SUPPORT"
)

_LINE_END = re.compile(r"\r\n|\r|\n")
_RULE = re.compile(r"_{10,}|[-=*]{5,}")
#: Elements of HTML that break a line, and those that do not.
_HTML_BREAK = re.compile(
    r"</?(?:br|p|div|li|ul|ol|tr|table|tbody|h[1-6]|hr|body|html|head)\b[^<>]{0,200}>", re.IGNORECASE
)
_HTML = re.compile(r"</?(?:b|strong|i|em|u|span|font|td|th|pre|sup|sub|small)\b[^<>]{0,200}>", re.IGNORECASE)
#: Emphasis of Markdown, but not rules or placeholders such as "___".
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,3}|_{1,2})(?=[^\W_])([^*_\n]{1,90}?)(?<=[\w:.)!?])\1(?![\w*])")
_STRAY_BOLD = re.compile(r"(?<![\w*])\*\*(?=[^\W_])(?!\w+\[)|(?<=[\w.:!?)])\*\*(?![\w*])")
_FINAL_REPORT = re.compile(r"\W*FINAL REPORT\W*", re.IGNORECASE)
_ASIDE_NAME = (
    r"(?:FINAL )?ADDENDUM|(?:WET|PRELIMINARY|PRELIM|INTERIM|PROVISIONAL) (?:READ|READING|REPORT)"
    r"|PROVISIONAL FINDINGS IMPRESSION|PFI REPORT"
)
#: In capitals at the beginning of any line; in lower case only with a colon or on a line of its own.
_ASIDE_START = re.compile(rf"[\W_]*(?:(?:{_ASIDE_NAME})\b|(?i:{_ASIDE_NAME})(?: (?:#|VERSION).*)?\s*(?::|$))")
#: Gaps between words of a line, which are shortened to two spaces for the patterns below.
_GAP = re.compile(r"\t\s*|\s{2,}")
#: Where a header may begin within a line: after the end of a sentence, a gap or a separator.
_MIDLINE = re.compile(r"(?:(?<=[.?!_;|)\]])\s+(?:[/|]\s+)?|\s{2,}|\s[/|]\s)(?=[A-Z/]|(?:findings|impression)\s*:)")
#: The same after any word, except those that make the name a part of the sentence ("see FINDINGS:").
_UNPUNCTUATED = re.compile(r"(?<=\w)\s+(?=(?:FINDINGS|Findings|IMPRESSION|Impression|CONCLUSION|Conclusion)\s*:)")
_GOES_ON = re.compile(
    r"(?:\b(?:a|above|an|and|below|chest|clinical|final|for|from|in|initial|my|of|on|or|other|our|per|preliminary|previous"
    r"|prior|radiographic|see|the|their|this|to|under|with))$",
    re.IGNORECASE,
)
#: A colon that is not part of a time or a ratio.
_COLON = re.compile(r"[:：](?!(?<=\d:)\d)")
_DASH = re.compile(r"\s*[-–—]{1,3}(?:\s+|$)")
#: A header in capitals without a colon, followed by the beginning of a sentence.
_BARE_HEADER = re.compile(
    r"(FINDINGS|IMPRESSION|CONCLUSION|(?:CLINICAL )?(?:INDICATION|HISTORY)|COMPARISON|TECHNIQUE)"
    r"\s+(?=[A-Z][a-z]|A\s[a-z]|\d{1,2}[.)]\s)"
)
#: Bullets, numbers or letters before a header.
_BULLET = re.compile(r"[*#>•–—-]+\s*|\(?(?:\d{1,2}|[A-Z]|[IVX]{1,4})[.)]\s+")
#: The number of the next header, as in "Clear. 2. IMPRESSION:".
_ITEM_NUMBER = re.compile(r"(?:(?<=[.?!;])\s+|^)\(?(?:\d{1,2}|[A-Z]|[IVX]{2,4})[.)]\s+$")
_PARENTHESIS = re.compile(r"\([^()]*\)")
_LONGEST_NAME = 90


@dataclass
class _Passage:
    """Text of one kind, in paragraphs."""

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
    #: The beginning of the section's text.
    text: str
    #: Whether it also begins a section after the end of a report.
    reopens: bool = False


def parse_sections(text: str) -> ReportSections:
    """Split a report into sections by the rules of this module.

    Args:
        text: the report with its line breaks.
    """
    passages = _passages(text)
    found = {kind: _joined(passages, kind) for kind in TEXTS}
    if not found["findings"]:
        found["findings"] = _joined([p for p in passages if _content_words(p.text())], _VIEWS)
    labelled = bool(found["findings"])
    if not labelled:
        unlabelled = _cut_unlabelled(passages)
        # Joined again, because the text was removed from its section.
        found = {**{kind: _joined(passages, kind) for kind in found}, "findings": unlabelled}
    return ReportSections(**found, findings_labelled=labelled)


def _joined(passages: list[_Passage], kind: str) -> str:
    return " ".join(text for passage in passages if passage.kind == kind and (text := passage.text()))


def _passages(text: str) -> list[_Passage]:
    lines = [part.strip() for line in _plain_lines(text) for part in _split_midline(_GAP.sub("  ", line))]
    last_final = max((place for place, line in enumerate(lines) if _FINAL_REPORT.fullmatch(line)), default=-1)
    passages = [_Passage(_TITLE)]
    after_break, has_read, has_ended, trailing = True, False, False, None
    for place, line in enumerate(lines):
        current = passages[-1]
        if not line or _RULE.fullmatch(line):
            current.end_paragraph()
            if line and current.kind == _ASIDE:
                passages.append(_Passage(_TITLE))
            after_break = True
            continue
        header = _header(line, after_break)
        trailer = current.kind != _ASIDE and _is_trailer(line, after_break, current.kind)
        after_break = line.endswith((".", "?", "!"))
        if _FINAL_REPORT.fullmatch(line):
            passages.append(_Passage(_TITLE))
        elif _ASIDE_START.match(line):
            passages.append(_Passage(_ASIDE))
        elif current.kind == _ASIDE and (header is None or has_read or place < last_final):
            continue
        elif trailer:
            has_ended = has_read
            if current is trailing and not any(current.paragraphs[1:]):
                passages.pop()  # the line above is a trailer as well
            # In a report without headers, such a line at the beginning precedes the text.
            closes = has_read or (not is_metadata(line) and _unlabelled(passages) is not None)
            trailing = _Passage(_CLOSING if closes else _LABEL)
            trailing.add(line)
            passages.append(trailing)
        elif header is None or not _opens(header, current, has_ended):
            current.add(line)
        else:
            has_ended = False
            passages.append(_Passage(header.kind))
            passages[-1].add(header.text)
        has_read = has_read or passages[-1].kind in ("findings", "impression", _VIEWS)
    return passages


def _plain_lines(text: str) -> list[str]:
    """The lines of a text without HTML and Markdown."""
    text = text.lstrip("\ufeff")
    if "<" in text:
        text = _HTML.sub("", _HTML_BREAK.sub("\n", text))
    if "&" in text:
        text = html.unescape(text)
    if "*" in text or "_" in text:
        text = _STRAY_BOLD.sub("", _EMPHASIS.sub(r"\2", text))
    return _LINE_END.split(text)


def _split_midline(line: str) -> Iterator[str]:
    """The parts of a line: it is divided before each header and trailer within it."""
    begin = 0
    places = {match.end() for match in _MIDLINE.finditer(line)}
    places = {place for place in places if _opens_midline(line[place : place + _LONGEST_NAME])}
    gaps = (match.span() for match in _UNPUNCTUATED.finditer(line))
    places |= {end for start, end in gaps if not _GOES_ON.search(line[max(0, start - 20) : start])}
    for place in sorted(places):
        before = line[begin:place]
        if not _ITEM_NUMBER.fullmatch(before):
            yield _ITEM_NUMBER.sub("", before).rstrip(" /|;")
            begin = place
    yield line[begin:]


def _opens_midline(text: str) -> bool:
    if is_trailer(text):
        return True
    colon, dash = _COLON.search(text), _DASH.search(text)
    ends = [mark.start() for mark in (colon, dash) if mark]
    return bool(ends) and _MIDLINE_NAME.fullmatch(_phrase(_words(text[: min(ends)]))) is not None


def _is_trailer(line: str, after_break: bool, kind: str) -> bool:
    if is_trailer(line, after_break):
        return True
    return after_break and kind in ("findings", "impression", _VIEWS) and is_signature_line(line)


def _opens(header: _Header, current: _Passage, has_ended: bool) -> bool:
    """Whether a header begins a passage here: findings and impression are only ended by names of sections."""
    if has_ended:
        return header.reopens
    if header.kind == _TITLE and current.kind != _TITLE and not any(current.paragraphs):
        return False  # "EXAMINATION:", and the name on the next line
    return header.kind in _NAMES or current.kind not in ("findings", "impression", _VIEWS)


def _header(line: str, after_break: bool) -> _Header | None:
    """The header at the beginning of a line; `after_break`: the previous line is blank or ends a sentence."""
    bullet = _BULLET.match(line)
    if bullet is None or not (line[bullet.end() : bullet.end() + 1].isupper() or line[0] in "*#"):
        return _plain_header(line, after_break)
    found = _plain_header(line[bullet.end() :].lstrip("*# "), after_break)
    # "1. LUNGS: clear" is a list item.
    return found if found is None or line[0] in "*#" or found.kind in _NAMES else None


def _plain_header(line: str, after_break: bool) -> _Header | None:
    bare = _BARE_HEADER.match(line) if after_break else None
    colon = _COLON.search(line, 0, _LONGEST_NAME)
    if bare:
        name, rest = bare[1], line[bare.end() :]
    elif colon:
        name, rest = line[: colon.start()], line[colon.end() :].strip()
    else:
        name, rest = line, ""
    if not colon and not bare and (dash := _DASH.search(line, 0, _LONGEST_NAME)):
        before = line[: dash.start()]
        if before[:1].isupper() and (after_break or before.upper() == before) and _kind(_words(before)) is not None:
            name, rest, colon = before, line[dash.end() :].strip(), dash
    words = _words(name)
    if not words or len(words) > 15 or not (after_break or name[0].isupper()):
        return None
    phrase, in_capitals = " ".join(words), name.upper() == name
    # Without a colon, it must not be the end of a sentence.
    alone = name[0].isupper() and not name.endswith((".", ",", ";", "?", "!"))
    if colon or alone:
        kind = _kind(words) or (_kind(_words(_PARENTHESIS.sub(" ", name))) if colon else None)
        if kind is not None:
            strict = kind != "impression" or _STRICT_IMPRESSION.fullmatch(_phrase(words)) is not None
            reopens = strict and kind in TEXTS
            return _Header(kind, rest, reopens)
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
    # Other labels in capitals, such as "ORDERING PHYSICIAN:".
    return _Header(_LABEL, rest) if in_capitals and sum(map(str.isalpha, phrase)) > 2 else None


def _kind(words: list[str]) -> str | None:
    """The kind of section with this name."""
    phrase = _phrase(words)
    return next((kind for kind, pattern in _PATTERNS.items() if pattern.fullmatch(phrase)), None)


def _phrase(words: list[str]) -> str:
    return " ".join(map(_spelt, words)) if len(words) <= 5 else " ".join(words)


@lru_cache(4096)
def _spelt(word: str) -> str:
    """The word with its spelling corrected to a word of `_SPELT`, or unchanged."""
    if word in _SPELT or len(word) < 6 or not word.isalpha():
        return word
    for known in _SPELT:
        most = 2 if min(len(word), len(known)) >= 9 and word[:2] == known[:2] else 1
        if abs(len(word) - len(known)) <= most and _edits(word, known) <= most:
            return known
    return word


def _edits(word: str, other: str) -> int:
    """Optimal string alignment distance: letters to insert, delete, substitute or swap with the next one."""
    before, row = [], list(range(len(other) + 1))
    for place, letter in enumerate(word, 1):
        last, before, row = before, row, [place]
        for column, other_letter in enumerate(other, 1):
            least = min(before[column] + 1, row[-1] + 1, before[column - 1] + (letter != other_letter))
            if place > 1 and column > 1 and letter == other[column - 2] and word[place - 2] == other_letter:
                least = min(least, last[column - 2] + 1)
            row.append(least)
    return row[-1]


def _words(name: str) -> list[str]:
    name = re.sub(r"\(S\)", "S", name.upper())
    name = re.sub(r"[&/+]", " AND ", name)
    return re.findall(r"[^\W_]+", re.sub(r"\bX-?RAY", "XRAY", name))


def _content_words(text: str) -> int:
    """The number of words that do not name views, without placeholders and numbers."""
    return sum(word.isalpha() and word not in _VIEW_WORDS for word in _words(text))


def _cut_unlabelled(passages: list[_Passage]) -> str:
    """Remove the unlabelled findings from their passage and return them."""
    found = _unlabelled(passages)
    if found is None:
        return ""
    passage, first = found
    text = passage.text(first)
    del passage.paragraphs[first:]
    return text


def _unlabelled(passages: list[_Passage]) -> tuple[_Passage, int] | None:
    """The passage with the unlabelled findings, and the index of their first paragraph."""
    kinds = [passage.kind for passage in passages]
    end = kinds.index("impression") if "impression" in kinds else len(passages)
    for passage in reversed(passages[:end]):
        if passage.kind in (_ASIDE, _CLOSING, "findings", _VIEWS) or not passage.text():
            continue
        first = 0 if passage.kind == _TITLE else 1
        while first < len(passage.paragraphs) and not _content_words(passage.text(first, first + 1)):
            first += 1
        if _content_words(passage.text(first)) >= 2:
            return passage, first
        if passage.kind != _LABEL:
            return None
    return None


def text_without_trailer(text: str) -> str:
    """The text of a report without headers, up to its trailer, with single spaces."""
    passages = _passages(text)
    return " ".join(text for passage in passages if passage.kind == _TITLE and (text := passage.text()))
