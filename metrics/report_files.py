"""Reports of several files, joined by id, never by position."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ..labelers.report_table import has_column, read_reports


@dataclass(frozen=True)
class JoinedReports:
    """What [`join_reports`] found.

    Args:
        ids: of the N studies that all files have, in the references' order.
        reports: by `"references"`, `"predictions"` and, if there is another system, `"against"`: N texts.
        uncleaned: the same keys: N texts before cleaning, from which states are read. They are in a column
            `uncleaned report` (`uncleaned reference`) beside the other, or are the same.
        files: the same keys, where they were read.
        counts: how many reports each file holds.
        missing: ids that each file lacks and another has.
    """

    ids: list[str]
    reports: dict[str, list[str]]
    uncleaned: dict[str, list[str]]
    files: dict[str, str]
    counts: dict[str, int]
    missing: dict[str, list[str]]


def join_reports(
    predictions: str,
    references: str | None = None,
    reference_column: str | None = None,
    against: str | None = None,
    allow_missing: bool = False,
) -> JoinedReports:
    """Generated and true reports of the same studies.

    Args:
        predictions: CSV or .jsonl with `id` and `report`.
        references: the same of the true ones; in the predictions' file without it.
        reference_column: where the true reports are; by default `report`, or `reference` in the predictions' file.
        against: as `predictions`, of another system.
        allow_missing: take the ids that all files have.

    Raises:
        ValueError: a file is wrong (see [`read_reports`]) or empty, the files have no id in common, or, without
            `allow_missing`, not the same ones.
    """
    same = references is None or _is_one_file(references, predictions)
    column = reference_column or ("reference" if same else "report")
    if same and column == "report":
        raise ValueError(f"{predictions}, column report: the predictions themselves, expected the true reports' column")
    places = {"references": (references or predictions, column), "predictions": (predictions, "report")}
    if against:
        places["against"] = (against, "report")
    read = {name: _by_id(path, column) for name, (path, column) in places.items()}
    files = {name: path for name, (path, _) in places.items()}
    known = list(dict.fromkeys(study for reports in read.values() for study in reports))
    missing = {name: [study for study in known if study not in reports] for name, reports in read.items()}
    ids = [study for study in known if all(study in reports for reports in read.values())]
    if not ids:
        examples = ", ".join(f"{files[name]}: {next(iter(reports))!r}" for name, reports in read.items())
        raise ValueError(f"the files have no id in common ({examples}): expected reports of the same studies")
    if any(missing.values()) and not allow_missing:
        raise ValueError(
            f"{_lacking(files, missing)} of {len(known):,} ids; expected the same ids in each, --allow-missing scores "
            f"the {len(ids):,} in common"
        )
    uncleaned = {
        name: _by_id(path, f"uncleaned {column}") if has_column(path, f"uncleaned {column}") else read[name]
        for name, (path, column) in places.items()
    }
    return JoinedReports(
        ids=ids,
        reports={name: [reports[study] for study in ids] for name, reports in read.items()},
        uncleaned={name: [reports[study] for study in ids] for name, reports in uncleaned.items()},
        files=files,
        counts={name: len(reports) for name, reports in read.items()},
        missing=missing,
    )


def _is_one_file(path: str, other: str) -> bool:
    return Path(path).exists() and Path(other).exists() and Path(path).samefile(other)


def _by_id(path: str, column: str) -> dict[str, str]:
    with closing(read_reports(path, column)) as rows:
        reports = dict(rows)
    if not reports:
        raise ValueError(f"{path}: no report in it, expected at least one")
    return reports


def _lacking(files: Mapping[str, str], missing: Mapping[str, list[str]]) -> str:
    return "; ".join(
        f"{files[name]} ({name}) lacks {len(studies):,} ({', '.join(studies[:3])}{', ...' if len(studies) > 3 else ''})"
        for name, studies in missing.items()
        if studies
    )


__all__ = ["JoinedReports", "join_reports"]
