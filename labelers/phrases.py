"""The vocabulary of the labeler `rules`: its files, its notation, and the search for its phrases in a sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Generic, TypeVar

from ..findings_otdrg import FINDING_STATES, FINDINGS
from ..runtime.yaml_files import read_yaml

VOCABULARY = Path(__file__).parent / "vocabulary"

#: The roles of a phrase of a finding: the keys of each entry of findings.yaml.
FINDING_ROLES = ("mentions", "doubtful", "structures", "not_meant")
#: The keys of cues.yaml, in the order in which the cues of one phrase are applied.
CUE_ROLES = (
    "no_cue",
    "unassessed",
    "poorly_seen",
    "negation_after",
    "negation_beside",
    "uncertainty_after",
    "boundary",
    "affirmed",
    "adjunct",
    "cause",
    "resolved",
    "uncertainty_either",
    "negation_before",
    "ended",
    "not",
    "change",
    "changed",
    "uncertainty_before_negation",
    "uncertainty_before",
    "interpretation_before",
    "unassessed_before",
    "alternative",
    "normal",
    "abnormal",
    "stable",
    "place",
    "chest_words",
)
#: The keys of clauses.yaml.
WORD_KINDS = (
    "verbs",
    "existence",
    "neutral",
    "general",
    "statements",
    "restart",
    "no",
    "doubt",
    "elsewhere",
    "views",
    "parts",
)
#: The keys of comparisons.yaml.
COMPARISON_ROLES = ("changes", "priors", "absent", "wanted", "not_meant")
#: The row of abnormalities outside the 14 findings, which only rule out "No Finding".
OTHER = len(FINDINGS)
#: Words and marks of a sentence; a hyphen is a space, unless it is separated by spaces.
WORDS = re.compile(r"[a-z0-9]+(?:'[a-z]+)*|[,;:/()?]|(?<!\S)-+(?!\S)")

_BAD_PHRASE = re.compile(r"[^a-z0-9 '/:()|*<>-]|\*.")
_PHRASE_WORDS = re.compile(r"[a-z0-9]+(?:'[a-z]+)*|[:/<>]")
_ONE_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)*\*?")
#: Size of the cache of word forms.
_WORDS_KEPT = 100_000

Meaning = TypeVar("Meaning")


def expand_phrase(phrase: str) -> list[str]:
    """Expand the notation of the vocabulary to plain phrases: `"(a|b|) c*"` gives `["a c*", "b c*", "c*"]`.

    Raises:
        ValueError: a character outside the notation, or unbalanced or nested brackets.
    """
    parts = re.split(r"\(([^()]*)\)", phrase)
    if _BAD_PHRASE.search(phrase) or any(set("()|") & set(part) for part in parts[::2]):
        raise ValueError(f"phrase {phrase!r}: expected lower-case words, (a|b) without nesting, and * at the end only")
    choices = [part.split("|") if position % 2 else [part] for position, part in enumerate(parts)]
    plain = [" ".join("".join(choice).split()) for choice in product(*choices)]
    if not all(_PHRASE_WORDS.search(form) for form in plain):
        raise ValueError(f"phrase {phrase!r}: is empty, expected at least one word")
    return plain


def _read(path: Path) -> object:
    try:
        return read_yaml(path, as_text=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): expected a vocabulary file") from None


def _add(meanings: dict[str, set], path: Path, phrases: object, role: str, meaning: tuple | str) -> None:
    if not isinstance(phrases, list) or not all(isinstance(phrase, str) for phrase in phrases):
        raise ValueError(f"{path}: {role!r} must be a list of phrases")
    for phrase in phrases:
        try:
            plain = expand_phrase(phrase)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        for form in plain:
            meanings.setdefault(form, set()).add(meaning)


def load_vocabulary(folder: str | Path = VOCABULARY) -> dict[str, set[tuple[str, int]]]:
    """Read findings.yaml, cues.yaml and other_abnormalities.yaml as `{plain phrase: {(role, row)}}`.

    The row is the position of a finding, 14 for other abnormalities and -1 for cues.

    Raises:
        ValueError: a missing file, an unknown key or a wrong phrase; the message names the file.
    """
    folder = Path(folder)
    meanings: dict[str, set[tuple[str, int]]] = {}
    path = folder / "findings.yaml"
    entries = _read(path)
    expected = set(FINDINGS) - {"no_finding"}
    if not isinstance(entries, dict) or set(entries) != expected:
        wrong = sorted(expected ^ set(entries)) if isinstance(entries, dict) else "no mapping"
        raise ValueError(f"{path}: expected the 13 findings without no_finding as keys; wrong: {wrong}")
    for finding, roles in entries.items():
        if not isinstance(roles, dict) or not set(roles) <= set(FINDING_ROLES):
            raise ValueError(f"{path}: {finding}: expected the keys {', '.join(FINDING_ROLES)}")
        for role, phrases in roles.items():
            _add(meanings, path, phrases, role, (role, FINDINGS.index(finding)))
    path = folder / "cues.yaml"
    entries = _read(path)
    if not isinstance(entries, dict) or set(entries) != set(CUE_ROLES):
        raise ValueError(f"{path}: expected exactly the keys {', '.join(CUE_ROLES)}")
    for role, phrases in entries.items():
        _add(meanings, path, phrases, role, (role, -1))
    path = folder / "other_abnormalities.yaml"
    _add(meanings, path, _read(path), "mentions", ("mentions", OTHER))
    return meanings


def load_words(folder: str | Path = VOCABULARY) -> dict[str, list[str]]:
    """Read the words of clauses.yaml by kind; a word may end with `*`.

    Raises:
        ValueError: a missing file, an unknown key, or more than one word; the message names the file.
    """
    path = Path(folder) / "clauses.yaml"
    entries = _read(path)
    if not isinstance(entries, dict) or set(entries) != set(WORD_KINDS):
        raise ValueError(f"{path}: expected exactly the keys {', '.join(WORD_KINDS)}")
    words: dict[str, list[str]] = {}
    for kind, phrases in entries.items():
        meanings: dict[str, set] = {}
        _add(meanings, path, phrases, kind, ())
        for word in meanings:
            if not _ONE_WORD.fullmatch(word):
                raise ValueError(f"{path}: {kind}: {word!r} is not one word")
        words[kind] = list(meanings)
    return words


def load_spelling(folder: str | Path = VOCABULARY) -> dict[str, str]:
    """Read spelling.yaml: the text that replaces each form.

    Raises:
        ValueError: a missing file, or one that is not a mapping of text to text; the message names the file.
    """
    path = Path(folder) / "spelling.yaml"
    forms = _read(path)
    if not isinstance(forms, dict) or not all(
        isinstance(text, str) and form.strip("*") for form, text in forms.items()
    ):
        raise ValueError(f"{path}: expected a form and its replacement on each line")
    return forms


def load_comparisons(folder: str | Path = VOCABULARY) -> dict[str, set[str]]:
    """Read comparisons.yaml as `{plain phrase: roles}`.

    Raises:
        ValueError: a missing file, an unknown key or a wrong phrase; the message names the file.
    """
    path = Path(folder) / "comparisons.yaml"
    entries = _read(path)
    if not isinstance(entries, dict) or set(entries) != set(COMPARISON_ROLES):
        raise ValueError(f"{path}: expected exactly the keys {', '.join(COMPARISON_ROLES)}")
    meanings: dict[str, set[str]] = {}
    for role, phrases in entries.items():
        _add(meanings, path, phrases, role, role)
    return meanings


def load_mistakes(folder: str | Path = VOCABULARY) -> dict[str, set[tuple[int, int, int]]]:
    """Read chexpert_mistakes.yaml as `{plain phrase: {(place in the file, row, state id)}}`.

    Raises:
        ValueError: a missing file, an unknown key, finding or state, or a wrong phrase; the message names the file.
    """
    path = Path(folder) / "chexpert_mistakes.yaml"
    entries = _read(path)
    rows = {**{name: row for row, name in enumerate(FINDINGS) if name != "no_finding"}, "other_abnormalities": OTHER}
    meanings: dict[str, set[tuple[int, int, int]]] = {}
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of entries")
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict) or set(entry) != {"finding", "state", "why", "phrases"}:
            raise ValueError(f"{path}: entry {place + 1}: expected the keys finding, state, why, phrases")
        if entry["finding"] not in rows or entry["state"] not in FINDING_STATES:
            raise ValueError(
                f"{path}: entry {place + 1}: no finding {entry['finding']!r} or no state {entry['state']!r}"
            )
        meaning = (place, rows[entry["finding"]], FINDING_STATES.index(entry["state"]))
        _add(meanings, path, entry["phrases"], "phrases", meaning)
    return meanings


class Phrases(Generic[Meaning]):
    """A tree of the words of phrases, which finds the longest phrase at a word.

    Args:
        meanings: the parts of the meaning of each plain phrase; phrases that differ only in a `*` share them.
        join: combines the parts to one meaning.
    """

    def __init__(self, meanings: dict[str, set], join: Callable[[set], Meaning]):
        plain: dict[tuple[str, ...], set] = {}
        for phrase, meaning in meanings.items():
            words = _PHRASE_WORDS.findall(phrase)
            if phrase.endswith("*"):
                words[-1] += "*"
            plain.setdefault(tuple(words), set()).update(meaning)
        self._stems = {words[-1][:-1] for words in plain if words[-1].endswith("*")}
        self._shortest_stem = min(map(len, self._stems), default=1)
        self._whole = {word for words in plain for word in words if not word.endswith("*")}
        self._forms: dict[str, tuple[str, ...]] = {}
        self._tree: dict = {}  # maps a word to the next level, and "" to the meaning of the phrase that ends here
        joined: dict[frozenset, Meaning] = {}
        for words, meaning in plain.items():
            node = self._tree
            for word in words:
                node = node.setdefault(word, {})
            # "nodular opacity" also has the meaning of "nodular opaci*"
            last = words[-1].rstrip("*")
            stems = (last[:end] for end in range(1, len(last) + 1) if last[:end] in self._stems)
            parts = frozenset(meaning.union(*(plain.get((*words[:-1], f"{stem}*"), ()) for stem in stems)))
            if parts not in joined:
                joined[parts] = join(parts)
            node[""] = joined[parts]

    def _forms_of(self, word: str) -> tuple[str, ...]:
        """The forms of a word in phrases: the word itself, or a stem with `*`, the longest stem first."""
        ends = range(min(len(word), 40), self._shortest_stem - 1, -1)
        stems = [f"{word[:end]}*" for end in ends if word[:end] in self._stems]
        forms = (word, *stems) if word in self._whole else tuple(stems)
        if len(self._forms) >= _WORDS_KEPT:
            self._forms.clear()
        self._forms[word] = forms
        return forms

    def find(self, words: list[str], start: int) -> tuple[Meaning | None, int]:
        """The meaning of the longest phrase at word `start` (None if there is none) and the position after it."""
        best, end = None, start + 1
        nodes = [self._tree]
        for place in range(start, len(words)):
            forms = self._forms.get(words[place])
            if forms is None:
                forms = self._forms_of(words[place])
            if not forms:
                break
            nodes = [node[form] for node in nodes for form in forms if form in node]
            if not nodes:
                break
            ended = next((node[""] for node in nodes if "" in node), None)
            if ended is not None:
                best, end = ended, place + 1
        return best, end
