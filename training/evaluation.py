"""Evaluation by generation: reports for studies, and the table that sets them beside baselines and controls."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import DataLoader

from ..findings_otdrg import FINDING_STATES, FINDINGS
from ..labelers import load_labeler
from ..metrics import all_positive_report, best_constants, clinical_efficacy_scores, frequent_reports, nlg_scores
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from .build import with_column
from .collation import PromptCollator
from .distributed import is_sharded, open_methods
from .features import CachedStudies

logger = logging.getLogger(__name__)

#: The columns of the table, and how they are headed; all other scores are in `Evaluation.scores`.
COLUMNS: dict[str, str] = {
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "macro_f1_13_uncertain_negative": "macro-F1 (13)",
}

#: The rows of the table, and how they are named.
ROWS: dict[str, str] = {
    "model": "model",
    "shuffled": "images shuffled across studies",
    "constant": "best constant report",
    "true_states": "true states given",
}


@dataclass
class GeneratedReports:
    """What a model wrote for N studies.

    Args:
        reports: N texts.
        finding_states: (N, 14), the states each report was conditioned on, predicted unless they were given.
    """

    reports: list[str]
    finding_states: np.ndarray


def generate_reports(
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    studies: Dataset | CachedStudies,
    batch_size: int = 8,
    generation: dict[str, Any] | None = None,
    finding_states: np.ndarray | None = None,
    indication: bool = False,
) -> GeneratedReports:
    """Reports for studies, in their order, of which nothing is read but the images and, on request, the indications.

    Every process of a distributed run must call it; each writes its share, and all get the whole.

    Args:
        model, processor: as published; the model's type is left as it is.
        studies: rows with `images`, or those of [`cache_features`], which give the same.
        batch_size: studies a batch.
        generation: arguments of `generate`.
        finding_states: (N, 14) states to condition on, -1 where they are to be predicted; all are, without it.
        indication: whether the studies' `indication` goes into the prompt.

    Raises:
        ValueError: `finding_states` does not fit the studies.
    """
    if finding_states is not None and np.shape(finding_states) != (len(studies), len(FINDINGS)):
        raise ValueError(
            f"finding_states has shape {np.shape(finding_states)}: expected {(len(studies), len(FINDINGS))}"
        )
    state = PartialState()
    # As many for each: processes that share a model's weights out wait for each other at every layer.
    rounds = -(-len(studies) // state.num_processes)
    mine = [state.process_index + round * state.num_processes for round in range(rounds)]
    mine = [position % len(studies) for position in mine]
    waits = {"synced_gpus": True} if is_sharded(model) else {}
    views = "view_features" if "view_features" in studies.column_names else "images"
    loader = DataLoader(
        studies.select_columns([views, "indication"] if indication else [views]).select(mine),
        batch_size=batch_size,
        collate_fn=PromptCollator(processor, indication),
    )
    open_methods(model, "encode_views", "generate")
    model.eval()
    written: list[tuple[int, str, list[int]]] = []
    for batch in loader:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        positions = mine[len(written) : len(written) + len(batch["input_ids"])]
        with torch.no_grad():
            if "pixel_values" in batch:
                batch["view_features"] = model.encode_views(batch.pop("pixel_values"), batch["view_mask"])
            logits = model(view_features=batch["view_features"], view_mask=batch["view_mask"]).finding_logits
            states = model.predict_states(logits)
            if finding_states is not None:
                given = torch.as_tensor(np.asarray(finding_states)[positions], device=states.device)
                states = torch.where(given < 0, states, given)
            # A model without DLE predicts findings but is not told of any.
            told = {"finding_states": states} if model.config.dle else {}
            ids = model.generate(**batch, **told, **waits, **(generation or {}))
        texts = processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        written += zip(positions, (" ".join(text.split()) for text in texts), states.tolist(), strict=True)
    if state.num_processes > 1:
        written = sorted({row[0]: row for row in gather_object(written)}.values())
    return GeneratedReports(
        reports=[text for _, text, _ in written],
        finding_states=np.array([row for _, _, row in written], dtype=np.int64).reshape(len(studies), len(FINDINGS)),
    )


def derangement(count: int, seed: int) -> np.ndarray:
    """A random permutation (count,) that leaves nothing in its place.

    Raises:
        ValueError: there is none of fewer than two.
    """
    if count < 2:
        raise ValueError(f"images of {count} study cannot be shuffled: expected at least 2 studies")
    # Sattolo's algorithm: one cycle through all.
    order, rng = np.arange(count), np.random.default_rng(seed)
    for position in range(count - 1, 0, -1):
        other = rng.integers(position)
        order[position], order[other] = order[other], order[position]
    return order


class Row(NamedTuple):
    """A row of the table: N reports, their scores, and those scores study by study."""

    reports: list[str]
    scores: dict[str, Any]
    per_study: dict[str, list[float]]


@dataclass
class Evaluation:
    """What [`evaluate_model`] found on N studies.

    Args:
        ids: the studies'.
        references: the true reports.
        finding_states: (N, 14) the states the model predicted.
        labeler: name of the labeler behind the clinical scores.
        rows: by their keys in `ROWS`; the constant's is not among them.
        constants: `{column: (report, score)}`, each column's own best constant.
        notes: why something is not there.
    """

    ids: list[str]
    references: list[str]
    finding_states: np.ndarray
    labeler: str
    rows: dict[str, Row]
    constants: dict[str, tuple[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def scores(self) -> dict[str, Any]:
        """All aggregate scores, ready for JSON."""
        rows = {ROWS[name]: row.scores for name, row in self.rows.items()}
        if self.constants:
            rows[ROWS["constant"]] = {column: score for column, (_, score) in self.constants.items()}
        return {
            "studies": len(self.ids),
            "labeler": self.labeler,
            "rows": {name: rows[name] for name in ROWS.values() if name in rows},
            "constants": {column: report for column, (report, _) in self.constants.items()},
            "notes": self.notes,
        }


def evaluate_model(
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    studies: Dataset | CachedStudies,
    training_reports: Sequence[str],
    batch_size: int = 8,
    generation: dict[str, Any] | None = None,
    controls: Sequence[str] = ("shuffled", "constant", "true_states"),
    labeler: str = "rules",
    metrics: Sequence[str] = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider"),
    seed: int = 0,
    indication: bool = False,
) -> Evaluation:
    """Generate a report for each study and score them, beside the controls that say what the scores are worth.

    `shuffled` is the same model with images shuffled across studies: if it does not fall to the constant's level, the
    model does not look. `constant` is, in each column, the report that scores best on training when it is written for
    every study: one of the 60 most frequent or, what F1 rewards, one that has every finding positive. `true_states` is
    the model given the true states: the ceiling of a better predictor.

    Args:
        model, processor: as published.
        studies: rows with `id`, `images` or the features of [`cache_features`], `report` (cleaned as training's) and,
            for `true_states`, `finding_states`.
        training_reports: for the constants, cleaned likewise.
        batch_size: studies a batch.
        generation: arguments of `generate`.
        controls: which rows stand beside the model's.
        labeler: reads the states out of generated and true reports.
        metrics: of `otdrg.metrics.nlg_scores`.
        seed: of the shuffling and the constants' draw.
        indication: whether the studies' `indication` goes into the prompt; shuffled images leave it where it is.
    """
    reader = load_labeler(labeler)
    references = list(studies["report"])
    true_states = reader.label(references)

    def scored(reports: list[str]) -> Row:
        nlg = nlg_scores(reports, references, metrics)
        clinical = clinical_efficacy_scores(reader.label(reports), true_states)
        per_study = {**nlg.pop("per_study"), **clinical.pop("per_study")}
        return Row(reports, {**nlg, **clinical}, per_study)

    def generated(rows: Dataset | CachedStudies, finding_states: np.ndarray | None = None) -> GeneratedReports:
        return generate_reports(model, processor, rows, batch_size, generation, finding_states, indication)

    written = generated(studies)
    evaluation = Evaluation(
        ids=list(studies["id"]),
        references=references,
        finding_states=written.finding_states,
        labeler=reader.name,
        rows={"model": scored(written.reports)},
    )
    if "shuffled" in controls and len(studies) < 2:
        evaluation.notes.append("images of a single study cannot be shuffled")
    elif "shuffled" in controls:
        order = derangement(len(studies), seed)
        if indication:
            others = with_column(studies.select(order.tolist()), "indication", list(studies["indication"]))
            evaluation.rows["shuffled"] = scored(generated(others).reports)
        else:
            # The images are all the model is given, so what it writes for another's is what it wrote for the other.
            evaluation.rows["shuffled"] = scored([written.reports[other] for other in order])
    if "constant" in controls:
        columns = [column for column in COLUMNS if column in metrics or column.startswith("macro_f1")]
        states = reader.label(list(training_reports))
        candidates = [*frequent_reports(training_reports, 60), all_positive_report(training_reports, states)]
        candidates = [report for report in candidates if report]
        best = best_constants(candidates, training_reports, states, reader, columns, seed=seed)
        rows = {report: scored([report] * len(studies)) for report in dict.fromkeys(best.values())}
        evaluation.constants = {column: (report, rows[report].scores[column]) for column, report in best.items()}
    if "true_states" in controls:
        known = [states for states in studies["finding_states"] if states is not None]
        if not model.config.dle:
            evaluation.notes.append("the model is not told of findings (dle is off), so true states change nothing")
        elif len(known) < len(studies):
            evaluation.notes.append(f"true states are known of {len(known)} of {len(studies)} studies only")
        else:
            evaluation.rows["true_states"] = scored(generated(studies, np.array(known)).reports)
    return evaluation


def format_table(evaluation: Evaluation) -> str:
    """The rows of an evaluation as a Markdown table, the labeler named below it."""
    rows = evaluation.scores()["rows"]
    columns = [column for column in COLUMNS if column in rows[ROWS["model"]]]
    lines = [
        "| " + " | ".join(["", *(COLUMNS[column] for column in columns)]) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, scores in rows.items():
        lines.append("| " + " | ".join([name, *(f"{scores[column]:.3f}" for column in columns)]) + " |")
    positives = rows[ROWS["model"]]["findings_with_positives_13_uncertain_negative"]
    lines.append("")
    lines.append(
        f"{len(evaluation.ids)} studies; macro-F1 over the 13 findings without No Finding ({positives} of them occur), "
        f"uncertain as negative, by the labeler {evaluation.labeler}"
    )
    return "\n".join(lines + evaluation.notes)


def write_predictions(evaluation: Evaluation, path: Path) -> None:
    """A CSV of N rows: id, true report, generated reports, the model's scores, and the 14 states it predicted."""
    model = evaluation.rows["model"]
    scores = {name: values for name, values in model.per_study.items() if values is not None}
    others = {f"report, {ROWS[name]}": row.reports for name, row in evaluation.rows.items() if name != "model"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "reference", "report", *others, *scores, *(f"predicted {name}" for name in FINDINGS)])
        for position, study in enumerate(evaluation.ids):
            writer.writerow(
                [
                    study,
                    evaluation.references[position],
                    model.reports[position],
                    *(reports[position] for reports in others.values()),
                    *(f"{values[position]:.6f}" for values in scores.values()),
                    *(FINDING_STATES[state] for state in evaluation.finding_states[position]),
                ]
            )


__all__ = [
    "COLUMNS",
    "ROWS",
    "Evaluation",
    "GeneratedReports",
    "derangement",
    "evaluate_model",
    "format_table",
    "generate_reports",
    "write_predictions",
]
