"""Radiology's own metrics of text as RadEval computes them, an optional package: `pip install "otdrg[radeval]"`.

What it shares with `metrics/nlg` (BLEU, ROUGE) and with clinical efficacy by the labeler `chexbert` (F1CheXbert) is not
taken from it, nor what asks a large language model (GREEN, CRIMSON).
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

RADEVAL_IS_MISSING = 'RadEval is not installed: pip install "otdrg[radeval]", on Python 3.11 or newer'


@dataclass(frozen=True)
class RadEvalMetric:
    """A metric of RadEval's.

    Args:
        scores: `{RadEval's key: how it is written}`.
        needs: what RadEval fetches when it first computes it.
        mean: whether a score is the mean of the studies' values, which intervals and tests are of.
    """

    scores: dict[str, str]
    needs: str
    mean: bool = True


_RADGRAPH = "RadGraph's weights, StanfordAIMI/RRG_scorers on the Hub"

#: What can be asked for, under RadEval's names.
RADEVAL_METRICS: dict[str, RadEvalMetric] = {
    "radgraph": RadEvalMetric(
        {f"radgraph_{level}": f"RadGraph-F1, {level}" for level in ("simple", "partial", "complete")}, _RADGRAPH
    ),
    "radgraph_radcliq": RadEvalMetric({"radgraph_radcliq": "RadGraph-F1, as in RadCliQ"}, _RADGRAPH),
    "radcliq": RadEvalMetric(
        {"radcliq_v1": "RadCliQ-v1, 1 / mean"}, f"{_RADGRAPH}, bert-base-uncased and distilroberta-base", mean=False
    ),
    "ratescore": RadEvalMetric(
        {"ratescore": "RaTEScore"},
        "Angelakeke/RaTE-NER-Deberta and FremyCompany/BioLORD-2023-C on the Hub, and a spaCy built for the NumPy that "
        "is installed, which pip finds from Python 3.12 on",
    ),
    "srrbert": RadEvalMetric(
        {f"srrbert_weighted_{name}": f"SRR-BERT, weighted {name}" for name in ("precision", "recall", "f1")},
        "StanfordAIMI/SRR-BERT-Leaves-with-Statuses and microsoft/BiomedVLP-CXR-BERT-general on the Hub, and NLTK's "
        "punkt_tab",
        mean=False,
    ),
}

#: Every score, and how it is written.
RADEVAL_NAMES: dict[str, str] = {
    score: shown for metric in RADEVAL_METRICS.values() for score, shown in metric.scores.items()
}
#: The scores that are means of the studies' values.
RADEVAL_MEANS: tuple[str, ...] = tuple(
    score for metric in RADEVAL_METRICS.values() if metric.mean for score in metric.scores
)


def radeval_scores(predictions: Sequence[str], references: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    """RadEval's scores of N reports: RadGraph-F1, RadCliQ-v1, RaTEScore, SRR-BERT.

    Means are not rounded; the others are RadEval's own aggregates, to its four digits. RadCliQ-v1 is one of these: the
    reciprocal of the mean of the studies' values, of which a lower one is better. SRR-BERT's F1 is over labels, the
    studies' values are not.

    Args:
        predictions: N generated reports.
        references: N true reports, in the same order.
        metrics: of `RADEVAL_METRICS`.

    Returns:
        One float for each score; `"per_study"`: a list of N floats for each; `"notes"`: `{metric: why its scores are
        None}`: RadEval is not installed, cannot get what it needs, or gives no value for some study.

    Raises:
        ValueError: an unknown metric.
    """
    unknown = [name for name in metrics if name not in RADEVAL_METRICS]
    if unknown:
        raise ValueError(f"unknown metrics {unknown}: expected some of {', '.join(RADEVAL_METRICS)}")
    values: dict[str, float | None] = {}
    studies: dict[str, list[float] | None] = {}
    notes: dict[str, str] = {}
    for name in dict.fromkeys(metrics):
        try:
            found, by_study = _computed(name, predictions, references)
        except _NotComputed as error:
            found = by_study = dict.fromkeys(RADEVAL_METRICS[name].scores)
            notes[name] = str(error)
        values.update(found)
        studies.update(by_study)
    return {**values, "per_study": studies, "notes": notes}


class _NotComputed(Exception):
    """Why RadEval gives no score."""


def _computed(
    name: str, predictions: Sequence[str], references: Sequence[str]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    metric = RADEVAL_METRICS[name]
    # RadGraph fails on a report of nothing but spaces, and knows empty ones.
    written, true = ([text if text.strip() else "" for text in texts] for texts in (predictions, references))
    # It prints, and silences every warning of the process.
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        evaluator_class = _radeval().RadEval
        try:
            evaluator = evaluator_class(metrics=[name], per_sample=True, show_progress=False)
            by_study = evaluator(refs=true, hyps=written)
            # The attribute, and not another evaluator, which would load the weights once more.
            evaluator.per_sample = False
            whole = {} if metric.mean else evaluator(refs=true, hyps=written)
        except Exception as error:  # RadEval raises `Exception` itself, and whatever its parts do
            said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise _NotComputed(f"RadEval could not compute it: {said}; it needs {metric.needs}") from error
    values: dict[str, float] = {}
    studies: dict[str, list[float]] = {}
    for score in metric.scores:
        studies[score] = [float(value) for value in by_study[score]]
        if len(studies[score]) != len(true):
            # RaTEScore leaves out reports without a sentence, and what follows them is compared with other studies'.
            raise _NotComputed(
                f"RadEval gives {len(studies[score])} values for {len(true)} reports, so some are of other studies: "
                "leave out those that are blank, or too short to be a sentence"
            )
        values[score] = sum(studies[score]) / len(true) if metric.mean else float(whole[score])
    return values, studies


def _radeval() -> Any:
    try:
        radeval = importlib.import_module("radeval")
    except ImportError as error:
        missing = error.name == "radeval"
        raise _NotComputed(RADEVAL_IS_MISSING if missing else f"RadEval cannot be imported: {error}") from error
    # The RadGraph inside radeval 2.2.1 imports its own modules under the package's former name, RadEval.
    sys.modules.setdefault("RadEval", radeval)
    return radeval


__all__ = ["RADEVAL_MEANS", "RADEVAL_METRICS", "RADEVAL_NAMES", "RadEvalMetric", "radeval_scores"]
