"""The studies of `otdrg generate`: from the command line, a list with one on each line, a prepared dataset or a file of
ReXrank."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..findings_otdrg import CONDITIONING_STATES, FINDINGS, finding_key, parse_findings
from ..image_processing_otdrg import read_view, without_credentials
from ..studies.rexrank import read_rexrank, study_images, study_indication

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

_KEYS = ("id", "images", "indication", "findings", "prior_images", "prior_report")


@dataclass(frozen=True)
class ListedStudy:
    """A study whose report is to be written.

    Args:
        id: unique in the list; by default the names of its views.
        images: paths or URLs of its views; None for a study of a dataset, whose views are in `rows`.
        indication: reason for the study.
        findings: states that condition the report, by names of `FINDINGS` and `CONDITIONING_STATES`.
        rows, place: the dataset and the position of the study in it.
        prior_images, prior_report: paths or URLs of the views of an earlier study, and its report; of a study of a
            dataset, they are in `rows`.

    Raises:
        ValueError: a text cannot be encoded as UTF-8, such as the name of a file from another system.
    """

    id: str
    images: tuple[str, ...] | None
    indication: str | None = None
    findings: dict[str, str] = field(default_factory=dict)
    rows: Dataset | None = field(default=None, compare=False, repr=False)
    place: int = 0
    prior_images: tuple[str, ...] = ()
    prior_report: str | None = None

    def __post_init__(self):
        texts_of = {
            "images": self.images or (),
            "id": [self.id],
            "indication": [self.indication or ""],
            "prior_images": self.prior_images,
            "prior_report": [self.prior_report or ""],
        }
        for name, texts in texts_of.items():
            for text in texts:
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(f"{name} {text!a}: cannot be encoded as UTF-8") from error

    def asked(self) -> dict[str, Any]:
        """The study's inputs, as they are recorded beside its report."""
        return {
            "id": self.id,
            **({} if self.images is None else {"images": [without_credentials(image) for image in self.images]}),
            **({"indication": self.indication} if self.indication else {}),
            **({"steered": self.findings} if self.findings else {}),
            **({"prior_images": list(map(without_credentials, self.prior_images))} if self.prior_images else {}),
            **({"prior_report": self.prior_report} if self.prior_report else {}),
        }

    def read_views(self, max_pixels: int) -> list[Image.Image]:
        """Its views, of at most `max_pixels` each.

        Raises:
            ValueError: there is no view, or one cannot be read.
        """
        images: Sequence[Any] | None = self.images
        if self.rows is not None:
            images = [image["bytes"] or image["path"] for image in self.rows[self.place]["images"]]
        if not images:
            raise ValueError("the study has no view: expected at least one")
        return [read_view(image, max_pixels) for image in images]

    def read_prior(self, max_pixels: int, names: Sequence[str]) -> dict[str, Any]:
        """The views and the report of its prior, as `prior_images` and `prior_report`; empty without one.

        Args:
            max_pixels: most pixels of a view.
            names: what the model reads of a prior in a dataset. What a list names is always read.

        Raises:
            ValueError: a view cannot be read.
        """
        images: Sequence[Any] = self.prior_images
        report = self.prior_report
        if self.rows is not None:
            stored = [name for name in names if name in self.rows.column_names]
            row = self.rows.select_columns(stored)[self.place] if stored else {}
            images = [image["bytes"] or image["path"] for image in row.get("prior_images") or ()]
            report = row.get("prior_report")
        return {
            **({"prior_images": [read_view(image, max_pixels) for image in images]} if images else {}),
            **({"prior_report": report} if report else {}),
        }


