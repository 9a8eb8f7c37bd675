"""Faithfulness of an evaluated model: do its reports state the findings they were conditioned on?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..metrics.faithfulness import FLOOR, Contradiction, Faithfulness, contradictions, faithfulness
from .evaluate import Evaluation

#: The conditioning states, and how tables name them.
CONDITIONS: dict[str, str] = {
    "predicted": "predicted states",
    "true_states": "true states",
    "flipped": "true states with one finding of each study flipped: that one",
}


@dataclass(frozen=True)
class ConditionFaithfulness:
    """Faithfulness to one kind of conditioning states, of `CONDITIONS`.

    Args:
        studies: in how many a finding is measured.
        model: of the model's reports.
        constant: of one constant report for every study.
        contradicted: where the model's reports contradict their conditioning states.
    """

    studies: int
    model: Faithfulness
    constant: Faithfulness
    contradicted: list[Contradiction]


@dataclass(frozen=True)
class ModelFaithfulness:
    """What [`measure_faithfulness`] found.

    Args:
        conditions: by key of `CONDITIONS`, as far as the evaluation has them.
        constant: the constant report that agrees most with training's states. A constant report can follow at most one
            state of each finding.
    """

    conditions: dict[str, ConditionFaithfulness]
    constant: str

    def scores(self) -> dict[str, Any]:
        """All but the single contradictions, ready for JSON."""
        conditions = {
            name: {"studies": found.studies, "model": _plain(found.model), "constant": _plain(found.constant)}
            for name, found in self.conditions.items()
        }
        return {"constant": self.constant, "conditions": conditions}


def measure_faithfulness(
    evaluation: Evaluation, training_states: Sequence[Sequence[int]] | np.ndarray, floor: int = FLOOR
) -> ModelFaithfulness:
    """Measure faithfulness to predicted states and, if the evaluation has them, to true and flipped ones.

    Args:
        evaluation: with constants.
        training_states: (M, 14) of the training studies, on which one of the evaluation's constants is chosen.
        floor: see [`faithfulness`].
    """
    training_states = np.asarray(training_states)

    def agreement(row) -> tuple[float, float]:
        found = faithfulness(training_states, np.tile(row.report_states[0], (len(training_states), 1)), floor)
        return found.macro or 0.0, found.micro or 0.0

    constant = max({row.reports[0]: row for row in evaluation.constants.values()}.values(), key=agreement)
    conditions = {}
    for name, (system, states, flipped) in evaluation.conditioned.items():
        conditions[name] = ConditionFaithfulness(
            studies=len(states) if flipped is None else int(flipped.any(axis=1).sum()),
            model=faithfulness(states, system.report_states, floor, flipped),
            constant=faithfulness(states, constant.report_states, floor, flipped),
            contradicted=list(contradictions(states, system.report_states, flipped)),
        )
    return ModelFaithfulness(conditions, constant.reports[0])


def _plain(found: Faithfulness) -> dict[str, Any]:
    cells = {
        finding: {state: {"given": cell.given, "followed": cell.followed} for state, cell in states.items()}
        for finding, states in found.cells.items()
    }
    return {**asdict(found), "cells": cells}


__all__ = ["CONDITIONS", "ConditionFaithfulness", "ModelFaithfulness", "measure_faithfulness"]
