"""Nearest neighbours as scikit-learn finds them, and ROUGE-L as pycocoevalcap computes it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from otdrg.metrics.retrieval import nearest_neighbours
from otdrg.utility_otdrg import Subsequences, rouge_l_matrix
from pycocoevalcap.rouge.rouge import Rouge, my_lcs
from sklearn.neighbors import NearestNeighbors

REPORTS = [
    "the heart is normal in size . the lungs are clear .",
    "the heart is enlarged . no pleural effusion .",
    "heart size is normal . the lungs are clear . no pleural effusion or pneumothorax .",
    "there is a  small effusion",
    "clear",
]


def test_nearest_neighbours_equal_scikit_learn(monkeypatch):
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(40, 8)) + 1, rng.normal(size=(70, 8)) + 1
    expected = NearestNeighbors(metric="cosine").fit(keys).kneighbors(queries, 30, return_distance=False)
    assert (nearest_neighbours(queries, keys, 30) == expected).all()
    monkeypatch.setattr("otdrg.metrics.retrieval._BLOCK", 100)
    assert (nearest_neighbours(queries, keys, 30) == expected).all()


def test_nearest_neighbours_with_ties_keep_the_order():
    keys = np.array([[0.0, 1.0], [2.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    assert nearest_neighbours(np.array([[1.0, 0.0], [0.0, 0.0]]), keys, 4).tolist() == [[1, 2, 3, 0], [0, 1, 2, 3]]


def test_rouge_l_matrix_equals_pycocoevalcap():
    rouge = Rouge()
    expected = [[rouge.calc_score([written], [true]) for true in REPORTS] for written in REPORTS]
    assert rouge_l_matrix(REPORTS, REPORTS) == pytest.approx(np.array(expected), abs=1e-12)


WORDS = st.lists(st.sampled_from("abc"), max_size=90)


@given(st.lists(WORDS, min_size=1, max_size=4), WORDS)
def test_longest_common_subsequences_equal_pycocoevalcap(reports, other):
    found = Subsequences(reports).common([other])
    expected = [my_lcs(words, other) for words in reports]
    assert found[0].tolist() == expected


@pytest.mark.parametrize(
    ("queries", "keys", "count", "message"),
    [
        ((2, 3), (4, 5), 1, r"queries have shape \(2, 3\), keys \(4, 5\)"),
        ((2, 3), (4, 3), 5, "count is 5: expected 1 to 4"),
    ],
)
def test_retrieval_names_faults(queries, keys, count, message):
    with pytest.raises(ValueError, match=message):
        nearest_neighbours(np.ones(queries), np.ones(keys), count)
