"""Continuing a run: which checkpoints are complete, and whether stages in its folder fit the recipe and the studies."""

from __future__ import annotations

import logging
import os
import shutil
import zipfile
from collections.abc import Collection
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..files_otdrg import read_json
from ..studies.fingerprint import differing_splits
from .arguments import StageArguments
from .fields import Section
from .recipe import Recipe
from .stages import STAGES, earlier_stages, stage_of

logger = logging.getLogger(__name__)

#: Written before a stage is trained: the recipe, the studies' fingerprint, the processes, and the stage it began from.
STARTED = "started.json"
#: Written last into a stage's folder: with it the stage is done.
FINISHED = "finished.json"

#: What one optimizer step is made of, with the number of processes.
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
#: Fields that determine the order of streamed studies.
_STREAM = ("studies.streaming", "studies.shuffle_buffer")

#: Field, value then, value now.
Changes = dict[str, tuple[Any, Any]]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def last_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The newest complete checkpoint in a stage's folder; None where there is none."""
    return next((path for path in reversed(checkpoints_of(folder)) if is_whole(path)), None)


def remove_partial_checkpoints(folder: str | os.PathLike) -> None:
    """Delete incomplete checkpoints, which Trainer would count for `save_total_limit` and resume from."""
    for path in checkpoints_of(folder):
        if not is_whole(path):
            logger.info("removing %s, which is incomplete", path)
            shutil.rmtree(path)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete: Trainer writes it in place, so a killed run leaves a part.

    All that resuming reads must be there (Trainer ignores a missing optimizer or random state). DeepSpeed and FSDP keep
    weights and optimizer in folders.
    """
    if not is_written(checkpoint):
        return False
    paths = list(checkpoint.iterdir())
    names = {path.name for path in paths}
    has_weights = not names.isdisjoint((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    one_process_wrote = {OPTIMIZER_NAME, SCHEDULER_NAME} <= names and has_weights
    has_random_state = any(name.startswith("rng_state") for name in names)
    return has_random_state and (one_process_wrote or any(path.is_dir() for path in paths))


def is_written(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: Trainer writes its state last, so that must be readable.

    Every other file must have a valid end, as far as that can be known without reading the weights.
    """
    try:
        if read_json(checkpoint / TRAINER_STATE_NAME)["global_step"] != _step(checkpoint):
            return False
        paths = list(checkpoint.iterdir())
        names = {path.name for path in paths}
        for path in paths:
            if path.suffix == ".safetensors":
                # Compares the file's length with its header.
                with safe_open(path, framework="pt"):
                    pass
            elif (path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path)) or (
                path.name == SAFE_WEIGHTS_INDEX_NAME and not set(read_json(path)["weight_map"].values()) <= names
            ):
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return False
    return True


def checkpoints_of(folder: str | os.PathLike) -> list[Path]:
    """Folders of checkpoints, complete or not, the oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if _step(path) is not None]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int | None:
    digits = checkpoint.name.removeprefix("checkpoint-")
    return int(digits) if digits.isdigit() else None


# --- stages that are kept --------------------------------------------------------------------------------------------


def is_finished(folder: Path) -> bool:
    """Whether a stage's folder holds a finished stage."""
    return (folder / FINISHED).is_file()


def stage_start(recipe: Recipe, data: dict[str, Any], processes: int, previous: str | None) -> dict[str, Any]:
    """The content of `STARTED` for a stage that begins from the stage `previous`, or from the recipe's model."""
    ended = None if previous is None else _ended(Path(recipe.output_dir) / previous)
    origin = None if previous is None else {"stage": previous, "ended": ended}
    return {"recipe": recipe.to_dict(), "studies": data, "processes": processes, "from": origin}


