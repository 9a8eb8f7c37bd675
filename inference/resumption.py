"""A file of reports that can be gone on with, and beside it what its reports were written with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files_otdrg import write_json
from ..pipeline_otdrg import ReportGenerationPipeline
from ..runtime.journal import Journal, differing_settings
from ..studies.fingerprint import fingerprint
from .features import model_digest
from .listing import ListedStudy


def settings_of(
    pipe: ReportGenerationPipeline, studies: list[ListedStudy], arguments: dict[str, int], heatmap: Path | None
) -> dict[str, Any]:
    """What records depend on, besides what each has of its own study.

    Args:
        pipe: the model.
        studies: all that are asked for.
        arguments: of `generate`.
        heatmap: folder of pictures.
    """
    rows = studies[0].rows
    return {
        "model": model_digest(pipe.model, pipe.processor),
        "studies": None if rows is None else fingerprint({"studies": rows}),
        **arguments,
        "heatmap": None if heatmap is None else str(heatmap),
    }


def begin_output(
    path: Path, resume: bool, settings: dict[str, Any], studies: list[ListedStudy]
) -> tuple[Journal, list[ListedStudy]]:
    """The file of records, and the studies that are not in it yet.

    Args:
        path: of the file; `NAME.settings.json` beside it keeps the settings.
        resume: whether to go on with a file that is there; it is replaced otherwise.
        settings: of [`settings_of`].
        studies: all that are asked for.

    Raises:
        ValueError: the file is of other settings, or has one of the studies with other views, indication or findings.
    """
    if not resume:
        path.unlink(missing_ok=True)
    journal, beside = Journal(path), path.with_suffix(".settings.json")
    if journal.rows:
        if not beside.is_file():
            raise ValueError(
                f"{path} has no {beside.name} beside it, which says what its reports were written with: expected it, "
                "another --output, or --overwrite"
            )
        told = differing_settings(beside, settings, ("model", "studies"))
        if told is not None:
            raise ValueError(
                f"{path} holds reports of other settings ({told}): expected the same, another --output, or --overwrite"
            )
    written = {row.get("id"): row for row in journal.rows}
    for study in studies:
        asked, row = study.asked(), written.get(study.id)
        if row is not None and any(asked.get(key) != row.get(key) for key in ("images", "indication", "steered")):
            raise ValueError(
                f"{path} holds a report of {study.id!r} with other images, indication or findings: expected the same, "
                "another --output, or --overwrite"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(beside, settings)
    return journal, [study for study in studies if study.id not in written]


__all__ = ["begin_output", "settings_of"]
