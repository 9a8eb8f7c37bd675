"""Tables of finding states in chexpert-labeler's format: 1, 0, -1 or blank in a column for each finding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from ..findings_otdrg import FINDING_DISPLAY_NAMES, FINDINGS, NEGATIVE, NO_FINDING, POSITIVE, UNCLEAR, UNMENTIONED
from ..runtime.csv_files import write_csv
from ..studies.chexpert_states import CHEXPERT_VALUES
from .report_table import check_id, csv_rows, fold_name

_EXPECTED = "1 (positive), 0 (negative), -1 (unclear) or blank (unmentioned)"


def _columns(path: Path, header: list[str], id_column: str) -> tuple[int, list[int]]:
    """Positions of the id column and of the 14 findings, in the order of `FINDINGS`."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(header):
        places.setdefault(fold_name(name), []).append(place)

    def place(name: str, what: str) -> int:
        found = places.get(fold_name(name), [])
        if not found:
            raise ValueError(f"{path}: no {what}, expected a column {name!r}; columns: {', '.join(header) or 'none'}")
        if len(found) > 1:
            raise ValueError(f"{path}: {len(found)} columns {name!r} (ignoring case and spaces), expected one")
        return found[0]

    missing = [shown for shown in FINDING_DISPLAY_NAMES.values() if fold_name(shown) not in places]
    id_place = place(id_column, "column of study ids")
    if missing:
        raise ValueError(f"{path}: columns missing: {', '.join(missing)}; expected all 14 findings of CheXpert")
    return id_place, [place(FINDING_DISPLAY_NAMES[name], "finding") for name in FINDINGS]


def _state(path: Path, row: int, finding: str, text: str) -> int:
    text = text.strip()
    if not text or text.casefold() == "nan":
        return UNMENTIONED
    try:
        return CHEXPERT_VALUES[float(text)]
    except (ValueError, KeyError):
        raise ValueError(
            f"{path}, line {row}, column {FINDING_DISPLAY_NAMES[finding]}: {text!r}, expected {_EXPECTED}"
        ) from None


#: The order of chexpert-labeler's columns.
CSV_FINDINGS: tuple[str, ...] = (
    *("no_finding", "enlarged_cardiomediastinum", "cardiomegaly", "lung_lesion", "lung_opacity"),
    *FINDINGS[4:-1],
)
_WRITTEN = {POSITIVE: "1", NEGATIVE: "0", UNCLEAR: "-1", UNMENTIONED: ""}


def write_states(path: str | Path, rows: Iterable[tuple[str, Sequence[int]]]) -> None:
    """Write a CSV in chexpert-labeler's format, with the column `id`. The file is complete or not written.

    Args:
        path: the file; an existing one is replaced.
        rows: ids with 14 state ids in the order of `FINDINGS`.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}, expected one that exists")
    order = [FINDINGS.index(name) for name in CSV_FINDINGS]
    header = ["id", *(FINDING_DISPLAY_NAMES[name] for name in CSV_FINDINGS)]
    write_csv(path, header, ([study, *(_WRITTEN[int(states[place])] for place in order)] for study, states in rows))


def read_states(path: str | Path, id_column: str = "id") -> dict[str, np.ndarray]:
    """Read a CSV in chexpert-labeler's or CheXbert's format: 1, 0, -1 or blank for each finding.

    Columns are found by name, ignoring case, spaces and underscores; other columns are ignored. A 0 for "No Finding",
    which CheXbert writes, is read as unmentioned.

    Args:
        path: the CSV, UTF-8 (with or without a byte order mark).
        id_column: the column with the ids of the studies.

    Returns:
        `{id: (14,) int64 state ids in the order of FINDINGS}`, in the order of the file.

    Raises:
        ValueError: the file is missing or not UTF-8, a column is missing or repeated, a value is not one of the four,
            "No Finding" is unclear, a row has another length, or an id is empty or repeated; one line that names the
            file, line and column.
    """
    path = Path(path)
    states: dict[str, np.ndarray] = {}
    lines: dict[str, int] = {}
    with closing(csv_rows(path, "a CSV of finding states")) as rows:
        _, header = next(rows)
        id_place, places = _columns(path, header, id_column)
        for row, cells in rows:
            study = cells[id_place].strip()
            check_id(path, row, header[id_place], study, lines)
            values = [_state(path, row, name, cells[place]) for name, place in zip(FINDINGS, places, strict=True)]
            if values[NO_FINDING] == UNCLEAR:
                raise ValueError(f"{path}, line {row}, column No Finding: -1, expected 1, 0 or blank")
            if values[NO_FINDING] == NEGATIVE:
                values[NO_FINDING] = UNMENTIONED
            states[study] = np.array(values, dtype=np.int64)
    return states
