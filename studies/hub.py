"""Source `hub`: a dataset on the Hugging Face Hub or in a local folder, with its columns mapped to a study's fields."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.constants import HF_HUB_OFFLINE

from .hub_columns import HubSplit, study_columns
from .placeholders import shown_value
from .source import (
    SPLIT_NAMES,
    SPLITS,
    TEXTS,
    Prior,
    Skipped,
    SkipStudy,
    Study,
    StudyEntry,
    StudySource,
    needed_folder,
    option,
    parse_pairs,
    path_inside,
    seeded_split,
)

_BATCH = 1_000


@dataclass
class HubSource(StudySource):
    """Rows of a dataset as studies: on the Hub, in a folder that `load_dataset` reads, or written by `save_to_disk`.

    A column named as a field is used for this field; `image` is also used for images, `view` for views, `report` or
    `text` for findings. A column of images holds an image or a list of images, or paths. Without ids, a study is named
    by its split and row ("train-12"); without patient ids, each study is a patient. States of the findings are lists of
    14, in the order of `FINDINGS`. An earlier study of the patient is in `prior_images`, `prior_report`, `prior_days`
    and, to be compared with `patient_id`, `prior_patient_id`.

    The patients of a dataset with one split are assigned to three splits at random.
    """

    name = "hub"
    example = "--dataset org/name --column findings=report --output studies"
    collection = "a dataset in the form of the Hub's"

    dataset: str = option("Name of a dataset on the Hub, or a folder.", metavar="NAME")
    config: str | None = option("Configuration of the dataset, if it has several.", None, metavar="NAME")
    revision: str | None = option("Branch, tag or commit on the Hub.", None)
    column: list[str] = option(
        "Columns with other names, as in findings=text images=scan; FIELD= leaves a field out.",
        [],
        metavar="FIELD=COLUMN",
    )
    images: str | None = option(
        "Folder of the images, to which their paths are relative. Default: the folder of a local dataset.",
        None,
        metavar="FOLDER",
    )
    split_map: list[str] = option(
        "Splits with other names, as in train=training test=held_out; the other splits are not used.",
        [],
        metavar="SPLIT=NAME",
    )
    split_shares: list[float] = option(
        "Shares of the patients in train, validation and test, if the dataset has one split.",
        [0.8, 0.1, 0.1],
        metavar="SHARE",
    )
    seed: int = option("Seed of that split.", 0)
    licence: str = option("Licence of the studies. Default: that of the column 'licence'.", "", metavar="NAME")

    def __post_init__(self):
        # Absolute, so that studies can be read from another working folder.
        self._folder = os.path.abspath(self.dataset) if os.path.isdir(self.dataset) else None
        if os.path.isfile(self.dataset):
            raise ValueError(f"{self.dataset} is a file: option 'dataset' names a dataset on the Hub or a folder")
        parse_pairs("column", self.column, "FIELD=COLUMN")  # checks them before anything is loaded
        self._split_pairs = parse_pairs("split_map", self.split_map, "SPLIT=NAME")
        names = [name for _, name in self._split_pairs]
        for split, name in self._split_pairs:
            if split not in SPLITS:
                raise ValueError(f"option 'split_map' names a split {split!r}: expected one of {', '.join(SPLITS)}")
            if names.count(name) > 1:
                raise ValueError(f"option 'split_map' names {name!r} twice: expected once")
        if self.images is not None:
            self.images = str(needed_folder(self.images, "images", "the folder of the dataset's images"))
        seeded_split((), self.seed, self.split_shares)  # checks the shares before anything is loaded
        self._opened: dict[str, HubSplit] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens the same Arrow files.
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

    def report_sections(self) -> tuple[str, ...]:
        names = set().union(*(split.names for split in self._open().values()))
        return tuple(section for section in super().report_sections() if section in names)

    def read(self, entry: StudyEntry) -> Study:
        name, number = entry.location
        split, place = self._open()[name], _place(name, number)
        row = split.rows[number].to_pylist()[0]
        reports = [field for field in ("findings", "impression") if field in row]
        if all(row[field] is None for field in reports):
            columns = " and ".join(split.names[field] for field in reports)
            raise SkipStudy("empty report", f"{place}: {columns} null")
        images = self._images(row["images"], f"{place}, column {split.names['images']!r}")
        return Study(
            images=images,
            views=split.views(row.get("views"), len(images), place),
            **{text: row.get(text) or "" for text in TEXTS},
            finding_states=split.states(row.get("finding_states"), place),
            licence=self.licence or row.get("licence") or "",
            prior=self._prior(row, split.names, place),
        )

    def _prior(self, row: dict[str, Any], names: dict[str, str], place: str) -> Prior | None:
        """The prior in the columns `prior_*` of a row."""
        stored, report = row.get("prior_images") or [], (row.get("prior_report") or "").strip()
        if not stored and not report:
            return None
        days, patient = _number(row.get("prior_days")), _number(row.get("prior_patient_id"))
        prior = Prior(report=report, days=days, patient_id=None if patient is None else str(patient))
        if isinstance(days, float):
            prior.fault = f"{place}, column {names['prior_days']!r}: {days}: expected a whole number of days"
            return prior
        try:
            prior.images = self._images(stored, f"{place}, column {names['prior_images']!r}") if stored else []
        except SkipStudy as skip:
            prior.fault = str(skip)
        return prior

    def _images(self, stored: Any, place: str) -> list[str | bytes]:
        stored = stored if isinstance(stored, list) else [stored]
        if not stored or None in stored:
            raise SkipStudy("missing image", f"{place}: null, expected an image")
        images: list[str | bytes] = []
        for image in stored:
            if isinstance(image, bytes):
                images.append(image)
            elif isinstance(image, str):
                images.append(self._inside(image, place))
            elif image["bytes"] is not None:
                images.append(image["bytes"])
            elif not image["path"]:
                raise SkipStudy("missing image", f"{place}: neither bytes nor a path, expected an image")
            elif os.path.isabs(image["path"]):
                images.append(image["path"])  # found by `datasets` when it built the row
            else:
                images.append(self._inside(image["path"], place))
        return images

    def _inside(self, path: str, place: str) -> str:
        root = self.images or self._folder
        full = path_inside(root, os.path.relpath(path, root) if os.path.isabs(path) else path) if root else None
        if full is None:
            where = f"leaves {root}" if root else "is relative to no folder (option 'images')"
            reason = f"path {shown_value(path)} {where}, expected a path inside the image folder"
            raise SkipStudy("malformed", f"{place}: {reason}")
        return full

    def _list(self, name: str, split: str) -> Iterator[StudyEntry | Skipped]:
        opened = self._open()[name]
        wanted = [field for field in ("id", "patient_id") if field in opened.names]
        if not wanted:
            for number in range(len(opened.rows)):
                yield StudyEntry(f"{name}-{number}", f"{name}-{number}", split, (name, number))
            return
        number = 0
        for batch in opened.rows.select_columns(wanted).iter(_BATCH):
            for row in batch.to_pylist():
                ids = {field: "" if value is None else str(value).strip() for field, value in row.items()}
                study = ids.get("id") or f"{name}-{number}"
                empty = next((field for field in wanted if not ids[field]), None)
                if empty is not None:
                    reason = f"{_place(name, number)}, column {opened.names[empty]!r}: empty, expected an id"
                    yield Skipped(study, split, "malformed", reason)
                else:
                    yield StudyEntry(study, ids.get("patient_id", study), split, (name, number))
                number += 1

    def _split_names(self) -> list[tuple[str, str]] | None:
        """Pairs of a split and its name in the dataset; None if the dataset has only one split."""
        opened = self._open()
        if self._split_pairs:
            pairs = self._split_pairs
        elif len(opened) == 1:
            return None
        else:
            pairs = [(SPLIT_NAMES.get(name.lower()), name) for name in opened]
            unknown = [name for split, name in pairs if split is None]
            if unknown:
                raise ValueError(
                    f"dataset {self.dataset!r} has a split {unknown[0]!r}, which is none of {', '.join(SPLIT_NAMES)}: "
                    f"expected --split-map SPLIT=NAME (its splits: {', '.join(opened)})"
                )
        return sorted(pairs, key=lambda pair: SPLITS.index(pair[0]))

    def _open(self) -> dict[str, HubSplit]:
        """The splits in use, opened once in each process."""
        if self._opened is None:
            loaded = self._load()
            opened = {}
            for name in [name for _, name in self._split_pairs] or loaded:
                if name not in loaded:
                    raise ValueError(
                        f"option 'split_map': dataset {self.dataset!r} has no split {name!r}, "
                        f"expected one of {', '.join(loaded)}"
                    )
                split = study_columns(loaded[name], self.column, f"dataset {self.dataset!r}, split {name!r}")
                if split.image_paths and not (self.images or self._folder):
                    raise ValueError(
                        f"dataset {self.dataset!r}: column {split.names['images']!r} holds paths, "
                        "expected the option 'images', the folder to which they are relative"
                    )
                opened[name] = split
            self._opened = opened
        return self._opened

    def _load(self) -> dict[str, datasets.Dataset]:
        saved = self._folder is not None and any(
            os.path.isfile(os.path.join(self._folder, name)) for name in ("dataset_dict.json", "state.json")
        )
        for name in ("config", "revision"):
            if getattr(self, name) is not None and (saved or (self._folder and name == "revision")):
                raise ValueError(f"option {name!r} does not apply to {self.dataset}, which is a folder on disk")
        try:
            if saved:
                loaded = datasets.load_from_disk(self._folder)
            else:
                loaded = datasets.load_dataset(self._folder or self.dataset, self.config, revision=self.revision)
        except Exception as error:  # every format has its own errors
            raise ValueError(
                f"dataset {self.dataset!r} cannot be loaded: {_first_line(error)}; searched {self._where()}"
            ) from error
        if isinstance(loaded, datasets.Dataset):
            return {str(loaded.split or "train"): loaded}
        return dict(loaded)

    def _where(self) -> str:
        if self._folder:
            return f"the folder {self._folder}"
        offline = ", only in its cache because HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else ""
        return f"the folder {os.path.abspath(self.dataset)}, which does not exist, and the Hub{offline}"


def _place(split: str, row: int) -> str:
    return f"split {split}, row {row}"


def _number(value: Any) -> Any:
    """The value; None for NaN, and an int for a whole float: a column of floats can be of ints, some missing."""
    if not isinstance(value, float):
        return value
    return None if math.isnan(value) else int(value) if value.is_integer() else value


def _first_line(error: Exception) -> str:
    if isinstance(error, DatasetGenerationError) and error.__cause__:
        error = error.__cause__  # the reason why a file could not be converted
    lines = str(error).splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
