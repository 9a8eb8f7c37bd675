"""Stream training studies from disk, for collections larger than memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Image, List
from datasets.distributed import split_dataset_by_node

from .loading import prepared_column, prepared_shards, stream_prepared


class StreamedStudies(torch.utils.data.IterableDataset):
    """A split of a prepared dataset: views are streamed from its shards, in another order in each epoch.

    The columns `id`, `report`, `indication`, `finding_states`, `tags` and `prior_report` are held in memory and can be
    read and replaced as columns of a `datasets.Dataset`. `shards` are the Parquet files.

    Args:
        folder: the dataset.
        split: "train", "validation" or "test".
        seed: seed of the order.
        buffer: size of the shuffle buffer in studies. Shards are shuffled as well.

    Raises:
        ValueError: the folder is not a prepared dataset, or has no such split.
    """

    def __init__(self, folder: str | os.PathLike, split: str, seed: int = 0, buffer: int = 256):
        self.shards = prepared_shards(folder, split)
        # Decoded later, by the function that `generate` uses.
        self._on_disk = stream_prepared(folder, split)
        for name in ("images", "prior_images"):
            if name in (self._on_disk.features or ()):  # earlier versions did not write priors
                self._on_disk = self._on_disk.cast_column(name, List(Image(decode=False)))
        self._stream = self._on_disk.shuffle(seed=seed, buffer_size=buffer)
        names = ["id", "report", "indication", "finding_states"]
        if self.shards:
            stored = pq.read_schema(self.shards[0]).names
            names += [name for name in ("tags", "prior_report") if name in stored]
        self._columns = {name: prepared_column(folder, split, name) for name in names}

    def __len__(self) -> int:
        return len(self._columns["id"])

    def __getitem__(self, column: str) -> list:
        return self._columns[column]

    @property
    def column_names(self) -> list[str]:
        """Names of the columns in memory."""
        return list(self._columns)

    def select(self, positions: Sequence[int]) -> StreamedStudies:
        """The studies at these positions of the columns."""
        return self._changed({name: [values[i] for i in positions] for name, values in self._columns.items()})

    def with_column(self, name: str, values: list) -> StreamedStudies:
        """The same studies with another column."""
        return self._changed({**self._columns, name: values})

    def _changed(self, columns: dict[str, list]) -> StreamedStudies:
        changed = object.__new__(type(self))
        changed.shards, changed._columns = self.shards, columns
        changed._on_disk, changed._stream = self._on_disk, self._stream
        return changed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for place, row in self._placed(self._stream):
            yield {**row, **{name: values[place] for name, values in self._columns.items()}}

    @property
    def stored_names(self) -> list[str]:
        """Names of the columns on disk."""
        return list(self._on_disk.features or ())

    def image_files(
        self, process: int = 0, processes: int = 1, columns: Sequence[str] = ("images",)
    ) -> Iterator[tuple[int, dict[str, list[dict[str, Any]]]]]:
        """The position and the columns of views (`{"bytes", "path"}`, not decoded) of one process's share."""
        views = self._on_disk.select_columns(["id", *columns])
        for place, row in self._placed(split_dataset_by_node(views, process, processes)):
            yield place, {name: row[name] for name in columns}

    def _placed(self, stream: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        places = {study: place for place, study in enumerate(self._columns["id"])}
        for row in stream:
            if row["id"] in places:
                yield places[row["id"]], row

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that determines the order; called by the Trainer."""
        self._stream.set_epoch(epoch)
