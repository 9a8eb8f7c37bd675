"""Compare the studies that a source lists with the counts the collection was published with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

#: The row of counts of the whole collection.
ALL = "all"


class ListedCounts:
    """Counts studies, images and patients of each split and of the whole collection, damaged rows included."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}
        self._patients: dict[str, set[str]] = {}

    def add(self, split: str | None, patient: str, images: int) -> None:
        """Count a study."""
        for row in filter(None, (split, ALL)):
            self._counts.setdefault(row, Counter()).update(studies=1, images=images)
            self._patients.setdefault(row, set()).add(patient)

    def differences(self, published: Mapping[str, Mapping[str, int]]) -> list[str]:
        """One line for each row of the published counts, `{split or "all": {unit: count}}`, that is different here."""
        lines = []
        for row, counts in published.items():
            here = {**self._counts.get(row, {}), "patients": len(self._patients.get(row, ()))}
            wrong = [unit for unit, count in counts.items() if here.get(unit, 0) != count]
            if wrong:
                listed = ", ".join(f"{here.get(unit, 0):,} {unit}" for unit in wrong)
                expected = ", ".join(f"{counts[unit]:,} {unit}" for unit in wrong)
                lines.append(f"{row}: {listed} listed; {expected} in the published collection")
        return lines
