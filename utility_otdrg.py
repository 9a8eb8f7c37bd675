"""Utility of a report if another one is the true report: ROUGE-L, BLEU-4 and CIDEr of all pairs at once."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from .findings_otdrg import NO_FINDING, NOT_GIVEN, POSITIVE

#: Weights of the scores in a utility. CIDEr goes up to 10, so that each term is between 0 and 1.
UTILITY: dict[str, float] = {"rouge_l": 1.0, "bleu_4": 1.0, "cider": 0.1}

#: pycocoevalcap's weight of recall in ROUGE-L, and its sigma of CIDEr's length penalty.
_BETA, _SIGMA = 1.2, 6.0
#: Reports in one integer.
_BLOCK = 2048
_ORDERS = 4
#: Added to matches and counts of n-grams, so that a pair without a common 4-gram keeps its shorter matches.
_SMOOTHING = (0.0, 0.1, 0.1, 0.1)


class DocumentFrequencies:
    """Inverse document frequencies of n-grams, by which CIDEr weighs them.

    Args:
        reports: words are separated by whitespace.
        counts: how many studies have each; one by default.
    """

    def __init__(self, reports: Sequence[str], counts: Sequence[float] | np.ndarray | None = None):
        counts = [1] * len(reports) if counts is None else counts
        studies: dict[tuple[str, ...], float] = defaultdict(float)
        for report, count in zip(reports, counts, strict=True):
            words = report.split()
            for order in range(1, _ORDERS + 1):
                for ngram in _ngrams(words, order):
                    studies[ngram] += count
        self._log_studies = math.log(max(sum(counts), 1))
        self._inverse = {ngram: self._log_studies - math.log(max(count, 1)) for ngram, count in studies.items()}

    def inverse(self, ngram: tuple[str, ...]) -> float:
        """The logarithm of the number of studies over that of the studies whose report has the n-gram."""
        return self._inverse.get(ngram, self._log_studies)


class ReportUtility:
    """Scores of candidate reports against fixed references, one for each pair.

    The utility of a pair is the weighted sum of ROUGE-L and CIDEr, as pycocoevalcap computes them, and BLEU-4 of the
    pair, whose n-gram counts are smoothed by 0.1 from 2-grams on. Consensus decoding writes the candidate with the
    highest expected utility (minimum Bayes risk decoding: Kumar and Byrne, 2004; Eikema and Aziz, 2022).

    Args:
        references: R reports; words are separated by whitespace.
        counts: (R,) how many studies have each; CIDEr's document frequencies are of these studies.
        weights: of the scores, see [`UTILITY`].
        frequencies: document frequencies of other reports, in place of those of the references.
    """

    def __init__(
        self,
        references: Sequence[str],
        counts: np.ndarray | None = None,
        weights: Mapping[str, float] = UTILITY,
        frequencies: DocumentFrequencies | None = None,
    ):
        words = [reference.split() for reference in references]
        self._subsequences = Subsequences(words)
        self._lengths = np.array([len(row) for row in words])
        self._frequencies = DocumentFrequencies(references, counts) if frequencies is None else frequencies
        self._weights = dict(weights)
        # For each n-gram, the references that have it, how often, and its inverse document frequency.
        self._postings: list[dict[tuple[str, ...], tuple[np.ndarray, np.ndarray, float]]] = []
        self._inverse_norms = []
        for order in range(1, _ORDERS + 1):
            found: dict[tuple[str, ...], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
            for place, row in enumerate(words):
                for ngram, count in _ngrams(row, order).items():
                    found[ngram][0].append(place)
                    found[ngram][1].append(count)
            postings, squares = {}, np.zeros(len(words))
            for ngram, (places, times) in found.items():
                rows, each = np.array(places), np.array(times, float)
                rarity = self._frequencies.inverse(ngram)
                squares[rows] += (each * rarity) ** 2
                postings[ngram] = rows, each, rarity
            self._postings.append(postings)
            self._inverse_norms.append(_inverse(np.sqrt(squares)))

    def __call__(self, candidates: Sequence[str]) -> np.ndarray:
        """Utility (C, R) of each of C candidates if each of the R references is the true report."""
        words = [candidate.split() for candidate in candidates]
        utility = np.zeros((len(words), len(self._lengths)))
        if self._weights.get("rouge_l"):
            common = self._subsequences.common(words)
            lengths = np.array([[len(row)] for row in words])
            utility += self._weights["rouge_l"] * _rouge_l(common, lengths, self._lengths)
        if self._weights.get("bleu_4") or self._weights.get("cider"):
            for row, candidate in enumerate(words):
                bleu, cider = self._bleu_and_cider(candidate)
                utility[row] += self._weights.get("bleu_4", 0) * bleu + self._weights.get("cider", 0) * cider
        return utility

    def _bleu_and_cider(self, candidate: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Smoothed BLEU-4 and CIDEr (R,) of one candidate."""
        references, written = len(self._lengths), len(candidate)
        log_precision, cider = np.zeros(references), np.zeros(references)
        for order in range(_ORDERS):
            postings, counts = self._postings[order], _ngrams(candidate, order + 1)
            known = [(*postings[ngram], count) for ngram, count in counts.items() if ngram in postings]
            matches, similarity, square = np.zeros(references), np.zeros(references), 0.0
            if known:
                sizes = [len(rows) for rows, *_ in known]
                rows = np.concatenate([rows for rows, *_ in known])
                theirs = np.concatenate([each for _, each, *_ in known])
                rarity = np.repeat([rarity for *_, rarity, _ in known], sizes)
                common = np.minimum(theirs, np.repeat([count for *_, count in known], sizes))
                matches = np.bincount(rows, common, references)
                similarity = np.bincount(rows, common * theirs * rarity**2, references)
                square = sum((count * rarity) ** 2 for *_, rarity, count in known)
            unknown = ((ngram, count) for ngram, count in counts.items() if ngram not in postings)
            square += sum((count * self._frequencies.inverse(ngram)) ** 2 for ngram, count in unknown)
            smoothing = _SMOOTHING[order]
            with np.errstate(divide="ignore"):  # BLEU-4 is 0 without a common word
                log_precision += np.log((matches + smoothing) / (max(written - order, 1) + smoothing))
            cider += similarity * self._inverse_norms[order] * (square and square**-0.5)
        brevity = np.exp(np.minimum(0.0, 1.0 - self._lengths / max(written, 1)))
        bigrams = np.maximum(self._lengths - 1, 0) - max(written - 1, 0)
        penalty = np.exp(-(bigrams**2) / (2 * _SIGMA**2))
        return brevity * np.exp(log_precision / _ORDERS), 10.0 / _ORDERS * cider * penalty


