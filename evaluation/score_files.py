"""`otdrg score`: reports in files, of any system, joined by study id, scored, and compared with another system's."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..files_otdrg import write_json
from ..findings_otdrg import FINDING_STATES, FINDINGS, UNMENTIONED
from ..labelers.as_typed import label_quietly
from ..labelers.report_table import has_column, read_reports
from ..metrics import METRICS, ReportScores, bootstrap_intervals, compare_systems, score_reports, score_tables
from ..metrics.efficacy import example_ceiling
from ..metrics.protocols import check_one_section, truncate_to_tokens
from ..metrics.significance import Comparison, Interval
from ..metrics.tables import CIDER_NOTE, clinical_table, comparison_table, finding_table, score_table, section_table
from ..runtime.csv_files import write_csv
from ..sections_otdrg import SECTIONS, has_sections, split_sections, without_headings
from ..studies.cleaning import clean_report, clean_sections
from ..studies.rexrank import PREDICTION, rexrank_reports

#: Columns of the written CSV, named as in a training run's predictions.csv, so that it can be scored again.
_COLUMNS = {"references": "reference", "predictions": "report", "against": "report, against"}


@dataclass(frozen=True)
class JoinedReports:
    """What [`join_reports`] found.

    Args:
        ids: the N studies that all files have, in the references' order.
        reports: `"references"`, `"predictions"` and, if there is another system, `"against"`: N texts each.
        uncleaned: with the same keys, N texts before cleaning, from which states are read: a column `uncleaned report`
            (`uncleaned reference`) of the file if there is one, else the same texts.
        files: with the same keys, the files' paths.
        counts: how many reports each file holds.
        missing: ids that another file has and this one lacks.
    """

    ids: list[str]
    reports: dict[str, list[str]]
    uncleaned: dict[str, list[str]]
    files: dict[str, str]
    counts: dict[str, int]
    missing: dict[str, list[str]]


def join_reports(
    predictions: str,
    references: str | None = None,
    reference_column: str | None = None,
    against: str | None = None,
    allow_missing: bool = False,
    prediction_column: str | None = None,
    form: str = "table",
) -> JoinedReports:
    """Read generated and true reports of the same studies.

    Args:
        predictions: CSV or .jsonl with `id` and `report`, or a JSON file of ReXrank.
        references: likewise, the true reports; by default they are in the predictions' file.
        reference_column: the column of the true reports; by default `report`, or `reference` in the predictions' file.
        against: as `predictions`, of another system.
        allow_missing: keep the ids that all files have.
        prediction_column: the column of the generated reports in the predictions' file; by default `report`.
        form: of the files, `table` or `rexrank`; in the latter, by default, `model_prediction` are the generated
            reports and `report` the true ones.

    Raises:
        ValueError: a file is wrong (see [`read_reports`]) or empty, the files have no id in common, or, without
            `allow_missing`, not the same ones.
    """
    same = references is None or _is_one_file(references, predictions)
    ours = PREDICTION if form == "rexrank" else "report"
    column = reference_column or ("reference" if same and form == "table" else "report")
    written = prediction_column or ours
    if same and column == written:
        raise ValueError(
            f"{predictions}, column {column}: the predictions themselves, expected the true reports' column"
        )
    places = {"references": (references or predictions, column), "predictions": (predictions, written)}
    if against:
        places["against"] = (against, ours)
    read = {name: _by_id(path, column, form) for name, (path, column) in places.items()}
    files = {name: path for name, (path, _) in places.items()}
    known = list(dict.fromkeys(study for reports in read.values() for study in reports))
    missing = {name: [study for study in known if study not in reports] for name, reports in read.items()}
    ids = [study for study in known if all(study in reports for reports in read.values())]
    if not ids:
        examples = ", ".join(f"{files[name]}: {next(iter(reports))!r}" for name, reports in read.items())
        raise ValueError(f"the files have no id in common ({examples}): expected reports of the same studies")
    if any(missing.values()) and not allow_missing:
        lacking = "; ".join(
            f"{files[name]} ({name}) lacks {len(lost):,} ({', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''})"
            for name, lost in missing.items()
            if lost
        )
        raise ValueError(
            f"{lacking} of {len(known):,} ids; expected the same ids in each, --allow-missing scores the {len(ids):,} "
            "in common"
        )
    uncleaned = {
        name: _by_id(path, f"uncleaned {column}")
        if form == "table" and has_column(path, f"uncleaned {column}")
        else read[name]
        for name, (path, column) in places.items()
    }
    reports, uncleaned = (
        {name: [texts[study] for study in ids] for name, texts in each.items()} for each in (read, uncleaned)
    )
    counts = {name: len(texts) for name, texts in read.items()}
    return JoinedReports(ids, reports, uncleaned, files, counts, missing)


def _is_one_file(path: str, other: str) -> bool:
    return Path(path).exists() and Path(other).exists() and Path(path).samefile(other)


def _by_id(path: str, column: str, form: str = "table") -> dict[str, str]:
    with closing((rexrank_reports if form == "rexrank" else read_reports)(path, column)) as rows:
        reports = dict(rows)
    if not reports:
        raise ValueError(f"{path}: no report in it, expected at least one")
    return reports


@dataclass(frozen=True)
class ScoredFiles:
    """What [`score_files`] found.

    Args:
        joined: the reports that were read.
        texts: by key of `joined.reports`, N texts as they were compared.
        states: with the same keys, (N, 14) states by the labeler; empty without one.
        systems: `"predictions"` and, if there is another system, `"against"`: the scores.
        intervals: of each score of the predictions.
        comparison: of each score of the tables; without interval and p where a score has none.
        settings: how the scores were made, for the JSON.
        sections: by section, the scores of this part of the predictions, on the studies whose true report has it, and
            the number of these; empty if the true reports do not consist of sections.
    """

    joined: JoinedReports
    texts: dict[str, list[str]]
    states: dict[str, np.ndarray]
    systems: dict[str, ReportScores]
    intervals: dict[str, Interval]
    comparison: dict[str, Comparison]
    settings: dict[str, Any]
    sections: dict[str, tuple[ReportScores, int]] = field(default_factory=dict)

    @property
    def without_states(self) -> dict[str, list[str]]:
        """Ids of the studies in whose reports the labeler reads no state."""
        return {
            name: [study for study, row in zip(self.joined.ids, rows, strict=True) if (row == UNMENTIONED).all()]
            for name, rows in self.states.items()
        }

    def notes(self) -> dict[str, str]:
        """Why a score is None, and what to know about others."""
        system = self.systems["predictions"]
        notes = dict(system.notes)
        if "against" in self.systems:
            notes |= {f"{name}, against": note for name, note in self.systems["against"].notes.items()}
        if "cider" in self.intervals:
            notes["cider"] = f"its {CIDER_NOTE}"
        if "radcliq_v1" in system.per_study:
            notes["radcliq"] = (
                "1 / the mean of the studies' values, as RadEval computes it: for the studies' own values lower ones "
                "are better; it has no interval, because the mean may be 0 or less"
            )
        if self.states and self.settings["protocol"] != "full":
            notes["clinical_efficacy"] = "states are those of the whole true reports; only fluency truncates them"
        if self.sections:
            headless = sum(not split_sections(text).has_headings for text in self.texts["predictions"])
            notes["sections"] = (
                f"{headless} of {len(self.joined.ids)} generated reports have no headings or misplaced ones: all of "
                "their text counts as findings"
            )
        ceiling = example_ceiling(self.states["references"]) if self.states else None
        return notes if ceiling is None else {**notes, "example averages": ceiling}

    def result(self) -> dict[str, Any]:
        """Everything but the studies' values, ready for JSON."""
        system = self.systems["predictions"]
        return {
            **{section: system.section(section) for section in dict.fromkeys(m.section for m in METRICS.values())},
            "intervals": {name: {"low": it.low, "high": it.high} for name, it in self.intervals.items()},
            "per_finding": system.details.get("per_finding", {}),
            **({"sections": self._section_scores()} if self.sections else {}),
            **({"comparison": {name: it._asdict() for name, it in self.comparison.items()}} if self.comparison else {}),
            **self.settings,
            "files": self.joined.files,
            "counts": {"studies": len(self.joined.ids), **self.joined.counts},
            "missing_from": self.joined.missing,
            "without_states": self.without_states,
            "notes": self.notes(),
        }

    def _section_scores(self) -> dict[str, dict[str, Any]]:
        return {name: {"studies": studies, **scored.scores} for name, (scored, studies) in self.sections.items()}


