"""A run: the recipe's stages in order, each from the folder of the one before, and what they leave behind."""

from __future__ import annotations

import json
import logging
import os
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from .build import build_model, build_studies, last_checkpoint, load_model
from .distributed import has_accelerator, start_processes
from .recipe import STAGES, Recipe

logger = logging.getLogger(__name__)

#: Written last into a stage's folder: with it the stage is done.
FINISHED = "finished.json"


def run_recipe(recipe: Recipe, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Run a recipe's stages.

    Leaves in `output_dir`: `recipe.yaml` as resolved; a folder for each stage with its checkpoints, its model and
    `finished.json`; after the report stage `model`, which is what is published, and `predictions.csv`; `results.json`.

    Args:
        recipe: the run.
        resume: leave finished stages as they are, go on with an unfinished one from its last whole checkpoint.
        overwrite: start an unfinished stage anew and delete its checkpoints.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: the recipe does not fit the studies or the model, a stage is unfinished and neither `resume` nor
            `overwrite` says what is to become of it, or it would be trained by fewer processes than were asked for.
        NonFiniteLossError: the loss became NaN or infinite.
    """
    state = start_processes()
    output = Path(recipe.output_dir)
    pending = _pending_stages(recipe, resume, overwrite)
    _check_predictor(recipe, pending)
    previous = _previous_folder(recipe, pending)
    studies = build_studies(recipe.studies, recipe.labels, recipe.seed)
    if not has_accelerator():
        # `accelerate launch` leaves a process without a GPU one thread unless it is told otherwise.
        torch.set_num_threads(recipe.cpu_threads or max(1, (os.cpu_count() or 1) // state.num_processes))
    if state.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        if not resume:
            for stage in pending:
                _clear(output / stage)
        (output / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    state.wait_for_everyone()
    results = _read_results(output)
    for stage in pending:
        logger.info("stage %s: %s, from %s", stage, output / stage, previous or "the recipe's model")
        set_seed(recipe.seed)
        # The other stages do not compute with the LLM, and leave folders that anything can load.
        quantization = recipe.model.quantization if stage == "report" else None
        if previous is None:
            model, processor = build_model(recipe.model, studies["train"]["report"], quantization)
        else:
            model, processor = load_model(previous, recipe.model.dtype, quantization)
        module = import_module(f".{STAGES[stage]}", __package__)
        model, results[stage] = module.run(recipe, studies, model, processor, output / stage, resume)
        folder = output / "model" if stage == "report" else output / stage
        if state.is_main_process:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        state.wait_for_everyone()
        if stage == "report" and recipe.report.evaluation.split != "none":
            results[stage]["evaluation"] = module.evaluate(recipe, studies, model, processor, output)
        if state.is_main_process:
            _write_json(output / "results.json", results)
            _write_json(output / stage / FINISHED, {"steps": results[stage]["steps"]})
        state.wait_for_everyone()
        previous = folder
    logger.info("run: %s", output)
    # Left open, its threads may take a process down at the very end, and the launcher would call the run failed.
    state.destroy_process_group()
    return results


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
    order = list(STAGES)
    before = order[: order.index(pending[0])] if pending else []
    for stage in reversed(before):
        folder = Path(recipe.output_dir) / stage
        if (folder / FINISHED).is_file():
            return folder
    return None


def _check_predictor(recipe: Recipe, pending: list[str]) -> None:
    """The report stage reads a folder in which the predictor has been trained."""
    if "report" not in pending or "predictor" in pending or not recipe.model.overrides.get("dle", True):
        return
    folder = Path(recipe.output_dir) / "predictor"
    if not (folder / FINISHED).is_file():
        raise ValueError(
            f"stage report needs a trained predictor, and {folder} holds none: run stages=[predictor,report]"
        )
    if "ircp" in pending:
        raise ValueError(
            f"stage report needs a trained predictor, and that of {folder} does not know the encoder that stage ircp "
            "makes: run stages=[ircp,predictor,report]"
        )


def _read_results(output: Path) -> dict[str, Any]:
    """What the stages that are not run again left in `results.json`."""
    path = output / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


__all__ = ["FINISHED", "run_recipe"]
