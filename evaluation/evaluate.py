"""Evaluation by generation: what a model writes, and the baselines and controls that say what its scores are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from ..findings_otdrg import UNMENTIONED
from ..inference.features import CachedStudies
from ..inference.generation import GeneratedReports, ReportJournal, derangement, generate_reports
from ..inference.retrieval import retrieve_reports
from ..labelers.as_typed import label_quietly, labeler_of
from ..metrics import (
    LABEL_SETS,
    NLG_METRICS,
    UNCERTAIN_POLICIES,
    ReportScores,
    best_constants,
    score_reports,
)
from ..metrics.efficacy import AVERAGES, example_ceiling
from ..metrics.faithfulness import flip_states
from ..metrics.retrieval import NEIGHBOURS
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from ..studies.loading import uncleaned_reports, with_column
from ..studies.streaming import StreamedStudies

#: The rows of the table, and how they are named.
ROWS: dict[str, str] = {
    "model": "model",
    "shuffled": "images shuffled across studies",
    "nearest": "nearest neighbour",
    "consensus": f"consensus of {NEIGHBOURS} neighbours",
    "constant": "best constant report",
    "true_states": "true states given",
}

#: What can stand beside the model's own row; `retrieval` is two rows. Beside these there is `flipped`, which is none.
CONTROLS: tuple[str, ...] = ("shuffled", "retrieval", "constant", "true_states")

#: Every F1 of `clinical_efficacy_scores`.
F1_COLUMNS: tuple[str, ...] = tuple(
    f"{average}_f1_{labels}_{policy}" for policy in UNCERTAIN_POLICIES for average in AVERAGES for labels in LABEL_SETS
)


class Row(NamedTuple):
    """A row of the table.

    Args:
        reports: N texts, as they are compared with the references.
        finding_states: (N, 14) what the labeler reads in them before cleaning.
        found: their scores.
        uncleaned: N texts before cleaning.
    """

    reports: list[str]
    finding_states: np.ndarray
    found: ReportScores
    uncleaned: list[str]

    @property
    def scores(self) -> dict[str, Any]:
        """The aggregate scores, ready for JSON."""
        found = self.found
        return {**found.scores, **found.details, "notes": found.notes}


class Steered(NamedTuple):
    """What a model that is told of findings wrote from the states it was told.

    Args:
        row: its reports.
        told: (N, 14) the states.
        within: (N, 14) true where they are other than the true ones on purpose; None where they are not.
    """

    row: Row
    told: np.ndarray
    within: np.ndarray | None = None


@dataclass
class Evaluation:
    """What [`evaluate_model`] found on N studies.

    Args:
        ids: the studies'.
        references: the true reports, as fluency is scored against them.
        uncleaned_references: the whole true reports before cleaning.
        true_states: (N, 14) what the labeler reads in `uncleaned_references`.
        finding_states: (N, 14) the states the model predicted.
        labeler: name of the labeler behind the clinical scores.
        rows: by their keys in `ROWS`; the constant's is not among them.
        constants: by column, the row of its own best constant.
        steered: reports by where the states they were written from are from: "predicted" and, as far as they were asked
            for, "true_states" and "flipped"; empty for a model that is not told of findings.
        notes: why something is not there.
    """

    ids: list[str]
    references: list[str]
    uncleaned_references: list[str]
    true_states: np.ndarray
    finding_states: np.ndarray
    labeler: str
    rows: dict[str, Row]
    constants: dict[str, Row] = field(default_factory=dict)
    steered: dict[str, Steered] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def scores(self) -> dict[str, Any]:
        """All aggregate scores, ready for JSON."""
        rows = {ROWS[name]: row.scores for name, row in self.rows.items()}
        if self.constants:
            rows[ROWS["constant"]] = {column: row.scores[column] for column, row in self.constants.items()}
        return {
            "studies": len(self.ids),
            "labeler": self.labeler,
            "rows": {name: rows[name] for name in ROWS.values() if name in rows},
            "constants": {column: row.reports[0] for column, row in self.constants.items()},
            "notes": self.notes,
        }


class _Scorer:
    """Rows of the same studies.

    Args:
        reader: the labeler.
        references: N true reports before cleaning, whose states are read.
        compared: the true reports as fluency is scored against them.
        metrics: of `nlg_scores`.
        clean: cleans a generated report; None leaves it as it is.
    """

    def __init__(
        self,
        reader,
        references: list[str],
        compared: list[str],
        metrics: Sequence[str],
        clean: Callable[[str], str] | None = None,
    ):
        self.reader = reader
        self.references = references
        self.true_states = label_quietly(reader, references)
        self.compared = compared
        self.metrics = metrics
        self.clean = clean

    def generated(self, reports: list[str]) -> Row:
        """The row of what a model wrote: states are read before cleaning, fluency is scored after it."""
        cleaned = reports if self.clean is None else [self.clean(report) for report in reports]
        return self._row(cleaned, label_quietly(self.reader, reports), reports)

    def __call__(self, reports: list[str]) -> Row:
        """The row of training reports, cleaned as the references are."""
        return self._row(reports, label_quietly(self.reader, reports), reports)

    def constant(self, report: str) -> Row:
        """The row of one report that is written for every study."""
        count = len(self.compared)
        reports = [report] * count
        return self._row(reports, np.tile(label_quietly(self.reader, [report]), (count, 1)), reports)

    def _row(self, reports: list[str], states: np.ndarray, uncleaned: list[str]) -> Row:
        found = score_reports(reports, self.compared, states, self.true_states, metrics=self.metrics)
        return Row(reports, states, found, uncleaned)


def evaluate_model(
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    studies: Dataset | CachedStudies,
    training: Dataset | StreamedStudies | CachedStudies | None = None,
    batch_size: int = 8,
    generation: dict[str, Any] | None = None,
    controls: Sequence[str] = CONTROLS,
    labeler: str = "rules",
    metrics: Sequence[str] = NLG_METRICS,
    seed: int = 0,
    indication: bool = False,
    labeler_options: Mapping[str, Any] | None = None,
    references: Sequence[str] | None = None,
    clean: Callable[[str], str] | None = None,
    journals: Path | None = None,
) -> Evaluation:
    """Generate a report for each study and score them, beside the controls that say what the scores are worth.

    `shuffled` is the same model with images shuffled across studies: if it does not fall to the constant's level, the
    model does not look. `retrieval` writes the report of the training study whose image features, the model's own, are
    nearest, and the one that the nearest 30 agree on most ([`retrieve_reports`]). `constant` is, in each column, the
    training report that scores best on training when it is written for every study ([`best_constants`]).
    `true_states` is the model given the true states: the ceiling of a better predictor. `flipped` gives it these with
    one finding of each study flipped ([`flip_states`]); that is no row, but what steerability is measured on.

    Args:
        model, processor: as published.
        studies: rows with `id`, `images` or the features of [`cache_features`], `report` (cleaned as training's) and,
            for `true_states`, `finding_states`.
        training: the training studies, cleaned likewise; needed for `constant` and `retrieval`.
        batch_size: studies a batch.
        generation: arguments of `generate`.
        controls: of `CONTROLS` and `flipped`, what stands beside the model's row.
        labeler: reads the states out of generated and true reports.
        metrics: of `otdrg.metrics.nlg_scores`.
        seed: of the shuffling, the flips and the constants' draw.
        indication: whether the studies' `indication` goes into the prompt; shuffled images leave it where it is.
        labeler_options: the labeler's own.
        references: N texts that fluency is scored against, where it is not the studies' reports. States of true
            reports are read from `uncleaned_report` where the studies have it, else from `report`.
        clean: a function of a generated report, of a model that learned to write otherwise than `studies` are cleaned.
        journals: folder in which reports are kept as they are generated, see [`ReportJournal`].

    Raises:
        ValueError: a control that needs training studies, without them.
    """
    needed = [name for name in ("retrieval", "constant") if name in controls]
    if needed and training is None:
        raise ValueError(f"controls {', '.join(needed)}: expected training studies")
    reader = labeler_of(labeler, dict(labeler_options or {}))
    compared = list(studies["report"] if references is None else references)
    scored = _Scorer(reader, uncleaned_reports(studies), compared, metrics, clean)

    def generated(
        name: str, rows: Dataset | CachedStudies, finding_states: np.ndarray | None = None
    ) -> GeneratedReports:
        journal = None if journals is None else ReportJournal(journals / f"{name}.jsonl")
        return generate_reports(model, processor, rows, batch_size, generation, finding_states, indication, journal)

    written = generated("model", studies)
    evaluation = Evaluation(
        ids=list(studies["id"]),
        references=scored.compared,
        uncleaned_references=scored.references,
        true_states=scored.true_states,
        finding_states=written.finding_states,
        labeler=reader.name,
        rows={"model": scored.generated(written.reports)},
    )
    if "shuffled" in controls and len(studies) < 2:
        evaluation.notes.append("images of a single study cannot be shuffled")
    elif "shuffled" in controls:
        order = derangement(len(studies), seed)
        if indication:
            # Ids go with the indications: in the journal a report is of the study it is compared with.
            others = studies.select(order.tolist())
            for column in ("id", "indication"):
                others = with_column(others, column, list(studies[column]))
            evaluation.rows["shuffled"] = scored.generated(generated("shuffled", others).reports)
        else:
            # The images are all the model is given, so what it writes for another's is what it wrote for the other.
            evaluation.rows["shuffled"] = scored.generated([written.reports[other] for other in order])
    if "retrieval" in controls:
        retrieved = retrieve_reports(model, processor, studies, training, batch_size)
        evaluation.rows["nearest"] = scored(retrieved.nearest)
        evaluation.rows["consensus"] = scored(retrieved.consensus)
        if retrieved.neighbours < NEIGHBOURS:
            evaluation.notes.append(f"the consensus is of {retrieved.neighbours} neighbours: training has no more")
    if "constant" in controls:
        evaluation.constants, notes = _constants(scored, training, seed)
        evaluation.notes += notes
    if model.config.dle:
        evaluation.steered["predicted"] = Steered(evaluation.rows["model"], written.finding_states)
    given = [name for name in ("true_states", "flipped") if name in controls]
    known = [states for states in studies["finding_states"] if states is not None] if given else []
    if given and not model.config.dle:
        evaluation.notes.append("the model is not told of findings (dle is off), so true states change nothing")
    elif given and len(known) < len(studies):
        evaluation.notes.append(f"true states are known of {len(known)} of {len(studies)} studies only")
    else:
        for name in given:
            told, within = flip_states(np.array(known), seed) if name == "flipped" else (np.array(known), None)
            row = scored.generated(generated(name, studies, told).reports)
            evaluation.steered[name] = Steered(row, told, within)
            if name in ROWS:
                evaluation.rows[name] = row
    read = {"true reports": evaluation.true_states}
    read.update({f"reports, {ROWS[name]}": row.finding_states for name, row in evaluation.rows.items()})
    for name, states in read.items():
        blank = int((states == UNMENTIONED).all(axis=1).sum())
        if blank:
            evaluation.notes.append(f"the labeler reads no state in {blank} of {len(states)} {name}")
    ceiling = example_ceiling(evaluation.true_states)
    if ceiling is not None:
        evaluation.notes.append(ceiling)
    return evaluation


def _constants(
    scored: _Scorer, training: Dataset | StreamedStudies | CachedStudies, seed: int
) -> tuple[dict[str, Row], list[str]]:
    """By column, the row of its own best constant, chosen on training; and notes on how it was chosen."""
    columns = [column for column in (*NLG_METRICS, *F1_COLUMNS) if column in scored.metrics or column in F1_COLUMNS]
    states = label_quietly(scored.reader, uncleaned_reports(training))
    best = best_constants(list(training["report"]), states, scored.reader, columns, seed)
    rows = {report: scored.constant(report) for report in dict.fromkeys(best.reports.values())}
    return {column: rows[best.reports[column]] for column in columns if column in best.reports}, best.notes


__all__ = ["CONTROLS", "F1_COLUMNS", "ROWS", "Evaluation", "Row", "evaluate_model"]
