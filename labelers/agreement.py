"""Agreement of two labelers on the same reports, by finding and state and overall."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..files_otdrg import write_json
from ..findings_otdrg import FINDING_DISPLAY_NAMES, FINDING_STATES, FINDINGS, UNMENTIONED, check_finding_states
from ..runtime.csv_files import write_csv
from ..runtime.printable import markdown_table

#: Findings that the reference mentions less often are excluded from the macro average.
MINIMUM_MENTIONS = 20


def measure_agreement(reference: np.ndarray, candidate: np.ndarray) -> dict[str, Any]:
    """Measure the agreement of the states of N reports with those of a reference.

    Args:
        reference, candidate: (N, 14) state ids, columns in the order of `FINDINGS`.

    Returns:
        `reports`, `accuracy` over all N x 14 cells, `mention_f1` (any state against unmentioned) as `micro` and as
        `macro` over the `macro_findings` findings with `MINIMUM_MENTIONS` mentions or more in the reference, `state_f1`
        (micro, for each state but unmentioned), and under `findings` for each: `kappa` (Cohen's, over the four states),
        `mention` and under `states` each state's precision, recall, f1, support and predicted. A rate whose denominator
        is 0, and a kappa if both give all reports the same state, are None.

    Raises:
        ValueError: shapes that differ or are not (N, 14), or ids outside 0 to 3.
    """
    reference, candidate = np.asarray(reference), np.asarray(candidate)
    for name, states in (("reference", reference), ("candidate", candidate)):
        check_finding_states(states, len(reference), UNMENTIONED, name)
    findings = {}
    for column, name in enumerate(FINDINGS):
        true, said = reference[:, column], candidate[:, column]
        findings[name] = {
            "kappa": _kappa(true, said),
            "mention": _rates(true != UNMENTIONED, said != UNMENTIONED),
            "states": {state: _rates(true == i, said == i) for i, state in enumerate(FINDING_STATES)},
        }
    often = [row["mention"] for row in findings.values() if row["mention"]["support"] >= MINIMUM_MENTIONS]
    return {
        "reports": len(reference),
        "accuracy": float((reference == candidate).mean()) if reference.size else None,
        "mention_f1": {
            "micro": _rates(reference != UNMENTIONED, candidate != UNMENTIONED)["f1"],
            "macro": float(np.mean([row["f1"] for row in often])) if often else None,
            "macro_findings": len(often),
        },
        "state_f1": {
            state: _rates(reference == i, candidate == i)["f1"]
            for i, state in enumerate(FINDING_STATES)
            if i != UNMENTIONED
        },
        "findings": findings,
    }


def _rates(true: np.ndarray, said: np.ndarray) -> dict[str, float | int | None]:
    hits, support, predicted = int((true & said).sum()), int(true.sum()), int(said.sum())
    return {
        "precision": hits / predicted if predicted else None,
        "recall": hits / support if support else None,
        "f1": 2 * hits / (support + predicted) if support + predicted else None,
        "support": support,
        "predicted": predicted,
    }


def _kappa(true: np.ndarray, said: np.ndarray) -> float | None:
    """Cohen's kappa (Cohen 1960) of two raters over the four states."""
    if not len(true):
        return None
    observed = float((true == said).mean())
    shares = [[(rater == state).mean() for state in range(len(FINDING_STATES))] for rater in (true, said)]
    expected = float(np.dot(*shares))
    return None if expected == 1 else (observed - expected) / (1 - expected)


def format_agreement(result: dict[str, Any]) -> str:
    """The result of [`measure_agreement`] as a Markdown table, with the overall figures below it."""
    header = ["finding", "mentions", "mention F1", "positive F1", "negative F1", "unclear F1", "kappa"]
    table = []
    for name, row in result["findings"].items():
        states = (row["states"][state] for state in ("positive", "negative", "unclear"))
        cells = [f"{_shown(rates['f1'])} ({rates['support']})" for rates in states]
        mention = row["mention"]
        shown = [FINDING_DISPLAY_NAMES[name], str(mention["support"]), _shown(mention["f1"]), *cells]
        table.append([*shown, _shown(row["kappa"])])
    mention, state = result["mention_f1"], result["state_f1"]
    lines = [
        markdown_table(header, table),
        "",
        f"{result['reports']:,} reports, {_shown(result['accuracy'])} of the cells equal; in brackets, how often the "
        "reference has the state",
        f"mention F1: micro {_shown(mention['micro'])}, macro {_shown(mention['macro'])} over the "
        f"{mention['macro_findings']} findings with {MINIMUM_MENTIONS} mentions or more",
        "state F1, micro: " + ", ".join(f"{name} {_shown(value)}" for name, value in state.items()),
    ]
    return "\n".join(lines)


def write_agreement(
    folder: Path, result: dict[str, Any], ids: list[str], reference: np.ndarray, candidate: np.ndarray
) -> None:
    """Write agreement.json, agreement.csv (rates) and disagreements.csv (each differing cell) to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "agreement.json", result)
    names = ("precision", "recall", "f1", "support", "predicted")
    rates = (
        [finding, state, *(rates[name] for name in names), row["kappa"]]
        for finding, row in result["findings"].items()
        for state, rates in {"mention": row["mention"], **row["states"]}.items()
    )
    write_csv(folder / "agreement.csv", ["finding", "state", *names, "kappa"], rates)
    cells = (
        [ids[row], FINDINGS[column], *(FINDING_STATES[table[row, column]] for table in (reference, candidate))]
        for row, column in zip(*(reference != candidate).nonzero(), strict=True)
    )
    write_csv(folder / "disagreements.csv", ["id", "finding", "reference", "candidate"], cells)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
