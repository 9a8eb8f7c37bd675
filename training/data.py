"""Studies of a recipe: built by split, with reports and finding states, and described for `run.json`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset

from ..findings_otdrg import FINDINGS, POSITIVE
from ..inference.features import CachedStudies
from ..labelers import read_states
from ..labelers.as_typed import labeler_of
from ..studies import load_studies
from ..studies.card import collection_name
from ..studies.cleaning import clean_report
from ..studies.loading import load_prepared, undecoded, with_column
from ..studies.placeholders import present_text
from ..studies.schema import UNCLEANED
from ..studies.source import VIEWS
from ..studies.streaming import StreamedStudies
from .recipe import LabelsRecipe, StudiesRecipe

logger = logging.getLogger(__name__)

#: Studies by split; only training studies are ever streamed.
StudySplits = dict[str, Dataset | StreamedStudies]
#: Studies in any of the forms in which they are trained on.
Rows = TypeVar("Rows", Dataset, StreamedStudies, CachedStudies)


def build_studies(
    studies: StudiesRecipe, labels: LabelsRecipe, seed: int = 0, splits: Sequence[str] | None = None
) -> StudySplits:
    """The recipe's studies by split, with `report` cleaned and `finding_states` filled.

    Rows follow `STUDY_FEATURES`, with images as `{"bytes", "path"}`. If the recipe cleans reports, the column
    `uncleaned_report` has them before cleaning.

    Studies without a report are skipped and counted. States come from the CSV for the studies it names, else from the
    labeler, else they are the studies' own. A labeler reads the reports before cleaning.

    Args:
        studies, labels: sections of the recipe.
        seed: of the order of streamed studies.
        splits: the splits to build; by default all there are, which must include training.

    Raises:
        ValueError: no studies in training or in a split of `splits`, training studies with unknown states, or a fault
            in the source or the CSV.
    """
    loaded = _streamed(studies, seed) if studies.streaming else _loaded(studies)
    for split in studies.limit:
        if split not in loaded:
            raise ValueError(f"studies.limit names the split {split}, which {studies.source} does not have here")
    found = {}
    for split, rows in loaded.items():
        if splits is not None and split not in splits:
            continue
        kept = [position for position, report in enumerate(rows["report"]) if present_text(report)]
        if len(kept) < len(rows):
            logger.warning(
                "%s: %d of %d studies skipped: their report is empty", split, len(rows) - len(kept), len(rows)
            )
        kept = kept[: studies.limit.get(split)]
        if kept:
            found[split] = rows.select(kept)
    for split in ["train"] if splits is None else splits:
        if split not in found:
            kind = "training" if split == "train" else split
            raise ValueError(f"studies.source={studies.source!r} gives no {kind} study with a report")
    labelled = _labelled(found, labels, {study for rows in loaded.values() for study in rows["id"]})
    for split, rows in labelled.items():
        unknown = sum(states is None for states in rows["finding_states"])
        if unknown and split == "train":
            raise ValueError(
                f"{unknown} of {len(rows)} training studies have no finding states: set labels.labeler (such as rules) "
                "or give a labels.csv that names all of them"
            )
        if unknown:
            logger.warning("%s: %d of %d studies have no finding states", split, unknown, len(rows))
    cleaned = {split: _cleaned(rows, studies.cleaning) for split, rows in labelled.items()}
    for split, rows in cleaned.items():
        logger.info("%s: %d studies", split, len(rows))
    return {split: undecoded(rows) if isinstance(rows, Dataset) else rows for split, rows in cleaned.items()}


def _loaded(studies: StudiesRecipe) -> StudySplits:
    return load_studies(studies.source, sections=studies.sections, **studies.options)


def _streamed(studies: StudiesRecipe, seed: int) -> StudySplits:
    folder = studies.options["folder"]
    train = StreamedStudies(folder, "train", seed, studies.shuffle_buffer)
    return {"train": train, **load_prepared(folder, leave_out=["train"])}


def _cleaned(rows: Dataset | StreamedStudies, style: str) -> Dataset | StreamedStudies:
    if style == "none":
        return rows
    reports = list(rows["report"])
    return with_column(
        with_column(rows, UNCLEANED, reports), "report", [clean_report(report, style) for report in reports]
    )


def _labelled(splits: StudySplits, labels: LabelsRecipe, ids: Collection[str]) -> StudySplits:
    """The splits with states; a CSV has to name at least one of `ids`, the ids of all studies."""
    if labels.csv is None and labels.labeler is None:
        return splits
    from_csv = read_states(labels.csv) if labels.csv is not None else {}
    labeler = labeler_of(labels.labeler, labels.options) if labels.labeler is not None else None
    if labels.csv is not None and from_csv.keys().isdisjoint(ids):
        raise ValueError(f"labels.csv={labels.csv!r} names none of the studies: expected their ids in its column id")
    labelled = {}
    for split, rows in splits.items():
        reports, states = rows["report"], list(rows["finding_states"])
        others = []
        for position, study in enumerate(rows["id"]):
            if study in from_csv:
                states[position] = from_csv[study].tolist()
            else:
                others.append(position)
        if labeler is not None and others:
            for position, row in zip(others, labeler.label([reports[i] for i in others]), strict=True):
                states[position] = row.tolist()
        labelled[split] = with_column(rows, "finding_states", states)
        logger.info(
            "%s: states of %d studies from %s, of %d from %s",
            split,
            len(rows) - len(others),
            labels.csv or "a CSV",
            len(others),
            f"the labeler {labels.labeler}" if labels.labeler else "the studies themselves",
        )
    return labelled


def known_states(rows: Rows) -> Rows:
    """The studies of `rows` whose finding states are known."""
    return rows.select([position for position, states in enumerate(rows["finding_states"]) if states is not None])


def describe_studies(studies: StudySplits) -> dict[str, dict[str, Any]]:
    """What each split consists of, ready for JSON.

    Returns:
        By split: the number of `studies`; their `collections`; their `licences` ("" if one is not stated); `views` by
        kind and `views_a_study`, the number of studies by their number of views (both None for streamed studies, whose
        images are not counted); `labelled`, the studies with known finding states; and `positives` of each finding
        among these.
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
    """The sources and licences of studies; for streamed studies, those of their shards."""
    if isinstance(rows, Dataset):
        return set(zip(rows["source"], rows["licence"], strict=True))
    found: set[tuple[str, str]] = set()
    for shard in rows.shards:
        table = pq.read_table(shard, columns=["source", "licence"]).group_by(["source", "licence"]).aggregate([])
        found.update(zip(table["source"].to_pylist(), table["licence"].to_pylist(), strict=True))
    return found


__all__ = ["Rows", "StudySplits", "build_studies", "describe_studies", "known_states"]
