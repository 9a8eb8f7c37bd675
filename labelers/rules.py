"""The `rules` labeler: mentions, denial and doubt by vocabulary and clause, sentence by sentence (paper, 3.2.1)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..findings_otdrg import FINDINGS, NEGATIVE, POSITIVE, UNCLEAR, UNMENTIONED
from . import UnreadReportsWarning
from .phrases import OTHER, VOCABULARY, WORDS, Phrases, expand_phrase, load_mistakes, load_vocabulary

_NO_FINDING = FINDINGS.index("no_finding")
_BARRING = {*range(OTHER + 1)} - {_NO_FINDING, FINDINGS.index("support_devices")}
_DESCRIPTORS = {"normal": NEGATIVE, "abnormal": POSITIVE, "stable": UNCLEAR}
#: Several mentions of one finding: the first of these states that occurs is the finding's (CheXpert's order).
_PRECEDENCE = (POSITIVE, UNCLEAR, NEGATIVE)
#: "Scarring or (something else)" is in doubt when "or" follows within so many words.
_NEAR = 3

#: A full stop, unless it stands between digits or after "vs".
_SENTENCE_END = re.compile(r"(?<!\bvs)(?:(?<![0-9])[.?!]+|[.?!]+(?![0-9]))")
#: So many sentences are remembered, none longer than so many characters: reports repeat theirs a lot.
_REMEMBERED, _LONGEST_REMEMBERED = 100_000, 500


def _bit(row: int, state: int) -> int:
    """What is found is one int, a bit for each (row, state), so that the sentences of a report are joined by "or"."""
    return 1 << 3 * row + state - 1


_READABLE = _bit(OTHER + 1, POSITIVE)
_BARS = sum(_bit(row, state) for row in _BARRING for state in (POSITIVE, UNCLEAR))


class _Meaning:
    """What a phrase means: its mentions as (role, row), its cues, the state of a descriptor (0: it is none), and
    whether a report that has it can be read."""

    __slots__ = ("cues", "mentions", "readable", "state")

    def __init__(self, parts: set[tuple[str, int]]):
        not_meant = {row for role, row in parts if role == "not_meant"}
        self.mentions = tuple(sorted(part for part in parts if part[1] >= 0 and part[1] not in not_meant))
        cues = {role for role, row in parts if row < 0}
        self.state = next((state for role, state in _DESCRIPTORS.items() if role in cues), 0)
        self.cues = tuple(sorted(cues - {*_DESCRIPTORS, "chest_words", "no_cue"}))
        self.readable = bool(self.mentions or not_meant or self.state or "chest_words" in cues)


class _Mention:
    """A mention of a finding and what the cues say of it; `end` is the word after it."""

    __slots__ = ("denied", "doubted", "end", "row", "undeniable")

    def __init__(self, row: int, denied: bool, doubted: bool, undeniable: bool, end: int):
        self.row, self.denied, self.doubted, self.undeniable, self.end = row, denied, doubted, undeniable, end

    def state(self) -> int:
        if self.undeniable:
            return UNCLEAR
        return NEGATIVE if self.denied else UNCLEAR if self.doubted else POSITIVE


class _Sentence:
    """What is open while a sentence is read: its mentions, the cues that reach on, and the structures to settle.

    `start` and `end` are the words between which the phrase at hand stands; they are set from outside.
    """

    def __init__(self):
        self.found = 0
        self.clause: list[_Mention] = []  # since the last boundary
        self.structures: list[tuple[int, int]] = []  # (word, row)
        self.descriptors: list[tuple[int, int]] = []  # (word, state)
        self.settled = UNMENTIONED  # the state of the structures settled last
        self.denied = self.doubted = self.undeniable = self.comma = self.alternative = False
        self.start = self.end = 0
        self.after_place = self.after_normal = -1  # the word after the last such cue

    def settle_structures(self) -> None:
        """Each structure takes the first description after it, else the last before it; undescribed ones wait."""
        if not self.structures or not self.descriptors:
            return
        said = {state for _, state in self.descriptors}
        # "normal and stable" is normal, and so is the second in "normal heart, stable mediastinum"
        normal = said == {NEGATIVE, UNCLEAR} or (said == {UNCLEAR} and self.settled == NEGATIVE)
        for word, row in self.structures:
            after = next((state for place, state in self.descriptors if place >= word), self.descriptors[-1][1])
            self.settled = NEGATIVE if normal else after
            self.found |= _bit(row, self.settled)
        self.structures, self.descriptors = [], []

    def end_clause(self) -> None:
        for mention in self.clause:
            self.found |= _bit(mention.row, mention.state())
        self.clause = []
        self.denied = self.doubted = self.undeniable = self.comma = self.alternative = False
        self.settle_structures()

    def close(self) -> int:
        """What was found; a structure of which nothing is said is as the one before it, or else positive."""
        denied = self.denied
        self.end_clause()
        for _, row in self.structures:
            self.found |= _bit(row, NEGATIVE if denied else self.settled or POSITIVE)
        return self.found

    def cue(self, role: str) -> None:
        if role == "negation_before":
            self.denied = True
        elif role == "uncertainty_before":
            self.doubted = True
        elif role == "uncertainty_before_negation":
            self.undeniable = True
        elif role == "negation_after":
            for mention in self.clause:
                mention.denied = True
            self.end_clause()
        elif role == "uncertainty_after":
            for mention in self.clause:
                mention.doubted = True
            self.end_clause()
        elif role == "alternative":
            self.alternative = True
            if self.clause and self.start - self.clause[-1].end <= _NEAR:
                self.clause[-1].doubted = True
        elif role == "place":
            self.after_place = self.end
        elif role == "boundary":
            self.end_clause()
            self.settled = UNMENTIONED
        elif role == "restart" and self.comma:
            self.end_clause()

    def describe(self, state: int) -> None:
        if self.comma:
            self.settle_structures()
        if state == NEGATIVE:
            self.after_normal = self.end
        if self.denied and state == POSITIVE:
            state = NEGATIVE
        elif self.doubted:
            state = UNCLEAR
        self.descriptors.append((self.start, state))

    def mention(self, meanings: tuple[tuple[str, int], ...]) -> None:
        for role, row in meanings:
            if role == "structures":
                if self.after_place == self.start:
                    continue
                if self.comma:
                    self.settle_structures()
                self.structures.append((self.start, row))
            else:
                denied = self.denied or self.after_normal == self.start
                doubted = self.doubted or self.alternative or role == "doubtful"
                self.clause.append(_Mention(row, denied, doubted, self.undeniable, self.end))
        if any(role != "structures" for role, _ in meanings):
            self.alternative = False


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
        self._phrases = Phrases(load_vocabulary(vocabulary), _Meaning)
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
            for sentence in _SENTENCE_END.split(report.lower()):
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
            next((state for state in _PRECEDENCE if found & _bit(finding, state)), UNMENTIONED)
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
        words = WORDS.findall(text)
        sentence = _Sentence()
        readable = 0
        place = 0
        while place < len(words):
            meaning, after = self._phrases.find(words, place)
            if meaning is not None:
                sentence.start, sentence.end = place, after
                for role in meaning.cues:
                    sentence.cue(role)
                if meaning.state:
                    sentence.describe(meaning.state)
                if meaning.mentions:
                    sentence.mention(meaning.mentions)
                if meaning.readable:
                    readable = _READABLE
                sentence.comma = False
            elif words[place] == ",":
                sentence.comma = True
            elif words[place] in ";:":
                sentence.end_clause()
            place = after
        found = sentence.close() | readable
        if self._mistakes is not None:
            found = self._with_mistakes(found, words)
        if len(text) <= _LONGEST_REMEMBERED:
            if len(self._sentences) >= _REMEMBERED:
                self._sentences.clear()
            self._sentences[text] = found
        return found

    def _with_mistakes(self, found: int, words: list[str]) -> int:
        words = ["<", *(word for word in words if word != ","), ">"]
        mistakes = {mistake for place in range(len(words)) for mistake in self._mistakes.find(words, place)[0] or ()}
        for _, row, state in sorted(mistakes):
            found &= ~sum(_bit(row, other) for other in _PRECEDENCE)
            if state != UNMENTIONED:
                found |= _bit(row, state)
        return found


__all__ = ["RulesLabeler", "expand_phrase", "load_vocabulary"]
