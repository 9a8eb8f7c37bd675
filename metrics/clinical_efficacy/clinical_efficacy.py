"""Clinical efficacy: do the states of a generated report agree with those of the true one (paper, section 4.2)?

A module for `evaluate`: `evaluate.load("metrics/clinical_efficacy")` from the repository's root (or with an absolute
path).
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from otdrg.findings_otdrg import FINDING_STATES, FINDINGS, POSITIVE, UNCLEAR

#: CheXpert's five competition findings.
COMPETITION_FINDINGS = ("atelectasis", "cardiomegaly", "consolidation", "edema", "pleural_effusion")

#: All findings, the competition's five, and the thirteen without "No Finding".
LABEL_SETS: dict[str, tuple[str, ...]] = {
    "14": FINDINGS,
    "5": COMPETITION_FINDINGS,
    "13": tuple(name for name in FINDINGS if name != "no_finding"),
}

#: What an unclear state counts as: negative as in PromptMRG, positive as in CheXbert.
UNCERTAIN_POLICIES: dict[str, tuple[int, ...]] = {
    "uncertain_negative": (POSITIVE,),
    "uncertain_positive": (POSITIVE, UNCLEAR),
}

AVERAGES = ("example", "micro", "macro")

_DESCRIPTION = """\
Precision, recall and F1 of finding states: example, micro and macro averages, unclear counted as negative or as
positive, over 14 findings, CheXpert's 5, and the 13 without No Finding. A ratio of nothing is 0.
"""

_INPUTS = """\
Args:
    predictions: N lists of 14 state ids (0 unmentioned, 1 positive, 2 negative, 3 unclear) of the generated reports.
    references: the same of the true reports.
Returns:
    {average}_{precision|recall|f1}_{14|5|13}_{uncertain_negative|uncertain_positive} and
    findings_with_positives_{14|5|13}_{uncertain_...}; `per_finding`; `per_study`.
"""

_CITATION = """\
@inproceedings{irvin2019chexpert, title={CheXpert: A Large Chest Radiograph Dataset with Uncertainty Labels and Expert
Comparison}, author={Irvin, Jeremy and others}, booktitle={AAAI}, year={2019}}
"""


def _states(name: str, states: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
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


def _ratios(both: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
    predicted_states, true_states = _states("predictions", predicted_states), _states("references", true_states)
    if len(predicted_states) != len(true_states):
        raise ValueError(
            f"predictions: {len(predicted_states)}, references: {len(true_states)}; expected as many of each"
        )
    scores: dict[str, object] = {}
    per_finding: dict[str, dict[str, dict[str, float]]] = {}
    per_study: dict[str, list[float]] = {}
    for policy, positives in UNCERTAIN_POLICIES.items():
        predicted, true = np.isin(predicted_states, positives), np.isin(true_states, positives)
        hits = predicted & true
        counts = [cells.sum(axis=0) for cells in (hits, predicted, true)]
        by_finding = _ratios(*counts)
        per_finding[policy] = {
            name: {
                **{measure: float(values[row]) for measure, values in zip(_MEASURES, by_finding, strict=True)},
                **{count: int(values[row]) for count, values in zip(_COUNTS, counts, strict=True)},
            }
            for row, name in enumerate(FINDINGS)
        }
        for labels, names in LABEL_SETS.items():
            rows = [FINDINGS.index(name) for name in names]
            by_study = _ratios(*(cells[:, rows].sum(axis=1) for cells in (hits, predicted, true)))
            micro = _ratios(*(np.asarray(count[rows].sum()) for count in counts))
            for measure, studies, pooled, findings in zip(_MEASURES, by_study, micro, by_finding, strict=True):
                averages = (studies.mean(), pooled, findings[rows].mean())
                for average, value in zip(AVERAGES, averages, strict=True):
                    scores[f"{average}_{measure}_{labels}_{policy}"] = float(value)
                per_study[f"{measure}_{labels}_{policy}"] = studies.tolist()
            scores[f"findings_with_positives_{labels}_{policy}"] = int((counts[2][rows] > 0).sum())
    return {**scores, "per_finding": per_finding, "per_study": per_study}


_MEASURES = ("precision", "recall", "f1")
_COUNTS = ("true_positives", "predicted", "support")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class ClinicalEfficacy(evaluate.Metric):
    """`evaluate`'s form of [`clinical_efficacy_scores`]."""

    def _info(self) -> evaluate.MetricInfo:
        states = datasets.Sequence(datasets.Value("int64"), length=len(FINDINGS))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": states, "references": states}),
        )

    def _compute(self, predictions, references):
        return clinical_efficacy_scores(predictions, references)
