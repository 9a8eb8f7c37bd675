"""Steerability and faithfulness of an evaluated model: do its reports say the states they were written from?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..metrics.faithfulness import FLOOR, Contradiction, Faithfulness, contradictions, faithfulness
from .evaluate import Evaluation

#: From which states reports are written, and how that is named.
CONDITIONS: dict[str, str] = {
    "predicted": "states the model predicted",
    "true_states": "true states given",
    "flipped": "true states, one finding of each study flipped: that one",
}


@dataclass(frozen=True)
class SteeredReports:
    """What reports say that were written from the same kind of states.

    Args:
        studies: how many are asked about.
        model: of the model's reports.
        constant: of one report for every study, the constant.
        contradicted: where the model's reports contradict what it was told.
    """

    studies: int
    model: Faithfulness
    constant: Faithfulness
    contradicted: list[Contradiction]


@dataclass(frozen=True)
class Steering:
    """What [`measure_steering`] found.

    Args:
        conditions: by their keys in `CONDITIONS`, as far as the evaluation has them.
        constant: the report that says most of training's states; a report that is always the same can follow one state
            a finding, and no more.
    """

    conditions: dict[str, SteeredReports]
    constant: str

    def scores(self) -> dict[str, Any]:
        """All of it but the contradictions, ready for JSON."""
        conditions = {
            name: {
                "studies": found.studies,
                "model": _plain(found.model),
                "constant": _plain(found.constant),
            }
            for name, found in self.conditions.items()
        }
        return {"constant": self.constant, "conditions": conditions}


def measure_steering(
    evaluation: Evaluation, training_states: Sequence[Sequence[int]] | np.ndarray, floor: int = FLOOR
) -> Steering:
    """Faithfulness to predicted states and, of an evaluation that has them, to given and flipped ones.

    Args:
        evaluation: with constants.
        training_states: (M, 14) of the training studies, on which the constant is chosen among the evaluation's.
        floor: see [`faithfulness`].
    """
    training_states = np.asarray(training_states)
    constant = max(
        {row.reports[0]: row for row in evaluation.constants.values()}.values(),
        key=lambda row: _followed(training_states, row.finding_states[0], floor),
    )
    conditions = {}
    for name, (row, told, within) in evaluation.steered.items():
        conditions[name] = SteeredReports(
            studies=len(told) if within is None else int(within.any(axis=1).sum()),
            model=faithfulness(told, row.finding_states, floor, within),
            constant=faithfulness(told, constant.finding_states, floor, within),
            contradicted=list(contradictions(told, row.finding_states, within)),
        )
    return Steering(conditions, constant.reports[0])


def _followed(told: np.ndarray, said: np.ndarray, floor: int) -> tuple[float, float]:
    """How well one report for all follows: by the macro average and, where that is of nothing or equal, the micro."""
    found = faithfulness(told, np.tile(said, (len(told), 1)), floor)
    return found.macro or 0.0, found.micro or 0.0


def _plain(found: Faithfulness) -> dict[str, Any]:
    cells = {
        finding: {state: cell._asdict() for state, cell in states.items()} for finding, states in found.cells.items()
    }
    return {**asdict(found), "cells": cells}


__all__ = ["CONDITIONS", "SteeredReports", "Steering", "measure_steering"]
