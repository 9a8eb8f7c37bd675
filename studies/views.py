"""Recognise a view by its name in a header or table."""

from __future__ import annotations

import re

_FRONTAL = {"PA", "AP", "FRONTAL", "POSTEROANTERIOR", "ANTEROPOSTERIOR"}
_LATERAL = {"LATERAL", "LAT", "LL", "RL", "LATEROLATERAL"}


def view_named(text: str) -> str:
    """The view that a text such as DICOM's ViewPosition names: "PA", "AP AXIAL", "LL", "XTABLE LATERAL"...

    "unknown" if the text names neither or both. Case, hyphens and underscores are ignored.
    """
    text = re.sub(r"(POSTERO|ANTERO|LATERO)[\s_]+", r"\1", text.upper().replace("-", ""))
    words = set(re.findall(r"[A-Z]+", text))
    # In "lateral decubitus", "lateral" is the patient's position and not the view.
    lateral = bool(words & _LATERAL) and not any(word.startswith("DECUB") for word in words)
    frontal = bool(words & _FRONTAL)
    return "unknown" if lateral == frontal else "lateral" if lateral else "frontal"
