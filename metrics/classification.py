"""Quality of the label predictor: areas under the curve, precision and recall, calibration; and its thresholds."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import precision_recall_curve, precision_recall_fscore_support, roc_auc_score

from ..findings_otdrg import FINDINGS, NO_FINDING, POSITIVE
from .tables import markdown_table, shown_number

#: With fewer validation positives than this, a threshold is not fitted.
MINIMUM_POSITIVES = 5
#: The threshold of a finding with fewer.
DEFAULT_THRESHOLD = 0.5
#: Findings with fewer positives than this have no interval of their area under the curve.
MINIMUM_INTERVAL_POSITIVES = 9


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the ROC curve; None where there are no positives or no negatives.

    Args:
        scores: (N,), higher for more likely positive.
        positive: (N,) of bool.
    """
    if not positive.any() or positive.all():
        return None
    return float(roc_auc_score(positive, scores))


def weighted_areas_under_curve(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[`area_under_curve`] of R resamples at once, a hundred times as fast as R calls of scikit-learn.

    Args:
        scores: (N,), N above 0.
        positive: (N,) of bool.
        weights: (R, N), how often each study is in each resample.

    Returns:
        (R,); NaN where a resample has no positives or no negatives.
    """
    order = np.argsort(scores, kind="stable")
    first = np.flatnonzero(np.append(True, np.diff(scores[order]) > 0))
    weights, positive = weights[:, order], positive[order]
    positives = np.add.reduceat(weights * positive, first, axis=1)
    negatives = np.add.reduceat(weights * ~positive, first, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives
    won = (positives * (below + negatives / 2)).sum(axis=1)
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    return np.divide(won, pairs, out=np.full(len(won), np.nan), where=pairs > 0)


def expected_calibration_error(probabilities: np.ndarray, positive: np.ndarray, bins: int = 15) -> float | None:
    """Mean over `bins` equal bins of [0, 1], weighted by their studies, of |mean probability - share of positives|
    (Guo et al., 2017).

    Args:
        probabilities: (N,) of positive.
        positive: (N,) of bool.

    Returns:
        From 0, calibrated, to 1; None without studies.
    """
    if not len(probabilities):
        return None
    inner_edges = np.linspace(0, 1, bins + 1)[1:-1]
    gaps = np.bincount(np.searchsorted(inner_edges, probabilities), weights=probabilities - positive)
    return float(np.abs(gaps).sum() / len(probabilities))


def finding_metrics(
    probabilities: np.ndarray, predicted: np.ndarray, labels: np.ndarray, resamples: int = 0, seed: int = 0
) -> dict[str, Any]:
    """Scores of "positive" against the other three states.

    Args:
        probabilities: (N, 14) of the state positive.
        predicted: (N, 14) state ids.
        labels: (N, 14) true state ids; -100 is left out.
        resamples: of the studies, for intervals; 0 leaves these out.
        seed: of the resamples.

    Returns:
        `macro_auc` over the findings with positives and others (`auc_findings`, their number), `macro_f1_13`, the mean
        F1 without "no finding", 0 for findings that have no positives or none predicted (of the 13,
        `f1_findings_with_positives` have any), `macro_ece`, the mean [`expected_calibration_error`], and under
        `findings` each one's studies, positives, auc, precision, recall, f1, ece.

        With resamples also `macro_auc_interval` and each finding's `auc_interval`, as [`auc_intervals`] has them.
    """
    findings = {}
    for position, name in enumerate(FINDINGS):
        known = labels[:, position] != -100
        true, said = (states[known, position] == POSITIVE for states in (labels, predicted))
        rates = (0.0, 0.0, 0.0)
        if known.any():
            rates = precision_recall_fscore_support(true, said, average="binary", zero_division=0)[:3]
        findings[name] = {
            "studies": int(known.sum()),
            "positives": int(true.sum()),
            "auc": area_under_curve(probabilities[known, position], true),
            **dict(zip(("precision", "recall", "f1"), map(float, rates), strict=True)),
            "ece": expected_calibration_error(probabilities[known, position], true),
        }
    areas, errors = ([row[key] for row in findings.values() if row[key] is not None] for key in ("auc", "ece"))
    thirteen = [row for name, row in findings.items() if name != FINDINGS[NO_FINDING]]
    metrics = {
        "macro_auc": float(np.mean(areas)) if areas else None,
        "auc_findings": len(areas),
        "macro_f1_13": float(np.mean([row["f1"] for row in thirteen])),
        "f1_findings_with_positives": sum(row["positives"] > 0 for row in thirteen),
        "macro_ece": float(np.mean(errors)) if errors else None,
        "findings": findings,
    }
    if resamples:
        metrics["macro_auc_interval"], intervals = auc_intervals(probabilities, labels, resamples, seed)
        for name, row in findings.items():
            row["auc_interval"] = intervals.get(name)
    return metrics


def auc_intervals(
    probabilities: np.ndarray, labels: np.ndarray, resamples: int, seed: int
) -> tuple[dict[str, Any] | None, dict[str, list[float]]]:
    """95 % intervals of areas under the curve, from the quantiles of a bootstrap over studies.

    All findings are resampled together, because those of a study are correlated. A resample without positives, or
    without others, is left out of a finding's interval.

    Args:
        probabilities, labels: as in [`finding_metrics`].

    Returns:
        Of the macro area over the findings with at least `MINIMUM_INTERVAL_POSITIVES` positives: that `auc`, its
        interval from `low` to `high`, whether it lies `above_half`, how many `findings` these are, and `resamples`;
        None without any. And the interval of each of them.
    """
    count = len(labels)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    observed, areas = {}, []
    for position, name in enumerate(FINDINGS):
        known = labels[:, position] != -100
        scores, true = probabilities[known, position], labels[known, position] == POSITIVE
        if true.sum() >= MINIMUM_INTERVAL_POSITIVES and not true.all():
            observed[name] = area_under_curve(scores, true)
            areas.append(weighted_areas_under_curve(scores, true, drawn[:, known]))
    if not observed:
        return None, {}
    low, high = np.nanquantile(np.mean(areas, axis=0), [0.025, 0.975]).tolist()
    macro = {
        "auc": float(np.mean(list(observed.values()))),
        "low": low,
        "high": high,
        "above_half": low > 0.5,
        "findings": len(observed),
        "resamples": resamples,
    }
    bounds = np.nanquantile(areas, [0.025, 0.975], axis=1).T.tolist()
    return macro, dict(zip(observed, bounds, strict=True))


def fit_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> list[float]:
    """The threshold of each finding with the best F1; `DEFAULT_THRESHOLD` with fewer than `MINIMUM_POSITIVES`.

    Args:
        probabilities: (N, 14) of the state positive.
        labels: (N, 14) true state ids; -100 is left out.

    Returns:
        14 thresholds: a finding is positive where its probability is at least that. Each lies halfway between two
        observed probabilities.
    """
    thresholds = []
    for position in range(len(FINDINGS)):
        known = labels[:, position] != -100
        scores, true = probabilities[known, position].astype(np.float64), labels[known, position] == POSITIVE
        if true.sum() < MINIMUM_POSITIVES:
            thresholds.append(DEFAULT_THRESHOLD)
            continue
        precision, recall, cuts = precision_recall_curve(true, scores)
        precision, recall = precision[:-1], recall[:-1]
        total = precision + recall
        f1 = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)
        # The highest of equally good cuts; equal but for rounding is equal.
        best = int(np.flatnonzero(f1 >= f1.max() - 1e-12)[-1])
        below = cuts[best - 1] if best else 0.0
        thresholds.append(float((cuts[best] + below) / 2))
    return thresholds


def format_metrics(metrics: dict[str, Any]) -> str:
    """The result of [`finding_metrics`] as a Markdown table."""
    rows = []
    for name, row in metrics["findings"].items():
        interval = "–" if row.get("auc_interval") is None else "{:.3f} to {:.3f}".format(*row["auc_interval"])
        rates = (shown_number(row[key]) for key in ("precision", "recall", "f1", "ece"))
        rows.append([name, str(row["positives"]), shown_number(row["auc"]), interval, *rates])
    header = ["finding", "positives", "AUC", "95 % interval", "precision", "recall", "F1", "ECE"]
    lines = [
        markdown_table(header, rows),
        f"macro AUC {shown_number(metrics['macro_auc'])} over {metrics['auc_findings']} findings; "
        f"macro F1 without no_finding {metrics['macro_f1_13']:.3f}; macro ECE {shown_number(metrics['macro_ece'])}",
    ]
    macro = metrics.get("macro_auc_interval")
    if macro is not None:
        lines.append(
            f"macro AUC {macro['auc']:.3f} over the {macro['findings']} findings with at least "
            f"{MINIMUM_INTERVAL_POSITIVES} positives, 95 % interval {macro['low']:.3f} to {macro['high']:.3f}, "
            f"{'above' if macro['above_half'] else 'not above'} 0.5"
        )
    return "\n".join(lines)


__all__ = [
    "area_under_curve",
    "auc_intervals",
    "expected_calibration_error",
    "finding_metrics",
    "fit_thresholds",
    "format_metrics",
    "weighted_areas_under_curve",
]
