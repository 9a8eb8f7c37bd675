"""Resampled scores against scores of the resampled studies, and intervals and tests against scipy's."""

import shutil

import numpy as np
import pytest
from otdrg.metrics import (
    bootstrap_intervals,
    clinical_efficacy_scores,
    compare_systems,
    nlg_scores,
    paired_bootstrap,
    paired_permutation,
    score_reports,
)
from otdrg.metrics.metric import MetricResult
from otdrg.metrics.significance import StudyStatistics, resample_weights
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.meteor.meteor import Meteor
from scipy import stats

STUDIES = 30
WORDS = ["the", "heart", "lungs", "are", "clear", "normal", "no", "effusion", "is", "seen", "small", "left", "."]
FLUENCY = ["bleu", "rouge_l", "cider"]
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no java on the PATH")


def made_texts(rng, truth=None):
    """Reports of random words; near the true ones, if these are given."""
    if truth is None:
        return [" ".join(rng.choice(WORDS, rng.integers(3, 25))) for _ in range(STUDIES)]
    return [
        " ".join(
            word if keep else rng.choice(WORDS) for word, keep in zip(t.split(), rng.random(99) < 0.8, strict=False)
        )
        for t in truth
    ]


def made_states(rng, truth=None):
    states = rng.choice(4, (STUDIES, 14), p=[0.6, 0.2, 0.1, 0.1])
    return states if truth is None else np.where(rng.random(truth.shape) < 0.7, truth, states)


@pytest.fixture(scope="module")
def truth():
    rng = np.random.default_rng(0)
    return made_texts(rng), made_states(rng)


@pytest.fixture(scope="module")
def runs(truth):
    """Texts, states and statistics of four runs."""
    made = []
    for seed in range(1, 5):
        rng = np.random.default_rng(seed)
        texts, states = made_texts(rng, truth[0]), made_states(rng, truth[1])
        made.append((texts, states, score_reports(texts, truth[0], states, truth[1], FLUENCY).statistics))
    return made


@pytest.fixture(scope="module")
def systems(runs):
    return [statistics for _, _, statistics in runs]


def chosen(weights):
    return np.repeat(np.arange(STUDIES), weights.astype(int))


def test_aggregates_of_a_resample_equal_scores_of_its_studies(truth, runs):
    texts, states, statistics = runs[0]
    (weights,) = resample_weights(STUDIES, 20, seed=5)
    assert weights.shape == (20, STUDIES) and (weights.sum(axis=1) == STUDIES).all()
    scores = statistics.aggregates(weights)
    for row, studies in enumerate(map(chosen, weights)):
        true, written = ({n: [side[i]] for n, i in enumerate(studies)} for side in (truth[0], texts))
        bleu = Bleu(4).compute_score(true, written, verbose=0)[0]
        assert [scores[f"bleu_{order}"][row] for order in (1, 2, 3, 4)] == bleu
        clinical = clinical_efficacy_scores(states[studies], truth[1][studies])
        averages = [name for name in clinical if name.startswith(("example_", "micro_", "macro_"))]
        assert len(averages) == 54
        assert [scores[name][row] for name in averages] == pytest.approx([clinical[n] for n in averages], abs=1e-12)
        rouge = nlg_scores([texts[i] for i in studies], [truth[0][i] for i in studies], ["rouge_l"])
        assert scores["rouge_l"][row] == pytest.approx(rouge["rouge_l"], abs=1e-12)


def test_aggregates_of_all_studies_equal_the_scores(truth, runs):
    for texts, states, statistics in runs:
        scores = statistics.aggregates()
        known = {**nlg_scores(texts, truth[0], FLUENCY), **clinical_efficacy_scores(states, truth[1])}
        assert len(scores) == 6 + 54
        assert {name: value[0] for name, value in scores.items()} == pytest.approx(
            {name: known[name] for name in scores}, abs=1e-12
        )


@needs_java
@pytest.mark.slow
def test_aggregates_of_a_resample_have_javas_meteor(truth, runs):
    texts, references = list(runs[0][0]), list(truth[0])
    texts[0], texts[1], texts[2] = "", references[1], "hearts are enlarging with sizes beyond the typical"
    scored = score_reports(texts, references, metrics=["meteor"])
    statistics = scored.statistics
    alone = statistics.aggregates(np.eye(STUDIES))["meteor"]
    assert alone == pytest.approx(scored.per_study["meteor"], abs=1e-12)
    assert statistics.aggregates()["meteor"] == pytest.approx(scored.scores["meteor"], abs=1e-12)
    (weights,) = resample_weights(STUDIES, 8, seed=0)
    scorer = Meteor()
    for value, studies in zip(statistics.aggregates(weights)["meteor"], map(chosen, weights), strict=True):
        true, written = ({n: [side[i]] for n, i in enumerate(studies)} for side in (references, texts))
        assert value == pytest.approx(scorer.compute_score(true, written)[0], abs=1e-12)
    for stream in (scorer.meteor_p.stdout, scorer.meteor_p.stderr):
        stream.close()


