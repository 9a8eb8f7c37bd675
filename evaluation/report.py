"""What an evaluation found, written down: Markdown tables, JSON, and CSV files with one row per study."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files_otdrg import write_json, write_text
from ..findings_otdrg import FINDING_STATES, FINDINGS
from ..metrics import (
    AVERAGES,
    LABEL_SETS,
    Interval,
    PairedDifference,
    bootstrap_intervals,
    main_scores,
    paired_bootstrap,
    score_tables,
)
from ..metrics.tables import CIDER_NOTE, markdown_table, shown_interval, shown_number
from ..runtime.csv_files import write_csv
from .evaluate import IN_TRAINING, ROWS, Evaluation
from .faithfulness import CONDITIONS, ModelFaithfulness

#: F1 of clinical efficacy with unclear as negative, and its column headings.
F1_HEADINGS: dict[str, str] = {
    f"{average}_f1_{labels}_uncertain_negative": f"{average} ({labels})"
    for average in AVERAGES
    for labels in LABEL_SETS
}

_ZERO_SHOT = {
    True: "zero-shot: the model was trained on another dataset",
    False: "the dataset the model was trained on",
    None: "whether the model was trained on this dataset is not known",
}


def write_evaluation(
    folder: Path, settings: Mapping[str, Any], evaluation: Evaluation, faithfulness: ModelFaithfulness
) -> str:
    """Write evaluation.json, evaluation.md, predictions.csv, scores.csv and contradictions.csv.

    Args:
        folder: where they go.
        settings: how the evaluation was made, for the JSON; the Markdown names the most important ones.
        evaluation: rows and constants.
        faithfulness: of its reports to the states they were conditioned on.

    Returns:
        The content of evaluation.md.
    """
    bootstrap = settings["bootstrap"]
    intervals, differences = {}, {}
    if bootstrap["resamples"]:
        intervals, differences = bootstrap_rows(evaluation, bootstrap["resamples"], bootstrap["seed"])
    faithfulness_scores = {"labeler": evaluation.labeler, **faithfulness.scores()}
    notes = [*settings["warnings"], *_notes_of_rows(evaluation)]
    if any("cider" in row for row in intervals.values()):
        notes.append(f"CIDEr: {CIDER_NOTE}")
    blocks = [
        f"# Evaluation of {settings['model']}",
        _preamble(settings, len(evaluation.ids)),
        format_scores(evaluation, intervals, differences),
        *(format_section(section, found, bootstrap) for section, found in evaluation.sections.items()),
        "## Faithfulness: do reports state the findings they were conditioned on?",
        format_faithfulness(faithfulness_scores),
        "\n".join(f"- {note}" for note in (*notes, *evaluation.notes, *_notes_of_sections(evaluation))),
    ]
    document = "\n\n".join(block for block in blocks if block)
    bounds = {
        row: {name: {"low": it.low, "high": it.high} for name, it in scores.items()}
        for row, scores in intervals.items()
    }
    apart = {row: {name: it._asdict() for name, it in scores.items()} for row, scores in differences.items()}
    result = {**settings, **evaluation.scores(), "intervals": bounds, "differences": apart}
    write_json(folder / "evaluation.json", {**result, "faithfulness": faithfulness_scores})
    write_text(folder / "evaluation.md", document + "\n")
    write_predictions(evaluation, folder / "predictions.csv")
    write_scores(evaluation, folder / "scores.csv")
    write_contradictions(faithfulness, evaluation, folder / "contradictions.csv")
    return document


def _notes_of_rows(evaluation: Evaluation) -> list[str]:
    """The notes of all rows' scores; those of other rows than the model name them, unless the model has the same."""
    model = evaluation.rows["model"].results.notes
    notes = [f"{name}: {note}" for name, note in model.items()]
    for row, system in evaluation.rows.items():
        others = {name: note for name, note in system.results.notes.items() if model.get(name) != note}
        notes += [f"{name}, {ROWS[row]}: {note}" for name, note in others.items() if row != "model"]
    return notes


