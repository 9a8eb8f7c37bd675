"""Rewards of sampled reports: per-pair metrics for policy-gradient training, by the stage `reward` or by TRL.

A reward has the signature of TRL's reward functions: the completions, columns of the data set by name (`references`,
`finding_states`), and a float for each completion as the result. Reports are compared as they are, so clean both sides
first (`otdrg.studies.cleaning.clean_report`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ..findings_otdrg import FINDING_STATES, FINDINGS, POSITIVE
from ..labelers.as_typed import label_quietly, labeler_of
from ..utility_otdrg import rouge_l_matrix

#: `reward(completions=..., references=..., finding_states=...)` -> a float for each completion.
RewardFunction = Callable[..., list[float]]

_ORDERS = range(1, 5)
#: Added to matches and counts of 2-grams to 4-grams, so that a pair without a common 4-gram keeps its other matches.
_SMOOTHING = 0.1
#: pycocoevalcap's sigma of CIDEr's length penalty.
_CIDER_SIGMA = 6.0
_FINDINGS = [place for place, name in enumerate(FINDINGS) if name != "no_finding"]


def bleu_4(completions: Sequence[str], references: Sequence[str], **columns) -> list[float]:
    """Smoothed BLEU-4 of each pair, 0 to 1."""
    return [_bleu_4(written, true) for written, true in zip(completions, references, strict=True)]


def _bleu_4(written: str, true: str) -> float:
    words, reference = written.split(), true.split()
    if not set(words) & set(reference):
        return 0.0
    log_precision = 0.0
    for order in _ORDERS:
        matches = (_ngrams(words, order) & _ngrams(reference, order)).total()
        smoothing = _SMOOTHING if order > 1 else 0.0
        log_precision += math.log((matches + smoothing) / (max(len(words) - order + 1, 1) + smoothing))
    return math.exp(log_precision / len(_ORDERS) + min(0.0, 1.0 - len(reference) / len(words)))


def rouge_l(completions: Sequence[str], references: Sequence[str], **columns) -> list[float]:
    """ROUGE-L of each pair, 0 to 1, as pycocoevalcap computes it."""
    pairs = zip(completions, references, strict=True)
    return [float(rouge_l_matrix([written], [true])[0, 0]) for written, true in pairs]


class Cider:
    """CIDEr of each pair, 0 to 10, as pycocoevalcap computes it, with the document frequencies of given reports.

    Args:
        reports: the training reports.
    """

    __name__ = "cider"

    def __init__(self, reports: Iterable[str]):
        self._frequency: Counter[tuple[str, ...]] = Counter()
        texts = [report.split() for report in reports]
        for words in texts:
            self._frequency.update({ngram for order in _ORDERS for ngram in _ngrams(words, order)})
        self._log_count = math.log(max(len(texts), 1))

    def __call__(self, completions: Sequence[str], references: Sequence[str], **columns) -> list[float]:
        return [
            self._score(written.split(), true.split()) for written, true in zip(completions, references, strict=True)
        ]

    def _score(self, written: list[str], true: list[str]) -> float:
        similarity = 0.0
        for order in _ORDERS:
            ours, theirs = (self._weighted(_ngrams(words, order)) for words in (written, true))
            norms = math.sqrt(sum(v * v for v in ours.values()) * sum(v * v for v in theirs.values()))
            if norms > 0:
                similarity += (
                    sum(min(v, theirs[ngram]) * theirs[ngram] for ngram, v in ours.items() if ngram in theirs) / norms
                )
        # pycocoevalcap counts bigrams as the length.
        difference = max(len(written) - 1, 0) - max(len(true) - 1, 0)
        return 10.0 / len(_ORDERS) * similarity * math.exp(-(difference**2) / (2 * _CIDER_SIGMA**2))

    def _weighted(self, ngrams: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        """Counts times the logarithm of the inverse document frequency."""
        return {
            ngram: count * (self._log_count - math.log(max(1, self._frequency[ngram])))
            for ngram, count in ngrams.items()
        }


class Agreement:
    """Minus the number of findings whose positive state differs from that which the report was conditioned on.

    "No Finding" does not count, nor do findings whose state was not given.

    Args:
        labeler: reads the states in the reports.
    """

    __name__ = "agreement"

    def __init__(self, labeler: str = "rules"):
        self._labeler = labeler_of(labeler, {})

    def __call__(self, completions: Sequence[str], finding_states, **columns) -> list[float]:
        """`finding_states` (N, 14) are the state ids that condition each of N completions."""
        states = np.asarray(finding_states)[:, _FINDINGS]
        stated = label_quietly(self._labeler, list(completions))[:, _FINDINGS]
        given = (states >= 0) & (states < len(FINDING_STATES))
        differing = given & ((stated == POSITIVE) != (states == POSITIVE))
        return (-differing.sum(axis=1)).astype(float).tolist()


def _ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


#: By name, how a reward is made from the training reports and the name of a labeler.
REWARDS: dict[str, Callable[[Sequence[str], str], RewardFunction]] = {
    "cider": lambda reports, labeler: Cider(reports),
    "bleu_4": lambda reports, labeler: bleu_4,
    "rouge_l": lambda reports, labeler: rouge_l,
    "agreement": lambda reports, labeler: Agreement(labeler),
}

__all__ = ["REWARDS", "Agreement", "Cider", "RewardFunction", "bleu_4", "rouge_l"]
