"""Format the report of a study for a terminal."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Mapping
from typing import Any, TextIO

from ..findings_otdrg import FINDING_DISPLAY_NAMES
from ..runtime.printable import printable
from ..sections_otdrg import lay_out_sections

#: States in the order of the table, with their mark and colour (SGR).
_STATES: dict[str, tuple[str, str]] = {
    "positive": ("+", "31"),
    "unclear": ("?", "33"),
    "negative": ("-", ""),
    "not_given": (" ", ""),
    "unmentioned": (" ", "2"),
}
_DISAGREEMENT, _HEADING = "35", "1"
_NARROWEST = 40
#: Non-breaking space.
_KEPT_SPACE = "\xa0"


def terminal_width() -> int:
    """Columns of the terminal, 80 without a terminal."""
    return max(shutil.get_terminal_size().columns, _NARROWEST)


def wants_colour(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a stream is a terminal with colours, and NO_COLOR is not set."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def format_record(record: dict[str, Any], width: int, colour: bool = False) -> str:
    """Format a study: its report, the finding states, and where the report differs from these.

    Mentioned findings and those in which the report differs have a line each, positive ones first; the others share a
    line. Differences are marked, and listed below the table.

    Args:
        record: as printed by `otdrg generate --json`; without `contradictions` if the model has no conditioning states.
        width: columns to which text is wrapped.
        colour: whether to colour the marks.
    """

    def paint(text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if colour and code else text

    record = {key: printable(value) if isinstance(value, str) else value for key, value in record.items()}
    blocks = [paint(_wrapped(record["id"], width, "", "  "), _HEADING)]
    if record.get("indication"):
        blocks.append(_wrapped(f"Indication: {record['indication']}", width))
    report = record["report"] or "(the model wrote nothing)"
    sections = lay_out_sections(report).split("\n\n") if "impression" in record else [report]
    blocks += [_wrapped(section, width) for section in sections]
    if not record["complete"]:
        blocks.append(paint(_wrapped("! cut off at --max-new-tokens", width), _DISAGREEMENT))
    if record.get("retrieved"):
        blocks.append(_wrapped("(word for word in the report bank)", width))
    runners_up = record.get("candidates", ())[1:]
    if runners_up:
        lines = (
            _wrapped(f"{one['score']:.3f} {printable(one['report'])}", width, "    ", "      ") for one in runners_up
        )
        blocks.append("\n".join(["  runners-up, with their scores:", *lines]))
    findings, disagreements = record["findings"], {one["finding"]: one for one in record.get("contradictions", ())}
    rows, unmentioned = [f"    {'finding':<26}  {'state' if 'contradictions' in record else 'predicted':<11}  p"], []
    for state, (mark, code) in _STATES.items():
        for name, finding in findings.items():
            if finding["state"] != state:
                continue
            shown = FINDING_DISPLAY_NAMES[name]
            probability = "-" if finding["probability"] is None else f"{finding['probability']:.2f}"
            if state == "unmentioned" and name not in disagreements:
                unmentioned.append(f"{shown} {probability}".replace(" ", _KEPT_SPACE))
                continue
            row = f"  {paint(f'{mark} {shown:<26}  {state:<11}', code)}  {probability}"
            if name in record.get("steered", {}):
                row += "  given"
            if name in disagreements:
                row += "  " + paint(f"! {_said(disagreements[name])}", _DISAGREEMENT)
            rows.append(row)
    if unmentioned:
        last = _wrapped(f"unmentioned: {', '.join(unmentioned)}", width, "    ", "      ").replace(_KEPT_SPACE, " ")
        rows.append(paint(last, _STATES["unmentioned"][1]))
    blocks.append("\n".join(rows))
    if disagreements:
        lines = (
            f"! {FINDING_DISPLAY_NAMES[name]}: conditioned on {one['given']}, {_said(one)}"
            for name, one in disagreements.items()
        )
        blocks.append(paint("\n".join(_wrapped(line, width, "  ", "    ") for line in lines), _DISAGREEMENT))
    if "heatmap" in record:
        # Not wrapped, so that it can be copied.
        blocks.append(f"  heatmap: {record['heatmap']}")
    return "\n\n".join(blocks) + "\n"


def _said(disagreement: dict[str, str]) -> str:
    return "not mentioned" if disagreement["kind"] == "omitted" else f"says {disagreement['said']}"


def _wrapped(text: str, width: int, first: str = "  ", later: str = "  ") -> str:
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )
