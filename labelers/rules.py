"""The `rules` labeler: mentions, denial and doubt by vocabulary and clause, in one regex pass (paper, 3.2.1)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import yaml

from ..findings_otdrg import FINDINGS, NEGATIVE, POSITIVE, UNCLEAR, UNMENTIONED

VOCABULARY = Path(__file__).parent / "vocabulary"

#: How a phrase under each finding is read; the keys of every entry of findings.yaml.
FINDING_ROLES = ("mentions", "doubtful", "structures")
#: The keys of cues.yaml.
CUE_ROLES = (
    "negation_before",
    "negation_after",
    "not_a_negation",
    "uncertainty_before",
    "uncertainty_after",
    "alternative",
    "normal",
    "abnormal",
    "stable",
    "boundary",
    "restart",
)

_OTHER = len(FINDINGS)  # the row of abnormalities outside the 14, which only bar "No Finding"
_NO_FINDING = FINDINGS.index("no_finding")
_SUPPORT_DEVICES = FINDINGS.index("support_devices")
_BARRING = [row for row in range(len(FINDINGS)) if row not in (_NO_FINDING, _SUPPORT_DEVICES)] + [_OTHER]
_DESCRIPTORS = {"normal": NEGATIVE, "abnormal": POSITIVE, "stable": UNCLEAR}
#: Several mentions of one finding: the first of these states that occurs is the finding's (CheXpert's order).
_PRECEDENCE = (POSITIVE, UNCLEAR, NEGATIVE)
_BAD_PHRASE = re.compile(r"[^a-z0-9 '/.()|*-]|\*.")


def expand_phrase(phrase: str) -> list[str]:
    """The plain phrases that a vocabulary phrase stands for: `"(a|b|) c*"` gives `["a c*", "b c*", "c*"]`.

    Raises:
        ValueError: a character the notation does not have, or unbalanced or nested brackets.
    """
    parts = re.split(r"\(([^()]*)\)", phrase)
    if _BAD_PHRASE.search(phrase) or any(set("()|") & set(part) for part in parts[::2]):
        raise ValueError(f"phrase {phrase!r}: expected lower-case words, (a|b) without nesting, and * at the end only")
    choices = [part.split("|") if position % 2 else [part] for position, part in enumerate(parts)]
    return [" ".join("".join(choice).split()) for choice in product(*choices)]


def _read(path: Path) -> object:
    try:
        # every scalar as text: YAML would read the words yes and no as booleans
        return yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): expected a vocabulary file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML in UTF-8: {' '.join(str(error).split())}") from None


def load_vocabulary(folder: str | Path = VOCABULARY) -> dict[str, set[tuple[str, int]]]:
    """Every plain phrase with what it means, as (role, row) pairs; the row is a finding's position, 14 for other
    abnormalities and -1 for cues.

    Args:
        folder: holds findings.yaml, cues.yaml and other_abnormalities.yaml, each of which explains itself.

    Raises:
        ValueError: a missing file, an unknown key or a wrong phrase; the message names the file.
    """
    folder = Path(folder)
    meanings: dict[str, set[tuple[str, int]]] = {}

    def add(path: Path, phrases: object, role: str, row: int) -> None:
        if not isinstance(phrases, list) or not all(isinstance(phrase, str) for phrase in phrases):
            raise ValueError(f"{path}: {role!r} must be a list of phrases")
        for phrase in phrases:
            try:
                plain = expand_phrase(phrase)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            for form in plain:
                meanings.setdefault(form, set()).add((role, row))

    path = folder / "findings.yaml"
    entries = _read(path)
    expected = set(FINDINGS) - {"no_finding"}
    if not isinstance(entries, dict) or set(entries) != expected:
        wrong = sorted(expected ^ set(entries)) if isinstance(entries, dict) else "no mapping"
        raise ValueError(f"{path}: expected the 13 findings as keys (without no_finding); at odds: {wrong}")
    for finding, roles in entries.items():
        if not isinstance(roles, dict) or not set(roles) <= set(FINDING_ROLES):
            raise ValueError(f"{path}: {finding}: expected the keys {', '.join(FINDING_ROLES)}")
        for role, phrases in roles.items():
            add(path, phrases, role, FINDINGS.index(finding))
    path = folder / "cues.yaml"
    entries = _read(path)
    if not isinstance(entries, dict) or set(entries) != set(CUE_ROLES):
        raise ValueError(f"{path}: expected exactly the keys {', '.join(CUE_ROLES)}")
    for role, phrases in entries.items():
        add(path, phrases, role, -1)
    path = folder / "other_abnormalities.yaml"
    add(path, _read(path), "mentions", _OTHER)
    return meanings


def _trie_pattern(phrases: Iterable[str]) -> tuple[str, list[str]]:
    """A regex of all phrases, sharing prefixes so that it is fast, longest first; the n-th empty group marks the n-th
    phrase of the list."""
    trie: dict = {}
    for phrase in sorted(phrases):
        node = trie
        for character in phrase.rstrip("*"):
            node = node.setdefault(character, {})
        node.setdefault("", []).append(phrase)
    order: list[str] = []

    def pattern(node: dict) -> str:
        options = [re.escape(character) + pattern(child) for character, child in node.items() if character]
        for phrase in sorted(node.get("", ())):  # "pneumonia" before "pneumonia*"
            order.append(phrase)
            options.append(r"[a-z-]*()" if phrase.endswith("*") else r"(?![a-z0-9])()")
        return options[0] if len(options) == 1 else f"(?:{'|'.join(options)})"

    return pattern(trie), order


def _split(meanings: set[tuple[str, int]]) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...], int | None]:
    """A phrase's meanings as (mentions, cues, state of a descriptor or None)."""
    mentions = tuple(sorted(meaning for meaning in meanings if meaning[1] >= 0))
    cues = {role for role, row in meanings if row < 0}
    described = [state for role, state in _DESCRIPTORS.items() if role in cues]
    return mentions, tuple(sorted(cues - set(_DESCRIPTORS))), described[0] if described else None


