"""Results of an ablation: scores over seeds, and the contribution of each module with its interval, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.evaluate import ROWS
from ..evaluation.report import shown_difference
from ..files_otdrg import write_json, write_text
from ..labelers import load_labeler
from ..metrics import PairedDifference, StudyStatistics, higher_is_better, main_scores, paired_bootstrap, score_reports
from ..runtime.csv_files import read_csv
from ..runtime.printable import enumerated, markdown_table
from ..runtime.run_record import read_results
from ..sections_otdrg import has_sections, without_headings
from .ablation import MODULES, TABLES, Plan, Row, Run
from .ablation_figure import draw_ablation

#: The columns of the paper's tables, in its order.
PAPER_COLUMNS: dict[str, str] = {
    "example_precision_14_uncertain_negative": "Pre.",
    "example_recall_14_uncertain_negative": "Rec.",
    "example_f1_14_uncertain_negative": "F1",
    "macro_f1_13_uncertain_negative": "macro-F1 (13)",
    "bleu_1": "BLEU-1",
    "bleu_4": "BLEU-4",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
}

#: Contributions: a name, the row with the module, and the one without it. Those whose rows are in the table are shown.
CONTRIBUTIONS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("IRCP alone", ("ircp",), ()),
    ("DLE alone", ("dle",), ()),
    ("IRCP beside DLE", ("ircp", "dle"), ("dle",)),
    ("FIOT", MODULES, ("ircp", "dle")),
    ("FIOT", ("dle", "fiot"), ("dle",)),
    ("the full model", MODULES, ()),
    ("the full model", ("dle", "fiot"), ()),
)

_CONTROLS = ("constant", "nearest", "expected", "shuffled", "true_states")
_HEADINGS = {"epsilon": "ε", "iterations": "iterations"}
_ROW_LABELS = {"epsilon": "ε = {:g}", "iterations": "{:g} iterations"}
_UNDECIDED = "undecided"


def columns() -> dict[str, str]:
    """The scores of the tables and their headings: the paper's, then other main scores of the registry of metrics."""
    return {**PAPER_COLUMNS, **{name: shown for name, shown in main_scores().items() if name not in PAPER_COLUMNS}}


@dataclass
class _RowRuns:
    """The runs of a row by seed: the evaluations of finished ones, the errors of the others."""

    row: Row
    runs: dict[int, Run] = field(default_factory=dict)
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        if self.row.value is not None:
            return _ROW_LABELS[self.row.table].format(self.row.value)
        return " + ".join(module.upper() for module in self.row.modules) or "baseline"

    def read(self, seed: int, run: Run) -> None:
        """Add a run."""
        self.runs[seed] = run
        if run.error is not None:
            self.errors[seed] = run.error
            return
        evaluation = read_results(run.folder).get("report", {}).get("evaluation")
        if evaluation is None or not (run.folder / "predictions.csv").is_file():
            self.errors[seed] = f"{run.folder} is finished, but has no results.json or predictions.csv: remove it"
            return
        self.evaluations[seed] = evaluation

    def scores(self, of: str = "model") -> dict[str, dict[str, Any]]:
        """Mean, standard deviation (None for one seed) and values by seed, of each score that all seeds have."""
        rows = {seed: found["rows"].get(ROWS[of], {}) for seed, found in self.evaluations.items()}
        table = {}
        for column in columns():
            values = {seed: scores.get(column) for seed, scores in rows.items()}
            if values and None not in values.values():
                table[column] = {
                    "mean": statistics.mean(values.values()),
                    "sd": statistics.stdev(values.values()) if len(values) > 1 else None,
                    "by_seed": values,
                }
        return table

    def summary(self) -> dict[str, Any]:
        """The row as JSON values."""
        return {
            "name": self.row.name,
            "label": self.label,
            "modules": self.row.modules,
            "value": self.row.value,
            "scores": self.scores(),
            "runs": {seed: str(run.folder) for seed, run in self.runs.items()},
            "failed": self.errors,
        }


