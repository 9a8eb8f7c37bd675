"""A picture of the course of a stage: one panel for each logged figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CURVES = "curves.png"

#: Endings of logged values that do not describe the course.
_NOT_DRAWN = ("runtime", "per_second", "total_flos", "train_loss", "epoch", "step")
_COLUMNS = 4

#: Steps and values of a figure.
Series = dict[str, tuple[list[int], list[float]]]


def draw_curves(log_history: list[dict[str, Any]], path: Path, title: str) -> list[str]:
    """Write a PNG with a panel for each logged figure against steps: losses first, then metrics, then the rest.

    Args:
        log_history: the Trainer's: records with `step`; the prefix `eval_` marks figures of validation.
        path: the PNG to write; nothing is written if nothing was logged.
        title: the title above the panels.

    Returns:
        The names of the figures drawn, without `eval_`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing curves needs matplotlib: pip install 'otdrg[demo]'") from error

    training, validation = _series(log_history, ""), _series(log_history, "eval_")
    names = sorted({**training, **validation}, key=lambda name: _rank(name, name in training))
    if not names:
        return []
    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    width, height = 3.4 * columns, 2.3 * rows + 0.6
    figure = Figure(figsize=(width, height))
    # Margins in inches; an automatic layout takes as long as all the rest.
    margins = {"left": 0.6 / width, "right": 1 - 0.15 / width, "top": 1 - 0.75 / height, "bottom": 0.5 / height}
    figure.subplots_adjust(**margins, wspace=0.26, hspace=0.45)
    lines: dict[str, Any] = {}
    for place, name in enumerate(names):
        panel = figure.add_subplot(rows, columns, place + 1)
        if name in training:
            (lines["training"],) = panel.plot(*training[name], color="#4477aa", linewidth=1.0)
        if name in validation:
            (lines["validation"],) = panel.plot(*validation[name], color="#cc6633", marker="o", markersize=3.5)
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.ticklabel_format(axis="y", scilimits=(-3, 4), useOffset=False)
        panel.set_xlim(0, max(1, log_history[-1]["step"]))
        if place >= len(names) - columns:
            panel.set_xlabel("step", fontsize=8)
    figure.text(0.15 / width, 1 - 0.15 / height, title, fontsize=12, verticalalignment="top")
    figure.legend(lines.values(), lines.keys(), loc="upper right", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    return names


def _series(log_history: list[dict[str, Any]], prefix: str) -> Series:
    """Steps and values of each figure of training ("") or validation ("eval_")."""
    series: Series = {}
    for record in log_history:
        for key, value in record.items():
            name = key.removeprefix("eval_")
            if key == prefix + name and not name.endswith(_NOT_DRAWN) and isinstance(value, (int, float)):
                steps, values = series.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(float(value))
    return series


def _rank(name: str, is_of_training: bool) -> tuple[int, str]:
    if name == "loss" or name.endswith("_loss"):
        return (0 if name == "loss" else 1), name
    if not is_of_training:
        return 2, name
    return (4 if name in ("grad_norm", "learning_rate") else 3), name


__all__ = ["CURVES", "draw_curves"]
