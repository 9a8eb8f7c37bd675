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
MEASURES = ("precision", "recall", "f1")
_COUNTS = ("true_positives", "predicted", "support")

_DESCRIPTION = """\
Precision, recall and F1 of finding states: example, micro and macro averages, unclear counted as negative or as
positive, over 14 findings, CheXpert's 5, and the 13 without No Finding. A ratio of nothing is 0: in example averages a
study without positives is one, however right the report.
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
    cells, ratios = clinical_efficacy_contributions(predicted_states, true_states)
    counts = cells.sum(axis=0)
    scores: dict[str, object] = {}
    for name, value in clinical_efficacy_averages(counts, ratios.mean(axis=0)).items():
        scores[name] = float(value)
    per_finding: dict[str, dict[str, dict[str, float]]] = {}
    per_study: dict[str, list[float]] = {}
    for row, policy in enumerate(UNCERTAIN_POLICIES):
        by_finding = precision_recall_f1(*counts[row])
        per_finding[policy] = {
            name: {
                **{measure: float(values[column]) for measure, values in zip(MEASURES, by_finding, strict=True)},
                **{count: int(values[column]) for count, values in zip(_COUNTS, counts[row], strict=True)},
            }
            for column, name in enumerate(FINDINGS)
        }
        for place, (labels, names) in enumerate(LABEL_SETS.items()):
            supports = counts[row, 2, [FINDINGS.index(name) for name in names]]
            scores[f"findings_with_positives_{labels}_{policy}"] = int((supports > 0).sum())
            for measure, values in zip(MEASURES, ratios[:, row, place].T, strict=True):
                per_study[f"{measure}_{labels}_{policy}"] = values.tolist()
    return {**scores, "per_finding": per_finding, "per_study": per_study}


def example_ceiling(true_states: Sequence[Sequence[int]] | np.ndarray) -> str | None:
    """What example averages are worth on these studies, in words: a study without positives on either side counts as 0.

    Args:
        true_states: (N, 14) state ids.

    Returns:
        The example-F1 of the true states scored against themselves, uncertain as negative; None where it is 1.
    """
    perfect = clinical_efficacy_scores(true_states, true_states)
    reached = {subset: perfect[f"example_f1_{subset}_uncertain_negative"] for subset in LABEL_SETS}
    if min(reached.values()) == 1:
        return None
    found = ", ".join(f"{value:.3f} ({subset})" for subset, value in reached.items())
    return f"true reports against themselves have an example-F1 of {found}: a study without positives counts as 0"


def clinical_efficacy_contributions(
    predicted_states: Sequence[Sequence[int]] | np.ndarray, true_states: Sequence[Sequence[int]] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What each of N studies adds to the averages: sums and means over any of them give [`clinical_efficacy_averages`].

    Args:
        predicted_states, true_states: as in [`clinical_efficacy_scores`].

    Returns:
        Cells (N, 2, 3, 14), 0 or 1, by policy: whether a finding is positive in both reports, in the generated one, in
        the true one. Ratios (N, 2, 3, 3), by policy, label set and measure, of each study.

    Raises:
        ValueError: as [`clinical_efficacy_scores`].
    """
    predicted_states, true_states = _states("predictions", predicted_states), _states("references", true_states)
    if len(predicted_states) != len(true_states):
        raise ValueError(
            f"predictions: {len(predicted_states)}, references: {len(true_states)}; expected as many of each"
        )
    cells = np.zeros((len(true_states), len(UNCERTAIN_POLICIES), len(_COUNTS), len(FINDINGS)))
    ratios = np.zeros((len(true_states), len(UNCERTAIN_POLICIES), len(LABEL_SETS), len(MEASURES)))
    for row, positives in enumerate(UNCERTAIN_POLICIES.values()):
        predicted, true = np.isin(predicted_states, positives), np.isin(true_states, positives)
        cells[:, row] = np.stack([predicted & true, predicted, true], axis=1)
        for place, names in enumerate(LABEL_SETS.values()):
            columns = [FINDINGS.index(name) for name in names]
            counts = cells[:, row][..., columns].sum(axis=-1)
            ratios[:, row, place] = np.stack(precision_recall_f1(*counts.T), axis=1)
    return cells, ratios


def clinical_efficacy_averages(counts: np.ndarray, ratios: np.ndarray) -> dict[str, np.ndarray]:
    """The averages of [`clinical_efficacy_scores`] from what studies contribute to them.

    Args:
        counts: (..., 2, 3, 14) sums of cells over studies, see [`clinical_efficacy_contributions`].
        ratios: (..., 2, 3, 3) means of ratios over the same studies.

    Returns:
        `{average}_{measure}_{labels}_{policy}`, an array (...) each.
    """
    averages: dict[str, np.ndarray] = {}
    for row, policy in enumerate(UNCERTAIN_POLICIES):
        of_policy = [counts[..., row, count, :] for count in range(len(_COUNTS))]
        by_finding = precision_recall_f1(*of_policy)
        for place, (labels, names) in enumerate(LABEL_SETS.items()):
            columns = [FINDINGS.index(name) for name in names]
            micro = precision_recall_f1(*(count[..., columns].sum(axis=-1) for count in of_policy))
            for number, measure in enumerate(MEASURES):
                values = (
                    ratios[..., row, place, number],
                    micro[number],
                    by_finding[number][..., columns].mean(axis=-1),
                )
                for average, value in zip(AVERAGES, values, strict=True):
                    averages[f"{average}_{measure}_{labels}_{policy}"] = value
    return averages


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
