"""Shards of a dataset of studies: written row by row, and put where `load_dataset` and `load_from_disk` find them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from ..files_otdrg import read_json, write_json
from .schema import STUDY_FEATURES

#: What a finished dataset holds beside its data: settings and counts.
SUMMARY = "summary.json"

#: Rows are written when there are this many of them, or this many bytes of images.
_BATCH_ROWS, _BATCH_BYTES = 100, 32 * 2**20


class ShardWriter:
    """Writes rows of `STUDY_FEATURES` to `PATH.parquet`, and to `PATH.arrow` if wanted; no rows, no files.

    On an error, nothing is left.

    Args:
        path: of the shard, without a suffix.
        arrow: whether to write the Arrow file as well.
    """

    def __init__(self, path: Path, arrow: bool = True):
        self.suffixes = (".parquet", ".arrow") if arrow else (".parquet",)
        self.path = path
        self._rows: list[dict] = []
        self._bytes = 0
        self._writers: list = []

    def __enter__(self) -> ShardWriter:
        return self

    def write(self, row: dict) -> None:
        """Add a row; its images hold their bytes."""
        self._rows.append(row)
        self._bytes += sum(len(image["bytes"]) for image in row["images"])
        if len(self._rows) >= _BATCH_ROWS or self._bytes >= _BATCH_BYTES:
            self._flush()

    def write_batch(self, batch: pa.RecordBatch) -> None:
        """Add rows that are in Arrow's form."""
        self._flush()
        self._write(batch)

    def _flush(self) -> None:
        if self._rows:
            self._write(pa.RecordBatch.from_pylist(self._rows, schema=STUDY_FEATURES.arrow_schema))
            self._rows, self._bytes = [], 0

    def _write(self, batch: pa.RecordBatch) -> None:
        if not self._writers:
            opened = {".parquet": pq.ParquetWriter, ".arrow": pa.ipc.new_stream}
            schema = STUDY_FEATURES.arrow_schema
            self._writers = [opened[suffix](str(self._unfinished(suffix)), schema) for suffix in self.suffixes]
        for writer in self._writers:
            writer.write_batch(batch)

    def _unfinished(self, suffix: str) -> Path:
        return self.path.with_name(f"{self.path.name}{suffix}.tmp")

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is None:
            self._flush()
        for writer in self._writers:
            writer.close()
        for suffix in self.suffixes:
            unfinished = self._unfinished(suffix)
            if error_type is not None:
                unfinished.unlink(missing_ok=True)
            elif self._writers:
                unfinished.replace(self.path.with_name(f"{self.path.name}{suffix}"))


def publish_shards(folder: Path, output: Path, shards: Sequence[tuple[str, str]], digest: str) -> None:
    """Move shards to their places: `data/SPLIT-I-of-N.parquet` and, where there are any, `SPLIT/data-I-of-N.arrow`.

    Args:
        folder: where they were written.
        output: the dataset's folder.
        shards: split and name of each, in order.
        digest: of the content; `datasets` names its caches by it.
    """
    (output / "data").mkdir(exist_ok=True)
    splits = list(dict.fromkeys(split for split, _ in shards))
    arrow = all((folder / f"{name}.arrow").is_file() for _, name in shards)
    for split in splits:
        names = [name for other, name in shards if other == split]
        numbered = [f"{index:05d}-of-{len(names):05d}" for index in range(len(names))]
        for name, number in zip(names, numbered, strict=True):
            os.replace(folder / f"{name}.parquet", output / "data" / f"{split}-{number}.parquet")
        if arrow:
            files = [f"data-{number}.arrow" for number in numbered]
            _write_dataset_state(output / split, split, files, f"{digest[:16]}-{split}")
            for name, file in zip(names, files, strict=True):
                os.replace(folder / f"{name}.arrow", output / split / file)
    if arrow:
        write_json(output / "dataset_dict.json", {"splits": splits})


def _write_dataset_state(folder: Path, split: str, files: list[str], fingerprint: str) -> None:
    """What `load_from_disk` wants beside a split's Arrow files, as the library itself writes it of an empty split."""
    empty = Dataset.from_dict({name: [] for name in STUDY_FEATURES}, features=STUDY_FEATURES, split=split)
    with _no_progress_bar():
        empty.save_to_disk(folder, num_shards=1)
    for path in folder.glob("*.arrow"):
        path.unlink()
    path = folder / "state.json"
    state = read_json(path)
    state.update(_data_files=[{"filename": file} for file in files], _fingerprint=fingerprint)
    write_json(path, state)


def check_output(output: Path, overwrite: bool) -> None:
    """Whether a dataset may be put at `output`.

    Raises:
        ValueError: something else is there, or a dataset that may not be replaced.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not (output / SUMMARY).is_file():
            raise ValueError(f"{output} exists and is no dataset of studies: expected a folder that does not exist yet")
        if not overwrite:
            raise ValueError(f"{output} exists: --overwrite replaces it, another --output leaves it alone")


def put_in_place(output: Path, work: Path) -> None:
    """Put a finished dataset in its place; one that is there stays until then."""
    if (output / SUMMARY).is_file():
        old = output.with_name(f"{output.name}.old")
        if old.exists():
            shutil.rmtree(old)
        output.rename(old)
        work.rename(output)
        shutil.rmtree(old)
    else:
        work.replace(output)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Without the library's bar over nothing."""
    enabled = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            enable_progress_bars()


__all__ = ["SUMMARY", "ShardWriter", "check_output", "publish_shards", "put_in_place"]
