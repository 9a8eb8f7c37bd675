"""A frozen encoder's features: encoded once, kept on disk, and read by every stage in place of the images."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from ..image_processing_otdrg import read_file, read_view
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from ..studies.schema import UNCLEANED
from ..studies.streaming import StreamedStudies
from .feature_store import SHARD_VIEWS, FeatureStore

logger = logging.getLogger(__name__)

#: The parts of a model that make its view features.
ENCODERS: tuple[str, ...] = ("vision_tower", "finding_vision_tower")
#: What a configuration says of where it comes from, and not of what it does.
_PROVENANCE = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "backbone_revisions",
    "backbone_sha256",
    "dtype",
    "processor_class",
    "transformers_version",
    "weights",
    "weights_sha256",
)


class CachedStudies(torch.utils.data.Dataset):
    """Studies whose views come as features from disk; their small columns are held in memory.

    `[position]` is a row with `view_features` (V, image_tokens, D) in the encoder's type and the columns, `[name]` a
    column as a list; the rest is as of a `datasets.Dataset`.

    Args:
        store: holds the features.
        views: of each study, the digests of its views in order.
        columns: values for each study, by name.
    """

    def __init__(self, store: FeatureStore, views: list[list[bytes]], columns: dict[str, list]):
        self._store = store
        self._views = views
        self._columns = columns

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, key: int | str) -> dict[str, Any] | list:
        if isinstance(key, str):
            return self._columns[key]
        features = torch.stack([self._store[digest] for digest in self._views[key]])
        return {"view_features": features, **{name: values[key] for name, values in self._columns.items()}}

    @property
    def column_names(self) -> list[str]:
        """Names of what a row holds."""
        return ["view_features", *self._columns]

    def select(self, positions: Iterable[int]) -> CachedStudies:
        """The studies at these positions, in this order."""
        positions = list(positions)
        columns = {name: [values[i] for i in positions] for name, values in self._columns.items()}
        return CachedStudies(self._store, [self._views[i] for i in positions], columns)

    def select_columns(self, names: Collection[str]) -> CachedStudies:
        """The same studies with `view_features` and, of the columns, these alone."""
        columns = {name: self._columns[name] for name in names if name != "view_features"}
        return CachedStudies(self._store, self._views, columns)

    def with_column(self, name: str, values: list) -> CachedStudies:
        """The same studies with another column."""
        return CachedStudies(self._store, self._views, {**self._columns, name: values})


def encoder_is_frozen(model: OTDRGForReportGeneration) -> bool:
    """Whether nothing that makes a model's view features is being trained."""
    return not any(
        parameter.requires_grad
        for name, parameter in model.named_parameters()
        if name.startswith(tuple(f"{part}." for part in ENCODERS))
    )


def cache_features(
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    studies: Dataset | StreamedStudies,
    folder: str | os.PathLike,
    batch_size: int,
    left_out: dict[str, str] | None = None,
) -> CachedStudies:
    """Encode the views that have no features in `folder` yet, and read all of them from there.

    A view is known by the bytes of its image file, wherever that lies, so that one which is met twice is encoded once;
    features by encoder, transform and type as well ([`encoder_digest`]), so that none is ever read that would be
    another now. In a distributed run every process must call it: each encodes its share.

    Args:
        model: on the device on which it is to encode; its type and mode are left as they are.
        processor: the model's.
        studies: as `STUDY_FEATURES` has them.
        folder: of features, of any number of encoders; all processes must see the same.
        batch_size: views encoded at a time.
        left_out: takes the ids of studies with a view that cannot be read, and why; such studies are left out. Without
            it they are an error. Not for a distributed run.

    Raises:
        ValueError: a study without views, an image that cannot be read, or a damaged file in `folder`.
        OSError: a folder that cannot be written to or is not the same for all.
    """
    state = PartialState()
    store = FeatureStore(Path(folder) / encoder_digest(model, processor))
    ids = list(studies["id"])
    mine = {place: [_digest(file) for file in files] for place, files in _image_files(studies, left_out=left_out)}
    everyones = list(mine.items())
    views = dict(gather_object(everyones) if state.num_processes > 1 else everyones)
    for place, study in enumerate(ids):
        if not views.get(place) and study not in (left_out or ()):
            reason = f"study {study!r} has no view: a report is only written from at least one"
            if left_out is None:
                raise ValueError(reason)
            left_out[study] = reason
    places = [place for place in range(len(ids)) if views.get(place)]
    # The process that has a view's first study in its share encodes it, whatever the others see of the folder.
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
    share = {digest: first[digest] for digest in absent if first[digest] in mine}
    refused: dict[bytes, str] = {}
    _encode(model, processor, studies, share, store, batch_size, None if left_out is None else refused)
    for place in places if refused else ():
        reason = next((refused[digest] for digest in views[place] if digest in refused), None)
        if reason is not None:
            left_out[ids[place]] = reason
    places = [place for place in places if ids[place] not in (left_out or ())]
    state.wait_for_everyone()
    store.refresh()
    if any(digest not in store for digest in first if digest not in refused):
        raise OSError(
            f"{store.folder} lacks features that were written: expected a folder that all processes see, and image "
            "files that do not change"
        )
    names = ("id", "report", UNCLEANED, "indication", "finding_states")
    columns = {name: list(studies[name]) for name in names if name in studies.column_names}
    columns = {name: [values[place] for place in places] for name, values in columns.items()}
    return CachedStudies(store, [views[place] for place in places], columns)


