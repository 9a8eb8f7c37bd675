"""Find the columns of a table that hold the fields of a study."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .source import parse_pairs


def match_columns(
    columns: Sequence[str], fields: dict[str, tuple[str, ...]], pairs: Sequence[str], place: str, image: str
) -> dict[str, str]:
    """The column of each field, by names without differences in case, spaces and underscores.

    Args:
        columns: names of the columns.
        fields: `{field: names of its column}`; the first name that exists is used.
        pairs: "FIELD=COLUMN" from the user; an empty column leaves the field out.
        place: name of the table for errors.
        image: the field of the images. It is required, and so is "findings" or "impression".

    Raises:
        ValueError: an unknown or repeated field, or a missing or ambiguous column.
    """
    folded: dict[str, list[str]] = {}
    for column in columns:
        folded.setdefault(_fold(column), []).append(column)
    listed = f"its columns: {', '.join(columns)}"

    def find(name: str) -> str | None:
        found = folded.get(_fold(name), [])
        if len(found) > 1:
            raise ValueError(f"{place} has {len(found)} columns {name!r} (ignoring case and spaces): expected one")
        return found[0] if found else None

    given: dict[str, str] = {}
    for name, column in parse_pairs("column", pairs, "FIELD=COLUMN"):
        field = next((field for field, names in fields.items() if _fold(name) in map(_fold, (field, *names))), None)
        if field is None:
            raise ValueError(f"option 'column' names a field {name!r}: expected one of {', '.join(fields)}, report")
        if field in given:
            raise ValueError(f"option 'column' names the field {field!r} twice: expected it once")
        if column and find(column) is None:
            raise ValueError(f"{place} has no column {column!r}, which option 'column' names for {name}; {listed}")
        given[field] = find(column) or "" if column else ""
    matched = {}
    for field, names in fields.items():
        free = (column for name in names if (column := find(name)) and column not in given.values())
        column = given[field] if field in given else next(free, "")
        if column:
            matched[field] = column
    for field, present in ((image, image in matched), ("report", matched.keys() & {"findings", "impression"})):
        if not present:
            raise ValueError(
                f"{place} has no column {field!r}; {listed}; if it has another name, set option 'column': {field}=NAME"
            )
    return matched


def without_fraction(cell: str) -> str:
    """The cell, "30" instead of "30.0", as pandas writes whole numbers of a column in which values are missing."""
    whole = re.fullmatch(r"(-?[0-9]+)\.0+", cell)
    return whole[1] if whole else cell


def _fold(name: str) -> str:
    return "".join(name.replace("_", " ").split()).casefold()
