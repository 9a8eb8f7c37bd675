"""The course of a stage: its log lines as they come, and a picture of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from ..files_otdrg import write_text

logger = logging.getLogger(__name__)

#: One JSON object a log line, in a stage's folder.
METRICS = "metrics.jsonl"
CURVES = "curves.png"

#: Endings of what stands in log lines and says nothing of the course: how fast it went, where it is, its mean.
_NOT_DRAWN = ("runtime", "per_second", "total_flos", "train_loss", "epoch", "step")
_COLUMNS = 4
#: Above this many points a running mean is drawn through them.
_MANY_POINTS = 60


class HistoryCallback(TrainerCallback):
    """Keeps `metrics.jsonl` in the stage's folder, and draws `curves.png` at its end; the main process alone.

    A stage that goes on from a checkpoint keeps the lines up to it.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            path = Path(args.output_dir) / METRICS
            write_text(path, "".join(map(_line, state.log_history)))

    def on_log(self, args, state, control, logs=None, **kwargs):
        # Logged before training begins, by an evaluation of its own, nothing is part of the course.
        if state.is_world_process_zero and (Path(args.output_dir) / METRICS).is_file():
            with (Path(args.output_dir) / METRICS).open("a", encoding="utf-8") as file:
                file.write(_line(state.log_history[-1]))

    def on_train_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        try:
            draw_curves(state.log_history, Path(args.output_dir) / CURVES, Path(args.output_dir).name)
        except ImportError as error:
            logger.info("%s is not drawn: %s", CURVES, error)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def draw_curves(log_history: list[dict[str, Any]], path: Path, title: str) -> list[str]:
    """Write a PNG with a panel for each logged figure against steps: losses first, then metrics, then the rest.

    Args:
        log_history: the Trainer's: records with `step`; `eval_` marks figures of validation.
        path: the PNG to write; nothing is written where nothing was logged.
        title: what stands above the panels.

    Returns:
        The names of the figures drawn, `eval_` left off.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing curves needs matplotlib: pip install 'otdrg[demo]'") from error
    from matplotlib.ticker import MaxNLocator

    training, validation = _series(log_history, False), _series(log_history, True)
    names = sorted({**training, **validation}, key=lambda name: _rank(name, name in training))
    if not names:
        return []
    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    width, height = 3.4 * columns, 2.3 * rows + 0.6
    figure = Figure(figsize=(width, height))
    # Set by hand, in inches: a layout that is solved for takes as long as all the rest.
    figure.subplots_adjust(
        left=0.6 / width, right=1 - 0.15 / width, top=1 - 0.75 / height, bottom=0.5 / height, wspace=0.26, hspace=0.45
    )
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    shown: dict[str, Any] = {}
    for panel, name in zip(panels, names, strict=False):
        if name in training:
            steps, values = training[name]
            many = len(values) > _MANY_POINTS
            (line,) = panel.plot(steps, values, color="#4477aa", linewidth=1.0, alpha=0.35 if many else 1.0)
            if many:
                (line,) = panel.plot(steps, _running_mean(values), color="#4477aa", linewidth=1.6)
            shown["training"] = line
        if name in validation:
            (line,) = panel.plot(*validation[name], color="#cc6633", marker="o", markersize=3.5, linewidth=1.4)
            shown["validation"] = line
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.ticklabel_format(axis="y", scilimits=(-3, 4), useOffset=False)
        panel.yaxis.get_offset_text().set_fontsize(7)
        panel.set_xlim(0, max(1, log_history[-1]["step"]))
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(names) - columns) : len(names)]:
        panel.set_xlabel("step", fontsize=8)
    figure.text(0.15 / width, 1 - 0.15 / height, title, fontsize=12, verticalalignment="top")
    figure.legend(shown.values(), shown.keys(), loc="upper right", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    return names


def _series(log_history: list[dict[str, Any]], of_validation: bool) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each figure."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for record in log_history:
        for key, value in record.items():
            name = key.removeprefix("eval_")
            unwanted = name.endswith(_NOT_DRAWN) or not isinstance(value, (int, float))
            if (name != key) != of_validation or unwanted:
                continue
            steps, values = series.setdefault(name, ([], []))
            steps.append(record["step"])
            values.append(float(value))
    return series


def _rank(name: str, is_trained_on: bool) -> tuple[int, str]:
    if name == "loss" or name.endswith("_loss"):
        return (0 if name == "loss" else 1), name
    if not is_trained_on:
        return 2, name
    return (4 if name in ("grad_norm", "learning_rate") else 3), name


def _running_mean(values: list[float]) -> np.ndarray:
    """The mean over a thirtieth of all values around each."""
    window = np.ones(2 * max(1, len(values) // 60) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


__all__ = ["CURVES", "METRICS", "HistoryCallback", "draw_curves"]
