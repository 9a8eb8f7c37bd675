"""The label space: 14 findings in 4 states. Imports only the standard library, so that it is available at no cost."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

#: The 14 findings of CheXpert, in CheXpert's order (paper, section 3.2.1). Files are joined by name, never by position.
FINDINGS: tuple[str, ...] = (
    "enlarged_cardiomediastinum",
    "cardiomegaly",
    "lung_opacity",
    "lung_lesion",
    "edema",
    "consolidation",
    "pneumonia",
    "atelectasis",
    "pneumothorax",
    "pleural_effusion",
    "pleural_other",
    "fracture",
    "support_devices",
    "no_finding",
)

#: The position of "no finding", a summary of the others; many scores are over the 13 others.
NO_FINDING = FINDINGS.index("no_finding")

#: The four states of a finding; a state's id is its position (paper, eq. 9).
FINDING_STATES: tuple[str, ...] = ("unmentioned", "positive", "negative", "unclear")

UNMENTIONED, POSITIVE, NEGATIVE, UNCLEAR = range(4)

#: The id, among states that condition a report, of a finding about which the LLM is given nothing. Reports and labels
#: have the four states only.
NOT_GIVEN = len(FINDING_STATES)
#: Names of the states that condition a report, by id.
CONDITIONING_STATES: tuple[str, ...] = (*FINDING_STATES, "not_given")

#: CheXpert's spelling of each finding, for people and for CSV headers.
FINDING_DISPLAY_NAMES: dict[str, str] = {name: name.replace("_", " ").title() for name in FINDINGS}

_STATE_ALIASES = {"uncertain": "unclear", "not mentioned": "unmentioned"}


def _fold(name: str) -> str:
    return " ".join(str(name).replace("_", " ").split()).casefold()


_FINDING_KEYS = {_fold(name): name for name in FINDINGS}


def finding_key(name: str) -> str:
    """The key in `FINDINGS` of a finding's name; case, spaces and underscores are ignored.

    Raises:
        ValueError: the name is none of the 14.
    """
    try:
        return _FINDING_KEYS[_fold(name)]
    except KeyError:
        raise ValueError(f"unknown finding {name!r}: expected one of {', '.join(FINDINGS)}") from None


def finding_state_id(state: Any) -> int:
    """The id, 0 to 3, of a state's name (`str`) or id (any integer); "uncertain" is another word for "unclear".

    Raises:
        ValueError: the state is none of the four.
    """
    if isinstance(state, str):
        folded = _fold(state)
        folded = _STATE_ALIASES.get(folded, folded)
        if folded in FINDING_STATES:
            return FINDING_STATES.index(folded)
    elif not isinstance(state, bool) and isinstance(state, Integral) and 0 <= int(state) < len(FINDING_STATES):
        return int(state)
    raise ValueError(f"unknown finding state {state!r}: expected one of {', '.join(FINDING_STATES)} (or 0 to 3)")


def conditioning_state_id(state: Any) -> int:
    """As [`finding_state_id`], also for "not given", 4.

    Raises:
        ValueError: the state is none of the five.
    """
    if (isinstance(state, str) and _fold(state) == "not given") or (isinstance(state, Integral) and state == NOT_GIVEN):
        return NOT_GIVEN
    try:
        return finding_state_id(state)
    except ValueError:
        names = ", ".join(CONDITIONING_STATES)
        raise ValueError(f"unknown finding state {state!r}: expected one of {names} (or 0 to {NOT_GIVEN})") from None


def parse_findings(findings: Mapping[str, Any]) -> dict[int, int]:
    """`{"Edema": "positive"}` as `{finding's position: id of the conditioning state}`, checked.

    Raises:
        ValueError: an unknown finding or state, a finding given twice, or "no finding" negative or unclear.
    """
    parsed: dict[int, int] = {}
    for name, state in findings.items():
        key, state_id = finding_key(name), conditioning_state_id(state)
        if key == "no_finding" and state_id in (NEGATIVE, UNCLEAR):
            raise ValueError(
                f"finding state {FINDING_STATES[state_id]!r} is not possible for no_finding: "
                "expected positive or unmentioned"
            )
        if FINDINGS.index(key) in parsed:
            raise ValueError(f"finding {key} is given twice, the second time as {name!r}: expected each finding once")
        parsed[FINDINGS.index(key)] = state_id
    return parsed


def check_finding_states(states, studies: int, missing: int = -1, name: str = "finding_states") -> None:
    """Check that an integer tensor or array holds the state ids of `studies` studies.

    Args:
        states (tensor or array of shape `(studies, 14)`): ids 0 to 3, or `missing`; among states that condition the
            report also [`NOT_GIVEN`].
        studies (`int`): how many there are.
        missing (`int`): -1, to predict, for states that condition the report; another id for labels.
        name (`str`): what the error calls it.

    Raises:
        ValueError: another shape or id, or "no finding" negative or unclear among states that condition the report.
    """
    if tuple(states.shape) != (studies, len(FINDINGS)):
        raise ValueError(f"{name} has shape {tuple(states.shape)}: expected {(studies, len(FINDINGS))}")
    most = NOT_GIVEN if missing == -1 else UNCLEAR
    wrong = states[((states < 0) | (states > most) | (states % 1 != 0)) & (states != missing)]
    if len(wrong):
        others = f"{NOT_GIVEN} for not given, or -1 to predict" if missing == -1 else f"or {missing} to leave out"
        raise ValueError(f"{name} has {sorted(set(wrong.tolist()))}: expected ids 0 to 3, {others}")
    if missing == -1:
        no_finding = states[:, NO_FINDING]
        wrong = no_finding[(no_finding == NEGATIVE) | (no_finding == UNCLEAR)]
        if len(wrong):
            raise ValueError(
                f"{name} has no_finding {FINDING_STATES[int(wrong[0])]} ({int(wrong[0])}): "
                "expected unmentioned (0) or positive (1)"
            )


__all__ = [
    "CONDITIONING_STATES",
    "FINDINGS",
    "FINDING_DISPLAY_NAMES",
    "FINDING_STATES",
    "NEGATIVE",
    "NOT_GIVEN",
    "NO_FINDING",
    "POSITIVE",
    "UNCLEAR",
    "UNMENTIONED",
    "check_finding_states",
    "conditioning_state_id",
    "finding_key",
    "finding_state_id",
    "parse_findings",
]
