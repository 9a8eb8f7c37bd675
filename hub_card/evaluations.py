"""An evaluation as the model card shows it: tables, and how the model compares with each baseline and control."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..evaluation.evaluate import IN_TRAINING, ROWS
from ..evaluation.report import F1_HEADINGS, describe_search, difference_table, format_faithfulness, rows_table
from ..findings_otdrg import FINDING_DISPLAY_NAMES
from ..metrics import METRICS, UNCERTAIN_POLICIES, Interval, PairedDifference, display_name, main_scores
from ..metrics.classification import MINIMUM_INTERVAL_POSITIVES
from ..metrics.tables import clinical_table, markdown_table, shown_interval, shown_number

#: Scores in which the model is compared with each other row, by their display names.
COMPARED = {
    score: display_name(score)
    for score in (
        *("bleu_4", "meteor", "rouge_l", "cider"),
        *("example_f1_14_uncertain_negative", "micro_f1_13_uncertain_negative", "macro_f1_13_uncertain_negative"),
    )
}
#: Below this number of positive studies, a finding's figures are too uncertain to be used.
FEW_POSITIVES = 10


def score_headings() -> dict[str, str]:
    """Display names of all scores except clinical efficacy, in the order of the registry of metrics."""
    metrics = (metric for metric in METRICS.values() if metric.name != "clinical_efficacy")
    return {name: score.display for metric in metrics for name, score in metric.scores.items()}


@dataclass(frozen=True)
class Difference:
    """The model's score against another row's; `difference` is None without a bootstrap."""

    heading: str
    model: float
    other: float
    difference: PairedDifference | None

    @property
    def place(self) -> str:
        """`above`, `below` or `undecided`, by the interval if there is one, else by the score."""
        low = high = self.model - self.other
        if self.difference is not None:
            low, high = self.difference.low, self.difference.high
        return "above" if low > 0 else "below" if high < 0 else "undecided"


class EvaluationFacts:
    """An evaluation as the card shows it.

    Args:
        evaluation: one of [`RunFiles.evaluations`].
        dataset: its display name.
        predictor: validation results of the label predictor, whose AUCs are shown beside the findings; None for
            evaluations on other studies.
    """

    def __init__(self, evaluation: Mapping[str, Any], dataset: str, predictor: Mapping[str, Any] | None):
        self.evaluation, self.dataset, self.predictor = evaluation, dataset, predictor
        self.rows: dict[str, dict[str, Any]] = evaluation["rows"]
        self.model = self.rows[ROWS["model"]]
        self.findings: dict[str, dict[str, Any]] = self.model["per_finding"]["uncertain_negative"]
        self.intervals = {
            name: Interval(self.model[name], bounds["low"], bounds["high"])
            for name, bounds in evaluation.get("intervals", {}).get(ROWS["model"], {}).items()
            if self.model.get(name) is not None
        }
        self.differences = {
            name: {column: PairedDifference(**found) for column, found in row.items()}
            for name, row in evaluation.get("differences", {}).items()
        }
        self.title = f"{dataset}, split {evaluation['split']}: {self.protocol}, labeler {self.labeler}"

    @property
    def labeler(self) -> str:
        """Name and options of the labeler."""
        options = self.evaluation.get("labeler_options") or {}
        shown = f" ({', '.join(f'{name}={value}' for name, value in options.items())})" if options else ""
        return self.evaluation["labeler"] + shown

    @property
    def protocol(self) -> str:
        """Protocol, truncation of references, and cleaning."""
        found = self.evaluation
        cut = ""
        if found.get("reference_tokens"):
            cut = f" (true reports cut to {found['reference_tokens']} tokens of {found['tokenizer']})"
        return f"protocol {found['protocol']}{cut}, cleaning {found.get('cleaning') or 'not recorded'}"

    @property
    def decoding(self) -> str:
        """How reports were generated."""
        options = self.evaluation["generation"]
        if options.get("num_beams") is None:
            return "decoding not recorded"
        prompt = ", with the studies' indication" if options.get("indication") else ""
        return f"{describe_search(options)}, up to {options['max_new_tokens']} tokens{prompt}"

    @property
    def uses_bank(self) -> bool:
        """Whether reports were chosen with a report bank, which is not published with the model."""
        return bool(self.evaluation["generation"].get("bank"))

    @property
    def uses_indication(self) -> bool:
        """Whether the model was given the studies' indications."""
        return bool(self.evaluation["generation"].get("indication"))

    def comparison(self, name: str) -> dict[str, list[Difference]]:
        """The differences between the model and another row, grouped by [`Difference.place`]."""
        places: dict[str, list[Difference]] = {"below": [], "undecided": [], "above": []}
        for column, heading in COMPARED.items():
            model, other = self.model.get(column), self.rows[name].get(column)
            if model is not None and other is not None:
                found = Difference(heading, model, other, self.differences.get(name, {}).get(column))
                places[found.place].append(found)
        return places

    @property
    def comparisons(self) -> dict[str, dict[str, list[Difference]]]:
        """[`comparison`] with each other row, by name."""
        return {name: self.comparison(name) for name in self.rows if name != ROWS["model"]}

    @property
    def positives(self) -> dict[str, int]:
        """Positive findings, without No Finding: `true`, `written` in generated reports, and in `both`."""
        counted = [row for name, row in self.findings.items() if name != "no_finding"]
        keys = {"true": "support", "written": "predicted", "both": "true_positives"}
        return {name: sum(row[key] for row in counted) for name, key in keys.items()}

    @property
    def never_written(self) -> list[str]:
        """Findings of true reports that no generated report states as positive, with their number of studies."""
        return self._names(lambda row: row["support"] and not row["predicted"])

    @property
    def rare(self) -> list[str]:
        """Findings with fewer than `FEW_POSITIVES` positive studies, with their number."""
        return self._names(lambda row: row["support"] < FEW_POSITIVES)

    def _names(self, chosen) -> list[str]:
        return [
            f"{FINDING_DISPLAY_NAMES[name]} ({row['support']})" for name, row in self.findings.items() if chosen(row)
        ]

    @property
    def notes(self) -> list[str]:
        """Warnings, and reasons for missing scores."""
        notes = [*self.evaluation.get("warnings", []), *self.evaluation.get("notes", [])]
        names = score_headings()
        notes += [f"{names.get(name, name)}: {note}" for name, note in self.model.get("notes", {}).items()]
        if self.intervals and self.model.get("cider") is not None:
            notes.append(
                "CIDEr's intervals: those of the mean over studies, with document frequencies from all studies"
            )
        return notes

    # -- tables -------------------------------------------------------------------------------------------------------

    @property
    def score_table(self) -> str:
        """All scores except clinical efficacy, for every row."""
        return self._table("score", {**score_headings(), **IN_TRAINING})

    @property
    def section_tables(self) -> dict[str, str]:
        """The main scores of each section of the reports, for every row, by its name; empty for one section."""
        return {
            f"{name}, {section['studies']:,} studies": rows_table(name, section["rows"], main_scores())
            for name, section in self.evaluation.get("sections", {}).items()
        }

    @property
    def f1_tables(self) -> dict[str, str]:
        """All F1 scores for every row, by the name of the uncertainty policy."""
        return {
            policy.replace("_", " as "): self._table(
                "F1", {name.replace("uncertain_negative", policy): shown for name, shown in F1_HEADINGS.items()}
            )
            for policy in UNCERTAIN_POLICIES
        }

    @property
    def averages_table(self) -> str:
        """The model's precision, recall and F1."""
        return clinical_table(self.model, self.intervals)

    @property
    def difference_table(self) -> str:
        """The model minus each other row."""
        return difference_table(self.differences, COMPARED)

    @property
    def faithfulness_table(self) -> str:
        """Whether reports state the findings the model was conditioned on; "" if not measured."""
        faithfulness = self.evaluation.get("faithfulness")
        return format_faithfulness(faithfulness) if faithfulness else ""

    @property
    def finding_table(self) -> str:
        """The model's reports, finding by finding, and the AUC of the label predictor."""
        # An AUC over a few positives is too uncertain to be shown.
        areas = {
            name: row if row["positives"] >= MINIMUM_INTERVAL_POSITIVES else {"auc": None}
            for name, row in (self.predictor or {"findings": {}})["findings"].items()
        }
        header = ["finding", "true", "written", "both", "precision", "recall", "F1"]
        header += ["predictor's AUC on validation", "95 % interval"] if areas else []
        rows = []
        for name, row in self.findings.items():
            # Undefined when the denominator is 0; the metrics' 0 would read as a failure.
            rates = [
                row["precision"] if row["predicted"] else None,
                row["recall"] if row["support"] else None,
                row["f1"] if row["support"] or row["predicted"] else None,
            ]
            counts = [str(row[count]) for count in ("support", "predicted", "true_positives")]
            cells = [FINDING_DISPLAY_NAMES[name], *counts, *map(shown_number, rates)]
            if areas:
                bounds = areas[name].get("auc_interval")
                cells += [shown_number(areas[name]["auc"]), f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else "–"]
            rows.append(cells)
        return markdown_table(header, rows)

    def _table(self, corner: str, headings: Mapping[str, str]) -> str:
        """A table of all rows, the model's followed by its intervals; a dash for a missing score."""
        columns = [column for column in headings if column in self.model]
        cells = [
            [name, *(shown_number(scores.get(column)) for column in columns)] for name, scores in self.rows.items()
        ]
        if self.intervals:
            bounds = [shown_interval(self.intervals.get(column)) for column in columns]
            cells.insert(1, ["model, 95 % interval", *bounds])
        return markdown_table([corner, *(headings[column] for column in columns)], cells)