def test_bootstrap_intervals_of_means_equal_scipy(runs, systems):
    name = "example_f1_14_uncertain_negative"
    values = np.array(clinical_efficacy_scores(runs[0][1], runs[1][1])["per_study"]["f1_14_uncertain_negative"])
    statistics = score_reports(runs[0][0], runs[1][0], runs[0][1], runs[1][1], []).statistics
    ours = bootstrap_intervals(statistics, resamples=20000)[name]
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=1).confidence_interval
    assert ours.value == pytest.approx(values.mean(), abs=1e-12)
    spread = theirs.high - theirs.low
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03 * spread)


@pytest.mark.parametrize("name", ["rouge_l", "example_f1_13_uncertain_positive"])
def test_paired_tests_of_means_equal_scipy(truth, runs, systems, name):
    def per_study(texts, states):
        if name == "rouge_l":
            return np.array(nlg_scores(texts, truth[0], ["rouge_l"])["per_study"]["rouge_l"])
        return np.array(clinical_efficacy_scores(states, truth[1])["per_study"]["f1_13_uncertain_positive"])

    mine, other = (per_study(texts, states) for texts, states, _ in runs[:2])

    def difference(x, y, axis):
        return x.mean(axis=axis) - y.mean(axis=axis)

    permuted = stats.permutation_test(
        (mine, other), difference, permutation_type="samples", vectorized=True, n_resamples=20000, rng=1
    )
    drawn = stats.bootstrap(
        (mine, other), difference, vectorized=True, paired=True, n_resamples=20000, method="percentile", rng=1
    )
    ours = compare_systems(systems[0], systems[1], resamples=20000)[name]
    assert ours.difference == pytest.approx((mine - other).mean(), abs=1e-12)
    assert ours.p_permutation == pytest.approx(permuted.pvalue, abs=0.02)
    low, high = drawn.confidence_interval
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.03 * (high - low))
    below = np.mean(drawn.bootstrap_distribution <= 0)
    assert ours.p_bootstrap == pytest.approx(2 * min(below, 1 - below), abs=0.02)


def test_permutation_of_macro_f1_equals_exchanged_reports(truth, runs, systems):
    """Macro F1, which is no mean, against exchanging reports by hand."""
    name = "macro_f1_13_uncertain_negative"
    (_, mine, _), (_, other, _) = runs[:2]
    rng = np.random.default_rng(0)

    def difference(first, second):
        return clinical_efficacy_scores(first, truth[1])[name] - clinical_efficacy_scores(second, truth[1])[name]

    observed, beyond = abs(difference(mine, other)), 0
    for _ in range(400):
        swap = rng.integers(2, size=(STUDIES, 1)).astype(bool)
        beyond += abs(difference(np.where(swap, other, mine), np.where(swap, mine, other))) >= observed - 1e-12
    expected = beyond / 400
    assert paired_permutation(systems[0], systems[1], 5000)[name] == pytest.approx(expected, abs=0.08)


def test_compare_systems_averages_runs(systems):
    mine, other = systems[:2], systems[2:]
    compared = compare_systems(mine, other)
    (weights,) = resample_weights(STUDIES, 1000, seed=0)
    for name in ("bleu_4", "cider", "macro_f1_13_uncertain_negative"):
        values = [np.mean([run.aggregates()[name][0] for run in runs]) for runs in (mine, other)]
        assert compared[name].value == pytest.approx(values[0], abs=1e-12)
        assert compared[name].difference == pytest.approx(values[0] - values[1], abs=1e-12)
        drawn = [np.mean([run.aggregates(weights)[name] for run in runs], axis=0) for runs in (mine, other)]
        expected = np.percentile(drawn[0] - drawn[1], [2.5, 97.5])
        assert (compared[name].low, compared[name].high) == pytest.approx(tuple(expected), abs=1e-12)
        assert bootstrap_intervals(mine)[name].value == pytest.approx(values[0], abs=1e-12)


def test_paired_bootstrap_with_resampled_runs_is_wider(systems):
    def width(runs, name, drawn):
        found = paired_bootstrap(runs, systems[1], resample_runs=drawn)[name]
        return found.high - found.low

    score = "macro_f1_13_uncertain_negative"
    assert width(systems, score, True) > width(systems, score, False)
    # Three equal runs have no spread of their own, whichever are drawn.
    equal = [systems[0]] * 3
    assert width(equal, "bleu_4", True) == pytest.approx(width(equal, "bleu_4", False), abs=1e-12)


