"""The contrastive loss (3.2.2, eq. 2), its negatives gathered from all processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F


def info_nce(
    anchors: torch.Tensor,
    positives: torch.Tensor,
    groups: torch.Tensor,
    keys: torch.Tensor,
    key_groups: torch.Tensor,
    temperature: float,
    similarity: str,
) -> torch.Tensor:
    """Eq. 2 for every anchor: -log(exp(s(a, a+) / t) / (exp(s(a, a+) / t) + sum over k of exp(s(a, k) / t))).

    Args:
        anchors, positives: (A, D).
        groups: (A,); keys of an anchor's own group are not its negatives.
        keys, key_groups: (K, D) and (K,), the negatives of anchors of other groups.
        temperature: t.
        similarity: "cosine", or "euclidean" for the distance, negated.

    Returns:
        (A,), 0 where an anchor has no negative.
    """
    # Under autocast as well: similarities in bfloat16 have two digits.
    with torch.autocast(anchors.device.type, enabled=False):
        anchors, positives, keys = anchors.float(), positives.float(), keys.float()
        if similarity == "cosine":
            anchors, positives, keys = (F.normalize(part, dim=-1) for part in (anchors, positives, keys))
            positive, others = (anchors * positives).sum(dim=-1), anchors @ keys.T
        else:
            positive = -(anchors - positives).norm(dim=-1)
            others = -torch.cdist(anchors, keys, compute_mode="donot_use_mm_for_euclid_dist")
        others = others.masked_fill(groups[:, None] == key_groups[None], -torch.inf)
        logits = torch.cat((positive[:, None], others), dim=1) / temperature
        return logits.logsumexp(dim=1) - logits[:, 0]


class _AllGather(torch.autograd.Function):
    """(N, D) of every process as (processes, N, D); the gradient of each part comes back from all processes."""

    @staticmethod
    def forward(ctx, tensor):
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


def gather(features: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D) and groups (N,) of all processes, whose N may differ; with gradient.

    Every process must call it, with features of one width.
    """
    if not _distributed():
        return features, groups
    groups, missing = _gather_padded(groups)
    features = _AllGather.apply(F.pad(features, (0, 0, 0, missing)))
    return features[groups >= 0], groups[groups >= 0]


def gather_groups(groups: torch.Tensor) -> torch.Tensor:
    """Groups (N,), at least 0, of all processes, in the order of [`gather`]."""
    if not _distributed():
        return groups
    groups, _ = _gather_padded(groups)
    return groups[groups >= 0]


def _gather_padded(groups: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(processes, longest), -1 where a process has fewer, and how many this one lacks."""
    longest = torch.tensor(len(groups), device=groups.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    missing = int(longest) - len(groups)
    return _AllGather.apply(F.pad(groups, (0, missing), value=-1)), missing


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def global_mean(losses: torch.Tensor, total: int) -> torch.Tensor:
    """What this process has to give for the mean over processes to be that over all `total` anchors."""
    processes = dist.get_world_size() if _distributed() else 1
    return losses.sum() * processes / total


__all__ = ["gather", "gather_groups", "global_mean", "info_nce"]
