"""Retrieval: the reports of training studies with similar images, a baseline of generation."""

from __future__ import annotations

import numpy as np

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


def _scaled(features: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return np.divide(features, lengths, where=lengths > 0, out=np.zeros_like(features))


__all__ = ["nearest_neighbours"]
