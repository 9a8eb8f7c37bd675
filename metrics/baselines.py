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

#: The main columns of a results table.
CONSTANT_COLUMNS = ("bleu_4", "rouge_l", "cider", "macro_f1_13")
#: The scores for which [`best_constants`] searches a constant report.
SEARCHED_SCORES = (*NLG_METRICS, *F1_SCORES)
#: Pairs of a candidate and a distinct reference that ROUGE-L is computed of, in about a minute.
MOST_PAIRS = 10**8

_POLICY = "uncertain_negative"
#: Candidates that meet all references where there are more than `MOST_PAIRS`.
_ROUGE_FINALISTS = 100
#: METEOR's Java scores some hundred pairs a second.
_METEOR_FINALISTS, _METEOR_REFERENCES = 20, 300
#: METEOR 1.5's weight of recall.
_METEOR_ALPHA = 0.85


@dataclass(frozen=True)
class BestConstants:
    """What [`best_constants`] found.

    Args:
        reports: by column, the report.
        scores: by column, its score on the training reports.
        notes: which columns were not chosen among all candidates against all references, or not at all, and why.
    """

    reports: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def all_positive_report(reports: Sequence[str], states: np.ndarray) -> str:
    """A constant that has every finding but "No Finding" positive, as far as any of the reports has it.

    It joins, finding by finding, the shortest report in which it is positive. Its recall is 1 wherever the labeler
    still reads the findings in the joined text, which macro-F1 rewards.

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
    """For each column of a table, the report that scores best when it is written for every training study.

    Candidates are all distinct training reports, for clinical columns the [`all_positive_report`] as well; each is
    scored against all training reports. There are two exceptions, which the notes name:

    - METEOR runs on Java and is slow: it is chosen on 300 training reports, drawn by `seed`, among the 20 candidates
      with the highest harmonic mean of unigram precision and recall as METEOR weights them, and the best constants of
      the other columns.
    - ROUGE-L above `MOST_PAIRS` pairs of distinct reports (MIMIC-CXR; IU X-Ray has 3 million): all candidates are
      scored against as many references as that allows, drawn by `seed`, and the 100 best against all.

    Args:
        reports: N training reports, cleaned as the reports of the table are.
        states: (N, 14) the true states; needed for clinical columns.
        labeler: reads the states of the candidates; the one that gave `states`.
        columns: names of `nlg_scores` and of `clinical_efficacy_scores` ("macro_f1_13" is short for
            "macro_f1_13_uncertain_negative").
        seed: of the draws.

    Returns:
        The reports by column; of equally good ones the first. Without Java there is none for METEOR.

    Raises:
        ValueError: no report that holds a word, an unknown column, or states missing or of another length.
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
    fluency = [column for column in columns if column in NLG_METRICS]
    scores = _fluency_scores(candidates, weights, fluency, seed, best.notes)
    for column in fluency:
        if column in scores:
            _keep(best, column, candidates, scores[column])
    if "meteor" in fluency and shutil.which("java") is None:
        best.notes.append(f"no best constant report for METEOR: {METEOR_NEEDS_JAVA}")
    elif "meteor" in fluency:
        likely = np.argsort(-scores["unigram_mean"], kind="stable")[:_METEOR_FINALISTS]
        finalists = list(dict.fromkeys([*(candidates[place] for place in likely), *best.reports.values()]))
        drawn = random.Random(seed).sample(list(reports), min(_METEOR_REFERENCES, len(reports)))
        _keep(best, "meteor", finalists, _meteor_scores(finalists, drawn))
        best.notes.append(
            f"the best constant report for METEOR was chosen among {len(finalists)} of {len(candidates):,} candidates "
            f"on {len(drawn):,} of {len(reports):,} training reports"
        )
    if clinical:
        candidate_states = label_quietly(labeler, candidates)
        everything = all_positive_report(candidates, candidate_states)
        if everything:
            candidates = [*candidates, everything]
            candidate_states = np.concatenate([candidate_states, label_quietly(labeler, [everything])])
        found = clinical_scores(candidate_states, np.asarray(states))
        for column in clinical:
            name = column if column.endswith(tuple(UNCERTAIN_POLICIES)) else f"{column}_{_POLICY}"
            if name not in found:
                raise ValueError(f"unknown columns {[column]}: expected keys of clinical_efficacy_scores")
            _keep(best, column, candidates, found[name])
    return best


def _keep(best: BestConstants, column: str, candidates: Sequence[str], scores: np.ndarray) -> None:
    place = int(np.argmax(scores))
    best.reports[column], best.scores[column] = candidates[place], float(scores[place])


def _fluency_scores(
    candidates: list[str], weights: Counter[str], columns: Sequence[str], seed: int, notes: list[str]
) -> dict[str, np.ndarray]:
    """Of each candidate the scores of the columns without METEOR, and the `unigram_mean` that it is screened by."""
    references, counts = list(weights), np.array(list(weights.values()))
    ngrams = NGramCounts(candidates, references, counts)
    scores: dict[str, np.ndarray] = {}
    if any(column.startswith(("bleu", "meteor")) for column in columns):
        sums = ngrams.bleu_counts()
        scores.update(zip(NLG_METRICS[:4], bleu_of_counts(sums).T, strict=True))
        matched, written, true = sums[:, 4], sums[:, 0], sums[:, -1]
        # The harmonic mean of METEOR; precision is matched / written, recall matched / true.
        scores["unigram_mean"] = matched / (_METEOR_ALPHA * true + (1 - _METEOR_ALPHA) * written)
    if "cider" in columns:
        scores["cider"] = ngrams.cider()
    if "rouge_l" in columns:
        pairs = len(candidates) * len(references)
        if pairs <= MOST_PAIRS:
            scores["rouge_l"] = rouge_l_scores(candidates, references, counts)
        else:
            drawn = random.Random(seed).sample(range(len(references)), max(1, MOST_PAIRS // len(candidates)))
            estimated = rouge_l_scores(candidates, [references[place] for place in drawn], counts[drawn])
            finalists = np.argsort(-estimated, kind="stable")[:_ROUGE_FINALISTS]
            scores["rouge_l"] = np.full(len(candidates), -np.inf)
            scores["rouge_l"][finalists] = rouge_l_scores([candidates[it] for it in finalists], references, counts)
            notes.append(
                f"the best constant report for ROUGE-L is the best of the {len(finalists)} that score highest on "
                f"{len(drawn):,} of {len(references):,} distinct training reports"
            )
    return scores


def _meteor_scores(candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """METEOR of each candidate written for every reference; one Java process scores all pairs."""
    written = [candidate for candidate in candidates for _ in references]
    counts = meteor(written, [*references] * len(candidates)).contributions
    counts = counts.reshape(len(candidates), len(references), -1)
    return meteor_of_counts(counts.sum(axis=1))


__all__ = ["CONSTANT_COLUMNS", "MOST_PAIRS", "BestConstants", "all_positive_report", "best_constants"]
