"""Collate rows of studies into batches of the model's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image

from ..image_processing_otdrg import read_view
from ..processing_otdrg import OTDRGProcessor


def collate_views(processor: OTDRGProcessor, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The views of B studies, and `view_mask` (B, V).

    Args:
        processor: the model's.
        rows: with `id` and `images`, each an argument of [`read_view`] or a dictionary `{"bytes", "path"}` of its
            file; or with `view_features` (V, tokens, D) instead of `images`.

    Returns:
        `pixel_values` (B, V, 3, H, W) or `view_features` (B, V, tokens, D), and the mask.

    Raises:
        ValueError: a view cannot be read; the message names the study.
    """
    if "view_features" not in rows[0]:
        return processor.encode_images([_pictures(processor, row) for row in rows])
    features = [row["view_features"] for row in rows]
    view_mask = torch.zeros(len(rows), max(map(len, features)), dtype=torch.bool)
    for row, views in enumerate(features):
        view_mask[row, : len(views)] = True
    return {"view_features": torch.nn.utils.rnn.pad_sequence(features, batch_first=True), "view_mask": view_mask}


def _pictures(processor: OTDRGProcessor, row: dict[str, Any]) -> list[Image.Image]:
    study = f"study {row.get('id')!r}"
    if not row["images"]:
        raise ValueError(f"{study} has no view: a report is only written from at least one")
    pictures = []
    for number, image in enumerate(row["images"]):
        name = f"{study}, view {number}"
        if isinstance(image, dict):
            name = name if image["bytes"] is not None else f"{name}, {image['path']}"
            image = image["path"] if image["bytes"] is None else image["bytes"]
        pictures.append(read_view(image, processor.max_image_pixels, name))
    return pictures


class PromptCollator:
    """Batches for generation: views and prompts, padded on the left, without reports and finding states.

    Args:
        processor: the model's.
        indication: whether prompts contain the studies' indications.
    """

    def __init__(self, processor: OTDRGProcessor, indication: bool = False):
        self.processor = processor
        self.indication = indication

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        views = collate_views(self.processor, rows)
        indications = indications_of(rows) if self.indication else None
        return self.processor.encode_text(views["view_mask"].sum(dim=1).tolist(), indication=indications) | views


class FindingCollator:
    """Batches for the predictor stage: views, the true states as `finding_labels`, and what else the predictor reads.

    Args:
        processor: the model's.
        tags: names of the auxiliary target, for `tag_labels`; studies whose tags are unknown have -100.
        indication: whether the predictor reads indications, if it can.
    """

    def __init__(self, processor: OTDRGProcessor, tags: Sequence[str] | None = None, indication: bool = True):
        self.processor = processor
        self.tags = tags
        self.indication = indication and processor.indication_reader != "report"

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {
            **collate_views(self.processor, rows),
            "finding_labels": torch.tensor([row["finding_states"] for row in rows]),
        }
        if self.tags is not None:
            batch["tag_labels"] = torch.tensor([_tag_labels(row["tags"], self.tags) for row in rows])
        if self.indication:
            batch |= self.processor.encode_indications(indications_of(rows))
        return batch


def expand_tags(tags: Iterable[str] | None) -> set[str]:
    """The tags of a study and what they are kinds of: "A/b" is also "A"."""
    parts = [tag.split("/") for tag in tags or ()]
    return {"/".join(names[:length]) for names in parts for length in range(1, len(names) + 1)}


def _tag_labels(tags: Iterable[str] | None, known: Sequence[str]) -> list[int]:
    mine = expand_tags(tags)
    return [-100 if tags is None else int(tag in mine) for tag in known]


def indications_of(rows: list[dict[str, Any]]) -> list[str | None]:
    return [(row["indication"] or "").strip() or None for row in rows]


__all__ = ["FindingCollator", "PromptCollator", "collate_views", "expand_tags", "indications_of"]
