"""All metrics. A metric is one module with a [`Metric`], and one line in `METRICS`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from . import comparisons, efficacy, fluency, rad_eval
from .metric import Metric, Score

#: By name, in the order of the tables.
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        fluency.BLEU,
        fluency.METEOR,
        fluency.ROUGE_L,
        fluency.CIDER,
        efficacy.CLINICAL_EFFICACY,
        comparisons.COMPARISONS,
        *rad_eval.RADEVAL_METRICS.values(),
    )
}

#: The policy of a clinical score that is named without one: `macro_f1_13` is `macro_f1_13_uncertain_negative`.
_POLICY = "_uncertain_negative"


def register(metric: Metric) -> None:
    """Add a metric for this process: `score_reports`, `evaluate_model`, selection in training and tables then know it.

    Raises:
        ValueError: another metric has its name or one of its scores.
    """
    taken = [*METRICS, *(name for other in METRICS.values() for name in other.scores)]
    for name in (metric.name, *metric.scores):
        if name in taken:
            raise ValueError(f"metric {metric.name!r}: the name {name!r} is taken, expected another")
    METRICS[metric.name] = metric


def _scores() -> dict[str, Score]:
    return {name: score for metric in METRICS.values() for name, score in metric.scores.items()}


def score_names() -> tuple[str, ...]:
    """All names of aggregate scores that can select a checkpoint, short ones included ([`full_score_name`])."""
    full = tuple(_scores())
    return *full, *(name.removesuffix(_POLICY) for name in full if name.endswith(_POLICY))


def full_score_name(name: str) -> str:
    """A score's name; of a clinical score without a policy (`macro_f1_13`), that with unclear states as negative.

    Raises:
        ValueError: there is no such score; the message names the nearest one.
    """
    for full in (name, name + _POLICY):
        if full in _scores():
            return full
    nearest = difflib.get_close_matches(name, score_names(), 1, 0)[0]
    raise ValueError(f"unknown score {name!r}: did you mean {nearest!r}?")


def metric_of(score: str) -> Metric:
    """The metric that computes a score."""
    full = full_score_name(score)
    return next(metric for metric in METRICS.values() if full in metric.scores)


def display_name(score: str) -> str:
    """A score's name in tables; `score` itself if there is no such score."""
    found = _scores().get(score)
    return score if found is None else found.display


def higher_is_better(score: str) -> bool:
    """Whether a higher value of a score is better."""
    return _scores()[full_score_name(score)].higher_is_better


def main_scores() -> dict[str, str]:
    """The scores of the short tables, and their names there."""
    return {name: score.display for name, score in _scores().items() if score.main}


def score_tables() -> dict[str, dict[str, str]]:
    """The full tables: by title the scores that have a column, and their headings."""
    tables: dict[str, dict[str, str]] = {}
    for name, score in _scores().items():
        if score.table is not None:
            tables.setdefault(score.table, {})[name] = score.heading or score.display
    return tables


def default_metrics() -> list[str]:
    """Names of the metrics that are computed where none are named."""
    return [name for name, metric in METRICS.items() if metric.default]


def wanted_scores(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """By metric, the scores that were asked for.

    Args:
        names: of metrics, for all their scores, or of single scores.

    Raises:
        ValueError: an unknown name.
    """
    names = list(names)
    unknown = [name for name in names if name not in METRICS and name not in _scores()]
    if unknown:
        raise ValueError(f"unknown metrics {unknown}: expected some of {', '.join(metric_choices())}")
    wanted = {
        name: tuple(score for score in metric.scores if name in names or score in names)
        for name, metric in METRICS.items()
    }
    return {name: scores for name, scores in wanted.items() if scores}


def metric_choices() -> list[str]:
    """What `--metrics` takes: metrics, and the single scores of those that compare texts."""
    return list(
        dict.fromkeys(
            choice
            for metric in METRICS.values()
            for choice in (metric.name, *(metric.scores if metric.reads == "reports" else ()))
        )
    )


__all__ = [
    "METRICS",
    "default_metrics",
    "display_name",
    "full_score_name",
    "higher_is_better",
    "main_scores",
    "metric_choices",
    "metric_of",
    "register",
    "score_names",
    "score_tables",
    "wanted_scores",
]