def kept_stages(recipe: Recipe, pending: list[str], resume: bool) -> dict[str, dict[str, Any]]:
    """The `STARTED` of each stage that this run builds on: finished stages, and one that continues from a checkpoint.

    Raises:
        ValueError: one of them began from a stage that has been trained again since.
    """
    output = Path(recipe.output_dir)
    before = earlier_stages(pending[0]) if pending else STAGES
    stages = [stage for stage in before if is_finished(output / stage)]
    if resume and pending and last_checkpoint(output / pending[0]) is not None:
        stages.append(pending[0])
    kept = {}
    for stage in stages:
        if not (output / stage / STARTED).is_file():
            logger.warning("stage %s has no %s: it may not fit the recipe", output / stage, STARTED)
            continue
        kept[stage] = read_json(output / stage / STARTED)
        origin = kept[stage]["from"]
        if origin is not None and _ended(output / origin["stage"]) != origin["ended"]:
            raise ValueError(
                f"stage {stage} of {output} began from an earlier run of stage {origin['stage']}: "
                f"{_retrain(stage, recipe)} trains it from this one"
            )
    return kept


def _ended(folder: Path) -> str | None:
    """When a stage ended, which identifies its run; None if it is not finished."""
    return read_json(folder / FINISHED).get("ended") if is_finished(folder) else None


def check_kept_recipes(recipe: Recipe, kept: dict[str, dict[str, Any]], pending: Collection[str]) -> None:
    """Check that the kept stages were trained with the recipe as it is now.

    Raises:
        ValueError: names the fields that have changed.
    """
    # Set by the launcher; the processes are not connected yet.
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    for stage, start in kept.items():
        finished = stage not in pending
        changes, harmless = stage_changes(start["recipe"], recipe, stage, finished, (start["processes"], processes))
        if changes:
            raise ValueError(
                f"stage {stage} of {recipe.output_dir} was {'trained' if finished else 'begun'} with another recipe: "
                f"{format_changes(changes)}; restore the recipe, or {_retrain(stage, recipe)} trains it again"
            )
        if harmless and not finished:
            logger.info("stage %s continues with another recipe: %s", stage, format_changes(harmless))


def check_kept_studies(recipe: Recipe, kept: dict[str, dict[str, Any]], data: dict[str, Any]) -> None:
    """Check that the kept stages were trained on the studies as they are now.

    Args:
        data: the studies' fingerprint.

    Raises:
        ValueError: names the splits that differ and the fields that may be the reason.
    """
    for stage, start in kept.items():
        splits = differing_splits(start["studies"], data)
        if splits:
            counts = ", ".join(
                f"{split} {start['studies'].get(split, {}).get('studies', 0)} then, "
                f"{data.get(split, {}).get('studies', 0)} now"
                for split in splits
            )
            changes = recipe_changes(start["recipe"], recipe)
            of_data = {key: pair for key, pair in changes.items() if key.split(".")[0] in ("studies", "labels", "seed")}
            raise ValueError(
                f"stage {stage} of {recipe.output_dir} was trained on other studies ({counts}; "
                f"{format_changes(of_data) or 'with the same recipe'}): restore them, or {_retrain(stage, recipe)} "
                "trains it again"
            )


def _retrain(stage: str, recipe: Recipe) -> str:
    """The arguments with which a stage and the later ones are trained again."""
    later = [name for name in recipe.stages if stage in earlier_stages(name)]
    return f"stages=[{','.join([stage, *later])}] --overwrite"


# --- recipes compared ------------------------------------------------------------------------------------------------


def recipe_changes(before: dict[str, Any], recipe: Recipe) -> Changes:
    """Every field in which a recipe differs from an earlier one, `section.field`, with both values.

    A field that one of them does not have counts as its default, so that new fields and new defaults of other versions
    are no changes.

    Args:
        before: the earlier recipe as [`Recipe.to_dict`] gives it.
        recipe: the recipe now.
    """
    defaults = _stage_defaults()
    old, new = ({**defaults, **_flat(values)} for values in (before, recipe.to_dict()))
    return {name: (old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)}


