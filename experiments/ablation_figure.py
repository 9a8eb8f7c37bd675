"""Pictures of an ablation: Table 3 as bars, Table 4 and Figure 4 as lines over epsilon and over iterations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: Two clinical scores and two of fluency, all from 0 to 1, in colours that colour-blind readers can distinguish.
_DRAWN = {
    "example_f1_14_uncertain_negative": ("CE F1", "#0072B2"),
    "macro_f1_13_uncertain_negative": ("macro-F1 (13)", "#D55E00"),
    "bleu_4": ("BLEU-4", "#009E73"),
    "rouge_l": ("ROUGE-L", "#7A7A7A"),
}

_TITLES = {
    "modules": "Modules (Table 3)",
    "epsilon": "Epsilon (Table 4)",
    "iterations": "Sinkhorn iterations (Figure 4)",
}


def draw_ablation(summary: dict[str, Any], path: str | Path) -> None:
    """Draw the tables of a summary as a PNG: means over seeds, with error bars of one standard deviation.

    Dotted lines are the scores of the best constant report.
    """
    tables = summary["tables"]
    widths = [1.5 if name == "modules" else 1.0 for name in tables]
    figure = Figure(figsize=(4.2 * sum(widths), 4.4), layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False, width_ratios=widths, sharey=True)[0]
    for panel, (name, table) in zip(panels, tables.items(), strict=True):
        _draw_table(panel, name, table)
    panels[0].set_ylabel("score")
    by_label = {}
    for panel in panels:
        by_label |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    if any(table["controls"]["constant"] for table in tables.values()):
        by_label["best constant report"] = panels[0].plot([], [], color="#404040", linestyle=":")[0]
    # A single panel is too narrow for all labels on one line.
    columns = len(by_label) if len(tables) > 1 else 3
    figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=150)


def _draw_table(panel: Axes, name: str, table: dict[str, Any]) -> None:
    rows = [row for row in table["rows"] if row["scores"]]
    places = np.arange(len(rows)) if name == "modules" else np.array([row["value"] for row in rows])
    width = 0.8 / len(_DRAWN)
    for position, (column, (label, color)) in enumerate(_DRAWN.items()):
        having = [place for place, row in enumerate(rows) if column in row["scores"]]
        means = [rows[place]["scores"][column]["mean"] for place in having]
        deviations = [rows[place]["scores"][column]["sd"] or 0.0 for place in having]
        style = {"yerr": deviations, "color": color, "label": label}
        if having and name == "modules":
            bars = {"elinewidth": 1, "capsize": 2, "ecolor": "#303030"}
            shifted = places[having] + (position - (len(_DRAWN) - 1) / 2) * width
            panel.bar(shifted, means, width * 0.92, error_kw=bars, **style)
        elif having:
            panel.errorbar(places[having], means, marker="o", markersize=4, capsize=2, **style)
        constant = table["controls"]["constant"].get(column)
        if constant is not None:
            panel.axhline(constant["mean"], color=color, linestyle=":", linewidth=1.2, zorder=0)
    if name == "modules":
        panel.set_xticks(places, [row["label"].replace(" + ", " +\n") for row in rows])
    else:
        panel.set_xscale("log")
        panel.set_xticks(places, [f"{value:g}" for value in places])
        panel.minorticks_off()
        panel.set_xlabel("ε" if name == "epsilon" else "iterations")
    panel.set_title(_TITLES[name], fontsize=11)
    panel.set_ylim(bottom=0)
    panel.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
