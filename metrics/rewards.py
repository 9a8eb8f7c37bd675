"""Rewards of sampled reports, one for each completion, for the training stage `reward` and for TRL.

A reward has the signature of TRL's reward functions: the completions, columns of the data set by name (`references`,
the true reports, and `finding_states`), and a float for each completion as the result. A completion is a text, or the
messages of a conversation, whose last one counts. Reports are compared as they are, but for white space, so clean the
true reports as those of the model's training data were (`otdrg.studies.cleaning.clean_report`).

All rewards are finite. An empty completion gets 0 in BLEU-4, ROUGE-L, CIDEr, the F1 of findings and RadEval's metrics,
and in `agreement` what a report without any finding gets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..findings_otdrg import NO_FINDING, POSITIVE
from ..labelers.as_typed import label_quietly, labeler_of
from ..utility_otdrg import DocumentFrequencies, ReportUtility, disagreements
from .comparisons import comparison_reader
from .efficacy import clinical_efficacy_scores
from .rad_eval import NEEDS, RADEVAL_METRICS, NotComputed, load_radeval, study_values

#: A text, or the messages of a conversation.
Completion = str | Sequence[Mapping[str, Any]]
#: `reward(completions=..., references=..., finding_states=...)` -> a float for each completion.
RewardFunction = Callable[..., list[float]]


def completion_texts(completions: Sequence[Completion]) -> list[str]:
    """The completions as texts whose words are separated by single spaces.

    Raises:
        TypeError: a completion is neither a text nor a list of messages.
    """
    return [" ".join(_text(completion, place).split()) for place, completion in enumerate(completions)]


def _text(completion: Completion, place: int) -> str:
    last = completion
    if not isinstance(completion, str):
        try:
            last = completion[-1]["content"]
            if not isinstance(last, str):
                last = "".join(part["text"] for part in last if part["type"] == "text")
        except (TypeError, KeyError, IndexError):
            raise TypeError(
                f"completions[{place}] is {type(completion).__name__}: expected a text, or messages with role and "
                "content"
            ) from None
    return str(last)


def bleu_4(completions: Sequence[Completion], references: Sequence[str], **columns) -> list[float]:
    """Smoothed BLEU-4 of each pair, 0 to 1."""
    return _scores("bleu_4", completions, references)


def rouge_l(completions: Sequence[Completion], references: Sequence[str], **columns) -> list[float]:
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

    def __call__(self, completions: Sequence[Completion], references: Sequence[str], **columns) -> list[float]:
        return _scores("cider", completions, references, self._frequencies)


class FindingF1:
    """F1 of the positive findings of each pair, 0 to 1, unclear ones counted as negative, without "No Finding".

    1 where neither report has a positive finding, unlike the example-based F1 of evaluations: otherwise a normal study
    could not be rewarded.

    Args:
        labeler: reads the states in both reports.
    """

    __name__ = "finding_f1"

    def __init__(self, labeler: str = "rules"):
        self._labeler = labeler_of(labeler, {})

    def __call__(self, completions: Sequence[Completion], references: Sequence[str], **columns) -> list[float]:
        texts = completion_texts(completions)
        _check_lengths(texts, references=references)
        said, true = (label_quietly(self._labeler, list(reports)) for reports in (texts, references))
        found = clinical_efficacy_scores(said, true)["per_study"]
        # Precision and recall of a study without positives are 0 as well.
        positives = np.array([(states[:, :NO_FINDING] == POSITIVE).sum(axis=1) for states in (said, true)])
        f1 = np.where(positives.any(axis=0), found["f1_13_uncertain_negative"], 1.0)
        return [value if text else 0.0 for value, text in zip(f1.tolist(), texts, strict=True)]


class Agreement:
    """Minus the number of findings whose positive state differs from that which the report was conditioned on.

    "No Finding" does not count, nor do findings whose state was not given.

    Args:
        labeler: reads the states in the reports.
    """

    __name__ = "agreement"

    def __init__(self, labeler: str = "rules"):
        self._labeler = labeler_of(labeler, {})

    def __call__(self, completions: Sequence[Completion], finding_states, **columns) -> list[float]:
        """`finding_states` (N, 14) are the state ids that condition each of N completions."""
        texts = completion_texts(completions)
        _check_lengths(texts, finding_states=finding_states)
        stated = label_quietly(self._labeler, texts)
        return (-disagreements(stated, finding_states)).astype(float).tolist()


def invented_comparisons(completions: Sequence[Completion], **columns) -> list[float]:
    """-1 for a completion that mentions a comparison with an earlier study, else 0.

    Every comparison is invented, because the model reads no earlier study.
    """
    return [-float(found) for found in comparison_reader()(completion_texts(completions))]


class RadEvalReward:
    """A score of RadEval's metrics for each pair; RadCliQ-v1, for which lower is better, with a minus.

    Args:
        score: such as `radgraph_partial`, `green` or `crimson` (of `RADEVAL_METRICS`).

    Raises:
        ValueError: RadEval has no such score, or is not installed.
    """

    def __init__(self, score: str):
        names = {one: metric.name for metric in RADEVAL_METRICS.values() for one in metric.scores}
        if score not in names:
            raise ValueError(f"RadEval has no score {score!r}: expected one of {', '.join(names)}")
        self.__name__, self._metric = score, names[score]
        self._sign = -1.0 if score == "radcliq_v1" else 1.0
        try:
            load_radeval()
        except NotComputed as error:
            raise ValueError(f"reward {score}: {error}") from error

    def __call__(self, completions: Sequence[Completion], references: Sequence[str], **columns) -> list[float]:
        """A float for each completion; the weights are loaded by the first call.

        Raises:
            ValueError: RadEval cannot compute the score, or a value is not finite.
        """
        texts, name = completion_texts(completions), self.__name__
        _check_lengths(texts, references=references)
        rewards = [0.0] * len(texts)
        written = [place for place, text in enumerate(texts) if text]
        if written:
            pairs = [texts[place] for place in written], [references[place] for place in written]
            try:
                values = study_values(self._metric, NEEDS[self._metric], [name], *pairs)[name]
            except NotComputed as error:
                raise ValueError(f"reward {name}: {error}") from error
            for place, value in zip(written, values, strict=True):
                rewards[place] = self._sign * value
        for place, value in enumerate(rewards):
            if not math.isfinite(value):
                raise ValueError(f"reward {name} of completions[{place}] is {value}, expected a finite number")
        return rewards


def _check_lengths(texts: Sequence[str], **columns) -> None:
    for name, values in columns.items():
        if len(values) != len(texts):
            raise ValueError(f"{name}: {len(values)}, completions: {len(texts)}; expected as many of each")


def _scores(
    name: str,
    completions: Sequence[Completion],
    references: Sequence[str],
    frequencies: DocumentFrequencies | None = None,
) -> list[float]:
    """A score of [`ReportUtility`] of each pair."""
    texts = completion_texts(completions)
    _check_lengths(texts, references=references)
    pairs: dict[str, dict[str, float]] = {}
    for text, reference in zip(texts, references, strict=True):
        pairs.setdefault(reference, {})[text] = 0.0
    for reference, scores in pairs.items():
        utility = ReportUtility([reference], weights={name: 1.0}, frequencies=frequencies)
        scores.update(zip(scores, utility(list(scores))[:, 0].tolist(), strict=True))
    return [pairs[reference][text] for text, reference in zip(texts, references, strict=True)]


def _radeval_reward(score: str, reports: Sequence[str], labeler: str) -> RewardFunction:
    return RadEvalReward(score)


#: By name, how a reward is made from the training reports and the name of a labeler.
REWARDS: dict[str, Callable[[Sequence[str], str], RewardFunction]] = {
    "cider": lambda reports, labeler: Cider(reports),
    "bleu_4": lambda reports, labeler: bleu_4,
    "rouge_l": lambda reports, labeler: rouge_l,
    "finding_f1": lambda reports, labeler: FindingF1(labeler),
    "agreement": lambda reports, labeler: Agreement(labeler),
    "invented_comparisons": lambda reports, labeler: invented_comparisons,
    **{score: partial(_radeval_reward, score) for metric in RADEVAL_METRICS.values() for score in metric.scores},
}

__all__ = [
    "REWARDS",
    "Agreement",
    "Cider",
    "FindingF1",
    "RadEvalReward",
    "RewardFunction",
    "bleu_4",
    "completion_texts",
    "invented_comparisons",
    "rouge_l",
]
