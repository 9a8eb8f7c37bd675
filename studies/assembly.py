"""From a source's studies to the rows of a dataset: what is listed, what is kept, and why the rest is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from ..runtime.interruptions import fault_of_study
from .placeholders import present_text
from .schema import STUDY_FEATURES
from .source import SPLITS, VIEWS, Skipped, SkipStudy, Study, StudyEntry, StudySource

if TYPE_CHECKING:
    from PIL import Image

Sections = Literal["findings", "impression", "findings+impression"]

#: The section or sections that make the report.
SECTIONS: tuple[str, ...] = ("findings", "impression", "findings+impression")
_TEXTS = ("findings", "impression", "indication", "comparison")


def choose_report(study: Study, sections: Sections) -> str:
    """The text a model learns to write: a section, or findings and impression as far as the study has them.

    Raises:
        ValueError: unknown sections.
    """
    if sections not in SECTIONS:
        raise ValueError(f"unknown sections {sections!r}: expected one of {', '.join(SECTIONS)}")
    texts = (getattr(study, section).strip() for section in sections.split("+"))
    return " ".join(text for text in texts if text)


class StudyListing:
    """A source's studies, with those left out that the list alone is enough to refuse.

    The first study of an id is kept. Of a patient who is in two splits only the studies of one are kept: the test
    split's before validation's, validation's before train's, so that held-out data stays whole.

    Args:
        source: the source; it is listed once here, and once each time this is iterated over.
        limit: most studies and faults listed of each split, from its start.

    Attributes:
        total: studies and faults it will list.
    """

    def __init__(self, source: StudySource, limit: int | None = None):
        self.source = source
        self.limit = limit
        self._patients: dict[str, str] = {}
        counts: Counter[str | None] = Counter()
        for entry in self._entries():
            counts[entry.split] += 1
            if isinstance(entry, StudyEntry):
                _check_split(entry)
                kept = self._patients.get(entry.patient_id)
                if kept is None or SPLITS.index(entry.split) > SPLITS.index(kept):
                    self._patients[entry.patient_id] = entry.split
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
                yield Skipped(entry.id, entry.split, "duplicate id", f"{entry.id} is listed before: the first is kept")
            elif entry.split != home:
                reason = f"patient {entry.patient_id} is in {home} too, whose studies are kept"
                yield Skipped(entry.id, entry.split, "patient in two splits", reason)
            else:
                yield entry
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
    """Why an id cannot be written to the files that reports and scores are kept in; None where it can."""
    if not study.strip():
        return "is blank: expected a name"
    if "\0" in study:
        return "holds a NUL: expected text"
    try:
        study.encode()
    except UnicodeEncodeError:
        return "is not UTF-8: expected text"
    return None


def _check_split(entry: StudyEntry) -> None:
    if entry.split not in SPLITS:
        raise ValueError(f"study {entry.id} is in the split {entry.split!r}: expected one of {', '.join(SPLITS)}")


@dataclass
class Assembled:
    """What became of a study.

    Args:
        row: by `STUDY_FEATURES`; None where the study is left out.
        faults: everything that is wrong with it; views that were left out of a row that is kept, too.
    """

    row: dict | None
    faults: list[Skipped] = field(default_factory=list)


def assemble_study(
    source: StudySource,
    entry: StudyEntry,
    image_form: Callable[[str | bytes | Image.Image], dict],
    sections: Sections = "findings",
    keep_incomplete: bool = False,
) -> Assembled:
    """Read a study and make a row of it.

    Args:
        source: the source that listed it.
        entry: the study.
        image_form: makes `{"bytes", "path"}` of a view.
        sections: what the report is made of.
        keep_incomplete: keep a study of whose views at least one can be read; otherwise all of them must.
    """
    faults: list[Skipped] = []

    def fault(kind: str, reason: str) -> None:
        faults.append(Skipped(entry.id, entry.split, kind, reason))

    try:
        study = source.read(entry)
        # Texts that are there stay as they are, white space included.
        study = replace(study, **{name: "" for name in _TEXTS if not present_text(getattr(study, name), name)})
        report = choose_report(study, sections)
    except SkipStudy as skip:
        fault(skip.kind, skip.reason)
        return Assembled(None, faults)
    except Exception as error:  # a damaged file raises whatever its parser meets
        fault("malformed", fault_of_study(error, quotes=False))
        return Assembled(None, faults)
    if not report:
        fault("empty report", f"the study has no {sections.replace('+', ' and no ')}")
        return Assembled(None, faults)
    images, views = [], []
    for number, (image, view) in enumerate(zip(study.images, study.views, strict=True)):
        try:
            images.append(image_form(image))
            views.append(VIEWS.index(view))
        except SkipStudy as skip:
            fault(skip.kind, skip.reason)
        except Exception as error:
            name = image if isinstance(image, str) else f"view {number}"
            fault("unreadable image", f"{name}: {fault_of_study(error)}")
    if not study.images:
        fault("missing image", "the study names no image")
    if not images or (faults and not keep_incomplete):
        return Assembled(None, faults)
    row = {
        "id": entry.id,
        "patient_id": entry.patient_id,
        "images": images,
        "views": views,
        "findings": study.findings,
        "impression": study.impression,
        "indication": study.indication,
        "comparison": study.comparison,
        "report": report,
        "finding_states": study.finding_states,
        "source": source.name,
        "licence": study.licence,
    }
    try:
        if study.finding_states is not None:
            row["finding_states"] = [int(state) for state in study.finding_states]
        # As it will be written, but for the images' bytes: text that is not UTF-8, a number in place of a text...
        names = [{"bytes": b"", "path": image["path"]} for image in images]
        pa.RecordBatch.from_pylist([{**row, "images": names}], schema=STUDY_FEATURES.arrow_schema)
    except Exception as error:
        fault("malformed", f"what was read of it is not in a study's form ({fault_of_study(error, quotes=False)})")
        return Assembled(None, faults)
    return Assembled(row, faults)


__all__ = ["SECTIONS", "Assembled", "Sections", "StudyListing", "assemble_study", "choose_report"]
