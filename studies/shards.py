"""Write a dataset to a folder in shards, so that an interrupted command can continue."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import (
    Dataset,
    DatasetDict,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
)

from ..files_otdrg import read_json, write_json
from ..runtime.journal import WorkSettings
from ..runtime.output_lock import OutputLock
from ..runtime.printable import listed
from .schema import STUDY_FEATURES

_Report = TypeVar("_Report")

#: The file of a complete dataset that holds its settings and counts.
SUMMARY = "summary.json"

#: Rows are written when there are this many of them, or this many bytes of images.
_BATCH_ROWS, _BATCH_BYTES = 100, 32 * 2**20

#: Name of the number of shares in the settings file; absent if one process makes all shards.
_SHARES = "number of --shard"
#: Seconds a share waits for others to begin.
_JOIN_SECONDS = 60.0


class Share(NamedTuple):
    """A share of the shards, made by one of several tasks of a cluster; `I/N` on the command line.

    Args:
        index: number of the share, from 1 to `count`.
        count: number of shares.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Share:
        """The share `I/N`; a `ValueError` if the text has another form."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        share = cls(int(match[1]), int(match[2])) if match else None
        if share is None or not 1 <= share.index <= share.count:
            raise ValueError(f"--shard {text}: expected I/N with I from 1 to N, such as 1/64 for the first of 64")
        return share

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def has(self, position: int) -> bool:
        """Whether the shard at this position, from 0, belongs to the share."""
        return position % self.count == self.index - 1


def row_batches(rows: Iterable[dict]) -> Iterator[pa.RecordBatch]:
    """Rows of `STUDY_FEATURES`, whose images hold their bytes, in batches of limited size."""
    batch: list[dict] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(len(image["bytes"]) for image in (*row["images"], *row["prior_images"]))
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
        shared: whether the command has `--shard` or `--merge`, which exclude `--overwrite`.
        defaults: values of settings that did not exist when older work was begun.
    """

    def __init__(
        self,
        output: Path,
        settings: dict[str, Any],
        task: str,
        shared: bool = False,
        defaults: dict[str, Any] | None = None,
    ):
        self.output = output
        self.path = output.with_name(f"{output.name}.partial")
        self.shards = self.path / "shards"
        self.settings = WorkSettings(self.path, settings).settings
        self.settings_file = self.path / f"{task}.json"
        self._shared = shared
        self._defaults = defaults

    def finished(self, overwrite: bool) -> bool:
        """Whether the output is a dataset and there is no unfinished work."""
        if (self.path / SUMMARY).is_file() and not self.settings_file.exists():
            # Stopped just before the last step.
            self.check_output(overwrite)
            self._put_in_place()
        return not self.path.exists() and (self.output / SUMMARY).is_file()

    def check_output(self, overwrite: bool) -> None:
        """Raise a `ValueError` if something at the output may not be replaced by the dataset."""
        if not self.output.exists() or (self.output.is_dir() and not any(self.output.iterdir())):
            return
        if not (self.output / SUMMARY).is_file():
            raise ValueError(f"{self.output} exists and is no dataset of studies: expected a new folder")
        if not overwrite:
            how = "delete it to replace it" if self._shared else "--overwrite replaces it"
            raise ValueError(f"{self.output} exists: {how}, another --output keeps it")

    def check_settings(self, folder: Path, before: dict[str, Any]) -> None:
        """Raise a `ValueError` if a dataset, or unfinished work, was made with other settings than these."""
        WorkSettings(folder, self.settings, defaults=self._defaults).check(before, self._anew(folder))

    def _anew(self, folder: Path) -> str:
        """How the user starts anew."""
        return f"deleting {folder}" if self._shared else "--overwrite instead of --resume"

    def enter(self, resume: bool, overwrite: bool) -> None:
        """Create the folder, or continue with the one of an interrupted run.

        Args:
            resume: continue with a folder that exists.
            overwrite: without `resume`, delete a folder that exists.

        Raises:
            ValueError: the folder exists and is not to be continued, or belongs to other work.
        """
        if self.path.exists():
            if resume:
                self._check_same_work(None)
                self._remove_leftovers()
            elif overwrite:
                self._check_no_share_runs()
                shutil.rmtree(self.path)
            else:
                raise ValueError(
                    f"{self.path} is an unfinished dataset: --resume continues it, "
                    "--overwrite deletes it and starts again"
                )
        self._write_settings(None)

    @contextmanager
    def join(self, share: Share, finished: Callable[[], _Report | None]) -> Iterator[_Report | None]:
        """Make the shards of a share in the folder, while other processes make those of other shares.

        A share that was interrupted is continued. `finished` gives the report of the dataset if it is complete, else
        None, which is also the value of this context manager.

        Raises:
            OutputLockedError: another process makes this share, or puts the dataset together.
            ValueError: the folder belongs to other work, or to another number of shares.
        """
        with ExitStack() as locks:
            with OutputLock(self.output, wait=_JOIN_SECONDS):
                report = finished()
                if report is None:
                    # A task that was killed while it created the folder leaves no files.
                    if any(path.is_file() for path in self.path.rglob("*")):
                        self._check_same_work(share.count)
                    self._write_settings(share.count)
                    locks.enter_context(self._share_lock(share))
            yield report

    def end_shares(self) -> int:
        """The number of shares that the folder was made in, after checking that no process makes one of them.

        Raises:
            OutputLockedError: a process makes one of the shares.
            ValueError: the folder is missing, belongs to other work, or was not made in shares.
        """
        if not self.path.exists():
            raise ValueError(f"{self.path} does not exist: expected the shards of the same command with --shard I/N")
        count = self._shares()
        if count is None:
            raise ValueError(f"{self.path} was not made with --shard: --resume continues it")
        self._check_same_work(count)
        self._check_no_share_runs()
        self._remove_leftovers()
        return count

    def check_shares(self, missing: Sequence[int], count: int) -> None:
        """Raise a `ValueError` that names the shares of the shards at these positions, if there are any."""
        if missing:
            shares = [str(Share(index + 1, count)) for index in sorted({position % count for position in missing})]
            raise ValueError(
                f"{self.path}: --shard {listed(shares)} not finished: {len(missing):,} files are missing or of studies "
                f"that have changed; run the command with --shard {shares[0]}{' and so on' if shares[1:] else ''}, "
                "then --merge again"
            )

    def _share_lock(self, share: Share) -> OutputLock:
        return OutputLock(self.path / f"shard-{share.index}-of-{share.count}")

    def _check_no_share_runs(self) -> None:
        count = self._shares() or 0
        for index in range(1, count + 1):
            with self._share_lock(Share(index, count)):
                pass

    def _shares(self) -> int | None:
        try:
            return read_json(self.settings_file).get(_SHARES)
        except (OSError, ValueError):
            return None

    def _write_settings(self, shares: int | None) -> None:
        self.shards.mkdir(parents=True, exist_ok=True)
        write_json(self.settings_file, self.settings if shares is None else {**self.settings, _SHARES: shares})

    def _check_same_work(self, shares: int | None) -> None:
        try:
            before = read_json(self.settings_file)
        except (OSError, ValueError):
            anew = self._anew(self.path)
            raise ValueError(f"{self.settings_file} is missing or damaged: {anew} starts anew") from None
        began = before.pop(_SHARES, None)
        self.check_settings(self.path, before)
        if began != shares:
            then, now = (f"with --shard I/{count}" if count else "without --shard" for count in (began, shares))
            ways = "--merge puts finished shards together" if began else "--resume continues it"
            raise ValueError(f"{self.path} was begun {then}, not {now}: {ways}; delete the folder to start again")

    def _remove_leftovers(self) -> None:
        """Remove what a run left that was stopped while it put its files together."""
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink() and path != self.shards:
                shutil.rmtree(path)
            elif path not in (self.shards, self.settings_file):
                path.unlink()

    def publish(self, shards: Sequence[tuple[str, Path]], summary: dict[str, Any], arrow: bool) -> None:
        """Name finished shards `data/SPLIT-I-of-N.parquet`, write the summary and put the dataset in its place.

        `shards` are the split and the Parquet file of each; `arrow` adds the format of `load_from_disk`. If it is
        interrupted, no shard is lost: the next run repeats these steps, or only the last one.
        """
        splits: dict[str, list[Path]] = {}
        for split, file in shards:
            splits.setdefault(split, []).append(file)
        if arrow:
            self._write_arrow(splits)
        (self.path / "data").mkdir()
        for split, files in splits.items():
            for index, file in enumerate(files):
                _link(file, self.path / "data" / f"{split}-{index:05d}-of-{len(files):05d}.parquet")
        write_json(self.path / SUMMARY, summary)
        self.settings_file.unlink()
        self._put_in_place()

    def _write_arrow(self, splits: dict[str, list[Path]]) -> None:
        cache = self.path / "cache"
        files = {split: [str(file) for file in files] for split, files in splits.items()}
        with _no_progress_bars():
            loaded = load_dataset("parquet", data_files=files, cache_dir=str(cache))
            # The fingerprint of `load_dataset` depends on the time at which the files were written.
            fixed = {
                split: Dataset(rows.data, info=rows.info, split=rows.split, fingerprint=_digest(splits[split]))
                for split, rows in loaded.items()
            }
            DatasetDict(fixed).save_to_disk(self.path)
        shutil.rmtree(cache)

    def _put_in_place(self) -> None:
        """Rename the folder to the output; a dataset that is replaced stays until then."""
        if self.shards.exists():
            shutil.rmtree(self.shards)
        old = self.output.with_name(f".{self.output.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if (self.output / SUMMARY).is_file():
            self.output.rename(old)
        self.path.replace(self.output)
        shutil.rmtree(old, ignore_errors=True)


def _link(file: Path, name: Path) -> None:
    """Give a file a second name, or another one if the file system has no hard links."""
    try:
        os.link(file, name)
    except OSError:
        os.replace(file, name)


def _digest(files: Sequence[Path]) -> str:
    """A fingerprint for `datasets` of the content of files, in order."""
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    enabled = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            enable_progress_bars()
