"""The interface of a source of studies: it lists its studies cheaply and reads them one at a time."""

from __future__ import annotations

import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ..sections_otdrg import SECTIONS

if TYPE_CHECKING:
    from PIL import Image

#: The splits of a collection, in the order in which they are built.
SPLITS: tuple[str, ...] = ("train", "validation", "test")

#: Kinds of view; "unknown" if the source does not say.
VIEWS: tuple[str, ...] = ("frontal", "lateral", "unknown")

#: Names of splits in tables and datasets, in lower case.
SPLIT_NAMES: dict[str, str] = {
    "train": "train",
    **dict.fromkeys(("val", "validate", "validation", "valid", "dev"), "validation"),
    "test": "test",
}

#: Texts of a study besides its report.
TEXTS: tuple[str, ...] = (*SECTIONS, "indication", "comparison")

#: Reasons for skipping a study.
SKIP_KINDS: tuple[str, ...] = (
    "malformed",
    "outside the split",
    "duplicate id",
    "patient in two splits",
    "empty report",
    "missing image",
    "unreadable image",
    "not a chest radiograph",
    "unusable prior",
)


class FoundPrior(NamedTuple):
    """A listed study that is the prior of another one.

    Args:
        entry: the study.
        days: how many days before it was made; None if unknown.
    """

    entry: StudyEntry
    days: int | None


class StudyEntry(NamedTuple):
    """A listed study: what the source needs to read it.

    Args:
        id: unique in the collection.
        patient_id: all studies of one patient are in the same split.
        split: "train", "validation" or "test".
        location: where the study is; any picklable value that the source understands.
        prior: its prior study, set by the listing of a build with priors.
    """

    id: str
    patient_id: str
    split: str
    location: Any
    prior: FoundPrior | None = None


class TableStudy(NamedTuple):
    """What a table says of a study: a location of [`StudyEntry`] that is read without opening another file.

    Args:
        images: paths of the views.
        views: "frontal", "lateral" or "unknown" for each image.
        texts: the texts of the study in the order of `TEXTS`, "" if absent.
        time: the date of the study, or its number in the order of its patient's studies; None if unknown.
        finding_states: 14 state ids, None if not labelled.
    """

    images: tuple[str, ...]
    views: tuple[str, ...]
    texts: tuple[str, ...]
    time: date | int | None = None
    finding_states: tuple[int, ...] | None = None

    def study(self, licence: str) -> Study:
        """The study with this licence."""
        texts = dict(zip(TEXTS, self.texts, strict=True))
        return Study(self.images, self.views, finding_states=self.finding_states, licence=licence, **texts)


class Skipped(NamedTuple):
    """A skipped study.

    Args:
        id: the study's id, or the best available name for it.
        split: the split it would be in; None if unknown.
        kind: one of `SKIP_KINDS`.
        reason: what is wrong, with the file, line or field.
    """

    id: str
    split: str | None
    kind: str
    reason: str


def table_times(entries: Iterable[StudyEntry | Skipped]) -> dict[str, date | int]:
    """The known times of listed studies with a [`TableStudy`], by their ids."""
    listed = ((entry.id, entry.location.time) for entry in entries if isinstance(entry, StudyEntry))
    return {study: time for study, time in listed if time is not None}


