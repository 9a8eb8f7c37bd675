"""Read one sentence for the labeler `rules`: its clauses, and which mentions are negated, doubted or described.

Long because a sentence is read in one pass: the ends of clauses and the scopes of cues depend on each other.
"""

from __future__ import annotations

from ..findings_otdrg import FINDINGS, NEGATIVE, POSITIVE, UNCLEAR, UNMENTIONED
from .phrases import CUE_ROLES, WORD_KINDS

_OPACITY = FINDINGS.index("lung_opacity")
_DEVICES = FINDINGS.index("support_devices")
_DESCRIPTORS = {"normal": NEGATIVE, "abnormal": POSITIVE, "stable": UNCLEAR}
#: "Scarring or (something else)" is uncertain if "or" follows within this many words.
_NEAR = 3
#: Most words between "in the" and the mention in that place.
_PLACE_WORDS = 2
#: Most words of a label ("pleural effusion:").
_LABEL_WORDS = 8
#: Limits of the search before and after a word, which only sentences without punctuation reach.
_AHEAD_ITEMS, _AHEAD_SEGMENTS, _ANSWER_WORDS, _CLAUSE_MENTIONS = 80, 25, 12, 100


_VERB, _EXISTENCE, _NEUTRAL, _GENERAL, _STATEMENT, _RESTART, _NO, _DOUBT, _ELSEWHERE, _VIEW, _PART = (
    1 << place for place in range(len(WORD_KINDS))
)
#: After "not", the findings that follow are present ("not clear of opacities").
_CLEAR = {"clear", "free", "devoid", "cleared", "negative"}
#: Between "in the" and a finding: the finding is not in that place.
_PASSING = {"to", "of", "for", "that", "suggest", "suggesting", "representing"}
#: Placeholder for a word that was removed from a report.
_REMOVED = "xxxx"
#: Words and marks that may end a segment.
_LIST_WORDS = {"and", "or", "nor"}
_STOPS = {",", ";", ":", "(", ")", "?", "-", *_LIST_WORDS}
_FORWARD = {
    "negation_before",
    "ended",
    "not",
    "uncertainty_before",
    "interpretation_before",
    "uncertainty_before_negation",
    "unassessed_before",
}
_BACKWARD = {"negation_after", "resolved", "uncertainty_after", "uncertainty_either", "unassessed", "poorly_seen"}
_ENDS_SEGMENT = {"boundary", "adjunct", "cause", "affirmed"}


def bit(row: int, state: int) -> int:
    """The bit of a (row, state); the states found in a sentence are one int, and those of a report its bitwise or."""
    return 1 << 3 * row + state - 1


class Meaning:
    """The meaning of a phrase: its mentions as (role, row), its cues in the order they apply, the state of a descriptor
    (0 for other phrases), and whether the phrase makes a report readable."""

    __slots__ = ("cues", "mentions", "readable", "state")

    def __init__(self, parts: set[tuple[str, int]]):
        not_meant = {row for role, row in parts if role == "not_meant"}
        self.mentions = tuple(sorted(part for part in parts if part[1] >= 0 and part[1] not in not_meant))
        roles = {role for role, row in parts if row < 0}
        self.state = next((state for role, state in _DESCRIPTORS.items() if role in roles), 0)
        self.cues = tuple(role for role in CUE_ROLES if role in roles - {*_DESCRIPTORS, "chest_words", "no_cue"})
        self.readable = bool(self.mentions or not_meant or self.state or "chest_words" in roles)


class _Mention:
    """A mention of a finding and the cues that apply to it; `end` is the word after it.

    `aside`: it is in an adjunct ("after placement of the tube"), to which later cues do not apply.
    """

    __slots__ = ("aside", "denied", "doubted", "end", "row", "undeniable")

    def __init__(self, row: int, denied: bool, doubted: bool, undeniable: bool, end: int, aside: bool):
        self.row, self.denied, self.doubted, self.undeniable = row, denied, doubted, undeniable
        self.end, self.aside = end, aside

    def state(self) -> int:
        if self.undeniable:
            return UNCLEAR
        return NEGATIVE if self.denied else UNCLEAR if self.doubted else POSITIVE