def _notes_of_sections(evaluation: Evaluation) -> list[str]:
    """The notes of sections that the whole evaluation does not have."""
    return [
        f"{section}: {note}"
        for section, found in evaluation.sections.items()
        for note in found.notes
        if note not in evaluation.notes
    ]


def _preamble(settings: Mapping[str, Any], studies: int) -> str:
    """How the evaluation was made."""
    protocol = settings["protocol"]
    if settings["reference_tokens"]:
        protocol += f", true reports up to {settings['reference_tokens']} tokens of {settings['tokenizer']}"
    counts = []
    for split, count in settings["counts"].items():
        unit = count["unit"] or "studies"
        published = "" if count["published"] is None else f" (published: {count['published']:,})"
        counts.append(f"{split} {count[unit]:,} {unit}{published}")
    decoding = settings["generation"]
    search = describe_search(decoding)
    indication = ", with indication" if decoding["indication"] else ""
    lines = [
        f"{studies:,} studies of split {settings['split']} of {settings['dataset']}",
        _ZERO_SHOT[settings["zero_shot"]],
        f"in all: {'; '.join(counts)}",
        f"constants and neighbours from {settings['training_from']}",
        f"cleaning {settings['cleaning']}"
        + (", also of generated reports" if settings["generated_reports_cleaned"] else ""),
        f"protocol {protocol}",
        f"{search}, up to {decoding['max_new_tokens']} tokens{indication}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def describe_search(generation: Mapping[str, Any]) -> str:
    """How each report was found, by the settings of an evaluation."""
    beams = "greedy search" if generation["num_beams"] == 1 else f"{generation['num_beams']} beams"
    single = beams + (f", guidance scale {generation['guidance_scale']:g}" if generation.get("guidance_scale") else "")
    single += " by vLLM" if generation.get("engine") == "vllm" else ""
    consensus, bank = generation.get("consensus"), generation.get("bank")
    if consensus is None:
        return single
    sources = [f"{consensus['candidates']} samples"] if consensus["candidates"] else []
    if bank is not None and consensus["retrieved"]:
        sources.append("the report bank")
    reference = "the samples" if bank is None else f"a bank of {bank['reports']:,} reports"
    return f"consensus of {' and '.join(sources)} by utility against {reference} (without it, {single})"


def bootstrap_rows(
    evaluation: Evaluation, resamples: int, seed: int
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, PairedDifference]]]:
    """The 95 % interval of every score of each row, and the paired difference of the model from each other row.

    Args:
        evaluation: the rows; the constant row has for each score the constant chosen for it.
        resamples: of the studies.
        seed: of the draws.
    """
    model = evaluation.rows["model"].results.statistics
    intervals: dict[str, dict[str, Interval]] = {}
    differences: dict[str, dict[str, PairedDifference]] = {}

    def add(name: str, statistics, scores: list[str] | None = None) -> None:
        found = bootstrap_intervals(statistics, resamples, seed=seed)
        kept = list(found) if scores is None else scores
        intervals.setdefault(ROWS[name], {}).update({score: found[score] for score in kept if score in found})
        if name != "model":
            found = paired_bootstrap(model, statistics, resamples, seed=seed)
            differences.setdefault(ROWS[name], {}).update({score: found[score] for score in kept if score in found})

    for name in ROWS:
        if name in evaluation.rows:
            add(name, evaluation.rows[name].results.statistics)
        elif name == "constant":
            by_report: dict[str, list[str]] = {}
            for score, row in evaluation.constants.items():
                by_report.setdefault(row.reports[0], []).append(score)
            for scores in by_report.values():
                add(name, evaluation.constants[scores[0]].results.statistics, scores)
    return intervals, differences


# --- Markdown --------------------------------------------------------------------------------------------------------


def format_table(evaluation: Evaluation) -> str:
    """The rows of an evaluation in the main scores, as a Markdown table with notes."""
    table = rows_table("", evaluation.scores()["rows"], main_scores())
    apart = [
        line
        for section, found in evaluation.sections.items()
        for line in ("", rows_table(section, found.scores()["rows"], main_scores()), "", _caption(found))
    ]
    return "\n".join([table, "", _caption(evaluation), *apart, *evaluation.notes, *_notes_of_sections(evaluation)])


