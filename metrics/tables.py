"""Scores as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping

from ..findings_otdrg import FINDING_DISPLAY_NAMES
from ..runtime.printable import markdown_table
from .efficacy import AVERAGES, LABEL_SETS, MEASURES, UNCERTAIN_POLICIES
from .registry import display_name, main_scores, score_tables
from .significance import Comparison, Interval, PairedDifference

CIDER_NOTE = "intervals and tests are of the mean of the studies' values, with document frequencies of all references"


def score_table(title: str, scores: Mapping[str, float | None], intervals: Mapping[str, Interval]) -> str:
    """One row per score of the full table of that title: its value and interval; a dash where there is none."""
    headings = score_tables()[title]
    rows = [
        [headings[name], shown_number(value), shown_interval(intervals.get(name))]
        for name, value in scores.items()
        if name in headings
    ]
    return markdown_table([title, "score", "95 % interval"], rows)


def section_table(sections: Mapping[str, tuple[Mapping[str, float | None], int]]) -> str:
    """One row per section: the number of studies whose true report has it, and the main scores on these."""
    columns = {
        name: shown for name, shown in main_scores().items() if any(name in found for found, _ in sections.values())
    }
    rows = [
        [section, f"{studies:,}", *(shown_number(scores.get(name)) for name in columns)]
        for section, (scores, studies) in sections.items()
    ]
    return markdown_table(["section", "studies", *columns.values()], rows)


def clinical_table(scores: Mapping[str, float | int], intervals: Mapping[str, Interval]) -> str:
    """One row per average, set of findings and policy: precision, recall, F1 and the interval of F1."""
    rows = []
    for policy in UNCERTAIN_POLICIES:
        for labels in LABEL_SETS:
            for average in AVERAGES:
                names = [f"{average}_{measure}_{labels}_{policy}" for measure in MEASURES]
                rows.append(
                    [
                        f"{average}, {labels} findings, {policy.replace('_', ' as ')}",
                        *(shown_number(scores[name]) for name in names),
                        shown_interval(intervals.get(names[-1])),
                        str(scores[f"findings_with_positives_{labels}_{policy}"]),
                    ]
                )
    header = ["clinical efficacy", *MEASURES[:2], "F1", "95 % interval of F1", "findings that occur"]
    return markdown_table(header, rows)


def finding_table(findings: Mapping[str, Mapping[str, float]]) -> str:
    """One row per finding: precision, recall and F1 with their counts."""
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
    """One row per score of the full tables: both systems', their difference, its interval and p."""
    rows = [
        [
            display_name(name),
            *(shown_number(value) for value in comparison[name][:2]),
            "–" if comparison[name].difference is None else f"{comparison[name].difference:+.3f}",
            shown_interval(comparison[name]),
            shown_number(comparison[name].p_bootstrap),
            shown_number(comparison[name].p_permutation),
        ]
        for headings in score_tables().values()
        for name in headings
        if name in comparison
    ]
    header = ["", "score", "against", "difference", "95 % interval", "p, bootstrap", "p, permutation"]
    return markdown_table(header, rows)


def shown_number(value: float | None) -> str:
    """A score; a dash where there is none."""
    return "–" if value is None else f"{value:.3f}"


def shown_interval(interval: Interval | PairedDifference | Comparison | None) -> str:
    """ "low to high"; a dash where there is none."""
    return "–" if interval is None or interval.low is None else f"{interval.low:.3f} to {interval.high:.3f}"


def shown_bounds(row: Mapping[str, float | None]) -> str:
    """[`shown_interval`] of a JSON object with `low` and `high`."""
    return "–" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"


__all__ = [
    "CIDER_NOTE",
    "clinical_table",
    "comparison_table",
    "finding_table",
    "markdown_table",
    "score_table",
    "shown_bounds",
    "shown_interval",
    "shown_number",
]
