"""What an evaluation found, for people and for spreadsheets: tables in Markdown, a row a study in CSV."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..findings_otdrg import FINDING_STATES, FINDINGS
from ..metrics import LABEL_SETS, Interval, PairedDifference, bootstrap_intervals, paired_bootstrap
from ..metrics.efficacy import AVERAGES
from ..metrics.tables import NLG_NAMES, markdown_table, shown_interval, shown_number
from ..runtime.csv_files import write_csv
from .evaluate import ROWS, Evaluation
from .steering import CONDITIONS, Steering

#: The columns that tell the most, and how they are headed; all other scores are in `Evaluation.scores`.
COLUMNS: dict[str, str] = {
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "macro_f1_13_uncertain_negative": "macro-F1 (13)",
}

#: F1 of clinical efficacy, unclear as negative.
F1_HEADINGS: dict[str, str] = {
    f"{average}_f1_{labels}_uncertain_negative": f"{average} ({labels})"
    for average in AVERAGES
    for labels in LABEL_SETS
}


def bootstrap_rows(
    evaluation: Evaluation, resamples: int, seed: int
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, PairedDifference]]]:
    """Of each row, by name, the 95 % interval of every score; and of the model minus each other row the same.

    Args:
        evaluation: whose rows they are; the best constant is in each column the one chosen for it.
        resamples: of the studies.
        seed: of the draws.
    """
    model = evaluation.rows["model"].found.statistics
    intervals, differences = {}, {}
    for name, row in evaluation.rows.items():
        statistics = row.found.statistics
        intervals[ROWS[name]] = bootstrap_intervals(statistics, resamples, seed=seed)
        if name != "model":
            differences[ROWS[name]] = paired_bootstrap(model, statistics, resamples, seed=seed)
    constants = intervals[ROWS["constant"]], differences[ROWS["constant"]] = {}, {}
    for report in dict.fromkeys(row.reports[0] for row in evaluation.constants.values()):
        columns = [column for column, row in evaluation.constants.items() if row.reports[0] == report]
        statistics = evaluation.constants[columns[0]].found.statistics
        found = (
            bootstrap_intervals(statistics, resamples, seed=seed),
            paired_bootstrap(model, statistics, resamples, seed=seed),
        )
        for kept, scores in zip(constants, found, strict=True):
            kept.update({column: scores[column] for column in columns})
    return tuple({name: rows[name] for name in ROWS.values() if rows.get(name)} for rows in (intervals, differences))


# --- Markdown --------------------------------------------------------------------------------------------------------


def format_table(evaluation: Evaluation) -> str:
    """The rows of an evaluation as a Markdown table, the labeler named below it."""
    rows = evaluation.scores()["rows"]
    lines = [_rows_table("", rows, COLUMNS), "", _below(evaluation)]
    return "\n".join(lines + evaluation.notes)


def format_scores(
    evaluation: Evaluation,
    intervals: Mapping[str, Mapping[str, Interval]],
    differences: Mapping[str, Mapping[str, PairedDifference]],
) -> str:
    """Every row in every metric of fluency and every F1, then the main columns with their intervals and differences.

    Args:
        evaluation: whose rows they are.
        intervals, differences: of [`bootstrap_rows`]; empty for none.
    """
    rows = evaluation.scores()["rows"]
    blocks = [
        _rows_table("fluency", rows, NLG_NAMES),
        _rows_table("clinical efficacy, F1", rows, F1_HEADINGS),
        _below(evaluation),
    ]
    if intervals:
        columns = [column for column in COLUMNS if column in intervals[ROWS["model"]]]
        header = ["95 % interval", *(COLUMNS[column] for column in columns)]
        shown = {name: [shown_interval(row.get(column)) for column in columns] for name, row in intervals.items()}
        blocks.append(markdown_table(header, [[name, *cells] for name, cells in shown.items()]))
        blocks.append(difference_table(differences))
    return "\n\n".join(blocks)


def difference_table(
    differences: Mapping[str, Mapping[str, PairedDifference]], headings: Mapping[str, str] = COLUMNS
) -> str:
    """The model minus each other row, with what the intervals are below.

    Args:
        differences: by row and column, as [`bootstrap_rows`] has them.
        headings: the columns that are shown, as far as any row has them.
    """
    columns = [column for column in headings if any(column in row for row in differences.values())]
    shown = [[name, *(_difference(row.get(column)) for column in columns)] for name, row in differences.items()]
    table = markdown_table(["model minus", *(headings[column] for column in columns)], shown)
    return table + "\n\nDifferences with 95 % intervals of a paired bootstrap; bold where 0 lies outside."


def format_steering(faithfulness: Mapping[str, Any]) -> str:
    """Faithfulness under each condition, the model's beside the constant's.

    Args:
        faithfulness: `Steering.scores`, and the `labeler`, as evaluation.json has them.
    """
    conditions = faithfulness["conditions"]
    if not conditions:
        return "The model is not told of findings."
    rows = []
    for name, found in conditions.items():
        model = found["model"]
        shares = [shown_number(one[average]) for one in (model, found["constant"]) for average in ("macro", "micro")]
        counts = [found["studies"], model["counted"]]
        missed = [model["contradicted"], model["omitted"], model["added"]]
        rows.append([CONDITIONS[name], *map(str, counts), *shares, *map(str, missed)])
    header = ["the report says as told", "studies", "findings x states", "macro", "micro", "constant, macro"]
    header += ["constant, micro", "contradicted", "omitted", "added"]
    floor = next(iter(conditions.values()))["model"]["floor"]
    return markdown_table(header, rows) + (
        "\n\nShares of what was told, positive, negative or unclear, that the labeler "
        f"{faithfulness['labeler']} reads in the report; macro over findings x states told at least {floor} times, "
        "without No Finding."
    )


def _rows_table(corner: str, rows: Mapping[str, Mapping[str, Any]], headings: Mapping[str, str]) -> str:
    """Scores of the model's columns; a dash where a row has none."""
    columns = [column for column in headings if column in rows[ROWS["model"]]]
    cells = [[name, *(shown_number(scores.get(column)) for column in columns)] for name, scores in rows.items()]
    return markdown_table([corner, *(headings[column] for column in columns)], cells)


