"""All scores of one run of a system, study by study, and what intervals and tests need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .fluency import NLG_METRICS
from .metric import MetricResult
from .registry import METRICS, default_metrics, wanted_scores
from .significance import StudyStatistics


@dataclass(frozen=True)
class ReportScores:
    """What [`score_reports`] found on N studies.

    Args:
        results: by metric, its result.
        wanted: by metric, the scores that were asked for.
    """

    results: dict[str, MetricResult]
    wanted: dict[str, tuple[str, ...]]

    @property
    def scores(self) -> dict[str, float | None]:
        """`{score: value}`; None for what cannot be computed here."""
        return {name: self.results[metric].scores[name] for metric, names in self.wanted.items() for name in names}

    @property
    def per_study(self) -> dict[str, list[float]]:
        """`{name: N values}`; without the scores of a metric that were not asked for."""
        return {
            name: values
            for metric, result in self.results.items()
            for name, values in result.per_study.items()
            if name in self.wanted[metric] or name not in METRICS[metric].scores
        }

    @property
    def details(self) -> dict[str, Any]:
        """What the metrics found beside scores: `per_finding`, `findings_with_positives_…`."""
        return {name: value for result in self.results.values() for name, value in result.details.items()}

    @property
    def notes(self) -> dict[str, str]:
        """Why a score is None."""
        return {name: note for result in self.results.values() for name, note in result.notes.items()}

    @property
    def statistics(self) -> StudyStatistics:
        """For `bootstrap_intervals`, `paired_bootstrap`, `paired_permutation` and `compare_systems`."""
        return StudyStatistics(self.results, self.wanted)

    def section(self, name: str) -> dict[str, Any]:
        """The scores of a section of the JSON of `otdrg score`, and the metrics' other numbers."""
        found: dict[str, Any] = {}
        for metric, names in self.wanted.items():
            if METRICS[metric].section == name:
                found |= {score: self.results[metric].scores[score] for score in names}
                found |= {key: value for key, value in self.results[metric].details.items() if key != "per_finding"}
        return found


def score_reports(
    predictions: Sequence[str],
    references: Sequence[str],
    predicted_states: Sequence[Sequence[int]] | np.ndarray | None = None,
    true_states: Sequence[Sequence[int]] | np.ndarray | None = None,
    metrics: Iterable[str] | None = None,
) -> ReportScores:
    """Score N reports.

    Args:
        predictions, references: N generated and true reports, cleaned.
        predicted_states, true_states: (N, 14) their states by one labeler.
        metrics: names of metrics or of scores of the registry; by default all that are computed by default. Metrics
            that read states are computed if and only if states are given.

    Raises:
        ValueError: an unknown metric, N differs, one kind of states without the other, or no score can be computed.
        TypeError, ChildProcessError: as the metrics.
    """
    if (predicted_states is None) != (true_states is None):
        raise ValueError("predicted_states and true_states: one is given without the other, expected both or neither")
    if isinstance(metrics, str):
        raise ValueError(f"metrics are {metrics!r}: expected a list of names")
    names = list(default_metrics() if metrics is None else metrics)
    names += [name for name, metric in METRICS.items() if metric.default and metric.reads == "states"]
    wanted = {
        name: scores
        for name, scores in wanted_scores(names).items()
        if METRICS[name].reads == "reports" or predicted_states is not None
    }
    if not wanted:
        raise ValueError("metrics: none named, and no states given; expected at least one")
    sizes = {"predictions": predictions, "references": references, "states": predicted_states}
    sizes = {name: len(values) for name, values in sizes.items() if values is not None}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"reports and states are of different studies, expected as many of each: {sizes}")
    given = {"reports": (predictions, references), "states": (predicted_states, true_states)}
    results = {name: METRICS[name].compute(*given[METRICS[name].reads]) for name in wanted}
    scored = ReportScores(results, wanted)
    if scored.notes and all(value is None for value in scored.scores.values()):
        raise ValueError("; ".join(f"{name}: {note}" for name, note in scored.notes.items()))
    return scored


def nlg_scores(
    predictions: Sequence[str], references: Sequence[str], metrics: Iterable[str] = NLG_METRICS
) -> dict[str, Any]:
    """[`score_reports`] of texts as one dictionary: a float for each score, `"per_study"` and `"notes"`."""
    found = score_reports(predictions, references, metrics=metrics)
    return {**found.scores, "per_study": found.per_study, "notes": found.notes}


__all__ = ["ReportScores", "nlg_scores", "score_reports"]
