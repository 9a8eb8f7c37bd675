"""Views and heatmaps as HTML that contains the pictures: Gradio's image components would write them to files."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from ...findings_otdrg import FINDING_DISPLAY_NAMES
from ...inference.heatmaps import draw_heatmaps
from .uploads import View


def preview(views: Sequence[View]) -> str:
    """The views of a study, each above its name and size; "" without views."""
    figures = []
    for view in views:
        data = io.BytesIO()
        view.image.save(data, "JPEG", quality=90)
        name, (width, height) = printable(view.name), view.size
        figures.append(_figure(data, "jpeg", name, f"{name}, {width} × {height}"))
    return f'<div class="views">{"".join(figures)}</div>' if figures else ""


def heatmap(views: Sequence[View], record: dict[str, Any], finding: str) -> str:
    """The transport plan of one finding over the views of a study; `record` is the pipeline's, with heatmaps."""
    data = io.BytesIO()
    draw_heatmaps([view.image for view in views], record["heatmaps"], record["findings"], data, names=[finding])
    found, name = record["findings"][finding], FINDING_DISPLAY_NAMES[finding]
    # Repeats the picture's title, which is small on a phone.
    caption = f"{name}: {found['state']}, p = {found['probability']:.2f}. Red: above a uniform plan; blue: below."
    return _figure(data, "png", f"Heatmap of {name}", caption)


def printable(text: str, length: int = 80) -> str:
    """Text of a visitor, shortened, without control characters and direction marks."""
    text = "".join(character if character.isprintable() else "�" for character in text)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _figure(data: io.BytesIO, form: str, alternative: str, caption: str) -> str:
    encoded = base64.b64encode(data.getvalue()).decode()
    image = f'<img src="data:image/{form};base64,{encoded}" alt="{escape(alternative)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
