"""Clinical efficacy: do the states of a generated report agree with those of the true one (paper, section 4.2)?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..findings_otdrg import FINDING_STATES, FINDINGS, POSITIVE, UNCLEAR
from .metric import Metric, MetricResult, Score

#: All findings, CheXpert's five competition findings, and the thirteen without "No Finding".
LABEL_SETS: dict[str, tuple[str, ...]] = {
    "14": FINDINGS,
    "5": ("atelectasis", "cardiomegaly", "consolidation", "edema", "pleural_effusion"),
    "13": tuple(name for name in FINDINGS if name != "no_finding"),
}

#: What an unclear state counts as: negative as in PromptMRG, positive as in CheXbert.
UNCERTAIN_POLICIES: dict[str, tuple[int, ...]] = {
    "uncertain_negative": (POSITIVE,),
    "uncertain_positive": (POSITIVE, UNCLEAR),
}

AVERAGES = ("example", "micro", "macro")
MEASURES = ("precision", "recall", "f1")
_COUNTS = ("true_positives", "predicted", "support")
_COLUMNS = [[FINDINGS.index(name) for name in names] for names in LABEL_SETS.values()]

#: Every F1 of [`clinical_efficacy_scores`].
F1_SCORES: tuple[str, ...] = tuple(
    f"{average}_f1_{labels}_{policy}" for policy in UNCERTAIN_POLICIES for average in AVERAGES for labels in LABEL_SETS
)


def precision_recall_f1(
    both: np.ndarray, predicted: np.ndarray, true: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 from counts; 0 where the denominator is 0."""

    def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
        return np.divide(top, bottom, out=np.zeros(np.shape(top)), where=np.asarray(bottom) > 0)

    return ratio(both, predicted), ratio(both, true), ratio(2.0 * both, predicted + true)


def clinical_efficacy_scores(
    predicted_states: Sequence[Sequence[int]] | np.ndarray, true_states: Sequence[Sequence[int]] | np.ndarray
) -> dict[str, object]:
    """Precision, recall and F1 of the positives among N studies' states (paper, section 4.2).

    Example average: per study, then the mean over studies. Micro: over all cells. Macro: per finding, then the mean
    over findings, those without a positive included as 0 (`findings_with_positives_…` says how many have one).

    Args:
        predicted_states: (N, 14) state ids of the generated reports.
        true_states: (N, 14) state ids of the true reports, by the same labeler.

    Returns:
        `{average}_{measure}_{labels}_{policy}` such as `macro_f1_13_uncertain_negative`, averages `example`, `micro`,
        `macro`, measures `precision`, `recall`, `f1`, labels `14`, `5`, `13` (without "No Finding"), policies
        `uncertain_negative`, `uncertain_positive`; `findings_with_positives_{labels}_{policy}`, an int, among the true
        states; `"per_finding"`: `{policy: {finding: {precision, recall, f1, true_positives, predicted, support}}}`;
        `"per_study"`: `{"f1_{labels}_{policy}": list of N}`, likewise `precision_…` and `recall_…`.

    Raises:
        ValueError: a shape other than (N, 14), different N, or a state id outside 0 to 3.
    """
    result = _compute(predicted_states, true_states)
    return {**result.scores, **result.details, "per_study": result.per_study}


def _compute(predicted_states, true_states) -> MetricResult:
    cells, ratios = _contributions(predicted_states, true_states)
    counts = cells.sum(axis=0)
    per_finding: dict[str, dict[str, dict[str, float]]] = {}
    per_study: dict[str, list[float]] = {}
    details: dict[str, object] = {}
    for row, policy in enumerate(UNCERTAIN_POLICIES):
        rates, numbers = np.stack(precision_recall_f1(*counts[row])), counts[row].astype(int)
        per_finding[policy] = {
            name: {
                **dict(zip(MEASURES, rates[:, column].tolist(), strict=True)),
                **dict(zip(_COUNTS, numbers[:, column].tolist(), strict=True)),
            }
            for column, name in enumerate(FINDINGS)
        }
        for place, labels in enumerate(LABEL_SETS):
            details[f"findings_with_positives_{labels}_{policy}"] = int((numbers[2, _COLUMNS[place]] > 0).sum())
            for measure, values in zip(MEASURES, ratios[:, row, place].T, strict=True):
                per_study[f"{measure}_{labels}_{policy}"] = values.tolist()
    averages = clinical_efficacy_averages(counts, ratios.mean(axis=0))
    return MetricResult(
        scores={name: float(value) for name, value in averages.items()},
        per_study=per_study,
        contributions=np.concatenate([rows.reshape(len(rows), -1) for rows in (cells, ratios)], axis=1),
        aggregate=_aggregate,
        details={**details, "per_finding": per_finding},
    )


def _aggregate(sums: np.ndarray, studies: int) -> dict[str, np.ndarray]:
    cells = len(UNCERTAIN_POLICIES) * len(_COUNTS) * len(FINDINGS)
    counts = sums[:, :cells].reshape(len(sums), len(UNCERTAIN_POLICIES), len(_COUNTS), -1)
    ratios = sums[:, cells:].reshape(len(sums), len(UNCERTAIN_POLICIES), len(LABEL_SETS), len(MEASURES))
    return clinical_efficacy_averages(counts, ratios / studies)


