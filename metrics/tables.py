"""Scores as Markdown, for people."""

from __future__ import annotations

from collections.abc import Mapping

from ..findings_otdrg import FINDING_DISPLAY_NAMES
from .clinical_efficacy.clinical_efficacy import AVERAGES, LABEL_SETS, MEASURES, UNCERTAIN_POLICIES
from .nlg.nlg import NLG_METRICS
from .significance import Comparison, Interval, PairedDifference

#: How the scores of `nlg_scores` are written.
NLG_NAMES = dict(zip(NLG_METRICS, ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"), strict=True))


def nlg_table(scores: Mapping[str, float | None], intervals: Mapping[str, Interval]) -> str:
    """A row a metric: its score and interval; a dash where there is none."""
    rows = [
        [NLG_NAMES[name], shown_number(value), shown_interval(intervals.get(name))] for name, value in scores.items()
    ]
    return markdown_table(["fluency", "score", "95 % interval"], rows)


def clinical_table(scores: Mapping[str, float | int], intervals: Mapping[str, Interval]) -> str:
    """A row for each average, set of findings and policy: precision, recall, F1 and the interval of F1."""
    rows = []
    for policy in UNCERTAIN_POLICIES:
        for labels in LABEL_SETS:
            for average in AVERAGES:
                names = [f"{average}_{measure}_{labels}_{policy}" for measure in MEASURES]
                rows.append(
                    [
                        _clinical_name(average, labels, policy),
                        *(shown_number(scores[name]) for name in names),
                        shown_interval(intervals.get(names[-1])),
                        str(scores[f"findings_with_positives_{labels}_{policy}"]),
                    ]
                )
    header = ["clinical efficacy", *MEASURES[:2], "F1", "95 % interval of F1", "findings that occur"]
    return markdown_table(header, rows)


def finding_table(findings: Mapping[str, Mapping[str, float]]) -> str:
    """A row a finding: precision, recall, F1 and the counts they are of."""
    counts = ("true_positives", "predicted", "support")
    rows = [
        [
            FINDING_DISPLAY_NAMES[name],
            *(shown_number(row[measure]) for measure in MEASURES),
            *(str(row[count]) for count in counts),
        ]
        for name, row in findings.items()
    ]
    header = ["finding, uncertain as negative", *MEASURES[:2], "F1", *(count.replace("_", " ") for count in counts)]
    return markdown_table(header, rows)


def comparison_table(comparison: Mapping[str, Comparison]) -> str:
    """A row for each metric of fluency and each F1: both systems' scores, their difference, its interval and p."""
    f1 = {
        f"{average}_f1_{labels}_{policy}": "F1, " + _clinical_name(average, labels, policy)
        for policy in UNCERTAIN_POLICIES
        for labels in LABEL_SETS
        for average in AVERAGES
    }
    rows = [
        [
            shown,
            *(shown_number(value) for value in comparison[name][:2]),
            f"{comparison[name].difference:+.3f}",
            shown_interval(comparison[name]),
            shown_number(comparison[name].p_bootstrap),
            shown_number(comparison[name].p_permutation),
        ]
        for name, shown in {**NLG_NAMES, **f1}.items()
        if name in comparison
    ]
    header = ["", "score", "against", "difference", "95 % interval", "p, bootstrap", "p, permutation"]
    return markdown_table(header, rows)


def _clinical_name(average: str, labels: str, policy: str) -> str:
    return f"{average}, {labels} findings, {policy.replace('_', ' as ')}"


def shown_number(value: float | None) -> str:
    """A score; a dash where there is none."""
    return "–" if value is None else f"{value:.3f}"


def shown_interval(interval: Interval | PairedDifference | Comparison | None) -> str:
    """ "low to high"; a dash where there is none."""
    return "–" if interval is None else f"{interval.low:.3f} to {interval.high:.3f}"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Rows of cells below a header."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


__all__ = [
    "NLG_NAMES",
    "clinical_table",
    "comparison_table",
    "finding_table",
    "markdown_table",
    "nlg_table",
    "shown_interval",
    "shown_number",
]