def summarize(plan: Plan, resamples: int = 1000) -> dict[str, Any]:
    """All figures of the tables as JSON values.

    Args:
        plan: the plan, after its runs were trained or failed.
        resamples: bootstrap resamples for the intervals of the contributions.

    Raises:
        ValueError: runs were scored on different studies, or by different labelers.
    """
    by_row: dict[Row, _RowRuns] = {}
    for (row, run_seed), run in plan.by_row.items():
        by_row.setdefault(row, _RowRuns(row)).read(run_seed, run)
    _check_alike(list(by_row.values()))
    finished = next((found for rows in by_row.values() for found in rows.evaluations.values()), None)
    facts = dict.fromkeys(("studies", "split", "labeler", "findings_with_positives_13"))
    if finished is not None:
        model = finished["rows"][ROWS["model"]]
        facts = {name: finished[name] for name in ("studies", "split", "labeler")}
        facts["findings_with_positives_13"] = model["findings_with_positives_13_uncertain_negative"]
    tables = {}
    for table in dict.fromkeys(row.table for row in by_row):
        rows = [runs for row, runs in by_row.items() if row.table == table]
        # The controls are those of the last row; in the table of modules it is the full model.
        controls = {"of": rows[-1].label, **{name: rows[-1].scores(name) for name in _CONTROLS}}
        tables[table] = {"rows": [runs.summary() for runs in rows], "controls": controls}
    return {
        "seeds": sorted({run_seed for _, run_seed in plan.by_row}),
        **facts,
        "notes": _notes(plan, finished),
        "tables": tables,
        "contributions": _contributions(by_row, resamples),
        "resamples": resamples,
    }


def _check_alike(rows: Sequence[_RowRuns]) -> None:
    """Refuse to compare runs that were scored on different studies, or by different labelers."""
    first = None
    for runs in rows:
        for seed, evaluation in runs.evaluations.items():
            path = runs.runs[seed].folder / "predictions.csv"
            studies = [(row["id"], row["reference"], row.get("uncleaned reference")) for row in read_csv(path)]
            scored = evaluation["split"], evaluation["labeler"], studies
            first = first or (path, scored)
            if scored != first[1]:
                raise ValueError(
                    f"{path} and {first[0]} have different studies or labelers: expected runs of one recipe; "
                    "remove the others"
                )


def _notes(plan: Plan, evaluation: dict[str, Any] | None) -> list[str]:
    notes = [] if evaluation is None else list(evaluation["rows"][ROWS["model"]].get("notes", {}).values())
    recipe = plan.runs[0].recipe
    shares = recipe.model.overrides.get("predictor_encoder") != "own"
    if shares and recipe.predictor.vision != "frozen" and any("dle" not in row.modules for row, _ in plan.by_row):
        notes.append(
            "The predictor trains the encoder it shares with the report (predictor.vision), so in rows with DLE the "
            "encoder was also trained on labels, and in rows without DLE it was not; "
            "model.overrides.predictor_encoder=own gives all rows the same encoder."
        )
    return notes


# --- contributions ---------------------------------------------------------------------------------------------------


def _contributions(by_row: dict[Row, _RowRuns], resamples: int) -> list[dict[str, Any]]:
    """What each module adds to each score: the mean over seeds, and its paired bootstrap interval.

    Studies are drawn with replacement, the same ones for both rows, and so are the seeds of each row.
    """
    by_modules = {row.modules: runs for row, runs in by_row.items() if row.table == "modules"}
    read = _StatisticsReader()
    contributions = []
    for name, having, lacking in CONTRIBUTIONS:
        if not {having, lacking} <= by_modules.keys():
            continue
        pair = by_modules[having], by_modules[lacking]
        seeds = sorted(pair[0].evaluations.keys() & pair[1].evaluations.keys())
        scores = {}
        if seeds:
            systems = ([read(runs.runs[run_seed]) for run_seed in seeds] for runs in pair)
            found = paired_bootstrap(*systems, resamples=resamples, seed=0, resample_runs=len(seeds) > 1)
            for column in columns():
                if column in found:
                    difference, low, high, _ = found[column]
                    verdict = "raises" if low > 0 else "lowers" if high < 0 else _UNDECIDED
                    scores[column] = {"difference": difference, "low": low, "high": high, "verdict": verdict}
        row, against = (runs.label for runs in pair)
        sentence = _sentence(f"{name} ({row} against {against})", scores)
        contributions.append(
            {"name": name, "row": row, "against": against, "seeds": seeds, "scores": scores, "sentence": sentence}
        )
    return contributions


