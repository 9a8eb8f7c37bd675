"""A report's findings as Markdown: the conditioning states, and where the report disagrees with them."""

from __future__ import annotations

from typing import Any

from ...findings_otdrg import FINDING_DISPLAY_NAMES
from ...metrics.faithfulness import KINDS
from ...runtime.printable import markdown_table, printable

_LEGEND = (
    "**State**: the model was conditioned on it; predicted, unless you chose it. **p**: the label predictor's "
    "probability of this state. **Report says**: as read by the labeler `rules`."
)
_LEGEND_UNUSED = "**State**: as predicted; this model is not conditioned on states (`dle=False`)."


def findings_table(record: dict[str, Any], steerable: bool) -> str:
    """The 14 findings of a record of the pipeline, a row each; rows that the report contradicts are bold."""
    disagreements = {each["finding"]: each for each in record.get("contradictions", ())}
    rows = []
    for finding, found in record["findings"].items():
        cells = [FINDING_DISPLAY_NAMES[finding], found["state"], f"{found['probability']:.2f}"]
        each = disagreements.get(finding)
        if each is not None:
            cells.append(f"{each['said']} ({each['kind']})")
        else:
            checked = "contradictions" in record and finding != "no_finding"
            cells.append(found["state"] if checked else "")
        if each is not None and each["kind"] == "contradicted":
            cells = [f"**{cell}**" for cell in (f"⚠ {cells[0]}", *cells[1:])]
        rows.append(cells)
    table = markdown_table(["Finding", "State", "p", "Report says"], rows)
    return f"{table}\n\n{_LEGEND if steerable else _LEGEND_UNUSED}"


def runners_up_table(record: dict[str, Any]) -> str:
    """The candidates that were not chosen, the best first; "" without consensus decoding."""
    candidates = record.get("candidates", ())
    if len(candidates) < 2:
        return ""
    rows = [
        [
            f"{one['score']:.3f}",
            "written by the model" if one["sampled"] else "from the report bank",
            printable(one["report"]),
        ]
        for one in candidates
    ]
    return "Candidates, the chosen one first:\n\n" + markdown_table(["Score", "Origin", "Report"], rows)


def contradiction_list(record: dict[str, Any]) -> str:
    """Every disagreement between a report and the states it was written from, contradictions first."""
    lines = [] if record["complete"] else ["The report was cut off at the maximum number of tokens.\n"]
    disagreements = record.get("contradictions")
    if disagreements:
        lines.append("The report disagrees with the states it was written from:\n")
    elif disagreements is not None:
        lines.append("The report agrees with the state of every finding.")
    for each in sorted(disagreements or (), key=lambda each: KINDS.index(each["kind"])):
        name, state = FINDING_DISPLAY_NAMES[each["finding"]], record["findings"][each["finding"]]["state"]
        said = "the report does not mention it" if each["kind"] == "omitted" else f"the report says {each['said']}"
        line = f"{name}, {each['kind']}: state {state}, {said}"
        lines.append(f"- **{line}**" if each["kind"] == "contradicted" else f"- {line}")
    return "\n".join(lines)
