"""Counts of a build by split, and their comparison with the published counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

from ..runtime.printable import listed, markdown_table
from .assembly import Assembled
from .source import SPLITS, VIEWS, Skipped, StudyEntry, StudySource

#: Kinds of fault that have a count.
_COUNTED = {
    "empty report": "empty_reports",
    "missing image": "missing_images",
    "unreadable image": "unreadable_images",
    "not a chest radiograph": "not_chest",
}
#: Counts that a table has only if they are not 0 in all rows.
_ONLY_IF_ANY = ("without_findings", "without_impression", "priors", "unusable_priors")


@dataclass
class SplitCounts:
    """Counts of one split.

    Args:
        studies, images: kept.
        frontal, lateral, unknown: views kept.
        skipped: studies skipped for any reason.
        empty_reports: studies skipped because they have no report.
        missing_images, unreadable_images: image files, of kept and skipped studies.
        not_chest: DICOM files of another modality or body part, and studies without any other file.
        without_findings, without_impression: studies kept whose report lacks one of the two sections asked for.
        priors: studies kept with a prior study.
        unusable_priors: studies kept whose prior study is left out.
    """

    studies: int = 0
    images: int = 0
    frontal: int = 0
    lateral: int = 0
    unknown: int = 0
    skipped: int = 0
    empty_reports: int = 0
    missing_images: int = 0
    unreadable_images: int = 0
    not_chest: int = 0
    without_findings: int = 0
    without_impression: int = 0
    priors: int = 0
    unusable_priors: int = 0

    def add(self, assembled: Assembled) -> None:
        """Count a study."""
        for fault in assembled.faults:
            self._add_fault(fault)
        if assembled.row is None:
            self.skipped += 1
            return
        self.studies += 1
        if assembled.lacks is not None:
            name = f"without_{assembled.lacks}"
            setattr(self, name, getattr(self, name) + 1)
        has_prior = bool(assembled.row["prior_images"] or assembled.row["prior_report"])
        self.priors += has_prior
        self.unusable_priors += not has_prior and any(fault.kind == "unusable prior" for fault in assembled.faults)
        views = Counter(VIEWS[view] for view in assembled.row["views"])
        self.images += sum(views.values())
        for view, count in views.items():
            setattr(self, view, getattr(self, view) + count)

    def add_skipped(self, skipped: Skipped) -> None:
        """Count a study that was skipped when it was listed."""
        self.skipped += 1
        self._add_fault(skipped)

    def _add_fault(self, fault: Skipped) -> None:
        if name := _COUNTED.get(fault.kind):
            setattr(self, name, getattr(self, name) + 1)

    def merge(self, other: SplitCounts) -> None:
        """Add the counts of another part of the split."""
        for count in fields(self):
            setattr(self, count.name, getattr(self, count.name) + getattr(other, count.name))


def format_counts(counts: dict[str | None, SplitCounts]) -> str:
    """A Markdown table with a row for each split, for studies with an unknown split ("none"), and for the total.

    Studies that lack a section have columns only if there are any.
    """
    rows = {split or "none": counts[split] for split in (*SPLITS, None) if split in counts}
    total = SplitCounts()
    for row in rows.values():
        total.merge(row)
    names = [name for name, count in asdict(total).items() if count or name not in _ONLY_IF_ANY]
    cells = [[split, *(f"{getattr(row, name):,}" for name in names)] for split, row in {**rows, "total": total}.items()]
    return markdown_table(["split", *(name.replace("_", " ") for name in names)], cells)


class OfficialCheck:
    """Compares a build with the published counts of its collection.

    Args:
        source: the source that is built.
        kept: whether to compare the studies that are kept, too: `official_counts` are of studies with findings.
    """

    def __init__(self, source: StudySource, kept: bool = True):
        self.source = source
        self.kept = kept
        self._absent: dict[str, dict[str, None]] = {}
        for split in self._counts:
            ids = source.official_ids(split)
            if ids is not None:
                self._absent[split] = dict.fromkeys(ids)

    @property
    def _counts(self) -> dict[str, int]:
        return (self.source.official_counts or {}) if self.kept else {}

    def see(self, entry: StudyEntry | Skipped) -> None:
        """Record a listed study."""
        if entry.split in self._absent:
            self._absent[entry.split].pop(entry.id, None)

    def warnings(self, counts: dict[str | None, SplitCounts], skipped: dict[str, Iterable[str]]) -> list[str]:
        """One line for each difference of the listing, and for each split whose kept studies are not as many as the
        published ones, with the missing ids."""
        lines = self.source.published_differences()
        for split, official in self._counts.items():
            unit = self.source.official_unit
            kept = getattr(counts.get(split, SplitCounts()), unit)
            if kept == official:
                continue
            line = f"{split}: {kept:,} {unit}, {official:,} in the published split"
            if split not in counts:
                line += "; the source has no such split"
            else:
                for what, ids in (("left out", skipped.get(split, ())), ("not in the source", self._absent.get(split))):
                    if ids:
                        line += f"; {what}: {listed(list(ids))}"
            lines.append(line)
        return lines
