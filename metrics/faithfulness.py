"""Does a report say what the model was told: the states it was written from, against those a labeler reads in it.

Only states that are mentioned count, positive, negative and unclear: of most findings a model is told that they are
unmentioned, and one that leaves everything out would be right about these. No Finding, which follows from the others,
does not count.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from ..findings_otdrg import FINDING_STATES, FINDINGS, NEGATIVE, POSITIVE, UNCLEAR, UNMENTIONED
from ..labelers import load_labeler
from ..labelers.as_typed import label_quietly

#: How a report can disagree with what the model was told: told in one state and said in another, both mentioned; told,
#: and unmentioned in the report; told to be unmentioned, and said.
KINDS = ("contradicted", "omitted", "added")
MENTIONED = (POSITIVE, NEGATIVE, UNCLEAR)
#: Times a finding must have been told in a state for the two to count in the macro average.
FLOOR = 10

_NO_FINDING = FINDINGS.index("no_finding")
_SUPPORT_DEVICES = FINDINGS.index("support_devices")


class Cell(NamedTuple):
    """A finding in a state: how often the model was told it, and how often the report then says the same."""

    told: int
    followed: int


@dataclass(frozen=True)
class Faithfulness:
    """What [`faithfulness`] found.

    Args:
        macro: mean over findings x states, told at least `floor` times, of the share that the reports say as told; None
            where there is none.
        micro: the share of all that was told, however rare; None where nothing was.
        counted: how many findings x states the macro average is of.
        floor: the least times.
        cells: by finding and state.
        contradicted: told in one state and said in another, both mentioned.
        omitted: told, and unmentioned in the report.
        added: told to be unmentioned, and said.
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
    """A finding of which a study's report says another state than the model was told; all are names but `study`."""

    study: int
    finding: str
    told: str
    said: str

    @property
    def kind(self) -> str:
        """Which of `KINDS` it is."""
        unmentioned = FINDING_STATES[UNMENTIONED]
        return "added" if self.told == unmentioned else "omitted" if self.said == unmentioned else "contradicted"


def faithfulness(
    told: np.ndarray, said: np.ndarray, floor: int = FLOOR, within: np.ndarray | None = None
) -> Faithfulness:
    """How far reports say what a model was told.

    Args:
        told: (N, 14) state ids the reports were written from.
        said: (N, 14) state ids a labeler reads in them.
        floor: how often a finding must have been told in a state to count in the macro average.
        within: (N, 14), true where a finding is asked about; everywhere without it.

    Raises:
        ValueError: arrays of other or different shapes, states other than 0 to 3, or a floor below 1.
    """
    told, said = _checked(told, said)
    if floor < 1:
        raise ValueError(f"floor is {floor}: expected at least 1")
    asked = np.ones(told.shape, bool) if within is None else np.asarray(within, bool).copy()
    if asked.shape != told.shape:
        raise ValueError(f"within has shape {asked.shape}: expected {told.shape}, as the states")
    asked[:, _NO_FINDING] = False
    cells = {
        name: {
            FINDING_STATES[state]: Cell(int(rows.sum()), int((rows & (said[:, place] == state)).sum()))
            for state in MENTIONED
            for rows in [asked[:, place] & (told[:, place] == state)]
        }
        for place, name in enumerate(FINDINGS)
        if place != _NO_FINDING
    }
    every = [cell for states in cells.values() for cell in states.values()]
    shares = [cell.followed / cell.told for cell in every if cell.told >= floor]
    total = sum(cell.told for cell in every)
    mentioned = asked & (told != UNMENTIONED)
    return Faithfulness(
        macro=float(np.mean(shares)) if shares else None,
        micro=sum(cell.followed for cell in every) / total if total else None,
        counted=len(shares),
        floor=floor,
        cells=cells,
        contradicted=int((mentioned & (said != UNMENTIONED) & (said != told)).sum()),
        omitted=int((mentioned & (said == UNMENTIONED)).sum()),
        added=int((asked & (told == UNMENTIONED) & (said != UNMENTIONED)).sum()),
    )


def contradictions(
    told: np.ndarray, said: np.ndarray, within: np.ndarray | None = None, kinds: Collection[str] = KINDS[:1]
) -> Iterator[Contradiction]:
    """Where a report says another state than the model was told, study by study, findings in their order.

    Args:
        told, said, within: as of [`faithfulness`].
        kinds: which of `KINDS`; both mentioned without it.

    Raises:
        ValueError: as [`faithfulness`].
    """
    told, said = _checked(told, said)
    apart = told != said
    apart[:, _NO_FINDING] = False
    if within is not None:
        apart &= within
    for study, place in np.argwhere(apart):
        names = (FINDING_STATES[states[study, place]] for states in (told, said))
        contradiction = Contradiction(int(study), FINDINGS[place], *names)
        if contradiction.kind in kinds:
            yield contradiction


def self_check(reports: Sequence[str], told: np.ndarray) -> list[list[dict[str, str]]]:
    """Every disagreement of reports with the states they were written from, as the labeler `rules` reads them.

    Args:
        reports: N texts.
        told: (N, 14) state ids the model was told.

    Returns:
        For each report a list, in the order of `FINDINGS` and without No Finding, of `{"finding", "told", "said",
        "kind"}`, all of them names; the kinds are `KINDS`. A report that the labeler cannot read omits all it was told.

    Raises:
        ValueError: states of another shape, or other than 0 to 3.
    """
    found: list[list[dict[str, str]]] = [[] for _ in reports]
    for one in contradictions(told, label_quietly(_labeler(), list(reports)), kinds=KINDS):
        found[one.study].append({"finding": one.finding, "told": one.told, "said": one.said, "kind": one.kind})
    return found


@cache
def _labeler():
    """The one of all self-checks, which remembers the sentences it has read."""
    return load_labeler("rules")


def flip_states(states: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """States with one finding of each study turned from positive to negative or from negative to positive.

    The finding is drawn among those of the 13 that are positive or negative; a study without one stays as it is. Where
    a finding, support devices apart, becomes positive, No Finding becomes unmentioned.

    Args:
        states: (N, 14) state ids.
        seed: of the draws.

    Returns:
        The states (N, 14), and where they were flipped (N, 14): true once a study at most.

    Raises:
        ValueError: another shape, or states other than 0 to 3.
    """
    states, _ = _checked(states, states)
    flipped, where = states.copy(), np.zeros(states.shape, bool)
    rng = np.random.default_rng(seed)
    for row, study in enumerate(states):
        places = np.flatnonzero(np.isin(study[:_NO_FINDING], (POSITIVE, NEGATIVE)))
        if not len(places):
            continue
        place = rng.choice(places)
        where[row, place] = True
        flipped[row, place] = NEGATIVE if study[place] == POSITIVE else POSITIVE
        if flipped[row, place] == POSITIVE and place != _SUPPORT_DEVICES:
            flipped[row, _NO_FINDING] = UNMENTIONED
    return flipped, where


def _checked(told: np.ndarray, said: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    told, said = np.asarray(told), np.asarray(said)
    if told.ndim != 2 or told.shape[1] != len(FINDINGS) or told.shape != said.shape:
        raise ValueError(f"states told have shape {told.shape}, said {said.shape}: expected (N, {len(FINDINGS)}) both")
    for name, states in (("told", told), ("said", said)):
        if not np.isin(states, range(len(FINDING_STATES))).all():
            raise ValueError(f"states {name}: expected ids 0 to 3 ({', '.join(FINDING_STATES)})")
    return told, said


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