def format_scores(
    evaluation: Evaluation,
    intervals: Mapping[str, Mapping[str, Interval]],
    differences: Mapping[str, Mapping[str, PairedDifference]],
) -> str:
    """Every row in every score that has a table, then intervals and differences of the main scores.

    Args:
        evaluation: the rows.
        intervals, differences: of [`bootstrap_rows`]; empty for none.
    """
    rows = evaluation.scores()["rows"]
    found = rows[ROWS["model"]]
    tables = {title: headings for title, headings in score_tables().items() if found.keys() & headings}
    blocks = [*(rows_table(title, rows, headings) for title, headings in tables.items()), _caption(evaluation)]
    if intervals:
        columns = {name: shown for name, shown in main_scores().items() if name in intervals[ROWS["model"]]}
        cells = [[name, *(shown_interval(row.get(column)) for column in columns)] for name, row in intervals.items()]
        blocks += [markdown_table(["95 % interval", *columns.values()], cells), difference_table(differences)]
    return "\n\n".join(blocks)


def format_section(section: str, evaluation: Evaluation, bootstrap: Mapping[str, int]) -> str:
    """The rows of a section in the main scores, with the model's intervals.

    Args:
        section: its name.
        evaluation: one of [`Evaluation.sections`].
        bootstrap: `resamples`, 0 for no intervals, and `seed`.
    """
    rows, headings = evaluation.scores()["rows"], main_scores()
    blocks = [f"## The section {section}", rows_table(section, rows, headings), _caption(evaluation)]
    if bootstrap["resamples"]:
        statistics = evaluation.rows["model"].results.statistics
        found = bootstrap_intervals(statistics, bootstrap["resamples"], seed=bootstrap["seed"])
        columns = {name: shown for name, shown in headings.items() if name in found}
        cells = [[ROWS["model"], *(shown_interval(found[name]) for name in columns)]]
        blocks.insert(2, markdown_table(["95 % interval", *columns.values()], cells))
    return "\n\n".join(blocks)


def difference_table(
    differences: Mapping[str, Mapping[str, PairedDifference]], headings: Mapping[str, str] | None = None
) -> str:
    """The model minus each other row.

    Args:
        differences: by row and score, as [`bootstrap_rows`] has them.
        headings: the columns, as far as a row has them; by default the main scores.
    """
    headings = main_scores() if headings is None else headings
    columns = [column for column in headings if any(column in row for row in differences.values())]
    cells = [[name, *(shown_difference(row.get(column)) for column in columns)] for name, row in differences.items()]
    table = markdown_table(["model minus", *(headings[column] for column in columns)], cells)
    return table + "\n\nDifferences with 95 % intervals of a paired bootstrap; bold where 0 lies outside."


def shown_difference(found: PairedDifference | None) -> str:
    """A difference with its interval, bold where 0 lies outside; a dash where there is none."""
    if found is None:
        return "–"
    shown = f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return shown if found.low <= 0 <= found.high else f"**{shown}**"


def format_faithfulness(faithfulness: Mapping[str, Any]) -> str:
    """Faithfulness to each kind of conditioning states, the model's beside the constant's.

    Args:
        faithfulness: `ModelFaithfulness.scores`, and the `labeler`, as evaluation.json has them.
    """
    conditions = faithfulness["conditions"]
    if not conditions:
        return "This model does not use finding states (dle=False)."
    rows = []
    for name, found in conditions.items():
        model, constant = found["model"], found["constant"]
        shares = [shown_number(one[average]) for one in (model, constant) for average in ("macro", "micro")]
        counts = [str(model[kind]) for kind in ("contradicted", "omitted", "added")]
        rows.append([CONDITIONS[name], str(found["studies"]), str(model["counted"]), *shares, *counts])
    header = ["conditioned on", "studies", "findings x states", "macro", "micro", "constant, macro", "constant, micro"]
    floor = next(iter(conditions.values()))["model"]["floor"]
    return markdown_table([*header, "contradicted", "omitted", "added"], rows) + (
        "\n\nShares of the conditioning states, positive, negative or unclear, that the labeler "
        f"{faithfulness['labeler']} reads in the report; macro over findings x states that occur at least {floor} "
        "times, without No Finding."
    )


