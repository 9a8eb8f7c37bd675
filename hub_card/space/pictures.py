"""Views and heatmaps as HTML that holds its pictures itself, so that no picture of a study is ever a file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from ...findings_otdrg import FINDING_DISPLAY_NAMES
from ...inference.heatmaps import draw_heatmaps
from .uploads import View

#: Longest name that is shown, in characters.
_NAME = 80


def preview(views: Sequence[View]) -> str:
    """The views of a study as they were read, each above its name."""
    figures = []
    for view in views:
        data = io.BytesIO()
        view.image.save(data, "JPEG", quality=90)
        name, (width, height) = printable(view.name), view.size
        caption = escape(f"{name}, {width} × {height}")
        figures.append(f"<figure>{_picture(data, 'jpeg', name)}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="views">{"".join(figures)}</div>' if figures else ""


def heatmap(views: Sequence[View], record: dict[str, Any], finding: str) -> str:
    """The transport plan of one finding over the views of a study.

    Args:
        views: the study's.
        record: the pipeline's, with `heatmaps` and `findings`.
        finding: one of the 14.

    Raises:
        ImportError: matplotlib is not installed.
    """
    data = io.BytesIO()
    images = [view.image for view in views]
    draw_heatmaps(images, record["heatmaps"], record["findings"], data, names=[finding])
    found, name = record["findings"][finding], FINDING_DISPLAY_NAMES[finding]
    # On a phone the picture's own words are small.
    caption = (
        f"{name}: {found['state']}, p = {found['probability']:.2f}. Red is more than a uniform plan, blue is less."
    )
    return f"<figure>{_picture(data, 'png', f'Heatmap of {name}')}<figcaption>{caption}</figcaption></figure>"


def printable(text: str, length: int = _NAME) -> str:
    """Text of a visitor's, on one line: without control characters and marks that turn its direction, and cut."""
    text = "".join(character if character.isprintable() else "�" for character in text)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _picture(data: io.BytesIO, form: str, alternative: str) -> str:
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/{form};base64,{encoded}" alt="{escape(alternative)}">'


__all__ = ["heatmap", "preview", "printable"]
