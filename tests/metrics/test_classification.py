import numpy as np
import pytest
import sklearn.calibration as sklearn_calibration
import sklearn.metrics as sklearn_metrics
import torch
from otdrg.findings_otdrg import FINDINGS
from otdrg.metrics.classification import (
    area_under_curve,
    auc_intervals,
    expected_calibration_error,
    finding_metrics,
    fit_thresholds,
    format_metrics,
    weighted_areas_under_curve,
)
from otdrg.predictor_otdrg import focal_loss
from otdrg.training.predictor import logit_adjustment


def made_predictions(rng, count, shift, share=0.3):
    """Probabilities and labels (count, 14), those of positives higher by `shift`; a sixth of the labels not known."""
    labels = (rng.random((count, 14)) < share).astype(int)
    probabilities = np.clip(rng.random((count, 14)) * 0.5 + labels * shift, 0, 1).round(2)
    labels[rng.random((count, 14)) < 1 / 6] = -100
    return probabilities, labels


@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_area_under_curve_with_ties_equals_scikit_learn(decimals):
    rng = np.random.default_rng(0)
    scores, positive = rng.normal(size=200).round(decimals), rng.random(200) < 0.3
    assert area_under_curve(scores, positive) == pytest.approx(
        sklearn_metrics.roc_auc_score(positive, scores), abs=1e-12
    )


def test_area_under_curve_of_one_class_is_none():
    assert area_under_curve(np.array([0.1, 0.9]), np.array([True, True])) is None
    assert area_under_curve(np.array([0.1, 0.9]), np.array([False, False])) is None


def test_finding_metrics_leave_out_unknown_labels_and_equal_scikit_learn():
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


def test_fit_thresholds_reach_the_best_f1():
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


@pytest.mark.parametrize("decimals", [1, 6])
def test_weighted_areas_equal_scikit_learn(decimals):
    rng = np.random.default_rng(3)
    scores, positive = rng.normal(size=90).round(decimals), rng.random(90) < 0.2
    weights = rng.integers(0, 4, (20, 90))
    weights[4, positive] = 0
    areas = weighted_areas_under_curve(scores, positive, weights)
    assert np.isnan(areas[4])
    for row in (0, 1, 19):
        expected = sklearn_metrics.roc_auc_score(positive, scores, sample_weight=weights[row])
        assert areas[row] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("decimals", [1, 8])
def test_calibration_error_equals_scikit_learns_bins(decimals):
    rng = np.random.default_rng(4)
    probabilities = rng.beta(0.7, 2, 300).round(decimals)
    positive = rng.random(300) < probabilities**2
    true, mean = sklearn_calibration.calibration_curve(positive, probabilities, n_bins=15)
    sizes = np.histogram(probabilities, np.linspace(0, 1, 16))[0]
    expected = np.average(np.abs(true - mean), weights=sizes[sizes > 0])
    assert expected_calibration_error(probabilities, positive) == pytest.approx(expected, abs=1e-12)
    # The same by hand, bin by bin, of which each holds its upper edge.
    by_hand = 0.0
    for position in range(15):
        inside = (probabilities > position / 15) & (probabilities <= (position + 1) / 15)
        inside |= (position == 0) & (probabilities == 0)
        if inside.any():
            by_hand += inside.mean() * abs(probabilities[inside].mean() - positive[inside].mean())
    assert by_hand == pytest.approx(expected, abs=1e-12)
    assert expected_calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0
    assert expected_calibration_error(np.array([1.0, 0.0]), np.array([False, True])) == 1
    assert expected_calibration_error(probabilities[:0], positive[:0]) is None


