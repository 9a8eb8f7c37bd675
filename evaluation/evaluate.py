"""Evaluation by generation: the model's reports, and the baselines and controls that its scores are compared with.

Long, because all rows of the table are made here, from the same studies and by the same scorer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from ..consensus_otdrg import ConsensusDecoder
from ..findings_otdrg import UNMENTIONED
from ..inference.features import CachedStudies
from ..inference.generation import GeneratedReports, derangement, generate_reports
from ..inference.retrieval import MOST_STUDIES, RetrievedReports, pooled_features, retrieve_reports
from ..inference.vllm import VLLM
from ..labelers.as_typed import label_quietly, labeler_of
from ..metrics import ReportScores, best_constants, display_name, score_reports, score_tables
from ..metrics.baselines import SEARCHED_SCORES
from ..metrics.comparisons import COMPARISONS
from ..metrics.efficacy import example_ceiling
from ..metrics.faithfulness import flip_states
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from ..runtime.shared_work import continue_alone
from ..sections_otdrg import SECTIONS, has_sections, split_sections, without_headings
from ..studies.loading import uncleaned_reports, with_column
from ..studies.streaming import StreamedStudies

#: The rows of the table: the model, then controls and baselines.
ROWS: dict[str, str] = {
    "model": "model",
    "sampled": "model, without retrieved candidates",
    "single": "model, without consensus decoding",
    "shuffled": "images shuffled across studies",
    "no_indication": "without indications",
    "no_prior": "without priors",
    "nearest": "nearest neighbour",
    "expected": "retrieval by expected utility",
    "constant": "best constant report",
    "true_states": "true states given",
    "paper": "paper (OTDRG, its Table 2, test split)",
}

#: Published scores of the paper's model, by collection.
PAPER_SCORES: dict[str, dict[str, float]] = {
    "IU X-Ray": {"bleu_1": 0.501, "bleu_4": 0.182, "meteor": 0.215, "rouge_l": 0.377}
}

#: The share of a row's reports that stand word for word among the training reports, and its heading.
IN_TRAINING = {"in_training": "in training"}

#: What can be asked for beside the model's row; `retrieval` gives the rows `nearest` and `expected`. `flipped` can be
#: asked for as well; it is no row of the table, but a condition under which faithfulness is measured.
Control = Literal["shuffled", "no_indication", "no_prior", "retrieval", "constant", "true_states"]
CONTROLS: tuple[str, ...] = get_args(Control)


class SystemReports(NamedTuple):
    """The reports of one system, the model or what it is compared with, for N studies, and their scores.

    Args:
        reports: N texts, as they are compared with the references.
        report_states: (N, 14) states the labeler reads in `uncleaned`.
        results: their scores.
        uncleaned: N texts before cleaning.
    """

    reports: list[str]
    report_states: np.ndarray
    results: ReportScores
    uncleaned: list[str]

    @property
    def scores(self) -> dict[str, Any]:
        """The aggregate scores and what else the metrics found, ready for JSON."""
        return {**self.results.scores, **self.results.details, "notes": self.results.notes}


class ConditionedReports(NamedTuple):
    """The reports of the model conditioned on finding states, and these states.

    Args:
        system: the reports.
        conditioning_states: (N, 14) the states.
        flipped: (N, 14) true where the true states were flipped; None for states that were not.
    """

    system: SystemReports
    conditioning_states: np.ndarray
    flipped: np.ndarray | None = None


@dataclass
class Evaluation:
    """What [`evaluate_model`] found on N studies.

    Args:
        ids: the studies' ids.
        references: the true reports that fluency is scored against.
        uncleaned_references: the whole true reports before cleaning.
        true_states: (N, 14) states the labeler reads in `uncleaned_references`.
        finding_states: (N, 14) states the model predicted.
        labeler: name of the labeler.
        rows: by key of `ROWS`, all but the constant and the paper's.
        constants: by score, the row of the constant report chosen for it.
        conditioned: by origin of the conditioning states: "predicted" and, if asked for, "true_states" and "flipped";
            empty for a model with `dle=False`, which does not use finding states.
        notes: why something is missing.
        training: the training reports, in one line each; empty if there are none to compare with.
        paper: scores of [`PAPER_SCORES`] for the studies' collection.
        sections: by section, the evaluation of this part of the reports on the studies whose true report has it; empty
            if true reports do not consist of sections.
    """

    ids: list[str]
    references: list[str]
    uncleaned_references: list[str]
    true_states: np.ndarray
    finding_states: np.ndarray
    labeler: str
    rows: dict[str, SystemReports]
    constants: dict[str, SystemReports] = field(default_factory=dict)
    conditioned: dict[str, ConditionedReports] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    training: frozenset[str] = frozenset()
    paper: Mapping[str, float] = field(default_factory=dict)
    sections: dict[str, Evaluation] = field(default_factory=dict)

    def in_training(self, reports: Iterable[str]) -> list[bool]:
        """Whether each report stands word for word among the training reports, whatever the white space."""
        return [_one_line(report) in self.training for report in reports]

    def scores(self) -> dict[str, Any]:
        """All aggregate scores, ready for JSON."""
        rows = {ROWS[name]: row.scores for name, row in self.rows.items()}
        if self.training:
            for name, row in self.rows.items():
                rows[ROWS[name]] |= {"in_training": float(np.mean(self.in_training(row.reports)))}
        if self.constants:
            rows[ROWS["constant"]] = {score: row.scores[score] for score, row in self.constants.items()}
        if self.paper:
            rows[ROWS["paper"]] = dict(self.paper)
        apart = {name: section.scores() for name, section in self.sections.items()}
        return {
            "studies": len(self.ids),
            "labeler": self.labeler,
            "rows": {name: rows[name] for name in ROWS.values() if name in rows},
            "constants": {score: row.reports[0] for score, row in self.constants.items()},
            "notes": self.notes,
            **({"sections": apart} if apart else {}),
        }


def evaluate_model(
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    studies: Dataset | CachedStudies,
    training: Dataset | StreamedStudies | CachedStudies | None = None,
    batch_size: int = 8,
    generation: dict[str, Any] | None = None,
    controls: Sequence[str] = CONTROLS,
    labeler: str = "rules",
    metrics: Iterable[str] | None = None,
    seed: int = 0,
    indication: bool = False,
    labeler_options: Mapping[str, Any] | None = None,
    references: Sequence[str] | None = None,
    clean: Callable[[str], str] | None = None,
    journals: Path | None = None,
    consensus: ConsensusDecoder | None = None,
    sections: bool = True,
    collections: Sequence[str] = (),
    scored_alone: bool = False,
    engine: VLLM | None = None,
) -> Evaluation:
    """Generate a report for each study, and score the reports beside those of controls and baselines.

    - `shuffled`: the same model with the images shuffled across studies. If its scores do not fall to those of the
      constant, the model does not use the image.
    - `no_indication`: the same model without the studies' indications; only where it reads them. What is left is from
      the images.
    - `no_prior`: the same model without the prior studies; only where it reads them, and some study has one.
    - `retrieval`: the report of the training study with the nearest image features, the model's own, and the one with
      the highest expected utility ([`retrieve_reports`]).
    - `constant`: for each score, the training report that scores best when it is written for every training study, for
      F1 also a text with every finding positive ([`best_constants`]).
    - `true_states`: the model conditioned on the true states, the ceiling of a better predictor.
    - `flipped`: the same with one finding of each study flipped ([`flip_states`]), for faithfulness.

    If the true reports consist of sections ([`has_sections`]), whole reports are compared without their headings, and
    each section is scored apart as well.

    Args:
        model, processor: as published.
        studies: rows with `id`, `images` or the features of [`cache_features`], `report` (cleaned as training's) and,
            for `true_states`, `finding_states`.
        training: the training studies, cleaned likewise; needed for `constant` and `retrieval`.
        batch_size: studies in a batch.
        generation: arguments of `generate`.
        controls: of `CONTROLS` and `flipped`.
        labeler, labeler_options: reads the states in generated and true reports.
        metrics: names of metrics or scores, see [`score_reports`].
        seed: of the shuffling, the flips and the constants' draw.
        indication: whether the prompt holds the studies' `indication`; shuffling moves only images, also of priors.
        references: N texts that fluency is scored against, if these are not the studies' reports. States of true
            reports are read from `uncleaned_report` where the studies have it, else from `report`.
        clean: cleans a generated report, for a model trained on reports that were cleaned otherwise than `studies`.
        journals: folder in which reports are saved as they are generated, see [`generate_reports`].
        consensus: chooses the model's reports, also in the controls. The table then has rows of the same model without
            retrieved candidates and without consensus decoding.
        sections: whether sections are scored apart.
        collections: of the studies; the table of a single one with [`PAPER_SCORES`] has a row with these.
        scored_alone: whether all processes but the main one end when the reports are generated ([`continue_alone`]).
        engine: writes the reports in place of the model, see [`generate_reports`].

    Raises:
        ValueError: a control that needs training studies, without them.
    """
    needed = [name for name in ("retrieval", "constant") if name in controls]
    if needed and training is None:
        raise ValueError(f"controls {', '.join(needed)}: expected training studies")
    given = [name for name in ("true_states", "flipped") if name in controls]
    known = [states for states in studies["finding_states"] if states is not None] if given and model.config.dle else []
    conditions = _conditions(model, studies, known, controls, indication, consensus, seed)
    generated = {
        name: generate_reports(
            model,
            processor,
            condition.studies,
            batch_size,
            generation,
            condition.states,
            indication,
            None if journals is None else journals / f"{name}.jsonl",
            condition.consensus,
            engine,
        )
        for name, condition in conditions.items()
    }
    features = None
    if "retrieval" in controls:
        features = [pooled_features(model, processor, rows, batch_size) for rows in (studies, training)]
    if scored_alone:
        continue_alone()
    metrics = None if metrics is None else list(metrics)
    references = list(studies["report"] if references is None else references)
    uncleaned_references = uncleaned_reports(studies)
    headed = has_sections(references) or bool(model.config.report_sections)
    read_by = labeler_of(labeler, dict(labeler_options or {}))
    scorer = _Scorer(read_by, references, uncleaned_references, metrics, clean, headed)
    evaluation = Evaluation(
        ids=list(studies["id"]),
        references=references,
        uncleaned_references=uncleaned_references,
        true_states=scorer.true_states,
        finding_states=generated["model"].finding_states,
        labeler=scorer.labeler.name,
        rows={},
        training=frozenset() if training is None else frozenset(map(_one_line, training["report"])),
        paper=PAPER_SCORES.get(collections[0], {}) if len(collections) == 1 else {},
    )
    _add_generated(evaluation, scorer, generated, conditions, model.config.dle)
    if "shuffled" in controls and "shuffled" not in generated:
        _add_shuffled(evaluation, scorer, seed)
    if features is not None:
        _add_retrieved(
            evaluation, scorer, retrieve_reports(*features, studies, training, seed, indication), len(training)
        )
    if "constant" in controls:
        _add_constants(evaluation, scorer, list(training["report"]), uncleaned_reports(training), seed)
    evaluation.rows = {name: evaluation.rows[name] for name in ROWS if name in evaluation.rows}
    if given:
        evaluation.notes += _notes_on_conditions(model, len(known), len(studies))
    evaluation.notes += _notes_on_states(evaluation)
    if sections:
        _add_sections(evaluation, scorer, model, training if "constant" in controls else None, seed)
    return evaluation


def _one_line(report: str) -> str:
    """A report without line breaks and repeated spaces, as generated reports are."""
    return " ".join(report.split())


class _Condition(NamedTuple):
    """What the reports of one journal are generated from.

    Args:
        studies: rows with the images and indications.
        states: (N, 14) states that condition the reports; None for the predicted ones.
        consensus: chooses the reports.
        flipped: as in [`ConditionedReports`].
    """

    studies: Dataset | CachedStudies
    states: np.ndarray | None = None
    consensus: ConsensusDecoder | None = None
    flipped: np.ndarray | None = None


def _notes_on_conditions(model: OTDRGForReportGeneration, known: int, studies: int) -> list[str]:
    """What limits the rows of given states."""
    if not model.config.dle:
        return ["this model does not use finding states (dle=False), so true states change nothing"]
    return [f"true states are known for only {known} of {studies} studies"] if known < studies else []


def _add_sections(
    evaluation: Evaluation, scorer: _Scorer, model: OTDRGForReportGeneration, constants_from: Any, seed: int
) -> None:
    """Score the sections apart, with constants from these training studies, if the true reports consist of sections."""
    if has_sections(evaluation.references):
        evaluation.sections = {
            section: _score_section(section, evaluation, scorer, constants_from, seed) for section in SECTIONS
        }
        evaluation.notes += _notes_on_headings(evaluation.rows["model"].reports)
    elif model.config.report_sections:
        evaluation.notes.append("true reports do not consist of sections: those of the model are not scored apart")


def _conditions(
    model: OTDRGForReportGeneration,
    studies: Dataset | CachedStudies,
    known: list[Sequence[int]],
    controls: Sequence[str],
    indication: bool,
    consensus: ConsensusDecoder | None,
    seed: int,
) -> dict[str, _Condition]:
    """Under which conditions the model generates reports, by the name of their journal.

    `known` are the true states of the studies that have them, if the model uses states.
    """
    found = {"model": _Condition(studies, consensus=consensus)}
    if consensus is not None and consensus.settings.candidates:
        found["single"] = _Condition(studies)
    # If prompts differ in the images only, the report of another study's images is the report of that study.
    if "shuffled" in controls and (indication or _has_prior_reports(model, studies)) and len(studies) > 1:
        shuffled = studies.select(derangement(len(studies), seed).tolist())
        # In the journal a report has the id of the study it is compared with.
        for column in ("id", "indication", "prior_report", "prior_days"):
            if column in studies.column_names:
                shuffled = with_column(shuffled, column, list(studies[column]))
        found["shuffled"] = _Condition(shuffled, consensus=consensus)
    if "no_indication" in controls and indication:
        unread = with_column(studies, "indication", [None] * len(studies))
        found["no_indication"] = _Condition(unread, consensus=consensus)
    priors = [name for name in studies.column_names if name.startswith("prior_")]
    if "no_prior" in controls and has_priors(model, studies):
        alone = studies.select_columns([name for name in studies.column_names if name not in priors])
        found["no_prior"] = _Condition(alone, consensus=consensus)
    if known and len(known) == len(studies):
        if "true_states" in controls:
            found["true_states"] = _Condition(studies, np.array(known), consensus)
        if "flipped" in controls:
            states, flipped = flip_states(np.array(known), seed)
            found["flipped"] = _Condition(studies, states, consensus, flipped)
    return found


def has_priors(model: OTDRGForReportGeneration, studies: Dataset | CachedStudies) -> bool:
    """Whether the model reads the priors of any of the studies."""
    if _has_prior_reports(model, studies):
        return True
    if not model.config.reads_prior_images:
        return False
    if isinstance(studies, CachedStudies):
        return studies.has_priors
    if "prior_images" not in studies.column_names:
        return False
    tables = studies.select_columns("prior_images").with_format("arrow").iter(batch_size=1000)
    return any(pc.any(pc.greater(pc.list_value_length(table["prior_images"]), 0)).as_py() for table in tables)


def _has_prior_reports(model: OTDRGForReportGeneration, studies: Dataset | CachedStudies) -> bool:
    """Whether the model reads a prior report of any of the studies."""
    reads = model.config.priors in ("report", "both") and "prior_report" in studies.column_names
    return reads and any(studies["prior_report"])


class _Scorer:
    """Makes the rows of an evaluation.

    Args:
        labeler: reads the states.
        references: N true reports that fluency is scored against.
        uncleaned_references: the true reports before cleaning, whose states are read.
        metrics: of [`score_reports`].
        clean: cleans a generated report; None leaves it as it is.
        headed: whether the sections of reports have headings, which are left out.
    """

    def __init__(
        self, labeler, references: list[str], uncleaned_references: list[str], metrics, clean=None, headed=False
    ):
        self.labeler, self.metrics, self.clean, self.headed = labeler, metrics, clean, headed
        self.references = self.compared(references)
        self.true_states = self.read_states(uncleaned_references)

    def compared(self, reports: list[str]) -> list[str]:
        """Reports as they are compared and labelled."""
        return [without_headings(report) for report in reports] if self.headed else reports

    def read_states(self, reports: list[str]) -> np.ndarray:
        """(N, 14) states of reports."""
        return label_quietly(self.labeler, self.compared(reports))

    def score_generated(self, reports: list[str]) -> SystemReports:
        """The row of generated reports: states are read before cleaning, fluency is scored after it."""
        cleaned = reports if self.clean is None else [self.clean(report) for report in reports]
        return self.score(cleaned, reports)

    def score(self, reports: list[str], uncleaned: list[str]) -> SystemReports:
        """The row of cleaned reports, whose states are read in the uncleaned ones."""
        return self._row(reports, self.read_states(uncleaned), uncleaned)

    def score_training(self, reports: list[str]) -> SystemReports:
        """The row of training reports, which are cleaned as the references are."""
        return self.score(reports, reports)

    def score_constant(self, report: str) -> SystemReports:
        """The row of one report written for every study."""
        reports = [report] * len(self.references)
        return self._row(reports, np.tile(self.read_states([report]), (len(reports), 1)), reports)

    def _row(self, reports: list[str], states: np.ndarray, uncleaned: list[str]) -> SystemReports:
        found = score_reports(self.compared(reports), self.references, states, self.true_states, self.metrics)
        return SystemReports(reports, states, found, uncleaned)


def _add_generated(
    evaluation: Evaluation,
    scorer: _Scorer,
    generated: dict[str, GeneratedReports],
    conditions: dict[str, _Condition],
    uses_states: bool,
) -> None:
    """The rows of generated reports, and for faithfulness the states that conditioned them, if the model uses any."""
    rows = {name: scorer.score_generated(written.reports) for name, written in generated.items()}
    evaluation.rows |= {name: row for name, row in rows.items() if name in ROWS}
    consensus = conditions["model"].consensus
    if "single" in generated and consensus.bank is not None and consensus.settings.retrieved:
        evaluation.rows["sampled"] = scorer.score_generated(generated["model"].sampled)
    if uses_states:
        evaluation.conditioned["predicted"] = ConditionedReports(rows["model"], generated["model"].finding_states)
    for name in ("true_states", "flipped"):
        if name in rows:
            condition = conditions[name]
            evaluation.conditioned[name] = ConditionedReports(rows[name], condition.states, condition.flipped)


def _add_shuffled(evaluation: Evaluation, scorer: _Scorer, seed: int) -> None:
    """The row of shuffled images where prompts of studies differ in the images only."""
    if len(evaluation.ids) < 2:
        evaluation.notes.append("images of a single study cannot be shuffled")
        return
    written = evaluation.rows["model"].uncleaned
    order = derangement(len(written), seed)
    evaluation.rows["shuffled"] = scorer.score_generated([written[other] for other in order])


def _add_retrieved(evaluation: Evaluation, scorer: _Scorer, retrieved: RetrievedReports, training: int) -> None:
    """The rows of reports retrieved from a number of `training` studies."""
    evaluation.rows |= {name: scorer.score_training(getattr(retrieved, name)) for name in ("nearest", "expected")}
    if training > MOST_STUDIES:
        evaluation.notes.append(
            f"{ROWS['expected']}: among {MOST_STUDIES:,} of {training:,} training studies, drawn at random"
        )


def _score_section(
    section: str,
    whole: Evaluation,
    scorer: _Scorer,
    training: Dataset | StreamedStudies | CachedStudies | None,
    seed: int,
) -> Evaluation:
    """The evaluation of one section of all rows, on the studies whose true report has it; constants of `training`."""
    kept = [place for place, report in enumerate(whole.references) if _section(section, report)]

    def texts(reports: Sequence[str]) -> list[str]:
        return [_section(section, reports[place]) for place in kept]

    part = _Scorer(scorer.labeler, texts(whole.references), texts(whole.uncleaned_references), scorer.metrics)
    found = Evaluation(
        ids=[whole.ids[place] for place in kept],
        references=part.references,
        uncleaned_references=texts(whole.uncleaned_references),
        true_states=part.true_states,
        finding_states=whole.finding_states[kept],
        labeler=whole.labeler,
        rows={name: part.score(texts(row.reports), texts(row.uncleaned)) for name, row in whole.rows.items()},
        training=frozenset(filter(None, (_section(section, report) for report in whole.training))),
    )
    if training is not None:
        pairs = zip(training["report"], uncleaned_reports(training), strict=True)
        pairs = [(text, _section(section, uncleaned)) for each, uncleaned in pairs if (text := _section(section, each))]
        if pairs:
            _add_constants(found, part, *map(list, zip(*pairs, strict=True)), seed)
        else:
            found.notes.append(f"no training report has the section {section}, so there is no best constant report")
    return found


def _section(section: str, report: str) -> str:
    return getattr(split_sections(report), section)


def _add_constants(
    evaluation: Evaluation, scorer: _Scorer, training: list[str], uncleaned_training: list[str], seed: int
) -> None:
    """For each score the row of its own best constant, chosen among the reports of training."""
    scores = [name for name in evaluation.rows["model"].results.scores if name in SEARCHED_SCORES]
    states = scorer.read_states(uncleaned_training)
    best = best_constants(scorer.compared(training), states, scorer.labeler, scores, seed)
    rows = {report: scorer.score_constant(report) for report in dict.fromkeys(best.reports.values())}
    evaluation.constants = {score: rows[report] for score, report in best.reports.items()}
    evaluation.notes += best.notes
    # Almost every training report is a best constant for comparisons: it mentions none.
    tabled = {name for headings in score_tables().values() for name in headings} - COMPARISONS.scores.keys()
    missing = [
        display_name(name)
        for name in evaluation.rows["model"].results.scores
        if name in tabled and name not in SEARCHED_SCORES
    ]
    if missing:
        evaluation.notes.append(f"no best constant report is searched for {', '.join(missing)}")


def _notes_on_headings(reports: list[str]) -> list[str]:
    """How many generated reports do not have the form of two sections."""
    split = [split_sections(report) for report in reports]
    headless = sum(not report.has_headings for report in split)
    notes = []
    if headless:
        notes.append(
            f"{headless} of {len(reports)} generated reports have no headings or misplaced ones: all of their text "
            "counts as findings"
        )
    for section in SECTIONS:
        lacking = sum(report.has_headings and not getattr(report, section) for report in split)
        if lacking:
            notes.append(f"{lacking} of {len(reports)} generated reports have no {section}")
    return notes


def _notes_on_states(evaluation: Evaluation) -> list[str]:
    """Reports in which the labeler reads nothing, and the highest example-F1 these studies allow."""
    read = {"true reports": evaluation.true_states}
    read |= {f"reports, {ROWS[name]}": row.report_states for name, row in evaluation.rows.items()}
    blank = {name: int((states == UNMENTIONED).all(axis=1).sum()) for name, states in read.items()}
    notes = [f"the labeler reads no state in {n} of {len(evaluation.ids)} {name}" for name, n in blank.items() if n]
    return [*notes, *filter(None, [example_ceiling(evaluation.true_states)])]


__all__ = [
    "CONTROLS",
    "IN_TRAINING",
    "PAPER_SCORES",
    "ROWS",
    "Control",
    "Evaluation",
    "SystemReports",
    "ConditionedReports",
    "evaluate_model",
]
