"""A model's transport plans over phantoms, whose masks say where each finding is, judged map by map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..findings_otdrg import FINDINGS, POSITIVE
from ..inference.features import encode_batches
from ..inference.heatmaps import upsample_lift
from ..metrics.localisation import LARGEST_MASK, JudgedMap, judge_maps
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from ..studies.phantom import Phantom, PhantomSource, make_phantom


@dataclass
class FindingCounts:
    """Of one finding, how many `positive` studies there are, in how many of them the plan is made for the state
    positive (`told_positive`); how many views of them are `judged`, and how many are left out because the mask is empty
    (`unseen`) or covers most of the view (`covering`); and how many of the judged maps have no mass (`without_mass`).
    """

    positive: int = 0
    told_positive: int = 0
    judged: int = 0
    unseen: int = 0
    covering: int = 0
    without_mass: int = 0


@dataclass
class JudgedPhantoms:
    """What [`judge_phantoms`] found: the maps, the phantoms' `ids`, the state ids (N, 14) that the plans are made for,
    and counts by finding."""

    maps: list[JudgedMap]
    ids: list[str]
    states: np.ndarray
    counts: dict[str, FindingCounts]


@dataclass
class _Group:
    """The positive studies of one finding, as far as one view shows it."""

    studies: list[int] = field(default_factory=list)
    maps: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)


def judge_phantoms(
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    source: PhantomSource,
    first: int,
    studies: int,
    findings: Sequence[str] = FINDINGS[:-1],
    predicted: bool = False,
    batch_size: int = 16,
) -> JudgedPhantoms:
    """Judge the map of each finding that is there, in each view whose mask shows it.

    Args:
        model, processor: as published.
        source: what the phantoms are like; its numbers of studies do not matter.
        first: index of the first phantom.
        studies: how many.
        findings: names out of `FINDINGS`, without No Finding, which is nowhere.
        predicted: make the plans for predicted states instead of the true ones. Judged are the findings that are there,
            whatever they are taken for.
        batch_size: studies a batch.

    Raises:
        ValueError: the model has no transport plan.
    """
    if not model.config.fiot:
        raise ValueError("OTDRGConfig.fiot=False: this model has no transport plan, and so no heatmap to judge")
    phantoms = (make_phantom(source.seed, first + place, source.image_size, source.views) for place in range(studies))
    made = ({"id": phantom.id, "images": phantom.images, "phantom": phantom} for phantom in phantoms)
    counts = {finding: FindingCounts() for finding in findings}
    groups: dict[tuple[str, int], _Group] = {}
    ids: list[str] = []
    told = []
    for rows, view_features, view_mask in encode_batches(model, processor, made, batch_size):
        batch = [row["phantom"] for row in rows]
        states, lifts = _transport(model, view_features, view_mask, None if predicted else batch)
        for phantom, row, lift in zip(batch, states, lifts, strict=True):
            for finding in counts.keys() & phantom.masks.keys():
                column = FINDINGS.index(finding)
                counts[finding].positive += 1
                counts[finding].told_positive += int(row[column] == POSITIVE)
                for view, mask in enumerate(phantom.masks[finding]):
                    if not mask.any():
                        counts[finding].unseen += 1
                    elif mask.mean() > LARGEST_MASK:
                        counts[finding].covering += 1
                    else:
                        counts[finding].judged += 1
                        counts[finding].without_mass += int(not lift[view, column].any())
                        group = groups.setdefault((finding, view), _Group())
                        group.studies.append(len(ids))
                        group.maps.append(lift[view, column])
                        group.masks.append(mask)
            ids.append(phantom.id)
        told.append(states)
    maps = []
    for (finding, view), group in sorted(groups.items(), key=lambda item: (FINDINGS.index(item[0][0]), item[0][1])):
        resampled = np.stack([upsample_lift(grid, group.masks[0].shape) for grid in group.maps])
        maps += judge_maps(finding, view, group.studies, resampled, np.stack(group.masks))
    return JudgedPhantoms(maps, ids, np.concatenate(told), counts)


@torch.no_grad()
def _transport(
    model: OTDRGForReportGeneration,
    view_features: torch.Tensor,
    view_mask: torch.Tensor,
    phantoms: list[Phantom] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """States (B, 14), true ones if phantoms are given, and the plans' lifts over each view's grid."""
    if phantoms is None:
        states = model.read_study(view_features=view_features, view_mask=view_mask).finding_states
    else:
        states = torch.from_numpy(np.stack([phantom.states for phantom in phantoms])).to(model.device)
    lifts = model.transport_lift(view_features, view_mask, states)
    return states.cpu().numpy(), lifts.float().cpu().numpy()


__all__ = ["FindingCounts", "JudgedPhantoms", "judge_phantoms"]
