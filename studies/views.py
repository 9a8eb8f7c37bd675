"""The kind of a view, by the words that archives and tables name it with."""

from __future__ import annotations

import re

_FRONTAL = {"PA", "AP", "FRONTAL", "POSTEROANTERIOR", "ANTEROPOSTERIOR"}
_LATERAL = {"LATERAL", "LAT", "LL", "RL", "LATEROLATERAL"}


def view_named(text: str) -> str:
    """The view that a ViewPosition or the like names: "PA", "AP AXIAL", "LL", "XTABLE LATERAL", "postero-anterior"...

    Args:
        text: in capitals or not; words may be joined by hyphens and underscores.

    Returns:
        "frontal", "lateral", or "unknown" where the text names neither or both.
    """
    words = set(re.findall(r"[A-Z]+", text.upper().replace("-", "")))
    # Of a patient who lies on a side, "lateral" is the side and not the view.
    lateral = bool(words & _LATERAL) and not any(word.startswith("DECUB") for word in words)
    frontal = bool(words & _FRONTAL)
    return "unknown" if lateral == frontal else "lateral" if lateral else "frontal"


__all__ = ["view_named"]