def test_auc_intervals_equal_a_bootstrap_study_by_study():
    rng = np.random.default_rng(5)
    probabilities, labels = made_predictions(rng, 60, 0.1)
    labels[labels[:, 7] == 1, 7] = 0
    labels[:8, 7] = 1
    labels[labels[:, 9] == 0, 9] = 1
    macro, intervals = auc_intervals(probabilities, labels, resamples=50, seed=3)
    expected = [name for position, name in enumerate(FINDINGS) if position not in (7, 9)]
    assert list(intervals) == expected, "8 positives are too few, and without others there is no area"
    drawn = np.random.default_rng(3).multinomial(60, np.full(60, 1 / 60), size=50)
    areas = []
    for counts in drawn:
        rows = np.repeat(np.arange(60), counts)
        areas.append([])
        for position in range(14):
            known = rows[labels[rows, position] != -100]
            if position not in (7, 9):
                areas[-1].append(
                    sklearn_metrics.roc_auc_score(labels[known, position] == 1, probabilities[known, position])
                )
    for position, bounds in enumerate(intervals.values()):
        assert bounds == pytest.approx(np.quantile([row[position] for row in areas], [0.025, 0.975]), abs=1e-12)
    low, high = np.quantile(np.mean(areas, axis=1), [0.025, 0.975])
    assert (macro["low"], macro["high"]) == pytest.approx((low, high), abs=1e-12)
    assert macro["low"] < macro["auc"] < macro["high"]
    assert (macro["findings"], macro["resamples"], macro["above_half"]) == (12, 50, bool(low > 0.5))
    assert auc_intervals(probabilities, labels, 50, 3) == (macro, intervals)
    assert auc_intervals(probabilities, labels, 50, 4) != (macro, intervals)


@pytest.mark.parametrize(("shift", "above_half"), [(0.2, True), (0.0, False)])
def test_macro_auc_interval_of_random_predictor_includes_half(shift, above_half):
    probabilities, labels = made_predictions(np.random.default_rng(6), 200, shift)
    predicted = (probabilities >= 0.5).astype(int)
    metrics = finding_metrics(probabilities, predicted, labels, resamples=200)
    assert metrics["macro_auc_interval"]["above_half"] is above_half
    assert metrics["macro_auc_interval"]["auc"] == pytest.approx(metrics["macro_auc"])
    assert metrics["macro_ece"] == pytest.approx(np.mean([row["ece"] for row in metrics["findings"].values()]))
    lines = format_metrics(metrics).splitlines()
    assert len(lines) == 2 + 14 + 2 and {line.count("|") for line in lines[:16]} == {9}
    assert lines[-1].endswith(" above 0.5") and ("not above" in lines[-1]) != above_half
    assert "ECE" in lines[0] and " to " in lines[2]


def test_finding_metrics_without_positives_have_no_interval():
    probabilities, labels = made_predictions(np.random.default_rng(7), 20, 0.2, share=0.0)
    metrics = finding_metrics(probabilities, labels.clip(0), labels, resamples=20)
    assert metrics["macro_auc"] is None and metrics["macro_auc_interval"] is None
    assert all(row["auc_interval"] is None for row in metrics["findings"].values())
    assert "–" in format_metrics(metrics)


def test_logit_adjustment_is_the_log_of_the_smoothed_prior():
    states = np.random.default_rng(8).choice(4, (50, 14), p=[0.7, 0.2, 0.1, 0.0])
    adjustment = logit_adjustment(states.tolist(), tau=0.5)
    for position in range(14):
        counts = np.bincount(states[:, position], minlength=4) + 1
        assert adjustment[position].numpy() == pytest.approx(0.5 * np.log(counts / 54), abs=1e-6)
    assert logit_adjustment(states.tolist(), tau=0.0) is None


def test_logit_adjustment_removes_the_gradient_towards_frequent_states():
    states = torch.from_numpy(np.random.default_rng(9).choice(4, (4000, 14), p=[0.7, 0.2, 0.07, 0.03]))

    def gradient(adjustment):
        logits = torch.zeros(14, 4, requires_grad=True)
        focal_loss((logits + adjustment).expand(4000, 14, 4), states, gamma=0.0).backward()
        return logits.grad.abs().max().item() * 14

    assert gradient(0.0) > 0.4
    assert gradient(logit_adjustment(states.tolist(), tau=1.0)) < 1e-3
