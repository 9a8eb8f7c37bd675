"""Metrics of radiology reports that the optional package RadEval computes: `pip install "otdrg[radeval]"`.

BLEU and ROUGE come from `fluency`, and F1CheXbert from clinical efficacy by the labeler `chexbert`, not from RadEval.
Its metrics that ask a large language model (GREEN, CRIMSON) are left out.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .metric import Metric, MetricResult, Score

RADEVAL_IS_MISSING = 'RadEval is not installed: pip install "otdrg[radeval]", on Python 3.11 or newer'


class _NotComputed(Exception):
    """Why RadEval gives no score."""


def _adapter(name: str, needs: str, is_mean: bool, scores: Sequence[str]) -> Callable[..., MetricResult]:
    """The metric's function.

    Args:
        name: in RadEval.
        needs: what RadEval downloads when it first computes it.
        is_mean: whether the scores are means of the studies' values, which are not rounded and have intervals; other
            scores are RadEval's own aggregates, to its four digits.
        scores: RadEval's keys.
    """

    def compute(predictions: Sequence[str], references: Sequence[str]) -> MetricResult:
        try:
            by_study, whole = _radeval_values(name, needs, is_mean, predictions, references)
        except _NotComputed as error:
            return MetricResult(dict.fromkeys(scores), notes={name: str(error)})
        values = {score: [float(value) for value in by_study[score]] for score in scores}
        if is_mean:
            return MetricResult.from_means(values)
        return MetricResult({score: float(whole[score]) for score in scores}, values)

    return compute


def _radeval_values(
    name: str, needs: str, is_mean: bool, predictions: Sequence[str], references: Sequence[str]
) -> tuple[Mapping[str, Sequence[float]], Mapping[str, float]]:
    """RadEval's values of each study, and its aggregates where these are not means."""
    # RadGraph fails on a report of spaces only; it accepts empty ones.
    written, true = ([text if text.strip() else "" for text in texts] for texts in (predictions, references))
    # RadEval prints, and silences every warning of the process.
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        evaluator_class = _radeval().RadEval
        try:
            evaluator = evaluator_class(metrics=[name], per_sample=True, show_progress=False)
            by_study = evaluator(refs=true, hyps=written)
            # A second evaluator would load the weights again.
            evaluator.per_sample = False
            whole = {} if is_mean else evaluator(refs=true, hyps=written)
        except Exception as error:  # RadEval raises `Exception` itself, and whatever its parts do
            said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise _NotComputed(f"RadEval could not compute it: {said}; it needs {needs}") from error
    for values in by_study.values():
        if len(values) != len(true):
            # RaTEScore leaves out reports without a sentence, and compares those after it with other studies'.
            raise _NotComputed(
                f"RadEval gives {len(values)} values for {len(true)} reports, so some are of other studies: "
                "leave out those that are blank, or too short to be a sentence"
            )
    return by_study, whole


def _radeval() -> Any:
    try:
        radeval = importlib.import_module("radeval")
    except ImportError as error:
        missing = error.name == "radeval"
        raise _NotComputed(RADEVAL_IS_MISSING if missing else f"RadEval cannot be imported: {error}") from error
    # The RadGraph inside radeval 2.2.1 imports its own modules under the package's former name, RadEval.
    sys.modules.setdefault("RadEval", radeval)
    return radeval


def _metric(name: str, needs: str, scores: Mapping[str, str], is_mean: bool = True) -> Metric:
    shown = {score: Score(display, "by RadEval") for score, display in scores.items()}
    compute = _adapter(name, needs, is_mean, list(scores))
    return Metric(name, shown, compute, section="radeval", default=False, hub_type=name)


_RADGRAPH = "RadGraph's weights, StanfordAIMI/RRG_scorers on the Hub"

#: By RadEval's name. A higher RadCliQ-v1 is better, because its aggregate is 1 / the mean of the studies' values; for
#: the studies' own values lower is better. SRR-BERT's F1 is over labels, the studies' values are not.
RADEVAL_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _metric(
            "radgraph",
            _RADGRAPH,
            {f"radgraph_{level}": f"RadGraph-F1, {level}" for level in ("simple", "partial", "complete")},
        ),
        _metric("radgraph_radcliq", _RADGRAPH, {"radgraph_radcliq": "RadGraph-F1, as in RadCliQ"}),
        _metric(
            "radcliq",
            f"{_RADGRAPH}, bert-base-uncased and distilroberta-base",
            {"radcliq_v1": "RadCliQ-v1, 1 / mean"},
            is_mean=False,
        ),
        _metric(
            "ratescore",
            "Angelakeke/RaTE-NER-Deberta and FremyCompany/BioLORD-2023-C on the Hub, and a spaCy built for the NumPy "
            "that is installed, which pip finds from Python 3.12 on",
            {"ratescore": "RaTEScore"},
        ),
        _metric(
            "srrbert",
            "StanfordAIMI/SRR-BERT-Leaves-with-Statuses and microsoft/BiomedVLP-CXR-BERT-general on the Hub, and "
            "NLTK's punkt_tab",
            {f"srrbert_weighted_{name}": f"SRR-BERT, weighted {name}" for name in ("precision", "recall", "f1")},
            is_mean=False,
        ),
    )
}

__all__ = ["RADEVAL_IS_MISSING", "RADEVAL_METRICS"]
