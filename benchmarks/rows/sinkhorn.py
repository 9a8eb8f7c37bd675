"""Sinkhorn iterations, forward and backward, against POT's batched solvers."""

from __future__ import annotations

import statistics
from pathlib import Path

import ot
import torch
from measure import Line, Row, in_turns, ratios
from otdrg.sinkhorn_otdrg import cost_matrix, sinkhorn

TITLE = "Sinkhorn"
ABOUT = (
    "64 problems of 49 image tokens and 14 labels with features of 576 dimensions, 100 iterations without early "
    "stopping, and the gradient of the transport cost with respect to the costs. POT solves them in batches in "
    'the log domain (`ot.solve_batch`), with its graph (`grad="envelope"`) and without it (`grad="detach"`, the '
    "plan being the gradient); the faster of the two is compared. *Raw* costs are about 34, far above ε = 0.1."
)
NOTES: tuple[str, ...] = ()
_PROBLEMS, _ROWS, _COLUMNS, _WIDTH, _ITERATIONS = 64, 49, 14, 576, 100


def measure(rounds: int, folder: Path) -> Row:
    lines = []
    for name, normalization, epsilon in (("unit costs, ε = 0.01", "unit", 0.01), ("raw costs, ε = 0.1", "none", 0.1)):
        stream = torch.Generator().manual_seed(0)
        points = [torch.randn(_PROBLEMS, count, _WIDTH, generator=stream) for count in (_ROWS, _COLUMNS)]
        cost = cost_matrix(*points, normalization).requires_grad_()
        works = {
            "ours": lambda c=cost, e=epsilon: ours(c, e),
            "envelope": lambda c=cost, e=epsilon: theirs(c, e, "envelope"),
            "detach": lambda c=cost, e=epsilon: theirs(c, e, "detach"),
        }
        plans = [work() for work in works.values()]
        assert (plans[0] - plans[1]).abs().max() < 1e-4, "the gradients of the two solvers differ"
        seconds = in_turns({key: lambda work=work: [work() for _ in range(5)] for key, work in works.items()}, rounds)
        faster = min(("envelope", "detach"), key=lambda key: statistics.median(seconds[key]))
        lines.append(Line(name, f"time, ours / POT's ({faster})", ratios(seconds["ours"], seconds[faster]), "≤ 0.4"))
    return Row(lines, list(NOTES))


def ours(cost: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The gradient of the mean transport cost."""
    distance = sinkhorn(cost, epsilon, _ITERATIONS, tolerance=0).distance.sum()
    return torch.autograd.grad(distance, cost)[0]


def theirs(cost: torch.Tensor, epsilon: float, gradient: str) -> torch.Tensor:
    solved = ot.solve_batch(cost, epsilon, max_iter=_ITERATIONS, tol=0, grad=gradient, method="log_sinkhorn")
    value = solved.value if gradient == "envelope" else (solved.plan.detach() * cost).sum()
    return torch.autograd.grad(value.sum(), cost)[0]
