"""Entropic optimal transport between image tokens and label features (3.3.2): cost, Sinkhorn iterations, entropy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F


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
    rows and columns. The iterations are those of Algorithm 1 in the log domain: its kernel exp(-C / epsilon) underflows
    to 0, and the result becomes NaN, as soon as costs exceed about 100 epsilon. A problem with no unmasked row or
    column has distance 0 and plan 0.

    Args:
        cost (`torch.Tensor` of shape `(B, M, N)`): of any float type and scale; masked entries are ignored.
        epsilon (`float`): weight of the entropy, in units of the cost.
        max_iterations (`int`): maximum number of iterations; each updates the rows and then the columns.
        tolerance (`float`): a problem stops once its marginal error is at most this; 0 runs all iterations.
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
    """Plan, iterations and marginal error."""
    # A problem without mass on one side is solved as if nothing were masked, and its plan set to 0 at the end.
    solvable = row_mask.any(dim=1) & column_mask.any(dim=1)
    row_mask, column_mask = row_mask | ~solvable[:, None], column_mask | ~solvable[:, None]
    mask = row_mask[:, :, None] & column_mask[:, None, :]
    # Subtracting a constant from all costs does not change the plan and keeps the float32 exponents more exact.
    shift = cost.masked_fill(~mask, torch.inf).amin(dim=(1, 2), keepdim=True)
    log_kernel = ((shift - cost) / epsilon).masked_fill(~mask, 0.0)
    # Masked rows and columns add nothing to the sums below because their own potential stays at minus infinity.
    log_u = -row_mask.sum(dim=1, keepdim=True).to(cost.dtype).log()
    log_v = -column_mask.sum(dim=1, keepdim=True).to(cost.dtype).log()
    u = log_u.exp() * row_mask

    def log_row_sums(g):
        return (log_kernel + g[:, None, :]).logsumexp(dim=2)

    # f and g are the logarithms of Algorithm 1's alpha and beta; beta starts at 1 / N.
    g = log_v.expand(column_mask.shape).masked_fill(~column_mask, -torch.inf)
    f = torch.zeros_like(u)
    row_sums = log_row_sums(g)
    active = torch.ones_like(solvable)
    iterations = torch.zeros(len(cost), dtype=torch.long, device=cost.device)
    for _ in range(max_iterations):
        new_f = (log_u - row_sums).masked_fill(~row_mask, -torch.inf)
        new_g = (log_v - (log_kernel + new_f[:, :, None]).logsumexp(dim=1)).masked_fill(~column_mask, -torch.inf)
        # A problem that has converged is left unchanged, so that a batch gives exactly what its problems give alone.
        keep = active[:, None]
        f, g = torch.where(keep, new_f, f), torch.where(keep, new_g, g)
        row_sums = torch.where(keep, log_row_sums(g), row_sums)
        iterations = iterations + active
        if tolerance > 0:
            active = active & (((f + row_sums).exp() - u).abs().sum(dim=1) > tolerance)
            if not active.any():
                break
    plan = (log_kernel + f[:, :, None] + g[:, None, :]).exp()
    plan = torch.where(solvable[:, None, None] & mask, plan, torch.zeros_like(plan))
    marginal_error = torch.where(solvable, (plan.sum(dim=2) - u).abs().sum(dim=1), torch.zeros_like(u[:, 0]))
    return plan, iterations * solvable, marginal_error.detach()


def plan_entropy(plan: torch.Tensor) -> torch.Tensor:
    """Entropy -sum T log T of transport plans (B, M, N), in nats, (B,)."""
    # The derivative of entr is infinite at 0, where masked and underflowed entries are.
    entropy = torch.special.entr(plan.clamp(min=torch.finfo(plan.dtype).tiny))
    return entropy.masked_fill(plan == 0, 0.0).sum(dim=(1, 2))


__all__ = ["SinkhornOutput", "cost_matrix", "plan_entropy", "sinkhorn"]
