"""The `rules` labeler: mentions, denial and doubt by vocabulary and clause, sentence by sentence (paper, 3.2.1)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..findings_otdrg import FINDINGS, NEGATIVE, POSITIVE, UNCLEAR, UNMENTIONED
from . import UnreadReportsWarning
from .clauses import Meaning, Sentence, bit
from .phrases import (
    OTHER,
    VOCABULARY,
    WORD_KINDS,
    WORDS,
    Phrases,
    expand_phrase,
    load_mistakes,
    load_spelling,
    load_vocabulary,
    load_words,
)
from .sentences import Spelling, split_sentences

_NO_FINDING = FINDINGS.index("no_finding")
_BARRING = {*range(OTHER + 1)} - {_NO_FINDING, FINDINGS.index("support_devices")}
#: Several mentions of one finding: the first of these states that occurs is the finding's (CheXpert's order).
_PRECEDENCE = (POSITIVE, UNCLEAR, NEGATIVE)
#: So many sentences are remembered, none longer than so many characters: reports repeat theirs a lot.
_REMEMBERED, _LONGEST_REMEMBERED = 100_000, 500
_WORDS_KEPT = 100_000
#: Marks that the phrases of chexpert_mistakes.yaml leave out.
_MARKS = {",", "(", ")", "?", "-"}
_READABLE = bit(OTHER + 1, POSITIVE)
_BARS = sum(bit(row, state) for row in _BARRING for state in (POSITIVE, UNCLEAR))


class RulesLabeler:
    """States of the 14 findings by CheXpert's rules, from a vocabulary a radiologist can read and extend.

    Within a sentence, cues deny or doubt the mentions before or after them up to a clause boundary; structures ("heart
    size") take their state from what is said of them. Over the report positive outweighs unclear, and unclear negative.
    "No Finding" is positive when nothing else is positive or unclear (support devices excepted) and no other
    abnormality is said. Sentences are remembered, so one that repeats is read once.

    Args:
        vocabulary: a folder with the vocabulary files; the package's own by default.
        repeat_mistakes: repeat what chexpert-labeler is known to get wrong (chexpert_mistakes.yaml, which lists it),
            for numbers that must compare with those computed from its labels.
    """

    name = "rules"

    def __init__(self, vocabulary: str | Path = VOCABULARY, repeat_mistakes: bool = False):
        self._phrases = Phrases(load_vocabulary(vocabulary), Meaning)
        self._spelling = Spelling(load_spelling(vocabulary))
        words = load_words(vocabulary)
        self._kinds: dict[str, int] = {}
        self._stems: list[tuple[str, int]] = []
        for place, kind in enumerate(WORD_KINDS):
            for word in words[kind]:
                if word.endswith("*"):
                    self._stems.append((word[:-1], 1 << place))
                else:
                    self._kinds[word] = self._kinds.get(word, 0) | 1 << place
        self._known_kinds: dict[str, int] = {}
        self._mistakes = Phrases(load_mistakes(vocabulary), sorted) if repeat_mistakes else None
        self._sentences: dict[str, int] = {}
        self._rows: dict[int, list[int]] = {}

    def label(self, reports: Sequence[str]) -> np.ndarray:
        """(N, 14) int64 state ids of N reports.

        A report in which not one word is known (empty, another language) has every finding unmentioned, "No Finding"
        too (chexpert-labeler would call it normal); such reports are counted in one warning.

        Raises:
            TypeError: `reports` is a single string.
            ValueError: a report is not a string; the message gives its position.
        """
        if isinstance(reports, str):
            raise TypeError("reports is a single string: expected a list of reports")
        states = np.zeros((len(reports), len(FINDINGS)), dtype=np.int64)
        unread = []
        for position, report in enumerate(reports):
            if not isinstance(report, str):
                raise ValueError(f"report {position} is {type(report).__name__}: expected a string ('' when absent)")
            found = 0
            for sentence in split_sentences(report):
                known = self._sentences.get(sentence)
                found |= self._read(sentence) if known is None else known
            if found:
                states[position] = self._rows.get(found) or self._row(found)
            else:
                unread.append(position)
        if unread:
            warnings.warn(
                f"{len(unread)} of {len(reports)} reports hold no word the rules labeler knows (positions "
                f"{', '.join(map(str, unread[:5]))}{', …' if len(unread) > 5 else ''}): all findings unmentioned",
                UnreadReportsWarning,
                stacklevel=2,
            )
        return states

    def _row(self, found: int) -> list[int]:
        row = [
            next((state for state in _PRECEDENCE if found & bit(finding, state)), UNMENTIONED)
            for finding in range(len(FINDINGS))
        ]
        if not found & _BARS:
            row[_NO_FINDING] = POSITIVE
        if len(self._rows) >= _REMEMBERED:
            self._rows.clear()
        self._rows[found] = row
        return row

    def _read(self, text: str) -> int:
        """What one sentence says, as bits."""
        words = self._spelling.words(text, WORDS)
        items = []
        readable = place = 0
        while place < len(words):
            meaning, after = self._phrases.find(words, place)
            items.append((place, after, meaning))
            if meaning is not None and meaning.readable:
                readable = _READABLE
            place = after
        found = Sentence(words, [self._kind(word) for word in words], items).read() | readable
        if self._mistakes is not None:
            found = self._with_mistakes(found, words)
        if len(text) <= _LONGEST_REMEMBERED:
            if len(self._sentences) >= _REMEMBERED:
                self._sentences.clear()
            self._sentences[text] = found
        return found

    def _kind(self, word: str) -> int:
        """What clauses.yaml says of a word, as bits."""
        kind = self._known_kinds.get(word)
        if kind is None:
            kind = self._kinds.get(word, 0)
            for stem, bit in self._stems:
                if word.startswith(stem):
                    kind |= bit
            if len(self._known_kinds) >= _WORDS_KEPT:
                self._known_kinds.clear()
            self._known_kinds[word] = kind
        return kind

    def _with_mistakes(self, found: int, words: list[str]) -> int:
        words = ["<", *(word for word in words if word not in _MARKS), ">"]
        mistakes = {mistake for place in range(len(words)) for mistake in self._mistakes.find(words, place)[0] or ()}
        for _, row, state in sorted(mistakes):
            found &= ~sum(bit(row, other) for other in _PRECEDENCE)
            if state != UNMENTIONED:
                found |= bit(row, state)
        return found


__all__ = ["RulesLabeler", "expand_phrase", "load_vocabulary"]
