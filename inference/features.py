"""Encode the views of studies, and keep a frozen encoder's features on disk, to be read in place of the images."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from ..image_processing_otdrg import read_file, read_view
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from ..runtime.processes import open_methods
from ..runtime.shared_work import exchange, fixed_blocks, process_place
from ..studies.schema import UNCLEANED
from ..studies.streaming import StreamedStudies
from .collation import collate_views
from .digests import ENCODERS, encoder_digest
from .feature_store import SHARD_VIEWS, FeatureStore

logger = logging.getLogger(__name__)


class CachedStudies(torch.utils.data.Dataset):
    """Studies whose views are read as features from disk; their small columns are held in memory.

    `[position]` is a row with `view_features` (V, tokens, D) in the encoder's type and the columns, `[name]` a
    column as a list; the methods are those of a `datasets.Dataset`. If priors are read, `prior_view_features` (V',
    tokens, D) are those of the prior study, None without one.

    Args:
        store: holds the features.
        views: for each study, the digests of its views in order.
        columns: values for each study, by name.
        priors: for each study, the digests of the views of its prior; None if priors are not read.
    """

    def __init__(
        self,
        store: FeatureStore,
        views: list[list[bytes]],
        columns: dict[str, list],
        priors: list[list[bytes]] | None = None,
    ):
        self._store = store
        self._views = views
        self._columns = columns
        self._priors = priors

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, key: int | str) -> dict[str, Any] | list:
        if isinstance(key, str):
            return self._columns[key]
        row = {"view_features": torch.stack([self._store[digest] for digest in self._views[key]])}
        if self._priors is not None:
            prior = [self._store[digest] for digest in self._priors[key]]
            row["prior_view_features"] = torch.stack(prior) if prior else None
        return {**row, **{name: values[key] for name, values in self._columns.items()}}

    @property
    def column_names(self) -> list[str]:
        """Names of the columns of a row."""
        return ["view_features", *(() if self._priors is None else ("prior_view_features",)), *self._columns]

    @property
    def has_priors(self) -> bool:
        """Whether any study has views of a prior."""
        return any(self._priors or ())

    def select(self, positions: Iterable[int]) -> CachedStudies:
        """The studies at these positions, in this order."""
        positions = list(positions)
        columns = {name: [values[i] for i in positions] for name, values in self._columns.items()}
        priors = None if self._priors is None else [self._priors[i] for i in positions]
        return CachedStudies(self._store, [self._views[i] for i in positions], columns, priors)

    def select_columns(self, names: Collection[str]) -> CachedStudies:
        """The same studies with `view_features` and only these columns."""
        features = ("view_features", "prior_view_features")
        columns = {name: self._columns[name] for name in names if name not in features}
        priors = self._priors if "prior_view_features" in names else None
        return CachedStudies(self._store, self._views, columns, priors)

    def with_column(self, name: str, values: list) -> CachedStudies:
        """The same studies with another column."""
        return CachedStudies(self._store, self._views, {**self._columns, name: values}, self._priors)


def encoder_is_frozen(model: OTDRGForReportGeneration) -> bool:
    """Whether no parameter of the vision encoders is being trained."""
    return not any(
        parameter.requires_grad
        for name, parameter in model.named_parameters()
        if name.startswith(tuple(f"{part}." for part in ENCODERS))
    )


@torch.no_grad()
def encode_batches(
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    rows: Iterable[dict[str, Any]],
    batch_size: int,
    reader: str = "both",
) -> Iterator[tuple[list[dict[str, Any]], torch.Tensor, torch.Tensor]]:
    """Yield batches of rows with the features of their views (B, V, tokens, D) and the views' mask (B, V).

    The model is in evaluation mode meanwhile; features and masks are on its device.

    Args:
        model, processor: the model's type is left as it is.
        rows: with `id` and `images` or `view_features`, as in [`collate_views`].
        batch_size: studies encoded at a time.
        reader: as in `encode_views`.

    Raises:
        ValueError: a view that cannot be read; the message names the study.
    """
    open_methods(model, "encode_views")
    training, remaining = model.training, iter(rows)
    model.eval()
    try:
        while batch := list(islice(remaining, batch_size)):
            views = {name: value.to(model.device) for name, value in collate_views(processor, batch).items()}
            features = views.get("view_features")
            if features is None:
                features = model.encode_views(views["pixel_values"], views["view_mask"], reader)
            yield batch, features, views["view_mask"]
    finally:
        model.train(training)


def cache_features(
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    studies: Dataset | StreamedStudies,
    folder: str | os.PathLike,
    batch_size: int,
    left_out: dict[str, str] | None = None,
) -> CachedStudies:
    """Encode the views that have no features in `folder` yet, and read all of them from there.

    A view is identified by the bytes of its image file, so that a view that occurs twice is encoded once. Features are
    kept apart by [`encoder_digest`], so that those of another encoder or transform are never read. In a distributed run
    every process must call this function; each encodes its share. Views are encoded in fixed batches, which do not
    depend on the number of processes or on what is found in `folder`; only streamed studies are shared by their files.

    Args:
        model: on the device that is to encode; its type and mode are left as they are.
        processor: the model's.
        studies: rows of `STUDY_FEATURES`.
        folder: for the features of any number of encoders; the same for all processes.
        batch_size: views encoded at a time.
        left_out: collects the ids of studies with a view that cannot be read, and why; these studies are left out.
            Without it they are an error.

    Raises:
        ValueError: a study without views, an image that cannot be read, or a damaged file in `folder`.
        OSError: a folder that cannot be written to or that not all processes see.
    """
    store = FeatureStore(Path(folder) / encoder_digest(model, processor))
    ids = list(studies["id"])
    # Digests of the views of each study, by the study's position: first those of this process, then all.
    columns = _view_columns(model, studies)
    mine = {
        place: ([_digest(file) for file in files], count)
        for place, files, count in _image_files(studies, columns, left_out=left_out)
    }
    found: dict[int, tuple[list[bytes], int]] = {}
    for theirs, unread in exchange((mine, left_out)):
        found |= theirs
        if left_out is not None:
            left_out |= unread
    # The views of each study and, if they are read, of its prior; the first `current` are its own.
    views = {place: digests for place, (digests, current) in found.items() if current}
    for place, study in enumerate(ids):
        if place not in views and study not in (left_out or ()):
            _leave_out(study, f"study {study!r} has no view: a report is only written from at least one", left_out)
    places = [place for place in range(len(ids)) if place in views]
    first: dict[bytes, int] = {}
    for place in places:
        for digest in views[place]:
            first.setdefault(digest, place)
    absent = {digest for digest in first if digest not in store}
    logger.info(
        "features of %d studies: %d views found in %s, %d to be encoded",
        len(ids),
        len(first) - len(absent),
        store.folder,
        len(absent),
    )
    blocks = _batches_of_views(studies, first, absent, batch_size, mine)
    refused = _encode_views(store, model, processor, studies, blocks, first, absent, left_out is None)
    for place in places if refused else ():
        reason = next((refused[digest] for digest in views[place] if digest in refused), None)
        if reason is not None:
            left_out[ids[place]] = reason
    places = [place for place in places if ids[place] not in (left_out or ())]
    store.refresh()
    if any(digest not in store for digest in first if digest not in refused):
        raise OSError(
            f"{store.folder} lacks features that were written: expected a folder that all processes see, and image "
            "files that do not change"
        )
    names = ("id", "report", UNCLEANED, "indication", "finding_states", "tags", "prior_report")
    kept = {name: list(studies[name]) for name in names if name in studies.column_names}
    kept = {name: [values[place] for place in places] for name, values in kept.items()}
    current = [views[place][: found[place][1]] for place in places]
    priors = [views[place][found[place][1] :] for place in places] if len(columns) > 1 else None
    return CachedStudies(store, current, kept, priors)


def _view_columns(model: OTDRGForReportGeneration, studies: Dataset | StreamedStudies) -> tuple[str, ...]:
    """The columns of the views that the model reads."""
    names = studies.stored_names if isinstance(studies, StreamedStudies) else studies.column_names
    return ("images", "prior_images") if model.config.reads_prior_images and "prior_images" in names else ("images",)


def _batches_of_views(
    studies: Dataset | StreamedStudies,
    first: dict[bytes, int],
    absent: Collection[bytes],
    batch_size: int,
    mine: Collection[int],
) -> list[list[bytes]]:
    """Digests of the views that this process encodes, in batches: all that hold an `absent` view are shared.

    `first` has the position of the first study with each view, `mine` are the positions this process has read.
    """
    if isinstance(studies, StreamedStudies):
        digests = [digest for digest, place in first.items() if digest in absent and place in mine]
        return [digests[start : start + batch_size] for start in range(0, len(digests), batch_size)]
    digests, (index, count) = list(first), process_place()
    blocks = [[digests[place] for place in block] for block in fixed_blocks(len(digests), batch_size)]
    return [block for block in blocks if not absent.isdisjoint(block)][index::count]


def _encode_views(
    store: FeatureStore,
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    studies: Dataset | StreamedStudies,
    blocks: list[list[bytes]],
    first: dict[bytes, int],
    absent: Collection[bytes],
    strict: bool,
) -> dict[bytes, str]:
    """Encode the views of this process's blocks, and write the `absent` ones shard by shard.

    Returns the views that no process can read, and why; if `strict`, such a view is an error.
    """
    refused: dict[bytes, str] = {}
    share = {digest: first[digest] for block in blocks for digest in block}
    columns = _view_columns(model, studies)
    images = _images(studies, columns, share, processor.max_image_pixels, None if strict else refused)
    digests: list[bytes] = []
    features: list[torch.Tensor] = []
    hidden = None if process_place()[0] == 0 else True
    with tqdm(total=len(share), unit="view", desc="features", disable=hidden) as bar:
        for block in blocks:
            read = [(digest, image) for digest, image in islice(images, len(block)) if image is not None]
            rows = [{"id": digest, "images": [image]} for digest, image in read]
            for batch, encoded, _ in encode_batches(model, processor, rows, len(block)):
                new = [place for place, row in enumerate(batch) if row["id"] in absent]
                digests += [batch[place]["id"] for place in new]
                features += encoded[new, 0].cpu()
            bar.update(len(block))
            if len(digests) >= SHARD_VIEWS:
                store.add(digests, features)
                digests, features = [], []
    if digests:
        store.add(digests, features)
    for theirs in exchange(refused):
        refused |= theirs
    return refused


def _leave_out(study: str, reason: str, left_out: dict[str, str] | None, cause: Exception | None = None) -> None:
    if left_out is None:
        raise ValueError(reason) from cause
    left_out[study] = reason


def _images(
    studies: Dataset | StreamedStudies,
    columns: tuple[str, ...],
    share: dict[bytes, int],
    max_pixels: int,
    refused: dict[bytes, str] | None,
) -> Iterator[tuple[bytes, Image.Image | None]]:
    """Digest and image of each view of `share`, which gives the position of its study, in the order of the studies.

    `refused` collects the views that cannot be read, and why; without it they are an error.
    """
    wanted, ids = set(share), studies["id"]
    for place, files, _ in _image_files(studies, columns, set(share.values())):
        for number, file in enumerate(files):
            digest = _digest(file)
            if digest not in wanted:
                continue
            wanted.remove(digest)
            try:
                image = read_view(file, max_pixels, f"study {ids[place]!r}, view {number}")
            except ValueError as error:
                if refused is None:
                    raise
                refused[digest], image = str(error), None
            yield digest, image


def _image_files(
    studies: Dataset | StreamedStudies,
    columns: tuple[str, ...],
    places: Collection[int] | None = None,
    left_out: dict[str, str] | None = None,
) -> Iterator[tuple[int, list[bytes], int]]:
    """Position of the studies in this process's share, or of those at `places`, the image files in `columns`, one
    column after another, and the number of those in the first column.

    Of streamed studies, those at `places` must be in its share.
    """
    (index, count), ids = process_place(), studies["id"]
    if isinstance(studies, StreamedStudies):
        rows = studies.image_files(index, count, columns)
    else:
        share = range(index, len(studies), count) if places is None else sorted(places)
        tables = studies.select_columns(list(columns)).with_format("arrow").select(share).iter(batch_size=32)
        rows = zip(share, chain.from_iterable(table.to_pylist() for table in tables), strict=True)
    for place, row in rows:
        if places is not None and place not in places:
            continue
        try:
            views = [view for name in columns for view in row[name] or ()]
            files = [read_file(view["path"]) if view["bytes"] is None else view["bytes"] for view in views]
        except ValueError as error:
            _leave_out(ids[place], f"study {ids[place]!r}: {error}", left_out, error)
        else:
            yield place, files, len(row[columns[0]] or ())


# --- digests ---------------------------------------------------------------------------------------------------------


def _digest(file: bytes) -> bytes:
    return hashlib.blake2b(file, digest_size=16).digest()


__all__ = [
    "CachedStudies",
    "cache_features",
    "encode_batches",
    "encoder_is_frozen",
]
