"""Whether heatmaps lie where findings are: the pointing game and soft IoU, beside what chance would give.

A map is judged on the mask of its own finding in its own view, against two chance levels. `uniform` is a map that is
the same everywhere: in both measures it is worth the share of the view that the mask covers. `others` are the maps of
the same finding and view of all other studies on this mask, the mean of what permutations of the studies give: a map
that only knows where a finding usually lies is as good as those, one that looks at the image is better.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..findings_otdrg import FINDINGS
from .significance import resample_weights

#: A mask that covers more of a view than this says too little about where to look.
LARGEST_MASK = 0.5
#: Findings of fewer studies have no intervals, and no part in the macro average.
MINIMUM_STUDIES = 10
MEASURES: tuple[str, ...] = ("pointing", "soft_iou")
CHANCES: tuple[str, ...] = ("uniform", "others")

#: Values this close to the highest, relative to it, are as high: less is the rounding of float32 plans.
_TIE = 1e-5
#: A difference from chance of no more than this is none.
_ROUNDING = 1e-9


class JudgedMap(NamedTuple):
    """A map of one finding over one view of a study, on its own mask and on chance's level.

    Args:
        study: position of the study.
        finding: a name of `FINDINGS`.
        view: position of the view in the study.
        uniform: share of the view that the mask covers, which is what a uniform map is worth in either measure.
        pointing, soft_iou: what the map is worth, from 0 to 1.
        pointing_others, soft_iou_others: what other studies' maps are worth on this mask; NaN if there are none.
    """

    study: int
    finding: str
    view: int
    uniform: float
    pointing: float
    soft_iou: float
    pointing_others: float
    soft_iou_others: float

    def over_chance(self, measure: str, chance: str) -> float:
        """By how much the map is better in a measure than a chance level."""
        level = self.uniform if chance == "uniform" else getattr(self, f"{measure}_others")
        return getattr(self, measure) - level


def pointing_game(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Whether the highest point of each map lies in each mask (Zhang et al., "Top-down Neural Attention by Excitation
    Backprop", ECCV 2016, without their tolerance).

    Of several points that are equally high, the share of them in the mask, so that a uniform map is worth the mask's
    share of the view. A map that is 0 everywhere points nowhere and is worth 0.

    Args:
        maps: (N, height, width), not negative.
        masks: (M, height, width) of bool.

    Returns:
        (M, N): of each mask with each map.

    Raises:
        ValueError: maps and masks do not fit, or a map has negative or non-finite values.
    """
    maps, masks = _flat(maps, masks)
    peaks = maps.max(axis=1, keepdims=True)
    highest = ((maps >= peaks * (1 - _TIE)) & (peaks > 0)).astype(float)
    return masks @ highest.T / np.maximum(highest.sum(axis=1), 1)


