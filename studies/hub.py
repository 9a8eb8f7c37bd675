"""Source `hub`: any dataset of the Hugging Face Hub or of a local folder, its columns mapped to a study's fields."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .hub_columns import HubColumns, find_columns, parse_pairs
from .placeholders import shown_value
from .source import (
    SPLITS,
    Skipped,
    SkipStudy,
    Study,
    StudyEntry,
    StudySource,
    needed_folder,
    option,
    path_inside,
    seeded_split,
)

if TYPE_CHECKING:
    from datasets import Dataset

_SPLIT_NAMES = {
    "train": "train",
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    "test": "test",
}
_TEXTS = ("findings", "impression", "indication", "comparison")
_BATCH = 1_000


@dataclass
class HubSource(StudySource):
    """Rows of a dataset as studies: on the Hub, in a folder of files that `load_dataset` reads, or from `save_to_disk`.

    A column is taken for the field that bears its name; `image` too is taken for images, `view` for views, `report` or
    `text` for findings. A column of images holds an image or a list of them, a column of paths likewise. Without ids,
    a study is called by its split and row ("train-12"); without patient ids, each study is a patient of its own.
    States of the findings are taken from lists of 14, in the order of `FINDINGS`.

    A dataset of one split is dealt to three, by patient.
    """

    name = "hub"
    example = "--dataset org/name --column findings=report --output studies"
    collection = "a dataset in the form of the Hub's"

    dataset: str = option("Name of a dataset on the Hub, or a folder.", metavar="NAME")
    config: str | None = option("Configuration of the dataset, where it has several.", None, metavar="NAME")
    revision: str | None = option("Branch, tag or commit on the Hub.", None)
    column: list[str] = option(
        "Columns that have names of their own, as in findings=text images=scan; FIELD= leaves a field out.",
        [],
        metavar="FIELD=COLUMN",
    )
    images: str | None = option(
        "Folder to which paths of images are relative; a local dataset's own unless given.", None, metavar="FOLDER"
    )
    split_map: list[str] = option(
        "Splits that have names of their own, as in train=training test=held_out; others are then left out.",
        [],
        metavar="SPLIT=NAME",
    )
    split_shares: list[float] = option(
        "Shares of the patients in train, validation and test, where the dataset has one split.",
        [0.8, 0.1, 0.1],
        metavar="SHARE",
    )
    seed: int = option("Seed of that split.", 0)
    licence: str = option("Licence of the studies; by default what a column 'licence' says.", "", metavar="NAME")

    def __post_init__(self):
        # An absolute folder, so that the studies can be read after a change of folder.
        self._folder = os.path.abspath(self.dataset) if os.path.isdir(self.dataset) else None
        if os.path.isfile(self.dataset):
            raise ValueError(f"{self.dataset} is a file: option 'dataset' names a dataset on the Hub or a folder")
        self._fields = parse_pairs("column", self.column)
        self._split_pairs = parse_pairs("split_map", self.split_map)
        for split, _ in self._split_pairs:
            if split not in SPLITS:
                raise ValueError(f"option 'split_map' names a split {split!r}: expected one of {', '.join(SPLITS)}")
        if self.images is not None:
            self.images = str(needed_folder(self.images, "images", "the folder of the dataset's images"))
        seeded_split((), self.seed, self.split_shares)  # refuses wrong shares before anything is loaded
        self._opened: dict[str, tuple[Dataset, HubColumns]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the same Arrow files into its memory.
        return {**self.__dict__, "_opened": None}

    def entries(self) -> Iterator[StudyEntry | Skipped]:
        splits = self._split_names()
        dealt = None
        if splits is None:
            (name,) = self._open()
            patients = (item.patient_id for item in self._list(name, "train") if isinstance(item, StudyEntry))
            dealt = seeded_split(patients, self.seed, self.split_shares)
            splits = [("train", name)]
        for split, name in splits:
            for item in self._list(name, split):
                if dealt is not None:
                    item = item._replace(split=dealt[item.patient_id] if isinstance(item, StudyEntry) else None)
                yield item

    def read(self, entry: StudyEntry) -> Study:
        name, row = entry.location
        dataset, columns = self._open()[name]
        values = dataset[row].to_pylist()[0]
        place = _place(name, row)

        def value(field: str) -> Any:
            return values[columns.names[field]] if field in columns.names else None

        named = [columns.names[text] for text in ("findings", "impression") if text in columns.names]
        if all(values[column] is None for column in named):
            raise SkipStudy("empty report", f"{place}: {' and '.join(named)} null")
        images = self._images(value("images"), f"{place}, column {columns.names['images']!r}")
        views = columns.views(value("views"), len(images), place)
        states = columns.states(value("finding_states"), place)
        texts = {text: value(text) or "" for text in _TEXTS}
        return Study(images, views, **texts, finding_states=states, licence=self.licence or value("licence") or "")

    def _images(self, stored: Any, place: str) -> list[str | bytes]:
        stored = stored if isinstance(stored, list) else [stored]
        if not stored or None in stored:
            raise SkipStudy("missing image", f"{place}: null, expected an image")
        images: list[str | bytes] = []
        for image in stored:
            content = image.get("bytes") if isinstance(image, dict) else image if isinstance(image, bytes) else None
            path = image.get("path") if isinstance(image, dict) else image
            if content is not None:
                images.append(content)
            elif not path:
                raise SkipStudy("missing image", f"{place}: neither bytes nor a path, expected an image")
            elif isinstance(image, dict) and os.path.isabs(path):
                images.append(path)  # by `datasets` itself, which found the file when it made the row
            else:
                images.append(self._inside(path, place))
        return images

    def _inside(self, path: str, place: str) -> str:
        root = self.images or self._folder
        full = path_inside(root, os.path.relpath(path, root) if os.path.isabs(path) else path) if root else None
        if full is None:
            where = f"leaves {root}" if root else "is relative to no folder (option 'images')"
            raise SkipStudy(
                "malformed", f"{place}: path {shown_value(path)} {where}, expected a path inside the image folder"
            )
        return full

    def _list(self, name: str, split: str) -> Iterator[StudyEntry | Skipped]:
        dataset, columns = self._open()[name]
        wanted = [columns.names[field] for field in ("id", "patient_id") if field in columns.names]
        if not wanted:
            for row in range(len(dataset)):
                yield StudyEntry(f"{name}-{row}", f"{name}-{row}", split, (name, row))
            return
        row = 0
        for batch in dataset.select_columns(list(dict.fromkeys(wanted))).iter(_BATCH):
            for values in batch.to_pylist():
                named = {column: str(values[column]).strip() for column in wanted if values[column] is not None}
                empty = next((column for column in wanted if not named.get(column)), None)
                study = named.get(columns.names.get("id", ""), f"{name}-{row}")
                if empty is not None:
                    reason = f"{_place(name, row)}, column {empty!r}: empty, expected an id"
                    yield Skipped(study or f"{name}-{row}", split, "malformed", reason)
                else:
                    patient_id = named.get(columns.names.get("patient_id", ""), study)
                    yield StudyEntry(study, patient_id, split, (name, row))
                row += 1

    def _split_names(self) -> list[tuple[str, str]] | None:
        """Pairs of a split and what the dataset calls it; None where it has only one, which is to be dealt."""
        opened = self._open()
        if self._split_pairs:
            pairs = self._split_pairs
        elif len(opened) == 1:
            return None
        else:
            pairs = [(_SPLIT_NAMES.get(name.lower()), name) for name in opened]
            unknown = [name for split, name in pairs if split is None]
            if unknown:
                raise ValueError(
                    f"dataset {self.dataset!r} has a split {unknown[0]!r}, which is none of {', '.join(_SPLIT_NAMES)}: "
                    f"expected --split-map SPLIT=NAME (its splits: {', '.join(opened)})"
                )
        return sorted(pairs, key=lambda pair: SPLITS.index(pair[0]))

    def _open(self) -> dict[str, tuple[Dataset, HubColumns]]:
        """`{split: (rows as Arrow tables, columns)}`: nothing is decoded, and only the columns in use are read."""
        if self._opened is None:
            loaded = self._load()
            names = [name for _, name in self._split_pairs] or list(loaded)
            opened = {}
            for name in names:
                if name not in loaded:
                    raise ValueError(
                        f"option 'split_map': dataset {self.dataset!r} has no split {name!r}, "
                        f"expected one of {', '.join(loaded)}"
                    )
                columns = find_columns(loaded[name].features, self._fields, f"dataset {self.dataset!r}, split {name!r}")
                if columns.image_paths and not (self.images or self._folder):
                    raise ValueError(
                        f"dataset {self.dataset!r}: column {columns.names['images']!r} holds paths, "
                        "expected the option 'images', the folder to which they are relative"
                    )
                used = list(dict.fromkeys(columns.names.values()))
                opened[name] = (loaded[name].select_columns(used).with_format("arrow"), columns)
            self._opened = opened
        return self._opened

    def _load(self) -> dict[str, Dataset]:
        import datasets

        saved = self._folder is not None and _is_saved(self._folder)
        given = [name for name in ("config", "revision") if getattr(self, name) is not None]
        unused = [name for name in given if saved or (self._folder and name == "revision")]
        if unused:
            raise ValueError(f"option {unused[0]!r} does not apply to {self.dataset}, which is a folder on disk")
        try:
            if saved:
                loaded = datasets.load_from_disk(self._folder)
            else:
                loaded = datasets.load_dataset(self._folder or self.dataset, self.config, revision=self.revision)
        except Exception as error:  # whatever the format's own reader raises
            looked = f"in the folder {self._folder}" if self._folder else self._looked()
            raise ValueError(f"dataset {self.dataset!r} cannot be loaded: {_told(error)}; looked {looked}") from error
        if isinstance(loaded, datasets.Dataset):
            return {str(loaded.split or "train"): loaded}
        return dict(loaded)

    def _looked(self) -> str:
        from huggingface_hub.constants import HF_HUB_OFFLINE

        offline = ", which is off (HF_HUB_OFFLINE), so only in its cache" if HF_HUB_OFFLINE else ""
        return f"for a folder {os.path.abspath(self.dataset)}, which does not exist, and on the Hub{offline}"


def _place(split: str, row: int) -> str:
    return f"split {split}, row {row}"


def _is_saved(folder: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json"))


def _told(error: Exception) -> str:
    """The first line of what went wrong; where a file could not be converted, of the reason for it."""
    from datasets.exceptions import DatasetGenerationError

    if isinstance(error, DatasetGenerationError) and error.__cause__:
        error = error.__cause__
    lines = str(error).splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


__all__ = ["HubSource"]
