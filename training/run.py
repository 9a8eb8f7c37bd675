"""A run: the recipe's stages in order, each from the folder of the one before, and what they leave behind."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import set_seed

from ..files_otdrg import write_json, write_text
from ..inference.model_files import read_config
from ..runtime.interruptions import RunInterruptedError
from ..runtime.output_lock import OutputLock
from ..studies.fingerprint import fingerprint
from . import kept_stages
from .build import build_model, build_studies, load_model
from .check import check_model, check_recipe, check_studies
from .checkpoints import last_checkpoint, remove_partial_checkpoints
from .description import describe_studies
from .distributed import has_accelerator, start_processes
from .interruptions import interruption
from .kept_stages import FINISHED, STARTED, stage_start, stages_before
from .recipe import STAGES, Recipe
from .run_folder import RunRecord, read_results
from .trainer import training_arguments

logger = logging.getLogger(__name__)


def run_recipe(recipe: Recipe, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Run a recipe's stages.

    Leaves in `output_dir`: `recipe.yaml` as resolved; `run.json`, how it came about ([`RunRecord`]); a folder for each
    stage with its checkpoints, its model, `metrics.jsonl`, `curves.png` and `finished.json`; after the report stage
    `model`, which is what is published, `adapter`, the same as an adapter of its backbones if it has any, and
    `predictions.csv`; `results.json`.

    Args:
        recipe: the run.
        resume: leave finished stages as they are, go on with an unfinished one from its last whole checkpoint.
        overwrite: start an unfinished stage anew and delete its checkpoints.

    Returns:
        What `results.json` holds.

    Raises:
        OutputLockedError: another process writes to `output_dir`.
        ValueError: the recipe does not fit the studies or the model, a stage is unfinished and neither `resume` nor
            `overwrite` says what is to become of it, a stage that is kept was trained with another recipe or on other
            studies, or it would be trained by fewer processes than were asked for.
        NonFiniteLossError: the loss became NaN or infinite.
        RunInterruptedError: the disk is full, or a process that loads studies died.
        KeyboardInterrupt: Ctrl-C or SIGTERM ([`Terminated`]); the message names the last good checkpoint.
    """
    check_recipe(recipe)
    state = start_processes()
    with _locked(recipe.output_dir, state):
        try:
            results = _run_stages(recipe, state, resume, overwrite)
        except KeyboardInterrupt as stop:
            raise type(stop)(str(stop) or f"no training was begun in {recipe.output_dir}") from stop
    logger.info("run: %s", recipe.output_dir)
    # Left open, its threads may take a process down at the very end, and the launcher would call the run failed.
    state.destroy_process_group()
    return results


@contextlib.contextmanager
def _locked(folder: str, state: PartialState) -> Iterator[None]:
    """Hold the lock on a folder, by the main process for all."""
    with contextlib.ExitStack() as held:
        fault = None
        if state.is_main_process:
            try:
                held.enter_context(OutputLock(folder))
            except (ValueError, OSError) as error:
                fault = error
        (fault,) = broadcast_object_list([fault])
        if fault is not None:
            raise fault
        yield


