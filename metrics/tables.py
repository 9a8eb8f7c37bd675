"""Scores as Markdown, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..findings_otdrg import FINDING_DISPLAY_NAMES
from .efficacy import AVERAGES, LABEL_SETS, MEASURES, UNCERTAIN_POLICIES
from .fluency import NLG_NAMES
from .localisation import CHANCES, MINIMUM_STUDIES
from .localisation import MEASURES as MAP_MEASURES
from .rad_eval import RADEVAL_METRICS
from .significance import Comparison, Interval, PairedDifference

RADEVAL_NAMES = {name: score.display for metric in RADEVAL_METRICS.values() for name, score in metric.scores.items()}


def nlg_table(scores: Mapping[str, float | None], intervals: Mapping[str, Interval]) -> str:
    """A row a metric: its score and interval; a dash where there is none."""
    return _score_table("fluency", NLG_NAMES, scores, intervals)


def radeval_table(scores: Mapping[str, float | None], intervals: Mapping[str, Interval]) -> str:
    """As [`nlg_table`], of the scores of `radeval_scores`."""
    return _score_table("by RadEval", RADEVAL_NAMES, scores, intervals)


def _score_table(
    title: str, names: Mapping[str, str], scores: Mapping[str, float | None], intervals: Mapping[str, Interval]
) -> str:
    rows = [[names[name], shown_number(value), shown_interval(intervals.get(name))] for name, value in scores.items()]
    return markdown_table([title, "score", "95 % interval"], rows)


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
    """A row for each score of fluency, of RadEval and each F1: both systems', their difference, its interval and p."""
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
        for name, shown in {**NLG_NAMES, **RADEVAL_NAMES, **f1}.items()
        if name in comparison
    ]
    header = ["", "score", "against", "difference", "95 % interval", "p, bootstrap", "p, permutation"]
    return markdown_table(header, rows)


#: How the measures, chance levels and verdicts of `localisation_scores` are written.
_MAP_NAMES = dict(zip(MAP_MEASURES, ("pointing game", "soft IoU"), strict=True))
_CHANCE_NAMES = dict(zip(CHANCES, ("a uniform map", "other studies' maps"), strict=True))
_VERDICTS = {"above": "better than", "at": "no better than", "below": "worse than"}


def localisation_table(scores: Mapping[str, Any]) -> str:
    """A row a finding, and one for all: both measures, their intervals, what chance gives, and whether it is beaten."""
    header = ["finding", "studies", "a uniform map"]
    for name in _MAP_NAMES.values():
        header += [name, "95 % interval", "other studies' maps", "beats chance"]
    rows = [
        _localisation_row(FINDING_DISPLAY_NAMES[finding], str(row["studies"]), row)
        for finding, row in scores["findings"].items()
    ]
    macro = scores["macro"]
    if macro is not None:
        name = f"macro, {macro['findings']} findings"
        rows.append(_localisation_row(name, str(macro["studies"]), macro))
    return markdown_table(header, rows)


def localisation_verdicts(scores: Mapping[str, Any]) -> list[str]:
    """Whether maps beat chance in all, in words: a sentence for each measure, and one on single findings."""
    macro = scores["macro"]
    if macro is None:
        return [f"Too few studies to tell whether the maps beat chance: no finding has {MINIMUM_STUDIES} of them."]
    told = []
    for measure, name in _MAP_NAMES.items():
        score = macro[measure]
        levels = " and ".join(
            f"{_VERDICTS[score[chance]['verdict']]} {shown} ({shown_number(score[chance]['level'])}; "
            f"difference {score[chance]['difference']:+.3f}, {_bounds(score[chance])})"
            for chance, shown in _CHANCE_NAMES.items()
        )
        words = {"yes": "beats chance", "no": "does not beat chance", "no, below it": "is below chance"}
        beats = words.get(_beats(score), "beats one of two chance levels")
        told.append(f"In all, the {name} {beats}: {score['value']:.3f}, {levels}.")
    findings = [row for row in scores["findings"].values() if row["studies"] >= MINIMUM_STUDIES]
    beaten = {name: sum(_beats(row[measure]) == "yes" for row in findings) for measure, name in _MAP_NAMES.items()}
    told.append(
        f"Of {len(findings)} findings with at least {MINIMUM_STUDIES} studies "
        + " and ".join(f"{count} beat both chance levels in the {name}" for name, count in beaten.items())
        + "; of intervals at 95 %, one in forty lies above chance by luck."
    )
    return told


def _localisation_row(name: str, studies: str, row: Mapping[str, Any]) -> list[str]:
    cells = [name, studies, shown_number(row[MAP_MEASURES[0]]["uniform"]["level"])]
    for measure in MAP_MEASURES:
        score = row[measure]
        cells += [shown_number(score["value"]), _bounds(score), shown_number(score["others"]["level"]), _beats(score)]
    return cells


def _beats(score: Mapping[str, Any]) -> str:
    above = [_CHANCE_NAMES[chance] for chance in CHANCES if score[chance]["verdict"] == "above"]
    if any(score[chance]["verdict"] is None for chance in CHANCES):
        return "too few studies"
    if len(above) == len(CHANCES):
        return "yes"
    if all(score[chance]["verdict"] == "below" for chance in CHANCES):
        return "no, below it"
    return f"only {above[0]}" if above else "no"


def _bounds(score: Mapping[str, float | None]) -> str:
    return "–" if score["low"] is None else f"{score['low']:.3f} to {score['high']:.3f}"


def _clinical_name(average: str, labels: str, policy: str) -> str:
    return f"{average}, {labels} findings, {policy.replace('_', ' as ')}"


def shown_number(value: float | None) -> str:
    """A score; a dash where there is none."""
    return "–" if value is None else f"{value:.3f}"


def shown_interval(interval: Interval | PairedDifference | Comparison | None) -> str:
    """ "low to high"; a dash where there is none."""
    return "–" if interval is None else f"{interval.low:.3f} to {interval.high:.3f}"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Rows of cells below a header; what would end a cell or a row is kept from doing so."""
    header, *rows = ([" ".join(cell.replace("|", "\\|").split()) for cell in cells] for cells in (header, *rows))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


__all__ = [
    "NLG_NAMES",
    "clinical_table",
    "comparison_table",
    "finding_table",
    "localisation_table",
    "localisation_verdicts",
    "markdown_table",
    "nlg_table",
    "radeval_table",
    "shown_interval",
    "shown_number",
]
