"""Source `phantom`: procedural chest radiographs whose findings, masks, states and reports are known exactly.

Phantoms do not replace radiographs; they provide ground truth for tests of training, heatmaps and metrics. A phantom is
determined by its seed and index.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image

from ..findings_otdrg import FINDINGS, NEGATIVE, POSITIVE, UNCLEAR, UNMENTIONED
from ..sections_otdrg import SECTIONS
from .phantom_canvas import Canvas
from .phantom_frontal import Frontal
from .phantom_lateral import Lateral
from .phantom_wording import (
    CHANGES,
    FindingDetail,
    complete_states,
    sample_details,
    sample_question,
    write_change,
    write_follow_up,
    write_impression,
    write_indication,
    write_report,
)
from .source import Prior, Study, StudyEntry, StudySource, option

#: Share of the studies that are normal before findings are drawn; more are normal afterwards.
_NORMAL = 0.10
_UNCLEAR = 0.022
#: For each finding, in the other studies: the frequency of positive, and the frequency of negative if it is absent.
_FREQUENCIES = {
    "enlarged_cardiomediastinum": (0.09, 0.45),
    "cardiomegaly": (0.17, 0.85),
    "lung_opacity": (0.14, 0.20),
    "lung_lesion": (0.11, 0.20),
    "edema": (0.12, 0.30),
    "consolidation": (0.11, 0.80),
    "pneumonia": (0.10, 0.15),
    "atelectasis": (0.12, 0.08),
    "pneumothorax": (0.11, 0.90),
    "pleural_effusion": (0.17, 0.90),
    "pleural_other": (0.09, 0.06),
    "fracture": (0.10, 0.15),
    "support_devices": (0.16, 0.05),
}
_STRENGTH = {UNMENTIONED: 0.0, NEGATIVE: 0.0, POSITIVE: 1.0, UNCLEAR: 0.5}
_DRAWINGS = {"frontal": Frontal, "lateral": Lateral}
_SMALLEST = 32

#: Most studies of a split, so that splits do not overlap.
_SPLIT_STRIDE = 10_000_000
#: Index of the first study of each split.
SPLIT_STARTS = {"train": 0, "validation": _SPLIT_STRIDE, "test": 2 * _SPLIT_STRIDE}
LICENCE = "Apache-2.0"
#: Findings in which the prior of a phantom may differ, unless others are named.
PRIOR_FINDINGS: tuple[str, ...] = ("cardiomegaly", "pleural_effusion", "pneumothorax")


@dataclass
class Phantom:
    """One procedural study.

    Args:
        id: "phantom-SEED-INDEX".
        images: an 8-bit grayscale image for each view.
        views: "frontal" or "lateral" for each image.
        masks: for each visible positive finding, a bool array (size, size) for each view: the pixels it changes. All
            False in a view that does not show it; for an enlarged heart, and for a wide mediastinum in a frontal view,
            the whole organ.
        states: (14,) int64 state ids in the order of `FINDINGS`, as in the report.
        details: place and size by finding (also of absent ones).
        question: the finding in question in the indication, or "".
        indication: the reason for the study, or "". It only reveals that the report mentions the finding in question.
        findings: the findings section, with a sentence for each mentioned finding.
        impression: the conclusion, which answers the indication first.
        report: the same as `findings`.
    """

    id: str
    images: list[Image.Image]
    views: tuple[str, ...]
    masks: dict[str, list[np.ndarray]]
    states: np.ndarray
    details: dict[str, FindingDetail]
    question: str
    indication: str
    findings: str
    impression: str
    report: str


def sample_states(rng: np.random.Generator) -> np.ndarray:
    """Draw (14,) state ids: each finding is positive in 8 to 15 % of studies; about a quarter are normal."""
    normal = rng.random() < _NORMAL
    draws, denials = rng.random(len(_FREQUENCIES)), rng.random(len(_FREQUENCIES))
    states = []
    for (positive, denied), draw, denial in zip(_FREQUENCIES.values(), draws, denials, strict=True):
        if not normal and draw < positive:
            states.append(POSITIVE)
        elif not normal and draw < positive + _UNCLEAR:
            states.append(UNCLEAR)
        else:
            states.append(NEGATIVE if denial < denied else UNMENTIONED)
    return complete_states(states)


def make_phantom(
    seed: int,
    index: int,
    image_size: int = 224,
    views: Sequence[str] = ("frontal", "lateral"),
    states: Sequence[int | str] | None = None,
    exposure: str = "canvas",
) -> Phantom:
    """Make the study with this seed and index.

    Args:
        seed: seed of the collection, 0 or more.
        index: index of the study, 0 or more.
        image_size: height and width in pixels, at least 32.
        views: "frontal" or "lateral" for each image.
        states: states of the first 13 findings or all 14, instead of those drawn from the seed; the rest of the study
            does not change, so that two phantoms differ only by their findings. No Finding follows from the others.
        exposure: another name takes other images of the same patient: position, contrast and noise differ.

    Raises:
        ValueError: an option outside these bounds.
    """
    _check("seed", seed, 0)
    _check("index", index, 0)
    _check("image_size", image_size, _SMALLEST)
    views = _checked_views(views)
    stream = partial(_stream, seed, index)
    chosen = sample_states(stream("states")) if states is None else complete_states(states)
    details = sample_details(stream("details"))
    strengths = {finding: _STRENGTH[int(state)] for finding, state in zip(FINDINGS, chosen, strict=True)}
    images, drawn = [], []
    for position, view in enumerate(views):
        canvas = Canvas(image_size, stream(f"{exposure} {position}"))
        drawn.append(_DRAWINGS[view](canvas, stream, strengths, details).draw())
        images.append(canvas.expose())
    nowhere = np.zeros((image_size, image_size), bool)
    masks = {
        finding: [view_masks.get(finding, nowhere) for view_masks in drawn]
        for finding, state in zip(FINDINGS[:-1], chosen, strict=False)
        if state == POSITIVE
    }
    findings = write_report(chosen, stream("wording"), details)
    question = sample_question(chosen, stream("question"))
    return Phantom(
        id=phantom_id(seed, index),
        images=images,
        views=views,
        masks=masks,
        states=chosen,
        details=details,
        question=question,
        indication=write_indication(question, stream("indication")),
        findings=findings,
        impression=write_impression(chosen, details, question, stream("answer")),
        report=findings,
    )


@dataclass
class FollowUp:
    """A phantom with an earlier study of the same patient that differs in at most one finding.

    Args:
        phantom: the study, whose sections end with a sentence on the finding. Its indication names the finding.
        prior: the earlier study.
        finding: the finding.
        change: "new" (in the study only), "unchanged" (in both) or "resolved" (in the earlier one only).
        days: how many days before the study the earlier one was made.
    """

    phantom: Phantom
    prior: Phantom
    finding: str
    change: str
    days: int


def make_follow_up(
    seed: int,
    index: int,
    image_size: int = 224,
    views: Sequence[str] = ("frontal", "lateral"),
    findings: Sequence[str] = PRIOR_FINDINGS,
) -> FollowUp:
    """Make the study with this seed and index and its prior; `findings`, and changes, are equally frequent.

    Raises:
        ValueError: an option outside the bounds of [`make_phantom`], or an unknown finding.
    """
    findings = _checked_findings(findings)
    rng = _stream(seed, index, "prior")
    finding, change, days = str(rng.choice(findings)), str(rng.choice(list(CHANGES))), int(rng.integers(1, 366))

    def states(state: int) -> np.ndarray:
        drawn = sample_states(_stream(seed, index, "states"))
        drawn[FINDINGS.index(finding)] = state
        return drawn

    now, before = NEGATIVE if change == "resolved" else POSITIVE, NEGATIVE if change == "new" else POSITIVE
    prior = make_phantom(seed, index, image_size, views, states(before), exposure="prior canvas")
    phantom = make_phantom(seed, index, image_size, views, states(now))
    change_sentence = write_change(finding, phantom.details[finding], change)
    findings_section = f"{phantom.findings} {change_sentence}"
    phantom = replace(
        phantom,
        question="",
        indication=write_follow_up(finding),
        findings=findings_section,
        impression=f"{write_impression(phantom.states, phantom.details)} {change_sentence}",
        report=findings_section,
    )
    return FollowUp(phantom, prior, finding, change, days)


@dataclass
class PhantomSource(StudySource):
    """Procedural studies whose findings, masks, states and reports are known exactly.

    A larger split begins with the studies of a smaller one, and splits do not overlap. A study differs from its
    prior in at most one of `prior_findings`.
    """

    name = "phantom"
    example = "--train 2000 --views frontal lateral --output phantoms"
    collection = "phantom radiographs"

    train: int = option("Number of studies for training.", 2000, metavar="N")
    validation: int = option("Number of studies for validation.", 200, metavar="N")
    test: int = option("Number of studies for test.", 200, metavar="N")
    image_size: int = option("Height and width in pixels.", 224, metavar="PIXELS")
    seed: int = option("Seed of the collection.", 0)
    views: list[str] = option("Views of a study: frontal, lateral.", ["frontal"], metavar="VIEW")
    prior_share: float = option(
        "Share of the studies with a prior study, which differs in at most one finding; their reports say whether the "
        "finding is new, unchanged or resolved.",
        0.0,
        metavar="SHARE",
    )
    prior_findings: list[str] = option("Findings that may differ.", list(PRIOR_FINDINGS), metavar="FINDING")

    def __post_init__(self):
        for split in SPLIT_STARTS:
            count = getattr(self, split)
            _check(split, count, 0)
            if count > _SPLIT_STRIDE:
                raise ValueError(f"option {split!r} is {count}: expected at most {_SPLIT_STRIDE} studies")
        if not any(getattr(self, split) for split in SPLIT_STARTS):
            raise ValueError("options 'train', 'validation' and 'test' are all 0: expected at least one study")
        _check("seed", self.seed, 0)
        _check("image_size", self.image_size, _SMALLEST)
        self.views = list(_checked_views(self.views))
        if not 0 <= self.prior_share <= 1:
            raise ValueError(f"option 'prior_share' is {self.prior_share!r}: expected a share from 0 to 1")
        self.prior_findings = _checked_findings(self.prior_findings)

    def entries(self) -> Iterator[StudyEntry]:
        for split, start in SPLIT_STARTS.items():
            for index in range(start, start + getattr(self, split)):
                name = phantom_id(self.seed, index)
                yield StudyEntry(name, name, split, index)

    def read(self, entry: StudyEntry) -> Study:
        phantom, prior, comparison = self._read(entry.location)
        return Study(
            images=phantom.images,
            views=phantom.views,
            findings=phantom.findings,
            impression=phantom.impression,
            indication=phantom.indication,
            comparison=comparison,
            finding_states=phantom.states.tolist(),
            licence=LICENCE,
            prior=prior,
        )

    def _read(self, index: int) -> tuple[Phantom, Prior | None, str]:
        """A phantom, its prior and its comparison."""
        if _stream(self.seed, index, "has prior").random() >= self.prior_share:
            return make_phantom(self.seed, index, self.image_size, self.views), None, ""
        made = make_follow_up(self.seed, index, self.image_size, self.views, self.prior_findings)
        sections = {name: getattr(made.prior, name) for name in SECTIONS}
        prior = Prior(made.prior.images, days=made.days, **sections)
        return made.phantom, prior, f"Radiograph of {made.days} days before."


def _stream(seed: int, index: int, name: str) -> np.random.Generator:
    """Random numbers of a study for one purpose."""
    return np.random.default_rng([seed, index, zlib.crc32(name.encode())])


def phantom_id(seed: int, index: int) -> str:
    """The id of a study."""
    return f"phantom-{seed}-{index}"


def _check(name: str, value: int, least: int) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ValueError(f"option {name!r} is {value!r}: expected a whole number of {least} or more")


def _checked_findings(findings: Sequence[str]) -> list[str]:
    known = FINDINGS[:-1]
    if isinstance(findings, str) or not findings or any(finding not in known for finding in findings):
        raise ValueError(f"option 'prior_findings' is {findings!r}: expected one or more of {', '.join(known)}")
    return list(findings)


def _checked_views(views: Sequence[str]) -> tuple[str, ...]:
    names = (views,) if isinstance(views, str) else tuple(views)
    if not names or any(name not in _DRAWINGS for name in names):
        raise ValueError(f"option 'views' is {views!r}: expected one or more of {', '.join(_DRAWINGS)}")
    return names
