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


def prior_names(processor: OTDRGProcessor, columns: Sequence[str]) -> list[str]:
    """The columns of priors that a model reads, out of those that there are."""
    names = {"images": ("prior_images", "prior_view_features"), "report": ("prior_report",)}
    read = [name for kind, these in names.items() for name in these if processor.priors in (kind, "both")]
    return [name for name in read if name in columns]


def collate_priors(
    processor: OTDRGProcessor, rows: list[dict[str, Any]]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The views of the priors of studies, and the arguments of `encode_text` that tell of them.

    Both are empty if the model reads no priors, or no study has one.

    Args:
        processor: the model's.
        rows: with `prior_images` or `prior_view_features`, and `prior_report`, where there are any; as of
            [`collate_views`].
    """
    views, asked = {}, {}
    if processor.priors in ("images", "both"):
        if any(row.get("prior_view_features") is not None for row in rows):
            views = _padded_features([row.get("prior_view_features") for row in rows])
        elif any(row.get("prior_images") for row in rows):
            pictures = [_pictures(processor, row, "prior_images", "prior view") for row in rows]
            views = processor.encode_priors(pictures)
        if views:
            asked["prior_views"] = views["prior_view_mask"].sum(dim=1).tolist()
    if processor.priors in ("report", "both"):
        reports = [(row.get("prior_report") or "").strip() or None for row in rows]
        asked |= {"prior_report": reports} if any(reports) else {}
    return views, asked


def _padded_features(features: list[torch.Tensor | None]) -> dict[str, torch.Tensor]:
    some = next(views for views in features if views is not None)
    stacked = [some[:0] if views is None else views for views in features]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(views), dtype=torch.bool) for views in stacked], True)
    return {
        "prior_view_features": torch.nn.utils.rnn.pad_sequence(stacked, batch_first=True),
        "prior_view_mask": mask,
    }


def _pictures(
    processor: OTDRGProcessor, row: dict[str, Any], column: str = "images", what: str = "view"
) -> list[Image.Image]:
    study = f"study {row.get('id')!r}"
    if not row.get(column) and column == "images":
        raise ValueError(f"{study} has no view: a report is only written from at least one")
    pictures = []
    for number, image in enumerate(row.get(column) or ()):
        name = f"{study}, {what} {number}"
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
        priors, asked = collate_priors(self.processor, rows)
        indications = indications_of(rows) if self.indication else None
        counts = views["view_mask"].sum(dim=1).tolist()
        return self.processor.encode_text(counts, indication=indications, **asked) | views | priors


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


__all__ = [
    "FindingCollator",
    "PromptCollator",
    "collate_priors",
    "collate_views",
    "expand_tags",
    "indications_of",
    "prior_names",
]
