"""Clinical efficacy against scikit-learn, all eighteen combinations."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from otdrg.findings_otdrg import FINDINGS
from otdrg.metrics import LABEL_SETS, clinical_efficacy_scores
from otdrg.metrics.efficacy import example_ceiling
from sklearn.metrics import precision_recall_fscore_support

POLICIES = {"uncertain_negative": [1], "uncertain_positive": [1, 3]}
AVERAGES = {"example": "samples", "micro": "micro", "macro": "macro"}
SIZES = st.shared(st.integers(1, 12), key="studies")
STATES = SIZES.flatmap(lambda size: arrays(np.int64, (size, 14), elements=st.integers(0, 3)))


@settings(max_examples=40, deadline=None)
@given(STATES, STATES)
def test_clinical_efficacy_equals_scikit_learn(predicted, true):
    scores = clinical_efficacy_scores(predicted, true)
    for policy, positives in POLICIES.items():
        for labels, names in LABEL_SETS.items():
            columns = [FINDINGS.index(name) for name in names]
            p, t = (np.isin(states, positives)[:, columns].astype(int) for states in (predicted, true))
            for average, theirs in AVERAGES.items():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    expected = precision_recall_fscore_support(t, p, average=theirs, zero_division=0)[:3]
                for measure, value in zip(("precision", "recall", "f1"), expected, strict=True):
                    assert scores[f"{average}_{measure}_{labels}_{policy}"] == pytest.approx(value, abs=1e-12)
            assert scores[f"findings_with_positives_{labels}_{policy}"] == t.any(axis=0).sum()
            studies = scores["per_study"][f"f1_{labels}_{policy}"]
            assert np.mean(studies) == pytest.approx(scores[f"example_f1_{labels}_{policy}"], abs=1e-12)
        support = [row["support"] for row in scores["per_finding"][policy].values()]
        assert support == np.isin(true, positives).sum(axis=0).tolist()


def test_label_sets_have_their_findings():
    assert {name: len(findings) for name, findings in LABEL_SETS.items()} == {"14": 14, "5": 5, "13": 13}
    assert "no_finding" not in LABEL_SETS["13"]
    assert set(LABEL_SETS["5"]) == {"atelectasis", "cardiomegaly", "consolidation", "edema", "pleural_effusion"}


def test_clinical_efficacy_of_constant_normal_report_is_zero_without_no_finding():
    true = np.zeros((4, 14), dtype=int)
    true[:3, FINDINGS.index("no_finding")] = true[3, 0] = 1
    normal = np.zeros_like(true)
    normal[:, FINDINGS.index("no_finding")] = 1
    scores = clinical_efficacy_scores(normal, true)
    assert scores["example_f1_14_uncertain_negative"] == 0.75
    assert scores["macro_f1_13_uncertain_negative"] == 0


@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [
        (np.zeros((2, 13), int), np.zeros((2, 14), int), r"predictions: shape \(2, 13\), expected \(N, 14\)"),
        (np.zeros((0, 14), int), np.zeros((0, 14), int), "N at least 1"),
        ([[0] * 14, [0]], [[0] * 14] * 2, "predictions: shape"),
        (np.zeros((2, 14), int), np.zeros((3, 14), int), "predictions: 2, references: 3"),
        (np.zeros((1, 14), int), np.full((1, 14), -1), r"references\[0\], enlarged_cardiomediastinum: state -1"),
        (np.full((1, 14), 0.5), np.zeros((1, 14), int), "state 0.5, expected 0 to 3"),
    ],
)
def test_clinical_efficacy_names_faults(predicted, true, message):
    with pytest.raises(ValueError, match=message):
        clinical_efficacy_scores(predicted, true)


def test_example_ceiling_names_the_attainable_f1():
    """Of three studies one has no positive, so a perfect system's example-F1 is 2/3."""
    states = np.zeros((3, 14), int)
    states[0, 1] = states[1, 13] = 1
    assert example_ceiling(states) == (
        "true reports against themselves have an example-F1 of 0.667 (14), 0.333 (5), 0.333 (13): "
        "a study without positives counts as 0"
    )
    states[:, 1] = 1
    assert example_ceiling(states) is None