def score_files(
    joined: JoinedReports,
    metrics: list[str] | None = None,
    labeler=None,
    labeler_options: Mapping[str, Any] | None = None,
    cleaning: str = "none",
    tokenizer: str | None = None,
    reference_tokens: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> ScoredFiles:
    """Score the reports that [`join_reports`] read.

    If the reports of one file consist of sections ([`has_sections`]), whole reports are compared without headings. If
    the true reports do, the predictions' sections are scored apart as well.

    Args:
        joined: the reports.
        metrics: see [`score_reports`].
        labeler: reads the states of all reports, before cleaning; without one clinical efficacy is left out.
        labeler_options: the labeler's own, for the JSON.
        cleaning: of all reports.
        tokenizer, reference_tokens: protocol `r2gengpt`, in which true reports are cut to so many tokens for fluency.
        resamples: of the bootstrap and the permutations; 0 for no intervals.
        seed: of the draws.
    """
    sectioned = has_sections(joined.reports["references"])
    # As in an evaluation, the headings of reports are no words of theirs, whatever the true reports consist of.
    headed = any(map(has_sections, joined.reports.values()))
    clean, whole = (clean_sections, without_headings) if headed else (clean_report, str)
    texts = {name: [clean(text, cleaning) for text in reports] for name, reports in joined.reports.items()}
    states = {}
    if labeler is not None:
        # States are read before cleaning, which joins words: "scarring/atelectasis" becomes one.
        states = {name: label_quietly(labeler, list(map(whole, joined.uncleaned[name]))) for name in texts}
    if reference_tokens is not None:
        check_one_section(sectioned)
        texts["references"] = truncate_to_tokens(texts["references"], tokenizer, reference_tokens)
    compared = {name: list(map(whole, reports)) for name, reports in texts.items()}
    systems = {
        name: score_reports(compared[name], compared["references"], states.get(name), states.get("references"), metrics)
        for name in texts
        if name != "references"
    }
    sections = _score_sections(joined, texts, metrics, labeler) if sectioned else {}
    ours, confidence = systems["predictions"].statistics, 0.95
    intervals = bootstrap_intervals(ours, resamples, confidence, seed) if resamples else {}
    comparison = {}
    if "against" in systems:
        comparison = compare_systems(ours, systems["against"].statistics, resamples, confidence, seed)
        for name in dict.fromkeys(name for headings in score_tables().values() for name in headings):
            pair = [systems[system].scores.get(name) for system in ("predictions", "against")]
            if name not in comparison and pair != [None, None]:
                difference = None if None in pair else pair[0] - pair[1]
                comparison[name] = Comparison(*pair, difference)
    settings = {
        "labeler": None if labeler is None else labeler.name,
        "labeler_options": dict(labeler_options or {}),
        "cleaning": cleaning,
        "protocol": "full" if reference_tokens is None else "r2gengpt",
        "tokenizer": tokenizer,
        "reference_tokens": reference_tokens,
        "bootstrap": {"resamples": resamples, "confidence": confidence, "seed": seed},
    }
    return ScoredFiles(joined, texts, states, systems, intervals, comparison, settings, sections)


def _score_sections(
    joined: JoinedReports, texts: dict[str, list[str]], metrics: list[str] | None, labeler
) -> dict[str, tuple[ReportScores, int]]:
    """The scores of each section, as of [`ScoredFiles.sections`]."""
    found = {}
    for section in SECTIONS:
        pairs = {
            name: [[getattr(split_sections(text), section) for text in each] for each in (texts[name], uncleaned)]
            for name, uncleaned in joined.uncleaned.items()
        }
        kept = [place for place, text in enumerate(pairs["references"][0]) if text]
        (ours, our_source), (true, true_source) = (
            ([text[place] for place in kept] for text in pairs[name]) for name in ("predictions", "references")
        )
        read = (None, None) if labeler is None else (label_quietly(labeler, each) for each in (our_source, true_source))
        found[section] = score_reports(ours, true, *read, metrics), len(kept)
    return found


def write_scored(scored: ScoredFiles, output: Path) -> None:
    """Write OUT.json, and beside it OUT.csv with one row per study.

    The CSV holds the texts as they were compared, their scores, and the states of each report. Where they differ, the
    texts that states were read from are in columns of their own.
    """
    texts = {_COLUMNS[name]: reports for name, reports in scored.texts.items()}
    for name, reports in scored.joined.uncleaned.items():
        if reports != scored.texts[name]:
            texts[f"uncleaned {_COLUMNS[name]}"] = reports
    scores = {
        score if name == "predictions" else f"{score}, {name}": values
        for name, system in scored.systems.items()
        for score, values in system.per_study.items()
    }
    found = [f"{finding}, {_COLUMNS[name]}" for name in scored.states for finding in FINDINGS]
    rows = (
        [
            study,
            *(reports[position] for reports in texts.values()),
            *(f"{values[position]:.6f}" for values in scores.values()),
            *(FINDING_STATES[state] for states in scored.states.values() for state in states[position]),
        ]
        for position, study in enumerate(scored.joined.ids)
    )
    write_csv(output.with_suffix(".csv"), ["id", *texts, *scores, *found], rows)
    write_json(output, scored.result())


def format_scored(scored: ScoredFiles) -> str:
    """The scores as Markdown tables."""
    settings, system = scored.settings, scored.systems["predictions"]
    facts = [f"{len(scored.joined.ids):,} studies", f"cleaning {settings['cleaning']}"]
    facts.append(f"protocol {settings['protocol']}")
    if settings["reference_tokens"]:
        facts.append(f"true reports up to {settings['reference_tokens']} tokens of {settings['tokenizer']}")
    if settings["labeler"]:
        facts.append(f"states by {settings['labeler']}")
    blocks = ["; ".join(facts)]
    clinical = system.section("clinical_efficacy")
    for title, headings in score_tables().items():
        if (system.scores.keys() - clinical.keys()) & headings.keys():
            blocks.append(score_table(title, system.scores, scored.intervals))
    if clinical:
        blocks.append(clinical_table(clinical, scored.intervals))
        blocks.append(finding_table(system.details["per_finding"]["uncertain_negative"]))
    if scored.sections:
        blocks.append(section_table({name: (found.scores, n) for name, (found, n) in scored.sections.items()}))
    if scored.comparison:
        blocks += [f"against {scored.joined.files['against']}", comparison_table(scored.comparison)]
    return "\n\n".join([*blocks, *(f"{name}: {note}" for name, note in scored.notes().items())])


__all__ = ["JoinedReports", "ScoredFiles", "format_scored", "join_reports", "score_files", "write_scored"]
