"""Scores of many candidate reports, each written for every study, for the search of the best constant report.

The values are those of `nlg_scores` and `clinical_efficacy_scores`, computed without comparing all pairs: sums over
references are regrouped by n-gram and length. Only ROUGE-L needs the pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.sparse import csr_array, diags_array

from ..findings_otdrg import FINDINGS
from ..utility_otdrg import rouge_l_matrix
from .efficacy import (
    LABEL_SETS,
    MEASURES,
    UNCERTAIN_POLICIES,
    clinical_efficacy_averages,
    precision_recall_f1,
)

_ORDERS = 4
#: pycocoevalcap's sigma of CIDEr's length penalty.
_CIDER_SIGMA = 6.0
#: Values of a matrix in memory at once.
_BLOCK = 2**22


class NGramCounts:
    """n-gram counts of candidates and references, n = 1 to 4, over shared columns.

    Args:
        candidates: C reports.
        references: R reports.
        weights: (R,) how many studies have each reference.
    """

    def __init__(self, candidates: Sequence[str], references: Sequence[str], weights: np.ndarray):
        texts = list(dict.fromkeys([*candidates, *references]))
        row = {text: place for place, text in enumerate(texts)}
        self._candidates = [row[text] for text in candidates]
        self._references = [row[text] for text in references]
        self._texts, self._weights = texts, np.asarray(weights, float)
        self._lengths = np.array([len(text.split()) for text in texts])

    def bleu_counts(self) -> np.ndarray:
        """(C, 10) counts for `bleu_of_counts`, of each candidate written for every study.

        A corpus's number of matches of an n-gram is the sum over references of min(c, r), which is the sum over
        j = 1..c of how many references have it at least j times: one matrix-vector product per level j.
        """
        studies, lengths = self._weights.sum(), self._lengths[self._candidates]
        written = [studies * np.maximum(0, lengths - order) for order in range(_ORDERS)]
        matched = []
        for counts in self._counts():
            candidates, references = counts[self._candidates], counts[self._references]
            found = np.zeros(len(lengths))
            for level in range(1, _highest(candidates) + 1):
                found += _at_least(candidates, level) @ (_at_least(references, level).T @ self._weights)
            matched.append(found)
        true_length = self._lengths[self._references] @ self._weights
        sums = [*written, *matched, studies * lengths, np.full(len(lengths), true_length)]
        return np.column_stack(sums)

    def cider(self) -> np.ndarray:
        """CIDEr, (C,), of each candidate written for every study.

        min(c, r) r / |r| is summed over levels as in BLEU; the length penalty depends only on the references' lengths,
        of which there are few different ones.
        """
        studies = self._weights.sum()
        bigrams = np.maximum(0, self._lengths - 1)
        lengths, length = np.unique(bigrams[self._references], return_inverse=True)
        one_hot = csr_array((np.ones(len(length)), (np.arange(len(length)), length)), (len(length), len(lengths)))
        penalty = np.exp(-((bigrams[self._candidates][:, None] - lengths) ** 2) / (2 * _CIDER_SIGMA**2))
        total = np.zeros(len(self._candidates))
        for counts in self._counts():
            references = counts[self._references]
            frequency = _at_least(references, 1).T @ self._weights
            inverse_frequency = np.log(studies) - np.log(np.maximum(1.0, frequency))
            norms = np.sqrt(counts.power(2) @ inverse_frequency**2)
            inverse_norms = np.divide(1.0, norms, where=norms > 0, out=np.zeros_like(norms))
            weighted = (
                diags_array(self._weights * inverse_norms[self._references])
                @ references
                @ diags_array(inverse_frequency**2)
            )
            candidates = counts[self._candidates]
            by_length = [
                (_at_least(references, level).multiply(weighted)).T.tocsr() @ one_hot
                for level in range(1, _highest(candidates) + 1)
            ]
            for rows in _blocks(len(total), len(lengths)):
                found = sum(
                    _at_least(candidates[rows], level) @ columns for level, columns in enumerate(by_length, start=1)
                )
                if by_length:
                    similarity = found.multiply(penalty[rows]).sum(axis=1)
                    total[rows] += similarity * inverse_norms[self._candidates][rows]
        return 10.0 * total / (_ORDERS * studies)

    def _counts(self) -> Iterator[csr_array]:
        """For n = 1 to 4, counts (texts, n-grams)."""
        number: dict[str, int] = {}
        words = np.array([number.setdefault(word, len(number)) for text in self._texts for word in text.split()], int)
        text = np.repeat(np.arange(len(self._texts)), self._lengths)
        last = np.cumsum(self._lengths)
        place = np.arange(len(words))
        ids = words
        for order in range(1, _ORDERS + 1):
            if order > 1:
                # An n-gram is an (n - 1)-gram and the next word.
                inside = place + order - 1 < last[text]
                place, text = place[inside], text[inside]
                ids = ids[inside] * len(number) + words[place + order - 1]
            found, ids = np.unique(ids, return_inverse=True)
            counts = csr_array((np.ones(len(ids)), (text, ids)), (len(self._texts), len(found)))
            counts.sum_duplicates()
            yield counts


def _at_least(counts: csr_array, level: int) -> csr_array:
    """1 where a count is `level` or more."""
    reached = counts.copy()
    reached.data = (counts.data >= level).astype(float)
    reached.eliminate_zeros()
    return reached


def _highest(counts: csr_array) -> int:
    return int(counts.data.max(initial=0))


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    size = max(1, _BLOCK // max(1, columns))
    return (slice(begin, min(begin + size, rows)) for begin in range(0, rows, size))


def rouge_l_scores(candidates: Sequence[str], references: Sequence[str], weights: np.ndarray) -> np.ndarray:
    """ROUGE-L, (C,), of each candidate written for every study; arguments as of [`NGramCounts`]."""
    sums = [
        rouge_l_matrix(candidates[rows], references) @ weights for rows in _blocks(len(candidates), len(references))
    ]
    return np.concatenate(sums) / np.sum(weights)


def clinical_scores(candidate_states: np.ndarray, true_states: np.ndarray) -> dict[str, np.ndarray]:
    """Averages of `clinical_efficacy_scores`, (C,) each, of C reports, each written for all N studies.

    Args:
        candidate_states: (C, 14) state ids.
        true_states: (N, 14) state ids.
    """
    candidates, studies = len(candidate_states), len(true_states)
    counts = np.zeros((candidates, len(UNCERTAIN_POLICIES), 3, len(FINDINGS)))
    ratios = np.zeros((candidates, len(UNCERTAIN_POLICIES), len(LABEL_SETS), len(MEASURES)))
    for policy, positives in enumerate(UNCERTAIN_POLICIES.values()):
        written, true = np.isin(candidate_states, positives), np.isin(true_states, positives)
        support = true.sum(axis=0)
        counts[:, policy] = np.stack([written * support, written * studies, np.tile(support, (candidates, 1))], axis=1)
        for place, names in enumerate(LABEL_SETS.values()):
            columns = [FINDINGS.index(name) for name in names]
            # Many studies have the same combination of positives.
            rows, row = np.unique(written[:, columns], axis=0, return_inverse=True)
            others, weights = np.unique(true[:, columns], axis=0, return_counts=True)
            rows, others = rows.astype(float), others.astype(float)
            means = np.empty((len(rows), len(MEASURES)))
            for block in _blocks(len(rows), len(others)):
                both = rows[block] @ others.T
                sizes = (np.broadcast_to(side, both.shape) for side in (rows[block].sum(1)[:, None], others.sum(1)))
                for measure, values in enumerate(precision_recall_f1(both, *sizes)):
                    means[block, measure] = values @ weights / studies
            ratios[:, policy, place] = means[row.reshape(-1)]
    return clinical_efficacy_averages(counts, ratios)


__all__ = ["NGramCounts", "clinical_scores", "rouge_l_scores"]
