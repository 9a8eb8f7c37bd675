"""How far scores can be trusted: bootstrap intervals, and paired tests between two systems on the same studies.

Every aggregate score is a function of sums over studies: BLEU and METEOR of n-gram and match counts, micro and macro
averages of hits per finding, the others of per-study values. So a resample of studies is a weight for each, and all
resamples of all scores are one matrix product, after which each score is what it would be if it were computed on the
resampled studies anew (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993; Koehn, "Statistical Significance
Tests for Machine Translation Evaluation", EMNLP 2004). CIDEr is the exception: its document frequencies stay those of
the whole reference set, and its interval is that of the mean of the studies' values. `scipy.stats.bootstrap` and
`permutation_test` give the same for means (the tests compare them), but recompute one score at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .metric import MetricResult

#: Weights in memory at once: 32 MiB.
_BLOCK = 2**22


class StudyStatistics:
    """What each of N studies adds to the aggregate scores of one run of a system.

    Args:
        results: of metrics, by name.
        wanted: by metric, the scores to aggregate.
    """

    def __init__(self, results: Mapping[str, MetricResult], wanted: Mapping[str, Sequence[str]]):
        self.parts = {name: result for name, result in results.items() if result.contributions is not None}
        self._wanted = wanted
        columns = (values for result in results.values() for values in result.per_study.values())
        self._studies = len(next(columns, ()))

    def __len__(self) -> int:
        return self._studies

    def missing(self) -> dict[str, dict[str, np.ndarray]]:
        """By metric and score, (N,) which studies have no value; without the scores that all studies have."""
        found: dict[str, dict[str, np.ndarray]] = {}
        for name, part in self.parts.items():
            for score, values in part.per_study.items():
                gaps = np.isnan(np.asarray(values, float))
                if gaps.any():
                    found.setdefault(name, {})[score] = gaps
        return found

    def without(self, missing: Mapping[str, Mapping[str, np.ndarray]]) -> StudyStatistics:
        """The statistics without the values of the studies in `missing`, which is as [`missing`] returns it."""
        parts = dict(self.parts)
        for name in missing.keys() & parts.keys():
            values = {score: np.asarray(column, float) for score, column in parts[name].per_study.items()}
            for score, gaps in missing[name].items():
                values[score] = np.where(gaps, np.nan, values[score])
            parts[name] = MetricResult.from_means(values)
        return StudyStatistics(parts, self._wanted)

    def aggregates(self, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Every aggregate score on R resamples.

        Args:
            weights: (R, N), how often each study is in each resample, N in total; all studies once (R = 1) without it.

        Returns:
            `{score: (R,)}`.
        """
        weights = np.ones((1, len(self))) if weights is None else weights
        return self.of_sums({name: weights @ part.contributions for name, part in self.parts.items()})

    def of_sums(self, sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The aggregate scores `{score: (R,)}` of sums (R, K) of contributions, by metric."""
        scores: dict[str, np.ndarray] = {}
        for name, values in sums.items():
            found = self.parts[name].aggregate(values, len(self))
            scores.update({score: found[score] for score in self._wanted[name] if score in found})
        return scores


class Interval(NamedTuple):
    """A score and its bootstrap interval."""

    value: float
    low: float
    high: float


class PairedDifference(NamedTuple):
    """A system's score minus another's, its bootstrap interval, and the two-sided p of no difference.

    Of the studies for which both have a value.
    """

    difference: float
    low: float
    high: float
    p: float


class Comparison(NamedTuple):
    """Two systems' scores and their difference, with its interval and the p-values of both paired tests.

    Of the studies for which both have a value. None is what a score does not have.
    """

    value: float | None
    against: float | None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p_bootstrap: float | None = None
    p_permutation: float | None = None


#: A system: one run of it, or several that differ by their seed, on the same studies in the same order.
Runs = StudyStatistics | Sequence[StudyStatistics]


def resample_weights(studies: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Weights (r, `studies`) of bootstrap resamples, in blocks whose r add up to `resamples`."""
    rng = np.random.default_rng(seed)
    for rows in _blocks(studies, resamples):
        yield rng.multinomial(studies, np.full(studies, 1 / studies), size=rows).astype(float)


def bootstrap_intervals(
    runs: Runs, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """Percentile bootstrap intervals of every aggregate score.

    Args:
        runs: of a system. The score of several is the mean of theirs.
        resamples: how many; each draws as many studies as there are, with replacement, the same for every run.
        confidence: of the interval.
        seed: of the draws.

    Returns:
        `{score: Interval}`, for the scores that all runs have, in all resamples.

    Raises:
        ValueError: no runs, runs of different numbers of studies, or a resamples or confidence out of range.
    """
    systems = _checked(resamples, confidence, runs=runs)
    (values,), (drawn,) = _resampled(systems, resamples, seed, False)
    return {name: Interval(values[name], *_percentiles(drawn[name], confidence)) for name in values}


def paired_bootstrap(
    system: Runs,
    against: Runs,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    resample_runs: bool = False,
) -> dict[str, PairedDifference]:
    """The difference of two systems in every aggregate score, by resampling the same studies for both.

    p is twice the smaller share of resamples in which the difference is not above, or not below, 0 (each counted with
    one more resample, so that it is never 0).

    Args:
        system, against: runs of each; a system's score is the mean of its runs'. Their numbers may differ.
        resamples, confidence, seed: as in [`bootstrap_intervals`].
        resample_runs: also draw each system's runs with replacement. Without it the result is about these runs; with
            it, about training the systems again, as far as so few runs allow.

    Returns:
        `{score: PairedDifference}`, `system` minus `against`, for the scores that both have, in all resamples. A score
        that lacks the values of some studies is that of the studies for which all runs have one.

    Raises:
        ValueError: as [`bootstrap_intervals`], or the systems are of different numbers of studies.
    """
    systems = _on_common_studies(_checked(resamples, confidence, system=system, against=against))
    values, drawn = _resampled(systems, resamples, seed, resample_runs)
    differences = {}
    for name in values[0]:
        difference = drawn[0][name] - drawn[1][name]
        tail = min((difference <= 0).sum(), (difference >= 0).sum())
        differences[name] = PairedDifference(
            values[0][name] - values[1][name],
            *_percentiles(difference, confidence),
            min(1.0, 2 * (int(tail) + 1) / (resamples + 1)),
        )
    return differences


def paired_permutation(system: Runs, against: Runs, resamples: int = 1000, seed: int = 0) -> dict[str, float]:
    """Two-sided p of two systems' difference in every aggregate score, by approximate randomisation.

    Each resample exchanges the systems' reports of every study with probability 1/2, in all runs at once. p is the
    share of differences as large as the one observed, which is counted among them (Noreen, "Computer-Intensive Methods
    for Testing Hypotheses", 1989). It is about these runs, not about other seeds.

    Raises:
        ValueError: as [`paired_bootstrap`], or the systems have different numbers of runs.
    """
    systems = _on_common_studies(_checked(resamples, 0.95, system=system, against=against))
    if len(systems[0]) != len(systems[1]):
        raise ValueError(f"system: {len(systems[0])} runs, against: {len(systems[1])}; expected as many of each")
    names, studies = _common(run for runs in systems for run in runs), len(systems[0][0])
    rng, beyond = np.random.default_rng(seed), dict.fromkeys(names, 0)
    means = [_mean(runs) for runs in systems]
    for rows in _blocks(studies, resamples):
        exchanged = rng.integers(2, size=(rows, studies)).astype(float)
        totals = dict.fromkeys(names, 0.0)
        for mine, other in zip(*systems, strict=True):
            sums: tuple[dict[str, np.ndarray], ...] = ({}, {})
            for part in mine.parts.keys() & other.parts.keys():
                values = mine.parts[part].contributions, other.parts[part].contributions
                moved = exchanged @ (values[1] - values[0])
                sums[0][part], sums[1][part] = values[0].sum(axis=0) + moved, values[1].sum(axis=0) - moved
            scores = mine.of_sums(sums[0]), other.of_sums(sums[1])
            for name in names:
                totals[name] = totals[name] + (scores[0][name] - scores[1][name]) / len(systems[0])
        for name in names:
            # Differences that are equal but for rounding are equal.
            observed = abs(means[0][name] - means[1][name])
            beyond[name] += int((np.abs(totals[name]) >= observed - 1e-12).sum())
    return {name: (count + 1) / (resamples + 1) for name, count in beyond.items()}


def compare_systems(
    system: Runs,
    against: Runs,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Comparison]:
    """[`paired_bootstrap`] and [`paired_permutation`] of two systems, and their scores; arguments and errors as there.

    `{score: Comparison}`, `system` minus `against`, for the scores that both have. Seventy scores are seventy tests:
    one in twenty of them is below 0.05 by chance, so decide beforehand which one counts.
    """
    differences = paired_bootstrap(system, against, resamples, confidence, seed)
    p_values = paired_permutation(system, against, resamples, seed)
    systems = _on_common_studies(_checked(resamples, confidence, system=system, against=against))
    values = [_mean(runs) for runs in systems]
    return {
        name: Comparison(values[0][name], values[1][name], *difference, p_values[name])
        for name, difference in differences.items()
    }


def _resampled(
    systems: Sequence[Sequence[StudyStatistics]], resamples: int, seed: int, resample_runs: bool
) -> tuple[list[dict[str, float]], list[dict[str, np.ndarray]]]:
    """Each system's scores, and its scores (resamples,) on the same resamples of the studies.

    Scores that cannot be computed on all resamples, because few studies have a value, are left out.
    """
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
    joined = [{name: np.concatenate(blocks) for name, blocks in collected.items()} for collected in drawn]
    finite = [name for name in names if all(np.isfinite(collected[name]).all() for collected in joined)]
    means = [_mean(runs) for runs in systems]
    return tuple([{name: each[name] for name in finite} for each in every] for every in (means, joined))


def _on_common_studies(systems: list[list[StudyStatistics]]) -> list[list[StudyStatistics]]:
    """The runs, with each score on the studies for which all of them have a value."""
    missing: dict[str, dict[str, np.ndarray]] = {}
    for run in (run for runs in systems for run in runs):
        for name, gaps in run.missing().items():
            known = missing.setdefault(name, {})
            for score, gap in gaps.items():
                known[score] = known.get(score, False) | gap
    return [[run.without(missing) for run in runs] for runs in systems] if missing else systems


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
    rows = max(1, _BLOCK // max(1, studies))
    for begin in range(0, resamples, rows):
        yield min(rows, resamples - begin)


def _checked(resamples: int, confidence: float, **systems: Runs) -> list[list[StudyStatistics]]:
    """Each system as a list of runs."""
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}: expected at least 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: expected more than 0 and less than 1")
    checked = {name: [runs] if isinstance(runs, StudyStatistics) else list(runs) for name, runs in systems.items()}
    for name, runs in checked.items():
        if not runs:
            raise ValueError(f"{name}: no run given, expected at least one")
        if len({len(run) for run in runs}) > 1:
            raise ValueError(f"{name}: {[len(run) for run in runs]} studies, expected the same ones in every run")
    if len({len(runs[0]) for runs in checked.values()}) > 1:
        counts = ", ".join(f"{name}: {len(runs[0])} studies" for name, runs in checked.items())
        raise ValueError(f"{counts}; expected the same studies in the same order")
    return list(checked.values())


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
]
