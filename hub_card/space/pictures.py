"""Views and heatmaps as HTML that holds its pictures itself, so that no picture of a study is ever a file."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from ...findings_otdrg import FINDING_DISPLAY_NAMES
from ...heatmaps import draw_heatmaps

#: Longest side of a view in the page, in pixels.
_PREVIEW_SIDE = 480


def preview(names: Sequence[str], views: Sequence[Image.Image]) -> str:
    """The views of a study as they were read, each above its name."""
    figures = []
    for name, view in zip(names, views, strict=True):
        small = view.copy()
        small.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
        data = io.BytesIO()
        small.save(data, "JPEG", quality=90)
        caption = f"{name}, {view.width} × {view.height}"
        figures.append(
            f"<figure>{_picture(data.getvalue(), 'jpeg', name)}<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return f'<div class="views">{"".join(figures)}</div>' if figures else ""


def heatmap(views: Sequence[Image.Image], record: dict[str, Any], finding: str) -> str:
    """The transport plan of one finding over the views of a study.

    Args:
        views: the study's.
        record: the pipeline's, with `heatmaps` and `findings`.
        finding: one of the 14.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "heatmap.png"
        draw_heatmaps(views, record["heatmaps"], record["findings"], path, names=[finding])
        data = path.read_bytes()
    found, name = record["findings"][finding], FINDING_DISPLAY_NAMES[finding]
    # On a phone the picture's own words are small.
    caption = (
        f"{name}: {found['state']}, p = {found['probability']:.2f}. Red is more than a uniform plan, blue is less."
    )
    return f"<figure>{_picture(data, 'png', f'Heatmap of {name}')}<figcaption>{caption}</figcaption></figure>"


def _picture(data: bytes, form: str, alternative: str) -> str:
    encoded = base64.b64encode(data).decode()
    return f'<img src="data:image/{form};base64,{encoded}" alt="{escape(alternative)}">'


__all__ = ["heatmap", "preview"]
