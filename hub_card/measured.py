"""What evaluations found, as the card says it: tables, and in words what they do and do not show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..evaluation.evaluate import ROWS
from ..evaluation.report import F1_HEADINGS, difference_table, format_steering
from ..findings_otdrg import FINDING_DISPLAY_NAMES
from ..metrics import UNCERTAIN_POLICIES, Interval, PairedDifference
from ..metrics.classification import MINIMUM_INTERVAL_POSITIVES
from ..metrics.tables import NLG_NAMES, clinical_table, markdown_table, shown_interval, shown_number

#: The columns in which a model is held against each other row, a few that tell the most.
JUDGED: dict[str, str] = {
    **{name: NLG_NAMES[name] for name in ("bleu_4", "meteor", "rouge_l", "cider")},
    "example_f1_14_uncertain_negative": "example-F1 (14)",
    "micro_f1_13_uncertain_negative": "micro-F1 (13)",
    "macro_f1_13_uncertain_negative": "macro-F1 (13)",
}
#: Fewer true positives than this, and a finding's figures say next to nothing.
FEW_POSITIVES = 10

_POLICY_WORDS = {"uncertain_negative": "uncertain as negative", "uncertain_positive": "uncertain as positive"}


@dataclass(frozen=True)
class Measured:
    """An evaluation as the card shows it; all but title and lists are Markdown, "" for what was not measured.

    Args:
        title: dataset, split, protocol.
        facts: what was compared with what, and how.
        in_short: what it shows, in words.
        fluency, clinical: every row in every column; `clinical` by policy.
        averages: the model's precision, recall and F1.
        differences: the model minus each other row.
        verdicts: the same in words, row by row.
        findings: a row a finding.
        faithfulness: whether reports say what they were told.
        notes: why something is not there, or not as it should be.
    """

    title: str
    facts: list[str]
    in_short: list[str]
    fluency: str
    clinical: dict[str, str]
    averages: str
    differences: str
    verdicts: list[str]
    findings: str
    faithfulness: str
    notes: list[str]


def measured(evaluation: Mapping[str, Any], dataset: str, predictor: Mapping[str, Any] | None) -> Measured:
    """An evaluation as the card shows it.

    Args:
        evaluation: of [`otdrg.hub_card.run_files.RunFiles`].
        dataset: its name.
        predictor: the predictor's `validation` results, for its areas under the curve; None where the evaluation is on
            other studies than the run's.
    """
    rows = evaluation["rows"]
    model = rows[ROWS["model"]]
    intervals = {
        name: Interval(model[name], bounds["low"], bounds["high"])
        for name, bounds in evaluation.get("intervals", {}).get(ROWS["model"], {}).items()
        if model.get(name) is not None
    }
    headings = {
        policy: {name.replace("uncertain_negative", policy): shown for name, shown in F1_HEADINGS.items()}
        for policy in UNCERTAIN_POLICIES
    }
    differences = _differences(evaluation)
    steering = evaluation.get("faithfulness")
    return Measured(
        title=title(evaluation, dataset),
        facts=_facts(evaluation, dataset),
        in_short=_in_short(evaluation, differences),
        fluency=_rows_table("fluency", rows, NLG_NAMES, intervals),
        clinical={
            _POLICY_WORDS[policy]: _rows_table("F1", rows, columns, intervals) for policy, columns in headings.items()
        },
        averages=clinical_table(model, intervals),
        differences=difference_table(differences, JUDGED) if differences else "",
        verdicts=[_verdict(name, evaluation, differences) for name in rows if name != ROWS["model"]],
        findings=_finding_table(model["per_finding"]["uncertain_negative"], predictor),
        faithfulness=format_steering(steering) if steering else "",
        notes=_notes(evaluation, model),
    )


def title(evaluation: Mapping[str, Any], dataset: str) -> str:
    """Dataset, split, and under which names scores were made: what must be the same for two figures to compare."""
    return f"{dataset}, split {evaluation['split']}: {protocol_words(evaluation)}, labeler {labeler_words(evaluation)}"


def labeler_words(evaluation: Mapping[str, Any]) -> str:
    """The labeler and its options."""
    options = evaluation.get("labeler_options") or {}
    told = f" ({', '.join(f'{name}={value}' for name, value in options.items())})" if options else ""
    return evaluation["labeler"] + told


def never_written(evaluation: Mapping[str, Any]) -> list[str]:
    """Findings that true reports have and the model writes of no study, with how many studies have them."""
    rows = evaluation["rows"][ROWS["model"]]["per_finding"]["uncertain_negative"]
    return [
        f"{FINDING_DISPLAY_NAMES[name]} ({row['support']})"
        for name, row in rows.items()
        if row["support"] and not row["predicted"]
    ]


def rare_findings(evaluation: Mapping[str, Any]) -> list[str]:
    """Findings of fewer than `FEW_POSITIVES` true reports, with how many these are."""
    rows = evaluation["rows"][ROWS["model"]]["per_finding"]["uncertain_negative"]
    return [
        f"{FINDING_DISPLAY_NAMES[name]} ({row['support']})"
        for name, row in rows.items()
        if row["support"] < FEW_POSITIVES
    ]


def protocol_words(evaluation: Mapping[str, Any]) -> str:
    """The protocol with all that its name leaves open, and the cleaning."""
    told = f"protocol {evaluation['protocol']}"
    if evaluation.get("reference_tokens"):
        told += f" (true reports cut to {evaluation['reference_tokens']} tokens of {evaluation['tokenizer']})"
    return f"{told}, cleaning {evaluation.get('cleaning') or 'not recorded'}"


def decoding_words(evaluation: Mapping[str, Any]) -> str:
    """How reports were generated."""
    decoding = evaluation["generation"]
    if decoding.get("num_beams") is None:
        return "decoding not recorded"
    beams = "greedy search" if decoding["num_beams"] == 1 else f"{decoding['num_beams']} beams"
    told = f"{beams}, up to {decoding['max_new_tokens']} tokens"
    return told + (", with the studies' indication in the prompt" if decoding.get("indication") else "")


# --- words -----------------------------------------------------------------------------------------------------------


def _facts(evaluation: Mapping[str, Any], dataset: str) -> list[str]:
    kind = {
        True: "zero-shot: the model was trained on another dataset",
        False: "the dataset the model was trained on; its training studies are another split",
    }
    resampling = evaluation.get("bootstrap")
    facts = [
        f"{evaluation['studies']:,} studies of split {evaluation['split']} of {dataset}",
        kind.get(evaluation.get("zero_shot"), "whether the model was trained on this dataset is not recorded"),
        protocol_words(evaluation),
        f"states of findings in true and in generated reports read by the labeler {labeler_words(evaluation)}",
        decoding_words(evaluation),
        f"constant reports and neighbours from {evaluation.get('training_from', 'the training studies')}",
    ]
    if evaluation.get("generated_reports_cleaned"):
        facts.append("generated reports were cleaned too")
    if resampling and resampling["resamples"]:
        facts.append(f"95 % intervals from {resampling['resamples']:,} bootstrap resamples of the studies")
    else:
        facts.append("no intervals were computed: a difference may be chance")
    return facts


def _in_short(evaluation: Mapping[str, Any], differences: Mapping[str, Mapping[str, PairedDifference]]) -> list[str]:
    """What the best constant report and shuffled images say of the model, and how much it finds."""
    told = []
    measured_by = "" if differences else ", as far as scores without intervals tell"
    for name, against, otherwise in (
        (
            ROWS["constant"],
            "the best constant report (one text for every study)",
            "there, a text that does not look at any image scores as well or better",
        ),
        (
            ROWS["shuffled"],
            "the same model shown the images of other studies",
            "there, the score does not show that the model looks at the image",
        ),
    ):
        if name not in evaluation["rows"]:
            told.append(f"Not measured: {against}. Without it the scores do not tell what they are worth.")
            continue
        judged = _judged(name, evaluation, differences)
        above = [JUDGED[column] for column, place in judged.items() if place == "above"]
        others = [JUDGED[column] for column, place in judged.items() if place != "above"]
        if not above:
            told.append(f"**In none of {_listed(others)} is the model above {against}**{measured_by}: {otherwise}.")
        else:
            rest = f", and is not in {_listed(others)}: {otherwise}" if others else ""
            told.append(f"The model is above {against} in {_listed(above)}{measured_by}{rest}.")
    told.append(_found(evaluation["rows"][ROWS["model"]]["per_finding"]["uncertain_negative"]))
    return told


def _found(findings: Mapping[str, Mapping[str, int]]) -> str:
    """How many of the positive findings its reports have, and how many of those they have are right."""
    counted = [row for name, row in findings.items() if name != "no_finding"]
    there, written, both = (sum(row[count] for row in counted) for count in ("support", "predicted", "true_positives"))
    told = f"Of {there:,} positive findings in true reports its reports have {both:,}; of {written:,} that they have"
    told += f", {written - both:,} are not in the true ones."
    normal = findings["no_finding"]
    missed = normal["predicted"] - normal["true_positives"]
    return told + (
        f" It calls {normal['predicted']:,} studies normal (No Finding), {missed:,} of which their true reports do not."
    )


def _verdict(
    name: str, evaluation: Mapping[str, Any], differences: Mapping[str, Mapping[str, PairedDifference]]
) -> str:
    """Above, below or not told apart from another row, with the numbers."""
    model, other = evaluation["rows"][ROWS["model"]], evaluation["rows"][name]
    places: dict[str, list[str]] = {}
    for column, place in _judged(name, evaluation, differences).items():
        told = f"{JUDGED[column]} ({model[column]:.3f} against {other[column]:.3f}"
        found = differences.get(name, {}).get(column)
        if found is not None:
            told += f"; {found.difference:+.3f}, {found.low:+.3f} to {found.high:+.3f}"
        places.setdefault(place, []).append(told + ")")
    words = {"below": "below it in", "not told apart": "not told apart from it in", "above": "above it in"}
    shown = [f"{words[place]} {_listed(places[place])}" for place in words if place in places]
    return f"**{name[0].upper()}{name[1:]}**: the model is " + "; ".join(shown) + "." if shown else f"**{name}**: –"


def _judged(
    name: str, evaluation: Mapping[str, Any], differences: Mapping[str, Mapping[str, PairedDifference]]
) -> dict[str, str]:
    """By column where the model stands to another row: by the interval where there is one, else by the score."""
    model, other = evaluation["rows"][ROWS["model"]], evaluation["rows"][name]
    places = {}
    for column in JUDGED:
        if model.get(column) is None or other.get(column) is None:
            continue
        found = differences.get(name, {}).get(column)
        if found is None:
            low = high = model[column] - other[column]
        else:
            low, high = found.low, found.high
        places[column] = "above" if low > 0 else "below" if high < 0 else "not told apart"
    return places


def _differences(evaluation: Mapping[str, Any]) -> dict[str, dict[str, PairedDifference]]:
    return {
        name: {column: PairedDifference(**found) for column, found in row.items()}
        for name, row in evaluation.get("differences", {}).items()
    }


def _notes(evaluation: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    notes = [*evaluation.get("warnings", []), *evaluation.get("notes", [])]
    notes += [f"{NLG_NAMES.get(name, name)}: {note}" for name, note in model.get("notes", {}).items()]
    if evaluation.get("intervals") and model.get("cider") is not None:
        notes.append("CIDEr's intervals are of the mean of the studies' values, with document frequencies of all")
    return notes


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


# --- tables ----------------------------------------------------------------------------------------------------------


def _rows_table(
    corner: str, rows: Mapping[str, Mapping[str, Any]], headings: Mapping[str, str], intervals: Mapping[str, Interval]
) -> str:
    """Every row, the model's followed by its intervals; a dash where a row has no score."""
    columns = [column for column in headings if column in rows[ROWS["model"]]]
    cells = [[name, *(shown_number(scores.get(column)) for column in columns)] for name, scores in rows.items()]
    if intervals:
        cells.insert(1, ["model, 95 % interval", *(shown_interval(intervals.get(column)) for column in columns)])
    return markdown_table([corner, *(headings[column] for column in columns)], cells)


