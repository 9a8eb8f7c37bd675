"""How far scores can be trusted: bootstrap intervals, and paired tests between two systems on the same studies.

Every aggregate score is a function of sums over studies: BLEU and METEOR of n-gram and match counts, micro and macro
averages of hits per finding, the others of per-study values. So a resample of studies is a weight for each, and all
resamples of all scores are one matrix product, after which each score is what it would be if it were computed on the
resampled studies anew (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993; Koehn, "Statistical Significance
Tests for Machine Translation Evaluation", EMNLP 2004). CIDEr alone is not: its document frequencies stay those of the
whole reference set, and its interval is of the mean of the studies' values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .clinical_efficacy.clinical_efficacy import (
    LABEL_SETS,
    MEASURES,
    UNCERTAIN_POLICIES,
    clinical_efficacy_averages,
    clinical_efficacy_contributions,
)
from .nlg.corpus import bleu_of_counts, meteor_of_counts
from .nlg.nlg import NLG_METRICS
from .rad_eval import RADEVAL_MEANS

#: Weights that are held at once: 32 MiB of them.
_BLOCK = 2**22


@dataclass(frozen=True)
class StudyStatistics:
    """What each of N studies adds to the aggregate scores of one run of a system; made by [`study_statistics`].

    Args:
        columns: by score, or family of scores, an (N, K) array whose sums over studies give it.
    """

    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def aggregates(self, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Every aggregate score on R resamples.

        Args:
            weights: (R, N), how often each study is in each resample, N in total; all studies once (R = 1) without it.

        Returns:
            `{score: (R,)}`, under the names of `nlg_scores` and `clinical_efficacy_scores`.
        """
        weights = np.ones((1, len(self))) if weights is None else weights
        return _aggregates({name: weights @ values for name, values in self.columns.items()}, len(self))


class Interval(NamedTuple):
    """A score and its bootstrap interval."""

    value: float
    low: float
    high: float


class PairedDifference(NamedTuple):
    """A system's score minus another's: its bootstrap interval, and the two-sided p of there being none."""

    difference: float
    low: float
    high: float
    p: float


class Comparison(NamedTuple):
    """Two systems' scores and their difference, with its interval and the p-values of both paired tests."""

    value: float
    against: float
    difference: float
    low: float
    high: float
    p_bootstrap: float
    p_permutation: float


#: A system: one run of it, or several that differ by their seed, on the same studies in the same order.
Runs = StudyStatistics | Sequence[StudyStatistics]


def study_statistics(
    nlg: Mapping[str, Any] | None = None,
    predicted_states: Sequence[Sequence[int]] | np.ndarray | None = None,
    true_states: Sequence[Sequence[int]] | np.ndarray | None = None,
    radeval: Mapping[str, Any] | None = None,
) -> StudyStatistics:
    """The statistics of one run of a system, of what is given.

    Args:
        nlg: `nlg_scores(..., return_statistics=True)` of N reports. Of a result without statistics ROUGE-L and CIDEr
            are taken, BLEU and METEOR are not: they are no means of the studies' values.
        predicted_states, true_states: (N, 14) state ids as in `clinical_efficacy_scores`.
        radeval: `radeval_scores` of N reports. Its means of the studies' values are aggregated.

    Raises:
        ValueError: nothing is given, one kind of states without the other, or another N in each.
    """
    columns: dict[str, np.ndarray] = {}
    if nlg is not None:
        columns.update({name: np.asarray(rows, float) for name, rows in nlg.get("statistics", {}).items()})
        for name in ("rouge_l", "cider"):
            if name in nlg["per_study"]:
                columns[name] = np.asarray(nlg["per_study"][name], float)[:, None]
    if radeval is not None:
        for name, values in radeval["per_study"].items():
            if values is not None:
                columns[name] = np.asarray(values, float)[:, None]
    if (predicted_states is None) != (true_states is None):
        raise ValueError("predicted_states and true_states: one is given without the other, expected both or neither")
    if predicted_states is not None:
        cells, ratios = clinical_efficacy_contributions(predicted_states, true_states)
        columns["cells"], columns["ratios"] = (rows.reshape(len(rows), -1) for rows in (cells, ratios))
    if not columns:
        raise ValueError("neither nlg nor states nor scores of radeval are given: expected at least one")
    sizes = {name: len(rows) for name, rows in columns.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"scores and states are of different studies, expected as many of each: {sizes}")
    return StudyStatistics(columns)