class Subsequences:
    """Longest common subsequences of words with R fixed reports.

    Bit-parallel (Hyyrö, "Bit-parallel LCS-length computation revisited", AWOCA 2004): the bit strings of all reports
    are fields of one integer, so that one step per word of the other report updates all of them.

    Args:
        reports: R lists of words.
    """

    def __init__(self, reports: Sequence[Sequence[str]]):
        self._blocks = [_Fields(reports[begin : begin + _BLOCK]) for begin in range(0, len(reports), _BLOCK)]

    def common(self, others: Sequence[Sequence[str]]) -> np.ndarray:
        """Length (N, R) of the longest common subsequence of each of N other reports with each report."""
        return np.array([np.concatenate([block.common(other) for block in self._blocks]) for other in others])


class _Fields:
    """Reports as fields of one integer, each of one bit per word and one for the carry."""

    def __init__(self, reports: Sequence[Sequence[str]]):
        self._sizes = np.array([len(report) for report in reports])
        starts = np.concatenate([[0], np.cumsum(self._sizes + 1)])
        self._starts, self._width = starts[:-1], (int(starts[-1]) + 7) // 8
        places: dict[str, bytearray] = {}
        fields = bytearray(self._width)
        for start, report in zip(self._starts.tolist(), reports, strict=True):
            for place, word in enumerate(report, start):
                bits = places.get(word)
                if bits is None:
                    bits = places[word] = bytearray(self._width)
                bits[place >> 3] |= 1 << (place & 7)
                fields[place >> 3] |= 1 << (place & 7)
        self._matches = {word: int.from_bytes(bits, "little") for word, bits in places.items()}
        self._full = int.from_bytes(fields, "little")

    def common(self, other: Sequence[str]) -> np.ndarray:
        row = self._full
        for word in other:
            match = self._matches.get(word)
            if match is not None:
                kept = row & match
                row = ((row + kept) | (row ^ kept)) & self._full
        bits = np.unpackbits(np.frombuffer(row.to_bytes(self._width, "little"), np.uint8), bitorder="little")
        # The carry bits are 0, so the sum up to the next field is that of this one.
        return self._sizes - np.add.reduceat(bits, self._starts, dtype=np.int32)


def rouge_l_matrix(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """ROUGE-L (P, R) of each prediction against each reference, as pycocoevalcap computes it for one pair.

    Args:
        predictions: P reports; words are separated by single spaces.
        references: R reports.
    """
    written, true = ([text.split(" ") for text in texts] for texts in (predictions, references))
    # The bit strings of the shorter list take less memory.
    few = len(written) < len(true)
    common = Subsequences(written).common(true).T if few else Subsequences(true).common(written)
    lengths = np.array([[len(words)] for words in written])
    return _rouge_l(common, lengths, np.array([len(words) for words in true]))


def disagreements(stated: np.ndarray, given: np.ndarray) -> np.ndarray:
    """For each report, the number (N,) of findings that are positive in it or in the given states, but not in both.

    "No finding" does not count, nor do findings that are not given.

    Args:
        stated: (N, 14) state ids read in N reports.
        given: (14,) or (N, 14) state ids; [`NOT_GIVEN`] and -1 are not given.
    """
    stated, given = np.asarray(stated)[:, :NO_FINDING], np.asarray(given)[..., :NO_FINDING]
    is_given = (given >= 0) & (given != NOT_GIVEN)
    return (is_given & ((stated == POSITIVE) != (given == POSITIVE))).sum(axis=1)


def _rouge_l(common: np.ndarray, written: np.ndarray, true: np.ndarray) -> np.ndarray:
    """ROUGE-L (P, R) from the lengths of common subsequences (P, R), predictions (P, 1) and references (R,)."""
    precision, recall = common / np.maximum(written, 1), common / np.maximum(true, 1)
    weighted = recall + _BETA**2 * precision
    return np.divide((1 + _BETA**2) * precision * recall, weighted, where=weighted > 0, out=np.zeros_like(weighted))


def _ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


def _inverse(values: np.ndarray) -> np.ndarray:
    """1 / values, 0 where they are 0."""
    return np.divide(1.0, values, where=values > 0, out=np.zeros_like(values))


__all__ = ["UTILITY", "DocumentFrequencies", "ReportUtility", "Subsequences", "disagreements", "rouge_l_matrix"]
