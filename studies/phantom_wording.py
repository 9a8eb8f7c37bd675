"""The texts of a phantom: a findings section with a sentence for each finding, an indication, and an impression.

Longer than three screens because of the two tables of wordings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..findings_otdrg import (
    FINDING_DISPLAY_NAMES,
    FINDING_STATES,
    FINDINGS,
    NEGATIVE,
    POSITIVE,
    UNCLEAR,
    UNMENTIONED,
    finding_state_id,
    parse_findings,
)

SIDES: tuple[str, ...] = ("left", "right")
ZONES: tuple[str, ...] = ("upper", "lower")
SIZES: tuple[str, ...] = ("small", "large")
DEVICES: tuple[str, ...] = ("tube", "catheter", "pacemaker")


@dataclass(frozen=True)
class FindingDetail:
    """Place and size of a finding, as drawn and as described in the report.

    Args:
        side: the patient's "left" or "right" (the patient's left is on the viewer's right).
        zone: "upper" or "lower" part of the lung.
        size: "small" or "large".
        device: "tube" (endotracheal), "catheter" (central venous) or "pacemaker".
    """

    side: str = "left"
    zone: str = "upper"
    size: str = "large"
    device: str = "tube"


def sample_details(rng: np.random.Generator) -> dict[str, FindingDetail]:
    """Draw a detail for each of the 14 findings, whether it is present or not.

    The four findings that fill a part of the lung are in different parts, and atelectasis and pleural thickening are on
    the other side than effusion and pneumothorax, so that no finding hides another.
    """
    patches = rng.permutation([(side, zone) for side in SIDES for zone in ZONES])
    patchy = ("lung_opacity", "lung_lesion", "consolidation", "pneumonia")
    details = {}
    for finding in FINDINGS:
        side, zone = patches[patchy.index(finding)] if finding in patchy else (rng.choice(SIDES), rng.choice(ZONES))
        details[finding] = FindingDetail(str(side), str(zone), str(rng.choice(SIZES)), str(rng.choice(DEVICES)))
    for finding, other in (("atelectasis", "pleural_effusion"), ("pleural_other", "pneumothorax")):
        away = SIDES[1 - SIDES.index(details[other].side)]
        details[finding] = FindingDetail(away, "lower", details[finding].size)
    return details


# In the order of a report: heart, mediastinum, lungs, pleura, bones, devices, conclusion. {side}, {zone}, {size},
# {degree}, {grade}, {mass} and {device} are replaced by words for the detail of the finding.
_SENTENCES: dict[str, dict[int, tuple[str, ...]]] = {
    "cardiomegaly": {
        POSITIVE: ("The heart is {degree} enlarged.", "There is {grade} cardiomegaly."),
        NEGATIVE: ("The heart is normal in size.", "Heart size is within normal limits."),
        UNCLEAR: ("The heart is possibly enlarged.", "Questionable cardiomegaly."),
    },
    "enlarged_cardiomediastinum": {
        POSITIVE: ("The mediastinum is widened.", "There is widening of the mediastinum."),
        NEGATIVE: ("The mediastinal contours are normal.", "The mediastinum is unremarkable."),
        UNCLEAR: ("The mediastinum is possibly widened.", "Questionable widening of the mediastinum."),
    },
    "lung_opacity": {
        POSITIVE: (
            "There is a hazy opacity in the {side} {zone} lung.",
            "A hazy opacity is seen in the {side} {zone} lung.",
        ),
        NEGATIVE: ("No focal opacity.", "There is no focal lung opacity."),
        UNCLEAR: ("Possible opacity in the {side} {zone} lung.", "There may be an opacity in the {side} {zone} lung."),
    },
    "consolidation": {
        POSITIVE: (
            "There is dense consolidation in the {side} {zone} lobe.",
            "Dense consolidation is seen in the {side} {zone} lobe.",
        ),
        NEGATIVE: ("No focal consolidation.", "There is no consolidation."),
        UNCLEAR: (
            "Possible consolidation in the {side} {zone} lobe.",
            "There may be consolidation in the {side} {zone} lobe.",
        ),
    },
    "pneumonia": {
        POSITIVE: (
            "There is patchy {side} {zone} lobe pneumonia.",
            "Findings are consistent with pneumonia in the {side} {zone} lobe.",
        ),
        NEGATIVE: ("No evidence of pneumonia.", "There is no pneumonia."),
        UNCLEAR: ("Possible {side} {zone} lobe pneumonia.", "There may be pneumonia in the {side} {zone} lobe."),
    },
    "edema": {
        POSITIVE: ("There is {grade} pulmonary edema.", "{Grade} pulmonary edema is present."),
        NEGATIVE: ("No pulmonary edema.", "There is no evidence of pulmonary edema."),
        UNCLEAR: ("Possible pulmonary edema.", "There may be pulmonary edema."),
    },
    "atelectasis": {
        POSITIVE: ("There is linear atelectasis at the {side} base.", "Linear atelectasis is seen at the {side} base."),
        NEGATIVE: ("No atelectasis.", "There is no evidence of atelectasis."),
        UNCLEAR: ("Possible atelectasis at the {side} base.", "There may be atelectasis at the {side} base."),
    },
    "lung_lesion": {
        POSITIVE: ("There is a {mass} in the {side} {zone} lung.", "A {mass} is seen in the {side} {zone} lung."),
        NEGATIVE: ("No lung nodule or mass.", "There are no nodules or masses."),
        UNCLEAR: ("Possible {mass} in the {side} {zone} lung.", "There may be a {mass} in the {side} {zone} lung."),
    },
    "pleural_effusion": {
        POSITIVE: ("There is a {size} {side} pleural effusion.", "A {size} {side} pleural effusion is present."),
        NEGATIVE: ("No pleural effusion.", "There is no pleural effusion."),
        UNCLEAR: ("Possible {side} pleural effusion.", "There may be a {side} pleural effusion."),
    },
    "pneumothorax": {
        POSITIVE: ("There is a {size} {side} pneumothorax.", "A {size} {side} pneumothorax is present."),
        NEGATIVE: ("No pneumothorax.", "There is no evidence of pneumothorax."),
        UNCLEAR: ("Possible {side} pneumothorax.", "There may be a {side} pneumothorax."),
    },
    "pleural_other": {
        POSITIVE: ("There is {side} pleural thickening.", "Pleural thickening is seen on the {side}."),
        NEGATIVE: ("No pleural thickening.", "There is no pleural thickening."),
        UNCLEAR: ("Possible {side} pleural thickening.", "There may be {side} pleural thickening."),
    },
    "fracture": {
        POSITIVE: ("There is a displaced {side} rib fracture.", "A displaced {side} rib fracture is seen."),
        NEGATIVE: ("No rib fracture.", "There is no evidence of fracture."),
        UNCLEAR: ("Possible {side} rib fracture.", "There may be a {side} rib fracture."),
    },
    "support_devices": {
        POSITIVE: ("{A_device} is in place.", "{A_device} is present."),
        NEGATIVE: ("No lines or tubes.", "There are no lines or tubes."),
        UNCLEAR: ("Possible {device}.", "There may be {a_device}."),
    },
    "no_finding": {
        POSITIVE: ("No acute cardiopulmonary abnormality.", "No acute abnormality is seen."),
    },
}

# For each finding: symptoms or history of the patient, and the name of the finding in the question.
_QUESTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "cardiomegaly": (("Leg swelling", "Shortness of breath on exertion", "New murmur"), "cardiomegaly"),
    "enlarged_cardiomediastinum": (("Chest pain", "High blood pressure", "Tearing back pain"), "mediastinal widening"),
    "lung_opacity": (("Cough", "Fever", "Crackles on auscultation"), "lung opacity"),
    "consolidation": (("Productive cough", "Fever and chills", "Pleuritic pain"), "consolidation"),
    "pneumonia": (("Cough and fever", "Productive cough", "Confusion and fever"), "pneumonia"),
    "edema": (("Shortness of breath", "Orthopnea", "Weight gain"), "pulmonary edema"),
    "atelectasis": (("Hypoxia after surgery", "Low oxygen saturation", "Shortness of breath"), "atelectasis"),
    "lung_lesion": (("Weight loss", "Hemoptysis", "Long history of smoking"), "lung nodule or mass"),
    "pleural_effusion": (("Shortness of breath", "Decreased breath sounds", "Dyspnea"), "pleural effusion"),
    "pneumothorax": (("Sudden chest pain", "Shortness of breath after a biopsy", "Chest trauma"), "pneumothorax"),
    "pleural_other": (("Asbestos exposure", "Chest pain", "Former shipyard worker"), "pleural thickening"),
    "fracture": (("Fall", "Rib pain after a blow", "Motor vehicle collision"), "rib fracture"),
    "support_devices": (
        ("Intensive care", "Transfer from another hospital", "Altered mental status"),
        "lines and tubes",
    ),
}
_INDICATIONS = (
    "{symptom}. Evaluate for {asked}.",
    "{symptom}. Rule out {asked}.",
    "{symptom}, question of {asked}.",
    "{symptom}. Assess for {asked}.",
    "{symptom}, {asked}?",
)
_ANSWERS = {
    POSITIVE: ("{item}, as questioned.", "{item}, in keeping with the clinical question.", "{item}."),
    NEGATIVE: ("No {asked}.", "No evidence of {asked}."),
    UNCLEAR: ("{item}.", "{item}, not certain on this examination."),
}
#: How a finding can differ from the prior study, and how a report says so.
CHANGES: dict[str, str] = {
    "new": "The {item} is new.",
    "unchanged": "The {item} is unchanged.",
    "resolved": "The {item} has resolved.",
}
#: Share of the studies with an indication, if any finding is mentioned.
_ASKED = 0.6

_DEVICE_NAMES = {"tube": "endotracheal tube", "catheter": "central venous catheter", "pacemaker": "pacemaker"}
_NOTHING_SAID = "A radiograph of the chest was obtained."


def complete_states(states: Sequence[int | str]) -> np.ndarray:
    """Complete 13 states with no_finding, or replace it in 14 states; returns (14,) int64 state ids.

    "No Finding" is positive if and only if nothing but support devices is positive or unclear (CheXpert's rule).

    Raises:
        ValueError: another number of states, or an unknown state.
    """
    if len(states) not in (len(FINDINGS) - 1, len(FINDINGS)):
        raise ValueError(f"{len(states)} finding states given: expected {len(FINDINGS) - 1} or {len(FINDINGS)}")
    ids = _state_ids(FINDINGS[:-1], states[: len(FINDINGS) - 1])
    abnormal = any(ids[finding] in (POSITIVE, UNCLEAR) for finding in ids if finding != "support_devices")
    return np.array([*ids.values(), UNMENTIONED if abnormal else POSITIVE], dtype=np.int64)


def write_report(
    states: Sequence[int | str],
    rng: np.random.Generator | int,
    details: Mapping[str, FindingDetail] | None = None,
) -> str:
    """Write a findings section: a sentence for each mentioned finding, in anatomical order.

    Args:
        states: state ids or names of the 14 findings, in the order of `FINDINGS`.
        rng: generator (or its seed) of the wordings, and of details that are not given.
        details: place and size by finding; missing ones are drawn.

    Raises:
        ValueError: not 14 states, an unknown state, or no_finding in contradiction to another finding.
    """
    if len(states) != len(FINDINGS):
        raise ValueError(f"{len(states)} finding states given: expected {len(FINDINGS)}")
    rng = np.random.default_rng(rng)
    details = {**sample_details(rng), **(details or {})}
    ids = _state_ids(FINDINGS, states)
    for finding in FINDINGS[:-2] if ids["no_finding"] == POSITIVE else ():
        if ids[finding] in (POSITIVE, UNCLEAR):
            state = FINDING_STATES[ids[finding]]
            raise ValueError(f"no_finding is positive although {finding} is {state}: expected unmentioned")
    sentences = []
    for finding, wordings in _SENTENCES.items():
        # One draw for each finding, mentioned or not, so that the other wordings do not depend on it.
        draw = rng.random()
        if ids[finding] != UNMENTIONED:
            choices = wordings[ids[finding]]
            sentences.append(_fill(choices[int(draw * len(choices))], details[finding]))
    return " ".join(sentences) or _NOTHING_SAID


def sample_question(states: Sequence[int], rng: np.random.Generator) -> str:
    """Choose one of the mentioned findings for the indication; "" for a study without an indication.

    The order in which findings are tried does not depend on the states.
    """
    carries, order = rng.random() < _ASKED, rng.permutation(len(_QUESTIONS))
    mentioned = [FINDINGS[i] for i in order if states[i] != UNMENTIONED]
    return mentioned[0] if carries and mentioned else ""


def write_indication(question: str, rng: np.random.Generator) -> str:
    """Write an indication: a symptom and the finding in question, without its state; "" without a question."""
    if not question:
        return ""
    symptoms, asked = _QUESTIONS[question]
    return str(rng.choice(_INDICATIONS)).format(symptom=rng.choice(symptoms), asked=asked)


def write_impression(
    states: Sequence[int],
    details: Mapping[str, FindingDetail],
    question: str = "",
    rng: np.random.Generator | int = 0,
) -> str:
    """Write an impression: the positive and unclear findings by name and side, or that there are none.

    The finding in question, if there is one, is answered first.
    """
    items = []
    if question:
        state, detail = states[FINDINGS.index(question)], details[question]
        wording = str(np.random.default_rng(rng).choice(_ANSWERS[state]))
        items.append(wording.format(item=_item(question, state, detail, sized=True), asked=_QUESTIONS[question][1]))
    for finding in _SENTENCES:
        state = states[FINDINGS.index(finding)]
        if state in (POSITIVE, UNCLEAR) and finding not in ("no_finding", "support_devices", question):
            items.append(_item(finding, state, details[finding]) + ".")
    if states[FINDINGS.index("no_finding")] == POSITIVE or not items:
        items.append("No acute cardiopulmonary abnormality.")
    return " ".join(items)


def write_follow_up(finding: str) -> str:
    """Write the indication of a study that follows up a finding of the prior study, or its absence."""
    return f"Follow-up of {_QUESTIONS[finding][1]}."


def write_change(finding: str, detail: FindingDetail, change: str) -> str:
    """Write the sentence on a finding that is "new", "unchanged" or "resolved" since the prior study."""
    return CHANGES[change].format(item=_item(finding, POSITIVE, detail).lower())


def _item(finding: str, state: int, detail: FindingDetail, sized: bool = False) -> str:
    """The name of a finding with its side, if its sentences have one, and with its size if `sized`."""
    sentences = " ".join(_SENTENCES[finding][POSITIVE])
    name = {
        "pleural_other": "pleural thickening",
        "fracture": "rib fracture",
        "lung_lesion": _mass(detail),
        "support_devices": _DEVICE_NAMES[detail.device],
    }.get(finding, FINDING_DISPLAY_NAMES[finding].lower())
    amount = detail.size if "{size}" in sentences else _grade(detail)[0] if "{grade}" in sentences else ""
    words = (
        "possible" if state == UNCLEAR else "",
        amount if sized and state == POSITIVE else "",
        detail.side if "{side}" in sentences else "",
        name,
    )
    return " ".join(filter(None, words)).capitalize()


def _state_ids(findings: Sequence[str], states: Sequence[int | str]) -> dict[str, int]:
    named = zip(findings, states, strict=True)
    ids = {name: finding_state_id(state if isinstance(state, str) else int(state)) for name, state in named}
    parsed = parse_findings(ids)
    return {FINDINGS[place]: state for place, state in parsed.items()}


def _mass(detail: FindingDetail) -> str:
    return {"small": "nodule", "large": "mass"}[detail.size]


def _grade(detail: FindingDetail) -> tuple[str, str]:
    return {"small": ("mild", "mildly"), "large": ("marked", "markedly")}[detail.size]


def _fill(wording: str, detail: FindingDetail) -> str:
    device = _DEVICE_NAMES[detail.device]
    article = "an" if device[0] in "aeiou" else "a"
    grade, degree = _grade(detail)
    return wording.format(
        side=detail.side,
        zone=detail.zone,
        size=detail.size,
        grade=grade,
        Grade=grade.capitalize(),
        degree=degree,
        mass=_mass(detail),
        device=device,
        a_device=f"{article} {device}",
        A_device=f"{article.capitalize()} {device}",
    )
