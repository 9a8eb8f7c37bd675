"""The stages of earlier sittings that a run builds on: they must have been trained as the recipe says now."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..files_otdrg import read_json
from .checkpoints import last_checkpoint
from .recipe import STAGES, Recipe
from .recipe_changes import data_changes, format_changes, stage_changes
from .run_folder import differing_splits

logger = logging.getLogger(__name__)

#: Written before a stage is trained: the recipe, the studies' fingerprint, the processes, and the stage it began from.
STARTED = "started.json"
#: Written last into a stage's folder: with it the stage is done.
FINISHED = "finished.json"


def stages_before(pending: list[str]) -> list[str]:
    """The stages there are before the first pending one."""
    order = list(STAGES)
    return order[: order.index(pending[0])] if pending else order


def stage_start(recipe: Recipe, data: dict[str, Any], processes: int, previous: Path | None) -> dict[str, Any]:
    """What `STARTED` holds of a stage that begins from the folder `previous`, or from the recipe's model."""
    return {
        "recipe": asdict(recipe),
        "studies": data,
        "processes": processes,
        "from": None
        if previous is None
        else {"stage": previous.name, "ended": _read(previous / FINISHED).get("ended")},
    }


def kept_stages(recipe: Recipe, pending: list[str], resume: bool) -> dict[str, dict[str, Any]]:
    """What each stage began with whose folder is built on: finished ones, and one that goes on from a checkpoint.

    Raises:
        ValueError: one of them began from a stage that has been trained again since.
    """
    output = Path(recipe.output_dir)
    stages = [stage for stage in stages_before(pending) if (output / stage / FINISHED).is_file()]
    if resume and pending and last_checkpoint(output / pending[0]) is not None:
        stages.append(pending[0])
    kept = {}
    for stage in stages:
        if not (output / stage / STARTED).is_file():
            logger.warning("stage %s has no %s: whether it fits the recipe is not known", output / stage, STARTED)
            continue
        kept[stage] = _read(output / stage / STARTED)
        origin = kept[stage]["from"]
        if origin is not None and (
            not (output / origin["stage"] / FINISHED).is_file()
            or _read(output / origin["stage"] / FINISHED).get("ended") != origin["ended"]
        ):
            raise ValueError(
                f"stage {stage} of {output} began from an earlier run of stage {origin['stage']}: "
                f"{_anew(stage, recipe)} trains it from this one"
            )
    return kept


def check_recipe(recipe: Recipe, kept: dict[str, dict[str, Any]], pending: list[str]) -> None:
    """The stages that are kept were trained with the recipe as it is now.

    Raises:
        ValueError: names the fields in which they were not.
    """
    # How a launcher tells it before the processes have met.
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    for stage, start in kept.items():
        finished = stage not in pending
        changes, harmless = stage_changes(start["recipe"], recipe, stage, finished, (start["processes"], processes))
        if changes:
            raise ValueError(
                f"stage {stage} of {recipe.output_dir} was {'trained' if finished else 'begun'} with another recipe: "
                f"{format_changes(changes)}; put the recipe back, or {_anew(stage, recipe)} trains it anew"
            )
        if harmless and not finished:
            logger.info("stage %s goes on with another recipe: %s", stage, format_changes(harmless))


def check_studies(recipe: Recipe, kept: dict[str, dict[str, Any]], data: dict[str, Any], state: PartialState) -> None:
    """The stages that are kept were trained on the studies as they are now.

    Raises:
        ValueError: on all processes, if they were not; `data` is known to the main one.
    """
    fault = None
    for stage, start in kept.items() if state.is_main_process else ():
        splits = differing_splits(start["studies"], data)
        if splits:
            counts = ", ".join(
                f"{split} {start['studies'].get(split, {}).get('studies', 0)} then, "
                f"{data.get(split, {}).get('studies', 0)} now"
                for split in splits
            )
            fields = format_changes(data_changes(start["recipe"], recipe)) or "with the same recipe"
            fault = (
                f"stage {stage} of {recipe.output_dir} was trained on other studies ({counts}; {fields}): put them "
                f"back, or {_anew(stage, recipe)} trains it anew"
            )
            break
    (fault,) = broadcast_object_list([fault])
    if fault is not None:
        raise ValueError(fault)


def _anew(stage: str, recipe: Recipe) -> str:
    """The arguments with which a stage and those behind it are trained again."""
    order = list(STAGES)
    behind = [name for name in recipe.stages if order.index(name) > order.index(stage)]
    return f"stages=[{','.join([stage, *behind])}] --overwrite"


def _read(path: Path) -> dict[str, Any]:
    return read_json(path)


__all__ = ["FINISHED", "STARTED", "check_recipe", "check_studies", "kept_stages", "stage_start", "stages_before"]
