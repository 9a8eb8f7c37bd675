"""The table of the 14 findings: the states the model was told, to be changed there, and what the report says.

A table of HTML's own, whose lists of states keyboards, phones and screen readers know how to work.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from ...findings_otdrg import FINDING_DISPLAY_NAMES, FINDING_STATES, FINDINGS, parse_findings

_TEMPLATE = """
{{#if value}}
<table class="findings">
  <caption>{{legend}}</caption>
  <thead><tr>
    <th scope="col">Finding</th><th scope="col">State</th>
    <th scope="col">Probability</th><th scope="col">Report says</th>
  </tr></thead>
  <tbody>
  {{#each value}}
    <tr class="{{#if edited}}{{else}}{{kind}}{{/if}}" data-finding="{{finding}}">
      <th scope="row">{{name}}</th>
      <td>
        <select aria-label="State of {{name}}" {{#if fixed}}disabled{{/if}}>
          {{#each choices}}<option value="{{this}}">{{this}}</option>{{/each}}
        </select>
      </td>
      <td class="number">{{#if edited}}–{{else}}{{probability}}{{/if}}</td>
      <td>{{#if edited}}not written yet{{else}}{{said}}{{#if kind}} ({{kind}}){{/if}}{{/if}}</td>
    </tr>
  {{/each}}
  </tbody>
</table>
{{/if}}
"""

_LEGEND = (
    "State: what the model was told, as predicted unless you change it. Probability: the label predictor's, of that "
    "state. Report says: as the labeler “rules” reads it."
)
_LEGEND_UNTOLD = "State: as predicted; this model is not told of it (it was trained without DLE)."

# An option's `selected` only says what was chosen first, so the choice is set from the value after each rendering.
_SCRIPT = """
const show = () => element.querySelectorAll('select').forEach((choice, row) => {
  choice.value = props.value[row].state;
});
element.addEventListener('change', ({target}) => {
  const {finding} = target.closest('tr').dataset;
  props.value = props.value.map(row => row.finding === finding
    ? {...row, state: target.value, edited: target.value !== row.told} : row);
});
watch('value', show);
show();
"""


def findings_table(steerable: bool) -> gr.HTML:
    """The table, empty; its value is what [`table_rows`] makes.

    Args:
        steerable: whether the model writes from states that it is given.
    """
    return gr.HTML(
        [],
        html_template=_TEMPLATE,
        js_on_load=_SCRIPT,
        apply_default_css=False,
        elem_id="findings",
        legend=_LEGEND if steerable else _LEGEND_UNTOLD,
    )


def table_rows(record: dict[str, Any], steerable: bool) -> list[dict[str, Any]]:
    """A record of the pipeline as the table's value, a row a finding.

    Args:
        record: with `findings` and, of a model that is told of them, `contradictions`.
        steerable: whether the model writes from states that it is given.
    """
    apart = {each["finding"]: each for each in record.get("contradictions", ())}
    rows = []
    for finding, found in record["findings"].items():
        told = found["state"]
        disagreement = apart.get(finding)
        checked = "contradictions" in record and finding != "no_finding"
        rows.append(
            {
                "finding": finding,
                "name": FINDING_DISPLAY_NAMES[finding],
                "told": told,
                "state": told,
                "edited": False,
                "fixed": not steerable,
                "choices": [state for state in FINDING_STATES if _possible(finding, state)],
                "probability": f"{found['probability']:.2f}",
                "said": (disagreement["said"] if disagreement else told) if checked else "",
                "kind": disagreement["kind"] if disagreement else "",
            }
        )
    return rows


def table_states(rows: Any) -> dict[str, str]:
    """The states of the 14 findings that are chosen in the table, checked, because any browser can send anything.

    Raises:
        ValueError: no or another table, an unknown finding or state, or one that is not possible for the finding.
    """
    if not rows:
        raise ValueError("there are no states yet: write a report first")
    try:
        states = {row["finding"]: row["state"] for row in rows}
    except (TypeError, KeyError):
        raise ValueError("the table of findings is damaged: write a report first") from None
    parse_findings(states)
    if len(states) != len(FINDINGS):
        raise ValueError(f"the table has {len(states)} findings: expected {len(FINDINGS)}")
    return states


def _possible(finding: str, state: str) -> bool:
    try:
        parse_findings({finding: state})
    except ValueError:
        return False
    return True


__all__ = ["findings_table", "table_rows", "table_states"]