class _StatisticsReader:
    """Computes the study statistics of runs from their predictions.csv; keeps the result of each run."""

    def __init__(self):
        self._true_states: np.ndarray | None = None
        self._read: dict[str, StudyStatistics] = {}

    def __call__(self, run: Run) -> StudyStatistics:
        key = str(run.folder)
        if key not in self._read:
            evaluation = read_results(run.folder)["report"]["evaluation"]
            labeler = load_labeler(evaluation["labeler"])
            rows = read_csv(run.folder / "predictions.csv")
            if has_sections(row["reference"] for row in rows):
                # As in the evaluation, reports are compared without the headings of their sections.
                rows = [{name: without_headings(text) for name, text in row.items()} for row in rows]
            if self._true_states is None:
                # As in the evaluation, states are read before cleaning.
                self._true_states = labeler.label([row.get("uncleaned reference", row["reference"]) for row in rows])
            found = evaluation["rows"][ROWS["model"]]
            self._read[key] = score_reports(
                [row["report"] for row in rows],
                [row["reference"] for row in rows],
                labeler.label([row.get("uncleaned report", row["report"]) for row in rows]),
                self._true_states,
                [name for name in columns() if found.get(name) is not None],
            ).statistics
        return self._read[key]


def _sentence(what: str, scores: Mapping[str, Mapping[str, Any]]) -> str:
    """The effect of a module on the scores, as a sentence."""
    if not scores:
        return f"{what}: {_UNDECIDED}, no seed finished in both rows."
    by_verdict: dict[str, list[str]] = {}
    for column, score in scores.items():
        by_verdict.setdefault(score["verdict"], []).append(columns()[column])
    parts = [f"{verb} {enumerated(by_verdict[verb])}" for verb in ("raises", "lowers") if verb in by_verdict]
    undecided = f"the effect on {enumerated(by_verdict.get(_UNDECIDED, ['']))} is {_UNDECIDED}"
    if not parts:
        return f"{what}: {undecided}."
    return f"{what} {'; '.join([*parts, undecided] if _UNDECIDED in by_verdict else parts)}."


def write_summary(plan: Plan, output: Path, recipe: str, overrides: Sequence[str], resamples: int) -> str:
    """Write ablation.md, ablation.json and ablation.png; returns the content of ablation.md."""
    summary = {"recipe": recipe, "overrides": list(overrides), **summarize(plan, resamples)}
    document = format_summary(summary, f"Ablations of {recipe}", "ablation.png")
    write_json(output / "ablation.json", summary)
    draw_ablation(summary, output / "ablation.png")
    write_text(output / "ablation.md", document)
    return document


# --- Markdown --------------------------------------------------------------------------------------------------------


def format_summary(summary: dict[str, Any], title: str, picture: str | None = None) -> str:
    """A summary's tables and sentences as Markdown; `picture` is the path of the figure, for a link."""
    blocks = [f"# {title}", _preamble(summary)]
    for name, table in summary["tables"].items():
        blocks += [f"## {TABLES[name]}", _format_table(name, table)]
        if name == "modules" and summary["contributions"]:
            blocks += ["### What each module contributes", _format_contributions(summary)]
    if picture is not None:
        blocks.append(f"![The tables as pictures]({picture})")
    failed = [
        f"- {row['name']}, seed {seed}: {error}"
        for table in summary["tables"].values()
        for row in table["rows"]
        for seed, error in row["failed"].items()
    ]
    if failed:
        blocks += ["## Runs that failed", "\n".join(dict.fromkeys(failed))]
    return "\n\n".join(blocks) + "\n"


