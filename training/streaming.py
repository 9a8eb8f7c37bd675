"""Training studies that are read from disk as they are needed, for collections that do not fit into memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import PIL.Image
import torch
from datasets import Dataset, Image, IterableDataset, List
from datasets.distributed import split_dataset_by_node

from ..interruptions import fault_of_study
from ..studies.loading import prepared_column, prepared_shards, stream_prepared


class StreamedStudies(torch.utils.data.IterableDataset):
    """A split of a built dataset: views are streamed from its shards, in an order that is new each epoch.

    What is small is held in memory as columns, `id`, `report`, `indication` and `finding_states`, and can be read and
    replaced as those of a `datasets.Dataset` can. `shards` are the files.

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
        self._on_disk = stream_prepared(folder, split)
        self._stream = _undecoded(self._on_disk).shuffle(seed=seed, buffer_size=buffer)
        names = ("id", "report", "indication", "finding_states")
        self._columns = {name: prepared_column(folder, split, name) for name in names}

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
        changed.shards, changed._columns = self.shards, columns
        changed._on_disk, changed._stream = self._on_disk, self._stream
        return changed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for place, row in self._placed(self._stream):
            images = [decode_view(view, row["id"], number) for number, view in enumerate(row["images"])]
            yield {**row, "images": images, **{name: values[place] for name, values in self._columns.items()}}

    def image_files(self, process: int = 0, processes: int = 1) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """One process's share of the studies, in the order of the shards: position in the columns, and the views as
        `{"bytes", "path"}` of image files that are not decoded."""
        undecoded = _undecoded(self._on_disk.select_columns(["id", "images"]))
        for place, row in self._placed(split_dataset_by_node(undecoded, process, processes)):
            yield place, row["images"]

    def _placed(self, stream: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        places = {study: place for place, study in enumerate(self._columns["id"])}
        for row in stream:
            if row["id"] in places:
                yield places[row["id"]], row

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for this epoch; the Trainer calls it."""
        self._stream.set_epoch(epoch)


class MappedStudies(torch.utils.data.Dataset):
    """Studies of a `datasets.Dataset` as a Trainer reads them: a view that cannot be read is an error with the id.

    Args:
        rows: as `STUDY_FEATURES` has them.
    """

    def __init__(self, rows: Dataset):
        self._rows = rows.with_format("arrow")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        row = self._rows[position].to_pylist()[0]
        images = [decode_view(view, row["id"], number) for number, view in enumerate(row["images"])]
        return {**row, "images": images}


def decode_view(view: dict[str, Any], study: str, number: int) -> PIL.Image.Image:
    """A view as a row of the studies has it, turned upright by its EXIF too.

    Args:
        view: `{"bytes", "path"}` of an image file.
        study: the study's id, for errors.
        number: of the view in the study, from 0, for errors.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return Image().decode_example(view)
    except Exception as error:  # a damaged file raises whatever its decoder meets
        raise ValueError(f"study {study!r}: its view {number} cannot be read ({fault_of_study(error)})") from error


def _undecoded(rows: IterableDataset) -> IterableDataset:
    return rows.cast_column("images", List(Image(decode=False)))


__all__ = ["MappedStudies", "StreamedStudies", "decode_view"]
