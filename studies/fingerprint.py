"""Digests for comparing two datasets of studies."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from .streaming import StreamedStudies


def fingerprint(studies: Mapping[str, Dataset | StreamedStudies]) -> dict[str, dict[str, Any]]:
    """The number of `studies` of each split, a digest of their `text` and a digest of their `views`.

    `text` covers ids, reports and finding states, in order. `views` covers the sizes of the image files in bytes, so
    that no image is read. Streamed studies have the sizes of their Parquet files (`shards`) instead. Datasets in which
    studies have priors also have a digest of these (`priors`).
    """
    found = {}
    for split, rows in studies.items():
        text = (json.dumps(row, ensure_ascii=False) for row in _text(rows))
        found[split] = {"studies": len(rows), "text": _digest(text)}
        if isinstance(rows, StreamedStudies):
            found[split]["shards"] = _digest(json.dumps([path.name, path.stat().st_size]) for path in rows.shards)
        else:
            found[split]["views"] = _digest(map(json.dumps, _view_sizes(rows, "images")))
            priors = _priors(rows)
            if priors is not None:
                found[split]["priors"] = priors
    return found


def differing_splits(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> list[str]:
    """Splits in which two fingerprints differ. Streamed and mapped studies are compared by their text only."""
    return [
        split
        for split in sorted({*before, *now})
        if split not in before or split not in now or _differ(before[split], now[split])
    ]


def _differ(before: dict[str, Any], now: dict[str, Any]) -> bool:
    names = before.keys() & now.keys()
    if "views" in names:
        names |= {"priors"}
    return any(before.get(name) != now.get(name) for name in names)


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()


def _text(rows: Dataset | StreamedStudies) -> Iterator[tuple]:
    names = ["id", "report", "finding_states"]
    if isinstance(rows, StreamedStudies):
        yield from zip(*(rows[name] for name in names), strict=True)
        return
    for table in rows.select_columns(names).with_format("arrow").iter(batch_size=1000):
        yield from zip(*(table.column(name).to_pylist() for name in names), strict=True)


def _priors(rows: Dataset) -> str | None:
    """A digest of the reports, days and sizes of views of priors; None if no study has one."""
    names = ["prior_report", "prior_days"]
    if "prior_images" not in rows.column_names:
        return None
    tables = rows.select_columns(names).with_format("arrow").iter(batch_size=1000)
    texts = (row for table in tables for row in zip(*(table.column(name).to_pylist() for name in names), strict=True))
    found = False

    def priors() -> Iterator[str]:
        nonlocal found
        for text, sizes in zip(texts, _view_sizes(rows, "prior_images"), strict=True):
            found = found or bool(text[0] or sizes)
            yield json.dumps([text, sizes])

    digest = _digest(priors())
    return digest if found else None


def _view_sizes(rows: Dataset, column: str) -> Iterator[list[int]]:
    """For each study the sizes of its views: of the bytes in the table, or of the files it references."""
    for table in rows.select_columns(column).with_format("arrow").iter(batch_size=1000):
        for views in table.column(column).chunks:
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
    """-1 for a missing file: the error that names its study is raised when the study is read."""
    try:
        return os.path.getsize(path)
    except (OSError, ValueError):
        return -1
