"""What every source of studies has in common: it lists its studies cheaply and reads them one at a time."""

from __future__ import annotations

import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from PIL import Image

#: The splits of a collection, in the order in which they are built.
SPLITS: tuple[str, ...] = ("train", "validation", "test")

#: Kinds of view; "unknown" where a source does not say.
VIEWS: tuple[str, ...] = ("frontal", "lateral", "unknown")

#: Why a study can be left out.
SKIP_KINDS: tuple[str, ...] = (
    "malformed",
    "outside the split",
    "duplicate id",
    "patient in two splits",
    "empty report",
    "missing image",
    "unreadable image",
    "not a chest radiograph",
)


class StudyEntry(NamedTuple):
    """A study as it is listed: small, and enough for the source that listed it to read it.

    Args:
        id: the study's, unique in the collection.
        patient_id: studies of one patient must not be in two splits.
        split: "train", "validation" or "test".
        location: where the study is, in a form of the source's own that can be pickled.
    """

    id: str
    patient_id: str
    split: str
    location: Any


class Skipped(NamedTuple):
    """A study that is left out.

    Args:
        id: the study's, or the best name there is for it.
        split: the one it would have been in, if that is known.
        kind: one of `SKIP_KINDS`.
        reason: what is wrong with it, naming the file, line or field.
    """

    id: str
    split: str | None
    kind: str
    reason: str


class SkipStudy(Exception):
    """Raised by [`StudySource.read`] for a study that has to be left out.

    Args:
        kind: one of `SKIP_KINDS`.
        reason: what is wrong with it, naming the file, line or field.
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


@dataclass
class Study:
    """What a source reads of one study.

    Args:
        images: its views in order: paths (DICOM too), encoded bytes, or images in memory.
        views: "frontal", "lateral" or "unknown", one an image.
        findings, impression, indication, comparison: sections of the report, "" where there is none.
        finding_states: 14 state ids in the order of `FINDINGS`, None where nobody has labelled them.
        licence: under which the study is used.
    """

    images: Sequence[str | bytes | Image.Image]
    views: Sequence[str]
    findings: str = ""
    impression: str = ""
    indication: str = ""
    comparison: str = ""
    finding_states: Sequence[int] | None = None
    licence: str = ""


class StudySource(ABC):
    """A source of studies. Subclasses are dataclasses whose fields, made by [`option`], are the source's options.

    A fault in the source as a whole (a file that is missing, a column that is not there) is a `ValueError` as early as
    it can be seen; a fault in one study is a [`Skipped`] or [`SkipStudy`], and the others go on.

    Attributes:
        name: as registered; what `source` says of each study.
        official_counts: `{split: count}` of the published collection, where this is one; see `official_unit`.
        official_unit: what is counted, "studies" or "images".
    """

    name: ClassVar[str]
    official_counts: dict[str, int] | None = None
    official_unit: str = "studies"

    @abstractmethod
    def entries(self) -> Iterator[StudyEntry | Skipped]:
        """The studies in an order that is always the same, each as an entry or as a reason to leave it out.

        It is called more than once, and must not hold more in memory than a line or two a study.
        """

    @abstractmethod
    def read(self, entry: StudyEntry) -> Study:
        """The study itself. Runs in other processes, on a copy of the source.

        Raises:
            SkipStudy: it has to be left out.
        """

    def official_ids(self, split: str) -> Iterable[str] | None:
        """Ids of the published split, where they are known; those that are not listed are then named as missing."""
        return None


def option(help: str, default: Any = MISSING, metavar: str | None = None) -> Any:
    """A field of a source: an option of `load_studies`, of a recipe and of `otdrg prepare`.

    Args:
        help: what it means, one sentence.
        default: without one, the option is needed.
        metavar: how the value is called in the command's help.
    """
    metadata = {"help": help, "metavar": metavar}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def needed_file(path: str | os.PathLike, name: str, what: str) -> Path:
    """The path of a file a source cannot do without.

    Raises:
        ValueError: it is missing or a folder; says which option names it.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: option {name!r} names {what}")
    if not path.is_file():
        raise ValueError(f"{path} does not exist: option {name!r} names {what}")
    return path


def needed_folder(path: str | os.PathLike, name: str, what: str) -> Path:
    """The absolute path of a folder a source cannot do without.

    Absolute, so that the studies can be read after a change of folder and from another process.

    Raises:
        ValueError: it is missing or a file; says which option names it.
    """
    path = Path(path)
    if path.is_file():
        raise ValueError(f"{path} is a file: option {name!r} names {what}")
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: option {name!r} names {what}")
    return Path(os.path.abspath(path))


def path_inside(root: str | os.PathLike, path: str) -> str | None:
    """`root`/`path` where that is inside the root, else None. Only the name is distrusted, not links in the folder."""
    root = os.path.join(os.path.abspath(root), "")
    full = os.path.normpath(os.path.join(root, path))
    return full if not os.path.isabs(path) and full.startswith(root) else None


def seeded_split(
    patient_ids: Iterable[str], seed: int = 0, shares: Sequence[float] = (0.8, 0.1, 0.1)
) -> dict[str, str]:
    """Patients dealt to the splits: none is in two, and the same patients and seed give the same splits.

    Args:
        patient_ids: of the collection; repetitions and order do not matter.
        seed: of the shuffle.
        shares: of the patients in train, validation and test. With three patients or more, no split whose share is
            above 0 is left empty.

    Returns:
        `{patient_id: split}`.

    Raises:
        ValueError: shares that are not three numbers from 0 that sum to 1.
    """
    if len(shares) != len(SPLITS) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"split_shares={list(shares)}: expected three numbers from 0 that sum to 1, for {SPLITS}")
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


__all__ = [
    "SKIP_KINDS",
    "SPLITS",
    "VIEWS",
    "SkipStudy",
    "Skipped",
    "Study",
    "StudyEntry",
    "StudySource",
    "needed_file",
    "needed_folder",
    "option",
    "path_inside",
    "seeded_split",
]
