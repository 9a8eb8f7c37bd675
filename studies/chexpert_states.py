"""Finding states in CheXpert's values: 1 positive, 0 negative, -1 uncertain, blank unmentioned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..findings_otdrg import (
    FINDING_DISPLAY_NAMES,
    FINDINGS,
    NEGATIVE,
    NO_FINDING,
    POSITIVE,
    UNCLEAR,
    UNMENTIONED,
)

#: State ids by value.
CHEXPERT_VALUES = {1.0: POSITIVE, 0.0: NEGATIVE, -1.0: UNCLEAR}


def states_of_values(values: Mapping[str, Any]) -> list[int]:
    """The 14 state ids of values by CheXpert's display name of the finding; None and NaN are unmentioned.

    A 0 for "No Finding", which CheXbert writes, is unmentioned.

    Raises:
        ValueError: a finding is missing, or a value is not one of the four; one line that names the finding.
    """
    states = []
    for finding in FINDINGS:
        name = FINDING_DISPLAY_NAMES[finding]
        if name not in values:
            raise ValueError(f"no {name!r}: expected all 14 findings of CheXpert")
        value = values[name]
        if value is None or value != value:
            states.append(UNMENTIONED)
        elif isinstance(value, (int, float)) and value in CHEXPERT_VALUES:
            states.append(CHEXPERT_VALUES[value])
        else:
            raise ValueError(f"{name} is {value!r}: expected 1, 0, -1 or null")
    return without_denied_no_finding(states)


def without_denied_no_finding(states: list[int]) -> list[int]:
    """The states with "no finding" unmentioned if it is negative.

    Raises:
        ValueError: "no finding" is unclear.
    """
    if states[NO_FINDING] == UNCLEAR:
        raise ValueError("No Finding is uncertain: expected positive, negative or unmentioned")
    if states[NO_FINDING] == NEGATIVE:
        states[NO_FINDING] = UNMENTIONED
    return states
