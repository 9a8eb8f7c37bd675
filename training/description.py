"""What a reader of a model's figures asks of the studies behind them: whose, on which terms, and what they show."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset

from ..findings_otdrg import FINDINGS, POSITIVE
from ..studies.card import collection_name
from ..studies.source import VIEWS
from ..studies.streaming import StreamedStudies
from .build import StudySplits


def describe_studies(studies: StudySplits) -> dict[str, dict[str, Any]]:
    """Of each split, ready for JSON: the number of `studies`; the names of their `collections`; their `licences`, ""
    where one is not stated; how many views there are of each kind (`views`) and how many studies have so many views
    (`views_a_study`), None of streamed studies, whose images are not counted; of how many studies the states of the
    findings are known (`labelled`), and in how many of these each finding is positive (`positives`).
    """
    return {split: _described(rows) for split, rows in studies.items()}


def _described(rows: Dataset | StreamedStudies) -> dict[str, Any]:
    origins = _origins(rows)
    states = np.array([row for row in rows["finding_states"] if row is not None], dtype=int).reshape(-1, len(FINDINGS))
    positives = (states == POSITIVE).sum(axis=0).tolist()
    described: dict[str, Any] = {
        "studies": len(rows),
        "collections": sorted({collection_name(source, licence) for source, licence in origins}),
        "licences": sorted({licence for _, licence in origins}),
        "views": None,
        "views_a_study": None,
        "labelled": len(states),
        "positives": dict(zip(FINDINGS, positives, strict=True)),
    }
    if isinstance(rows, Dataset):
        views = list(rows["views"])
        kinds = Counter(VIEWS[view] for study in views for view in study)
        numbers = Counter(map(len, views))
        described["views"] = {kind: kinds[kind] for kind in VIEWS if kinds[kind]}
        described["views_a_study"] = {str(number): numbers[number] for number in sorted(numbers)}
    return described


def _origins(rows: Dataset | StreamedStudies) -> set[tuple[str, str]]:
    """The sources and licences that studies have; of streamed ones, those of the shards they lie in."""
    if isinstance(rows, Dataset):
        return set(zip(rows["source"], rows["licence"], strict=True))
    found: set[tuple[str, str]] = set()
    for shard in rows.shards:
        table = pq.read_table(shard, columns=["source", "licence"]).group_by(["source", "licence"]).aggregate([])
        found.update(zip(table["source"].to_pylist(), table["licence"].to_pylist(), strict=True))
    return found


__all__ = ["describe_studies"]
