"""Entropic optimal transport between image tokens and label features (3.3.2): cost, Sinkhorn iterations, entropy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

#: Iterations between two checks of the marginals.
CHECK_EVERY = 5
#: Largest factor, and inverse of the smallest, by which iterations may scale a plan outside of the log domain.
MAXIMUM_SCALING = 1e9


class SinkhornOutput(NamedTuple):
    """
    Result of [`sinkhorn`] for B problems of M rows and N columns, in float32 (float64 for a float64 cost).

    Args:
        distance (`torch.Tensor` of shape `(B,)`): the transport cost <T, C>.
        regularized (`torch.Tensor` of shape `(B,)`): the minimised objective <T, C> + epsilon * sum T log T.
        plan (`torch.Tensor` of shape `(B, M, N)`): the transport plan T; 0 in masked rows and columns.
        iterations (`torch.Tensor` of shape `(B,)`): iterations each problem ran.
        marginal_error (`torch.Tensor` of shape `(B,)`): L1 distance of the plan's row sums from their marginal.
    """

    distance: torch.Tensor
    regularized: torch.Tensor
    plan: torch.Tensor
    iterations: torch.Tensor
    marginal_error: torch.Tensor


def cost_matrix(x: torch.Tensor, y: torch.Tensor, normalization: str = "none") -> torch.Tensor:
    """Euclidean distance of every row of `x` (B, M, D) from every row of `y` (B, N, D), float32 (B, M, N) (eq. 6).

    `normalization="unit"` scales every feature to length 1 first. Coincident points have cost and gradient 0.
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x, y = x.to(dtype), y.to(dtype)
        if normalization == "unit":
            x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def sinkhorn(
    cost: torch.Tensor,
    epsilon: float = 0.1,
    max_iterations: int = 100,
    tolerance: float = 1e-5,
    row_mask: torch.Tensor | None = None,
    column_mask: torch.Tensor | None = None,
    gradient: str = "envelope",
) -> SinkhornOutput:
    r"""Entropic optimal transport between uniform marginals (eqs. 7 and 8, Algorithm 1), computed stably.

    Minimises <T, C> + epsilon * sum T log T over plans T with row sums u and column sums v, uniform over the unmasked
    rows and columns. The iterations are those of Algorithm 1, stabilised: its kernel exp(-C / epsilon) underflows to 0,
    and the result becomes NaN, as soon as costs exceed about 100 epsilon. A problem with no unmasked row or column has
    distance 0 and plan 0.

    Args:
        cost (`torch.Tensor` of shape `(B, M, N)`): of any float type and scale; masked entries are ignored.
        epsilon (`float`): weight of the entropy, in units of the cost.
        max_iterations (`int`): maximum number of iterations; each updates the rows and then the columns.
        tolerance (`float`): a problem stops once its marginal error, checked after every 5th iteration, is at most
            this; 0 runs all iterations.
        row_mask, column_mask (`torch.Tensor` of shape `(B, M)` and `(B, N)`, *optional*): true where there is mass.
        gradient (`str`): `"envelope"` treats the plan as a constant, so that the derivative of both values with respect
            to the cost is the plan; `"unroll"` differentiates through the iterations.

    Returns:
        [`SinkhornOutput`]

    Raises:
        ValueError: `cost` is not (B, M, N), a mask does not fit it, or epsilon is not above 0.
    """
    if cost.ndim != 3:
        raise ValueError(f"cost has shape {tuple(cost.shape)}: expected (batch, rows, columns)")
    if not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}: expected a number above 0")
    if gradient not in ("envelope", "unroll"):
        raise ValueError(f"gradient is {gradient!r}: expected 'envelope' or 'unroll'")
    batch, rows, columns = cost.shape
    if row_mask is None:
        row_mask = torch.ones(batch, rows, dtype=torch.bool, device=cost.device)
    if column_mask is None:
        column_mask = torch.ones(batch, columns, dtype=torch.bool, device=cost.device)
    for name, mask, shape in (("row_mask", row_mask, (batch, rows)), ("column_mask", column_mask, (batch, columns))):
        if tuple(mask.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(mask.shape)}: expected {shape}")

    with torch.autocast(cost.device.type, enabled=False):
        cost = cost.to(torch.float64 if cost.dtype == torch.float64 else torch.float32)
        row_mask, column_mask = row_mask.bool(), column_mask.bool()
        cost = cost.masked_fill(~(row_mask[:, :, None] & column_mask[:, None, :]), 0.0)
        with torch.set_grad_enabled(gradient == "unroll" and torch.is_grad_enabled()):
            plan, iterations, error = _sinkhorn_plan(cost, epsilon, max_iterations, tolerance, row_mask, column_mask)
        distance = (plan * cost).sum(dim=(1, 2))
        return SinkhornOutput(distance, distance - epsilon * plan_entropy(plan), plan, iterations, error)


