"""Labelers on the command line: parse their options, and label without warnings."""

from __future__ import annotations

import warnings
from typing import Any

from . import UnreadReportsWarning, load_labeler


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """Parse options typed as `--option NAME=VALUE`; values are YAML.

    Raises:
        ValueError: another form, a repeated name, or a value that is not YAML.
    """
    from ..runtime.yaml_files import parse_yaml

    parsed = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise ValueError(f"--option {pair}: expected NAME=VALUE, such as repeat_mistakes=true")
        if name in parsed:
            raise ValueError(f"--option {name} is given twice: expected it once")
        try:
            parsed[name] = parse_yaml(value, pair)
        except ValueError:
            raise ValueError(f"--option {pair}: the value is not YAML, put it in quotes to pass it as text") from None
    return parsed


def labeler_of(name: str, options: dict[str, Any]):
    """As [`load_labeler`], but an option of a wrong type is a `ValueError` as well."""
    try:
        return load_labeler(name, **options)
    except TypeError as error:
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise ValueError(f"labeler {name!r} does not take {given}: {error}") from error


def label_quietly(labeler, reports: list[str]):
    """(N, 14) states of the reports, without warnings about unreadable ones, which the command prints itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreadReportsWarning)
        return labeler.label(reports)
