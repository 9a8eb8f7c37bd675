"""What a metric is: its scores and how they are shown, and the function that computes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Score:
    """How one score of a metric is shown and compared.

    Args:
        display: its name.
        table: title of the full table that has a column for it; None for a score that only JSON files hold.
        main: whether the short tables (training, ablation, comparison with baselines) have a column for it.
        higher_is_better: the direction in which systems improve.
        heading: its name in `table` where the title already says part of it.
    """

    display: str
    table: str | None = "other metrics"
    main: bool = False
    higher_is_better: bool = True
    heading: str | None = None


@dataclass(frozen=True)
class MetricResult:
    """What a metric found on N studies.

    Args:
        scores: the aggregate scores; None where one cannot be computed here, and `notes` says why.
        per_study: N values by name; a name need not be that of an aggregate score. NaN, a study without a value, is
            only for results of [`MetricResult.from_means`].
        contributions: (N, K) what each study adds to the sums from which `aggregate` computes the scores. Bootstrap
            and permutation resample its rows; a metric without it has no intervals.
        aggregate: from sums (R, K) over `studies` studies, and `studies`, to `{score: (R,)}`.
        details: further values for JSON files, which are not scores.
        notes: why a score is None, or lacks studies.
    """

    scores: dict[str, float | None]
    per_study: dict[str, list[float]] = field(default_factory=dict)
    contributions: np.ndarray | None = None
    aggregate: Callable[[np.ndarray, int], dict[str, np.ndarray]] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_means(cls, per_study: Mapping[str, Sequence[float]]) -> MetricResult:
        """The result of a metric whose scores are the means of the studies' values.

        NaN stands for a study without a value; the mean leaves it out, and a note counts them.
        """
        names = list(per_study)
        values = np.column_stack([np.asarray(column, float) for column in per_study.values()])
        known = ~np.isnan(values)
        counts, columns = known.sum(axis=0), len(names)
        notes = {
            name: f"no value for {len(values) - count:,} of {len(values):,} reports; the mean is of the others"
            for name, count in zip(names, counts.tolist(), strict=True)
            if count < len(values)
        }
        # Counts are kept even if no value is missing, so that runs with and without missing values can be compared.
        sums = np.where(known, values, 0.0)
        means = [total / count if count else None for total, count in zip(sums.sum(axis=0), counts, strict=True)]

        def aggregate(totals: np.ndarray, studies: int) -> dict[str, np.ndarray]:
            with np.errstate(invalid="ignore"):
                return dict(zip(names, (totals[:, :columns] / totals[:, columns:]).T, strict=True))

        return cls(
            scores={name: None if mean is None else float(mean) for name, mean in zip(names, means, strict=True)},
            per_study=dict(zip(names, values.T.tolist(), strict=True)),
            contributions=np.concatenate([sums, known], axis=1),
            aggregate=aggregate,
            notes=notes,
        )


@dataclass(frozen=True)
class Metric:
    """A metric, as `otdrg.metrics.registry` lists it.

    Args:
        name: under which `--metrics` and recipes ask for it.
        scores: its aggregate scores. Their names are unique among all metrics.
        compute: from N predictions and N references, texts or (N, 14) state ids, to a [`MetricResult`]. Imports what
            takes long or is optional when it is called; a package that is missing gives scores of None and a note.
        reads: whether it compares the reports' texts or the finding states a labeler reads in them.
        section: key of its scores in the JSON of `otdrg score`.
        default: whether it is computed where no metrics are named.
        chest_only: whether it is made for reports of chest radiographs.
    """

    name: str
    scores: Mapping[str, Score]
    compute: Callable[[Any, Any], MetricResult]
    reads: Literal["reports", "states"] = "reports"
    section: str = "other"
    default: bool = True
    chest_only: bool = False


__all__ = ["Metric", "MetricResult", "Score"]
