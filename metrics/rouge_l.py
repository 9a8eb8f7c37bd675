"""ROUGE-L of all pairs of two lists of reports at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: pycocoevalcap's weight of recall.
_BETA = 1.2
#: Reports in one integer.
_BLOCK = 2048


def rouge_l_matrix(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """ROUGE-L (P, R) of each prediction against each reference, as pycocoevalcap computes it for one pair.

    Args:
        predictions: P reports; words are separated by single spaces.
        references: R reports.
    """
    common = longest_common_subsequences(predictions, references)
    precision = common / np.array([len(text.split(" ")) for text in predictions])[:, None]
    recall = common / np.array([len(text.split(" ")) for text in references])
    weighted = recall + _BETA**2 * precision
    return np.divide((1 + _BETA**2) * precision * recall, weighted, where=weighted > 0, out=np.zeros_like(weighted))


def longest_common_subsequences(reports: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Length (N, M) of the longest common subsequence of words of each of N reports with each of M others.

    Bit-parallel (Hyyrö, "Bit-parallel LCS-length computation revisited", AWOCA 2004): the bit strings of all reports
    are fields of one integer, so that one step per word of the other report updates all of them.
    """
    words = [report.split(" ") for report in reports]
    others = [other.split(" ") for other in others]
    lengths = np.empty((len(words), len(others)), dtype=np.int32)
    for begin in range(0, len(words), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        lengths[block] = _lengths(words[block], others)
    return lengths


def _lengths(reports: list[list[str]], others: list[list[str]]) -> np.ndarray:
    # Each report has a field of one bit per word, and one for the carry.
    sizes = np.array([len(report) for report in reports])
    starts = np.concatenate([[0], np.cumsum(sizes + 1)])
    width = (int(starts[-1]) + 7) // 8
    places: dict[str, bytearray] = {}
    fields = bytearray(width)
    for start, report in zip(starts[:-1].tolist(), reports, strict=True):
        for place, word in enumerate(report, start):
            bits = places.get(word)
            if bits is None:
                bits = places[word] = bytearray(width)
            bits[place >> 3] |= 1 << (place & 7)
            fields[place >> 3] |= 1 << (place & 7)
    matches = {word: int.from_bytes(bits, "little") for word, bits in places.items()}
    full = int.from_bytes(fields, "little")
    lengths = np.empty((len(reports), len(others)), dtype=np.int32)
    for column, other in enumerate(others):
        row = full
        for word in other:
            match = matches.get(word)
            if match is not None:
                kept = row & match
                row = ((row + kept) | (row ^ kept)) & full
        bits = np.unpackbits(np.frombuffer(row.to_bytes(width, "little"), np.uint8), bitorder="little")
        # The carry bits are 0, so the sum up to the next field is that of this one.
        lengths[:, column] = sizes - np.add.reduceat(bits, starts[:-1], dtype=np.int32)
    return lengths


__all__ = ["longest_common_subsequences", "rouge_l_matrix"]
