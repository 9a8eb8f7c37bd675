"""The attention that a model computes fastest with, by device and type."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from ..modeling_otdrg import OTDRGForReportGeneration

#: Name of [`recomputed_attention`] in transformers.
RECOMPUTED = "otdrg_recomputed"
#: By device and type, what was fastest in `benchmarks/rows/attention.py`, where this is not the default, `sdpa`.
FASTEST = {("cpu", torch.bfloat16): RECOMPUTED}


def use_fastest_attention(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Let the encoders and the LLM of a model compute attention as is fastest where they are.

    Parts that were loaded with another implementation than transformers' default keep it.

    Args:
        model: on its device; OTDRG, or a module around it.
        dtype: the type that attention is computed in; that of each part's weights by default.
    """
    ours = next(module for module in model.modules() if isinstance(module, OTDRGForReportGeneration))
    for part in (*ours.vision_towers, ours.language_model):
        fastest = FASTEST.get((part.device.type, dtype or part.dtype))
        is_default = part.config._attn_implementation == "sdpa" and part._supports_attention_backend
        if fastest is not None and is_default:
            part.set_attn_implementation(fastest)


def recomputed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention by two matrix products, as transformers' `eager`, which the backward pass computes again.

    It needs no more memory than `sdpa`. In bfloat16 on a CPU its products are faster than the kernel of `sdpa`.

    Args:
        query (`torch.Tensor` of shape `(B, H, L, D)`), key, value (`torch.Tensor` of shape `(B, H', S, D)`): H is a
            multiple of H'.
        attention_mask (`torch.Tensor` of shape `(B, 1, L, S)`, *optional*): added to the scores.
        scaling: of the scores; 1 / sqrt(D) by default.
        dropout: of the weights.
        module, kwargs: not used.

    Returns:
        (B, L, H, D), and None in place of the weights.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        scores = (query * scaling) @ key.mT
        if attention_mask is not None:
            scores += attention_mask[..., : key.shape[2]]
        weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        weights = nn.functional.dropout(weights, dropout)
        return (weights @ value).transpose(1, 2).contiguous()

    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return checkpoint(attend, query, key, value, use_reentrant=False, preserve_rng_state=dropout > 0), None
    return attend(query, key, value), None


AttentionInterface.register(RECOMPUTED, recomputed_attention)
AttentionMaskInterface.register(RECOMPUTED, eager_mask)

__all__ = ["FASTEST", "RECOMPUTED", "recomputed_attention", "use_fastest_attention"]
