"""Baselines every table carries: the one report that, written for every study, scores best (design: best constant)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..findings_otdrg import FINDINGS, POSITIVE
from .clinical_efficacy.clinical_efficacy import UNCERTAIN_POLICIES, clinical_efficacy_scores
from .nlg.nlg import nlg_scores

#: The columns of a results table, each with its own best constant.
CONSTANT_COLUMNS = ("bleu_4", "rouge_l", "cider", "macro_f1_13")

_POLICY = "uncertain_negative"
_SCREENING, _FINALISTS = 100, 5


def frequent_reports(reports: Sequence[str], count: int = 20) -> list[str]:
    """The `count` most frequent of the reports that hold a word, most frequent first, ties in the order they come."""
    return [report for report, _ in Counter(report for report in reports if report.split()).most_common(count)]


def all_positive_report(reports: Sequence[str], states: np.ndarray) -> str:
    """A constant that says of every finding but "No Finding" that it is there, as far as any of the reports says so.

    It joins, finding by finding, the shortest report that has it positive. F1 rewards such a constant: its recall is 1
    wherever a labeler still reads them in the joined text, so it, and not a normal report, is the level a model's macro
    F1 has to be compared with.

    Args:
        reports: N reports.
        states: (N, 14) their states.
    """
    states, chosen = np.asarray(states), []
    for finding in range(len(FINDINGS) - 1):
        having = [report for report, row in zip(reports, states, strict=True) if row[finding] == POSITIVE]
        if having:
            chosen.append(min(having, key=len))
    return " ".join(dict.fromkeys(chosen))


def _is_clinical(column: str) -> bool:
    return column.startswith(("example_", "micro_", "macro_"))


def best_constants(
    candidates: Sequence[str],
    references: Sequence[str],
    reference_states: np.ndarray | None = None,
    labeler=None,
    columns: Sequence[str] = CONSTANT_COLUMNS,
    max_references: int = 500,
    seed: int = 0,
) -> dict[str, str]:
    """For each column of a table, the candidate that scores best in it when it is written for every study.

    Choose on training (or validation) references, never on those the table is about. To stay quick, at most
    `max_references` references are drawn, without replacement, by `seed`, and all candidates meet only the first 100 of
    the draw in the columns of `nlg_scores`; each column's five best there, ties included by order, meet the whole draw.

    Args:
        candidates: reports, for instance [`frequent_reports`] of the training split; repeats are scored once.
        references: N true reports, cleaned like the candidates.
        reference_states: (N, 14) their states; needed for clinical columns.
        labeler: gives the candidates' states; the one that gave `reference_states`. Needed for clinical columns.
        columns: names of `nlg_scores` (METEOR takes Java), or of `clinical_efficacy_scores` ("macro_f1_13" is short for
            "macro_f1_13_uncertain_negative").
        max_references: size of the draw.
        seed: of the draw.

    Returns:
        `{column: report}`; of equally good ones the first.

    Raises:
        ValueError: no candidate, an unknown column, states missing or of another length, or METEOR without Java.
    """
    candidates = list(dict.fromkeys(candidates))
    if not candidates:
        raise ValueError("candidates: none given, expected at least one report")
    clinical = [column for column in columns if _is_clinical(column)]
    fluency = [column for column in columns if not _is_clinical(column)]
    if clinical and (reference_states is None or labeler is None):
        raise ValueError(f"columns {', '.join(clinical)}: expected reference_states and a labeler")
    if reference_states is not None and len(reference_states) != len(references):
        raise ValueError(f"reference_states: {len(reference_states)}, references: {len(references)}; expected as many")
    drawn = list(range(len(references)))
    random.Random(seed).shuffle(drawn)
    drawn = drawn[:max_references]
    texts = [references[position] for position in drawn]
    best: dict[str, str] = {}
    if fluency:
        finalists = candidates
        if len(texts) > _SCREENING and len(candidates) > _FINALISTS:
            screened = _constant_scores(candidates, texts[:_SCREENING], fluency)
            kept = {report for column in fluency for report in _ranked(screened, column)[:_FINALISTS]}
            finalists = [report for report in candidates if report in kept]
        scores = _constant_scores(finalists, texts, fluency)
        best.update({column: _ranked(scores, column)[0] for column in fluency})
    if clinical:
        true = np.asarray(reference_states)[drawn]
        names = {
            column: column if column.endswith(tuple(UNCERTAIN_POLICIES)) else f"{column}_{_POLICY}"
            for column in clinical
        }
        scores = {
            report: clinical_efficacy_scores(np.tile(states, (len(true), 1)), true)
            for report, states in zip(candidates, labeler.label(candidates), strict=True)
        }
        unknown = [column for column in clinical if names[column] not in scores[candidates[0]]]
        if unknown:
            raise ValueError(f"unknown columns {unknown}: expected keys of clinical_efficacy_scores")
        best.update({column: _ranked(scores, names[column])[0] for column in clinical})
    return {column: best[column] for column in columns}


def _constant_scores(
    candidates: Sequence[str], references: Sequence[str], metrics: Sequence[str]
) -> dict[str, dict[str, object]]:
    """`nlg_scores` of each candidate, written for every study."""
    scores = {report: nlg_scores([report] * len(references), references, metrics) for report in candidates}
    for note in (note for result in scores.values() for note in result["notes"].values()):
        raise ValueError(f"a best constant cannot be chosen: {note}")
    return scores


def _ranked(scores: dict[str, dict[str, object]], name: str) -> list[str]:
    """Reports by falling score; equal ones in the order they came."""
    return sorted(scores, key=lambda report: -scores[report][name])


def best_constant_report(
    train_reports: Sequence[str],
    train_states: np.ndarray | None = None,
    objective: str = "bleu_4",
    labeler=None,
    candidates: int = 60,
    max_references: int = 500,
    seed: int = 0,
) -> str:
    """The training report that, written for every study, scores best against the training reports.

    Candidates are the `candidates` most frequent reports; at most `max_references` references are drawn by `seed`.

    Args:
        train_reports: N true reports of the training split, cleaned as the table is.
        train_states: (N, 14) their states; needed for a clinical objective.
        objective: a column, see [`best_constants`].
        labeler: needed for a clinical objective.
        candidates: how many reports are tried.
        max_references: size of the draw.
        seed: of the draw.

    Raises:
        ValueError: as [`best_constants`].
    """
    tried = frequent_reports(train_reports, candidates)
    return best_constants(tried, train_reports, train_states, labeler, (objective,), max_references, seed)[objective]
