"""The labeler `rules`: mentions, negation and uncertainty by vocabulary and clause (paper, section 3.2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from ..findings_otdrg import FINDINGS, NEGATIVE, NO_FINDING, POSITIVE, UNCLEAR, UNMENTIONED
from . import check_reports, warn_of_reports
from .clauses import Meaning, Sentence, bit
from .phrases import (
    OTHER,
    VOCABULARY,
    WORD_KINDS,
    WORDS,
    Phrases,
    load_mistakes,
    load_spelling,
    load_vocabulary,
    load_words,
)
from .sentences import Spelling, split_sentences

#: Rows that rule out "No Finding".
_BARRING = {*range(OTHER + 1)} - {NO_FINDING, FINDINGS.index("support_devices")}
#: A finding that is mentioned several times has the first of these states that occurs (CheXpert's order).
_PRECEDENCE = (POSITIVE, UNCLEAR, NEGATIVE)
#: Limits of the cache of sentences, which reports repeat often: its size, and the characters of a sentence.
_REMEMBERED, _LONGEST_REMEMBERED = 100_000, 500
_WORDS_KEPT = 100_000
#: Marks that the phrases of chexpert_mistakes.yaml do not contain.
_MARKS = {",", "(", ")", "?", "-"}
_READABLE = bit(OTHER + 1, POSITIVE)
_BARS = sum(bit(row, state) for row in _BARRING for state in (POSITIVE, UNCLEAR))


@cache
def _own_phrases() -> Phrases:
    """The phrases of the package's vocabulary, which take half a second to read."""
    return Phrases(load_vocabulary(VOCABULARY), Meaning)


class RulesLabeler:
    """Reads finding states by CheXpert's rules, with a vocabulary that a radiologist can read and extend.

    Within a sentence, cues negate or doubt the mentions before or after them up to a clause boundary; structures
    ("heart size") get the state of their description. In a report, positive outweighs unclear, and unclear outweighs
    negative. "No Finding" is positive if nothing but support devices is positive or unclear, and no other abnormality
    is mentioned. Sentences are cached.

    Args:
        vocabulary: folder with the vocabulary files; by default that of the package.
        repeat_mistakes: repeat the known mistakes of chexpert-labeler (listed in chexpert_mistakes.yaml), for numbers
            that must be comparable with those computed from its labels.
    """

    name = "rules"

    def __init__(self, vocabulary: str | Path = VOCABULARY, repeat_mistakes: bool = False):
        own = vocabulary == VOCABULARY
        self._phrases = _own_phrases() if own else Phrases(load_vocabulary(vocabulary), Meaning)
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

        A report without any known word (empty, another language) has all findings unmentioned, including "No Finding"
        (chexpert-labeler calls it normal); such reports are counted in one warning.

        Raises:
            TypeError, ValueError: as [`check_reports`].
        """
        check_reports(reports)
        states = np.zeros((len(reports), len(FINDINGS)), dtype=np.int64)
        unread = []
        for position, report in enumerate(reports):
            found = 0
            for sentence in split_sentences(report):
                known = self._sentences.get(sentence)
                found |= self._read(sentence) if known is None else known
            if found:
                states[position] = self._rows.get(found) or self._row(found)
            else:
                unread.append(position)
        warn_of_reports(unread, len(reports), "hold no word that the labeler knows: all findings unmentioned")
        return states

    def _row(self, found: int) -> list[int]:
        row = [
            next((state for state in _PRECEDENCE if found & bit(finding, state)), UNMENTIONED)
            for finding in range(len(FINDINGS))
        ]
        if not found & _BARS:
            row[NO_FINDING] = POSITIVE
        if len(self._rows) >= _REMEMBERED:
            self._rows.clear()
        self._rows[found] = row
        return row

    def _read(self, text: str) -> int:
        """The states in one sentence, as bits."""
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
        """The kinds of a word in clauses.yaml, as bits."""
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
