"""The best constant report: the training report that scores best when it is written for every study."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..findings_otdrg import FINDINGS, POSITIVE
from ..labelers.as_typed import label_quietly
from .constant_scores import NGramCounts, clinical_scores, rouge_l_scores
from .corpus import bleu_of_counts, meteor_of_counts
from .efficacy import F1_SCORES, UNCERTAIN_POLICIES
from .fluency import METEOR_NEEDS_JAVA, NLG_METRICS, meteor

#: The default scores, the main columns of a results table.
CONSTANT_COLUMNS = ("bleu_4", "rouge_l", "cider", "macro_f1_13")
#: The scores for which evaluations search a constant report.
SEARCHED_SCORES = (*NLG_METRICS, *F1_SCORES)
#: Most pairs of a candidate and a distinct reference for ROUGE-L; they take about a minute.
MOST_PAIRS = 10**8

#: With more pairs, the number of candidates that are compared with all references.
_ROUGE_FINALISTS = 100
#: METEOR's Java scores a few hundred pairs a second.
_METEOR_FINALISTS, _METEOR_REFERENCES = 20, 300
#: METEOR 1.5's weight of recall.
_METEOR_ALPHA = 0.85


@dataclass(frozen=True)
class BestConstants:
    """What [`best_constants`] found.

    Args:
        reports: by score, the report.
        scores: its value on the training reports.
        notes: for which scores not all candidates were compared with all references, or none was chosen, and why.
    """

    reports: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def keep(self, score: str, candidates: Sequence[str], values: np.ndarray) -> None:
        """Keep the candidate with the highest value, the first of equal ones."""
        place = int(np.argmax(values))
        self.reports[score], self.scores[score] = candidates[place], float(values[place])


def all_positive_report(reports: Sequence[str], states: np.ndarray) -> str:
    """A text with every finding positive but "No Finding": for each finding, the shortest report in which it is.

    Its recall is 1 wherever the labeler still reads the findings in the joined text, which macro-F1 rewards.

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


def best_constants(
    reports: Sequence[str],
    states: np.ndarray | None = None,
    labeler=None,
    columns: Sequence[str] = CONSTANT_COLUMNS,
    seed: int = 0,
) -> BestConstants:
    """For each score, the report that scores best when it is written for every training study.

    Candidates are all distinct training reports, for clinical scores also the [`all_positive_report`]; each is scored
    against all training reports. There are two exceptions, which the notes name:

    - METEOR runs on Java and is slow: it is chosen on 300 training reports, drawn by `seed`, among the 20 candidates
      with the highest harmonic mean of unigram precision and recall as METEOR weights them, and the best constants of
      the other scores.
    - ROUGE-L above `MOST_PAIRS` pairs of distinct reports (MIMIC-CXR; IU X-Ray has 3 million): all candidates are
      scored against as many references as that allows, drawn by `seed`, and the 100 best against all.

    Args:
        reports: N training reports, cleaned as the reports of the table are.
        states: (N, 14) the true states; needed for clinical scores.
        labeler: the one that gave `states`; reads the states of the candidates.
        columns: scores of fluency and of clinical efficacy ("macro_f1_13" is short for
            "macro_f1_13_uncertain_negative").
        seed: of the draws.

    Returns:
        The reports by score; the first of equally good ones. Without Java there is none for METEOR.

    Raises:
        ValueError: no report that holds a word, an unknown score, or states missing or of another length.
    """
    weights = Counter(reports)
    candidates = [report for report in weights if report.split()]
    if not candidates:
        raise ValueError(f"reports: none of {len(reports)} holds a word, expected training reports")
    clinical = [column for column in columns if column.startswith(("example_", "micro_", "macro_"))]
    unknown = [column for column in columns if column not in (*clinical, *NLG_METRICS)]
    if unknown:
        raise ValueError(
            f"unknown columns {unknown}: expected some of {', '.join(NLG_METRICS)}, or of clinical efficacy"
        )
    if clinical and (states is None or labeler is None):
        raise ValueError(f"columns {', '.join(clinical)}: expected states and a labeler")
    if states is not None and len(states) != len(reports):
        raise ValueError(f"states: {len(states)}, reports: {len(reports)}; expected as many")
    best = BestConstants()
    _add_fluency(best, reports, candidates, weights, [name for name in columns if name in NLG_METRICS], seed)
    if clinical:
        _add_clinical(best, candidates, np.asarray(states), labeler, clinical)
    return best


