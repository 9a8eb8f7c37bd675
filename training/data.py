"""Studies of a recipe by split, with reports and finding states, and the studies a model is evaluated on.

Long, because training and evaluation must read, clean and label the same studies in the same way.
"""

from __future__ import annotations

import logging
import os
import typing
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset

from ..files_otdrg import read_json
from ..findings_otdrg import FINDINGS, POSITIVE
from ..inference.features import CachedStudies
from ..labelers import labeler_class, read_states
from ..labelers.as_typed import labeler_of
from ..sections_otdrg import has_sections, without_headings
from ..studies import PREPARED, load_studies, open_source, source_class
from ..studies.card import collection_name
from ..studies.cleaning import CLEANING_STYLES, clean_report, clean_sections
from ..studies.loading import load_prepared, prepared_column, prepared_splits, undecoded, with_column
from ..studies.placeholders import present_text
from ..studies.schema import UNCLEANED
from ..studies.shards import SUMMARY
from ..studies.source import VIEWS
from ..studies.streaming import StreamedStudies
from ..studies.summary import OfficialCheck, SplitCounts
from .fields import convert
from .recipe import LabelsRecipe, Recipe, StudiesRecipe, load_recipe

logger = logging.getLogger(__name__)

#: Studies by split; only training studies are ever streamed.
StudySplits = dict[str, Dataset | StreamedStudies]
#: Studies in any of the forms in which they are trained on.
Rows = TypeVar("Rows", Dataset, StreamedStudies, CachedStudies)


def check_source(studies: StudiesRecipe) -> None:
    """Check the source and its options without reading a study; raises `ValueError`."""
    if studies.source == PREPARED:
        if set(studies.options) != {"folder"} or not isinstance(studies.options["folder"], str):
            raise ValueError(f"studies.options={studies.options!r}: expected the option folder, a path, and no other")
        prepared_splits(studies.options["folder"])
        return
    try:
        source = source_class(studies.source)
    except ValueError as error:
        raise ValueError(f"studies.source={studies.source!r}: {error}") from None
    kinds = typing.get_type_hints(source)
    declared = {item.name for item in fields(source)}
    options = {
        name: convert(value, kinds[name], ("studies", "options", name)) if name in declared else value
        for name, value in studies.options.items()
    }
    try:
        open_source(studies.source, **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"studies.options: {error}") from error


def check_labels(labels: LabelsRecipe) -> None:
    """Check the labeler and its options; raises `ValueError`."""
    if labels.labeler is None:
        if labels.options:
            raise ValueError(f"labels.options={labels.options!r}: expected none without labels.labeler")
        return
    try:
        labeler_class(labels.labeler, **labels.options)
    except ValueError as error:
        raise ValueError(f"labels.labeler={labels.labeler!r}: {error}") from None


def build_studies(
    studies: StudiesRecipe,
    labels: LabelsRecipe,
    seed: int = 0,
    splits: Sequence[str] | None = None,
    need_states: bool = True,
) -> StudySplits:
    """The recipe's studies by split, with `report` cleaned and `finding_states` filled.

    Rows follow `STUDY_FEATURES`, with images as `{"bytes", "path"}`. If the recipe cleans reports, the column
    `uncleaned_report` has them before cleaning.

    Studies without a report are skipped and counted. States come from the CSV for the studies it names, else from the
    labeler, else they are the studies' own. A labeler reads the reports before cleaning.

    If all reports consist of sections ([`has_sections`]), each section is cleaned by itself, and a labeler does not
    read the headings.

    Args:
        studies, labels: sections of the recipe.
        seed: of the order of streamed studies.
        splits: the splits to build; by default all there are, which must include training.
        need_states: whether all training studies must have states.

    Raises:
        ValueError: no studies in training or in a split of `splits`, training studies with unknown states, or a fault
            in the source or the CSV.
    """
    if studies.streaming:
        loaded = _streamed(studies, seed)
    else:
        loaded = load_studies(studies.source, sections=studies.sections, **studies.options)
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
    sectioned = has_sections(report for rows in loaded.values() for report in rows["report"] if present_text(report))
    if not sectioned and studies.source == PREPARED:
        _warn_of_joined_sections(Path(studies.options["folder"]))
    labelled = _labelled(found, labels, {study for rows in loaded.values() for study in rows["id"]}, sectioned)
    for split, rows in labelled.items() if need_states else ():
        unknown = sum(states is None for states in rows["finding_states"])
        if unknown and split == "train":
            raise ValueError(
                f"{unknown} of {len(rows)} training studies have no finding states: set labels.labeler (such as rules) "
                "or give a labels.csv that names all of them"
            )
        if unknown:
            logger.warning("%s: %d of %d studies have no finding states", split, unknown, len(rows))
    cleaned = {split: _cleaned(rows, studies.cleaning, sectioned) for split, rows in labelled.items()}
    for split, rows in cleaned.items():
        logger.info("%s: %d studies", split, len(rows))
    return {split: undecoded(rows) if isinstance(rows, Dataset) else rows for split, rows in cleaned.items()}


