"""Localisation: do heatmaps lie on the findings? The pointing game and soft IoU, beside two chance levels.

A map is judged on the mask of its own finding in its own view. The chance level `uniform` is the score of a constant
map, in both measures the share of the view that the mask covers. The chance level `others` is the mean score, on this
mask, of the maps of the same finding and view in all other studies: a map that only reflects where a finding usually
lies scores as high as these, one that depends on the image scores higher.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..findings_otdrg import FINDINGS
from .significance import resample_weights

#: A mask that covers more than this share of a view is not used.
LARGEST_MASK = 0.5
#: Findings of fewer studies have no intervals and do not count in the macro average.
MINIMUM_STUDIES = 10
MEASURES: tuple[str, ...] = ("pointing", "soft_iou")
CHANCES: tuple[str, ...] = ("uniform", "others")

#: Values this close to the highest, relative to it, count as equal to it, because plans are float32.
_TIE = 1e-5
#: A difference from chance below this is rounding.
_ROUNDING = 1e-9


class JudgedMap(NamedTuple):
    """Scores of a map of one finding over one view of a study, with their chance levels.

    Args:
        study: position of the study.
        finding: a name of `FINDINGS`.
        view: position of the view in the study.
        uniform: share of the view that the mask covers, the score of a uniform map in both measures.
        pointing, soft_iou: the map's scores, from 0 to 1.
        pointing_others, soft_iou_others: mean scores of other studies' maps on this mask; NaN if there are none.
    """

    study: int
    finding: str
    view: int
    uniform: float
    pointing: float
    soft_iou: float
    pointing_others: float
    soft_iou_others: float


def pointing_game(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Whether the highest point of each map lies in each mask (Zhang et al., "Top-down Neural Attention by Excitation
    Backprop", ECCV 2016, without their tolerance).

    Of several points that are equally high, the share of them in the mask, so that a uniform map scores the mask's
    share of the view. A map that is 0 everywhere scores 0.

    Args:
        maps: (N, height, width), not negative.
        masks: (M, height, width) of bool.

    Returns:
        (M, N), of each mask with each map.

    Raises:
        ValueError: maps and masks do not fit, or a map has negative or non-finite values.
    """
    maps, masks = _flat(maps, masks)
    peaks = maps.max(axis=1, keepdims=True)
    highest = ((maps >= peaks * (1 - _TIE)) & (peaks > 0)).astype(float)
    return masks @ highest.T / np.maximum(highest.sum(axis=1), 1)


def soft_iou(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Sum of minima over sum of maxima of each mask and each map, scaled to a highest value of 1.

    For a map of zeros and ones this is the intersection over union; a uniform map scores the mask's share of the view.

    Args:
        maps, masks: as in [`pointing_game`], masks not empty.

    Returns:
        (M, N), of each mask with each map.

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
        raise ValueError("maps hold negative or non-finite values: expected finite ones of at least 0")
    return maps.reshape(len(maps), -1), masks.reshape(len(masks), -1).astype(float)


def judge_maps(finding: str, view: int, studies: Sequence[int], maps: np.ndarray, masks: np.ndarray) -> list[JudgedMap]:
    """Judge the maps of a finding over one view of N studies.

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
    """Scores of maps by finding and on average, with 95 % intervals of a bootstrap over studies.

    A study counts once for a finding, with the mean over its views. The macro average is over findings with at least
    `MINIMUM_STUDIES`. All findings are resampled together, because those of a study are correlated.

    Args:
        judged: the maps.
        studies: how many there are, including those without maps.
        resamples, seed: of the bootstrap.

    Returns:
        `findings`, by name, and `macro`, None if no finding has enough studies. Each has its `studies` (`macro` also
        its `findings`, a number) and under each of `MEASURES` the `value`, its interval (`low`, `high`) and under each
        of `CHANCES` its `level`, the `difference` from it, that difference's interval and `verdict`: "above", "below"
        or "at" the level, as the interval is above 0, below or around it. A finding of too few studies has no interval
        (None), and the verdict None. An interval of all hits, or of none, has no width.
    """
    maps = pd.DataFrame(judged, columns=JudgedMap._fields)
    for measure, chance in _DIFFERENCES:
        maps[measure, chance] = maps[measure] - maps[_level(measure, chance)]
    # (finding, study) x quantities
    means = maps.groupby(["finding", "study"])[_QUANTITIES].mean()
    counts = means.groupby("finding").size()
    names = [name for name in FINDINGS if name in counts]
    tables = {name: means.loc[name].reindex(range(studies)).to_numpy(float) for name in names}
    weights = np.concatenate(list(resample_weights(studies, resamples, seed)))
    values = {name: _weighted_mean(np.ones((1, studies)), table)[0] for name, table in tables.items()}
    enough = [name for name in names if counts[name] >= MINIMUM_STUDIES]
    drawn = {name: _weighted_mean(weights, tables[name]) for name in enough}
    findings = {name: {"studies": int(counts[name]), **_measured(values[name], drawn.get(name))} for name in names}
    if not enough:
        return {"findings": findings, "macro": None}
    macro = {
        "findings": len(enough),
        "studies": int((~np.isnan([tables[name][:, 0] for name in enough])).any(axis=0).sum()),
        **_measured(
            np.nanmean([values[name] for name in enough], axis=0), np.nanmean([drawn[name] for name in enough], axis=0)
        ),
    }
    return {"findings": findings, "macro": macro}


def _level(measure: str, chance: str) -> str:
    """The field of [`JudgedMap`] with a chance level."""
    return "uniform" if chance == "uniform" else f"{measure}_others"


_DIFFERENCES = [(measure, chance) for measure in MEASURES for chance in CHANCES]
_QUANTITIES = [*JudgedMap._fields[3:], *_DIFFERENCES]


def _weighted_mean(weights: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Means (R, Q) of a table (N, Q) over weightings (R, N), without NaN; NaN where only NaN has weight."""
    counts = weights @ ~np.isnan(table)
    return np.divide(weights @ np.nan_to_num(table), counts, out=np.full(counts.shape, np.nan), where=counts > 0)


def _measured(values: np.ndarray, drawn: np.ndarray | None) -> dict[str, Any]:
    """Of quantities (Q,) and their resamples (R, Q)."""
    value = dict(zip(_QUANTITIES, (None if np.isnan(one) else float(one) for one in values), strict=True))
    bounds = [(None, None)] * len(_QUANTITIES)
    if drawn is not None:
        bounds = np.nanquantile(drawn, [0.025, 0.975], axis=0).T.tolist()
    interval = {name: {"low": low, "high": high} for name, (low, high) in zip(_QUANTITIES, bounds, strict=True)}

    def against(measure: str, chance: str) -> dict[str, Any]:
        bounds = interval[measure, chance]
        return {
            "level": value[_level(measure, chance)],
            "difference": value[measure, chance],
            **bounds,
            "verdict": _verdict(**bounds),
        }

    return {
        measure: {
            "value": value[measure],
            **interval[measure],
            **{chance: against(measure, chance) for chance in CHANCES},
        }
        for measure in MEASURES
    }


def _verdict(low: float | None, high: float | None) -> str | None:
    if low is None:
        return None
    return "above" if low > _ROUNDING else "below" if high < -_ROUNDING else "at"


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