def _add_clinical(
    best: BestConstants, candidates: list[str], true_states: np.ndarray, labeler, columns: Sequence[str]
) -> None:
    states = label_quietly(labeler, candidates)
    everything = all_positive_report(candidates, states)
    if everything:
        candidates = [*candidates, everything]
        states = np.concatenate([states, label_quietly(labeler, [everything])])
    found = clinical_scores(states, true_states)
    for column in columns:
        name = column if column.endswith(tuple(UNCERTAIN_POLICIES)) else f"{column}_uncertain_negative"
        if name not in found:
            raise ValueError(f"unknown columns {[column]}: expected keys of clinical_efficacy_scores")
        best.keep(column, candidates, found[name])


def _add_fluency(
    best: BestConstants,
    reports: Sequence[str],
    candidates: list[str],
    weights: Counter[str],
    columns: Sequence[str],
    seed: int,
) -> None:
    references, counts = list(weights), np.array(list(weights.values()))
    ngrams = NGramCounts(candidates, references, counts)
    scores: dict[str, np.ndarray] = {}
    if any(column.startswith(("bleu", "meteor")) for column in columns):
        sums = ngrams.bleu_counts()
        scores.update(zip(NLG_METRICS[:4], bleu_of_counts(sums).T, strict=True))
    if "cider" in columns:
        scores["cider"] = ngrams.cider()
    if "rouge_l" in columns:
        scores["rouge_l"] = _rouge_l(best, candidates, references, counts, seed)
    for column in columns:
        if column in scores:
            best.keep(column, candidates, scores[column])
    if "meteor" not in columns:
        return
    if shutil.which("java") is None:
        best.notes.append(f"no best constant report for METEOR: {METEOR_NEEDS_JAVA}")
        return
    matched, written, true = sums[:, 4], sums[:, 0], sums[:, -1]
    # METEOR's harmonic mean of matched / written, the precision, and matched / true, the recall.
    unigram_mean = matched / (_METEOR_ALPHA * true + (1 - _METEOR_ALPHA) * written)
    likely = np.argsort(-unigram_mean, kind="stable")[:_METEOR_FINALISTS]
    finalists = list(dict.fromkeys([*(candidates[place] for place in likely), *best.reports.values()]))
    drawn = random.Random(seed).sample(list(reports), min(_METEOR_REFERENCES, len(reports)))
    # One Java process scores all pairs.
    pairs = meteor([finalist for finalist in finalists for _ in drawn], [*drawn] * len(finalists)).contributions
    best.keep("meteor", finalists, meteor_of_counts(pairs.reshape(len(finalists), len(drawn), -1).sum(axis=1)))
    best.notes.append(
        f"the best constant report for METEOR was chosen among {len(finalists)} of {len(candidates):,} candidates "
        f"on {len(drawn):,} of {len(reports):,} training reports"
    )


def _rouge_l(
    best: BestConstants, candidates: list[str], references: list[str], counts: np.ndarray, seed: int
) -> np.ndarray:
    if len(candidates) * len(references) <= MOST_PAIRS:
        return rouge_l_scores(candidates, references, counts)
    drawn = random.Random(seed).sample(range(len(references)), max(1, MOST_PAIRS // len(candidates)))
    estimated = rouge_l_scores(candidates, [references[place] for place in drawn], counts[drawn])
    finalists = np.argsort(-estimated, kind="stable")[:_ROUGE_FINALISTS]
    scores = np.full(len(candidates), -np.inf)
    scores[finalists] = rouge_l_scores([candidates[place] for place in finalists], references, counts)
    best.notes.append(
        f"the best constant report for ROUGE-L is the best of the {len(finalists)} that score highest on "
        f"{len(drawn):,} of {len(references):,} distinct training reports"
    )
    return scores


__all__ = [
    "CONSTANT_COLUMNS",
    "MOST_PAIRS",
    "SEARCHED_SCORES",
    "BestConstants",
    "all_positive_report",
    "best_constants",
]
