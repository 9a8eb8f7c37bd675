"""How the time of a training step grows with the batch, the report, the views and the image tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from measure import Line, Row, in_turns
from otdrg import OTDRGProcessor

from . import models
from .training_step import step_of

TITLE = "Scaling"
ABOUT = (
    "CPU time of a step of the preset `small` (bfloat16 autocast, views encoded) with 4 studies of one view, 49 "
    "image tokens and reports of 60 tokens, where one of these is varied. The exponent is the slope of log time "
    "over log size, by least squares on the medians: 1 is linear, and below 1 a part of the step does not depend "
    "on the size."
)
NOTES: tuple[str, ...] = ()
#: Name of an axis, its sizes, and the targets of its exponent.
AXES = {
    "batch size": (1, 2, 4, 8, 16, 32),
    "report tokens": (25, 50, 100, 200),
    "views": (1, 2, 3, 4),
    "image tokens": (16, 49, 121, 256),
}


def measure(rounds: int, folder: Path) -> Row:
    vision, text = models.backbones(folder)
    model, processor = models.small_model(vision, text)
    processors = {49: processor}
    lines, medians = [], {}
    for axis, sizes in AXES.items():
        steps = {str(size): step(model, processors, axis, size, vision, text) for size in sizes}
        seconds = in_turns(steps, min(rounds, 2))
        medians[axis] = [float(np.median(seconds[str(size)])) for size in sizes]
        per_round = [exponent(sizes, times) for times in zip(*seconds.values(), strict=True)]
        lines.append(Line(f"{axis} {sizes[0]} to {sizes[-1]}", "exponent", per_round, "≤ 1.1"))
    plot(medians, Path(__file__).parents[1] / "scaling.png")
    return Row(lines, ["![Time of a step over each size](scaling.png)", *NOTES])


def step(model, processors: dict[int, OTDRGProcessor], axis: str, size: int, vision: str, text: str) -> Callable:
    """A function that makes a step with one size varied."""
    tokens = size if axis == "image tokens" else 49
    sizes = {"batch_size": 4} | {axis.replace(" ", "_"): size} if axis in ("batch size", "report tokens") else {}
    sizes = {"batch_size": 4, **sizes}

    def loss():
        model.config.image_tokens = tokens
        return model(**model.expand_finding_text(**batch)).loss

    if tokens not in processors:
        model.config.image_tokens = tokens
        processors[tokens] = OTDRGProcessor.from_backbones(vision=vision, text=text, config=model.config)
    views = size if axis == "views" else 1
    batch = models.small_batch(processors[tokens], model.config.placeholder_token_ids[0], views, **sizes)
    return step_of(model, loss)


def exponent(sizes: tuple[int, ...], seconds) -> float:
    """The slope of log seconds over log size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def plot(medians: dict[str, list[float]], path: Path) -> None:
    """Draw the time of a step over each size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, (axis, sizes) in zip(figure.subplots(1, len(AXES), sharey=True), AXES.items(), strict=True):
        axes.loglog(sizes, medians[axis], "o-", color="tab:blue")
        linear = medians[axis][-1] / sizes[-1]
        axes.loglog(sizes, [linear * size for size in sizes], "--", color="tab:gray", linewidth=1, label="linear")
        axes.set_xlabel(axis)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("CPU seconds a step")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