class _Sentence:
    """What is open while a sentence is read: its mentions, the cues that reach on, and the structures to settle.

    A mention is the list [row, doubtful, denied, doubted].
    """

    __slots__ = (
        "alternative",
        "clause",
        "comma",
        "denied",
        "descriptors",
        "doubted",
        "found",
        "position",
        "structures",
    )

    def __init__(self):
        self.found: list[tuple[int, int]] = []  # settled (row, state)
        self.clause: list[list] = []  # mentions since the last boundary
        self.structures: list[tuple[int, int]] = []  # (position, row)
        self.descriptors: list[tuple[int, int]] = []  # (position, state)
        self.denied = self.doubted = self.alternative = self.comma = False
        self.position = 0

    def settle_structures(self) -> None:
        """Each structure takes the first description after it, else the last before it; undescribed ones wait."""
        if not self.structures or not self.descriptors:
            return
        said = {state for _, state in self.descriptors}
        for position, row in self.structures:
            after = [state for place, state in self.descriptors if place >= position]
            # "normal and stable" is normal
            state = NEGATIVE if said == {NEGATIVE, UNCLEAR} else after[0] if after else self.descriptors[-1][1]
            self.found.append((row, state))
        self.structures, self.descriptors = [], []

    def end_clause(self) -> None:
        for row, doubtful, denied, doubted in self.clause:
            self.found.append((row, NEGATIVE if denied else UNCLEAR if doubted or doubtful else POSITIVE))
        self.clause = []
        self.denied = self.doubted = self.alternative = self.comma = False
        self.settle_structures()

    def cue(self, role: str) -> None:
        if role == "negation_before":
            self.denied = True
        elif role == "uncertainty_before":
            self.doubted = True
        elif role == "negation_after":
            for mention in self.clause:
                mention[2] = True
        elif role == "uncertainty_after":
            for mention in self.clause:
                mention[3] = True
        elif role == "alternative":
            self.alternative = bool(self.clause)
        elif role == "boundary" or (role == "restart" and self.comma):
            self.end_clause()

    def describe(self, state: int) -> None:
        if self.comma and self.structures and self.descriptors:
            self.settle_structures()
        if self.denied and state == POSITIVE:
            state = NEGATIVE
        elif self.doubted:
            state = UNCLEAR
        self.descriptors.append((self.position, state))

    def mention(self, meanings: tuple[tuple[str, int], ...]) -> None:
        mentions = []
        for role, row in meanings:
            if role == "structures":
                if self.comma:
                    self.settle_structures()
                self.structures.append((self.position, row))
            else:
                mentions.append([row, role == "doubtful", self.denied, self.doubted])
        if mentions and self.alternative:
            self.alternative = False
            if not self.denied:
                for mention in (self.clause[-1], *mentions):
                    mention[3] = True
        self.clause.extend(mentions)


