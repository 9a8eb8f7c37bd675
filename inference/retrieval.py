"""Retrieval by a model's own image features: what training studies that look alike to it have for reports."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import DataLoader

from ..metrics.retrieval import NEIGHBOURS, consensus, nearest_neighbours
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from ..studies.streaming import StreamedStudies
from .collation import collate_views
from .features import CachedStudies
from .processes import open_methods, process_share


class RetrievedReports(NamedTuple):
    """What [`retrieve_reports`] found for N studies.

    Args:
        nearest: N reports, each of the nearest training study.
        consensus: N reports, each the one of the nearest studies' that the others are most like.
        neighbours: how many there were to seek a consensus among.
    """

    nearest: list[str]
    consensus: list[str]
    neighbours: int


def retrieve_reports(
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    studies: Dataset | CachedStudies,
    training: Dataset | StreamedStudies | CachedStudies,
    batch_size: int = 8,
    neighbours: int = NEIGHBOURS,
) -> RetrievedReports:
    """Reports of training studies whose images are nearest, by cosine of [`pooled_features`].

    Every process of a distributed run must call it; all get the whole.

    Args:
        model, processor: whose features they are.
        studies: rows with `id` and `images`, or those of [`cache_features`].
        training: the same, with `report`.
        batch_size: studies encoded at a time.
        neighbours: among which a consensus is sought; all, where training has fewer.
    """
    neighbours = min(neighbours, len(training))
    found = nearest_neighbours(
        pooled_features(model, processor, studies, batch_size),
        pooled_features(model, processor, training, batch_size),
        neighbours,
    )
    reports = list(training["report"])
    near = [[reports[place] for place in row] for row in found]
    return RetrievedReports([row[0] for row in near], [row[consensus(row)] for row in near], neighbours)


def pooled_features(
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    studies: Dataset | StreamedStudies | CachedStudies,
    batch_size: int = 8,
) -> np.ndarray:
    """(N, D): of each study the mean of its view features over views and image tokens, in the order of `studies["id"]`.

    Where the predictor reads an encoder of its own, D holds the features of both. Every process of a distributed run
    must call it; all get the whole.

    Args:
        model, processor: its type is left as it is.
        studies: rows with `id` and `images`, or those of [`cache_features`].
        batch_size: studies encoded at a time.
    """
    state = PartialState()

    def collate(rows: list[dict[str, Any]]) -> tuple[list[str], dict[str, torch.Tensor]]:
        return [row["id"] for row in rows], collate_views(processor, rows)

    loader = DataLoader(studies.select(process_share(len(studies))), batch_size=batch_size, collate_fn=collate)
    open_methods(model, "encode_views")
    model.eval()
    pooled: dict[str, np.ndarray] = {}
    for ids, batch in loader:
        features, view_mask = batch.get("view_features"), batch["view_mask"]
        if features is None:
            view_mask = view_mask.to(model.device)
            with torch.no_grad():
                features = model.encode_views(batch["pixel_values"].to(model.device), view_mask)
        # Features are 0 where there is no view.
        sums = features.float().mean(dim=2).sum(dim=1)
        pooled.update(zip(ids, (sums / view_mask.sum(dim=1, keepdim=True)).cpu().numpy(), strict=True))
    if state.num_processes > 1:
        for share in gather_object([pooled]):
            pooled.update(share)
    return np.stack([pooled[study] for study in studies["id"]])


__all__ = ["RetrievedReports", "pooled_features", "retrieve_reports"]