def soft_iou(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Sum of minima over sum of maxima of each mask and each map, which is scaled to a highest value of 1.

    Of a map of zeros and ones this is the intersection over union; a uniform map is worth the mask's share of the view.

    Args:
        maps, masks: as in [`pointing_game`], masks not empty.

    Returns:
        (M, N): of each mask with each map.

    Raises:
        ValueError: as [`pointing_game`].
    """
    maps, masks = _flat(maps, masks)
    peaks = maps.max(axis=1, keepdims=True)
    scaled = np.divide(maps, peaks, out=np.zeros_like(maps), where=peaks > 0)
    overlap = masks @ scaled.T
    return overlap / (masks.sum(axis=1)[:, None] + scaled.sum(axis=1) - overlap)


def _flat(maps: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    maps, masks = np.asarray(maps, dtype=float), np.asarray(masks)
    if maps.ndim != 3 or masks.ndim != 3 or maps.shape[1:] != masks.shape[1:]:
        raise ValueError(
            f"maps have shape {maps.shape}, masks {masks.shape}: expected (N, height, width) and (M, height, width)"
        )
    if not np.isfinite(maps).all() or (maps < 0).any():
        raise ValueError("maps hold values below 0 or not finite: expected finite ones of at least 0")
    return maps.reshape(len(maps), -1), masks.reshape(len(masks), -1).astype(float)


def judge_maps(finding: str, view: int, studies: Sequence[int], maps: np.ndarray, masks: np.ndarray) -> list[JudgedMap]:
    """The maps of a finding over one view of N studies, each on its own mask and on chance's level.

    Args:
        finding, view: as in [`JudgedMap`].
        studies: the N positions.
        maps: (N, height, width), not negative.
        masks: (N, height, width) of bool, none of them empty.

    Raises:
        ValueError: as [`pointing_game`].
    """
    columns = {"uniform": np.asarray(masks).mean(axis=(1, 2))}
    for measure, pairs in (("pointing", pointing_game(maps, masks)), ("soft_iou", soft_iou(maps, masks))):
        own, others = pairs.diagonal(), len(pairs) - 1
        columns[measure] = own
        columns[f"{measure}_others"] = (pairs.sum(axis=1) - own) / others if others else np.full(1, np.nan)
    return [
        JudgedMap(study, finding, view, **{name: float(values[row]) for name, values in columns.items()})
        for row, study in enumerate(studies)
    ]


def localisation_scores(
    judged: Iterable[JudgedMap], studies: int, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """What maps are worth, finding by finding and in all, with 95 % intervals of a bootstrap over studies.

    A study counts once for a finding, with the mean over its views. The macro average is over findings with at least
    `MINIMUM_STUDIES`. All findings are resampled together, because those of a study hang together.

    Args:
        judged: the maps.
        studies: how many there are, without maps among them too.
        resamples, seed: of the bootstrap.

    Returns:
        `findings`, by name, and `macro`, None if there is no finding with enough studies. Each has its `studies`
        (`macro` also its `findings`, a number) and under each of `MEASURES` the `value`, its interval (`low`, `high`)
        and under each of `CHANCES` its `level`, the `difference` from it, that difference's interval and `verdict`:
        "above", "below" or "at" the level, as the interval is above 0, below or around it. A finding of too few
        studies has no interval (None), and the verdict None. An interval of all hits, or of none, has no width.
    """
    cells: dict[str, dict[int, list[list[float]]]] = {}
    for one in judged:
        cells.setdefault(one.finding, {}).setdefault(one.study, []).append(_quantities(one))
    names = [name for name in FINDINGS if name in cells]
    # (findings, studies, quantities), NaN where there is nothing
    table = np.full((len(names), studies, len(_QUANTITIES)), np.nan)
    for row, name in enumerate(names):
        for study, views in cells[name].items():
            table[row, study] = _mean(np.array(views), axis=0)
    enough = np.array([len(cells[name]) >= MINIMUM_STUDIES for name in names], dtype=bool)
    values = _mean(table, axis=1)
    known, filled = ~np.isnan(table), np.nan_to_num(table)
    drawn = np.concatenate(
        [
            _ratio(np.einsum("rn,fnq->rfq", weights, filled), np.einsum("rn,fnq->rfq", weights, known))
            for weights in resample_weights(studies, resamples, seed)
        ]
    )
    findings = {
        name: {"studies": len(cells[name]), **_measured(values[row], drawn[:, row] if enough[row] else None)}
        for row, name in enumerate(names)
    }
    macro = None
    if enough.any():
        macro = {
            "findings": int(enough.sum()),
            "studies": len({study for name in np.array(names)[enough] for study in cells[name]}),
            **_measured(_mean(values[enough], axis=0), _mean(drawn[:, enough], axis=1)),
        }
    return {"findings": findings, "macro": macro}


_QUANTITIES = [
    *MEASURES,
    "uniform",
    *(f"{measure}_others" for measure in MEASURES),
    *((measure, chance) for measure in MEASURES for chance in CHANCES),
]


def _quantities(one: JudgedMap) -> list[float]:
    return [getattr(one, name) if isinstance(name, str) else one.over_chance(*name) for name in _QUANTITIES]


def _measured(values: np.ndarray, drawn: np.ndarray | None) -> dict[str, Any]:
    """Of quantities (Q,) and their resamples (R, Q)."""
    value = dict(zip(_QUANTITIES, (None if np.isnan(one) else float(one) for one in values), strict=True))
    if drawn is None:
        interval = {name: {"low": None, "high": None} for name in _QUANTITIES}
    else:
        quantiles = np.nanquantile(drawn, [0.025, 0.975], axis=0).T.tolist()
        interval = {name: {"low": low, "high": high} for name, (low, high) in zip(_QUANTITIES, quantiles, strict=True)}
    return {
        measure: {
            "value": value[measure],
            **interval[measure],
            **{
                chance: {
                    "level": value["uniform" if chance == "uniform" else f"{measure}_others"],
                    "difference": value[measure, chance],
                    **interval[measure, chance],
                    "verdict": _verdict(**interval[measure, chance]),
                }
                for chance in CHANCES
            },
        }
        for measure in MEASURES
    }


def _verdict(low: float | None, high: float | None) -> str | None:
    if low is None:
        return None
    return "above" if low > _ROUNDING else "below" if high < -_ROUNDING else "at"


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of what is not NaN, NaN where nothing is."""
    known = ~np.isnan(values)
    return _ratio(np.nansum(values, axis=axis), known.sum(axis=axis))


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(np.shape(sums), np.nan), where=counts > 0)


__all__ = [
    "CHANCES",
    "LARGEST_MASK",
    "MEASURES",
    "MINIMUM_STUDIES",
    "JudgedMap",
    "judge_maps",
    "localisation_scores",
    "pointing_game",
    "soft_iou",
]
