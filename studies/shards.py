"""Write a dataset to a folder in shards, so that an interrupted command can continue."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, load_dataset

from ..files_otdrg import read_json, write_json
from ..runtime.journal import WorkSettings
from .schema import STUDY_FEATURES

#: The file of a complete dataset that holds its settings and counts.
SUMMARY = "summary.json"

#: Rows are written when there are this many of them, or this many bytes of images.
_BATCH_ROWS, _BATCH_BYTES = 100, 32 * 2**20


def row_batches(rows: Iterable[dict]) -> Iterator[pa.RecordBatch]:
    """Rows of `STUDY_FEATURES`, whose images hold their bytes, in batches of limited size."""
    batch: list[dict] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(len(image["bytes"]) for image in row["images"])
        if len(batch) >= _BATCH_ROWS or size >= _BATCH_BYTES:
            yield pa.RecordBatch.from_pylist(batch, schema=STUDY_FEATURES.arrow_schema)
            batch, size = [], 0
    if batch:
        yield pa.RecordBatch.from_pylist(batch, schema=STUDY_FEATURES.arrow_schema)


def write_shard(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Write a Parquet file with a row group for each batch. It is complete or absent; without batches it is absent."""
    unfinished = path.with_name(f"{path.name}.tmp")
    writer = None
    try:
        for batch in batches:
            writer = writer or pq.ParquetWriter(unfinished, STUDY_FEATURES.arrow_schema)
            writer.write_batch(batch)
        if writer is not None:
            writer.close()
            unfinished.replace(path)
    finally:
        if writer is not None:
            writer.close()
        unfinished.unlink(missing_ok=True)


class WorkFolder:
    """The folder `OUTPUT.partial` in which a dataset is made; it becomes `OUTPUT` in one step.

    Its settings file identifies the work, so that only the same work is continued. `shards/NAME.json` is written when
    shard NAME is finished.

    Args:
        output: the dataset.
        settings: what determines the content of the dataset.
        task: "build" or "label"; the settings file is `TASK.json`.
    """

    def __init__(self, output: Path, settings: dict[str, Any], task: str):
        self.output = output
        self.path = output.with_name(f"{output.name}.partial")
        self.shards = self.path / "shards"
        self._work_settings = WorkSettings(self.path, settings)
        self.settings = self._work_settings.settings
        self.settings_file = self.path / f"{task}.json"

    def finished(self, overwrite: bool) -> dict[str, Any] | None:
        """The summary of the complete dataset, None if there is none or the work folder is incomplete."""
        if (self.path / SUMMARY).is_file() and not self.settings_file.exists():
            # Stopped just before the last step.
            summary = read_json(self.path / SUMMARY)
            check_output(self.output, overwrite)
            self._put_in_place()
            return summary
        if self.path.exists() or not (self.output / SUMMARY).is_file():
            return None
        return read_json(self.output / SUMMARY)

    def enter(self, resume: bool, overwrite: bool) -> None:
        """Create the folder, or continue with the one of an interrupted run.

        Raises:
            ValueError: the folder exists and is not to be continued, or belongs to other work.
        """
        if self.path.exists():
            if overwrite:
                shutil.rmtree(self.path)
            elif not resume:
                raise ValueError(
                    f"{self.path} is an unfinished dataset: --resume continues it, "
                    "--overwrite deletes it and starts again"
                )
            else:
                self._check_same_work()
                # Left by a run that was stopped while it put its files together.
                for path in self.path.iterdir():
                    if path.is_dir() and not path.is_symlink() and path != self.shards:
                        shutil.rmtree(path)
                    elif path not in (self.shards, self.settings_file):
                        path.unlink()
        self.shards.mkdir(parents=True, exist_ok=True)
        write_json(self.settings_file, self.settings)

    def _check_same_work(self) -> None:
        try:
            before = read_json(self.settings_file)
        except (OSError, ValueError):
            raise ValueError(
                f"{self.settings_file} is missing or damaged: --overwrite deletes {self.path} and starts again"
            ) from None
        self._work_settings.check(before)

    def publish(self, shards: Sequence[tuple[str, Path]], summary: dict[str, Any], arrow: bool) -> None:
        """Move finished shards to `data/SPLIT-I-of-N.parquet`, write the summary and put the dataset in its place.

        `shards` are the split and the Parquet file of each; `arrow` adds the format of `load_from_disk`.
        """
        splits: dict[str, list[Path]] = {}
        for split, file in shards:
            splits.setdefault(split, []).append(file)
        if arrow:
            self._write_arrow(splits)
        (self.path / "data").mkdir()
        for split, files in splits.items():
            for index, file in enumerate(files):
                os.replace(file, self.path / "data" / f"{split}-{index:05d}-of-{len(files):05d}.parquet")
        write_json(self.path / SUMMARY, summary)
        shutil.rmtree(self.shards)
        self.settings_file.unlink()
        self._put_in_place()

    def _write_arrow(self, splits: dict[str, list[Path]]) -> None:
        cache = self.path / "cache"
        files = {split: [str(file) for file in files] for split, files in splits.items()}
        with _no_progress_bars():
            load_dataset("parquet", data_files=files, cache_dir=str(cache)).save_to_disk(self.path)
        shutil.rmtree(cache)

    def _put_in_place(self) -> None:
        """Rename the folder to the output; a dataset that is replaced stays until then."""
        old = self.output.with_name(f".{self.output.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if (self.output / SUMMARY).is_file():
            self.output.rename(old)
        self.path.replace(self.output)
        shutil.rmtree(old, ignore_errors=True)


def check_output(output: Path, overwrite: bool) -> None:
    """Raise a `ValueError` if something at `output` may not be replaced by a dataset."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not (output / SUMMARY).is_file():
            raise ValueError(f"{output} exists and is no dataset of studies: expected a new folder")
        if not overwrite:
            raise ValueError(f"{output} exists: --overwrite replaces it, another --output keeps it")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    enabled = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            enable_progress_bars()
