"""Digests by which two sets of studies are compared."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from .streaming import StreamedStudies


def fingerprint(studies: Mapping[str, Dataset | StreamedStudies]) -> dict[str, dict[str, Any]]:
    """Of each split the number of `studies`, a digest of their `text` and one of their views.

    `text` is of ids, reports and finding states, in order. Views are told apart by their sizes in bytes (`views`), so
    that no image is read; of streamed studies by those of the shards they lie in (`shards`).
    """
    found = {}
    for split, rows in studies.items():
        text = hashlib.blake2b(digest_size=16)
        for row in _text(rows):
            text.update(json.dumps(row, ensure_ascii=False).encode())
        found[split] = {"studies": len(rows), "text": text.hexdigest()}
        if isinstance(rows, StreamedStudies):
            found[split]["shards"] = _digest([path.name, path.stat().st_size] for path in rows.shards)
        else:
            found[split]["views"] = _digest(_view_sizes(rows))
    return found


def _digest(items) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(json.dumps(item).encode())
    return digest.hexdigest()


def _text(rows: Dataset | StreamedStudies) -> Iterator[tuple]:
    """Id, report and finding states of each study."""
    names = ("id", "report", "finding_states")
    if isinstance(rows, StreamedStudies):
        yield from zip(*(rows[name] for name in names), strict=True)
        return
    for table in rows.select_columns(list(names)).with_format("arrow").iter(batch_size=1000):
        yield from zip(*(table.column(name).to_pylist() for name in names), strict=True)


def _view_sizes(rows: Dataset) -> Iterator[list[int]]:
    """Of each study the sizes of its views: of what the table holds, or of the files it refers to."""
    for table in rows.select_columns("images").with_format("arrow").iter(batch_size=1000):
        for views in table.column("images").chunks:
            flat = views.flatten()
            sizes = pc.binary_length(flat.field("bytes")).to_pylist()
            if any(size is None for size in sizes):
                paths = flat.field("path").to_pylist()
                sizes = [_file_size(path) if size is None else size for size, path in zip(sizes, paths, strict=True)]
            start = 0
            for count in pc.list_value_length(views).to_pylist():
                yield sizes[start : start + count]
                start += count


def _file_size(path: str) -> int:
    """-1 for a file that is gone: the study is named where it is read."""
    try:
        return os.path.getsize(path)
    except (OSError, ValueError):
        return -1


__all__ = ["fingerprint"]
