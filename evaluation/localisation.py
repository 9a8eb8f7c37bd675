"""`otdrg localise`: the transport plans of a model over phantoms, judged on the phantoms' masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files_otdrg import write_json, write_text
from ..findings_otdrg import FINDING_DISPLAY_NAMES, FINDING_STATES, FINDINGS, POSITIVE
from ..inference.features import encode_batches
from ..inference.heatmaps import upsample_lift
from ..metrics.localisation import CHANCES, LARGEST_MASK, MEASURES, MINIMUM_STUDIES, JudgedMap, judge_maps
from ..metrics.tables import markdown_table, shown_bounds, shown_number
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from ..runtime.csv_files import write_csv
from ..runtime.shared_work import continue_alone, fixed_blocks, share_work
from ..studies.phantom import Phantom, PhantomSource, make_phantom


@dataclass
class FindingCounts:
    """How often a finding was judged.

    Args:
        positive: studies that have it.
        given_positive: of these, the studies whose plan was made for the state positive.
        judged: views whose map was judged.
        unseen: views left out because the mask is empty.
        covering: views left out because the mask covers most of the view.
        without_mass: judged maps that are 0 everywhere.
    """

    positive: int = 0
    given_positive: int = 0
    judged: int = 0
    unseen: int = 0
    covering: int = 0
    without_mass: int = 0


@dataclass
class JudgedPhantoms:
    """The judged `maps`, of `grid` x `grid` cells each, the phantoms' `ids`, the `states` (N, 14) of their plans, and
    `counts` by finding."""

    maps: list[JudgedMap]
    grid: int
    ids: list[str]
    states: np.ndarray
    counts: dict[str, FindingCounts]


def judge_phantoms(
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    source: PhantomSource,
    first: int,
    studies: int,
    findings: Sequence[str] = FINDINGS[:-1],
    predicted: bool = False,
    batch_size: int = 16,
    journal: Path | None = None,
) -> JudgedPhantoms:
    """Judge the map of each positive finding, in each view whose mask shows it.

    Every process of a distributed run must call this function. Each makes the plans of a share of the phantoms; the
    main one judges them, and the others end ([`continue_alone`]).

    Args:
        model, processor: as published.
        source: seed, image size and views of the phantoms.
        first: index of the first phantom.
        studies: how many.
        findings: names of `FINDINGS`, without No Finding, which has no place in the image.
        predicted: make the plans for predicted states instead of the true ones; the findings that are judged stay the
            truly positive ones.
        batch_size: studies in a batch.
        journal: `.jsonl` file of plans that are finished, of the same model and phantoms.

    Raises:
        ValueError: the model has no transport plan.
    """
    if not model.has_heatmaps:
        raise ValueError("OTDRGConfig.fiot=False: this model has no transport plan, and so no heatmap to judge")

    def make(place: int) -> Phantom:
        return make_phantom(source.seed, first + place, source.image_size, source.views)

    def plan(blocks: Sequence[Sequence[int]]) -> Iterator[list[dict[str, Any]]]:
        for block in blocks:
            phantoms = [make(place) for place in block]
            rows = [{"id": phantom.id, "images": phantom.images} for phantom in phantoms]
            ((_, *views),) = encode_batches(model, processor, rows, len(block))
            states, lifts = _transport(model, *views, None if predicted else phantoms)
            yield [
                {
                    "id": str(place),
                    "states": row.tolist(),
                    "grid": lift.shape[-1],
                    "lifts": {
                        name: lift[:, FINDINGS.index(name)].tolist() for name in findings if name in phantom.masks
                    },
                }
                for place, phantom, row, lift in zip(block, phantoms, states, lifts, strict=True)
            ]

    blocks = fixed_blocks(studies, batch_size)
    plans = share_work([str(place) for place in range(studies)], blocks, plan, journal, progress="phantoms")
    continue_alone()
    return _judge(plans, make, findings)


def _judge(
    plans: Mapping[str, Mapping[str, Any]], make: Callable[[int], Phantom], findings: Sequence[str]
) -> JudgedPhantoms:
    """Judge plans, the rows of a journal by the place of their phantom, which `make` gives."""
    counts = {finding: FindingCounts() for finding in findings}
    #: By finding and view: studies, lifts and masks.
    groups: dict[tuple[str, int], list[tuple[int, np.ndarray, np.ndarray]]] = {}
    ids: list[str] = []
    for row in plans.values():
        # Made again, because masks would fill the journal.
        phantom = make(int(row["id"]))
        for finding, lifts in row["lifts"].items():
            count = counts[finding]
            count.positive += 1
            count.given_positive += int(row["states"][FINDINGS.index(finding)] == POSITIVE)
            for view, mask in enumerate(phantom.masks[finding]):
                if not mask.any():
                    count.unseen += 1
                elif mask.mean() > LARGEST_MASK:
                    count.covering += 1
                else:
                    lift = np.array(lifts[view], dtype=np.float32)
                    count.judged += 1
                    count.without_mass += int(not lift.any())
                    groups.setdefault((finding, view), []).append((len(ids), lift, mask))
        ids.append(phantom.id)
    maps = []
    for (finding, view), group in sorted(groups.items(), key=lambda item: (FINDINGS.index(item[0][0]), item[0][1])):
        positions, grids, masks = zip(*group, strict=True)
        resampled = np.stack([upsample_lift(grid, masks[0].shape) for grid in grids])
        maps += judge_maps(finding, view, positions, resampled, np.stack(masks))
    states = np.array([row["states"] for row in plans.values()])
    return JudgedPhantoms(maps, plans["0"]["grid"], ids, states, counts)


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


# --- what is written -------------------------------------------------------------------------------------------------

#: Display names of the measures, chance levels and verdicts of `localisation_scores`.
_MEASURES = dict(zip(MEASURES, ("pointing game", "soft IoU"), strict=True))
_CHANCES = dict(zip(CHANCES, ("a uniform map", "other studies' maps"), strict=True))
_VERDICTS = {"above": "better than", "at": "no better than", "below": "worse than"}


def write_localisation(
    paths: Mapping[str, Path], settings: Mapping[str, Any], judged: JudgedPhantoms, scores: Mapping[str, Any]
) -> str:
    """Write the table (`.md`), the figures (`.json`), and one row per map (`.csv`).

    Args:
        paths: by suffix.
        settings: how the maps were made, for the JSON.
        judged: the maps.
        scores: of [`otdrg.metrics.localisation_scores`].

    Returns:
        The content of the `.md`.
    """
    counts = {name: asdict(count) for name, count in judged.counts.items()}
    verdicts = localisation_verdicts(scores)
    document = "\n\n".join(
        [_heading(settings), *verdicts, localisation_table(scores), _left_out(counts, bool(settings["states"]))]
    )
    write_text(paths[".md"], f"{document}\n")
    write_json(paths[".json"], {**settings, **scores, "counts": counts, "verdicts": verdicts})
    rows = (
        [
            judged.ids[study],
            finding,
            FINDING_STATES[judged.states[study, FINDINGS.index(finding)]],
            view + 1,
            *("" if np.isnan(value) else f"{value:.6f}" for value in values),
        ]
        for study, finding, view, *values in judged.maps
    )
    write_csv(paths[".csv"], ["id", "finding", "state", "view", *JudgedMap._fields[3:]], rows)
    return document


def _heading(settings: Mapping[str, Any]) -> str:
    shared = ", which share one plan" if len(settings["views"]) > 1 else ""
    grid, size = settings["image_grid"], settings["image_size"]
    plans = f"plans for {settings['states']} states" if settings["states"] else "plans of the label predictor"
    return (
        f"# Localisation of {settings['model']}\n\n"
        f"{settings['studies']} phantoms of the split {settings['split']} (seed {settings['seed']}), "
        f"{' and '.join(settings['views'])} views of {size} pixels{shared}; {plans}, "
        f"over {grid} x {grid} tokens, resampled bilinearly."
    )


def _left_out(counts: Mapping[str, Mapping[str, int]], by_state: bool) -> str:
    totals = {name: sum(count[name] for count in counts.values()) for name in asdict(FindingCounts())}
    given = (
        f"The plan was made for the state positive for {totals['given_positive']} of {totals['positive']} positive "
        "findings. "
    )
    judged = (
        f"{totals['judged']} masks were judged; left out were {totals['unseen']} views that do not show the finding "
        f"and {totals['covering']} whose mask covers more than half of the view. {totals['without_mass']} maps without "
        "any mass count as 0."
    )
    return given + judged if by_state else judged


def localisation_table(scores: Mapping[str, Any]) -> str:
    """One row per finding, and one for the average: both measures, their intervals and chance levels."""
    header = ["finding", "studies", "a uniform map"]
    for name in _MEASURES.values():
        header += [name, "95 % interval", "other studies' maps", "beats chance"]
    rows = {FINDING_DISPLAY_NAMES[finding]: row for finding, row in scores["findings"].items()}
    if scores["macro"] is not None:
        rows[f"macro, {scores['macro']['findings']} findings"] = scores["macro"]
    cells = []
    for name, row in rows.items():
        cells.append([name, str(row["studies"]), shown_number(row[MEASURES[0]]["uniform"]["level"])])
        for measure in MEASURES:
            score = row[measure]
            level = shown_number(score["others"]["level"])
            cells[-1] += [shown_number(score["value"]), shown_bounds(score), level, _beats(score)]
    return markdown_table(header, cells)


def localisation_verdicts(scores: Mapping[str, Any]) -> list[str]:
    """Whether maps beat chance, in words: a sentence for each measure, and one on single findings."""
    macro = scores["macro"]
    if macro is None:
        return [f"Too few studies to say whether the maps beat chance: no finding has {MINIMUM_STUDIES} of them."]
    words = {"yes": "beats chance", "no": "does not beat chance", "no, below it": "is below chance"}
    sentences = []
    for measure, name in _MEASURES.items():
        score = macro[measure]
        levels = " and ".join(
            f"{_VERDICTS[score[chance]['verdict']]} {shown} ({shown_number(score[chance]['level'])}; "
            f"difference {score[chance]['difference']:+.3f}, {shown_bounds(score[chance])})"
            for chance, shown in _CHANCES.items()
        )
        beats = words.get(_beats(score), "beats one of two chance levels")
        sentences.append(f"On average, the {name} {beats}: {score['value']:.3f}, {levels}.")
    findings = [row for row in scores["findings"].values() if row["studies"] >= MINIMUM_STUDIES]
    beaten = {name: sum(_beats(row[measure]) == "yes" for row in findings) for measure, name in _MEASURES.items()}
    counts = " and ".join(f"{count} beat both chance levels in the {name}" for name, count in beaten.items())
    return [
        *sentences,
        f"Of {len(findings)} findings with at least {MINIMUM_STUDIES} studies {counts}; of intervals at 95 %, one in "
        "forty lies above chance by luck.",
    ]


def _beats(score: Mapping[str, Any]) -> str:
    """Whether a score beats both chance levels, in a table's cell."""
    verdicts = {chance: score[chance]["verdict"] for chance in CHANCES}
    above = [_CHANCES[chance] for chance, verdict in verdicts.items() if verdict == "above"]
    if None in verdicts.values():
        return "too few studies"
    if len(above) == len(CHANCES):
        return "yes"
    if set(verdicts.values()) == {"below"}:
        return "no, below it"
    return f"only {above[0]}" if above else "no"


__all__ = [
    "FindingCounts",
    "JudgedPhantoms",
    "judge_phantoms",
    "localisation_table",
    "localisation_verdicts",
    "write_localisation",
]
