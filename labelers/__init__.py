"""Labelers: the states of the 14 findings, read from reports (DLE; paper, section 3.2.1).

A labeler is an object with `.name` (str) and `.label(reports: list[str])`, which returns an (N, 14) int64 array of
state ids (`FINDING_STATES`) with columns in the order of `FINDINGS`. To add one, write a module with its class and add
one line to `LABELERS`. The module is imported when the labeler is first used. [`read_states`] reads a CSV of states.
"""

import inspect
import warnings
from collections.abc import Sequence
from importlib import import_module

from ..runtime.lazy import lazy_names

#: `{name: (module, class)}`. A module with a leading dot is in this package.
LABELERS: dict[str, tuple[str, str]] = {
    "rules": (".rules", "RulesLabeler"),
    "llm": (".llm", "LLMLabeler"),
    "chexbert": (".chexbert", "CheXbertLabeler"),
}
_HOMES = {
    "format_agreement": "agreement",
    "measure_agreement": "agreement",
    "read_states": "csv_states",
    "write_states": "csv_states",
    "load_vocabulary": "phrases",
}
#: Positions listed in a warning.
_LISTED = 5

__all__ = ["LABELERS", "ReportsWarning", "UnreadReportsWarning", "labeler_class", "load_labeler", *_HOMES]


class ReportsWarning(UserWarning):
    """What is special about some reports: `what`, and their `positions`."""

    positions: list[int]
    what: str


class UnreadReportsWarning(ReportsWarning):
    """Some reports cannot be read, and all their findings are unmentioned; the message says how many and which."""


def labeler_class(name: str, **options):
    """The class of a labeler; its options are checked without creating it.

    Raises:
        ValueError: no labeler has this name, an option is unknown or missing, or a switch is neither true nor false.
    """
    if name not in LABELERS:
        hint = " (read_states reads states from a CSV)" if name == "csv" else ""
        raise ValueError(f"unknown labeler {name!r}: expected one of {', '.join(LABELERS)}{hint}")
    module, cls = LABELERS[name]
    labeler = getattr(import_module(module, __name__), cls)
    allowed = inspect.signature(labeler).parameters
    for option in options:
        if option not in allowed:
            raise ValueError(f"unknown option {option!r} of labeler {name!r}: expected one of {', '.join(allowed)}")
        # The string "maybe" would count as true.
        if isinstance(allowed[option].default, bool) and not isinstance(options[option], bool):
            raise ValueError(f"option {option!r} of labeler {name!r} is {options[option]!r}: expected true or false")
    missing = [option for option, it in allowed.items() if it.default is it.empty and option not in options]
    if missing:
        raise ValueError(f"labeler {name!r} needs the option {missing[0]!r} (its options: {', '.join(allowed)})")
    return labeler


def load_labeler(name: str, **options):
    """Create a labeler; its options are the parameters of its class.

    Raises:
        ValueError: as [`labeler_class`], or the labeler refuses a value.
    """
    return labeler_class(name, **options)(**options)


def check_reports(reports: Sequence[str]) -> None:
    """Raise an error if the argument of `label` is not a list of strings.

    Raises:
        TypeError: `reports` is a single string.
        ValueError: a report is not a string; the message gives its position.
    """
    if isinstance(reports, str):
        raise TypeError("reports is a single string: expected a list of reports")
    for position, report in enumerate(reports):
        if not isinstance(report, str):
            raise ValueError(f"report {position} is {type(report).__name__}: expected a string ('' when absent)")


def warn_of_reports(
    positions: list[int], reports: int, what: str, category: type[ReportsWarning] = UnreadReportsWarning
) -> None:
    """Warn that the reports at these positions are special, and how."""
    if positions:
        listed = ", ".join(map(str, sorted(positions)[:_LISTED])) + (", …" if len(positions) > _LISTED else "")
        warning = category(f"{len(positions)} of {reports} reports (positions {listed}) {what}")
        warning.positions, warning.what = positions, what
        warnings.warn(warning, stacklevel=3)


__getattr__, __dir__ = lazy_names(__name__, _HOMES)
