"""Tables of reports and of their states, in the form of chexpert-labeler: 1, 0, -1 or blank under a finding's name.

States are joined to studies by id and to findings by column name.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np

from ..findings_otdrg import FINDING_DISPLAY_NAMES, FINDINGS, NEGATIVE, POSITIVE, UNCLEAR, UNMENTIONED, finding_key

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

#: The four values of the tools' own form; anything that reads as the same number is taken ("1", "1.0").
_VALUES = {1.0: POSITIVE, 0.0: NEGATIVE, -1.0: UNCLEAR}
_EXPECTED = "1 (positive), 0 (negative), -1 (unclear) or blank (unmentioned)"
_NO_FINDING = FINDINGS.index("no_finding")


def _fold(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


def _columns(path: Path, header: list[str], id_column: str) -> tuple[int, list[int]]:
    """Positions of the id column and of the 14 findings, in the order of `FINDINGS`."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(header):
        places.setdefault(_fold(name), []).append(place)

    def place(name: str, what: str) -> int:
        found = places.get(_fold(name), [])
        if not found:
            raise ValueError(f"{path}: no {what}, expected a column {name!r}; columns: {', '.join(header) or 'none'}")
        if len(found) > 1:
            raise ValueError(f"{path}: {len(found)} columns {name!r} (case and spaces aside), expected one")
        return found[0]

    missing = [shown for shown in FINDING_DISPLAY_NAMES.values() if _fold(shown) not in places]
    id_place = place(id_column, "column of study ids")
    if missing:
        raise ValueError(f"{path}: columns missing: {', '.join(missing)}; expected all 14 findings of CheXpert")
    return id_place, [place(FINDING_DISPLAY_NAMES[finding_key(name)], "finding") for name in FINDINGS]


def _state(path: Path, row: int, finding: str, text: str) -> int:
    text = text.strip()
    if not text or text.casefold() == "nan":
        return UNMENTIONED
    try:
        return _VALUES[float(text)]
    except (ValueError, KeyError):
        raise ValueError(
            f"{path}, line {row}, column {FINDING_DISPLAY_NAMES[finding]}: {text!r}, expected {_EXPECTED}"
        ) from None


#: The order of chexpert-labeler's own columns.
CSV_FINDINGS: tuple[str, ...] = (
    "no_finding",
    "enlarged_cardiomediastinum",
    "cardiomegaly",
    "lung_lesion",
    "lung_opacity",
    "edema",
    "consolidation",
    "pneumonia",
    "atelectasis",
    "pneumothorax",
    "pleural_effusion",
    "pleural_other",
    "fracture",
    "support_devices",
)
_WRITTEN = {POSITIVE: "1", NEGATIVE: "0", UNCLEAR: "-1", UNMENTIONED: ""}
_LONGEST_CELL = 2**24


def read_reports(path: str | Path) -> Iterator[tuple[str, str]]:
    """Ids and reports of a table, one after another; other columns are ignored.

    Args:
        path: a CSV with the columns `id` and `report`, or a file .jsonl with a JSON object with these keys a line.

    Raises:
        ValueError: no such file, not UTF-8, not such a table, a column that is missing or stands twice, a row of
            another length, an empty or repeated id; one line that names the file and the line.
    """
    path = Path(path)
    lines: dict[str, int] = {}
    if path.suffix.lower() == ".jsonl":
        for row, study, report in _json_reports(path):
            _check_id(path, row, "id", study, lines)
            yield study, report
        return
    with closing(_rows(path, "a CSV with the columns id and report")) as rows:
        _, header = next(rows)
        folded = [_fold(name) for name in header]
        for name in ("id", "report"):
            if folded.count(name) != 1:
                found = f"{folded.count(name)} columns {name!r}"
                raise ValueError(f"{path}: {found}, expected one; columns: {', '.join(header) or 'none'}")
        id_place, report_place = folded.index("id"), folded.index("report")
        for row, cells in rows:
            study = cells[id_place].strip()
            _check_id(path, row, header[id_place], study, lines)
            yield study, cells[report_place]


