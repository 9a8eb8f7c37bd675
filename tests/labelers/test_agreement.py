"""The agreement report, against scikit-learn."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from otdrg.findings_otdrg import FINDING_STATES, FINDINGS
from otdrg.labelers import format_agreement, measure_agreement
from sklearn.metrics import cohen_kappa_score, precision_recall_fscore_support

STATES = st.integers(1, 40).flatmap(
    lambda reports: st.tuples(*[arrays(np.int64, (reports, 14), elements=st.integers(0, 3))] * 2)
)


@settings(max_examples=25, deadline=None)
@given(STATES)
def test_agreement_equals_scikit_learn(states):
    reference, candidate = states
    result = measure_agreement(reference, candidate)
    for column, name in enumerate(FINDINGS):
        true, said = reference[:, column], candidate[:, column]
        expected = precision_recall_fscore_support(true, said, labels=range(4), zero_division=np.nan)
        for state, *rates in zip(FINDING_STATES, *expected, strict=True):
            found = result["findings"][name]["states"][state]
            for rate, value in zip(("precision", "recall", "f1"), rates, strict=False):
                assert (found[rate] is None) == np.isnan(value)
                assert found[rate] is None or found[rate] == pytest.approx(value)
            assert found["support"] == rates[3]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kappa = cohen_kappa_score(true, said, labels=range(4))
        found = result["findings"][name]["kappa"]
        assert (found is None) == np.isnan(kappa)
        assert found is None or found == pytest.approx(kappa, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(STATES)
def test_agreement_is_symmetric_and_perfect_with_itself(states):
    reference, candidate = states
    same = measure_agreement(reference, reference)
    assert same["accuracy"] == 1
    assert all(row["kappa"] is None or row["kappa"] == pytest.approx(1) for row in same["findings"].values())
    there, back = measure_agreement(reference, candidate), measure_agreement(candidate, reference)
    for name in FINDINGS:
        one, other = there["findings"][name], back["findings"][name]
        assert one["kappa"] == pytest.approx(other["kappa"]) if one["kappa"] is not None else other["kappa"] is None
        assert one["mention"]["precision"] == other["mention"]["recall"]
        assert one["mention"]["f1"] == other["mention"]["f1"]


def test_agreement_overall_figures():
    reference, candidate = np.zeros((30, 14), int), np.zeros((30, 14), int)
    reference[:20, 1] = 1
    candidate[:15, 1], candidate[15:20, 1], candidate[:5, 2] = 1, 2, 3
    result = measure_agreement(reference, candidate)
    assert result["accuracy"] == 1 - 10 / (30 * 14)
    assert result["mention_f1"] == {"micro": 40 / 45, "macro": 1.0, "macro_findings": 1}
    assert result["state_f1"] == {"positive": 30 / 35, "negative": 0.0, "unclear": 0.0}
    shown = format_agreement(result)
    assert "| Cardiomegaly | 20 | 1.000 | 0.857 (20) | 0.000 (0) | – (0) |" in shown
    assert "mention F1: micro 0.889, macro 1.000 over the 1 findings with 20 mentions or more" in shown


@pytest.mark.parametrize(
    ("reference", "candidate", "message"),
    [
        (np.zeros((3, 13), int), np.zeros((3, 13), int), r"reference has shape \(3, 13\): expected \(3, 14\)"),
        (np.zeros((3, 14), int), np.zeros((4, 14), int), r"candidate has shape \(4, 14\): expected \(3, 14\)"),
        (np.zeros((3, 14), int), np.full((3, 14), -1), r"candidate has \[-1\]: expected ids 0 to 3"),
    ],
)
def test_agreement_wrong_states_are_refused(reference, candidate, message):
    with pytest.raises(ValueError, match=message):
        measure_agreement(reference, candidate)