def _sinkhorn_plan(
    cost: torch.Tensor,
    epsilon: float,
    max_iterations: int,
    tolerance: float,
    row_mask: torch.Tensor,
    column_mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plan, iterations and marginal error.

    A few iterations at a time scale the plan so far, as those of Algorithm 1 scale a kernel. Unlike the kernel, it does
    not underflow (Schmitzer, "Stabilized Sparse Scaling Algorithms for Entropy Regularized Transport Problems", 2019).
    Where they would change it extremely, and where they are differentiated, they are done in the log domain.
    """
    # A problem without mass on one side is solved as if nothing were masked, and its plan set to 0 at the end.
    solvable = row_mask.any(dim=1) & column_mask.any(dim=1)
    row_mask, column_mask = row_mask | ~solvable[:, None], column_mask | ~solvable[:, None]
    mask = row_mask[:, :, None] & column_mask[:, None, :]
    # Subtracting a constant from all costs does not change the plan and keeps the float32 exponents more exact.
    shift = cost.masked_fill(~mask, torch.inf).amin(dim=(1, 2), keepdim=True)
    log_kernel = ((shift - cost) / epsilon).masked_fill(~mask, 0.0)
    rows, columns = _Side.of(row_mask[:, :, None], cost.dtype), _Side.of(column_mask[:, None, :], cost.dtype)

    # f and g are the logarithms of Algorithm 1's alpha and beta; beta starts at 1 / N.
    f, g = rows.masked(torch.zeros_like(rows.mass)), columns.masked(columns.log_mass.expand_as(columns.mass))
    plan = (log_kernel + f + g).exp()
    active = torch.ones_like(solvable)
    iterations = torch.zeros(len(cost), dtype=torch.long, device=cost.device)
    for done in range(0, max_iterations, CHECK_EVERY):
        count = min(CHECK_EVERY, max_iterations - done)
        if torch.is_grad_enabled():
            new_f, new_g = _iterate_logs(log_kernel, rows, columns, g, count)
        else:
            new_f, new_g, moderate = _scale(plan, rows, columns, f, g, count)
            if not moderate.all():
                logs = _iterate_logs(log_kernel, rows, columns, g, count)
                new_f, new_g = torch.where(moderate, new_f, logs[0]), torch.where(moderate, new_g, logs[1])
        # A problem that has converged is left unchanged, so that a batch gives exactly what its problems give alone.
        keep = active[:, None, None]
        f, g = torch.where(keep, new_f, f), torch.where(keep, new_g, g)
        plan = (log_kernel + f + g).exp()
        iterations = iterations + count * active
        if tolerance > 0:
            active = active & (_row_error(plan, rows) > tolerance)
            if not active.any():
                break
    plan = torch.where(solvable[:, None, None] & mask, plan, torch.zeros_like(plan))
    return plan, iterations * solvable, _row_error(plan, rows).detach() * solvable


class _Side(NamedTuple):
    """The rows (B, M, 1) or the columns (B, 1, N) of a problem: their uniform masses, 0 where they are masked."""

    mask: torch.Tensor
    mass: torch.Tensor
    log_mass: torch.Tensor
    #: 1 where masked, else 0.
    absent: torch.Tensor

    @classmethod
    def of(cls, mask: torch.Tensor, dtype: torch.dtype) -> _Side:
        log_mass = -mask.sum(dim=(1, 2), keepdim=True).to(dtype).log()
        return cls(mask, log_mass.exp() * mask, log_mass, (~mask).to(dtype))

    def masked(self, potential: torch.Tensor) -> torch.Tensor:
        """The potential, minus infinity where masked, so that masked rows and columns add nothing to any sum."""
        return potential.masked_fill(~self.mask, -torch.inf)


def _row_error(plan: torch.Tensor, rows: _Side) -> torch.Tensor:
    return (plan.sum(dim=2, keepdim=True) - rows.mass).abs().sum(dim=(1, 2))


def _iterate_logs(
    log_kernel: torch.Tensor, rows: _Side, columns: _Side, g: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The potentials after some iterations from g."""
    for _ in range(count):
        f = rows.masked(rows.log_mass - (log_kernel + g).logsumexp(dim=2, keepdim=True))
        g = columns.masked(columns.log_mass - (log_kernel + f).logsumexp(dim=1, keepdim=True))
    return f, g


def _scale(
    plan: torch.Tensor, rows: _Side, columns: _Side, f: torch.Tensor, g: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The potentials after some iterations from the plan of f and g, and whether they are exact, (B, 1, 1).

    Entries of the plan that underflow are less than 1e-20 after scalings up to `MAXIMUM_SCALING`.
    """
    b = torch.ones_like(g)
    for _ in range(count):
        a = (rows.mass + rows.absent) / torch.baddbmm(rows.absent, plan, b.mT)
        b = (columns.mass + columns.absent) / torch.baddbmm(columns.absent, a.mT, plan)
    log_a, log_b = a.log(), b.log()
    largest = torch.maximum(log_a.abs().amax(dim=1, keepdim=True), log_b.abs().amax(dim=2, keepdim=True))
    return f + log_a, g + log_b, largest < math.log(MAXIMUM_SCALING)


def plan_entropy(plan: torch.Tensor) -> torch.Tensor:
    """Entropy -sum T log T of transport plans (B, M, N), in nats, (B,)."""
    # The derivative of entr is infinite at 0, where masked and underflowed entries are.
    entropy = torch.special.entr(plan.clamp(min=torch.finfo(plan.dtype).tiny))
    return entropy.masked_fill(plan == 0, 0.0).sum(dim=(1, 2))


__all__ = ["SinkhornOutput", "cost_matrix", "plan_entropy", "sinkhorn"]