class RulesLabeler:
    """States of the 14 findings by CheXpert's rules, from a vocabulary a radiologist can read and extend.

    A report is read once, by one compiled regex. Within a sentence, cues deny or doubt the mentions before or after
    them up to a clause boundary; structures ("heart size") take their state from what is said of them. Over the report
    positive outweighs unclear, and unclear negative. "No Finding" is positive when nothing else is positive or unclear
    (support devices excepted) and no other abnormality is said.

    Args:
        vocabulary: a folder with the three vocabulary files; the package's own by default.
    """

    name = "rules"

    def __init__(self, vocabulary: str | Path = VOCABULARY):
        meanings = load_vocabulary(vocabulary)
        pattern, order = _trie_pattern(meanings)
        self._meanings = [None] + [_split(meanings[phrase]) for phrase in order]  # a match's last group is its phrase
        self._sentence_end, self._clause_end, self._comma = (len(order) + n for n in (1, 2, 3))
        self._scan = re.compile(rf"(?<![a-z0-9])(?:{pattern})|([.?!](?![0-9]))|([;:])|(,)")

    def label(self, reports: Sequence[str]) -> np.ndarray:
        """(N, 14) int64 state ids of N reports.

        A report in which not one word is known (empty, another language) has every finding unmentioned, "No Finding"
        too; such reports are counted in one warning.

        Raises:
            TypeError: `reports` is a single string, or one of them is not a string; the message gives its position.
        """
        if isinstance(reports, str):
            raise TypeError("reports is a single string: expected a list of reports")
        states = np.zeros((len(reports), len(FINDINGS)), dtype=np.int64)
        unread = []
        for position, report in enumerate(reports):
            if not isinstance(report, str):
                raise TypeError(f"report {position} is {type(report).__name__}: expected a string ('' when absent)")
            if not self._label_one(report, states[position]):
                unread.append(position)
        if unread:
            warnings.warn(
                f"{len(unread)} of {len(reports)} reports hold no word the rules labeler knows (positions "
                f"{', '.join(map(str, unread[:5]))}{', …' if len(unread) > 5 else ''}): all findings unmentioned",
                stacklevel=2,
            )
        return states

    def _label_one(self, report: str, states: np.ndarray) -> bool:
        """Fills one row; False when no word of the report is known."""
        found: list[tuple[int, int]] = []
        sentence = _Sentence()
        known = False
        for match in self._scan.finditer(" ".join(report.lower().split())):
            group = match.lastindex
            if group == self._comma:
                sentence.comma = True
                continue
            if group == self._sentence_end:
                sentence.end_clause()
                found += sentence.found
                sentence = _Sentence()
                continue
            if group == self._clause_end:
                sentence.end_clause()
                continue
            mentions, cues, described = self._meanings[group]
            sentence.position += 1
            for role in cues:
                sentence.cue(role)
            if described is not None:
                known = True
                sentence.describe(described)
            if mentions:
                known = True
                sentence.mention(mentions)
            sentence.comma = False
        sentence.end_clause()
        found += sentence.found
        if not known:
            return False
        found = set(found)
        for row in range(len(FINDINGS)):
            states[row] = next((state for state in _PRECEDENCE if (row, state) in found), UNMENTIONED)
        if not any((row, state) in found for row in _BARRING for state in (POSITIVE, UNCLEAR)):
            states[_NO_FINDING] = POSITIVE
        return True
