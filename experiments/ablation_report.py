"""What an ablation found: its runs' scores over seeds, the modules' contributions with their intervals, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..evaluation.evaluate import ROWS
from ..labelers import load_labeler
from ..metrics import NLG_METRICS, StudyStatistics, paired_bootstrap, score_reports
from ..runtime.csv_files import read_csv
from ..training.run_folder import read_results
from .ablation import FULL, TABLES, Plan, Row, Run

#: The columns of the tables, in the paper's order, and how they are headed.
COLUMNS: dict[str, str] = {
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

#: What each module contributes: its name, the row that has it, and the one that lacks it.
CONTRIBUTIONS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("IRCP alone", ("ircp",), ()),
    ("DLE alone", ("dle",), ()),
    ("IRCP beside DLE", ("ircp", "dle"), ("dle",)),
    ("FIOT", FULL, ("ircp", "dle")),
    ("the full model", FULL, ()),
)

_CONTROLS = ("constant", "nearest", "consensus", "shuffled", "true_states")
_HEADINGS = {"epsilon": "ε", "iterations": "iterations"}
_ROW_LABELS = {"epsilon": "ε = {:g}", "iterations": "{:g} iterations"}


@dataclass
class _RowRuns:
    """A row's runs by seed: what those that finished found, and what the others failed with."""

    row: Row
    runs: dict[int, Run] = field(default_factory=dict)
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        if self.row.value is not None:
            return _ROW_LABELS[self.row.table].format(self.row.value)
        return " + ".join(module.upper() for module in self.row.modules) or "baseline"

    def scores(self, of: str = "model") -> dict[str, dict[str, Any]]:
        """Mean, standard deviation (None of one seed) and values by seed, of each column all seeds have."""
        rows = {seed: found["rows"].get(ROWS[of], {}) for seed, found in self.evaluations.items()}
        table = {}
        for column in COLUMNS:
            values = {seed: scores.get(column) for seed, scores in rows.items()}
            if values and None not in values.values():
                table[column] = {
                    "mean": statistics.mean(values.values()),
                    "sd": statistics.stdev(values.values()) if len(values) > 1 else None,
                    "by_seed": values,
                }
        return table


