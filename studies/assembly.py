"""Convert the studies of a source to the rows of a dataset, and record why studies are skipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import pyarrow as pa

from ..runtime.interruptions import fault_of_study
from ..sections_otdrg import join_sections
from .images import read_images
from .placeholders import present_text
from .priors import PriorFinder, prior_columns
from .schema import STUDY_FEATURES
from .source import SPLITS, TEXTS, VIEWS, Prior, Skipped, SkipStudy, Study, StudyEntry, StudySource

if TYPE_CHECKING:
    from PIL import Image

Sections = Literal["findings", "impression", "findings+impression"]

#: What the report can consist of: one section, or both, each below its heading.
SECTIONS: tuple[str, ...] = get_args(Sections)

ImageForm = Callable[["str | bytes | Image.Image"], dict]


def choose_report(study: Study, sections: Sections) -> str:
    """The text a model learns to write: a section, or both below their headings as far as the study has them.

    Raises:
        ValueError: unknown sections.
    """
    if sections not in SECTIONS:
        raise ValueError(f"unknown sections {sections!r}: expected one of {', '.join(SECTIONS)}")
    if sections == "findings+impression":
        return join_sections(study.findings, study.impression)
    return getattr(study, sections).strip()


def check_sections(source: StudySource, sections: Sections) -> None:
    """Refuse sections that no study of the source has; raises `ValueError`."""
    there = source.report_sections()
    if lacking := [section for section in sections.split("+") if section not in there]:
        raise ValueError(
            f"sections={sections!r}, but source {source.name!r} has no {lacking[0]} here: expected {' or '.join(there)}"
        )


class StudyListing:
    """The studies of a source, without those that can be rejected by their id or patient.

    The first study with an id is kept. If a patient is in two splits, only the studies of one are kept: test is
    preferred to validation, and validation to train, so that held-out data stays complete.

    Args:
        source: the source; it is listed once here, and once for each iteration.
        limit: list at most this many studies and faults of each split, from its start.
        priors: whether entries have their `prior`, which may be beyond the limit.

    Attributes:
        total: number of studies and faults in the listing.
    """

    def __init__(self, source: StudySource, limit: int | None = None, priors: bool = False):
        self.source = source
        self.limit = limit
        self._patients: dict[str, str] = {}
        self._priors = PriorFinder(source) if priors else None
        counts: Counter[str | None] = Counter()
        for entry in self._entries():
            counts[entry.split] += 1
            if isinstance(entry, StudyEntry):
                if entry.split not in SPLITS:
                    raise ValueError(
                        f"study {entry.id} is in the split {entry.split!r}: expected one of {', '.join(SPLITS)}"
                    )
                kept = self._patients.get(entry.patient_id)
                if kept is None or SPLITS.index(entry.split) > SPLITS.index(kept):
                    self._patients[entry.patient_id] = entry.split
                if self._priors is not None:
                    self._priors.add(entry)
        self.total = sum(counts.values() if limit is None else (min(limit, count) for count in counts.values()))

    def __iter__(self) -> Iterator[StudyEntry | Skipped]:
        seen: set[str] = set()
        listed: Counter[str] = Counter()
        for entry in self._entries():
            if self.limit is not None and listed[entry.split] == self.limit:
                continue
            listed[entry.split] += 1
            if isinstance(entry, Skipped):
                yield entry
                continue
            home = self._patients[entry.patient_id]
            if (wrong := _wrong_id(entry.id)) is not None:
                yield Skipped(entry.id, entry.split, "malformed", f"the id {entry.id!a} {wrong}")
            elif entry.id in seen:
                reason = f"{entry.id} is listed before: the first study is kept"
                yield Skipped(entry.id, entry.split, "duplicate id", reason)
            elif entry.split != home:
                reason = f"patient {entry.patient_id} is in {home} too: the studies of {home} are kept"
                yield Skipped(entry.id, entry.split, "patient in two splits", reason)
            else:
                yield entry if self._priors is None else entry._replace(prior=self._priors.of(entry))
            seen.add(entry.id)

    def _entries(self) -> Iterator[StudyEntry | Skipped]:
        count = 0
        try:
            for entry in self.source.entries():
                yield entry
                count += 1
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            if type(error) is ValueError:
                raise
            reason = fault_of_study(error, quotes=False)
            raise ValueError(
                f"source {self.source.name!r} cannot be listed after {count:,} studies ({reason})"
            ) from error


def _wrong_id(study: str) -> str | None:
    """Why an id cannot be written to files of reports and scores; None if it can."""
    if not study.strip():
        return "is blank: expected a name"
    if "\0" in study:
        return "holds a NUL: expected text"
    try:
        study.encode()
    except UnicodeEncodeError:
        return "is not UTF-8: expected text"
    return None


@dataclass
class Assembled:
    """A study as a row.

    Args:
        row: values by `STUDY_FEATURES`; None if the study is skipped.
        faults: everything wrong with the study, including views and priors that are missing from a row that is kept.
        lacks: the section that the report of a row does not have, though both were asked for.
    """

    row: dict | None
    faults: list[Skipped] = field(default_factory=list)
    lacks: str | None = None


def assemble_study(
    source: StudySource,
    entry: StudyEntry,
    image_form: ImageForm,
    sections: Sections = "findings",
    keep_incomplete: bool = False,
) -> Assembled:
    """Read a study and convert it to a row.

    `image_form` converts a view to `{"bytes", "path"}`. With `keep_incomplete`, one readable view is enough.
    """

    def skipped(kind: str, reason: str) -> Assembled:
        return Assembled(None, [Skipped(entry.id, entry.split, kind, reason)])

    try:
        study = _without_placeholders(source.read(entry))
        report = choose_report(study, sections)
        views = [VIEWS.index(view) for _, view in zip(study.images, study.views, strict=True)]
    except SkipStudy as skip:
        return skipped(skip.kind, skip.reason)
    except Exception as error:  # parsers raise any exception for a damaged file
        return skipped("malformed", fault_of_study(error, quotes=False))
    if not report:
        return skipped("empty report", f"the study has no {sections.replace('+', ' and no ')}")
    if not study.images:
        return skipped("missing image", "the study names no image")
    images, image_faults = read_images(study.images, image_form)
    faults = [Skipped(entry.id, entry.split, *fault) for fault in image_faults]
    if not images or (faults and not keep_incomplete):
        return Assembled(None, faults)

    def report_of(prior: Study | Prior) -> str:
        prior_sections = Study((), (), findings=prior.findings, impression=prior.impression)
        return choose_report(_without_placeholders(prior_sections), sections)

    prior, prior_faults = prior_columns(source, entry, study, image_form, report_of)
    faults += [Skipped(entry.id, entry.split, "unusable prior", reason) for reason in prior_faults]
    row = {
        "id": entry.id,
        "patient_id": entry.patient_id,
        "images": list(images.values()),
        "views": [views[place] for place in images],
        **{name: getattr(study, name) for name in TEXTS},
        "report": report,
        "finding_states": study.finding_states,
        "tags": None if study.tags is None else list(study.tags),
        **prior,
        "source": source.name,
        "licence": study.licence,
    }
    try:
        if study.finding_states is not None:
            row["finding_states"] = [int(state) for state in study.finding_states]
        _check_row(row)
    except Exception as error:
        reason = f"the content does not have the form of a study ({fault_of_study(error, quotes=False)})"
        return Assembled(None, [*faults, *skipped("malformed", reason).faults])
    asked = sections.split("+")
    return Assembled(row, faults, next((name for name in asked if not row[name].strip()), None))


def _without_placeholders(study: Study) -> Study:
    """The study without texts that are placeholders; the others are kept unchanged, with their white space."""
    return replace(study, **{name: "" for name in TEXTS if not present_text(getattr(study, name), name)})


def _check_row(row: dict[str, Any]) -> None:
    """Raise an error if a row cannot be written: text that is not UTF-8, a number in place of a text..."""
    named = {
        column: [{"bytes": b"", "path": image["path"]} for image in row[column]]
        for column in ("images", "prior_images")
    }
    pa.RecordBatch.from_pylist([{**row, **named}], schema=STUDY_FEATURES.arrow_schema)
