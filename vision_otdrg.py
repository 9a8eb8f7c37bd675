"""The vision encoder (eq. 1): views in, a grid of features out, of any encoder of transformers or timm.

A is the number of views that exist among the (B, V) places of a batch of B studies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from .configuration_otdrg import OTDRGConfig


def encode_pixels(
    tower: PreTrainedModel,
    pixels: torch.Tensor,
    config: OTDRGConfig,
    layers: Sequence[int] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, ModelOutput]:
    """Features of views, pooled to a grid of P x P tokens, `config.view_grid`.

    Args:
        tower: the encoder.
        pixels (`torch.Tensor` of shape `(A, C, H, W)`)
        config: the model's.
        layers: where the label predictor reads the features: the blocks whose features, of unit variance, are
            concatenated after the last ones.
        kwargs: the encoder's, such as `output_attentions`.

    Returns:
        The features (A, P * P, D), and the encoder's own output.

    Raises:
        ValueError: the encoder's tokens are not a grid, or all that the predictor reads are coarser than
            `config.predictor_grid`.
    """
    if layers:
        kwargs["output_hidden_states"] = True
    output = tower(pixels.to(tower.dtype), return_dict=True, **kwargs)
    image_size = (pixels.shape[-2], pixels.shape[-1])
    grids = [_as_grid(output.last_hidden_state, tower, image_size)]
    for layer in layers or ():
        if hasattr(tower, "timm_model"):
            grid = output.hidden_states[layer - 1]  # timm's intermediate features are NCHW, and lack the embeddings
        else:
            grid = _as_grid(output.hidden_states[layer], tower, image_size)
        grids.append(grid)
    finest = max(min(grid.shape[2:]) for grid in grids)
    if layers is not None and (config.predictor_grid or 0) > finest:
        raise ValueError(
            f"OTDRGConfig.predictor_grid={config.predictor_grid}: expected at most {finest}, the side of the grid of "
            f"the encoder's features for views of {image_size[0]} x {image_size[1]} pixels"
        )
    last, *others = [_pool(grid, config.view_grid) for grid in grids]
    # The scale of features grows from block to block.
    features = [last, *(F.layer_norm(tokens, tokens.shape[-1:]) for tokens in others)]
    return torch.cat(features, dim=-1), output


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


def layers_size(vision_tower: PreTrainedModel, layers: Sequence[int]) -> int:
    """Size of the features that the label predictor reads of these blocks of the encoder.

    Raises:
        ValueError: the encoder has no such block, or does not give the features of its blocks.
    """
    if not layers:
        return 0
    timm_model, config = getattr(vision_tower, "timm_model", None), vision_tower.config
    if timm_model is not None:
        widths = [block["num_chs"] for block in getattr(timm_model, "feature_info", [])]
        widths = widths if hasattr(timm_model, "forward_intermediates") else []
    else:
        is_plain = not hasattr(config, "depths") and not hasattr(config, "hidden_sizes")
        widths = [config.hidden_size] * config.num_hidden_layers if is_plain else []
    for layer in layers:
        if layer > len(widths):
            expected = f"blocks from 1 to {len(widths)}" if widths else "null, this encoder's blocks cannot be read"
            raise ValueError(f"OTDRGConfig.predictor_layers={list(layers)}: expected {expected}")
    return sum(widths[layer - 1] for layer in layers)


def full_view_mask(views: torch.Tensor, view_mask: torch.Tensor | None) -> torch.Tensor:
    """`view_mask` (B, V) of `views` (B, V, ...), all true if it is None; checks that each study has a view."""
    if view_mask is None:
        return torch.ones(views.shape[:2], dtype=torch.bool, device=views.device)
    if view_mask.shape != views.shape[:2]:
        raise ValueError(f"view_mask has shape {tuple(view_mask.shape)}: expected {tuple(views.shape[:2])}")
    if not view_mask.any(dim=1).all():
        raise ValueError("a study has no image: a report is only written from at least one view")
    return view_mask.bool()


def existing_views(pixel_values: torch.Tensor, view_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The A existing views (A, C, H, W) and their mask (B, V)."""
    if pixel_values.ndim != 5:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}: expected (studies, views, channels, height, width)"
        )
    view_mask = full_view_mask(pixel_values, view_mask)
    return pixel_values[view_mask], view_mask


def unflatten_views(features: torch.Tensor, view_mask: torch.Tensor) -> torch.Tensor:
    """Features (A, ...) of the A existing views as (B, V, ...), 0 where there is no view."""
    unflattened = features.new_zeros(*view_mask.shape, *features.shape[1:])
    unflattened[view_mask] = features
    return unflattened


__all__ = ["encode_pixels", "existing_views", "full_view_mask", "layers_size", "unflatten_views", "vision_feature_size"]
