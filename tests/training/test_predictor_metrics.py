import numpy as np
import pytest
from otdrg.findings_otdrg import FINDINGS
from otdrg.training.predictor_metrics import area_under_curve, finding_metrics, fit_thresholds

sklearn_metrics = pytest.importorskip("sklearn.metrics")


@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_area_equals_sklearns_also_with_ties(decimals):
    rng = np.random.default_rng(0)
    scores, positive = rng.normal(size=200).round(decimals), rng.random(200) < 0.3
    assert area_under_curve(scores, positive) == pytest.approx(
        sklearn_metrics.roc_auc_score(positive, scores), abs=1e-12
    )


def test_area_needs_both_classes():
    assert area_under_curve(np.array([0.1, 0.9]), np.array([True, True])) is None
    assert area_under_curve(np.array([0.1, 0.9]), np.array([False, False])) is None


def test_finding_metrics_equal_sklearns_and_leave_out_what_is_not_known():
    rng = np.random.default_rng(1)
    probabilities = rng.random((80, 14))
    predicted, labels = rng.integers(0, 4, (80, 14)), rng.integers(0, 4, (80, 14))
    labels[rng.random((80, 14)) < 0.2] = -100
    labels[:, 3] = 0
    metrics = finding_metrics(probabilities, predicted, labels)
    assert (metrics["auc_findings"], metrics["f1_findings_with_positives"]) == (13, 12)
    f1 = []
    for position, name in enumerate(FINDINGS):
        known = labels[:, position] != -100
        true, said = labels[known, position] == 1, predicted[known, position] == 1
        f1.append(sklearn_metrics.f1_score(true, said, zero_division=0))
        row = metrics["findings"][name]
        assert row["f1"] == pytest.approx(f1[-1], abs=1e-12)
        assert row["positives"] == true.sum()
    assert metrics["macro_f1_13"] == pytest.approx(np.mean(f1[:-1]), abs=1e-12)


def test_thresholds_are_the_best_there_are():
    rng = np.random.default_rng(2)
    labels = (rng.random((60, 14)) < 0.3).astype(int)
    labels[:, 5] = 0
    labels[:4, 5] = 1
    probabilities = np.clip(rng.random((60, 14)) * 0.5 + labels * 0.2, 0, 1)
    thresholds = fit_thresholds(probabilities, labels)
    assert thresholds[5] == 0.5, "four positives are too few to fit on"
    for position in (0, 1, 13):
        true = labels[:, position] == 1

        def f1(threshold, position=position, true=true):
            return sklearn_metrics.f1_score(true, probabilities[:, position] >= threshold, zero_division=0)

        best = max(f1(threshold) for threshold in probabilities[:, position])
        assert f1(thresholds[position]) == pytest.approx(best)
        assert 0 <= thresholds[position] <= 1
