"""The best constant report: chosen as an exhaustive search would."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from otdrg import FINDINGS
from otdrg.labelers import load_labeler
from otdrg.metrics import all_positive_report, best_constants, clinical_efficacy_scores, nlg_scores
from otdrg.metrics.constant_scores import NGramCounts, clinical_scores, rouge_l_scores
from otdrg.metrics.corpus import bleu_of_counts
from otdrg.studies.cleaning import clean_report

LABELER = load_labeler("rules")
HEARTS = ["heart size is normal .", "the heart is enlarged .", "there is mild cardiomegaly ."]
LUNGS = ["the lungs are clear .", "there is a small left pleural effusion .", "patchy basilar atelectasis ."]
FLUENCY = ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"]

#: Few words, so that n-grams repeat within and between reports; with empty words, as double spaces make them.
WORDS = st.lists(st.sampled_from(["a", "b", "c", "."]), max_size=12)
REPORTS = st.builds(lambda words, gap: gap.join(words), WORDS, st.sampled_from([" ", "  "]))
STATES = st.lists(st.integers(0, 3), min_size=14, max_size=14)


@pytest.fixture(scope="module")
def reports():
    rng = np.random.default_rng(0)
    return [f"{HEARTS[a]} {LUNGS[b]}" for a, b in zip(rng.choice(3, 80), rng.choice(3, 80), strict=True)]


def test_best_constants_equal_an_exhaustive_search(reports):
    states = LABELER.label(reports)
    best = best_constants(reports, states, LABELER, [*FLUENCY, "macro_f1_13", "example_f1_14_uncertain_positive"])
    assert list(best.reports) == [*FLUENCY, "macro_f1_13", "example_f1_14_uncertain_positive"]
    candidates = list(dict.fromkeys(reports))
    by_report = {report: nlg_scores([report] * 80, reports, FLUENCY) for report in candidates}
    for column in FLUENCY:
        assert best.scores[column] == pytest.approx(max(it[column] for it in by_report.values()), abs=1e-9)
        assert best.scores[column] == pytest.approx(by_report[best.reports[column]][column], abs=1e-9)
    candidates.append(all_positive_report(candidates, LABELER.label(candidates)))
    for column, name in (("macro_f1_13", "macro_f1_13_uncertain_negative"), ("example_f1_14_uncertain_positive",) * 2):
        by_report = {
            report: clinical_efficacy_scores(np.tile(LABELER.label([report]), (80, 1)), states)[name]
            for report in candidates
        }
        assert best.scores[column] == pytest.approx(max(by_report.values()), abs=1e-12)
        assert best.scores[column] == pytest.approx(by_report[best.reports[column]], abs=1e-12)
    assert best.notes == []


@given(st.lists(REPORTS, min_size=1, max_size=5), st.lists(REPORTS, min_size=1, max_size=8))
@settings(deadline=None, max_examples=25)
def test_constant_scores_are_those_of_nlg_scores(candidates, references):
    references = [*references, "a b ."]
    candidates = list(dict.fromkeys(candidates))
    weights = Counter(references)
    distinct, counts = list(weights), np.array(list(weights.values()))
    ngrams = NGramCounts(candidates, distinct, counts)
    found = [*bleu_of_counts(ngrams.bleu_counts()).T, rouge_l_scores(candidates, distinct, counts), ngrams.cider()]
    for place, candidate in enumerate(candidates):
        expected = nlg_scores([candidate] * len(references), references, FLUENCY)
        assert [scores[place] for scores in found] == pytest.approx([expected[name] for name in FLUENCY], abs=1e-9)


@given(st.lists(STATES, min_size=1, max_size=4), st.lists(STATES, min_size=1, max_size=6))
@settings(deadline=None, max_examples=30)
def test_constant_scores_are_those_of_clinical_efficacy_scores(candidates, true):
    found = clinical_scores(np.array(candidates), np.array(true))
    for place, row in enumerate(candidates):
        expected = clinical_efficacy_scores([row] * len(true), true)
        assert {name: scores[place] for name, scores in found.items()} == pytest.approx(
            {name: expected[name] for name in found}, abs=1e-12
        )


def test_blocks_do_not_change_constant_scores(reports, monkeypatch):
    states = LABELER.label(reports)
    whole = best_constants(reports, states, LABELER)
    monkeypatch.setattr("otdrg.metrics.constant_scores._BLOCK", 3)
    monkeypatch.setattr("otdrg.utility_otdrg._BLOCK", 2)
    in_blocks = best_constants(reports, states, LABELER)
    assert in_blocks.reports == whole.reports and in_blocks.scores == pytest.approx(whole.scores, abs=1e-12)


def test_rouge_l_of_too_many_pairs_is_screened_and_noted(reports, monkeypatch):
    whole = best_constants(reports, columns=["rouge_l"])
    monkeypatch.setattr("otdrg.metrics.baselines.MOST_PAIRS", 40)
    screened = best_constants(reports, columns=["rouge_l"], seed=3)
    assert screened == best_constants(reports, columns=["rouge_l"], seed=3)
    # All 9 are among the 100 that meet all references.
    assert screened.reports == whole.reports and screened.scores == pytest.approx(whole.scores)
    assert "9 that score highest on 4 of 9 distinct training reports" in screened.notes[0]


@pytest.mark.slow  # Java is started three times
@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs Java")
def test_meteor_constant_of_two_reports_is_the_better_one():
    reports = [HEARTS[0]] * 3 + [f"{HEARTS[0]} {LUNGS[0]} {LUNGS[1]}"] * 2
    best = best_constants(reports, columns=["meteor"])
    scores = {report: nlg_scores([report] * 5, reports, ["meteor"])["meteor"] for report in set(reports)}
    assert best.scores["meteor"] == pytest.approx(max(scores.values()), abs=1e-6)
    assert scores[best.reports["meteor"]] == max(scores.values())
    assert "among 2 of 2 candidates on 5 of 5 training reports" in best.notes[0]


def test_meteor_constant_without_java_is_noted(reports, monkeypatch):
    monkeypatch.setenv("PATH", "")
    best = best_constants(reports, columns=["bleu_4", "meteor"])
    assert list(best.reports) == ["bleu_4"]
    assert best.notes[0].startswith("no best constant report for METEOR: METEOR 1.5 runs on Java")


def test_best_constants_names_faults(reports):
    states = LABELER.label(reports)
    with pytest.raises(ValueError, match="reports: none of 2 holds a word"):
        best_constants(["", " "], columns=["cider"])
    with pytest.raises(ValueError, match="columns macro_f1_13: expected states and a labeler"):
        best_constants(reports)
    with pytest.raises(ValueError, match="states: 1, reports: 80"):
        best_constants(reports, states[:1], LABELER)
    with pytest.raises(ValueError, match=r"unknown columns \['bleurt'\]"):
        best_constants(reports, columns=["bleurt"])
    with pytest.raises(ValueError, match=r"unknown columns \['macro_f2'\]"):
        best_constants(reports, states, LABELER, ["macro_f2"])


@pytest.mark.skipif("OTDRG_IU_XRAY" not in os.environ, reason="OTDRG_IU_XRAY does not name the IU X-Ray folder")
def test_best_constant_of_iu_x_ray_has_the_scores_of_the_design():
    annotation = json.loads((Path(os.environ["OTDRG_IU_XRAY"]) / "annotation.json").read_text(encoding="utf-8"))
    train, truth = (
        [clean_report(study["report"], "r2gen_iu") for study in annotation[split]] for split in ("train", "val")
    )
    best = best_constants(train, columns=["bleu_4"])
    scores = nlg_scores([best.reports["bleu_4"]] * len(truth), truth, ["bleu_1", "bleu_4", "rouge_l", "cider"])
    expected = {"bleu_1": 0.524, "bleu_4": 0.180, "rouge_l": 0.348, "cider": 0.335}
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=5e-4)


def test_all_positive_report_has_every_finding_some_report_has():
    reports = [
        "There is edema.",
        "There is pulmonary edema and more words.",
        "The heart is enlarged.",
        "The heart is normal.",
    ]
    labeler = load_labeler("rules")
    report = all_positive_report(reports, labeler.label(reports))
    assert report == "The heart is enlarged. There is edema."
    states = labeler.label([report])[0]
    assert {FINDINGS[position] for position in np.flatnonzero(states == 1)} == {"cardiomegaly", "edema"}


def test_all_positive_report_of_normal_reports_is_empty():
    reports = ["The heart is normal."]
    assert all_positive_report(reports, load_labeler("rules").label(reports)) == ""
