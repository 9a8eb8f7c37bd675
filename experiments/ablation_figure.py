"""Pictures of an ablation: Table 3 as bars, Table 4 and Figure 4 as lines over epsilon and over iterations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .ablation_report import COLUMNS

#: What is drawn: two clinical scores and two of fluency, all from 0 to 1. Colours that the colour-blind tell apart.
_DRAWN = {
    "example_f1_14_uncertain_negative": "#0072B2",
    "macro_f1_13_uncertain_negative": "#D55E00",
    "bleu_4": "#009E73",
    "rouge_l": "#7A7A7A",
}
_LABELS = {**{column: COLUMNS[column] for column in _DRAWN}, "example_f1_14_uncertain_negative": "CE F1"}

_TITLES = {
    "modules": "Modules (Table 3)",
    "epsilon": "Epsilon (Table 4)",
    "iterations": "Sinkhorn iterations (Figure 4)",
}


def draw_ablation(summary: dict[str, Any], path: str | Path) -> None:
    """Write a PNG of a summary's tables: means over seeds, with bars of one standard deviation.

    Dotted lines are the best constant report's scores, in the columns that have one.

    Args:
        summary: of [`summarize`].
        path: the PNG to write.
    """
    tables = summary["tables"]
    widths = [1.5 if name == "modules" else 1.0 for name in tables]
    figure = Figure(figsize=(4.2 * sum(widths), 4.4), layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False, width_ratios=widths, sharey=True)[0]
    for panel, (name, table) in zip(panels, tables.items(), strict=True):
        rows = [row for row in table["rows"] if row["scores"]]
        if name == "modules":
            _draw_bars(panel, rows)
        else:
            _draw_lines(panel, rows, name)
        for column, color in _DRAWN.items():
            constant = table["controls"]["constant"].get(column)
            if constant is not None:
                panel.axhline(constant["mean"], color=color, linestyle=":", linewidth=1.2, zorder=0)
        panel.set_title(_TITLES[name], fontsize=11)
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", color="#E5E5E5", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("score")
    by_label = {}
    for panel in panels:
        by_label |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    if any(table["controls"]["constant"] for table in tables.values()):
        by_label["best constant report"] = panels[0].plot([], [], color="#404040", linestyle=":")[0]
    # A single panel is too narrow for one line of all labels.
    columns = len(by_label) if len(tables) > 1 else 3
    figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=150)


def _draw_bars(panel: Axes, rows: list[dict[str, Any]]) -> None:
    width = 0.8 / len(_DRAWN)
    places = np.arange(len(rows))
    for position, (column, color) in enumerate(_DRAWN.items()):
        having = [(place, row["scores"][column]) for place, row in zip(places, rows, strict=True) if _has(row, column)]
        if not having:
            continue
        at, scores = zip(*having, strict=True)
        panel.bar(
            np.array(at) + (position - (len(_DRAWN) - 1) / 2) * width,
            [score["mean"] for score in scores],
            width * 0.92,
            yerr=[score["sd"] or 0.0 for score in scores],
            error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#303030"},
            color=color,
            label=_LABELS[column],
        )
    panel.set_xticks(places, [row["label"].replace(" + ", " +\n") for row in rows])


def _draw_lines(panel: Axes, rows: list[dict[str, Any]], name: str) -> None:
    values = [row["value"] for row in rows]
    for column, color in _DRAWN.items():
        having = [row for row in rows if _has(row, column)]
        if not having:
            continue
        scores = [row["scores"][column] for row in having]
        panel.errorbar(
            [row["value"] for row in having],
            [score["mean"] for score in scores],
            yerr=[score["sd"] or 0.0 for score in scores],
            color=color,
            marker="o",
            markersize=4,
            capsize=2,
            label=_LABELS[column],
        )
    panel.set_xscale("log")
    panel.set_xticks(values, [f"{value:g}" for value in values])
    panel.minorticks_off()
    panel.set_xlabel("ε" if name == "epsilon" else "iterations")


def _has(row: dict[str, Any], column: str) -> bool:
    return column in row["scores"]


__all__ = ["draw_ablation"]
