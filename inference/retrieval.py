"""Retrieval by a model's own image features: reports of the training studies that resemble a study."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from ..bank_otdrg import ReportBank, pool_views, probe_features
from ..metrics.retrieval import nearest_neighbours
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from ..runtime.processes import is_sharded
from ..runtime.shared_work import fixed_blocks, share_work
from ..studies.streaming import StreamedStudies
from .features import CachedStudies, encode_batches

#: Most training studies of a report bank: the utilities of all pairs of its reports are held in memory.
MOST_STUDIES = 4000


class RetrievedReports(NamedTuple):
    """What [`retrieve_reports`] found for N studies.

    Args:
        nearest: N reports, those of the nearest training study.
        expected: N reports, those with the highest expected utility.
        bank: of the training reports.
    """

    nearest: list[str]
    expected: list[str]
    bank: ReportBank


def retrieve_reports(
    queries: np.ndarray,
    keys: np.ndarray,
    studies: Dataset | CachedStudies,
    training: Dataset | StreamedStudies | CachedStudies,
    seed: int = 0,
    indication: bool = False,
) -> RetrievedReports:
    """Reports of training studies by their images, without a decoder.

    The nearest study is that with the highest cosine of [`pooled_features`]. The expected utility of a report is its
    mean utility against the reports of the bank, weighted by the images and, if requested, the
    indications ([`ReportBank`]).

    Args:
        queries: (N, D) pooled features of the studies.
        keys: (M, D) those of the training studies.
        studies: rows with `indication`.
        training: rows with `report`; the bank has [`MOST_STUDIES`] of them, drawn by `seed`.
        indication: whether the studies' indications count.
    """
    reports = list(training["report"])
    nearest = nearest_neighbours(queries, keys, 1)[:, 0]
    drawn = _draw_studies(len(reports), seed)
    theirs = training["indication"] if indication else [None] * len(reports)
    bank = ReportBank([reports[place] for place in drawn], keys[drawn], indications=[theirs[place] for place in drawn])
    weights = bank.weights(queries, studies["indication"] if indication else None)
    best = (weights @ bank.own_utilities().T).argmax(axis=1)
    return RetrievedReports([reports[place] for place in nearest], [bank.reports[place] for place in best], bank)


def build_bank(
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    training: Dataset | StreamedStudies | CachedStudies,
    licences: Sequence[str],
    batch_size: int = 8,
    seed: int = 0,
    limit: int = MOST_STUDIES,
) -> ReportBank:
    """The report bank of training studies, at most `limit` of them, drawn by `seed`; other arguments as above.

    Raises:
        ValueError: no study has a report.
    """
    places = [place for place, report in enumerate(training["report"]) if report.split()]
    if not places:
        raise ValueError("no training study has a report: expected some, for the report bank")
    chosen = training.select([places[place] for place in _draw_studies(len(places), seed, limit)])
    features = pooled_features(model, processor, chosen, batch_size)
    return ReportBank(
        list(chosen["report"]),
        features,
        licences=licences,
        probe=probe_features(model, processor),
        indications=list(chosen["indication"]) if "indication" in chosen.column_names else None,
    )


def _draw_studies(count: int, seed: int, most: int = MOST_STUDIES) -> list[int]:
    """The positions of at most `most` of `count` studies, in order."""
    return sorted(random.Random(seed).sample(range(count), min(count, most)))


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
    ids = list(studies["id"])

    def pool(blocks: Sequence[Sequence[int]]) -> Iterator[list[dict[str, Any]]]:
        # Selected at once, because streamed studies are read from the start each time.
        rows = iter(studies.select([place for block in blocks for place in block]))
        for block in blocks:
            batches = encode_batches(model, processor, islice(rows, len(block)), len(block))
            yield [
                {"id": row["id"], "features": means}
                for batch, features, view_mask in batches
                for row, means in zip(batch, pool_views(features, view_mask).cpu().numpy(), strict=True)
            ]

    pooled = share_work(ids, fixed_blocks(len(ids), batch_size), pool, even=is_sharded(model))
    return np.stack([pooled[study]["features"] for study in ids])


__all__ = ["MOST_STUDIES", "RetrievedReports", "build_bank", "pooled_features", "retrieve_reports"]
