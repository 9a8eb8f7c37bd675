"""A file of reports that an interrupted command can continue, and the settings beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..pipeline_otdrg import ReportGenerationPipeline
from ..runtime.journal import WorkSettings
from ..runtime.shared_work import check_settings_file, discard_journals, read_journals
from ..studies.fingerprint import fingerprint
from .listing import ListedStudy
from .loading import model_settings

#: What a report depends on besides the settings.
_ASKED = ("images", "indication", "steered", "prior_images", "prior_report")


def settings_of(
    pipe: ReportGenerationPipeline, studies: list[ListedStudy], arguments: dict[str, Any], heatmap: Path | None
) -> dict[str, Any]:
    """What all reports of a file depend on: the model, the dataset of the studies, the arguments of `generate`."""
    rows = studies[0].rows
    return {
        **model_settings(pipe.model, pipe.processor),
        "studies": None if rows is None else fingerprint({"studies": rows}),
        **arguments,
        "heatmap": None if heatmap is None else str(heatmap),
    }


def read_output(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file of reports by id, if there are some; nothing is changed.

    Raises:
        ValueError: a damaged line, or no file of settings beside it.
    """
    check_settings_file(path, path.with_suffix(".settings.json"))
    return read_journals(path)


def begin_output(path: Path, resume: bool, settings: dict[str, Any], studies: list[ListedStudy]) -> int:
    """Prepare the file of reports; gives how many of the studies are in it. Only for the main process.

    Args:
        path: of the file; `NAME.settings.json` beside it holds the settings.
        resume: continue an existing file instead of replacing it.
        settings: from [`settings_of`].
        studies: all that were asked for.

    Raises:
        ValueError: the file was made with other settings, or has a report of a study with other views, indication or
            findings.
    """
    beside = path.with_suffix(".settings.json")
    if not resume:
        discard_journals(path)
    written = read_output(path)
    if not written:
        beside.unlink(missing_ok=True)
    for study in studies:
        asked, row = study.asked(), written.get(study.id)
        if row is not None and any(asked.get(key) != row.get(key) for key in _ASKED):
            raise ValueError(
                f"{path} holds a report of {study.id!r} with other images, indication, findings or prior: expected the "
                "same, another --output, or --overwrite"
            )
    WorkSettings(path, settings, ("model", "studies")).keep(beside)
    return sum(study.id in written for study in studies)


__all__ = ["begin_output", "read_output", "settings_of"]
