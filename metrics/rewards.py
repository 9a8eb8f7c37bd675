"""Rewards of sampled reports: per-pair metrics for policy-gradient training, by the stage `reward` or by TRL.

A reward has the signature of TRL's reward functions: the completions, columns of the data set by name (`references`,
`finding_states`), and a float for each completion as the result. Reports are compared as they are, so clean both sides
first (`otdrg.studies.cleaning.clean_report`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..labelers.as_typed import label_quietly, labeler_of
from ..utility_otdrg import DocumentFrequencies, ReportUtility, disagreements

#: `reward(completions=..., references=..., finding_states=...)` -> a float for each completion.
RewardFunction = Callable[..., list[float]]


def bleu_4(completions: Sequence[str], references: Sequence[str], **columns) -> list[float]:
    """Smoothed BLEU-4 of each pair, 0 to 1."""
    return _scores("bleu_4", completions, references)


def rouge_l(completions: Sequence[str], references: Sequence[str], **columns) -> list[float]:
    """ROUGE-L of each pair, 0 to 1, as pycocoevalcap computes it."""
    return _scores("rouge_l", completions, references)


class Cider:
    """CIDEr of each pair, 0 to 10, as pycocoevalcap computes it, with the document frequencies of given reports.

    Args:
        reports: the training reports.
    """

    __name__ = "cider"

    def __init__(self, reports: Sequence[str]):
        self._frequencies = DocumentFrequencies(reports)

    def __call__(self, completions: Sequence[str], references: Sequence[str], **columns) -> list[float]:
        return _scores("cider", completions, references, self._frequencies)


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
        stated = label_quietly(self._labeler, list(completions))
        return (-disagreements(stated, finding_states)).astype(float).tolist()


def _scores(
    name: str, completions: Sequence[str], references: Sequence[str], frequencies: DocumentFrequencies | None = None
) -> list[float]:
    """A score of [`ReportUtility`] of each pair."""
    pairs: dict[str, dict[str, float]] = {}
    for completion, reference in zip(completions, references, strict=True):
        pairs.setdefault(reference, {})[completion] = 0.0
    for reference, scores in pairs.items():
        utility = ReportUtility([reference], weights={name: 1.0}, frequencies=frequencies)
        scores.update(zip(scores, utility(list(scores))[:, 0].tolist(), strict=True))
    return [pairs[reference][completion] for completion, reference in zip(completions, references, strict=True)]


#: By name, how a reward is made from the training reports and the name of a labeler.
REWARDS: dict[str, Callable[[Sequence[str], str], RewardFunction]] = {
    "cider": lambda reports, labeler: Cider(reports),
    "bleu_4": lambda reports, labeler: bleu_4,
    "rouge_l": lambda reports, labeler: rouge_l,
    "agreement": lambda reports, labeler: Agreement(labeler),
}

__all__ = ["REWARDS", "Agreement", "Cider", "RewardFunction", "bleu_4", "rouge_l"]
