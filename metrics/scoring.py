"""All scores of one run of a system, study by study, and what intervals and tests need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .clinical_efficacy.clinical_efficacy import clinical_efficacy_scores
from .nlg.nlg import NLG_METRICS, nlg_scores
from .rad_eval import radeval_scores
from .significance import StudyStatistics, study_statistics


@dataclass(frozen=True)
class ReportScores:
    """What [`score_reports`] found on N studies.

    Args:
        nlg: `{metric: score}`, None for METEOR without Java.
        clinical_efficacy: averages and counts of `clinical_efficacy_scores`; empty without states.
        per_finding: its table by policy and finding; empty without states.
        radeval: `{score: value}` of `radeval_scores`, None for what it could not compute; empty unless asked for.
        per_study: `{score: N values}` of all.
        statistics: for `bootstrap_intervals`, `paired_bootstrap`, `paired_permutation` and `compare_systems`.
        notes: why a score is None.
    """

    nlg: dict[str, float | None]
    clinical_efficacy: dict[str, float | int]
    per_finding: dict[str, dict[str, dict[str, float]]]
    radeval: dict[str, float | None]
    per_study: dict[str, list[float]]
    statistics: StudyStatistics
    notes: dict[str, str]


def score_reports(
    predictions: Sequence[str],
    references: Sequence[str],
    predicted_states: Sequence[Sequence[int]] | np.ndarray | None = None,
    true_states: Sequence[Sequence[int]] | np.ndarray | None = None,
    metrics: Sequence[str] = NLG_METRICS,
    radeval_metrics: Sequence[str] = (),
) -> ReportScores:
    """Fluency of N reports, what is asked for of RadEval's metrics, and clinical efficacy if states are given.

    Args:
        predictions, references: N generated and true reports, cleaned.
        predicted_states, true_states: (N, 14) their states by one labeler.
        metrics: of `nlg_scores`; may be empty when there are states or `radeval_metrics`.
        radeval_metrics: of `RADEVAL_METRICS`.

    Raises:
        ValueError, TypeError, ChildProcessError: as `nlg_scores`, `clinical_efficacy_scores` and `study_statistics`, or
            nothing that was asked for can be computed here.
    """
    nlg = nlg_scores(predictions, references, metrics, return_statistics=True)
    radeval = radeval_scores(predictions, references, radeval_metrics)
    notes = {**nlg.pop("notes"), **radeval.pop("notes")}
    by_study = {
        name: values for scores in (nlg, radeval) for name, values in scores["per_study"].items() if values is not None
    }
    if notes and not by_study and predicted_states is None:
        raise ValueError("; ".join(f"{name}: {note}" for name, note in notes.items()))
    statistics = study_statistics(nlg, predicted_states, true_states, radeval)
    clinical: dict[str, Any] = {"per_finding": {}, "per_study": {}}
    if predicted_states is not None:
        clinical = clinical_efficacy_scores(predicted_states, true_states)
    del nlg["statistics"], nlg["per_study"], radeval["per_study"]
    return ReportScores(
        notes=notes,
        per_study={**by_study, **clinical.pop("per_study")},
        per_finding=clinical.pop("per_finding"),
        nlg=nlg,
        radeval=radeval,
        clinical_efficacy=clinical,
        statistics=statistics,
    )


__all__ = ["ReportScores", "score_reports"]
