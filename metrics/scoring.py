"""All scores of one run of a system: fluency, clinical efficacy, study by study, and what intervals and tests need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .clinical_efficacy.clinical_efficacy import clinical_efficacy_scores
from .nlg.nlg import NLG_METRICS, nlg_scores
from .significance import StudyStatistics, study_statistics


@dataclass(frozen=True)
class ReportScores:
    """What [`score_reports`] found on N studies.

    Args:
        nlg: `{metric: score}`, None for METEOR without Java.
        clinical_efficacy: averages and counts of `clinical_efficacy_scores`; empty without states.
        per_finding: its table by policy and finding; empty without states.
        per_study: `{score: N values}` of both.
        statistics: for `bootstrap_intervals`, `paired_bootstrap`, `paired_permutation` and `compare_systems`.
        notes: why a score is None.
    """

    nlg: dict[str, float | None]
    clinical_efficacy: dict[str, float | int]
    per_finding: dict[str, dict[str, dict[str, float]]]
    per_study: dict[str, list[float]]
    statistics: StudyStatistics
    notes: dict[str, str]


def score_reports(
    predictions: Sequence[str],
    references: Sequence[str],
    predicted_states: Sequence[Sequence[int]] | np.ndarray | None = None,
    true_states: Sequence[Sequence[int]] | np.ndarray | None = None,
    metrics: Sequence[str] = NLG_METRICS,
) -> ReportScores:
    """Fluency of N reports, and their clinical efficacy if states are given.

    Args:
        predictions, references: N generated and true reports, cleaned.
        predicted_states, true_states: (N, 14) their states by one labeler.
        metrics: of `nlg_scores`; may be empty when there are states.

    Raises:
        ValueError, TypeError, ChildProcessError: as `nlg_scores`, `clinical_efficacy_scores` and `study_statistics`.
    """
    nlg = nlg_scores(predictions, references, metrics, return_statistics=True)
    statistics = study_statistics(nlg, predicted_states, true_states)
    clinical: dict[str, Any] = {"per_finding": {}, "per_study": {}}
    if predicted_states is not None:
        clinical = clinical_efficacy_scores(predicted_states, true_states)
    del nlg["statistics"]
    by_study = {name: values for name, values in nlg.pop("per_study").items() if values is not None}
    return ReportScores(
        notes=nlg.pop("notes"),
        per_study={**by_study, **clinical.pop("per_study")},
        per_finding=clinical.pop("per_finding"),
        nlg=nlg,
        clinical_efficacy=clinical,
        statistics=statistics,
    )


__all__ = ["ReportScores", "score_reports"]
