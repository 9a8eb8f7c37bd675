"""The picture of image features before and after alignment (paper, Figure 1b)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..findings_otdrg import FINDING_DISPLAY_NAMES, FINDINGS

#: Colours that colour-blind readers can distinguish (Okabe and Ito, 2008). There are more findings than colours, so
#: shapes, one fewer than colours, vary as well: no two findings share both.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_SHAPES = ("o", "^", "s", "D", "v")
_STYLES = {name: (_COLOURS[i % len(_COLOURS)], _SHAPES[i % len(_SHAPES)]) for i, name in enumerate(FINDINGS[:-1])}
#: No Finding is grey.
_STYLES[FINDINGS[-1]] = ("#B0B0B0", "o")


def draw_embedding(
    before: np.ndarray,
    after: np.ndarray,
    labels: Mapping[str, np.ndarray],
    findings: Sequence[str],
    scores: Mapping[str, Any],
    path: str | Path,
) -> None:
    """Draw studies in the plane before and after alignment, with one colour and shape per finding.

    Args:
        before, after: (S, 2) places.
        labels: for each finding the place (2,) of its label feature in the second panel, drawn as a star.
        findings: S names.
        scores: of [`separation`], for the titles of the panels.
        path: the PNG to write.
    """
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = ("Before alignment: vision encoder", "After alignment: projected image tokens")
    groups = np.asarray(findings)
    present = [name for name in reversed(FINDINGS) if name in findings]
    for panel, title, name, places in zip(panels, titles, ("before", "after"), (before, after), strict=True):
        for finding in present:
            colour, shape = _STYLES[finding]
            panel.scatter(
                *places[groups == finding].T, s=26, c=colour, marker=shape, edgecolors="white", linewidths=0.4
            )
        panel.set_title(f"{title}\n{_score(scores[name])}", fontsize=11)
        _frame(panel)
    for finding, place in labels.items():
        colour, shape = _STYLES[finding]
        panels[1].scatter(*place, s=240, c=colour, marker="*", edgecolors="black", linewidths=0.9, zorder=3)
        panels[1].scatter(*place, s=14, c="white", marker=shape, zorder=4)
    handles = [_handle(finding, int((groups == finding).sum())) for finding in reversed(present)]
    if labels:
        style = {"marker": "*", "markersize": 13, "markerfacecolor": "white", "markeredgecolor": "black"}
        handles.append(Line2D([], [], linestyle="", label="label feature of a finding, positive", **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _score(score: Mapping[str, Any]) -> str:
    return f"silhouette {score['silhouette']:.3f} (95 % interval {score['low']:.3f} to {score['high']:.3f})"


def _frame(panel: Axes) -> None:
    panel.set_xticks([])
    panel.set_yticks([])
    panel.set_xlabel("t-SNE 1", fontsize=9)
    panel.set_ylabel("t-SNE 2", fontsize=9)
    panel.spines[:].set_color("#CCCCCC")
    panel.margins(0.06)


def _handle(finding: str, count: int) -> Line2D:
    colour, shape = _STYLES[finding]
    label = f"{FINDING_DISPLAY_NAMES[finding]} ({count})"
    return Line2D([], [], linestyle="", marker=shape, color=colour, markersize=7, label=label)


__all__ = ["draw_embedding"]