def rows_table(title: str, rows: Mapping[str, Mapping[str, Any]], headings: Mapping[str, str]) -> str:
    """The columns the model has scores in, and the share of training reports; a dash where another row has none."""
    headings = {**headings, **IN_TRAINING}
    columns = [column for column in headings if column in rows[ROWS["model"]]]
    cells = [[name, *(shown_number(scores.get(column)) for column in columns)] for name, scores in rows.items()]
    return markdown_table([title, *(headings[column] for column in columns)], cells)


def _caption(evaluation: Evaluation) -> str:
    positives = evaluation.rows["model"].scores["findings_with_positives_13_uncertain_negative"]
    return (
        f"{len(evaluation.ids)} studies; macro-F1 over the 13 findings without No Finding ({positives} of them occur), "
        f"uncertain as negative, by the labeler {evaluation.labeler}"
    )


# --- CSV -------------------------------------------------------------------------------------------------------------


def write_predictions(evaluation: Evaluation, path: Path) -> None:
    """A CSV of N rows: id, true report, generated reports, the model's scores, and the 14 states it predicted.

    `in training` says whether the model's report stands word for word among the training reports.

    Where cleaning or a protocol changed them, the texts that states were read from are in `uncleaned reference` and
    `uncleaned report`.
    """
    model = evaluation.rows["model"]
    texts = {"reference": evaluation.references, "report": model.reports}
    texts |= {f"report, {ROWS[name]}": row.reports for name, row in evaluation.rows.items() if name != "model"}
    for name, uncleaned in (("reference", evaluation.uncleaned_references), ("report", model.uncleaned)):
        if uncleaned != texts[name]:
            texts[f"uncleaned {name}"] = uncleaned
    if evaluation.training:
        texts["in training"] = ["yes" if known else "no" for known in evaluation.in_training(model.reports)]
    scores = model.results.per_study
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (
        [
            study,
            *(column[position] for column in texts.values()),
            *(f"{values[position]:.6f}" for values in scores.values()),
            *(FINDING_STATES[state] for state in evaluation.finding_states[position]),
        ]
        for position, study in enumerate(evaluation.ids)
    )
    write_csv(path, ["id", *texts, *scores, *(f"predicted {name}" for name in FINDINGS)], rows)


def write_scores(evaluation: Evaluation, path: Path) -> None:
    """A CSV with one row per system and study: id, system, and each score; blank where a system does not have it."""
    systems = [row.results.per_study for row in evaluation.rows.values()]
    scores = list(dict.fromkeys(score for system in systems for score in system))

    def cell(values: list[float] | None, position: int) -> str:
        return "" if values is None else f"{values[position]:.6f}"

    rows = (
        [study, ROWS[name], *(cell(row.results.per_study.get(score), position) for score in scores)]
        for name, row in evaluation.rows.items()
        for position, study in enumerate(evaluation.ids)
    )
    write_csv(path, ["id", "system", *scores], rows)


def write_contradictions(faithfulness: ModelFaithfulness, evaluation: Evaluation, path: Path) -> None:
    """A CSV with one row per contradiction: origin of the conditioning states, study, finding, and both states."""
    rows = (
        [name, evaluation.ids[one.study], one.finding, one.given, one.said]
        for name, found in faithfulness.conditions.items()
        for one in found.contradicted
    )
    write_csv(path, ["states", "study", "finding", "given", "said"], rows)


__all__ = [
    "F1_HEADINGS",
    "bootstrap_rows",
    "describe_search",
    "difference_table",
    "format_scores",
    "format_section",
    "format_faithfulness",
    "format_table",
    "rows_table",
    "shown_difference",
    "write_contradictions",
    "write_evaluation",
    "write_predictions",
    "write_scores",
]