def _json_reports(path: Path) -> Iterator[tuple[int, str, str]]:
    expected = "an object with the keys id and report a line"
    with _reading(path, expected) as file:
        for row, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
                study, report = record["id"], record["report"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {row}: expected {expected}") from None
            if not isinstance(report, str) or isinstance(study, bool) or not isinstance(study, (str, int)):
                raise ValueError(
                    f"{path}, line {row}: id is {type(study).__name__} and report {type(report).__name__}, "
                    "expected strings"
                )
            yield row, str(study).strip(), report


def write_states(path: str | Path, rows: Iterable[tuple[str, Sequence[int]]]) -> None:
    """A CSV in chexpert-labeler's form: `id` and the 14 findings in its order. It is there as a whole or not at all.

    Args:
        path: the file; one that is there is replaced.
        rows: ids and their 14 state ids in the order of `FINDINGS`.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}, expected one that exists")
    unfinished = path.with_name(f"{path.name}.tmp")
    order = [FINDINGS.index(name) for name in CSV_FINDINGS]
    try:
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["id", *(FINDING_DISPLAY_NAMES[name] for name in CSV_FINDINGS)])
            for study, states in rows:
                writer.writerow([study, *(_WRITTEN[int(states[place])] for place in order)])
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def _reading(path: Path, expected: str) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError:
        row = _undecodable(path)
        raise ValueError(f"{path}: not UTF-8 (line {row}), expected {expected}, saved as UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}), expected {expected}") from None


def _undecodable(path: Path) -> int | None:
    """The first line that is not UTF-8."""
    with path.open("rb") as file:
        for row, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return row
    return None


@contextmanager
def _long_cells() -> Iterator[None]:
    """Cells of `_LONGEST_CELL` characters; the limit is one for all readers of the process, so it is put back."""
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _rows(path: Path, expected: str) -> Iterator[tuple[int, list[str]]]:
    """The header of a CSV (empty where there is none), then its rows that are not blank; each with its first line."""
    row = 1
    with _reading(path, expected) as file, _long_cells():
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            yield row, header
            row = reader.line_num + 1
            for cells in reader:
                if len(cells) not in (0, len(header)):
                    found = f"{len(cells)} values, expected {len(header)} as in the header"
                    raise ValueError(f"{path}, line {row}: {found}")
                if cells:
                    yield row, cells
                row = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{path}: not a CSV (line {row}: {error}), expected {expected}") from None


def _check_id(path: Path, row: int, column: str, study: str, lines: dict[str, int]) -> None:
    if not study:
        raise ValueError(f"{path}, line {row}, column {column}: empty, expected a study's id")
    if study in lines:
        raise ValueError(
            f"{path}, line {row}, column {column}: {study!r} stands in line {lines[study]} too, "
            "expected one row a study"
        )
    lines[study] = row


def read_states(path: str | Path, id_column: str = "id") -> dict[str, np.ndarray]:
    """States of a CSV in chexpert-labeler's or CheXbert's form: 1, 0, -1 or blank under each finding's name.

    Columns are found by name, case, spaces and underscores aside; others are ignored. "No Finding" has no opposite: a 0
    there (CheXbert writes one) is unmentioned.

    Args:
        path: the CSV, UTF-8 (with or without a byte order mark).
        id_column: the column that holds the studies' ids.

    Returns:
        `{id: (14,) int64 state ids in the order of FINDINGS}`, in the file's order.

    Raises:
        ValueError: no such file, not UTF-8, missing or repeated columns, a value outside the four, "No Finding"
            unclear, a row of another length, an empty or repeated id; one line that names the file, line and column.
    """
    path = Path(path)
    states: dict[str, np.ndarray] = {}
    lines: dict[str, int] = {}
    with closing(_rows(path, "a CSV of finding states")) as rows:
        _, header = next(rows)
        id_place, places = _columns(path, header, id_column)
        for row, cells in rows:
            study = cells[id_place].strip()
            _check_id(path, row, header[id_place], study, lines)
            values = [_state(path, row, name, cells[place]) for name, place in zip(FINDINGS, places, strict=True)]
            if values[_NO_FINDING] == UNCLEAR:
                raise ValueError(f"{path}, line {row}, column No Finding: -1, expected 1, 0 or blank")
            if values[_NO_FINDING] == NEGATIVE:
                values[_NO_FINDING] = UNMENTIONED
            states[study] = np.array(values, dtype=np.int64)
    return states


def join_states(
    dataset: Dataset | DatasetDict, path: str | Path, id_column: str = "id"
) -> tuple[Dataset | DatasetDict, list[str]]:
    """Studies with `finding_states` filled from a CSV (see [`read_states`]) by their `id`.

    Args:
        dataset: studies in `STUDY_FEATURES`, one split or several.
        path: the CSV.
        id_column: its column of study ids.

    Returns:
        The dataset, and the ids of studies that the CSV does not have, in the dataset's order; their states stay as
        they were.

    Raises:
        ValueError: as `read_states`, or not one study of the dataset is in the CSV.
    """
    from datasets import DatasetDict

    from ..studies.schema import STUDY_FEATURES

    states = read_states(path, id_column)
    splits = dataset if isinstance(dataset, DatasetDict) else DatasetDict({"all": dataset})
    ids = [study for split in splits.values() for study in split["id"]]
    unmatched = [study for study in ids if study not in states]
    if ids and len(unmatched) == len(ids):
        example = next(iter(states), "none")
        raise ValueError(
            f"{path}: none of the {len(ids)} studies is in column {id_column!r} "
            f"(studies: {ids[0]!r}, file: {example!r}), expected the studies' own ids"
        )

    def fill(split: Dataset) -> Dataset:
        known = split["finding_states"] if "finding_states" in split.column_names else [None] * len(split)
        filled = [
            states[study].tolist() if study in states else old for study, old in zip(split["id"], known, strict=True)
        ]
        order = split.column_names
        feature = split.features.get("finding_states", STUDY_FEATURES["finding_states"])
        rest = split.remove_columns("finding_states") if "finding_states" in order else split
        joined = rest.add_column("finding_states", filled, feature=feature)
        return joined.select_columns(order) if "finding_states" in order else joined

    joined = DatasetDict({name: fill(split) for name, split in splits.items()})
    return (joined if isinstance(dataset, DatasetDict) else joined["all"]), unmatched