def _streamed(studies: StudiesRecipe, seed: int) -> StudySplits:
    folder = studies.options["folder"]
    train = StreamedStudies(folder, "train", seed, studies.shuffle_buffer)
    return {"train": train, **load_prepared(folder, leave_out=["train"])}


def _cleaned(rows: Dataset | StreamedStudies, style: str, sectioned: bool) -> Dataset | StreamedStudies:
    if style == "none":
        return rows
    reports, clean = list(rows["report"]), clean_sections if sectioned else clean_report
    return with_column(with_column(rows, UNCLEANED, reports), "report", [clean(report, style) for report in reports])


def _warn_of_joined_sections(folder: Path) -> None:
    """Say that a dataset of both sections is from a version that joined them without headings."""
    if not (folder / SUMMARY).is_file():
        return
    made = read_json(folder / SUMMARY, parse=lambda summary: summary.get("settings", {}))
    if made.get("sections") == "findings+impression" and "headings" not in made:
        logger.warning(
            "%s: findings and impression were joined without headings by an older version, and are learned as one "
            "text; prepare it again to learn them as sections",
            folder,
        )


def _labelled(splits: StudySplits, labels: LabelsRecipe, ids: Collection[str], sectioned: bool) -> StudySplits:
    """The splits with states; a CSV has to name at least one of `ids`, the ids of all studies."""
    if labels.csv is None and labels.labeler is None:
        return splits
    from_csv = read_states(labels.csv) if labels.csv is not None else {}
    labeler = labeler_of(labels.labeler, labels.options) if labels.labeler is not None else None
    if labels.csv is not None and from_csv.keys().isdisjoint(ids):
        raise ValueError(f"labels.csv={labels.csv!r} names none of the studies: expected their ids in its column id")
    labelled = {}
    for split, rows in splits.items():
        reports, states = list(rows["report"]), list(rows["finding_states"])
        if sectioned:
            reports = [without_headings(report) for report in reports]
        others = []
        for position, study in enumerate(rows["id"]):
            if study in from_csv:
                states[position] = from_csv[study].tolist()
            else:
                others.append(position)
        if labeler is not None and others:
            replaced = sum(states[position] is not None for position in others)
            if replaced:
                logger.warning(
                    "%s: the labeler %s replaces the states that the dataset has for %d studies; labels.labeler=null "
                    "keeps them",
                    *(split, labels.labeler, replaced),
                )
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


# --- the studies of `otdrg evaluate` ---------------------------------------------------------------------------------


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
    read_by = LabelsRecipe(labeler=labeler, options=labeler_options or {})
    sections = _sections(dataset, own, split, read_by)
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


def bank_studies(dataset: str | None, own: Recipe | None, cleaning: str | None = None) -> Dataset | StreamedStudies:
    """The training studies of a report bank, which need no states, cleaned as the model writes them.

    Args:
        dataset, own: as above.
        cleaning: cleaning of the reports; by default that of `own`, or else of a recipe given as `dataset`.

    Raises:
        ValueError, OSError: as above, or the cleaning is unknown.
    """
    studies, _ = _sections(dataset, own, "train", LabelsRecipe())
    if cleaning is None and own is not None:
        cleaning = own.studies.cleaning
    if cleaning is None and dataset is not None and Path(dataset).is_dir():
        raise ValueError(
            "neither recipe.yaml nor metrics.json beside the model says how the reports it learned were cleaned: "
            f"expected --cleaning, one of {', '.join(CLEANING_STYLES)}"
        )
    studies = replace(studies, cleaning=cleaning or studies.cleaning)
    return build_studies(studies, LabelsRecipe(), splits=("train",), need_states=False)["train"]


def _sections(
    dataset: str | None, own: Recipe | None, split: str, labels: LabelsRecipe
) -> tuple[StudiesRecipe, LabelsRecipe]:
    """The sections of a recipe, `own` by default, or those for a folder; `labels` if the folder lacks states."""
    if dataset is None:
        if own is None:
            expected = "expected a recipe or a folder of otdrg prepare"
            raise ValueError(f"DATASET is missing, and no recipe.yaml lies beside the model: {expected}")
        return own.studies, own.labels
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


__all__ = [
    "EvaluationStudies",
    "Rows",
    "StudySplits",
    "build_studies",
    "check_counts",
    "check_labels",
    "check_source",
    "describe_studies",
    "evaluation_studies",
    "known_states",
]
