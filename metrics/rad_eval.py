"""Metrics of radiology reports that the optional package RadEval computes: `pip install "otdrg[radeval]"`.

BLEU and ROUGE come from `fluency`, and F1CheXbert from clinical efficacy by the labeler `chexbert`, not from RadEval.
GREEN and CRIMSON ask a large language model, which runs on this machine.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from .metric import Metric, MetricResult, Score

RADEVAL_IS_MISSING = 'RadEval is not installed: pip install "otdrg[radeval]", on Python 3.11 or newer'


class NotComputed(Exception):
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
            values = study_values(name, needs, scores, predictions, references)
            if is_mean:
                return MetricResult.from_means(values)
            whole = _evaluate(name, needs, predictions, references, per_sample=False)
        except NotComputed as error:
            return MetricResult(dict.fromkeys(scores), notes={name: str(error)})
        return MetricResult({score: float(whole[score]) for score in scores}, values)

    return compute


def study_values(
    name: str, needs: str, scores: Sequence[str], predictions: Sequence[str], references: Sequence[str]
) -> dict[str, list[float]]:
    """RadEval's values of each of N studies, by score; NaN where it has none.

    Raises:
        NotComputed: RadEval is missing or cannot compute them.
    """
    by_study = _evaluate(name, needs, predictions, references, per_sample=True)
    for values in by_study.values():
        if len(values) != len(references):
            # RaTEScore leaves out reports without a sentence, and compares those after it with other studies'.
            raise NotComputed(
                f"RadEval gives {len(values)} values for {len(references)} reports, so some are of other studies: "
                "leave out those that are blank, or too short to be a sentence"
            )
    return {score: [float("nan") if one is None else float(one) for one in by_study[score]] for score in scores}


def _evaluate(
    name: str, needs: str, predictions: Sequence[str], references: Sequence[str], per_sample: bool
) -> Mapping[str, Any]:
    """What RadEval finds: values of each study, or aggregates."""
    # RadGraph fails on a report of spaces only; it accepts empty ones.
    written, true = ([text if text.strip() else "" for text in texts] for texts in (predictions, references))
    # RadEval prints, and silences every warning of the process.
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        radeval = load_radeval()
        try:
            evaluator = _evaluator(radeval.RadEval, name)
            evaluator.per_sample = per_sample
            return evaluator(refs=true, hyps=written)
        except Exception as error:  # RadEval raises `Exception` itself, and whatever its parts do
            said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise NotComputed(f"RadEval could not compute it: {said}; it needs {needs}") from error


@cache
def _evaluator(evaluator_class, name: str) -> Any:
    """RadEval's evaluator of one metric, with its weights."""
    return evaluator_class(metrics=[name], show_progress=False)


def load_radeval() -> Any:
    """The package RadEval.

    Raises:
        NotComputed: it is not installed, or cannot be imported.
    """
    try:
        radeval = importlib.import_module("radeval")
    except ImportError as error:
        missing = error.name == "radeval"
        raise NotComputed(RADEVAL_IS_MISSING if missing else f"RadEval cannot be imported: {error}") from error
    # The RadGraph inside radeval 2.2.1 imports its own modules under the package's former name, RadEval.
    sys.modules.setdefault("RadEval", radeval)
    return radeval


_RADGRAPH = "RadGraph's weights, StanfordAIMI/RRG_scorers on the Hub"

#: What RadEval downloads, by its name of the metric.
NEEDS: dict[str, str] = {
    "bertscore": "distilbert-base-uncased on the Hub",
    "radgraph": _RADGRAPH,
    "radgraph_radcliq": _RADGRAPH,
    "radcliq": f"{_RADGRAPH}, bert-base-uncased and distilroberta-base",
    "ratescore": "Angelakeke/RaTE-NER-Deberta and FremyCompany/BioLORD-2023-C on the Hub, and a spaCy built for the "
    "NumPy that is installed, which pip finds from Python 3.12 on",
    "srrbert": "StanfordAIMI/SRR-BERT-Leaves-with-Statuses and microsoft/BiomedVLP-CXR-BERT-general on the Hub, and "
    "NLTK's punkt_tab",
    "temporal": "stanza's English radiology models",
    "green": "StanfordAIMI/GREEN-radllama2-7b on the Hub, 7 billion parameters, whose own code is run",
    "crimson": "rajpurkarlab/medgemma-4b-it-crimson on the Hub, 4 billion parameters",
}


def _metric(name: str, scores: Mapping[str, str], is_mean: bool = True, chest_only: bool = True) -> Metric:
    shown = {score: Score(display, "by RadEval") for score, display in scores.items()}
    compute = _adapter(name, NEEDS[name], is_mean, list(scores))
    return Metric(name, shown, compute, section="radeval", default=False, chest_only=chest_only)


#: By RadEval's name. A higher RadCliQ-v1 is better, because its aggregate is 1 / the mean of the studies' values; for
#: the studies' own values lower is better. SRR-BERT's F1 is over labels, the studies' values are not.
RADEVAL_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _metric("bertscore", {"bertscore": "BERTScore"}, chest_only=False),
        _metric(
            "radgraph", {f"radgraph_{level}": f"RadGraph-F1, {level}" for level in ("simple", "partial", "complete")}
        ),
        _metric("radgraph_radcliq", {"radgraph_radcliq": "RadGraph-F1, as in RadCliQ"}),
        _metric("radcliq", {"radcliq_v1": "RadCliQ-v1, 1 / mean"}, is_mean=False),
        _metric("ratescore", {"ratescore": "RaTEScore"}, chest_only=False),
        _metric(
            "srrbert",
            {f"srrbert_weighted_{name}": f"SRR-BERT, weighted {name}" for name in ("precision", "recall", "f1")},
            is_mean=False,
        ),
        _metric("temporal", {"temporal_f1": "F1-temporal"}),
        _metric("green", {"green": "GREEN"}),
        _metric("crimson", {"crimson": "CRIMSON"}),
    )
}

__all__ = ["NEEDS", "RADEVAL_IS_MISSING", "RADEVAL_METRICS", "NotComputed", "load_radeval", "study_values"]