def _finding_table(findings: Mapping[str, Mapping[str, Any]], predictor: Mapping[str, Any] | None) -> str:
    """The model's reports finding by finding, and beside it how well the label predictor ranks the studies."""
    # Of a few positives an area says nothing, however it looks.
    areas = {
        name: row if row["positives"] >= MINIMUM_INTERVAL_POSITIVES else {"auc": None}
        for name, row in ({} if predictor is None else predictor["findings"]).items()
    }
    header = ["finding", "true", "written", "both", "precision", "recall", "F1"]
    if areas:
        header += ["predictor's AUC on validation", "95 % interval"]
    rows = []
    for name, row in findings.items():
        counts = [str(row[count]) for count in ("support", "predicted", "true_positives")]
        # Of nothing there is no rate: the metrics' 0 would read as a failure.
        rates = [
            shown_number(row["precision"] if row["predicted"] else None),
            shown_number(row["recall"] if row["support"] else None),
            shown_number(row["f1"] if row["support"] or row["predicted"] else None),
        ]
        cells = [FINDING_DISPLAY_NAMES[name], *counts, *rates]
        if areas:
            bounds = areas[name].get("auc_interval")
            shown = "–" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"
            cells += [shown_number(areas[name]["auc"]), shown]
        rows.append(cells)
    return markdown_table(header, rows)


__all__ = [
    "FEW_POSITIVES",
    "JUDGED",
    "Measured",
    "decoding_words",
    "labeler_words",
    "measured",
    "never_written",
    "protocol_words",
    "rare_findings",
    "title",
]
