"""Split a report into sentences (full stops, lists, tick boxes) and normalise their spelling."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

#: A full stop, except between digits and after an abbreviation; a question mark belongs to its sentence.
_SENTENCE_END = re.compile(r"(?<!\bvs)(?<!\bdr)(?:(?<![0-9])[.!]+|[.!]+(?![0-9]))|(?<=\w\?)(?=\s)")
_ABBREVIATION = re.compile(r"\b([ei])\.\s?([eg])\.", re.IGNORECASE)
#: Words that are abbreviated by a full stop. A sentence can end with those in the second pattern, so it needs a text in
#: upper and lower case, in which the next word is in lower case.
_SHORTENED = re.compile(r"\b(sig|evid|approx|poss|prob)\.(?=\s)", re.IGNORECASE)
_SHORTENED_IN_SENTENCE = re.compile(r"\b((?i:rt|lt|bilat|mod|mult|lat))\.(?=\s+[a-z])")
#: The beginning of a list item: a bullet, a number, or a letter in brackets.
_BULLET = re.compile(r"(?:[-*+•·‣▪●○◦>]+\s+|[•·‣▪●○◦*-](?=\w)|\(?(?:[0-9]{1,2}|[a-z])\)\s*|[0-9]{1,2}[.:]\s+)", re.I)
#: Beginnings of list items within a line; numbers are if the list begins with 1, or after the end of a sentence.
_FIRST_NUMBER = re.compile(r"(?:^|\s)\(?1\)\s")
_INLINE_BULLET = re.compile(r"(?:^|\s)(?:[•·‣▪●○◦]\s*|\*\s+|\(?[0-9]{1,2}\)\s+)")
_INLINE_BULLET_NO_LIST = re.compile(r"(?:^|\s)(?:[•·‣▪●○◦]\s*|\*\s+)|(?:^|(?<=[.;:!?])\s+)\(?[0-9]{1,2}\)\s+")
_BOX = re.compile(r"\[\s*([x✓✔]?)\s*\]|\(\s*([x✓✔])\s*\)|\(\s+\)|[☐□]|([☑☒✓✔✗✘])", re.I)
#: Options of a label that are ignored if they are not ticked.
_ANSWERS = {"yes", "no", "y", "n", "present", "absent", "none", "unknown", "positive", "negative", "normal", "abnormal"}
#: A line that ends with one of these continues in the next line.
_UNFINISHED = re.compile(
    r"(?:,|\b(?:a|an|and|any|are|as|at|by|for|from|has|have|in|is|no|not|nor|of|on|or|the|this|to|was|were|with|without))$",
    re.I,
)
#: Shorter lines are list items, whatever the width of the text.
_NARROWEST_TEXT = 36

_TYPOGRAPHIC = str.maketrans(
    {**dict.fromkeys("’‘ʼ´", "'"), **dict.fromkeys("“”„", " "), **dict.fromkeys("‐‑−", "-"), "—": " - "}
)
_UNSPACED_DASH = re.compile(r"(?<=\w)–(?=\w)")
_WORD_FORM = re.compile(r"\*?[a-z]+\*?")
_WORDS_KEPT = 100_000
_NON = re.compile(r"\bnon(?: - |[- ])(?=[a-z])")


def split_sentences(report: str) -> list[str]:
    """Split a report into sentences in lower case; list items and tick boxes are separate sentences.

    A line break ends a sentence before a bullet, a blank line, or a line that would have fitted on the previous one;
    otherwise the text is wrapped. A line that ends with a colon is prepended to each item below it.
    """
    if not report.isascii():
        report = unicodedata.normalize("NFKC", report.translate(_TYPOGRAPHIC))
        report = _UNSPACED_DASH.sub("-", report).replace("–", "-")
    if "." in report:
        report = _SHORTENED.sub(r"\1", report)
        if report != report.lower():
            report = _SHORTENED_IN_SENTENCE.sub(r"\1", report)
    sentences = []
    for line in _items(report) if "\n" in report or "\r" in report else (report,):
        if _BOX.search(line):
            sentences += _ticked(line.lower())
            continue
        line = _ABBREVIATION.sub(r"\1\2", line.lower())
        bullet = _INLINE_BULLET if _FIRST_NUMBER.search(line) else _INLINE_BULLET_NO_LIST
        for item in bullet.split(line) if bullet.search(line) else (line,):
            sentences += _SENTENCE_END.split(item)
    return sentences


def _items(report: str) -> list[str]:
    """The lines of a report, with wrapped lines joined and the head of a list prepended to its items."""
    lines = [line.strip() for line in report.splitlines()]
    width = max(_NARROWEST_TEXT, *map(len, lines))
    items: list[str] = []
    head = last = ""
    below = False  # whether the last item is below the head
    for line in lines:
        bullet = _BULLET.match(line)
        text = line[bullet.end() :] if bullet else line
        if text:
            begins_anew = text[:1].isupper() and text[1:2].islower()
            wrapped = len(last) + 1 + len(text.split(None, 1)[0]) > width and not begins_anew
            if not bullet and last and not last.endswith(":") and (wrapped or _UNFINISHED.search(last)):
                items[-1] = f"{items[-1]} {text}"
            elif head and (bullet or not below):
                items[-1 if not below else len(items) :] = [f"{head} {text}"]
                below = True
            else:
                items.append(text)
                head = ""
            if text.endswith(":"):
                head, below = items[-1], False
        last = line
    return items


def _ticked(line: str) -> list[str]:
    """The options of a line with tick boxes as statements; text before the first box is their label."""
    parts: list[str] = []
    ticks: list[bool] = []
    place = 0
    for box in _BOX.finditer(line):
        parts.append(line[place : box.start()].strip(" ,;|"))
        ticks.append(bool(box[1] or box[2] or box[3]))
        place = box.end()
    parts.append(line[place:].strip(" ,;|."))
    label, options = parts[0].rstrip(" :-"), parts[1:]
    if label and not parts[-1]:  # "effusion [x]": the box follows its option
        label, options = "", parts[:-1]
    said = []
    for option, ticked in zip(options, ticks, strict=True):
        option = option.strip(" :-.")
        if ticked:
            said += _SENTENCE_END.split(f"{label}: {option}" if label else option)
        elif option and not (label and option in _ANSWERS):
            said.append(f"{option}: none")
    return said


class Spelling:
    """Normalises the spelling of a sentence in lower case.

    Args:
        forms: replacement of each form (spelling.yaml). A form that begins or ends with a letter or digit must begin
            or end a word there, unless it has a `*` in that place.
    """

    def __init__(self, forms: Mapping[str, str]):
        # Most forms are within one word; looking up words is faster than searching for the forms.
        self._words = _Forms({form: text for form, text in forms.items() if _WORD_FORM.fullmatch(form)})
        self._signs = _Forms({form: text for form, text in forms.items() if not _WORD_FORM.fullmatch(form)})
        marks = {
            next((mark for mark in form if not (mark.isalnum() or mark == " ")), form) for form in self._signs.texts
        }
        self._has_signs = re.compile("|".join(map(re.escape, marks)) or "$^").search
        self._known: dict[str, str] = {}

    def words(self, sentence: str, pattern: re.Pattern[str]) -> list[str]:
        """The words that `pattern` finds in a sentence, in normalised spelling."""
        if self._has_signs(sentence):
            sentence = self._signs(sentence)
        if "non" in sentence:
            sentence = _NON.sub("non", sentence)
        words = pattern.findall(sentence)
        known = self._known
        changed = False
        for place, word in enumerate(words):
            text = known.get(word)
            if text is None:
                if len(known) >= _WORDS_KEPT:
                    known.clear()
                text = known[word] = self._words(word)
            if text is not word and text != word:
                words[place] = text
                changed |= " " in text
        return " ".join(words).split() if changed else words


class _Forms:
    """Replaces forms in a text, the longest first."""

    def __init__(self, forms: Mapping[str, str]):
        self.texts = {form.strip("*"): text for form, text in forms.items()}
        choices = []
        for form in sorted(forms, key=len, reverse=True):
            bare = form.strip("*")
            before = r"\b" if bare[0].isalnum() and not form.startswith("*") else ""
            after = r"\b" if bare[-1].isalnum() and not form.endswith("*") else ""
            choices.append(f"{before}{re.escape(bare)}{after}")
        self._pattern = re.compile("|".join(choices) or "$^")

    def __call__(self, text: str) -> str:
        return self._pattern.sub(lambda found: self.texts[found[0]], text)