def _contributions(predicted_states, true_states) -> tuple[np.ndarray, np.ndarray]:
    """What each of N studies adds to the averages.

    Returns:
        Cells (N, 2, 3, 14), 0 or 1, by policy: whether a finding is positive in both reports, in the generated one, in
        the true one. Ratios (N, 2, 3, 3), by policy, label set and measure, of each study.
    """
    predicted_states, true_states = _checked("predictions", predicted_states), _checked("references", true_states)
    if len(predicted_states) != len(true_states):
        raise ValueError(
            f"predictions: {len(predicted_states)}, references: {len(true_states)}; expected as many of each"
        )
    cells = np.zeros((len(true_states), len(UNCERTAIN_POLICIES), len(_COUNTS), len(FINDINGS)))
    ratios = np.zeros((len(true_states), len(UNCERTAIN_POLICIES), len(LABEL_SETS), len(MEASURES)))
    for row, positives in enumerate(UNCERTAIN_POLICIES.values()):
        predicted, true = np.isin(predicted_states, positives), np.isin(true_states, positives)
        cells[:, row] = np.stack([predicted & true, predicted, true], axis=1)
        for place, columns in enumerate(_COLUMNS):
            counts = cells[:, row][..., columns].sum(axis=-1)
            ratios[:, row, place] = np.stack(precision_recall_f1(*counts.T), axis=1)
    return cells, ratios


def clinical_efficacy_averages(counts: np.ndarray, ratios: np.ndarray) -> dict[str, np.ndarray]:
    """The averages of [`clinical_efficacy_scores`] from counts and per-study ratios.

    Args:
        counts: (..., 2, 3, 14), by policy and finding: studies in which a finding is positive in both reports, in the
            generated one, in the true one.
        ratios: (..., 2, 3, 3), by policy, label set and measure: means over the same studies.

    Returns:
        `{average}_{measure}_{labels}_{policy}`, an array (...) each.
    """
    averages: dict[str, np.ndarray] = {}
    for row, policy in enumerate(UNCERTAIN_POLICIES):
        of_policy = [counts[..., row, count, :] for count in range(len(_COUNTS))]
        by_finding = precision_recall_f1(*of_policy)
        for place, (labels, columns) in enumerate(zip(LABEL_SETS, _COLUMNS, strict=True)):
            micro = precision_recall_f1(*(count[..., columns].sum(axis=-1) for count in of_policy))
            for number, measure in enumerate(MEASURES):
                values = ratios[..., row, place, number], micro[number], by_finding[number][..., columns].mean(axis=-1)
                for average, value in zip(AVERAGES, values, strict=True):
                    averages[f"{average}_{measure}_{labels}_{policy}"] = value
    return averages


def _checked(name: str, states: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
    try:
        array = np.asarray(states)
    except ValueError:
        array = np.zeros(0)
    if array.ndim != 2 or array.shape[1] != len(FINDINGS) or not len(array):
        raise ValueError(f"{name}: shape {array.shape}, expected (N, {len(FINDINGS)}) state ids with N at least 1")
    wrong = np.argwhere(~np.isin(array, range(len(FINDING_STATES))))
    if len(wrong):
        row, column = wrong[0]
        raise ValueError(
            f"{name}[{row}], {FINDINGS[column]}: state {array[row, column]}, "
            f"expected 0 to 3 ({', '.join(FINDING_STATES)})"
        )
    return array


def example_ceiling(true_states: Sequence[Sequence[int]] | np.ndarray) -> str | None:
    """A note on the highest example-F1 these studies allow, with unclear as negative; None if it is 1.

    Args:
        true_states: (N, 14) state ids.
    """
    perfect = clinical_efficacy_scores(true_states, true_states)
    reached = {labels: perfect[f"example_f1_{labels}_uncertain_negative"] for labels in LABEL_SETS}
    if min(reached.values()) == 1:
        return None
    found = ", ".join(f"{value:.3f} ({labels})" for labels, value in reached.items())
    return f"true reports against themselves have an example-F1 of {found}: a study without positives counts as 0"


def _shown(average: str, measure: str, labels: str, policy: str) -> Score:
    heading, words = f"{average}-{measure.replace('f1', 'F1')} ({labels})", policy.replace("_", " as ")
    return Score(
        heading if policy == "uncertain_negative" else f"{heading}, {words}",
        table=f"F1, {words}" if measure == "f1" else None,
        main=(average, measure, labels, policy) == ("macro", "f1", "13", "uncertain_negative"),
        heading=heading,
    )


CLINICAL_EFFICACY = Metric(
    "clinical_efficacy",
    {
        f"{average}_{measure}_{labels}_{policy}": _shown(average, measure, labels, policy)
        for policy in UNCERTAIN_POLICIES
        for measure in MEASURES
        for average in AVERAGES
        for labels in LABEL_SETS
    },
    _compute,
    reads="states",
    section="clinical_efficacy",
    chest_only=True,
)

__all__ = [
    "AVERAGES",
    "CLINICAL_EFFICACY",
    "F1_SCORES",
    "LABEL_SETS",
    "MEASURES",
    "UNCERTAIN_POLICIES",
    "clinical_efficacy_averages",
    "clinical_efficacy_scores",
    "example_ceiling",
    "precision_recall_f1",
]
