"""Retrieval: the reports of training studies whose images are alike, which a model that writes has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Neighbours among which a consensus is sought.
NEIGHBOURS = 30
#: pycocoevalcap's weight of recall in ROUGE-L.
_BETA = 1.2
#: Similarities that are held at once.
_BLOCK = 2**24


def nearest_neighbours(queries: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    """Positions (Q, `count`) of each query's nearest keys by cosine, the nearest first, of equally near ones the first.

    Args:
        queries: (Q, D) features; one of length 0 is equally near to all.
        keys: (K, D) features.
        count: at most K.

    Raises:
        ValueError: another D in each, or not as many keys.
    """
    queries, keys = np.asarray(queries, np.float32), np.asarray(keys, np.float32)
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(f"queries have shape {queries.shape}, keys {keys.shape}: expected (Q, D) and (K, D)")
    if not 1 <= count <= len(keys):
        raise ValueError(f"count is {count}: expected 1 to {len(keys)}, as many keys as there are")
    keys = _scaled(keys)
    found = np.empty((len(queries), count), dtype=np.int64)
    rows = max(1, _BLOCK // len(keys))
    for begin in range(0, len(queries), rows):
        distances = -(_scaled(queries[begin : begin + rows]) @ keys.T)
        found[begin : begin + rows] = np.argsort(distances, axis=1, kind="stable")[:, :count]
    return found


def consensus(reports: Sequence[str]) -> int:
    """The position of the report that the others are most like: the highest mean ROUGE-L, were each the true one.

    ROUGE-L, and not the labels, because it is what a table of fluency holds and no labeler's business; and not CIDEr,
    whose document frequencies say little among so few. Of equally good ones it is the first.

    Args:
        reports: K of them, cleaned, the nearest first.

    Raises:
        ValueError: there is none.
    """
    if not reports:
        raise ValueError("reports: none given, expected at least one")
    texts = list(dict.fromkeys(reports))
    counts = np.array([reports.count(text) for text in texts])
    scores = rouge_l_matrix(texts)
    others = scores @ counts - np.diag(scores)
    return reports.index(texts[int(np.argmax(others))])


def rouge_l_matrix(reports: Sequence[str]) -> np.ndarray:
    """ROUGE-L (K, K) of each of K reports (row), were each the true one (column), as pycocoevalcap has it.

    Of all pairs at once: pycocoevalcap's loop over words takes a second for 30 reports of 100 words, and there are as
    many such tables as studies.
    """
    words = [report.split(" ") for report in reports]
    lengths = np.array([len(row) for row in words])
    number = {word: place for place, word in enumerate(dict.fromkeys(word for row in words for word in row))}
    true = np.full((len(words), lengths.max()), -1)
    for row, report in zip(true, words, strict=True):
        row[: len(report)] = [number[word] for word in report]
    written = np.where(true < 0, -2, true)
    # A row of the usual table, of longest common subsequences with each beginning of the true report, for every pair.
    rows, columns = np.triu_indices(len(words))
    beside = np.ascontiguousarray(true[columns].T)
    common = np.zeros((len(beside) + 1, len(rows)), dtype=np.int16)
    for word in written[rows].T:
        longer = common[:-1] + (word == beside)
        np.maximum.accumulate(np.maximum(common[1:], longer, out=longer), axis=0, out=common[1:])
    longest = np.zeros((len(words), len(words)))
    longest[rows, columns] = longest[columns, rows] = common[-1]
    precision, recall = longest / lengths[:, None], longest / lengths
    weighed = recall + _BETA**2 * precision
    return np.divide((1 + _BETA**2) * precision * recall, weighed, where=weighed > 0, out=np.zeros_like(weighed))


def _scaled(features: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return np.divide(features, lengths, where=lengths > 0, out=np.zeros_like(features))


__all__ = ["NEIGHBOURS", "consensus", "nearest_neighbours", "rouge_l_matrix"]
