"""Faithfulness: does a report state the findings that the model was conditioned on?

The states a report was conditioned on (`given`) are compared with those a labeler reads in it (`said`). Only mentioned
states count, positive, negative and unclear: most findings are given as unmentioned, and an empty report would agree
with all of these. No Finding does not count, because it follows from the others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from ..findings_otdrg import FINDING_STATES, FINDINGS, NEGATIVE, NO_FINDING, NOT_GIVEN, POSITIVE, UNCLEAR, UNMENTIONED
from ..labelers import load_labeler
from ..labelers.as_typed import label_quietly

#: How a report can disagree: it mentions a finding in another state than the given one; it omits a given finding; it
#: adds a finding that was given as unmentioned.
KINDS = ("contradicted", "omitted", "added")
MENTIONED = (POSITIVE, NEGATIVE, UNCLEAR)
#: A finding counts in the macro average in a state in which it is given at least this often.
FLOOR = 10

_SUPPORT_DEVICES = FINDINGS.index("support_devices")


class Cell(NamedTuple):
    """How often a finding was given in a state, and how often the report then says the same."""

    given: int
    followed: int


@dataclass(frozen=True)
class Faithfulness:
    """What [`faithfulness`] found.

    Args:
        macro: mean, over findings x states given at least `floor` times, of the share that reports state as given; None
            if there is none.
        micro: the share of all given states; None if there is none.
        counted: how many findings x states the macro average is over.
        floor: the least number of times.
        cells: by finding and state.
        contradicted, omitted, added: how often reports disagree, by kind ([`KINDS`]).
    """

    macro: float | None
    micro: float | None
    counted: int
    floor: int
    cells: dict[str, dict[str, Cell]]
    contradicted: int
    omitted: int
    added: int


class Contradiction(NamedTuple):
    """A finding of which a study's report says another state than the given one; states are names."""

    study: int
    finding: str
    given: str
    said: str

    @property
    def kind(self) -> str:
        """Which of `KINDS` it is."""
        unmentioned = FINDING_STATES[UNMENTIONED]
        return "added" if self.given == unmentioned else "omitted" if self.said == unmentioned else "contradicted"


def faithfulness(
    given: np.ndarray, said: np.ndarray, floor: int = FLOOR, within: np.ndarray | None = None
) -> Faithfulness:
    """Measure how far reports state the findings they were conditioned on.

    Args:
        given: (N, 14) state ids the reports were conditioned on; findings that were not given are not measured.
        said: (N, 14) state ids a labeler reads in them.
        floor: how often a finding must be given in a state to count in the macro average.
        within: (N, 14), true for the findings to measure; all by default.

    Raises:
        ValueError: arrays of other or different shapes, states other than 0 to 3, or a floor below 1.
    """
    given, said = _checked(given, said)
    if floor < 1:
        raise ValueError(f"floor is {floor}: expected at least 1")
    measured = np.ones(given.shape, bool) if within is None else np.asarray(within, bool).copy()
    if measured.shape != given.shape:
        raise ValueError(f"within has shape {measured.shape}: expected {given.shape}, as the states")
    measured[:, NO_FINDING] = False
    same = given == said
    cells: dict[str, dict[str, Cell]] = {name: {} for name in FINDINGS[:NO_FINDING]}
    for state in MENTIONED:
        in_state = measured & (given == state)
        counts = zip(in_state.sum(axis=0).tolist(), (in_state & same).sum(axis=0).tolist(), strict=True)
        for name, (times, followed) in zip(FINDINGS, counts, strict=True):
            if name in cells:
                cells[name][FINDING_STATES[state]] = Cell(times, followed)
    every = [cell for states in cells.values() for cell in states.values()]
    shares = [cell.followed / cell.given for cell in every if cell.given >= floor]
    total = sum(cell.given for cell in every)
    apart = [one.kind for one in contradictions(given, said, measured, KINDS)]
    return Faithfulness(
        macro=float(np.mean(shares)) if shares else None,
        micro=sum(cell.followed for cell in every) / total if total else None,
        counted=len(shares),
        floor=floor,
        cells=cells,
        **{kind: apart.count(kind) for kind in KINDS},
    )


