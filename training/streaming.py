"""Training studies that are read from disk as they are needed, for collections that do not fit into memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..studies.loading import prepared_column, prepared_shards, stream_prepared


class StreamedStudies(torch.utils.data.IterableDataset):
    """A split of a built dataset: views are streamed from its shards, in an order that is new each epoch.

    What is small is held in memory as columns, `id`, `report` and `finding_states`, and can be read and replaced as
    those of a `datasets.Dataset` can. `shards` are the files.

    Args:
        folder: of the dataset.
        split: "train", "validation" or "test".
        seed: of the order.
        buffer: studies among which the next one is drawn. Shards are shuffled as well.

    Raises:
        ValueError: the folder is not a built dataset, or has no such split.
    """

    def __init__(self, folder: str | os.PathLike, split: str, seed: int = 0, buffer: int = 256):
        self.shards = prepared_shards(folder, split)
        self._stream = stream_prepared(folder, split).shuffle(seed=seed, buffer_size=buffer)
        self._columns = {name: prepared_column(folder, split, name) for name in ("id", "report", "finding_states")}

    def __len__(self) -> int:
        return len(self._columns["id"])

    def __getitem__(self, column: str) -> list:
        return self._columns[column]

    def select(self, positions: Sequence[int]) -> StreamedStudies:
        """The studies at these positions of the columns; the others are passed over."""
        return self._changed({name: [values[i] for i in positions] for name, values in self._columns.items()})

    def with_column(self, name: str, values: list) -> StreamedStudies:
        """The same studies with another column."""
        return self._changed({**self._columns, name: values})

    def _changed(self, columns: dict[str, list]) -> StreamedStudies:
        changed = object.__new__(type(self))
        changed.shards, changed._stream, changed._columns = self.shards, self._stream, columns
        return changed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        places = {study: place for place, study in enumerate(self._columns["id"])}
        for row in self._stream:
            place = places.get(row["id"])
            if place is not None:
                yield {**row, **{name: values[place] for name, values in self._columns.items()}}

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for this epoch; the Trainer calls it."""
        self._stream.set_epoch(epoch)


__all__ = ["StreamedStudies"]