def _encode(
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    studies: Dataset | StreamedStudies,
    absent: dict[bytes, int],
    store: FeatureStore,
    batch_size: int,
    refused: dict[bytes, str] | None,
) -> None:
    """Encode the views of these digests, each met in the study at its position, shard by shard.

    `refused` takes the digests of views that cannot be read, and why; without it they are an error.
    """
    training = model.training
    model.eval()
    views = _absent_views(studies, absent, processor.max_image_pixels, refused)
    digests: list[bytes] = []
    features: list[torch.Tensor] = []
    hidden = None if PartialState().is_local_main_process else True
    with torch.no_grad(), tqdm(total=len(absent), unit="view", desc="features", disable=hidden) as bar:
        while batch := list(islice(views, batch_size)):
            inputs = processor.encode_images([[image] for _, image in batch])
            pixel_values, view_mask = (inputs[name].to(model.device) for name in ("pixel_values", "view_mask"))
            features += model.encode_views(pixel_values, view_mask)[:, 0].cpu()
            digests += [digest for digest, _ in batch]
            bar.update(len(batch))
            if len(digests) >= SHARD_VIEWS:
                store.add(digests, features)
                digests, features = [], []
        if digests:
            store.add(digests, features)
    model.train(training)


def _absent_views(
    studies: Dataset | StreamedStudies, absent: dict[bytes, int], max_pixels: int, refused: dict[bytes, str] | None
) -> Iterator[tuple[bytes, Image.Image]]:
    """Digest and image of each view that is asked for, once."""
    wanted, ids = set(absent), studies["id"]
    for place, files in _image_files(studies, set(absent.values())):
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
                refused[digest] = str(error)
                continue
            yield digest, image


def _image_files(
    studies: Dataset | StreamedStudies,
    places: Collection[int] | None = None,
    left_out: dict[str, str] | None = None,
) -> Iterator[tuple[int, list[bytes]]]:
    """Of this process's share of the studies, or those at `places` in it: position, and its views' image files.

    `left_out` takes the ids of studies whose files cannot be read, and why; without it they are an error.
    """
    state, ids = PartialState(), studies["id"]
    if isinstance(studies, StreamedStudies):
        rows = studies.image_files(state.process_index, state.num_processes)
    else:
        share = range(state.process_index, len(studies), state.num_processes)
        share = [place for place in share if places is None or place in places]
        tables = studies.select_columns("images").with_format("arrow").select(share).iter(batch_size=32)
        rows = zip(share, chain.from_iterable(table["images"].to_pylist() for table in tables), strict=True)
    for place, views in rows:
        if places is not None and place not in places:
            continue
        try:
            files = [read_file(view["path"]) if view["bytes"] is None else view["bytes"] for view in views or ()]
        except ValueError as error:
            reason = f"study {ids[place]!r}: {error}"
            if left_out is None:
                raise ValueError(reason) from error
            left_out[ids[place]] = reason
            continue
        yield place, files


# --- digests ---------------------------------------------------------------------------------------------------------


def encoder_digest(model: OTDRGForReportGeneration, processor: OTDRGProcessor) -> str:
    """Of all that a view's features follow from besides the view: encoder weights, configurations, transform, type."""
    towers = {part: getattr(model, part, None) for part in ENCODERS}
    settings = {
        "image_tokens": model.config.image_tokens,
        "image_processor": _settings(processor.image_processor),
        "encoders": {part: _settings(tower.config) for part, tower in towers.items() if tower is not None},
    }
    return _digest_weights(model, settings, tuple(f"{part}." for part in ENCODERS))


def model_digest(model: OTDRGForReportGeneration, processor: OTDRGProcessor) -> str:
    """Of all that a report follows from besides the study and the arguments of `generate`."""
    settings = {
        "model": _settings(model.config),
        "image_processor": _settings(processor.image_processor),
        "vocabulary": processor.tokenizer.get_vocab(),
        "generation": _settings(model.generation_config),
    }
    return _digest_weights(model, settings, "")


def _digest_weights(model: OTDRGForReportGeneration, settings: dict[str, Any], prefixes: str | tuple[str, ...]) -> str:
    """Of settings and the weights whose names have one of the prefixes."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, weight in sorted(model.state_dict().items()):
        if name.startswith(prefixes):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _settings(part) -> dict[str, Any]:
    return {name: value for name, value in part.to_dict().items() if name not in _PROVENANCE}


def _digest(file: bytes) -> bytes:
    return hashlib.blake2b(file, digest_size=16).digest()


__all__ = [
    "CachedStudies",
    "cache_features",
    "encoder_digest",
    "encoder_is_frozen",
    "model_digest",
]