class _Segment:
    """The words between a comma or "and" and the next one: a clause, a noun phrase, or neither."""

    __slots__ = (
        "after",
        "backward",
        "clause",
        "forward",
        "merged",
        "noun",
        "predicate",
        "restart",
        "shared",
        "specific",
        "statement",
        "stop",
    )

    def __init__(self):
        self.clause = self.shared = self.forward = self.backward = self.predicate = self.noun = False
        self.restart = self.specific = self.statement = False
        self.merged = ""  # the list word inside: "pleural or pericardial effusion"
        self.stop = ""  # the mark or word that ends it, "" at the end of the clause
        self.after = 0  # the item after it


class Sentence:
    """Reads one sentence from left to right. Its state: mentions, cues in scope, structures without a description.

    A sentence is divided into clauses, which limit the scope of cues, and clauses are divided by commas and "and" into
    segments. At each comma and "and" the next segment decides whether the clause ends.

    Args:
        words, kinds: words and marks, and the kinds of each in clauses.yaml, as bits.
        items: (first word, word after, meaning or None) of the phrases and of the words between them.
    """

    def __init__(self, words: list[str], kinds: list[int], items: list[tuple[int, int, Meaning | None]]):
        self.words, self.kinds, self.items = words, kinds, items
        self.found = 0
        self.clause: list[_Mention] = []  # since the last boundary
        self.group = 0  # the first of these in the last noun phrase that is not joined by "or" or "and"
        self.labels: list[_Mention] = []  # mentions before a colon
        self.structures: list[tuple[int, int]] = []  # (word, row)
        self.descriptors: list[tuple[int, int]] = []  # (word, state)
        self.settled = UNMENTIONED  # the last state given to structures
        self.saved: list[tuple[bool, bool, bool]] = []  # cues in scope before a bracket
        self.before_adjunct: tuple[bool, bool, bool, bool] | None = None  # the same, and `verb`
        self.place_start = self.after_place = self.after_normal = -1  # the word after the last such cue
        self.clause_start = 0
        self.cue_end = -1  # the word after the last forward cue
        self.label_end = 0  # the word after the colon
        self.denied_label = False
        self.open_clause(0)

    def open_clause(self, word: int) -> None:
        self.clause, self.group, self.clause_start = [], 0, word
        self.denied = self.doubted = self.undeniable = self.interpreted = self.comma = self.alternative = False
        self.verb = self.listed = self.distributes = self.known = self.object = self.unassessed_ahead = False
        self.before_adjunct = None
        self.one_of_them = True  # whether "or" expresses uncertainty: not in "no change in the edema or effusion"

    # descriptions of structures

    def settle_structures(self) -> None:
        """Give each structure the first description after it, or else the last before it; others wait."""
        if not self.structures or not self.descriptors:
            return
        said = {state for _, state in self.descriptors}
        # "normal and stable" is normal, and so is the second structure in "normal heart, stable mediastinum"
        normal = said == {NEGATIVE, UNCLEAR} or (said == {UNCLEAR} and self.settled == NEGATIVE)
        for word, row in self.structures:
            after = next((state for place, state in self.descriptors if place >= word), self.descriptors[-1][1])
            self.settled = NEGATIVE if normal else after
            self.found |= bit(row, self.settled)
        self.structures, self.descriptors = [], []

    def describe(self, state: int, start: int, end: int) -> None:
        if self.comma:
            self.settle_structures()
        if state == NEGATIVE:
            self.after_normal = end
        if self.denied and state == POSITIVE:
            state = NEGATIVE
        elif self.doubted:
            state = UNCLEAR
        self.descriptors.append((start, state))

    # ends of clauses

    def end_mentions(self) -> None:
        for mention in self.clause:
            self.found |= bit(mention.row, mention.state())
        self.clause, self.group = [], 0

    def end_clause(self, word: int) -> None:
        self.end_mentions()
        self.settle_structures()
        self.open_clause(word)

    def end_label(self) -> None:
        for mention in self.labels:
            mention.denied |= self.denied_label and mention.row != _DEVICES
            self.found |= bit(mention.row, mention.state())
        self.labels, self.denied_label = [], False

    def close(self) -> int:
        """The states found. A structure without a description has the state of the previous one, or else positive."""
        denied = self.denied
        self.end_clause(len(self.words))
        self.end_label()
        for _, row in self.structures:
            self.found |= bit(row, NEGATIVE if denied else self.settled or POSITIVE)
        return self.found

    def segment(self, first: int) -> _Segment:
        """The segment from item `first` to the next comma, list word or end of the clause."""
        seen = _Segment()
        structure = False
        last = min(len(self.items), first + _AHEAD_ITEMS)
        seen.after = last
        for item in range(first, last):
            start, end, meaning = self.items[item]
            word = self.words[start]
            if word in _STOPS and (meaning is None or word in _LIST_WORDS):
                if word in _LIST_WORDS and not (seen.noun or seen.forward or seen.backward or seen.clause):
                    seen.merged = seen.merged or word
                    continue
                seen.stop, seen.after = word, item
                break
            if meaning is not None:
                if not _ENDS_SEGMENT.isdisjoint(meaning.cues):
                    seen.after = item
                    break
                seen.forward |= not _FORWARD.isdisjoint(meaning.cues)
                seen.backward |= not _BACKWARD.isdisjoint(meaning.cues)
                seen.predicate |= seen.backward and not seen.noun
            for place in range(start, end):
                kind = self.kinds[place]
                if kind & _VERB and not seen.clause:
                    seen.clause, seen.shared = True, self.existential(place)
                if not seen.noun:
                    seen.statement |= bool(kind & _STATEMENT)
                    if meaning is None or not meaning.mentions:
                        seen.specific |= not kind & (_NEUTRAL | _GENERAL | _VERB | _EXISTENCE)
                        seen.restart |= bool(kind & _RESTART)
            if meaning is not None and meaning.mentions:
                seen.noun = True
                structure |= meaning.mentions[0][0] == "structures"
            elif meaning is not None and meaning.state and structure:
                seen.clause = True  # "heart enlarged"
        return seen

    def existential(self, verb: int) -> bool:
        """Whether the verb at a word only expresses presence ("is clearly seen")."""
        for kind in self.kinds[verb + 1 : verb + 1 + _ANSWER_WORDS]:
            if kind & _EXISTENCE or not kind & _NEUTRAL:
                return bool(kind & _EXISTENCE)
        return False

    def list_word(self, item: int) -> str:
        """The list word at item `item`, or ""."""
        if item >= len(self.items):
            return ""
        word = self.words[self.items[item][0]]
        return word if word in _LIST_WORDS or word == "and/or" else ""

    def separate(self, item: int) -> None:
        """At item `item`, a comma or "and": end the clause, or continue the list or the clause."""
        mark = self.words[self.items[item][0]]
        word = self.list_word(item if mark != "," else item + 1)
        first = item + 1 if mark == "," and not word else item + (2 if mark == "," else 1)
        ahead = self.segment(first)
        if self.distributes:
            return
        start = self.items[item][1]
        open_cue = self.denied or self.doubted or self.undeniable or self.interpreted or self.before_adjunct is not None
        if word in ("or", "nor"):
            self.resume()
            self.listed = True
            return
        verb = self.verb if self.before_adjunct is None else self.before_adjunct[3]
        if ahead.clause and not ahead.predicate and (verb or (open_cue and not ahead.shared)):
            self.end_clause(start)
            return
        if ahead.noun and (ahead.forward or (ahead.backward and open_cue)):
            self.end_clause(start)
            return
        if not ahead.noun:
            if mark == ",":
                self.resume()
            return
        closed = word or ahead.merged or self.closing(ahead, open_cue)
        if not open_cue:
            if not closed:
                self.group = len(self.clause)
            return
        if word and not self.object:  # "no left and right effusion"
            return
        denied = self.denied or (self.before_adjunct is not None and self.before_adjunct[0])
        if not denied or self.known:
            specific = ahead.restart or (ahead.specific and not closed)
            ends = (ahead.restart and not self.known) if word else specific
        elif closed == "or" and not word:
            ends = ahead.restart and not self.listed and "or" in (ahead.stop, ahead.merged)
        elif ahead.specific:
            ends = True
        elif word:
            ends = ahead.statement and not self.clause
        else:
            ends = ahead.statement and not closed and not self.listed and not ahead.stop
        if ends and self.before_adjunct is not None and word:
            return  # "after placement of a tube and a catheter"
        if ends:
            self.end_clause(start)
        elif mark == ",":
            self.resume()
            self.listed = True

    def closing(self, ahead: _Segment, open_cue: bool) -> str:
        """The list word that joins the segment to a later one, or ""."""
        for _ in range(_AHEAD_SEGMENTS):
            if not ahead.noun or ahead.clause or ahead.forward or ahead.backward:
                return ""
            if ahead.stop != ",":
                word = ahead.stop if ahead.stop in _LIST_WORDS else ""
                following = ahead.after + 1
            else:
                word = self.list_word(ahead.after + 1)
                following = ahead.after + (2 if word else 1)
            if not word and ahead.stop != ",":
                return ""
            ahead = self.segment(following)
            if word:
                new_clause = ahead.clause and not ahead.shared
                other = ahead.forward or ahead.backward or (word == "and" and (ahead.specific or new_clause))
                return "" if open_cue and other else word
        return ""

    def resume(self) -> None:
        """After an adjunct, restore the cues in scope before it."""
        if self.before_adjunct is not None:
            self.denied, self.doubted, self.undeniable, self.verb = self.before_adjunct
            self.before_adjunct = None

    def mark(self, item: int) -> None:
        """A mark or "and" that is not part of a phrase."""
        start, end, _ = self.items[item]
        mark = self.words[start]
        if mark == "," or mark in _LIST_WORDS:
            previous = self.words[start - 1] if start else ""
            if mark == "," or previous != ",":
                self.separate(item)
            self.comma = mark == "," or (self.comma and previous == ",")
            return
        self.comma = False
        if mark == ";":
            self.end_clause(end)
            self.end_label()
        elif mark == ":":
            self.colon(start, end)
        elif mark == "?":
            self.question(start)
        elif mark == "(":
            self.saved.append((self.denied, self.doubted, self.undeniable))
        elif mark == ")" and self.saved:
            self.denied, self.doubted, self.undeniable = self.saved.pop()
        elif self.labels and start == self.label_end and end == len(self.words):
            self.deny_before()  # "effusion: -"
        elif not self.answers(end):
            self.end_clause(end)

    def colon(self, start: int, end: int) -> None:
        if start and end < len(self.words) and self.words[start - 1].isdigit() and self.words[end].isdigit():
            return  # a time, a ratio
        open_cue = self.denied or self.doubted or self.undeniable
        if open_cue and not self.clause:
            self.distributes = True  # "no evidence of: effusion, edema"
        elif open_cue or self.verb or not self.clause or start - self.clause_start > _LABEL_WORDS:
            self.end_clause(end)
        else:
            self.end_label()
            self.labels, self.label_end = self.clause, end
            self.settle_structures()
            self.open_clause(end)

    def question(self, start: int) -> None:
        last = start + 1 == len(self.words) or self.words[start + 1] in _STOPS
        if last:
            self.doubt_before()
        else:
            self.doubted = True

    # cues

    def answers(self, start: int) -> int:
        """`_NO` or `_DOUBT` if only "none", "possible" or similar words precede the next mark, else 0."""
        answer = 0
        allowed = _EXISTENCE | _NEUTRAL if self.labels else _EXISTENCE
        for place in range(start, min(len(self.words), start + _ANSWER_WORDS)):
            word, kind = self.words[place], self.kinds[place]
            if word in _STOPS:
                break
            if kind & (_NO | _DOUBT):
                answer = answer or kind & (_NO | _DOUBT)
                if self.labels and answer == _DOUBT:
                    allowed |= _RESTART  # "possible small"
            elif not kind & allowed or word == _REMOVED:
                return 0
        return answer

    def before(self) -> list[_Mention]:
        """The mentions to which a backward cue applies; the label if the clause has none."""
        mentions = [mention for mention in self.clause if not mention.aside]
        in_group = [mention for mention in self.clause[self.group :] if not mention.aside]
        return in_group or mentions or self.labels

    def deny_before(self) -> None:
        for mention in self.before():
            mention.denied = True

    def doubt_before(self) -> None:
        for mention in self.before():
            mention.doubted = True
        if self.descriptors:
            self.descriptors[-1] = (self.descriptors[-1][0], UNCLEAR)
        elif self.structures:
            self.descriptors.append((self.structures[-1][0], UNCLEAR))

    def answer(self, kind: int) -> None:
        if kind == _NO:
            self.deny_before()
        else:
            self.doubt_before()

    def cue(self, role: str, item: int) -> None:
        start, end, _ = self.items[item]
        if role in _FORWARD:
            self.forward_cue(role, end)
        elif role in _BACKWARD:
            if not self.elsewhere(end, _ELSEWHERE if role == "negation_after" else _ELSEWHERE | _VIEW):
                self.backward_cue(role, item)
        elif role == "negation_beside":
            if self.clause and self.clause[-1].end == start:
                self.clause[-1].denied = True
        elif role == "change":
            self.denied = self.denied and not self.known  # "resolution of the effusion and improvement of the edema"
        elif role == "alternative" and self.one_of_them:
            self.alternative = True
            if self.clause and start - self.clause[-1].end <= _NEAR:
                self.clause[-1].doubted = True
        elif role == "place":
            self.place_start, self.after_place = start, end
        elif role in ("adjunct", "cause"):
            if start == self.cue_end:
                return  # "possibly due to edema"
            if self.before_adjunct is None:
                self.before_adjunct = (self.denied, self.doubted, self.undeniable, self.verb)
            self.denied = False
            if role == "adjunct":
                self.doubted = self.undeniable = self.interpreted = False
        elif role in ("affirmed", "boundary"):
            self.end_clause(end)
            if role == "boundary":
                self.settled = UNMENTIONED

    def forward_cue(self, role: str, end: int) -> None:
        """A cue that applies to the mentions after it."""
        self.before_adjunct, self.cue_end, self.object = None, end, False
        if role in ("negation_before", "not", "ended"):
            self.denied = True
            self.known |= role == "ended"
        elif role == "interpretation_before":
            self.interpreted = True
        elif role == "uncertainty_before_negation":
            self.undeniable = True
        else:
            self.doubted = True
            self.unassessed_ahead |= role == "unassessed_before"

    def backward_cue(self, role: str, item: int) -> None:
        """A cue that applies to the mentions before it, or if there are none, possibly to those after it."""
        start, end, _ = self.items[item]
        if role == "negation_after":
            self.deny_before()
            self.end_clause(end)
        elif role == "resolved":
            if self.before() and not (self.clause and self.denied):
                self.deny_before()
            elif not self.before():
                self.denied = True
        elif role == "uncertainty_after":
            self.doubt_before()
            self.end_clause(end)
        elif role == "uncertainty_either":
            if (self.before() or self.structures) and not self.segment(item + 1).noun:
                self.doubt_before()
            else:
                self.doubted = True
        elif role == "unassessed":
            self.unassessed(start)
        else:
            self.descriptors.append((start, UNCLEAR))

    def elsewhere(self, start: int, where: int) -> bool:
        """Whether "on the prior" or similar words begin at word `start`, with a word of the kinds `where`."""
        return any(kind & where for kind in self.kinds[start + 1 : start + 3]) and self.words[start] in ("on", "in")

    def unassessed(self, start: int) -> None:
        parts = any(kind & _PART for kind in self.kinds[max(self.clause_start, start - _ANSWER_WORDS) : start])
        for mention in self.before():
            mention.doubted |= not (parts and mention.row == _DEVICES)
        self.descriptors.append((start, UNCLEAR))

    def denies_only(self, item: int) -> int:
        """The item after a change ("no improvement of") or, for "not", a description ("not normal", "not clear of") to
        which the negation at item `item` is limited; 0 if there is none."""
        is_not = "not" in self.items[item][2].cues
        for after in range(item + 1, len(self.items)):
            start, end, meaning = self.items[after]
            if meaning is not None and (
                not {"change", "ended"}.isdisjoint(meaning.cues)
                or (is_not and ("changed" in meaning.cues or meaning.state == NEGATIVE or self.words[start] in _CLEAR))
            ):
                self.descriptors.append((start, POSITIVE if meaning.state == NEGATIVE else UNCLEAR))
                return after + 1
            if not all(kind & (_NEUTRAL | _GENERAL) for kind in self.kinds[start:end]):
                return 0
        return 0

    def mention(self, meanings: tuple[tuple[str, int], ...], start: int, end: int) -> None:
        placed = 0 <= start - self.after_place <= _PLACE_WORDS and not any(
            word in _STOPS or word in _PASSING for word in self.words[max(self.after_place, 0) : start]
        )
        if self.labels and "," not in self.words[self.label_end : start]:
            rows = {row for _, row in meanings}
            self.labels = [label for label in self.labels if label.row not in rows]
        for role, row in meanings:
            if role == "structures":
                if self.after_place == start or self.unassessed_ahead:
                    continue
                if self.comma:
                    self.settle_structures()
                self.structures.append((start, row))
                continue
            denied = self.denied or self.after_normal == start
            if placed and self.denied and self.place_start > self.cue_end:
                denied = False
            doubted = self.doubted or (self.interpreted and row != _OPACITY) or self.alternative or role == "doubtful"
            aside = self.before_adjunct is not None or (placed and bool(self.clause))
            self.object = True
            if len(self.clause) >= _CLAUSE_MENTIONS:
                self.end_mentions()
            self.clause.append(_Mention(row, denied, doubted, self.undeniable, end, aside))
        if any(role != "structures" for role, _ in meanings):
            self.alternative = False

    def read(self) -> int:
        item = 0
        while item < len(self.items):
            start, end, meaning = self.items[item]
            answer = self.kinds[start] & (_NO | _DOUBT) and self.before() and self.answers(start)
            if answer:
                self.answer(answer)
                while item < len(self.items) and self.words[self.items[item][0]] not in _STOPS:
                    item += 1
                continue
            if self.labels and start == self.label_end and self.kinds[start] & (_NO | _DOUBT):
                ahead = self.segment(item + 1)
                if ahead.noun and ahead.stop == ":":  # "effusion: no edema: yes"
                    self.answer(self.kinds[start] & (_NO | _DOUBT))
                    self.end_label()
                    item += 1
                    continue
            if meaning is None:
                if self.words[start] in _STOPS or self.words[start].startswith("-"):
                    self.mark(item)
                elif self.kinds[start] & _VERB:
                    self.verb = True
                elif self.kinds[start] & _GENERAL:
                    self.object = True
                if self.words[start] != "," and self.words[start] not in _LIST_WORDS:
                    self.comma = False
                item += 1
                continue
            verb = self.verb or any(kind & _VERB for kind in self.kinds[start:end])
            if "negation_before" in meaning.cues or "not" in meaning.cues:
                after = self.denies_only(item)
                if after:
                    self.one_of_them = False
                    item, self.comma, self.verb = after, False, verb
                    continue
                if self.labels and start == self.label_end:
                    self.denied_label = True
            if self.words[start] in ("or", "nor"):
                self.separate(item)
            for role in meaning.cues:
                self.cue(role, item)
            self.verb = verb or (self.verb and "boundary" not in meaning.cues)
            if meaning.state:
                self.describe(meaning.state, start, end)
            if meaning.mentions:
                self.mention(meaning.mentions, start, end)
            self.comma = False
            item += 1
        return self.close()