class SkipStudy(Exception):
    """Raised by [`StudySource.read`] to skip a study.

    Args:
        kind: one of `SKIP_KINDS`.
        reason: what is wrong, with the file, line or field.
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


@dataclass
class Prior:
    """An earlier study of the same patient, as a record of the later one describes it.

    Args:
        images: its views, as in [`Study`].
        report: its report; "" if unknown, or if it consists of the sections.
        findings, impression: sections of its report, "" if absent.
        days: how many days before it was made; None if unknown.
        patient_id: its patient; None or "" if the record does not say.
        fault: why it cannot be used, "" if it can.
    """

    images: Sequence[str | bytes | Image.Image] = ()
    report: str = ""
    findings: str = ""
    impression: str = ""
    days: int | None = None
    patient_id: str | None = None
    fault: str = ""


@dataclass
class Study:
    """The content of a study.

    Args:
        images: views in order: paths (also of DICOM files), encoded bytes, or images in memory.
        views: "frontal", "lateral" or "unknown" for each image.
        findings, impression, indication, comparison: sections of the report, "" if absent.
        finding_states: 14 state ids in the order of `FINDINGS`, None if not labelled.
        licence: licence of the study.
        tags: further labels such as MeSH terms, None if unknown; "A/b" is a kind of "A".
        prior: the prior study, if the record of the study describes one.
    """

    images: Sequence[str | bytes | Image.Image]
    views: Sequence[str]
    findings: str = ""
    impression: str = ""
    indication: str = ""
    comparison: str = ""
    finding_states: Sequence[int] | None = None
    licence: str = ""
    tags: Sequence[str] | None = None
    prior: Prior | None = None


class StudySource(ABC):
    """A source of studies. Subclasses are dataclasses whose fields, created by [`option`], are the source's options.

    An error of the whole source (a missing file or column) is a `ValueError`, raised as early as possible. An error of
    one study is a [`Skipped`] or a [`SkipStudy`]; the other studies are not affected.

    Attributes:
        name: the registered name, which is also the column `source` of each study.
        example: options of an example command, shown by `otdrg prepare NAME --help`.
        collection: what the studies are, for model cards.
        official_counts: `{split: count}` of the published collection, if the source reads one.
        official_unit: what `official_counts` counts, "studies" or "images".
    """

    name: ClassVar[str]
    example: ClassVar[str] = ""
    collection: ClassVar[str] = ""
    official_counts: dict[str, int] | None = None
    official_unit: str = "studies"

    @abstractmethod
    def entries(self) -> Iterator[StudyEntry | Skipped]:
        """List the studies, always in the same order. Called more than once; keep entries small."""

    @abstractmethod
    def read(self, entry: StudyEntry) -> Study:
        """Read a study. Runs in other processes, on a pickled copy of the source.

        Raises:
            SkipStudy: the study cannot be used.
        """

    def report_sections(self) -> tuple[str, ...]:
        """The sections of the report that studies of this source can have."""
        return SECTIONS

    def official_ids(self, split: str) -> Iterable[str] | None:
        """Ids of a published split, if known: those that the source does not list are reported as missing."""
        return None

    def study_times(self) -> Mapping[str, date | int]:
        """When studies were made, by id, as dates, times or numbers in the order of their patient's studies.

        Priors are found by these times; studies without one are left out.

        Raises:
            ValueError: the source does not say.
        """
        raise ValueError(
            f"source {self.name!r} does not say when studies were made, so it has no priors to find: leave --priors out"
        )

    def published_differences(self) -> list[str]:
        """One line for each difference of the listing, skipped studies included, from the published collection."""
        return []

    @classmethod
    def collection_of(cls, licence: str) -> str:
        """The collection that studies with this licence belong to, for model cards."""
        return cls.collection or f"studies of source {cls.name}"


class ListedSource(StudySource):
    """A source that makes its listing once, in `_list`, and keeps it; copies in other processes do not get it.

    `_list` can set `_differences`, the [`published_differences`].
    """

    _listing: list[StudyEntry | Skipped] | None = None
    _differences: Sequence[str] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_listing": None}

    def entries(self) -> Iterator[StudyEntry | Skipped]:
        if self._listing is None:
            self._listing = self._list()
        return iter(self._listing)

    def published_differences(self) -> list[str]:
        self.entries()
        return list(self._differences)

    @abstractmethod
    def _list(self) -> list[StudyEntry | Skipped]:
        """List the studies."""


def option(help: str, default: Any = MISSING, metavar: str | None = None) -> Any:
    """A field of a source, which becomes an option of `load_studies`, of recipes and of `otdrg prepare`.

    Args:
        help: one sentence.
        default: the default value; without it the option is required.
        metavar: placeholder of the value in the command's help.
    """
    metadata = {"help": help, "metavar": metavar}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def needed_file(path: str | os.PathLike, name: str, what: str) -> Path:
    """The path of a required file; a `ValueError` with the option's name if it is missing or a folder."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: option {name!r} names {what}")
    if not path.is_file():
        raise ValueError(f"{path} does not exist: option {name!r} names {what}")
    return path


def needed_folder(path: str | os.PathLike, name: str, what: str) -> Path:
    """The absolute path of a required folder; a `ValueError` with the option's name if it is missing or a file.

    Absolute, so that studies can be read from another working folder or process.
    """
    path = Path(path)
    if path.is_file():
        raise ValueError(f"{path} is a file: option {name!r} names {what}")
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: option {name!r} names {what}")
    return Path(os.path.abspath(path))


def path_inside(root: str | os.PathLike, path: str) -> str | None:
    """`root`/`path` if that is inside the root, else None. Symbolic links in the folder are followed."""
    root = os.path.join(os.path.abspath(root), "")
    full = os.path.normpath(os.path.join(root, path))
    return full if not os.path.isabs(path) and full.startswith(root) else None


def parse_pairs(name: str, pairs: Sequence[str], form: str) -> list[tuple[str, str]]:
    """Parse the values "a=b" of an option; `form` describes them in the error, as in "FIELD=COLUMN"."""
    parsed = []
    for pair in pairs:
        left, sign, right = pair.partition("=")
        if not sign or not left.strip():
            raise ValueError(f"option {name!r} has {pair!r}: expected {form}")
        parsed.append((left.strip(), right.strip()))
    return parsed


def seeded_split(
    patient_ids: Iterable[str], seed: int = 0, shares: Sequence[float] = (0.8, 0.1, 0.1)
) -> dict[str, str]:
    """Assign patients to splits at random; the same patients and seed give the same splits.

    Args:
        patient_ids: patients of the collection, in any order, with or without repetitions.
        seed: seed of the shuffle.
        shares: shares of the patients in train, validation and test. With three patients or more, no split with a
            share above 0 is empty.

    Returns:
        `{patient_id: split}`.

    Raises:
        ValueError: `shares` are not three non-negative numbers that sum to 1.
    """
    if len(shares) != len(SPLITS) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"split_shares={list(shares)}: expected three shares for {SPLITS} that sum to 1")
    patients = sorted(set(patient_ids))
    random.Random(seed).shuffle(patients)
    wanted = [share > 0 for share in shares]
    counts = [round(share * len(patients)) for share in shares]
    if len(patients) >= sum(wanted):
        counts = [max(count, int(want)) for count, want in zip(counts, wanted, strict=True)]
    largest = counts.index(max(counts))
    counts[largest] += len(patients) - sum(counts)
    splits = (split for split, count in zip(SPLITS, counts, strict=True) for _ in range(count))
    return dict(zip(patients, splits, strict=True))
