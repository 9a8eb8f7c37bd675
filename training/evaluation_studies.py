"""The studies a model is evaluated on, the studies of the baselines, and checks of their counts."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..files_otdrg import read_json
from ..studies import PREPARED, open_source
from ..studies.loading import prepared_column, prepared_splits
from ..studies.shards import SUMMARY
from ..studies.streaming import StreamedStudies
from ..studies.summary import OfficialCheck, SplitCounts
from .data import StudySplits, build_studies
from .recipe import LabelsRecipe, Recipe, StudiesRecipe, load_recipe


@dataclass
class EvaluationStudies:
    """What a model is evaluated on.

    Args:
        rows: the split, cleaned, with states if they are known.
        training: the studies of the baselines, cleaned in the same way.
        dataset: the dataset of the split, as text.
        training_from: the dataset of the baselines, as text.
        zero_shot: whether the model was trained on another dataset; None if that is unknown.
        cleaning: cleaning of true reports.
        counts: by split, the number of studies and the published number if it is known.
        warnings: counts that differ from the published ones, and studies that are also training studies.
    """

    rows: Dataset
    training: Dataset | StreamedStudies
    dataset: str
    training_from: str
    zero_shot: bool | None
    cleaning: str
    counts: dict[str, dict[str, Any]]
    warnings: list[str] = field(default_factory=list)


def evaluation_studies(
    dataset: str | None,
    split: str,
    own: Recipe | None = None,
    train_from: str | None = None,
    cleaning: str | None = None,
    labeler: str = "rules",
    labeler_options: dict[str, Any] | None = None,
) -> EvaluationStudies:
    """The studies of a split, and the studies of the baselines (retrieval and constants).

    The dataset is the one the model was trained on if it has the source, options and sections of the model's recipe.
    Otherwise the evaluation is zero-shot, and the baselines use the training studies of the model's own recipe, or of
    `train_from`. If the model's recipe is unknown, they use the dataset's own training studies.

    Args:
        dataset: a recipe, whose `studies` and `labels` are read, or a folder of `otdrg prepare`; by default `own`.
        split: "validation" or "test".
        own: the model's recipe.
        train_from: another recipe or folder, for the baselines.
        cleaning: cleaning of all reports; by default the recipe's, and for a folder that of `own`.
        labeler, labeler_options: the labeler that reads the states of a folder's studies if some are missing.

    Raises:
        ValueError: neither a dataset nor a recipe of the model's, no such split, or a fault in the studies.
        OSError: a file that is not there.
    """
    if dataset is None and own is None:
        expected = "expected a recipe or a folder of otdrg prepare"
        raise ValueError(f"DATASET is missing, and no recipe.yaml lies beside the model: {expected}")
    read_by = LabelsRecipe(labeler=labeler, options=labeler_options or {})
    sections = (own.studies, own.labels) if dataset is None else _sections(dataset, own, split, read_by)
    studies, labels = replace(sections[0], cleaning=cleaning or sections[0].cleaning), sections[1]
    zero_shot = None if own is None else not _same(studies, own.studies)
    if train_from is not None:
        learned, training_from = _sections(train_from, own, "train", read_by), train_from
    elif zero_shot:
        learned, training_from = (own.studies, own.labels), "the model's own recipe"
    else:
        learned, training_from = None, "the dataset"
    if learned is None and studies.source == PREPARED and "train" not in prepared_splits(studies.options["folder"]):
        raise ValueError(f"{dataset} has no split 'train' for the baselines: expected --train-from, where they are")
    splits = build_studies(studies, labels, splits=("train", split) if learned is None else (split,))
    training = splits["train"] if learned is None else _training(*learned, studies.cleaning, train_from)
    counts, warnings = check_counts(studies, splits)
    known = set(training["id"]).intersection(splits[split]["id"])
    if known:
        warnings.append(f"{len(known):,} of the {len(splits[split]):,} studies have ids that training studies have too")
    return EvaluationStudies(
        rows=splits[split],
        training=training,
        dataset=dataset or "the model's own recipe",
        training_from=f"split train of {training_from}",
        zero_shot=zero_shot,
        cleaning=studies.cleaning,
        counts=counts,
        warnings=warnings,
    )


def _sections(dataset: str, own: Recipe | None, split: str, labels: LabelsRecipe) -> tuple[StudiesRecipe, LabelsRecipe]:
    """The sections of a recipe, or those for a folder; `labels` if the folder lacks states."""
    path = Path(dataset)
    if path.is_file():
        recipe = load_recipe(path)
        return recipe.studies, recipe.labels
    if not path.is_dir():
        raise ValueError(f"{dataset} does not exist: expected a recipe (YAML) or a folder of otdrg prepare")
    there = prepared_splits(path)
    if split not in there:
        raise ValueError(f"{dataset} has no split {split!r}: it has {', '.join(there)}")
    needed = {split, "train"}.intersection(there)
    unknown = any(None in prepared_column(path, name, "finding_states") for name in needed)
    return (
        StudiesRecipe(
            source=PREPARED,
            options={"folder": dataset},
            cleaning="none" if own is None else own.studies.cleaning,
        ),
        labels if unknown else LabelsRecipe(),
    )


def _training(
    studies: StudiesRecipe, labels: LabelsRecipe, cleaning: str, train_from: str | None
) -> Dataset | StreamedStudies:
    try:
        return build_studies(replace(studies, cleaning=cleaning), labels, splits=("train",))["train"]
    except (OSError, ValueError) as error:
        if train_from is not None:
            raise
        raise ValueError(
            f"the studies the model was trained on cannot be read ({error}): expected --train-from, other ones for "
            "the baselines"
        ) from error


def _same(studies: StudiesRecipe, others: StudiesRecipe) -> bool:
    """Whether two sections have the same dataset; paths are compared after resolving links."""

    def known_by(section: StudiesRecipe) -> tuple:
        options = {
            name: os.path.realpath(value) if isinstance(value, str) and os.path.exists(value) else value
            for name, value in section.options.items()
        }
        return section.source, section.sections, options

    return known_by(studies) == known_by(others)


def check_counts(studies: StudiesRecipe, splits: StudySplits) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Counts of the splits, compared with the published ones if the source knows them.

    Args:
        studies: what the splits were built by.
        splits: some or all of them.

    Returns:
        `{split: {"studies", "images", "published", "unit"}}`, None for unknown values; and a line for each split that
        differs from the published one, with the missing ids.
    """
    counts = {split: {"studies": len(rows), "images": _images(rows)} for split, rows in splits.items()}
    reported = {split: {**count, "published": None, "unit": None} for split, count in counts.items()}
    if studies.source == PREPARED:
        return reported, _prepared_warnings(Path(studies.options["folder"]), splits)
    source = open_source(studies.source, **studies.options)
    # The published counts are of studies with findings.
    if not source.official_counts or studies.sections != "findings":
        return reported, []
    for split, count in reported.items():
        count.update(published=source.official_counts.get(split), unit=source.official_unit)
    check, kept = OfficialCheck(source), {split: set(rows["id"]) for split, rows in splits.items()}
    left_out: dict[str, list[str]] = {split: [] for split in splits}
    for entry in source.entries():
        check.see(entry)
        if entry.split in kept and entry.id not in kept[entry.split]:
            left_out[entry.split].append(entry.id)
    lines = check.warnings({split: _split_counts(count) for split, count in counts.items()}, left_out)
    warnings = [line for line in lines if _split_of(line) in splits and _split_of(line) not in studies.limit]
    for split, limit in studies.limit.items():
        if split in splits:
            warnings.append(f"{split}: the first {limit:,} studies only, as studies.limit says")
    return reported, warnings


def _prepared_warnings(folder: Path, splits: Collection[str]) -> list[str]:
    """Warnings from when the folder was built."""
    path = folder / SUMMARY
    if not path.is_file():
        return []
    return read_json(
        path, parse=lambda summary: [line for line in summary.get("warnings", []) if _split_of(line) in splits]
    )


def _split_of(line: str) -> str:
    return line.partition(":")[0]


def _split_counts(count: dict[str, int | None]) -> SplitCounts:
    return SplitCounts(studies=count["studies"], images=count["images"] or 0)


def _images(rows: Dataset | StreamedStudies) -> int | None:
    """Number of views in a split; None for streamed studies, whose views are not counted."""
    return sum(map(len, rows["views"])) if isinstance(rows, Dataset) else None


__all__ = ["EvaluationStudies", "check_counts", "evaluation_studies"]
