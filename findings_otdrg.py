"""The label space: 14 findings in 4 states. Imports nothing, so that it is available at no cost."""

from __future__ import annotations

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

#: The four states of a finding; a state's id is its position (paper, eq. 9).
FINDING_STATES: tuple[str, ...] = ("unmentioned", "positive", "negative", "unclear")

UNMENTIONED, POSITIVE, NEGATIVE, UNCLEAR = range(4)

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


def finding_state_id(state: str | int) -> int:
    """The id, 0 to 3, of a state's name or id; "uncertain" is another word for "unclear".

    Raises:
        ValueError: the state is none of the four.
    """
    if isinstance(state, str):
        folded = _fold(state)
        folded = _STATE_ALIASES.get(folded, folded)
        if folded in FINDING_STATES:
            return FINDING_STATES.index(folded)
    elif isinstance(state, int) and not isinstance(state, bool) and 0 <= state < len(FINDING_STATES):
        return state
    raise ValueError(f"unknown finding state {state!r}: expected one of {', '.join(FINDING_STATES)} (or 0 to 3)")


def parse_findings(findings: dict[str, str | int]) -> dict[int, int]:
    """`{"Edema": "positive"}` as `{finding's position: state id}`, checked.

    Raises:
        ValueError: an unknown finding or state, or "no finding" in a state other than positive or unmentioned.
    """
    parsed = {}
    for name, state in findings.items():
        key, state_id = finding_key(name), finding_state_id(state)
        if key == "no_finding" and state_id not in (UNMENTIONED, POSITIVE):
            raise ValueError(
                f"finding state {FINDING_STATES[state_id]!r} is not possible for no_finding: "
                "expected positive or unmentioned"
            )
        parsed[FINDINGS.index(key)] = state_id
    return parsed


def check_finding_states(states, studies: int, missing: int = -1, name: str = "finding_states") -> None:
    """Check that an integer tensor or array holds the state ids of `studies` studies.

    Args:
        states (tensor or array of shape `(studies, 14)`): ids 0 to 3, or `missing`.
        studies (`int`): how many there are.
        missing (`int`): the id of a state that is not given.
        name (`str`): what the error calls it.

    Raises:
        ValueError: another shape or id, or "no finding" negative or unclear among states that condition the report.
    """
    if tuple(states.shape) != (studies, len(FINDINGS)):
        raise ValueError(f"{name} has shape {tuple(states.shape)}: expected {(studies, len(FINDINGS))}")
    wrong = states[((states < 0) | (states >= len(FINDING_STATES)) | (states % 1 != 0)) & (states != missing)]
    if len(wrong):
        meaning = "to predict" if missing == -1 else "to leave out"
        raise ValueError(f"{name} has {sorted(set(wrong.tolist()))}: expected ids 0 to 3, or {missing} {meaning}")
    if missing == -1:
        no_finding = states[:, FINDINGS.index("no_finding")]
        wrong = no_finding[no_finding > POSITIVE]
        if len(wrong):
            raise ValueError(
                f"{name} has no_finding {FINDING_STATES[int(wrong[0])]} ({int(wrong[0])}): "
                "expected unmentioned (0) or positive (1)"
            )


__all__ = [
    "FINDINGS",
    "FINDING_DISPLAY_NAMES",
    "FINDING_STATES",
    "NEGATIVE",
    "POSITIVE",
    "UNCLEAR",
    "UNMENTIONED",
    "check_finding_states",
    "finding_key",
    "finding_state_id",
    "parse_findings",
]