def stage_changes(
    before: dict[str, Any], recipe: Recipe, stage: str, finished: bool, processes: tuple[int, int]
) -> tuple[Changes, Changes]:
    """The changes that matter to a stage, and those of its own section that do not.

    An unfinished stage may be logged, evaluated and saved differently, and may be made longer. It may be divided
    differently into batches, accumulation and processes if a step has as many studies as before. Studies and labels are
    compared by their fingerprint, because the same studies may be read from another place.

    Args:
        before: the recipe it was trained with, as a dictionary.
        recipe: the recipe now.
        stage: its name.
        finished: whether it is finished.
        processes: their number then and now.
    """
    old, new = ({**_stage_defaults(), **_flat(values)} for values in (before, recipe.to_dict()))
    section = stage_of(stage).arguments
    steps = [_studies_a_step(values, stage, count) for values, count in zip((old, new), processes, strict=True)]
    same_batch = not finished and steps[0] == steps[1]
    matters: Changes = {}
    harmless: Changes = {}
    for name, pair in recipe_changes(before, recipe).items():
        place, _, field = name.partition(".")
        top = field.partition(".")[0]
        if place == stage:
            is_harmless = (
                section.only_observes(top)
                or (not finished and top in section.after_training)
                or (not finished and top in ("num_train_epochs", "max_steps") and _is_longer(old, new, stage))
                or (top in _BATCH and same_batch)
                or (top == "dataloader_num_workers" and (finished or not recipe.studies.streaming))
            )
            (harmless if is_harmless else matters)[name] = pair
        elif name == "seed" or (place == "model" and _reads(stage, field)) or (name in _STREAM and not finished):
            matters[name] = pair
    if not finished and processes[0] != processes[1] and not same_batch:
        matters["the number of processes"] = processes
    return matters, harmless


def format_changes(changes: Changes) -> str:
    """Changes in a line: "model.preset='small' then, 'tiny' now"."""

    def text(value: Any) -> str:
        return "unset" if value is None else repr(value)

    return "; ".join(f"{name}={text(old)} then, {text(new)} now" for name, (old, new) in sorted(changes.items()))


def _stage_defaults() -> dict[str, Any]:
    """The defaults of all fields of all stages' sections, by `section.field`."""
    defaults = (_section_defaults(stage, stage_of(stage).arguments) for stage in STAGES)
    return {name: value for section in defaults for name, value in section.items()}


@lru_cache
def _section_defaults(stage: str, arguments: type[StageArguments]) -> dict[str, Any]:
    section = arguments()
    values = {item.name: getattr(section, item.name) for item in fields(section)}
    plain = {name: asdict(value) if isinstance(value, Section) else value for name, value in values.items()}
    return _flat({stage: plain})


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by `section.field`, without empty ones."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif value != {}:
            flat[prefix + key] = value
    return flat


def _reads(stage: str, field: str) -> bool:
    """Whether a stage reads a field of the recipe's `model`, "preset" or "overrides.ot_epsilon"."""
    section, _, name = field.partition(".")
    if section == "quantization":
        return stage_of(stage).reads_quantization
    top = name.partition(".")[0]
    later = [other for other in STAGES if stage in earlier_stages(other)]
    return section != "overrides" or not any(top in stage_of(other).first_reads for other in later)


def _is_longer(old: dict[str, Any], new: dict[str, Any], stage: str) -> bool:
    """Whether a stage is trained for longer now, by `max_steps`, which takes precedence, or `num_train_epochs`."""
    steps = f"{stage}.max_steps"
    if (old[steps] > 0) != (new[steps] > 0):
        return False
    name = steps if new[steps] > 0 else f"{stage}.num_train_epochs"
    return new[name] >= old[name]


def _studies_a_step(values: dict[str, Any], stage: str, processes: int) -> tuple[int, ...]:
    """What makes a step, as far as the loss depends on it."""
    batch, accumulation = (values[f"{stage}.{name}"] for name in _BATCH)
    if stage_of(stage).compares_within_batch:
        return batch * processes, accumulation
    return (batch * processes * accumulation,)


__all__ = [
    "FINISHED",
    "STARTED",
    "Changes",
    "check_kept_recipes",
    "check_kept_studies",
    "checkpoints_of",
    "format_changes",
    "is_finished",
    "is_whole",
    "is_written",
    "kept_stages",
    "last_checkpoint",
    "recipe_changes",
    "remove_partial_checkpoints",
    "stage_changes",
    "stage_start",
]
