"""Load studies as datasets: from a source into memory, or from a prepared folder."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, List, Value, load_dataset, load_from_disk

from ..files_otdrg import interpret, read_json
from ..runtime.printable import listed
from .assembly import Sections, StudyListing, assemble_study, check_sections
from .images import referenced_image
from .schema import STUDY_FEATURES, UNCLEANED
from .source import SPLITS, Skipped, StudySource

logger = logging.getLogger(__name__)


def load_in_memory(source: StudySource, sections: Sections = "findings", priors: bool = False) -> DatasetDict:
    """Load the studies of a source; image files are referenced, not read.

    Raises:
        ValueError: no study is left, the source does not have the sections, or `priors` are wanted of a source that
            does not say when studies were made.
    """
    check_sections(source, sections)
    lacking: Counter[str] = Counter()
    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    faults: list[Skipped] = []
    for item in StudyListing(source, priors=priors):
        if isinstance(item, Skipped):
            faults.append(item)
            continue
        assembled = assemble_study(source, item, referenced_image, sections)
        faults += assembled.faults
        if assembled.row is not None:
            rows[item.split].append(assembled.row)
            lacking.update(filter(None, [assembled.lacks]))
    kept = {row["id"] for split in rows.values() for row in split}
    skipped = len({fault.id for fault in faults if fault.id not in kept})
    if not any(rows.values()):
        reason = f": all {skipped} were skipped, the first for {faults[0].kind}: {faults[0].reason}" if faults else ""
        raise ValueError(f"source {source.name!r} holds no studies{reason}")
    if faults:
        reasons = listed([f"{fault.id} ({fault.kind}: {fault.reason})" for fault in faults], separator="; ")
        priors = sum(fault.kind == "unusable prior" for fault in faults)
        also = f", {priors} faults of priors" if priors else ""
        logger.warning("%s: %d studies left out%s: %s", source.name, skipped, also, reasons)
    for section, count in lacking.items():
        logger.warning("%s: %d of %d studies have no %s: their report lacks it", source.name, count, len(kept), section)
    return DatasetDict(
        {split: Dataset.from_list(kept, features=STUDY_FEATURES) for split, kept in rows.items() if kept}
    )


def load_prepared(folder: str | os.PathLike, leave_out: Sequence[str] = ()) -> DatasetDict:
    """Load the splits of a prepared dataset except `leave_out`, memory-mapped from disk.

    If the folder has no Arrow files, `datasets` converts the Parquet files in its cache.

    Raises:
        ValueError: the folder is not a prepared dataset.
    """
    folder = _prepared(folder)
    has_arrow = (folder / "dataset_dict.json").is_file()
    if has_arrow:
        read_json(folder / "dataset_dict.json")
    splits = {}
    for split in _splits(folder):
        if split in leave_out:
            continue
        if has_arrow:
            splits[split] = _load_arrow(folder / split)
        else:
            load = partial(load_dataset, "parquet", data_files=_parquet(folder, split), split="train")
            splits[split] = interpret(folder / "data", load)
    return DatasetDict(splits)


def _load_arrow(folder: Path) -> Dataset:
    # `load_from_disk` does not name the damaged file, and opens files outside the folder if `state.json` names them.
    read_json(folder / "dataset_info.json", parse=lambda info: Features.from_dict(info["features"]))
    files = read_json(folder / "state.json", parse=lambda state: [file["filename"] for file in state["_data_files"]])
    for file in files:
        if not isinstance(file, str) or os.path.basename(file) != file:
            raise ValueError(f"{folder / 'state.json'}: _data_files names {file!r}, expected files in its folder")
    return interpret(folder / "state.json", load_from_disk, folder)


def undecoded(rows: Dataset) -> Dataset:
    """The same studies with images as `{"bytes", "path"}` of files that are not decoded."""
    # Not with `cast_column`, which writes a new copy of a column of lists.
    rows = rows.with_format(None)
    views = {name: List(Image(decode=False)) for name in ("images", "prior_images") if name in rows.features}
    rows.info.features = Features({**rows.features, **views})
    return rows


def stream_prepared(folder: str | os.PathLike, split: str) -> IterableDataset:
    """Stream a split of a prepared dataset from its Parquet files.

    Raises:
        ValueError: the folder is not a prepared dataset, or has no such split.
    """
    folder = _prepared(folder)
    if split not in _splits(folder):
        raise ValueError(f"{folder} has no split {split!r}: it has {', '.join(_splits(folder))}")
    return load_dataset("parquet", data_files={split: _parquet(folder, split)}, split=split, streaming=True)


def prepared_splits(folder: str | os.PathLike) -> list[str]:
    """The splits of a prepared dataset; a `ValueError` if the folder is not one."""
    return _splits(_prepared(folder))


def prepared_shards(folder: str | os.PathLike, split: str) -> list[Path]:
    """The Parquet files of a split of a prepared dataset, in order; a `ValueError` if the folder is not one."""
    return [Path(file) for file in _parquet(_prepared(folder), split)]


def prepared_column(folder: str | os.PathLike, split: str, column: str) -> list:
    """One column of a split of a prepared dataset, without reading the others; a `ValueError` if it is not one."""
    values: list = []
    for file in prepared_shards(folder, split):
        values += interpret(file, partial(pq.read_table, columns=[column]), file).column(column).to_pylist()
    return values


def _prepared(folder: str | os.PathLike) -> Path:
    folder = Path(os.path.abspath(folder))
    if not _splits(folder):
        partial = folder.with_name(f"{folder.name}.partial")
        state = "unfinished: continue with otdrg prepare --resume" if partial.is_dir() else "not a prepared dataset"
        raise ValueError(f"{folder} is {state}; expected a folder written by otdrg prepare")
    return folder


def _splits(folder: Path) -> list[str]:
    return [split for split in SPLITS if _parquet(folder, split)]


def _parquet(folder: Path, split: str) -> list[str]:
    return sorted(str(path) for path in (folder / "data").glob(f"{split}-*.parquet"))


def with_column(rows, name: str, values: list):
    """The same studies with other values in a column, or with a new column of strings."""
    if not isinstance(rows, Dataset):
        return rows.with_column(name, values)
    if name not in rows.column_names:
        return rows.add_column(name, values, feature=Value("string"))
    feature = rows.features[name]
    return rows.remove_columns(name).add_column(name, values, feature=feature)


def uncleaned_reports(rows) -> list[str]:
    """The reports before cleaning, for labelers: cleaning joins words ("scarring/atelectasis")."""
    return list(rows[UNCLEANED if UNCLEANED in rows.column_names else "report"])