def summarize(plan: Plan, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Everything the tables say, ready for JSON.

    Args:
        plan: whose runs have been trained, or have failed.
        resamples: of the bootstrap behind the contributions' intervals.
        seed: of its draws.

    Raises:
        ValueError: runs were scored on different studies, or by different labelers.
    """
    by_row: dict[Row, _RowRuns] = {}
    for (row, run_seed), run in plan.by_row.items():
        _read(by_row.setdefault(row, _RowRuns(row)), run_seed, run)
    _check_alike(by_row.values())
    finished = next((found for rows in by_row.values() for found in rows.evaluations.values()), None)
    summary: dict[str, Any] = {
        "seeds": sorted({run_seed for _, run_seed in plan.by_row}),
        "studies": finished and finished["studies"],
        "split": finished and finished["split"],
        "labeler": finished and finished["labeler"],
        "findings_with_positives_13": finished
        and finished["rows"][ROWS["model"]]["findings_with_positives_13_uncertain_negative"],
        "notes": _notes(plan, finished),
        "tables": {},
        "contributions": _contributions(by_row, resamples, seed),
        "resamples": resamples,
    }
    for table in dict.fromkeys(row.table for row in by_row):
        rows = [runs for row, runs in by_row.items() if row.table == table]
        summary["tables"][table] = {
            "rows": [
                {
                    "name": runs.row.name,
                    "label": runs.label,
                    "modules": runs.row.modules,
                    "value": runs.row.value,
                    "scores": runs.scores(),
                    "runs": {run_seed: str(run.folder) for run_seed, run in runs.runs.items()},
                    "failed": runs.errors,
                }
                for runs in rows
            ],
            # Of the row with the most of what the table is about, the full model in that of modules.
            "controls": {"of": rows[-1].label, **{name: rows[-1].scores(name) for name in _CONTROLS}},
        }
    return summary


def _read(runs: _RowRuns, seed: int, run: Run) -> None:
    runs.runs[seed] = run
    if run.error is not None:
        runs.errors[seed] = run.error
        return
    evaluation = read_results(run.folder).get("report", {}).get("evaluation")
    if evaluation is None or not (run.folder / "predictions.csv").is_file():
        runs.errors[seed] = f"{run.folder} is finished, but without results.json or predictions.csv: remove it"
        return
    runs.evaluations[seed] = evaluation


def _check_alike(rows: Sequence[_RowRuns]) -> None:
    """Refuses to compare runs that were scored on other studies, or otherwise."""
    first = None
    for runs in rows:
        for seed, evaluation in runs.evaluations.items():
            path = runs.runs[seed].folder / "predictions.csv"
            rows = _predictions(runs.runs[seed])
            studies = [(row["id"], row["reference"], row.get("uncleaned reference")) for row in rows]
            scored = evaluation["split"], evaluation["labeler"], studies
            if first is None:
                first = path, scored
            elif scored != first[1]:
                raise ValueError(
                    f"{path} and {first[0]} are of different studies, or scored by different labelers: expected one "
                    "recipe's; remove what is of another"
                )


def _predictions(run: Run) -> list[dict[str, str]]:
    """The rows of a run's `predictions.csv`."""
    return read_csv(run.folder / "predictions.csv")


def _notes(plan: Plan, evaluation: dict[str, Any] | None) -> list[str]:
    notes = []
    if evaluation is not None:
        notes += evaluation["rows"][ROWS["model"]].get("notes", {}).values()
    recipe = plan.runs[0].recipe
    shares = recipe.model.overrides.get("predictor_encoder") != "own"
    rows = [row for row, _ in plan.by_row]
    if shares and recipe.predictor.vision != "frozen" and any("dle" not in row.modules for row in rows):
        notes.append(
            "The predictor trains the encoder it shares with the report (predictor.vision), so that rows with DLE also "
            "see images through an encoder that was taught labels, and rows without do not; "
            "model.overrides.predictor_encoder=own gives all rows the same."
        )
    return notes


# --- contributions ---------------------------------------------------------------------------------------------------


def _contributions(by_row: dict[Row, _RowRuns], resamples: int, seed: int) -> list[dict[str, Any]]:
    """What each module adds to each column: the mean over seeds, and its paired bootstrap interval.

    Studies are drawn with replacement, the same ones of both rows, and so are the seeds of each row.
    """
    by_modules = {row.modules: runs for row, runs in by_row.items() if row.table == "modules"}
    reader = _StatisticsReader()
    contributions = []
    for name, having, lacking in CONTRIBUTIONS if by_modules else ():
        pair = by_modules[having], by_modules[lacking]
        seeds = sorted(pair[0].evaluations.keys() & pair[1].evaluations.keys())
        contribution: dict[str, Any] = {
            "name": name,
            "row": pair[0].label,
            "against": pair[1].label,
            "seeds": seeds,
            "scores": {},
        }
        if seeds:
            systems = ([reader.read(runs.runs[run_seed]) for run_seed in seeds] for runs in pair)
            found = paired_bootstrap(*systems, resamples=resamples, seed=seed, resample_runs=len(seeds) > 1)
            contribution["scores"] = {
                column: {
                    "difference": found[column].difference,
                    "low": found[column].low,
                    "high": found[column].high,
                    "verdict": _verdict(found[column].low, found[column].high),
                }
                for column in COLUMNS
                if column in found
            }
        contribution["sentence"] = _sentence(contribution)
        contributions.append(contribution)
    return contributions


class _StatisticsReader:
    """Reads what each study adds to a run's scores out of its predictions; the true reports' states only once."""

    def __init__(self):
        self._true_states: np.ndarray | None = None
        self._read: dict[str, StudyStatistics] = {}

    def read(self, run: Run) -> StudyStatistics:
        key = str(run.folder)
        if key not in self._read:
            evaluation = read_results(run.folder)["report"]["evaluation"]
            labeler = load_labeler(evaluation["labeler"])
            rows = _predictions(run)
            references, reports = ([row[name] for row in rows] for name in ("reference", "report"))
            if self._true_states is None:
                # As the evaluation read them, before cleaning.
                self._true_states = labeler.label([row.get("uncleaned reference", row["reference"]) for row in rows])
            scores = evaluation["rows"][ROWS["model"]]
            metrics = [name for name in COLUMNS if name in NLG_METRICS and scores.get(name) is not None]
            states = labeler.label(reports), self._true_states
            self._read[key] = score_reports(reports, references, *states, metrics).statistics
        return self._read[key]


def _verdict(low: float, high: float) -> str:
    if low > 0:
        return "raises"
    return "lowers" if high < 0 else "cannot be told"


def _sentence(contribution: dict[str, Any]) -> str:
    """What a module does, in words, whatever the sign."""
    what = f"{contribution['name']} ({contribution['row']} against {contribution['against']})"
    if not contribution["scores"]:
        return f"{what}: cannot be told, no seed finished in both."
    said: dict[str, list[str]] = {}
    for column, score in contribution["scores"].items():
        said.setdefault(score["verdict"], []).append(COLUMNS[column])
    parts = [f"{verb} {_listed(said[verb])}" for verb in ("raises", "lowers") if verb in said]
    unsure = said.get("cannot be told")
    if unsure and parts:
        parts.append(f"whether it changes {_listed(unsure)} cannot be told")
    elif unsure:
        return f"{what}: whether it changes {_listed(unsure)} cannot be told."
    return f"{what} {'; '.join(parts)}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# --- Markdown --------------------------------------------------------------------------------------------------------


def format_summary(summary: dict[str, Any], title: str, picture: str | None = None) -> str:
    """A summary's tables and sentences as Markdown.

    Args:
        summary: of [`summarize`].
        title: of the document.
        picture: path of the figure, as the document is to name it.
    """
    blocks = [f"# {title}", _preamble(summary)]
    for name, table in summary["tables"].items():
        blocks += [f"## {TABLES[name]}", _format_table(name, table)]
        if name == "modules" and summary["contributions"]:
            blocks += ["### What each module contributes", _format_contributions(summary)]
    if picture is not None:
        blocks.append(f"![The tables as pictures]({picture})")
    failed = {
        f"- {row['name']}, seed {seed}: {error}": None
        for table in summary["tables"].values()
        for row in table["rows"]
        for seed, error in row["failed"].items()
    }
    if failed:
        blocks += ["## Runs that failed", "\n".join(failed)]
    return "\n\n".join(blocks) + "\n"


def _preamble(summary: dict[str, Any]) -> str:
    seeds = summary["seeds"]
    if summary["studies"] is None:
        return "No run finished."
    spread = ": mean ± standard deviation over seeds" if len(seeds) > 1 else ""
    text = (
        f"{summary['studies']} studies of the split {summary['split']}, {'seeds' if len(seeds) > 1 else 'seed'} "
        f"{', '.join(map(str, seeds))}{spread}. Pre., Rec. and F1 are the average over studies (14 findings), "
        f"macro-F1 (13) that over the findings without No Finding ({summary['findings_with_positives_13']} of them "
        f"occur); uncertain as negative, states by the labeler {summary['labeler']}. The best of each column is bold."
    )
    return "\n\n".join([text, *summary["notes"]])


def _format_table(name: str, table: dict[str, Any]) -> str:
    columns = [column for column in COLUMNS if any(column in row["scores"] for row in table["rows"])]
    keys = [module.upper() for module in FULL] if name == "modules" else [_HEADINGS[name]]
    best = {
        column: max(row["scores"][column]["mean"] for row in table["rows"] if column in row["scores"])
        for column in columns
    }
    lines = [_line([*keys, *(COLUMNS[column] for column in columns)]), "|---" * (len(keys) + len(columns)) + "|"]
    for row in table["rows"]:
        marks = ["✓" if module in row["modules"] else "" for module in FULL]
        marks = marks if name == "modules" else [f"{row['value']:g}"]
        if not row["scores"]:
            lines.append(_line([*marks, "failed: " + next(iter(row["failed"].values())).replace("|", "\\|")]))
            continue
        if row["failed"]:
            marks[-1] += f" (without seed {', '.join(map(str, row['failed']))})"
        cells = []
        for column in columns:
            told = _number(row["scores"].get(column))
            is_best = column in row["scores"] and row["scores"][column]["mean"] == best[column]
            cells.append(f"**{told}**" if is_best else told)
        lines.append(_line([*marks, *cells]))
    controls = table["controls"]
    labels = {
        "constant": "best constant report, each column its own",
        "nearest": f"{ROWS['nearest']}, by the features of {controls['of']}",
        "consensus": f"{ROWS['consensus']}, likewise",
        "shuffled": f"{controls['of']}, images shuffled across studies",
        "true_states": f"{controls['of']}, true states given",
    }
    for control, label in labels.items():
        scores = controls[control]
        if scores:
            cells = (_number(scores.get(column)) for column in columns)
            lines.append(_line([label, *[""] * (len(keys) - 1), *cells]))
    return "\n".join(lines)


def _format_contributions(summary: dict[str, Any]) -> str:
    contributions = summary["contributions"]
    columns = [column for column in COLUMNS if any(column in row["scores"] for row in contributions)]
    lines = [_line(["", "against", *(COLUMNS[column] for column in columns)]), "|---" * (2 + len(columns)) + "|"]
    for row in contributions:
        cells = []
        for column in columns:
            score = row["scores"].get(column)
            if score is None:
                cells.append("–")
                continue
            told = f"{score['difference']:+.3f} [{score['low']:+.3f}, {score['high']:+.3f}]"
            cells.append(told if score["verdict"] == "cannot be told" else f"**{told}**")
        lines.append(_line([row["row"], row["against"], *cells]))
    seeds = any(len(row["seeds"]) > 1 for row in contributions)
    lines += [
        "",
        f"95 % intervals of a paired bootstrap over studies{' and seeds' if seeds else ''} ({summary['resamples']} "
        "resamples); bold where 0 lies outside. "
        + (
            "They are about training again as far as so few seeds can tell."
            if seeds
            else "Of one seed they are about these runs, not about training them again."
        ),
        "",
        *(f"- {row['sentence']}" for row in contributions),
    ]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(score: dict[str, Any] | None) -> str:
    if score is None:
        return "–"
    return f"{score['mean']:.3f}" + ("" if score["sd"] is None else f" ± {score['sd']:.3f}")


__all__ = ["COLUMNS", "CONTRIBUTIONS", "format_summary", "summarize"]