def _run_stages(recipe: Recipe, state: PartialState, resume: bool, overwrite: bool) -> dict[str, Any]:
    """Check the recipe against studies, model and what is in its folder, then train what is to be trained."""
    output = Path(recipe.output_dir)
    pending = _pending_stages(recipe, resume, overwrite)
    _check_predictor(recipe, pending)
    previous = _previous_folder(recipe, pending)
    kept = kept_stages.kept_stages(recipe, pending, resume)
    kept_stages.check_recipe(recipe, kept, pending)
    _check_arguments(recipe, pending)
    studies = build_studies(recipe.studies, recipe.labels, recipe.seed)
    check_studies(recipe, studies, pending)
    if not has_accelerator():
        # `accelerate launch` leaves a process without a GPU one thread unless it is told otherwise.
        torch.set_num_threads(recipe.cpu_threads or max(1, (os.cpu_count() or 1) // state.num_processes))
    data = fingerprint(studies) if state.is_main_process else {}
    kept_stages.check_studies(recipe, kept, data, state)
    if state.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        for position, stage in enumerate(pending):
            if resume and position == 0:
                remove_partial_checkpoints(output / stage)
            else:
                _clear(output / stage)
        write_text(output / "recipe.yaml", recipe.to_yaml())
    state.wait_for_everyone()
    record = RunRecord(recipe, state, data, describe_studies(studies) if state.is_main_process else {})
    results = read_results(output)
    folder = output
    try:
        for position, stage in enumerate(pending):
            folder = output / stage
            goes_on = resume and position == 0
            logger.info("stage %s: %s, from %s", stage, folder, previous or "the recipe's model")
            record.begin_stage(stage, last_checkpoint(folder) if goes_on else None)
            if state.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
            set_seed(recipe.seed)
            # The other stages do not compute with the LLM, and leave folders that anything can load.
            quantization = recipe.model.quantization if stage == "report" else None
            if previous is None:
                model, processor = build_model(recipe.model, studies["train"]["report"], quantization)
            else:
                model, processor = load_model(previous, recipe.model, quantization)
            if position == 0:
                check_model(recipe, model, pending)
            if state.is_main_process:
                write_json(folder / STARTED, stage_start(recipe, data, state.num_processes, previous))
            module = import_module(f".{STAGES[stage]}", __package__)
            model, results[stage] = module.run(recipe, studies, model, processor, folder, goes_on)
            published = output / "model" if stage == "report" else folder
            if state.is_main_process:
                model.save_pretrained(published)
                processor.save_pretrained(published)
            state.wait_for_everyone()
            if stage == "report" and recipe.report.evaluation.split != "none":
                results[stage]["evaluation"] = module.evaluate(recipe, studies, model, processor, output)
            record.end_stage(stage, results[stage]["steps"])
            if state.is_main_process:
                write_json(output / "results.json", results)
                ended = record.sitting["stages"][stage]["ended"]
                write_json(folder / FINISHED, {"steps": results[stage]["steps"], "ended": ended})
            state.wait_for_everyone()
            previous = published
        record.end("finished")
    except BaseException as error:
        reason = interruption(error, folder)
        # The disk may be full; what is wrong is said all the same.
        with contextlib.suppress(OSError):
            record.end(reason or f"{type(error).__name__}: {' '.join(str(error).split())}")
        if reason is None:
            raise
        if isinstance(error, KeyboardInterrupt):
            raise type(error)(_where_to_go_on(folder)) from error
        raise RunInterruptedError(f"{reason}; {_where_to_go_on(folder)}") from error
    return results


def _check_arguments(recipe: Recipe, pending: list[str]) -> None:
    """Make the `TrainingArguments` of every stage, which refuse what this machine cannot do, such as bfloat16."""
    for stage in pending:
        try:
            training_arguments(
                getattr(recipe, stage), Path(recipe.output_dir) / stage, recipe.seed, True, recipe.report_to
            )
        except ValueError as error:
            raise ValueError(f"{stage}: {error}") from error


def _pending_stages(recipe: Recipe, resume: bool, overwrite: bool) -> list[str]:
    pending = []
    for stage in recipe.stages:
        folder = Path(recipe.output_dir) / stage
        finished = (folder / FINISHED).is_file()
        if resume and finished and not pending:
            logger.info("stage %s is finished: %s", stage, folder)
            continue
        pending.append(stage)
        checkpoint = last_checkpoint(folder)
        if checkpoint is not None and not (finished or resume or overwrite):
            raise ValueError(
                f"stage {stage} is unfinished, with {checkpoint}: --resume goes on from there, --overwrite starts it "
                "anew and deletes its checkpoints, another output_dir leaves it alone"
            )
    return pending


def _clear(folder: Path) -> None:
    """Remove an earlier run of a stage, whose checkpoints a later `resume` would otherwise take for this run's."""
    (folder / FINISHED).unlink(missing_ok=True)
    for checkpoint in folder.glob("checkpoint-*"):
        logger.info("removing %s of an earlier run", checkpoint)
        shutil.rmtree(checkpoint)


def _previous_folder(recipe: Recipe, pending: list[str]) -> Path | None:
    """The folder the first pending stage reads; None where it starts from the recipe's `model`."""
    for stage in reversed(stages_before(pending)):
        folder = Path(recipe.output_dir) / stage
        if (folder / FINISHED).is_file():
            return folder
    return None


def _check_predictor(recipe: Recipe, pending: list[str]) -> None:
    """The report stage reads a folder in which the predictor has been trained, on the encoder the recipe says."""
    if "report" not in pending or "predictor" in pending or not recipe.model.overrides.get("dle", True):
        return
    folder = Path(recipe.output_dir) / "predictor"
    if (folder / FINISHED).is_file():
        there = read_config(folder).predictor_encoder
        wanted = recipe.model.overrides.get("predictor_encoder", "shared")
        if there != wanted:
            raise ValueError(
                f"model.overrides.predictor_encoder={wanted!r}: expected {there}, as the predictor of {folder} was "
                "trained, or stages=[predictor,report]"
            )
    else:
        raise ValueError(
            f"stage report needs a trained predictor, and {folder} holds none: run stages=[predictor,report]"
        )
    if "ircp" in pending:
        raise ValueError(
            f"stage report needs a trained predictor, and that of {folder} does not know the encoder that stage ircp "
            "makes: run stages=[ircp,predictor,report]"
        )


def _where_to_go_on(folder: Path) -> str:
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        return f"{folder} has no checkpoint yet, --resume starts the stage anew"
    return f"the last good checkpoint is {checkpoint}, --resume goes on from there"


__all__ = ["run_recipe"]