def _below(evaluation: Evaluation) -> str:
    positives = evaluation.rows["model"].scores["findings_with_positives_13_uncertain_negative"]
    return (
        f"{len(evaluation.ids)} studies; macro-F1 over the 13 findings without No Finding ({positives} of them occur), "
        f"uncertain as negative, by the labeler {evaluation.labeler}"
    )


def _difference(found: PairedDifference | None) -> str:
    if found is None:
        return "–"
    told = f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return told if found.low <= 0 <= found.high else f"**{told}**"


# --- CSV -------------------------------------------------------------------------------------------------------------


def write_predictions(evaluation: Evaluation, path: Path) -> None:
    """A CSV of N rows: id, true report, generated reports, the model's scores, and the 14 states it predicted.

    Where cleaning or a protocol changed them, the texts that states were read from are in `uncleaned reference` and
    `uncleaned report`.
    """
    model = evaluation.rows["model"]
    uncleaned = {
        f"uncleaned {name}": texts
        for name, texts, compared in (
            ("reference", evaluation.uncleaned_references, evaluation.references),
            ("report", model.uncleaned, model.reports),
        )
        if texts != compared
    }
    scores = model.found.per_study
    others = {f"report, {ROWS[name]}": row.reports for name, row in evaluation.rows.items() if name != "model"}
    others |= uncleaned
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (
        [
            study,
            evaluation.references[position],
            model.reports[position],
            *(reports[position] for reports in others.values()),
            *(f"{values[position]:.6f}" for values in scores.values()),
            *(FINDING_STATES[state] for state in evaluation.finding_states[position]),
        ]
        for position, study in enumerate(evaluation.ids)
    )
    write_csv(path, ["id", "reference", "report", *others, *scores, *(f"predicted {name}" for name in FINDINGS)], rows)


def write_scores(evaluation: Evaluation, path: Path) -> None:
    """A CSV of a row a study and system: id, system, and each score that studies have."""
    scores = list(evaluation.rows["model"].found.per_study)
    rows = (
        [study, ROWS[name], *(f"{row.found.per_study[score][position]:.6f}" for score in scores)]
        for name, row in evaluation.rows.items()
        for position, study in enumerate(evaluation.ids)
    )
    write_csv(path, ["id", "system", *scores], rows)


def write_contradictions(steering: Steering, evaluation: Evaluation, path: Path) -> None:
    """A CSV of a row a contradiction: from which states the report was written, study, finding, told, said."""
    rows = (
        [name, evaluation.ids[study], *rest]
        for name, found in steering.conditions.items()
        for study, *rest in found.contradicted
    )
    write_csv(path, ["states", "study", "finding", "told", "said"], rows)


__all__ = [
    "COLUMNS",
    "F1_HEADINGS",
    "bootstrap_rows",
    "difference_table",
    "format_scores",
    "format_steering",
    "format_table",
    "write_contradictions",
    "write_predictions",
    "write_scores",
]
