"""The expression by which the report stage selects a checkpoint: arithmetic over the scores of generated reports."""

from __future__ import annotations

import ast
import difflib
import math
from collections.abc import Mapping, Sequence

_OPERATORS = (ast.BinOp, ast.UnaryOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.USub, ast.UAdd)
_EXAMPLE = "0.5 * bleu_4 + 0.5 * cider"


class SelectionExpression:
    """Numbers and names of scores joined by `+ - * /` and parentheses, the higher the better.

    Args:
        text: such as "0.5 * bleu_4 + 0.5 * cider".

    Attributes:
        names: the scores it is made of, in the order they come.

    Raises:
        ValueError: it is no such expression.
    """

    def __init__(self, text: str):
        self.text = text
        wrong = ValueError(f"{text!r}: expected scores, numbers and + - * / ( ), such as {_EXAMPLE}")
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise wrong from None
        for node in ast.walk(tree):
            number = isinstance(node, ast.Constant) and type(node.value) in (int, float) and math.isfinite(node.value)
            if not number and not isinstance(node, (ast.Expression, ast.Name, ast.Load, *_OPERATORS)):
                raise wrong
        self.names = tuple(dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name)))
        if not self.names:
            raise wrong
        self._code = compile(tree, "<selection>", "eval")

    def check_names(self, known: Sequence[str]) -> None:
        """Raises `ValueError`, with the nearest known one, where a name is none of the `known` scores."""
        for name in self.names:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
                raise ValueError(f"{self.text!r} names no score {name!r}: did you mean {nearest!r}?")

    def check_value(self) -> None:
        """Raises `ValueError` where no scores give it a value, as of a division by 0."""
        # Values that do not cancel each other out.
        value = self({name: 0.1 + math.sqrt(place + 2) for place, name in enumerate(self.names)})
        if not math.isfinite(value):
            raise ValueError(f"{self.text!r} cannot be computed: its value is {value}")

    def __call__(self, scores: Mapping[str, float]) -> float:
        """Its value.

        Args:
            scores: has all of `names`.

        Raises:
            ValueError: a score is missing (None), or it divides by 0.
        """
        values = {name: scores[name] for name in self.names}
        missing = [name for name, value in values.items() if value is None]
        if missing:
            raise ValueError(f"{self.text!r} cannot be computed: there is no {missing[0]} here")
        try:
            return float(eval(self._code, {"__builtins__": {}}, values))
        except ZeroDivisionError:
            raise ValueError(f"{self.text!r} cannot be computed: it divides by 0") from None


__all__ = ["SelectionExpression"]
