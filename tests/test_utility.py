"""Utility of pairs of reports: the scores of pycocoevalcap, and a slow formula for smoothed BLEU."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from otdrg.utility_otdrg import ReportUtility
from pycocoevalcap.cider.cider_scorer import CiderScorer
from pycocoevalcap.rouge.rouge import Rouge

REFERENCES = [
    "the heart is normal in size . the lungs are clear .",
    "the heart is enlarged . no pleural effusion . no no no",
    "heart size is normal . the lungs are clear . no pleural effusion or pneumothorax .",
    "clear",
]
CANDIDATES = [REFERENCES[2], "the lungs are are clear . no no pneumothorax .", "unseen words only", "clear"]


def test_utility_rouge_l_equals_pycocoevalcap():
    rouge = Rouge()
    expected = [[rouge.calc_score([written], [true]) for true in REFERENCES] for written in CANDIDATES]
    assert ReportUtility(REFERENCES, weights={"rouge_l": 1})(CANDIDATES) == pytest.approx(np.array(expected))


def test_utility_cider_equals_pycocoevalcap_with_document_frequencies_of_the_studies():
    counts = [3, 1, 2, 1]
    found = ReportUtility(REFERENCES, counts, {"cider": 1})(CANDIDATES)
    studies = [place for place, count in enumerate(counts) for _ in range(count)]
    for row, written in enumerate(CANDIDATES):
        scorer = CiderScorer()
        for place in studies:
            scorer += (written, [REFERENCES[place]])
        assert found[row, studies] == pytest.approx(scorer.compute_score()[1], abs=1e-9)


def smoothed_bleu(written, true):
    written, true = written.split(), true.split()
    total = 0.0
    for order in range(4):
        ours, theirs = (Counter(zip(*(words[i:] for i in range(order + 1)), strict=False)) for words in (written, true))
        matches, smoothing = sum((ours & theirs).values()), 0.1 if order else 0.0
        if not matches + smoothing:
            return 0.0
        total += math.log((matches + smoothing) / (max(len(written) - order, 1) + smoothing)) / 4
    return math.exp(total + min(0, 1 - len(true) / max(len(written), 1)))


WORDS = st.lists(st.sampled_from("abc"), max_size=30).map(" ".join)


@settings(max_examples=40, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=3), WORDS)
def test_utility_bleu_equals_the_formula(references, candidate):
    found = ReportUtility(references, weights={"bleu_4": 1})([candidate])[0]
    assert found == pytest.approx([smoothed_bleu(candidate, reference) for reference in references], abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=3), st.lists(WORDS, min_size=1, max_size=3))
def test_utility_is_the_weighted_sum_of_its_scores(references, candidates):
    parts = [ReportUtility(references, weights={name: 1})(candidates) for name in ("rouge_l", "bleu_4", "cider")]
    assert ReportUtility(references)(candidates) == pytest.approx(parts[0] + parts[1] + 0.1 * parts[2])