def test_compare_systems_of_equal_and_worse_systems(truth, systems):
    for comparison in compare_systems(systems[0], systems[0]).values():
        assert comparison[2:] == (0, 0, 0, 1, 1)
    rng = np.random.default_rng(9)
    worse = score_reports(made_texts(rng), truth[0], made_states(rng), truth[1], FLUENCY).statistics
    compared, turned = compare_systems(systems[0], worse), compare_systems(worse, systems[0])
    for name in ("bleu_4", "rouge_l", "micro_f1_14_uncertain_negative"):
        assert compared[name].low > 0
        assert compared[name].p_bootstrap == pytest.approx(2 / 1001)
        assert compared[name].p_permutation == pytest.approx(1 / 1001)
        assert turned[name].difference == -compared[name].difference
        assert (turned[name].low, turned[name].high) == pytest.approx((-compared[name].high, -compared[name].low))


def test_compare_systems_is_seeded_and_independent_of_blocks(monkeypatch, systems):
    first = compare_systems(systems[0], systems[1], resamples=50, seed=3)
    assert compare_systems(systems[0], systems[1], resamples=50, seed=3) == first
    assert compare_systems(systems[0], systems[1], resamples=50, seed=4) != first
    monkeypatch.setattr("otdrg.metrics.significance._BLOCK", 7 * STUDIES)
    again = compare_systems(systems[0], systems[1], resamples=50, seed=3)
    assert np.array(list(again.values())) == pytest.approx(np.array(list(first.values())), abs=1e-12)


def test_paired_bootstrap_compares_common_scores(truth, runs):
    texts, _, statistics = runs[0]
    only = score_reports(texts, truth[0], metrics=["cider"]).statistics
    assert list(paired_bootstrap(statistics, only, 10)) == ["cider"]


def test_significance_names_faults(truth, runs, systems):
    texts, states, _ = runs[0]
    fewer = score_reports(texts[:-1], truth[0][:-1], states[:-1], truth[1][:-1], []).statistics
    faults = [
        (lambda: score_reports(texts, truth[0], metrics=[]), "none named, and no states given"),
        (lambda: score_reports(texts, truth[0], states), "true_states: one is given without the other"),
        (
            lambda: score_reports(texts, truth[0], states[:-1], truth[1][:-1]),
            "different studies, expected as many of each: .*'references': 30, 'states': 29",
        ),
        (lambda: bootstrap_intervals([]), "runs: no run given"),
        (lambda: bootstrap_intervals([systems[0], fewer]), r"runs: \[30, 29\] studies"),
        (lambda: bootstrap_intervals(systems[0], resamples=0), "resamples is 0"),
        (lambda: paired_bootstrap(systems[0], systems[1], confidence=95), "confidence is 95"),
        (lambda: paired_bootstrap(systems[0], fewer), "system: 30 studies, against: 29"),
        (lambda: paired_permutation(systems[:2], systems[0]), "system: 2 runs, against: 1"),
    ]
    for fault, message in faults:
        with pytest.raises(ValueError, match=message):
            fault()


def with_values(*columns):
    """Statistics of one metric whose scores are the means of these columns; NaN is a study without a value."""
    result = MetricResult.from_means({f"score {place}": column for place, column in enumerate(columns)})
    return StudyStatistics({"mine": result}, {"mine": list(result.scores)})


@pytest.mark.parametrize("lacking", ["ours", "theirs", "both"])
def test_compare_systems_with_missing_values_is_of_the_common_studies(lacking):
    rng = np.random.default_rng(2)
    theirs = rng.random(STUDIES)
    ours = theirs + 0.2 + 0.3 * rng.random(STUDIES)
    if lacking != "theirs":
        ours[3] = np.nan
    if lacking != "ours":
        theirs[[3, 8]] = np.nan
    known = ~np.isnan(ours) & ~np.isnan(theirs)
    found = compare_systems(with_values(ours), with_values(theirs), resamples=2000)["score 0"]
    alone = compare_systems(with_values(ours[known]), with_values(theirs[known]), resamples=2000)["score 0"]
    assert found[:3] == pytest.approx(alone[:3], abs=1e-12)
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high), abs=0.02)
    assert found.p_permutation == alone.p_permutation < 0.01 and found.p_bootstrap == alone.p_bootstrap < 0.01


def test_a_system_with_missing_values_does_not_differ_from_itself():
    values = np.random.default_rng(0).random(STUDIES)
    gapped = values.copy()
    gapped[4] = np.nan
    found = compare_systems(with_values(values, values), with_values(gapped, values))
    assert found["score 0"][2:] == found["score 1"][2:] == (0, 0, 0, 1, 1)


def test_scores_that_few_studies_have_get_no_interval():
    few, none, values = np.full(STUDIES, np.nan), np.full(STUDIES, np.nan), np.linspace(0, 1, STUDIES)
    few[[1, 2]] = 0.5
    statistics = with_values(few, none, values)
    assert list(bootstrap_intervals(statistics)) == ["score 2"]
    for compare in (paired_bootstrap, compare_systems):
        assert list(compare(statistics, with_values(values, values, values))) == ["score 2"]
