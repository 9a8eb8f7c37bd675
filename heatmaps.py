"""Drawing of transport plans over the views of a study (paper, Figure 5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .findings_otdrg import FINDING_DISPLAY_NAMES

#: The colour scale spans this factor below and above the uniform plan, in every picture.
LIFT_RANGE = 4.0


def draw_heatmaps(
    views: Sequence[Image.Image],
    heatmaps: dict[str, np.ndarray],
    findings: dict[str, dict],
    path: str | Path,
    names: Sequence[str] | None = None,
    masks: dict[str, Sequence[np.ndarray]] | None = None,
) -> list[str]:
    """Write a PNG of a study's views with the transport plan of some findings laid over them.

    The colour is the plan's mass as a multiple of the uniform plan's, on one fixed logarithmic scale from 1/4 to 4, so
    that a uniform plan looks uniform; each title has the finding's state and probability.

    Args:
        views: the study's views.
        heatmaps: for each finding an array (views, rows, columns), as the pipeline returns with `return_heatmaps=True`.
        findings: for each finding its `state` and `probability`, as the pipeline returns.
        path: the PNG to write.
        names: findings to draw; the positive and unclear ones without it, or the likeliest where there are none.
        masks: for each finding where it truly is, one boolean array a view, drawn as an outline.

    Returns:
        The findings that were drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing heatmaps needs matplotlib: pip install 'otdrg[demo]'") from error
    from matplotlib.colors import LogNorm

    if names is None:
        names = [name for name, finding in findings.items() if finding["state"] in ("positive", "unclear")]
        names = [name for name in names if name != "no_finding"] or ["no_finding"]
    columns = 1 + len(names)
    figure = Figure(figsize=(3.0 * columns + 0.9, 3.4 * len(views)), layout="constrained")
    axes = figure.subplots(len(views), columns, squeeze=False)
    for row, view in enumerate(views):
        pixels = np.asarray(view.convert("L"))
        extent = (0, view.width, view.height, 0)
        axes[row][0].imshow(pixels, cmap="gray", extent=extent)
        axes[row][0].set_title(f"view {row + 1}")
        for column, name in enumerate(names, start=1):
            axis, lift = axes[row][column], np.asarray(heatmaps[name][row], dtype=float)
            axis.imshow(pixels, cmap="gray", extent=extent)
            image = axis.imshow(
                np.clip(lift, 1 / LIFT_RANGE, LIFT_RANGE),
                cmap="coolwarm",
                norm=LogNorm(1 / LIFT_RANGE, LIFT_RANGE),
                alpha=0.45,
                extent=extent,
                interpolation="bilinear",
            )
            if masks and masks.get(name) is not None and np.any(masks[name][row]):
                axis.contour(
                    masks[name][row], levels=[0.5], colors="lime", linewidths=1.0, extent=extent, origin="upper"
                )
            state, probability = findings[name]["state"], findings[name]["probability"]
            axis.set_title(f"{FINDING_DISPLAY_NAMES[name]}\n{state}, p = {probability:.2f}", fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[1 / LIFT_RANGE, 0.5, 1, 2, LIFT_RANGE])
    bar.ax.set_yticklabels(["≤ 1/4", "1/2", "1", "2", "≥ 4"])
    bar.minorticks_off()
    bar.set_label("mass, times the uniform plan's", fontsize=9)
    figure.savefig(path, dpi=110)
    return list(names)


__all__ = ["LIFT_RANGE", "draw_heatmaps"]
