"""Retrieval by a model's own image features: the reports of the training studies nearest to a study."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from ..metrics.retrieval import NEIGHBOURS, consensus, nearest_neighbours
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from ..studies.streaming import StreamedStudies
from .features import CachedStudies, encode_batches
from .processes import process_share


class RetrievedReports(NamedTuple):
    """What [`retrieve_reports`] found for N studies.

    Args:
        nearest: N reports, those of the nearest training study.
        consensus: N reports: of those of the nearest studies, the one most similar to the others.
        neighbours: number of nearest studies that the consensus is chosen from.
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
        neighbours: number of nearest studies for the consensus; at most all training studies.
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
    """(N, D): each study's view features, averaged over views and image tokens, in the order of `studies["id"]`.

    If the predictor has its own encoder, D holds the features of both. Every process of a distributed run
    must call it; all get the whole.

    Args:
        model, processor: its type is left as it is.
        studies: rows with `id` and `images`, or those of [`cache_features`].
        batch_size: studies encoded at a time.
    """
    rows = studies.select(process_share(len(studies)))
    pooled: dict[str, np.ndarray] = {}
    for batch, features, view_mask in encode_batches(model, processor, rows, batch_size):
        # Features are 0 where there is no view.
        means = features.float().mean(dim=2).sum(dim=1) / view_mask.sum(dim=1, keepdim=True)
        pooled.update(zip((row["id"] for row in batch), means.cpu().numpy(), strict=True))
    if PartialState().num_processes > 1:
        for share in gather_object([pooled]):
            pooled.update(share)
    return np.stack([pooled[study] for study in studies["id"]])


__all__ = ["RetrievedReports", "pooled_features", "retrieve_reports"]
