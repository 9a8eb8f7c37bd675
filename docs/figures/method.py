"""Draw `docs/images/method.png`, the picture of the method in the README: `python docs/figures/method.py`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from otdrg.studies.phantom import make_phantom

OUTPUT = Path(__file__).resolve().parents[1] / "images" / "method.png"

INK = "#22303c"
FROZEN, TRAINED, TOKENS, LOSS = "#e8edf2", "#d6e6f7", "#fdf0d5", "#f9dfe0"


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str, size: float = 10) -> None:
    """A rounded box with its text in the middle; `x`, `y` is the lower left corner."""
    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", facecolor=color, edgecolor=INK, lw=1.1
        )
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(axes: Axes, *points: tuple[float, float], style: str = "-|>") -> None:
    """An arrow along straight lines through these points."""
    for start, end in pairwise(points[:-1]):
        axes.plot(*zip(start, end, strict=True), color=INK, lw=1.3, solid_capstyle="round", zorder=0.5)
    head = FancyArrowPatch(
        points[-2], points[-1], arrowstyle=style, mutation_scale=13, color=INK, lw=1.3, shrinkA=0, shrinkB=0
    )
    axes.add_patch(head)


def draw(axes: Axes) -> None:
    """The model from the views on the left to the report on the right."""
    study = make_phantom(0, 1, 224, ("frontal", "lateral"), ["positive" if i == 9 else "negative" for i in range(13)])
    for number, view in enumerate(study.images):
        left, top = 0.1 + 0.28 * number, 4.35 - 0.28 * number
        axes.imshow(
            np.asarray(view.convert("L")), cmap="gray", extent=(left, left + 1.55, top - 1.55, top), zorder=2 + number
        )
    axes.text(1.0, 2.2, "views of one study", ha="center", fontsize=9.5, color=INK)

    box(axes, 2.45, 2.85, 1.55, 1.2, "vision encoder\n(Swin, DINOv2 …)", FROZEN)
    arrow(axes, (2.0, 3.45), (2.45, 3.45))
    axes.text(3.22, 4.3, "1  contrastive\npre-training (IRCP)", ha="center", fontsize=9, color="#9b2c3a")

    box(axes, 4.75, 4.35, 1.65, 0.95, "label predictor\n14 × 4, focal loss", TRAINED)
    box(axes, 4.75, 2.85, 1.65, 0.95, "linear projection\n→ image tokens", TRAINED)
    arrow(axes, (4.0, 3.65), (4.38, 3.65), (4.38, 4.83), (4.75, 4.83))
    arrow(axes, (4.0, 3.32), (4.75, 3.32))
    axes.text(5.58, 5.5, "2  finding states", ha="center", fontsize=9, color="#9b2c3a")

    box(axes, 7.05, 4.35, 1.85, 0.95, "label encoder,\nprojection\n→ 14 label tokens", TRAINED, 9.5)
    arrow(axes, (6.4, 4.83), (7.05, 4.83))
    box(axes, 7.05, 2.85, 1.85, 0.95, "Sinkhorn\n$\\min_T \\langle T, C\\rangle - \\epsilon\\,h(T)$", LOSS)
    arrow(axes, (6.4, 3.32), (7.05, 3.32))
    arrow(axes, (7.98, 4.35), (7.98, 3.8), style="<|-|>")
    axes.text(
        8.02,
        2.58,
        "3  alignment by optimal\ntransport (FIOT): loss $L_{OT}$",
        ha="center",
        va="top",
        fontsize=9,
        color="#9b2c3a",
    )

    # What the LLM reads, in order.
    left = 2.3
    for text, width, color in (
        ("image tokens", 1.9, TOKENS),
        ("label tokens", 1.9, TOKENS),
        ("label text", 1.7, TOKENS),
        ("instruction", 1.7, FROZEN),
    ):
        box(axes, left, 0.55, width - 0.08, 0.6, text, color, 9.5)
        left += width
    axes.text(2.2, 0.85, "prompt", ha="right", va="center", fontsize=9.5, color=INK)
    arrow(axes, (5.58, 2.85), (5.58, 1.5), (3.2, 1.5), (3.2, 1.15))
    arrow(axes, (8.9, 4.83), (9.25, 4.83), (9.25, 1.75), (5.1, 1.75), (5.1, 1.15))
    arrow(axes, (5.1, 1.75), (6.9, 1.75), (6.9, 1.15))
    box(axes, 10.05, 0.4, 1.7, 0.9, "LLM + LoRA", TRAINED, 11)
    arrow(axes, (left - 0.08, 0.85), (10.05, 0.85))
    box(
        axes,
        9.75,
        2.55,
        2.3,
        1.75,
        "“The heart is normal in\nsize. There is a small\nleft pleural effusion.\nNo pneumothorax.”",
        "white",
        9.5,
    )
    arrow(axes, (10.9, 1.3), (10.9, 2.55))
    axes.text(10.9, 4.5, "report", ha="center", fontsize=9.5, color=INK)
    axes.text(10.9, 0.3, "4  $L = L_{RG} + \\lambda\\,L_{OT}$", ha="center", va="top", fontsize=9, color="#9b2c3a")
    axes.set(xlim=(0, 12.2), ylim=(-0.15, 5.85))
    axes.axis("off")
    axes.set_aspect("equal")


def main() -> None:
    """Write the picture."""
    figure = Figure(figsize=(12.2, 6.0))
    draw(figure.add_axes((0, 0, 1, 1)))
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUTPUT, dpi=100, facecolor="white")


if __name__ == "__main__":
    main()
