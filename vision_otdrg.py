"""The vision encoder (eq. 1): views in, a grid of features out, of any encoder of transformers or timm.

A is the number of views that exist among the (B, V) places of a batch of B studies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from .configuration_otdrg import OTDRGConfig

#: `model_type` of encoders of transformers that compute each token alone up to their blocks.
PATCH_DROPOUT_ENCODERS = ("dinov2", "dinov2_with_registers", "vit")


def encode_pixels(
    tower: PreTrainedModel,
    pixels: torch.Tensor,
    config: OTDRGConfig,
    for_predictor: bool = False,
    patch_dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, ModelOutput]:
    """Features of views, pooled to a grid of P x P tokens, `config.view_grid`.

    Args:
        tower: the encoder.
        pixels (`torch.Tensor` of shape `(A, C, H, W)`)
        config: the model's.
        for_predictor: whether the label predictor reads the features: those of the blocks `config.predictor_layers`, of
            unit variance, are then concatenated after the last ones.
        patch_dropout: share of each view's patches, drawn at random, that the blocks do not read. A token of the grid
            is then the mean of its other patches, or of the view's if it has no other.
        kwargs: the encoder's, such as `output_attentions`.

    Returns:
        The features (A, P * P, D), and the encoder's own output.

    Raises:
        ValueError: the encoder's tokens are not a grid, or all that the predictor reads are coarser than
            `config.predictor_grid`.
    """
    blocks = (config.predictor_layers or ()) if for_predictor else ()
    if blocks:
        kwargs["output_hidden_states"] = True
    image_size = (pixels.shape[-2], pixels.shape[-1])
    with _patch_dropout(tower, image_size, patch_dropout) as kept:
        output = tower(pixels.to(tower.dtype), return_dict=True, **kwargs)
    grids = [_as_grid(_put_back(output.last_hidden_state, kept), tower, image_size)]
    for block in blocks:
        if hasattr(tower, "timm_model"):
            grid = output.hidden_states[block - 1]  # timm's intermediate features are NCHW, and lack the embeddings
        else:
            grid = _as_grid(_put_back(output.hidden_states[block], kept), tower, image_size)
        grids.append(grid)
    finest = max(min(grid.shape[2:]) for grid in grids)
    if for_predictor and (config.predictor_grid or 0) > finest:
        raise ValueError(
            f"OTDRGConfig.predictor_grid={config.predictor_grid}: expected at most {finest}, the side of the grid of "
            f"the encoder's features for views of {image_size[0]} x {image_size[1]} pixels"
        )
    pooled = (_pool(grid, config.view_grid) for grid in grids)
    last, *others = [_mean_of_kept(tokens) if kept else tokens for tokens in pooled]
    # The scale of features grows from block to block.
    features = [last, *(F.layer_norm(tokens, tokens.shape[-1:]) for tokens in others)]
    return torch.cat(features, dim=-1), output


@contextmanager
def _patch_dropout(tower: PreTrainedModel, image_size: tuple[int, int], share: float) -> Iterator[list]:
    """Let the encoder's blocks read only some tokens of each view.

    Yields:
        A list that holds after a forward pass the places (A, K) of these tokens and the number of all; empty for 0.
    """
    kept: list = []
    if share == 0:
        yield kept
        return

    def drop(module, inputs, tokens: torch.Tensor) -> torch.Tensor:
        count, side = tokens.shape[1], tower.config.patch_size
        patches = (image_size[0] // side) * (image_size[1] // side)
        order = torch.rand(len(tokens), patches, device=tokens.device).argsort(dim=1)
        order = order[:, : max(1, round((1 - share) * patches))] + count - patches
        special = torch.arange(count - patches, device=tokens.device).expand(len(tokens), -1)
        places = torch.cat((special, order), dim=1)
        kept[:] = places, count
        return tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[-1]))

    hook = tower.embeddings.register_forward_hook(drop)
    try:
        yield kept
    finally:
        hook.remove()


def _put_back(tokens: torch.Tensor, kept: list) -> torch.Tensor:
    """Tokens (A, K, D) in their places among all, 0 elsewhere, with a last feature that is 1 where there is one.

    Without patch dropout they are returned as they are.
    """
    if not kept:
        return tokens
    places, count = kept
    tokens = F.pad(tokens, (0, 1), value=1.0)
    whole = tokens.new_zeros(len(tokens), count, tokens.shape[-1])
    return whole.scatter(1, places[:, :, None].expand_as(tokens), tokens)


def _mean_of_kept(sums: torch.Tensor) -> torch.Tensor:
    """Means (A, N, D) of the tokens that [`_put_back`] put into each cell; of all cells for one without any."""
    sums = torch.where(sums[..., -1:] > 0, sums, sums.mean(dim=1, keepdim=True))
    return sums[..., :-1] / sums[..., -1:]


def _pool(grid: torch.Tensor, side: int) -> torch.Tensor:
    """A grid of features (A, D, h, w) pooled to tokens (A, side * side, D)."""
    return F.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2)


def _as_grid(output: torch.Tensor, vision_tower: PreTrainedModel, image_size: tuple[int, int]) -> torch.Tensor:
    """An encoder's last hidden state, NHWC, NCHW or tokens after any class tokens, as (B, D, h, w)."""
    timm_model = getattr(vision_tower, "timm_model", None)
    if output.ndim == 4:
        is_nhwc = getattr(timm_model, "output_fmt", None) == "NHWC"
        return output.permute(0, 3, 1, 2) if is_nhwc or output.shape[1] != vision_feature_size(vision_tower) else output
    tokens = output.shape[1]
    patch = getattr(vision_tower.config, "patch_size", None)
    patch = (patch, patch) if isinstance(patch, int) else patch
    height, width = (image_size[0] // patch[0], image_size[1] // patch[1]) if patch else (0, 0)
    if timm_model is not None:
        height = width = round((tokens - timm_model.num_prefix_tokens) ** 0.5)
    elif not 0 < height * width <= tokens:
        # Hierarchical encoders merge patches; what remains is a square and a few tokens before it.
        height = width = int(tokens**0.5)
    if not 0 < height * width <= tokens or tokens - height * width > 16:
        raise ValueError(f"the vision encoder's {tokens} tokens are not a grid for images of {image_size} pixels")
    return output[:, tokens - height * width :].transpose(1, 2).unflatten(2, (height, width))


def vision_feature_size(vision_tower: PreTrainedModel) -> int:
    """D, the size of the encoder's last features."""
    if hasattr(vision_tower, "timm_model"):
        return vision_tower.timm_model.num_features
    config = vision_tower.config
    return config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else config.hidden_size


def encoder_blocks(vision_tower: PreTrainedModel) -> list[nn.Module]:
    """The encoder's transformer blocks, in order; empty if it is not a plain sequence of them."""
    timm_model, config = getattr(vision_tower, "timm_model", None), vision_tower.config
    if timm_model is not None:
        return list(getattr(timm_model, "blocks", ())) if hasattr(timm_model, "patch_embed") else []
    if not _is_plain(config):
        return []
    lists = (list(part) for part in vision_tower.modules() if isinstance(part, nn.ModuleList))
    return next((blocks for blocks in lists if len(blocks) == config.num_hidden_layers), [])


def _is_plain(config: PreTrainedConfig) -> bool:
    """Whether all blocks of an encoder of transformers have features of one size."""
    return not hasattr(config, "depths") and not hasattr(config, "hidden_sizes")


def blocks_feature_size(vision_tower: PreTrainedModel, blocks: Sequence[int]) -> int:
    """Size of the features of some blocks (from 1), concatenated, as the label predictor reads them.

    Raises:
        ValueError: the encoder has no such block, or does not give the features of its blocks.
    """
    if not blocks:
        return 0
    timm_model, config = getattr(vision_tower, "timm_model", None), vision_tower.config
    if timm_model is not None:
        widths = [stage["num_chs"] for stage in getattr(timm_model, "feature_info", [])]
        widths = widths if hasattr(timm_model, "forward_intermediates") else []
    else:
        widths = [config.hidden_size] * config.num_hidden_layers if _is_plain(config) else []
    for block in blocks:
        if block > len(widths):
            expected = f"blocks from 1 to {len(widths)}" if widths else "null, this encoder's blocks cannot be read"
            raise ValueError(f"OTDRGConfig.predictor_layers={list(blocks)}: expected {expected}")
    return sum(widths[block - 1] for block in blocks)


def full_view_mask(views: torch.Tensor, view_mask: torch.Tensor | None, required: bool = True) -> torch.Tensor:
    """`view_mask` (B, V) of `views` (B, V, ...), their pixels or features; each study has a view, if `required`.

    If it is None, views of zeros only do not exist: so the processor, and the encoding of views, pad studies.
    """
    if view_mask is None:
        if required and views.shape[1] == 1:
            return torch.ones(views.shape[:2], dtype=torch.bool, device=views.device)
        view_mask = (views != 0).flatten(2).any(dim=2)
    if view_mask.shape != views.shape[:2]:
        raise ValueError(f"view_mask has shape {tuple(view_mask.shape)}: expected {tuple(views.shape[:2])}")
    if required and not view_mask.any(dim=1).all():
        raise ValueError("a study has no image: a report is only written from at least one view")
    return view_mask.bool()


def existing_views(
    pixel_values: torch.Tensor, view_mask: torch.Tensor | None, required: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The A existing views (A, C, H, W) and their mask (B, V); each study has a view, if `required`."""
    if pixel_values.ndim != 5:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}: expected (studies, views, channels, height, width)"
        )
    view_mask = full_view_mask(pixel_values, view_mask, required)
    return pixel_values[view_mask], view_mask


def unflatten_views(features: torch.Tensor, view_mask: torch.Tensor) -> torch.Tensor:
    """Features (A, ...) of the A existing views as (B, V, ...), 0 where there is no view."""
    unflattened = features.new_zeros(*view_mask.shape, *features.shape[1:])
    unflattened[view_mask] = features
    return unflattened


__all__ = [
    "PATCH_DROPOUT_ENCODERS",
    "blocks_feature_size",
    "encode_pixels",
    "encoder_blocks",
    "existing_views",
    "full_view_mask",
    "unflatten_views",
    "vision_feature_size",
]
