"""Retrieval: the reports of training studies with similar images, a baseline of generation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..utility_otdrg import rouge_l_matrix

#: Neighbours for the consensus.
NEIGHBOURS = 30
#: Similarities in memory at once.
_BLOCK = 2**24


def nearest_neighbours(queries: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    """Positions (Q, `count`) of each query's nearest keys by cosine, nearest first; of equally near ones the first.

    scikit-learn's `NearestNeighbors` has no fixed order of equally near keys.

    Args:
        queries: (Q, D) features; one of length 0 is equally near to all keys.
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
    """The position of the report with the highest mean ROUGE-L against the others; of equally good ones the first.

    ROUGE-L needs no labeler, and no document frequencies, which CIDEr would have to estimate from a few reports.

    Args:
        reports: K of them, cleaned, the nearest first.

    Raises:
        ValueError: there is none.
    """
    if not reports:
        raise ValueError("reports: none given, expected at least one")
    texts = list(dict.fromkeys(reports))
    counts = np.array([reports.count(text) for text in texts])
    scores = rouge_l_matrix(texts, texts)
    others = scores @ counts - np.diag(scores)
    return reports.index(texts[int(np.argmax(others))])


def _scaled(features: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return np.divide(features, lengths, where=lengths > 0, out=np.zeros_like(features))


__all__ = ["NEIGHBOURS", "consensus", "nearest_neighbours"]
