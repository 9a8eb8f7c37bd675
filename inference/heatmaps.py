"""Draw the transport plan over the views of a study (paper, Figure 5)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from ..findings_otdrg import FINDING_DISPLAY_NAMES

#: The colour scale of every picture ranges from the uniform plan divided by this factor to its product with it.
LIFT_RANGE = 4.0

#: Maximum number of findings in a row beside a view.
_FINDINGS_A_ROW = 4
#: In inches: width and maximum height of a panel, heights of a title and of a line of text.
_PANEL, _TALLEST, _TITLE, _LINE = 2.8, 5.6, 0.5, 0.19


def upsample_lift(lift: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a map over the grid of image tokens (rows, columns) to a view's resolution (height, width), in float32.

    The grid covers the whole view, because the processor resizes views without cropping or padding. Values are
    interpolated bilinearly between the centres of the cells and constant beyond the outer ones, so that they stay
    within the range of the grid, and a uniform plan stays exactly 1.

    Args:
        lift: one view of an array in the pipeline's `heatmaps`.
        size: (height, width) of the view.
    """
    lift = np.asarray(lift, dtype=np.float32)
    if lift.ndim != 2:
        raise ValueError(f"lift has shape {lift.shape}: expected (rows, columns), those of one finding in one view")
    height, width = size
    resized = Image.fromarray(lift).resize((width, height), Image.Resampling.BILINEAR)
    # The weights of the interpolation add up to 1 except for rounding.
    return np.clip(np.asarray(resized), lift.min(), lift.max())


def draw_heatmaps(
    views: Sequence[Image.Image],
    heatmaps: dict[str, np.ndarray],
    findings: dict[str, dict],
    path: str | Path | BinaryIO,
    names: Sequence[str] | None = None,
    masks: dict[str, Sequence[np.ndarray]] | None = None,
    report: str | None = None,
) -> list[str]:
    """Write a PNG of a study's views, overlaid with the transport plan of some findings.

    The colour is the plan's mass as a multiple of the uniform plan's, on a fixed logarithmic scale from 1/4 to 4. Each
    title has the state that conditioned the report and the probability that the predictor gives to this state. A
    finding that `ot_labels="mentioned"` excludes from the plan has no colour and a note. Another note says whether all
    views share one plan.

    Args:
        views: the study's views, as [`read_view`] gives them.
        heatmaps: for each finding an array (views, rows, columns), as the pipeline returns with `return_heatmaps=True`.
        findings: for each finding its `state` and `probability`, as the pipeline returns.
        path: the PNG to write, or a file that is open for it.
        names: findings to draw; by default the positive and unclear ones, or No Finding if there are none.
        masks: true location of each finding, one boolean array per view, drawn as an outline.
        report: text above the views.

    Returns:
        The findings that were drawn.

    Raises:
        ValueError: a finding does not have one map per view.
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing heatmaps needs matplotlib: pip install 'otdrg[demo]'") from error

    if names is None:
        names = [name for name, finding in findings.items() if finding["state"] in ("positive", "unclear")]
        names = [name for name in names if name != "no_finding"] or ["no_finding"]
    for name in names:
        if len(heatmaps[name]) != len(views):
            raise ValueError(f"heatmaps of {name} have {len(heatmaps[name])} views: expected {len(views)}")
    notes = ["State: the state that conditioned the report. p: the label predictor's probability of this state."]
    if len(views) > 1 and all(
        np.array_equal(heatmap, heatmap[:1].repeat(len(views), 0)) for heatmap in heatmaps.values()
    ):
        notes.append("All views share one plan.")

    columns = 1 + min(len(names), _FINDINGS_A_ROW)
    lines = -(-len(names) // _FINDINGS_A_ROW)
    panel_heights = [_TITLE + min(_PANEL * view.height / view.width, _TALLEST) for view in views for _ in range(lines)]
    width = _PANEL * columns + 1.0
    text = textwrap.wrap(report, int(width * 12)) if report else []
    figure = Figure(
        figsize=(width, sum(panel_heights) + _LINE * (len(text) + 1) + 0.2),
        layout="constrained",
    )
    axes = figure.subplots(len(panel_heights), columns, squeeze=False, height_ratios=panel_heights)
    for axis in axes.flat:
        axis.set_axis_off()
    scale = ScalarMappable(LogNorm(1 / LIFT_RANGE, LIFT_RANGE), "coolwarm")
    for number, view in enumerate(views):
        block = axes[number * lines : (number + 1) * lines]
        pixels = np.asarray(view.convert("L"))
        block[0][0].imshow(pixels, cmap="gray", vmin=0, vmax=255)
        block[0][0].set_title(f"view {number + 1}", fontsize=9)
        for axis, name in zip(block[:, 1:].flat, names, strict=False):
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=255)
            state, probability = findings[name]["state"], findings[name]["probability"]
            known = "" if probability is None else f", p = {probability:.2f}"  # None where the state was not given
            axis.set_title(f"{FINDING_DISPLAY_NAMES[name]}\n{state}{known}", fontsize=9)
            if np.any(heatmaps[name]):
                lift = upsample_lift(heatmaps[name][number], pixels.shape)
                axis.imshow(np.clip(lift, 1 / LIFT_RANGE, LIFT_RANGE), cmap=scale.cmap, norm=scale.norm, alpha=0.45)
            else:
                axis.text(
                    *(0.5, 0.04, "not in the plan: no mass"),
                    transform=axis.transAxes,
                    ha="center",
                    fontsize=9,
                    color="white",
                    backgroundcolor="black",
                )
            if masks and masks.get(name) is not None and np.any(masks[name][number]):
                axis.contour(masks[name][number], levels=[0.5], colors="lime", linewidths=1.0)
    bar = figure.colorbar(scale, ax=axes, shrink=0.8, aspect=25, ticks=[1 / LIFT_RANGE, 0.5, 1, 2, LIFT_RANGE])
    bar.ax.set_yticklabels(["≤ 1/4", "1/2", "1", "2", "≥ 4"])
    bar.minorticks_off()
    bar.set_label("mass, times the uniform plan's", fontsize=9)
    if text:
        figure.suptitle("\n".join(text), fontsize=9, x=0.01, ha="left", parse_math=False)
    figure.supxlabel(" ".join(notes), fontsize=8, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    return list(names)