def contradictions(
    given: np.ndarray, said: np.ndarray, within: np.ndarray | None = None, kinds: Collection[str] = KINDS[:1]
) -> Iterator[Contradiction]:
    """Where reports say another state than the given one, study by study, findings in their order.

    Args:
        given, said, within: as in [`faithfulness`].
        kinds: which of `KINDS`; by default only "contradicted".

    Raises:
        ValueError: as [`faithfulness`].
    """
    given, said = _checked(given, said)
    apart = (given != said) & (given != NOT_GIVEN)
    apart[:, NO_FINDING] = False
    if within is not None:
        apart &= within
    for study, place in np.argwhere(apart):
        names = (FINDING_STATES[states[study, place]] for states in (given, said))
        contradiction = Contradiction(int(study), FINDINGS[place], *names)
        if contradiction.kind in kinds:
            yield contradiction


def self_check(reports: Sequence[str], given: np.ndarray) -> list[list[dict[str, str]]]:
    """Every disagreement between reports, as the labeler `rules` reads them, and their conditioning states.

    Args:
        reports: N texts.
        given: (N, 14) state ids the model was conditioned on.

    Returns:
        For each report a list, in the order of `FINDINGS` and without No Finding, of `{"finding", "given", "said",
        "kind"}`, where `given` is the state that conditioned the LLM; the kinds are `KINDS`. A report that the labeler
        cannot read omits all given findings.

    Raises:
        ValueError: states of another shape, or other than 0 to 3.
    """
    found: list[list[dict[str, str]]] = [[] for _ in reports]
    for one in contradictions(given, label_quietly(_labeler(), list(reports)), kinds=KINDS):
        found[one.study].append({"finding": one.finding, "given": one.given, "said": one.said, "kind": one.kind})
    return found


@cache
def _labeler():
    """One for all self-checks, because it remembers the sentences it has read."""
    return load_labeler("rules")


def flip_states(states: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """States with one finding of each study turned from positive to negative or from negative to positive.

    The finding is drawn among those of the 13 that are positive or negative; a study without one stays as it is. If a
    finding other than support devices becomes positive, No Finding becomes unmentioned.

    Args:
        states: (N, 14) state ids.
        seed: of the draws.

    Returns:
        The states (N, 14), and where they were flipped (N, 14): true at most once per study.

    Raises:
        ValueError: another shape, or states other than 0 to 3.
    """
    states, _ = _checked(states, states)
    flipped, where = states.copy(), np.zeros(states.shape, bool)
    rng = np.random.default_rng(seed)
    for row, study in enumerate(states):
        places = np.flatnonzero(np.isin(study[:NO_FINDING], (POSITIVE, NEGATIVE)))
        if not len(places):
            continue
        place = rng.choice(places)
        where[row, place] = True
        flipped[row, place] = NEGATIVE if study[place] == POSITIVE else POSITIVE
        if flipped[row, place] == POSITIVE and place != _SUPPORT_DEVICES:
            flipped[row, NO_FINDING] = UNMENTIONED
    return flipped, where


def _checked(given: np.ndarray, said: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    given, said = np.asarray(given), np.asarray(said)
    if given.ndim != 2 or given.shape[1] != len(FINDINGS) or given.shape != said.shape:
        raise ValueError(
            f"given states have shape {given.shape}, said ones {said.shape}: expected (N, {len(FINDINGS)}) both"
        )
    for name, states in (("given", np.where(given == NOT_GIVEN, UNMENTIONED, given)), ("said", said)):
        if not np.isin(states, range(len(FINDING_STATES))).all():
            raise ValueError(f"{name} states: expected ids 0 to 3 ({', '.join(FINDING_STATES)})")
    return given, said


__all__ = [
    "FLOOR",
    "KINDS",
    "Cell",
    "Contradiction",
    "Faithfulness",
    "contradictions",
    "faithfulness",
    "flip_states",
    "self_check",
]
