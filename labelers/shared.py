"""Label reports by a labeler that runs a model, in all processes, with a journal to continue from."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..findings_otdrg import FINDINGS
from ..runtime.shared_work import fixed_blocks, share_work
from . import LABELERS, ReportsWarning, UnreadReportsWarning, check_reports, warn_of_reports


def placed_options(name: str, options: dict[str, Any], placement: dict[str, str | None]) -> dict[str, Any]:
    """The options of a labeler with its device and the type of its weights.

    Args:
        name: of `LABELERS`.
        options: as given.
        placement: `device`, `dtype` and `quantization`; None for the labeler's default.

    Raises:
        ValueError: the labeler does not have one of them, or it is given twice.
    """
    given = {option: value for option, value in placement.items() if value is not None}
    for option in given:
        if option in options:
            raise ValueError(f"--{option} and --option {option} were both given: expected one")
        if option not in _parameters(name):
            has = [option for option in placement if option in _parameters(name)]
            raise ValueError(f"--{option}: labeler {name} does not have it, expected {' or '.join(has) or 'none'}")
    return {**options, **given}


def runs_model(name: str) -> bool:
    """Whether a labeler runs a model, on a device."""
    return "device" in _parameters(name)


def _parameters(name: str) -> Sequence[str]:
    if name not in LABELERS:
        return ()
    module, cls = LABELERS[name]
    return list(inspect.signature(getattr(import_module(module, __package__), cls)).parameters)


def label_together(labeler, reports: Sequence[str], journal: Path | None = None) -> np.ndarray:
    """(N, 14) state ids of N reports; every process must call it, and all get all.

    Equal reports are read once, in fixed batches of the labeler's size, sorted by length.

    Args:
        labeler: with `label`, `name` and `batch_size`.
        reports: in any order.
        journal: `.jsonl` file of the states that are known, by the digest of the report.

    Raises:
        TypeError, ValueError: as [`check_reports`].
    """
    check_reports(reports)
    # With their line breaks, at which labelers split sentences.
    texts = list(reports)
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    ids = {text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in distinct}

    def read(blocks: Sequence[Sequence[int]]) -> Iterator[list[dict[str, Any]]]:
        for block in blocks:
            batch = [distinct[place] for place in block]
            rows = [{"id": ids[text]} for text in batch]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for row, states in zip(rows, labeler.label(batch).tolist(), strict=True):
                    row["states"] = states
            for warning in (one.message for one in caught):
                if not isinstance(warning, ReportsWarning):
                    warnings.warn(warning, stacklevel=1)
                elif not isinstance(warning, UnreadReportsWarning):  # the caller sees it in the states
                    for place in warning.positions:
                        rows[place]["warning"] = warning.what
            yield rows

    size = labeler.batch_size
    found = share_work(list(ids.values()), fixed_blocks(len(distinct), size), read, journal, progress=labeler.name)
    rows = [found[ids[text]] for text in texts]
    for what in sorted({row["warning"] for row in rows if "warning" in row}):
        warn_of_reports(
            [place for place, row in enumerate(rows) if row.get("warning") == what], len(rows), what, ReportsWarning
        )
    return np.array([row["states"] for row in rows], dtype=np.int64).reshape(len(rows), len(FINDINGS))


__all__ = ["label_together", "placed_options", "runs_model"]