def _preamble(summary: dict[str, Any]) -> str:
    seeds = summary["seeds"]
    if summary["studies"] is None:
        return "No run finished."
    spread = ": mean ± standard deviation over seeds" if len(seeds) > 1 else ""
    text = (
        f"{summary['studies']} studies of the split {summary['split']}, {'seeds' if len(seeds) > 1 else 'seed'} "
        f"{', '.join(map(str, seeds))}{spread}. Pre., Rec. and F1 are averages over studies (14 findings), "
        f"macro-F1 (13) is the average over the findings without No Finding ({summary['findings_with_positives_13']} "
        f"of them occur); uncertain as negative, states by the labeler {summary['labeler']}. The best of each column "
        "is bold."
    )
    return "\n\n".join([text, *summary["notes"]])


def _format_table(name: str, table: dict[str, Any]) -> str:
    shown = {key: head for key, head in columns().items() if any(key in row["scores"] for row in table["rows"])}
    modules = [module for module in MODULES if any(module in row["modules"] for row in table["rows"])]
    keys = [module.upper() for module in modules] if name == "modules" else [_HEADINGS[name]]
    best = {}
    for column in shown:
        means = [row["scores"][column]["mean"] for row in table["rows"] if column in row["scores"]]
        best[column] = max(means) if higher_is_better(column) else min(means)
    rows = []
    for row in table["rows"]:
        marks = ["✓" if module in row["modules"] else "" for module in modules]
        if name != "modules":
            marks = [f"{row['value']:g}"]
        if not row["scores"]:
            rows.append([*marks, f"failed: {next(iter(row['failed'].values()))}"])
            continue
        if row["failed"]:
            marks[-1] += f" (without seed {', '.join(map(str, row['failed']))})"
        cells = []
        for column in shown:
            score = row["scores"].get(column)
            is_best = score is not None and score["mean"] == best[column]
            cells.append(f"**{_number(score)}**" if is_best else _number(score))
        rows.append([*marks, *cells])
    controls = table["controls"]
    labels = {
        "constant": "best constant report, each column its own",
        "nearest": f"{ROWS['nearest']}, by the features of {controls['of']}",
        "expected": f"{ROWS['expected']}, by the same features",
        "shuffled": f"{controls['of']}, images shuffled across studies",
        "true_states": f"{controls['of']}, true states given",
    }
    for control, label in labels.items():
        if controls[control]:
            cells = (_number(controls[control].get(column)) for column in shown)
            rows.append([label, *[""] * (len(keys) - 1), *cells])
    return markdown_table([*keys, *shown.values()], rows)


def _format_contributions(summary: dict[str, Any]) -> str:
    contributions = summary["contributions"]
    shown = {key: head for key, head in columns().items() if any(key in row["scores"] for row in contributions)}
    rows = []
    for row in contributions:
        found = (row["scores"].get(column) for column in shown)
        cells = (it and PairedDifference(it["difference"], it["low"], it["high"], np.nan) for it in found)
        rows.append([row["row"], row["against"], *map(shown_difference, cells)])
    several = any(len(row["seeds"]) > 1 for row in contributions)
    scope = "They describe these runs and do not cover training again."
    # On IU X-Ray two runs that differed in their initialisation only had intervals of BLEU-4 without 0.
    sentences = ["- With one seed, the initialisation alone may make such differences: conclusions need several seeds."]
    if several:
        scope = "They cover training again only as far as so few seeds allow."
        sentences = []
    sentences += [f"- {row['sentence']}" for row in contributions if several or not row["seeds"]]
    return "\n".join(
        [
            markdown_table(["", "against", *shown.values()], rows),
            "",
            f"95 % intervals of a paired bootstrap over studies{' and seeds' if several else ''} "
            f"({summary['resamples']} resamples); bold where 0 lies outside. {scope}",
            "",
            *sentences,
        ]
    )


def _number(score: dict[str, Any] | None) -> str:
    if score is None:
        return "–"
    return f"{score['mean']:.3f}" + ("" if score["sd"] is None else f" ± {score['sd']:.3f}")
