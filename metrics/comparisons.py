"""Comparisons with an earlier examination that reports mention: "unchanged", "compared to the prior study".

A model that reads no prior study learns such words from reports whose authors had one. All comparisons that it writes
are invented. The words are in labelers/vocabulary/comparisons.yaml.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from ..labelers.phrases import VOCABULARY, WORDS, Phrases, load_comparisons, load_spelling
from ..labelers.sentences import Spelling, split_sentences
from .metric import Metric, MetricResult, Score


class ComparisonReader:
    """Reads whether a report mentions a comparison with an earlier examination.

    Words of change count also where they are denied ("no interval change"). An earlier examination counts unless the
    sentence says that there is none ("no prior for comparison"). What is asked for does not count ("recommend
    comparison with prior studies", "follow-up to document resolution").

    Args:
        vocabulary: folder with comparisons.yaml and spelling.yaml; by default that of the package.

    Raises:
        ValueError: a file is missing or wrong.
    """

    def __init__(self, vocabulary: str | Path = VOCABULARY):
        self._phrases: Phrases[frozenset[str]] = Phrases(load_comparisons(vocabulary), frozenset)
        self._spelling = Spelling(load_spelling(vocabulary))

    def __call__(self, reports: Sequence[str]) -> np.ndarray:
        """Whether each of N reports mentions a comparison: (N,) bool."""
        return np.array([any(map(self._compares, split_sentences(report))) for report in reports], dtype=bool)

    def _compares(self, sentence: str) -> bool:
        words = [*self._spelling.words(sentence, WORDS), ">"]
        found: set[str] = set()
        place = 0
        while place < len(words):
            roles, place = self._phrases.find(words, place)
            if roles is not None and "wanted" in roles:
                return "changes" in found
            found |= roles or frozenset()
        return "changes" in found or ("priors" in found and "absent" not in found)


@cache
def comparison_reader() -> ComparisonReader:
    """The reader with the package's vocabulary."""
    return ComparisonReader()


def comparisons(predictions: Sequence[str], references: Sequence[str]) -> MetricResult:
    """The share of generated reports that mention a comparison, and of those whose true report does not.

    All are invented where the model reads no earlier study; the second figure is for models that do.
    """
    written, true = (comparison_reader()(reports) for reports in (predictions, references))
    shares = {"invented_comparisons": written, "unshared_comparisons": written & ~true}
    result = MetricResult.from_means({name: values.astype(float).tolist() for name, values in shares.items()})
    result.details["comparisons_in_references"] = float(true.mean())
    return result


_TABLE = "share of reports"

COMPARISONS = Metric(
    "comparisons",
    {
        "invented_comparisons": Score("invented comparisons", _TABLE, main=True, higher_is_better=False),
        "unshared_comparisons": Score("comparisons only in the generated report", _TABLE, higher_is_better=False),
    },
    comparisons,
    section="comparisons",
)

__all__ = ["COMPARISONS", "ComparisonReader", "comparison_reader", "comparisons"]