def typed_findings(pairs: Iterable[str]) -> dict[str, str]:
    """States given as `FINDING=STATE`; case, spaces and underscores are ignored.

    Raises:
        ValueError: another form, an unknown finding or state, or a finding that is given twice.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, separator, state = pair.partition("=")
        if not separator:
            raise ValueError(f"--findings {pair}: expected FINDING=STATE, such as edema=positive")
        try:
            if finding_key(name) in found:
                raise ValueError(f"{finding_key(name)} is given twice, expected it once")
            found |= _named_states({name: state})
        except ValueError as error:
            raise ValueError(f"--findings {pair}: {error}") from error
    return found


def typed_studies(
    studies: Iterable[Sequence[str]], indication: str | None, findings: dict[str, str]
) -> list[ListedStudy]:
    """Studies given as lists of their views.

    Raises:
        ValueError: one is given twice.
    """
    listed = [ListedStudy(_joined(views), tuple(views), indication, findings) for views in studies]
    seen: set[str] = set()
    for study in listed:
        if study.id in seen:
            raise ValueError(f"--study {study.id} is given twice: expected it once")
        seen.add(study.id)
    return listed


def listed_studies(
    lines: Iterable[str], name: str, indication: str | None, findings: dict[str, str]
) -> list[ListedStudy]:
    """Studies listed one per line; blank lines are ignored.

    A line is a JSON object with `images`, the path of a view or a list of paths, and optionally `id`, `indication`,
    `findings`, `prior_images` (as `images`) and `prior_report`; or it consists of the paths of a study's views,
    separated by tabs. Paths are relative to the working directory.

    Args:
        lines: lines of the list.
        name: name of the list, for error messages.
        indication, findings: defaults for all studies; a study's own values replace them, finding by finding.

    Raises:
        ValueError: a line has another form, an id or a study occurs twice, or the list is empty; the message names the
            list, the line and the expected form.
    """
    listed: list[ListedStudy] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        line = line.strip("\r\n")
        if not line.strip():
            continue
        try:
            fields = _json_fields(line) if line.lstrip().startswith("{") else {"images": _tabbed(line)}
            images = tuple(fields["images"])
            study = ListedStudy(
                fields.get("id") or _joined(images),
                images,
                fields.get("indication") or indication,
                {**findings, **fields.get("findings", {})},
                prior_images=tuple(fields.get("prior_images", ())),
                prior_report=fields.get("prior_report"),
            )
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: {error}") from error
        if study.id in seen:
            raise ValueError(
                f"{name}, line {number}: {study.id!r} is in line {seen[study.id]} too; expected each study once, "
                "or an id of its own"
            )
        seen[study.id] = number
        listed.append(study)
    if not listed:
        raise ValueError(f"{name} lists no study: expected one study on each line")
    return listed


def prepared_studies(
    folder: str, split: str | None, indication: str | None, indications: bool, findings: dict[str, str]
) -> list[ListedStudy]:
    """The studies of a split of a dataset from `otdrg prepare`.

    Args:
        folder: folder of the dataset.
        split: its split; optional if there is only one.
        indication, findings: for all studies.
        indications: whether the studies' own indications are used if `indication` is None.

    Raises:
        ValueError: the folder is not a prepared dataset, it has no such split, or several to choose from.
    """
    from ..studies.loading import load_prepared, prepared_splits, undecoded

    splits = prepared_splits(folder)
    if split is None and len(splits) > 1:
        raise ValueError(f"{folder} has the splits {', '.join(splits)}: expected --split, one of them")
    if split is not None and split not in splits:
        raise ValueError(f"{folder} has no split {split!r}: it has {', '.join(splits)}")
    rows = load_prepared(folder)[split or splits[0]]
    # Not decoded by `datasets`, so that [`read_view`] reads all views.
    rows = undecoded(rows)
    own = rows["indication"] if indications and indication is None else [indication] * len(rows)
    return [
        ListedStudy(study, None, reason or None, findings, rows, place)
        for place, (study, reason) in enumerate(zip(rows["id"], own, strict=True))
    ]


def rexrank_studies(
    path: str, root: str | os.PathLike, indication: str | None, indications: bool, findings: dict[str, str]
) -> list[ListedStudy]:
    """The studies of a file of ReXrank.

    Args:
        path: of the file.
        root: folder of the images.
        indication, findings: for all studies.
        indications: whether the indications in the studies' contexts are used if `indication` is None.

    Raises:
        ValueError: as [`read_rexrank`], or a study has no image.
    """
    listed = []
    for study, fields in read_rexrank(path).items():
        reason = indication or (study_indication(fields) if indications else None)
        listed.append(ListedStudy(study, tuple(study_images(path, study, fields, root)), reason, findings))
    return listed


def _joined(images: Sequence[str]) -> str:
    return " + ".join(map(without_credentials, images))


def _named_states(findings: dict[str, Any]) -> dict[str, str]:
    return {FINDINGS[place]: CONDITIONING_STATES[state] for place, state in parse_findings(findings).items()}


def _json_fields(line: str) -> dict[str, Any]:
    """The fields of a study given as a JSON object, checked."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({error})") from error
    for key in fields:
        if key not in _KEYS:
            raise ValueError(f"unknown key {key!r}, expected some of {', '.join(_KEYS)}")
    fields = {key: value for key, value in fields.items() if value is not None}
    for key in ("images", "prior_images") if "prior_images" in fields else ("images",):
        images = fields.get(key)
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not images or not all(isinstance(image, str) and image for image in images):
            raise ValueError(f"{key}: expected the path of a view, or a list of paths")
        fields[key] = images
    for key in ("id", "indication", "prior_report"):
        if key in fields and not isinstance(fields[key], str):
            raise ValueError(f"{key} is {fields[key]!r}, expected a string")
    if not isinstance(fields.get("findings", {}), dict):
        raise ValueError(f'findings is {fields["findings"]!r}, expected an object such as {{"edema": "positive"}}')
    return {**fields, "findings": _named_states(fields.get("findings", {}))}


def _tabbed(line: str) -> list[str]:
    images = [image for image in line.split("\t") if image.strip()]
    if len(images) == 1 and " " in line and not os.path.exists(line) and all(map(os.path.exists, line.split())):
        raise ValueError("the views are separated by spaces, expected tabs")
    return images


def read_lines(name: str) -> list[str]:
    """The lines of a file, or of standard input for `-`, without a byte order mark.

    Raises:
        ValueError: it cannot be read, or is not UTF-8.
    """
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise ValueError(
            f"--studies {name}: cannot be read ({error.strerror}), expected a list of studies, or a folder of otdrg "
            "prepare"
        ) from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"--studies {name}, line {line}: not UTF-8 text ({error.reason}), expected a list of studies"
        ) from error
