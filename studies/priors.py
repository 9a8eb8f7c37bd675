"""Prior studies: find them among the studies of a source, and read them into the rows of the later studies."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from datetime import date, datetime
from typing import TYPE_CHECKING, Any

from ..runtime.interruptions import fault_of_study
from .columns import without_fraction
from .images import read_images
from .placeholders import present_text
from .source import FoundPrior, Prior, SkipStudy, Study, StudyEntry, StudySource

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)


class PriorFinder:
    """Finds the nearest earlier study of the same patient in the same split.

    Studies made at the same time are not priors of each other, and a study without a known time has no prior.

    Args:
        source: the source.

    Raises:
        ValueError: the source does not say when studies were made.
    """

    def __init__(self, source: StudySource):
        self._source = source.name
        self._times = source.study_times()
        self._studies: dict[str, list[StudyEntry]] = defaultdict(list)
        self._sorted = False
        self._unknown = 0

    def add(self, entry: StudyEntry) -> None:
        """Add a study of the source; all are added before the first is asked for."""
        if entry.id in self._times:
            self._studies[entry.patient_id].append(entry)
        else:
            self._unknown += 1

    def of(self, entry: StudyEntry) -> FoundPrior | None:
        """The prior of a study."""
        if not self._sorted:
            self._sort()
        time = self._times.get(entry.id)
        if time is None:
            return None
        for other in reversed(self._studies[entry.patient_id]):
            if other.split == entry.split and self._times[other.id] < time:
                return FoundPrior(other, _days(self._times[other.id], time))
        return None

    def _sort(self) -> None:
        for studies in self._studies.values():
            studies.sort(key=lambda study: self._times[study.id])
        self._sorted = True
        if self._unknown:
            logger.warning(
                "%s: %d studies have no prior and are not priors of others: it is not known when they were made",
                self._source,
                self._unknown,
            )


def prior_columns(
    source: StudySource,
    entry: StudyEntry,
    study: Study,
    image_form: Callable[[str | bytes | Image.Image], dict],
    report_of: Callable[[Study | Prior], str],
) -> tuple[dict[str, Any], list[str]]:
    """The columns of the prior of a study, and why a prior or an image of it cannot be used.

    Args:
        source: source of the study and of its prior.
        entry: the listed study.
        study: the study.
        image_form: converts a view to `{"bytes", "path"}`.
        report_of: the report that consists of the sections of a study or of a prior.
    """
    columns: dict[str, Any] = {"prior_images": [], "prior_report": "", "prior_days": None}
    try:
        prior = _prior(source, entry, study, report_of)
    except SkipStudy as skip:
        return columns, [skip.reason]
    if prior is None:
        return columns, []
    images, image_faults = read_images(prior.images, image_form)
    faults = [f"the prior's {kind}: {reason}" for kind, reason in image_faults]
    columns["prior_images"] = list(images.values())
    columns["prior_report"] = present_text(prior.report)
    if columns["prior_images"] or columns["prior_report"]:
        columns["prior_days"] = prior.days
    elif not faults:
        faults.append("the prior has neither an image nor a report")
    return columns, faults


def _prior(
    source: StudySource, entry: StudyEntry, study: Study, report_of: Callable[[Study | Prior], str]
) -> Prior | None:
    """The prior of a study, described by its record or found in the listing.

    Raises:
        SkipStudy: it cannot be used.
    """
    prior = study.prior
    if prior is not None:
        fault = prior.fault
        if not fault and prior.patient_id and without_fraction(prior.patient_id) != without_fraction(entry.patient_id):
            fault = f"the prior is of patient {prior.patient_id}: expected {entry.patient_id}, the patient of the study"
        if not fault and prior.days is not None and prior.days < 0:
            fault = f"the prior is {-prior.days} days later than its study: expected an earlier one"
        if fault:
            raise SkipStudy("unusable prior", fault)
        return replace(prior, report=prior.report or report_of(prior))
    if entry.prior is None:
        return None
    earlier, days = entry.prior
    try:
        read = source.read(earlier)
        return Prior(read.images, report_of(read), days=days)
    except SkipStudy as skip:
        raise SkipStudy("unusable prior", f"the prior {earlier.id} is left out: {skip.kind}: {skip.reason}") from None
    except Exception as error:  # parsers raise any exception for a damaged file
        reason = f"the prior {earlier.id} is damaged ({fault_of_study(error, quotes=False)})"
        raise SkipStudy("unusable prior", reason) from None


def _days(earlier: date | int, later: date | int) -> int | None:
    """Days from one time to another; None for numbers in an order."""
    if isinstance(earlier, int) or isinstance(later, int):
        return None
    first, last = (time.date() if isinstance(time, datetime) else time for time in (earlier, later))
    return (last - first).days
