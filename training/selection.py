"""`metric_for_best_model` as a weighted sum of scores."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

_NUMBER = r"\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?"
#: A sign, a weight and the name of a score; sign and weight may be left out.
_TERM = re.compile(rf"\s*([-+])?\s*(?:({_NUMBER})\s*\*\s*)?([A-Za-z]\w*)\s*")


@dataclass(frozen=True)
class WeightedScores:
    """A weighted sum of scores, such as `bleu_4 + 0.5 * macro_f1_13`, or one score by its name.

    Attributes:
        text: the sum as it was written.
        weights: of each score, by name.
    """

    text: str
    weights: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> WeightedScores:
        """Read a sum; a score may bear the prefix `eval_` of transformers' logs.

        Raises:
            ValueError: it is not a weighted sum of scores.
        """
        weights: dict[str, float] = {}
        position = 0
        while position < len(text) or not weights:
            term = _TERM.match(text, position)
            if term is None or (weights and term[1] is None) or not _is_finite(term[2]):
                raise ValueError(f"{text!r}: expected a weighted sum of scores, such as bleu_4 + 0.5 * macro_f1_13")
            name = term[3].removeprefix("eval_")
            weights[name] = weights.get(name, 0.0) + (-1 if term[1] == "-" else 1) * float(term[2] or 1)
            position = term.end()
        return cls(text, weights)

    @property
    def trainer_name(self) -> str:
        """What the Trainer calls it: the score's own name, or `selection` for a sum."""
        return next(iter(self.weights)) if tuple(self.weights.values()) == (1.0,) else "selection"

    def check(self, known: Collection[str]) -> None:
        """Raise a `ValueError`, with the nearest known score, if a score is not among the `known` ones."""
        for name in self.weights:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
                raise ValueError(f"{self.text!r}: unknown score {name!r}, did you mean {nearest!r}?")

    def __call__(self, scores: Mapping[str, float | None]) -> float:
        """The sum.

        Raises:
            ValueError: a score is missing or undefined.
        """
        for name in self.weights:
            if scores.get(name) is None:
                raise ValueError(f"metric_for_best_model={self.text!r}: this evaluation has no score {name!r}")
        return sum(weight * scores[name] for name, weight in self.weights.items())


def _is_finite(number: str | None) -> bool:
    return number is None or float(number) < float("inf")


__all__ = ["WeightedScores"]
