"""What an evaluation found, for people and for spreadsheets: tables in Markdown, a row a study in CSV."""

from __future__ import annotations

import csv
from pathlib import Path

from ..findings_otdrg import FINDING_STATES, FINDINGS
from .evaluation import ROWS, Evaluation

#: The columns that tell the most, and how they are headed; all other scores are in `Evaluation.scores`.
COLUMNS: dict[str, str] = {
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "macro_f1_13_uncertain_negative": "macro-F1 (13)",
}


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
    scores = model.found.per_study
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


__all__ = ["COLUMNS", "format_table", "write_predictions"]
