"""Studies as datasets that training reads: made in memory of a source, or read from a folder that was built."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, List, Value, load_dataset, load_from_disk

from ..files_otdrg import interpret, read_json
from .assembly import Sections, StudyListing, assemble_study
from .images import referenced_image
from .schema import STUDY_FEATURES, UNCLEANED
from .source import SPLITS, Skipped, StudySource
from .summary import LISTED

logger = logging.getLogger(__name__)


def load_in_memory(source: StudySource, sections: Sections = "findings") -> DatasetDict:
    """A source's studies; image files are referred to, not read.

    Raises:
        ValueError: no study is left.
    """
    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    faults: list[Skipped] = []
    for item in StudyListing(source):
        if isinstance(item, Skipped):
            faults.append(item)
            continue
        assembled = assemble_study(source, item, referenced_image, sections)
        faults += assembled.faults
        if assembled.row is not None:
            rows[item.split].append(assembled.row)
    left_out = list(dict.fromkeys(fault.id for fault in faults))
    if not any(rows.values()):
        reason = f"all {len(left_out)} were skipped, the first for {faults[0].kind}: {faults[0].reason}"
        raise ValueError(f"source {source.name!r} holds no studies" + (f": {reason}" if faults else ""))
    if faults:
        listed = "; ".join(f"{fault.id} ({fault.kind}: {fault.reason})" for fault in faults[:LISTED])
        rest = f" and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
        logger.warning("%s: %d studies left out: %s%s", source.name, len(left_out), listed, rest)
    return DatasetDict(
        {split: Dataset.from_list(kept, features=STUDY_FEATURES) for split, kept in rows.items() if kept}
    )


def load_prepared(folder: str | os.PathLike, leave_out: Sequence[str] = ()) -> DatasetDict:
    """The splits of a built dataset, mapped into memory from disk.

    Without Arrow files the library makes them of the Parquet files, in its cache.

    Args:
        folder: of the dataset.
        leave_out: splits that are not wanted.

    Raises:
        ValueError: the folder is not one.
    """
    folder = _prepared(folder)
    splits = [split for split in _splits(folder) if split not in leave_out]
    if (folder / "dataset_dict.json").is_file():
        read_json(folder / "dataset_dict.json")
        return DatasetDict({split: _mapped(folder / split) for split in splits})
    return DatasetDict(
        {
            split: interpret(
                folder / "data", partial(load_dataset, "parquet", data_files=_parquet(folder, split), split="train")
            )
            for split in splits
        }
    )


def undecoded(rows: Dataset) -> Dataset:
    """The same studies, whose images come as `{"bytes", "path"}` of files that are not decoded."""
    # Not by `cast_column`, which writes a list of images to disk anew.
    rows = rows.with_format(None)
    rows.info.features = Features({**rows.features, "images": List(Image(decode=False))})
    return rows


def _mapped(folder: Path) -> Dataset:
    """A split in Arrow files."""
    read_json(folder / "dataset_info.json", parse=lambda info: Features.from_dict(info["features"]))
    files = read_json(folder / "state.json", parse=lambda state: [file["filename"] for file in state["_data_files"]])
    for file in files:
        if not isinstance(file, str) or os.path.basename(file) != file:
            raise ValueError(f"{folder / 'state.json'}: _data_files names {file!r}, expected files in its folder")
    return interpret(folder / "state.json", load_from_disk, folder)


def stream_prepared(folder: str | os.PathLike, split: str) -> IterableDataset:
    """A split of a built dataset, read shard by shard from its Parquet files.

    Raises:
        ValueError: the folder is not a built dataset, or has no such split.
    """
    folder = _prepared(folder)
    if split not in _splits(folder):
        raise ValueError(f"{folder} has no split {split!r}: it has {', '.join(_splits(folder))}")
    return load_dataset("parquet", data_files={split: _parquet(folder, split)}, split=split, streaming=True)


def prepared_splits(folder: str | os.PathLike) -> list[str]:
    """The splits of a built dataset.

    Raises:
        ValueError: the folder is not a built dataset.
    """
    return _splits(_prepared(folder))


def prepared_rows(folder: str | os.PathLike, split: str) -> int:
    """How many studies a split of a built dataset has.

    Raises:
        ValueError: the folder is not a built dataset.
    """
    return sum(interpret(file, pq.read_metadata, file).num_rows for file in _parquet(_prepared(folder), split))


def prepared_shards(folder: str | os.PathLike, split: str) -> list[Path]:
    """The Parquet files of a split of a built dataset, in order.

    Raises:
        ValueError: the folder is not a built dataset.
    """
    return [Path(file) for file in _parquet(_prepared(folder), split)]


def prepared_column(folder: str | os.PathLike, split: str, column: str) -> list:
    """One column of a split of a built dataset; the others, images above all, are not read.

    Raises:
        ValueError: the folder is not a built dataset.
    """
    values: list = []
    for file in _parquet(_prepared(folder), split):
        values += interpret(file, partial(pq.read_table, columns=[column]), file).column(column).to_pylist()
    return values


def _prepared(folder: str | os.PathLike) -> Path:
    folder = Path(os.path.abspath(folder))
    if not _splits(folder):
        partial = folder.with_name(f"{folder.name}.partial")
        state = "an interrupted build: otdrg prepare --resume ends it" if partial.is_dir() else "not a built dataset"
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
    """The reports before cleaning, which labelers read: cleaning joins words ("scarring/atelectasis")."""
    return list(rows[UNCLEANED if UNCLEANED in rows.column_names else "report"])


__all__ = [
    "uncleaned_reports",
    "with_column",
    "load_in_memory",
    "load_prepared",
    "prepared_column",
    "prepared_rows",
    "prepared_shards",
    "prepared_splits",
    "stream_prepared",
    "undecoded",
]