def resample_weights(studies: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Weights (r, `studies`) of bootstrap resamples, in blocks whose r add up to `resamples`."""
    rng = np.random.default_rng(seed)
    for rows in _blocks(studies, resamples):
        yield rng.multinomial(studies, np.full(studies, 1 / studies), size=rows).astype(float)


def bootstrap_intervals(
    runs: Runs, resamples: int = 1000, confidence: float = 0.95, seed: int = 0, resample_runs: bool = False
) -> dict[str, Interval]:
    """Percentile bootstrap intervals of every aggregate score.

    Args:
        runs: of a system. The score of several is the mean of theirs.
        resamples: how many; each draws as many studies as there are, with replacement, the same ones of every run.
        confidence: of the interval.
        seed: of the draws.
        resample_runs: draw runs with replacement, too, so that the interval covers the seeds' spread as well.

    Returns:
        `{score: Interval}`, for the scores that all runs have.

    Raises:
        ValueError: no runs, runs of different numbers of studies, or a resamples or confidence out of range.
    """
    runs = _checked_runs("runs", runs)
    _check(resamples, confidence)
    values, (drawn,) = _resampled([runs], resamples, seed, resample_runs)
    return {name: Interval(values[0][name], *_percentiles(drawn[name], confidence)) for name in drawn}


def paired_bootstrap(
    system: Runs,
    against: Runs,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    resample_runs: bool = False,
) -> dict[str, PairedDifference]:
    """The difference of two systems in every aggregate score, by resampling studies, the same ones of both systems.

    p is twice the smaller share of resamples in which the difference is not above, or not below, 0 (each counted with
    one resample more, so that it is never 0).

    Args:
        system, against: runs of each; a system's score is the mean of its runs'. They need not be equally many.
        resamples, confidence, seed: as in [`bootstrap_intervals`].
        resample_runs: draw each system's runs with replacement, too. Without it the result is about these runs; with
            it, about training the systems again, as far as so few runs can tell.

    Returns:
        `{score: PairedDifference}`, `system` minus `against`, for the scores that both have.

    Raises:
        ValueError: as [`bootstrap_intervals`], or the systems are of different numbers of studies.
    """
    systems = _checked_pair(system, against)
    _check(resamples, confidence)
    values, drawn = _resampled(systems, resamples, seed, resample_runs)
    differences = {}
    for name in drawn[0]:
        below = drawn[0][name] - drawn[1][name]
        tail = min((below <= 0).sum(), (below >= 0).sum())
        differences[name] = PairedDifference(
            values[0][name] - values[1][name],
            *_percentiles(below, confidence),
            min(1.0, 2 * (int(tail) + 1) / (resamples + 1)),
        )
    return differences


def paired_permutation(system: Runs, against: Runs, resamples: int = 1000, seed: int = 0) -> dict[str, float]:
    """Two-sided p of two systems' difference in every aggregate score, by approximate randomisation.

    Each resample exchanges the systems' reports of every study with probability 1/2, those of all runs of a study at
    once. p is the share of differences as large as the one observed, which is counted among them (Noreen,
    "Computer-Intensive Methods for Testing Hypotheses", 1989). It is about these runs, not about other seeds.

    Args:
        system, against: runs of each, equally many; the first is exchanged with the first, and so on.
        resamples, seed: how many, and of the draws.

    Returns:
        `{score: p}`, for the scores that both have.

    Raises:
        ValueError: as [`paired_bootstrap`], or a system has more runs than the other.
    """
    systems = _checked_pair(system, against)
    if len(systems[0]) != len(systems[1]):
        raise ValueError(
            f"system: {len(systems[0])} runs, against: {len(systems[1])}; a permutation test exchanges them one by "
            "one, expected as many of each"
        )
    _check(resamples)
    studies = len(systems[0][0])
    rng = np.random.default_rng(seed)
    names = _common(run for runs in systems for run in runs)
    beyond = dict.fromkeys(names, 0)
    observed = {name: _mean(systems[0])[name] - _mean(systems[1])[name] for name in names}
    for rows in _blocks(studies, resamples):
        exchanged = rng.integers(2, size=(rows, studies)).astype(float)
        totals = dict.fromkeys(names, 0.0)
        for mine, other in zip(*systems, strict=True):
            sums: list[dict[str, np.ndarray]] = [{}, {}]
            for column in mine.columns.keys() & other.columns.keys():
                moved = exchanged @ (other.columns[column] - mine.columns[column])
                sums[0][column] = mine.columns[column].sum(axis=0) + moved
                sums[1][column] = other.columns[column].sum(axis=0) - moved
            scores = [_aggregates(each, studies) for each in sums]
            for name in names:
                totals[name] = totals[name] + (scores[0][name] - scores[1][name]) / len(systems[0])
        for name in names:
            # Differences that are equal but for rounding are equal.
            beyond[name] += int((np.abs(totals[name]) >= abs(observed[name]) - 1e-12).sum())
    return {name: (count + 1) / (resamples + 1) for name, count in beyond.items()}


def compare_systems(
    system: Runs,
    against: Runs,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    resample_runs: bool = False,
) -> dict[str, Comparison]:
    """[`paired_bootstrap`] and [`paired_permutation`] of two systems, and their scores; arguments and errors as there.

    `{score: Comparison}`, `system` minus `against`, for the scores that both have. Seventy scores are seventy tests:
    one in twenty of them is below 0.05 by chance, so decide beforehand which one counts.
    """
    differences = paired_bootstrap(system, against, resamples, confidence, seed, resample_runs)
    p_values = paired_permutation(system, against, resamples, seed)
    values = [_mean(runs) for runs in _checked_pair(system, against)]
    return {
        name: Comparison(values[0][name], values[1][name], *difference, p_values[name])
        for name, difference in differences.items()
    }


def _aggregates(sums: Mapping[str, np.ndarray], studies: int) -> dict[str, np.ndarray]:
    """Scores (R,) from sums (R, K) over `studies` studies."""
    scores: dict[str, np.ndarray] = {}
    if "bleu" in sums:
        scores.update(zip(NLG_METRICS[:4], bleu_of_counts(sums["bleu"]).T, strict=True))
    if "meteor" in sums:
        scores["meteor"] = meteor_of_counts(sums["meteor"])
    for name in ("rouge_l", "cider", *RADEVAL_MEANS):
        if name in sums:
            scores[name] = sums[name][:, 0] / studies
    if "cells" in sums:
        rows = len(sums["cells"])
        counts = sums["cells"].reshape(rows, len(UNCERTAIN_POLICIES), 3, -1)
        ratios = sums["ratios"].reshape(rows, len(UNCERTAIN_POLICIES), len(LABEL_SETS), len(MEASURES))
        scores.update(clinical_efficacy_averages(counts, ratios / studies))
    return scores


def _resampled(
    systems: Sequence[Sequence[StudyStatistics]], resamples: int, seed: int, resample_runs: bool
) -> tuple[list[dict[str, float]], list[dict[str, np.ndarray]]]:
    """Each system's scores, and its scores (resamples,) on the same resamples of the studies."""
    names = _common(run for runs in systems for run in runs)
    rng = np.random.default_rng([seed, 1])
    drawn: list[dict[str, list[np.ndarray]]] = [{name: [] for name in names} for _ in systems]
    for weights in resample_weights(len(systems[0][0]), resamples, seed):
        for runs, collected in zip(systems, drawn, strict=True):
            shares = np.full((len(weights), len(runs)), 1 / len(runs))
            if resample_runs:
                shares = rng.multinomial(len(runs), shares[0], size=len(weights)) / len(runs)
            by_run = [run.aggregates(weights) for run in runs]
            for name in names:
                collected[name].append(sum(share * run[name] for share, run in zip(shares.T, by_run, strict=True)))
    return (
        [_mean(runs) for runs in systems],
        [{name: np.concatenate(blocks) for name, blocks in collected.items()} for collected in drawn],
    )


def _mean(runs: Sequence[StudyStatistics]) -> dict[str, float]:
    by_run = [run.aggregates() for run in runs]
    return {name: float(np.mean([scores[name][0] for scores in by_run])) for name in _common(runs)}


def _common(runs: Iterator[StudyStatistics] | Sequence[StudyStatistics]) -> list[str]:
    first, *others = [list(run.aggregates()) for run in runs]
    return [name for name in first if all(name in names for names in others)]


def _percentiles(values: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.percentile(values, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


def _blocks(studies: int, resamples: int) -> Iterator[int]:
    rows = max(1, _BLOCK // studies)
    for begin in range(0, resamples, rows):
        yield min(rows, resamples - begin)


def _check(resamples: int, confidence: float = 0.95) -> None:
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}: expected at least 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: expected more than 0 and less than 1")


def _checked_runs(name: str, runs: Runs) -> list[StudyStatistics]:
    runs = [runs] if isinstance(runs, StudyStatistics) else list(runs)
    if not runs:
        raise ValueError(f"{name}: no run given, expected at least one")
    if len({len(run) for run in runs}) > 1:
        raise ValueError(f"{name}: {[len(run) for run in runs]} studies, expected the same ones in every run")
    return runs


def _checked_pair(system: Runs, against: Runs) -> list[list[StudyStatistics]]:
    systems = [_checked_runs("system", system), _checked_runs("against", against)]
    if len(systems[0][0]) != len(systems[1][0]):
        raise ValueError(
            f"system: {len(systems[0][0])} studies, against: {len(systems[1][0])}; expected the same studies in the "
            "same order"
        )
    return systems


__all__ = [
    "Comparison",
    "Interval",
    "PairedDifference",
    "StudyStatistics",
    "bootstrap_intervals",
    "compare_systems",
    "paired_bootstrap",
    "paired_permutation",
    "resample_weights",
    "study_statistics",
]
