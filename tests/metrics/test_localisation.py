"""Maps with known places, against masks with known places, and what chance gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from otdrg.evaluation.localisation import localisation_table, localisation_verdicts
from otdrg.metrics import judge_maps, localisation_scores, pointing_game, soft_iou
from otdrg.metrics.localisation import MINIMUM_STUDIES, JudgedMap

MASKS = arrays(bool, (1, 5, 6)).filter(np.any)


def square(top, left, side=2, size=8):
    mask = np.zeros((size, size), dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


@settings(deadline=None)
@given(MASKS)
def test_measures_of_the_mask_are_perfect_and_of_a_uniform_map_at_chance(mask):
    assert pointing_game(0.3 * mask, mask) == pytest.approx(1)
    assert soft_iou(0.3 * mask, mask) == pytest.approx(1)
    for height in (1.0, 1e-6, 40.0):
        uniform = np.full(mask.shape, height)
        assert pointing_game(uniform, mask) == pytest.approx(mask.mean())
        assert soft_iou(uniform, mask) == pytest.approx(mask.mean())


@settings(deadline=None)
@given(MASKS, arrays(float, (1, 5, 6), elements=st.floats(0, 10)), st.floats(0.01, 100))
def test_soft_iou_does_not_depend_on_scale(mask, heat, scale):
    scaled = heat / heat.max() if heat.any() else heat
    expected = np.minimum(scaled, mask).sum() / np.maximum(scaled, mask).sum()
    assert soft_iou(heat, mask) == pytest.approx(expected)
    assert soft_iou(heat * scale, mask) == pytest.approx(expected)
    assert 0 <= pointing_game(heat, mask) <= 1


def test_pointing_game_with_equal_peaks_shares_the_hit():
    mask, heat = square(2, 2), np.ones((8, 8))
    heat[3, 3] = 2.0
    assert pointing_game(heat[None], mask[None]) == 1
    heat[6, 6] = 2.0
    assert pointing_game(heat[None], mask[None]) == 0.5
    heat[6, 6] = 2.1
    assert pointing_game(heat[None], mask[None]) == 0
    # What differs by rounding is as high.
    heat[6, 6] = 2.0 + 1e-7
    assert pointing_game(heat[None], mask[None]) == 0.5


def test_measures_of_an_empty_map_are_zero():
    assert pointing_game(np.zeros((1, 8, 8)), square(0, 0)[None]) == 0
    assert soft_iou(np.zeros((1, 8, 8)), square(0, 0)[None]) == 0


def test_measures_name_wrong_maps():
    with pytest.raises(ValueError, match=r"shape \(1, 4, 4\), masks \(1, 8, 8\)"):
        pointing_game(np.ones((1, 4, 4)), square(0, 0)[None])
    for value in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="negative or non-finite"):
            soft_iou(np.full((1, 8, 8), value), square(0, 0)[None])


def test_judge_maps_others_is_the_mean_of_other_studies_maps():
    masks = np.stack([square(0, 0), square(0, 0), square(4, 4)])
    judged = judge_maps("edema", 1, [5, 7, 8], masks.astype(float), masks)
    assert [one.study for one in judged] == [5, 7, 8]
    assert all((one.finding, one.view, one.uniform) == ("edema", 1, 4 / 64) for one in judged)
    assert [one.pointing for one in judged] == [1, 1, 1]
    assert [one.pointing_others for one in judged] == [0.5, 0.5, 0]
    assert [one.soft_iou_others for one in judged] == [0.5, 0.5, 0]
    (alone,) = judge_maps("edema", 1, [5], masks[:1].astype(float), masks[:1])
    assert alone.pointing == 1 and np.isnan(alone.pointing_others) and np.isnan(alone.soft_iou_others)


def made(finding, hits, uniform=0.1, others=0.2, view=0, first=0):
    return [
        JudgedMap(first + study, finding, view, uniform, hit, hit / 2, others, others / 2)
        for study, hit in enumerate(hits)
    ]


def test_localisation_scores_are_means_over_studies_and_findings():
    judged = made("edema", [1.0] * 6 + [0.0] * 6) + made("fracture", [1.0] * 12) + made("pneumonia", [1.0] * 3)
    judged += made("edema", [0.0] * 6, view=1)  # The other view of the first six.
    scores = localisation_scores(judged, studies=20)
    edema, fracture, pneumonia = (scores["findings"][name] for name in ("edema", "fracture", "pneumonia"))
    assert list(scores["findings"]) == ["edema", "pneumonia", "fracture"]
    assert (edema["studies"], edema["pointing"]["value"]) == (12, 0.25)
    assert fracture["soft_iou"]["value"] == 0.5
    assert fracture["pointing"]["uniform"]["level"] == pytest.approx(0.1)
    assert fracture["soft_iou"]["others"]["difference"] == pytest.approx(0.4)
    assert scores["macro"]["findings"] == 2 and scores["macro"]["studies"] == 12
    assert scores["macro"]["pointing"]["value"] == pytest.approx((0.25 + 1) / 2)
    assert pneumonia["pointing"]["value"] == 1 and pneumonia["pointing"]["low"] is None
    assert pneumonia["pointing"]["uniform"]["verdict"] is None


def test_localisation_interval_equals_a_bootstrap_over_studies():
    rng = np.random.default_rng(0)
    hits = (rng.random(80) < 0.3).astype(float)
    score = localisation_scores(made("edema", hits), studies=80, resamples=4000)["findings"]["edema"]["pointing"]
    spread = 1.96 * np.sqrt(hits.mean() * (1 - hits.mean()) / 80)
    assert score["low"] == pytest.approx(hits.mean() - spread, abs=0.02)
    assert score["high"] == pytest.approx(hits.mean() + spread, abs=0.02)
    assert score["uniform"]["low"] == pytest.approx(score["low"] - 0.1)


def test_localisation_verdicts_are_above_at_or_below_chance():
    rng = np.random.default_rng(1)
    judged = made("edema", (rng.random(60) < 0.9).astype(float)) + made("fracture", [0.0] * 60)
    judged += made("pneumonia", (rng.random(60) < 0.5).astype(float), others=0.5)
    judged += made("atelectasis", [0.1] * 60, others=0.1) + made("cardiomegaly", [1.0] * (MINIMUM_STUDIES - 1))
    scores = localisation_scores(judged, studies=60)
    verdicts = {
        name: (row["pointing"]["uniform"]["verdict"], row["pointing"]["others"]["verdict"])
        for name, row in scores["findings"].items()
    }
    assert verdicts == {
        "edema": ("above", "above"),
        "fracture": ("below", "below"),
        "pneumonia": ("above", "at"),
        "atelectasis": ("at", "at"),
        "cardiomegaly": (None, None),
    }
    cells = {row.split(" | ")[0]: row.split(" | ")[6] for row in localisation_table(scores).splitlines()}
    assert cells["| Edema"] == "yes"
    assert cells["| Fracture"] == "no, below it"
    assert cells["| Pneumonia"] == "only a uniform map"
    assert cells["| Atelectasis"] == "no"
    assert cells["| Cardiomegaly"] == "too few studies"
    assert "Of 4 findings with at least 10 studies 1 beat" in localisation_verdicts(scores)[-1]


@pytest.mark.parametrize(
    ("hits", "words"),
    [([1.0] * 20, "beats chance"), ([0.1] * 20, "does not beat chance"), ([0.0] * 20, "is below chance")],
)
def test_localisation_verdict_on_average_is_a_sentence(hits, words):
    scores = localisation_scores(made("edema", hits, others=0.1), studies=20)
    assert localisation_verdicts(scores)[0].startswith(f"On average, the pointing game {words}: ")


def test_localisation_scores_of_few_studies_have_no_verdict():
    scores = localisation_scores(made("edema", [1.0]), studies=20)
    assert scores["macro"] is None
    assert localisation_verdicts(scores)[0].startswith("Too few studies")
    assert localisation_scores([], studies=20) == {"findings": {}, "macro": None}
