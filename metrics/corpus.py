"""BLEU and METEOR of a corpus from the sums of what its reports add to them.

Neither is a mean over reports: both are computed by pycocoevalcap, and by METEOR's Java, from counts that are summed
first. With the counts of each report at hand, the score of any resample of them is one sum away.
"""

from collections.abc import Sequence

import numpy as np

try:
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
except ImportError as error:
    raise ImportError('the NLG metrics need pycocoevalcap: pip install "otdrg[metrics]"') from error

_ORDERS = 4
#: METEOR 1.5's parameters for English, task "rank": the ones pycocoevalcap calls it with.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
#: Weights of its matches: exact, stem, synonym, paraphrase.
_MATCH_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
_MATCHES, _CHUNKS = slice(4, 20), 20


def bleu_counts(scorer: BleuScorer) -> np.ndarray:
    """(N, 10) counts of the scorer's N reports: n-grams written and n-grams right, n = 1 to 4, and both lengths."""
    return np.array(
        [[*counts["guess"], *counts["correct"], counts["testlen"], *counts["reflen"]] for counts in scorer.ctest],
        dtype=float,
    )


def bleu_of_counts(counts: np.ndarray) -> np.ndarray:
    """BLEU-1..4, (R, 4), of R corpora, from sums (R, 10) of [`bleu_counts`], by pycocoevalcap itself.

    A corpus is to BLEU what one long report is, so the scorer is given each as that.
    """
    scorer = BleuScorer(n=_ORDERS)
    scorer.ctest = [
        {"guess": row[:_ORDERS], "correct": row[_ORDERS : 2 * _ORDERS], "testlen": row[-2], "reflen": [row[-1]]}
        for row in counts.tolist()
    ]
    scorer.crefs = scorer.ctest
    return np.array(scorer.compute_score(option="closest")[1]).T


def meteor_counts(lines: Sequence[str]) -> np.ndarray:
    """(N, 23) counts of N reports, from the lines in which METEOR's Java gives them.

    Columns: words written and true; function words of both; for each of the four kinds of matches, content words
    matched of both, function words matched of both; chunks; words matched of both. The one chunk of a report that is
    word for word the true one is 0 here, because METEOR leaves it out when it adds reports up.
    """
    counts = np.array([line.split() for line in lines], dtype=float)
    matched = counts[:, _MATCHES].reshape(-1, 8, 2).sum(axis=1)
    counts[(matched == counts[:, :2]).all(axis=1) & (counts[:, _CHUNKS] == 1), _CHUNKS] = 0
    return counts


def meteor_of_counts(counts: np.ndarray) -> np.ndarray:
    """METEOR 1.5, (R,), of R corpora, from sums (R, 23) of [`meteor_counts`].

    The formula of Denkowski and Lavie, "Meteor Universal" (WMT 2014), section 2, applied to sums as METEOR does itself.
    """
    matches = counts[:, _MATCHES].reshape(-1, 4, 2, 2)  # kind, content or function words, written or true
    functional, matched = counts[:, 2:4], counts[:, -2:].sum(axis=1) / 2
    found = np.einsum("k,rkcs,c->rs", _MATCH_WEIGHTS, matches, [_DELTA, 1 - _DELTA])
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = (found / (_DELTA * (counts[:, :2] - functional) + (1 - _DELTA) * functional)).T
        mean = 1 / ((1 - _ALPHA) / precision + _ALPHA / recall)
        scores = mean * (1 - _GAMMA * (counts[:, _CHUNKS] / matched) ** _BETA)
    return np.maximum(np.nan_to_num(scores, nan=0.0), 0.0)
