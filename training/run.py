"""A run: the recipe's stages in order, each from the folder of the one before."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from transformers import set_seed

from ..files_otdrg import write_json, write_text
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from ..runtime.devices import has_accelerator
from ..runtime.interruptions import FULL, RunInterruptedError, ended_by, is_out_of_memory
from ..runtime.output_lock import OutputLock
from ..runtime.processes import start_processes
from ..runtime.run_record import RunRecord, read_results
from ..sections_otdrg import SECTIONS, has_sections
from ..studies.fingerprint import fingerprint
from .arguments import StageArguments, check_report_to
from .callbacks import FIGURES
from .data import StudySplits, build_studies, check_labels, check_source, describe_studies
from .model import build_model, check_lora_targets, check_model_recipe, load_model, lora_fields, quantization_config
from .recipe import Recipe
from .resumption import (
    FINISHED,
    STARTED,
    check_kept_recipes,
    check_kept_studies,
    checkpoints_of,
    is_finished,
    is_written,
    kept_stages,
    last_checkpoint,
    remove_partial_checkpoints,
    stage_start,
)
from .stages import STAGES, StageRun, earlier_stages, published_folder, stage_of

logger = logging.getLogger(__name__)


def check_recipe(recipe: Recipe) -> None:
    """Check all sections of a recipe, including those of stages that are not run, before anything is read.

    Raises:
        ValueError: a source, labeler, metric, preset... that does not exist, an option that its source, labeler or
            configuration does not have, or a package that is not installed.
    """
    check_report_to("report_to", recipe.report_to)
    check_source(recipe.studies)
    check_labels(recipe.labels)
    check_model_recipe(recipe.model)
    for name in recipe.stages:
        lora_fields(recipe, name)
    for name in STAGES:
        stage, section = stage_of(name), getattr(recipe, name)
        check_report_to(f"{name}.report_to", section.report_to)
        stage.check(recipe)
        try:
            section.best.check(("loss", *FIGURES, *stage.score_names()))
        except ValueError as error:
            raise ValueError(f"{name}.metric_for_best_model={error}") from None
    quantization_config(recipe.model.quantization)


def run_recipe(recipe: Recipe, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Run a recipe's stages.

    Writes to `output_dir`: `recipe.yaml`; `run.json` ([`RunRecord`]); a folder for each stage with its checkpoints, its
    model, `metrics.jsonl`, `curves.png` and `finished.json`; `results.json`; and what the stages publish, which for the
    report stage is `model`, `adapter` (if it has backbones) and `predictions.csv`.

    Args:
        recipe: the run.
        resume: keep finished stages, and continue an unfinished one from its last complete checkpoint.
        overwrite: start an unfinished stage again and delete its checkpoints.

    Returns:
        The content of `results.json`.

    Raises:
        OutputLockedError: another process writes to `output_dir`.
        ValueError: the recipe does not fit the studies or the model; a stage is unfinished and neither `resume` nor
            `overwrite` is given; a kept stage was trained with another recipe or on other studies; or fewer processes
            would train than were asked for.
        NonFiniteLossError: the loss became NaN or infinite.
        RunInterruptedError: the disk is full, or a process that loads studies died.
        KeyboardInterrupt: Ctrl-C or SIGTERM ([`Terminated`]); the message names the last complete checkpoint.
    """
    check_recipe(recipe)
    sections = [getattr(recipe, stage) for stage in recipe.stages]
    state = start_processes(any(section.fsdp for section in sections), any(section.deepspeed for section in sections))
    with _locked(recipe.output_dir, state):
        try:
            results = _run_stages(recipe, state, resume, overwrite)
        except KeyboardInterrupt as stop:
            raise type(stop)(str(stop) or f"no training was begun in {recipe.output_dir}") from stop
    logger.info("run: %s", recipe.output_dir)
    # If the group stays open, its threads may crash the process at exit, and the launcher would report a failed run.
    state.destroy_process_group()
    return results


@contextlib.contextmanager
def _locked(folder: str, state: PartialState) -> Iterator[None]:
    """Hold the lock on a folder; the main process takes it for all."""
    with contextlib.ExitStack() as held:
        _by_main_process(state, lambda: held.enter_context(OutputLock(folder)))
        yield


def _by_main_process(state: PartialState, act: Callable[[], Any]) -> None:
    """Let the main process act, and raise its error on every process."""
    fault = None
    if state.is_main_process:
        try:
            act()
        except (ValueError, OSError) as error:
            fault = error
    (fault,) = broadcast_object_list([fault])
    if fault is not None:
        raise fault


def _run_stages(recipe: Recipe, state: PartialState, resume: bool, overwrite: bool) -> dict[str, Any]:
    """Check the recipe against the studies and the run's folder, then train the pending stages."""
    pending = _pending_stages(recipe, resume, overwrite)
    for stage in pending:
        stage_of(stage).check_start(recipe, pending)
    kept = kept_stages(recipe, pending, resume)
    check_kept_recipes(recipe, kept, pending)
    for stage in pending:
        # Fails if this machine cannot do what the arguments ask for.
        getattr(recipe, stage).prepare(Path(recipe.output_dir) / stage, recipe.seed, recipe.report_to, evaluates=True)
    studies = build_studies(recipe.studies, recipe.labels, recipe.seed)
    for stage in pending:
        stage_of(stage).check_studies(recipe, studies)
    if not has_accelerator():
        # Without a GPU `accelerate launch` gives each process one thread.
        torch.set_num_threads(recipe.cpu_threads or max(1, (os.cpu_count() or 1) // state.num_processes))
    data = fingerprint(studies) if state.is_main_process else {}

    def prepare_folder() -> None:
        check_kept_studies(recipe, kept, data)
        _prepare_folder(recipe, pending, resume)

    _by_main_process(state, prepare_folder)
    output = Path(recipe.output_dir)
    facts = {
        "seed": recipe.seed,
        "studies": data,
        "data": describe_studies(studies) if state.is_main_process else {},
        "hub_dataset": recipe.studies.hub_dataset,
    }
    record = RunRecord(output, state, facts)
    run = _Run(recipe, state, pending, studies, data, record, read_results(output))
    try:
        run.train(resume)
        record.end("finished")
    except BaseException as error:
        reason = _interruption(error, run.folder)
        # If the disk is full, the error is reported all the same.
        with contextlib.suppress(OSError):
            record.end(reason or f"{type(error).__name__}: {' '.join(str(error).split())}")
        if reason is None:
            raise
        if isinstance(error, KeyboardInterrupt):
            raise type(error)(_where_to_continue(run.folder)) from error
        raise RunInterruptedError(f"{reason}; {_where_to_continue(run.folder)}") from error
    return run.results


@dataclass
class _Run:
    """The stages that are trained now. `data` is the studies' fingerprint, `folder` that of the stage being trained."""

    recipe: Recipe
    state: PartialState
    pending: list[str]
    studies: StudySplits
    data: dict[str, Any]
    record: RunRecord
    results: dict[str, Any]

    def __post_init__(self):
        self.output = self.folder = Path(self.recipe.output_dir)

    def train(self, resume: bool) -> None:
        """Train the pending stages; `resume`: continue the first from its last checkpoint."""
        earlier = earlier_stages(self.pending[0]) if self.pending else []
        previous = next((stage for stage in reversed(earlier) if is_finished(self.output / stage)), None)
        for position, name in enumerate(self.pending):
            self.folder = self.output / name
            continues = resume and position == 0
            source = None if previous is None else published_folder(self.output, previous)
            logger.info("stage %s: %s, from %s", name, self.folder, source or "the recipe's model")
            self.record.begin_stage(name, last_checkpoint(self.folder) if continues else None)
            if self.state.is_main_process:
                self.folder.mkdir(parents=True, exist_ok=True)
            stage = StageRun(self.recipe, self.studies, *self._model(name, source), self.folder, continues)
            if position == 0:
                for later in self.pending:
                    stage_of(later).check_model(self.recipe, stage.model)
                    check_lora_targets(stage.model, self.recipe, later)
            if self.state.is_main_process:
                start = stage_start(self.recipe, self.data, self.state.num_processes, previous)
                write_json(self.folder / STARTED, start)
            self._train_stage(name, stage)
            previous = name

    def _model(self, name: str, source: Path | None) -> tuple[OTDRGForReportGeneration, OTDRGProcessor]:
        """The model and processor that a stage starts from."""
        seed = getattr(self.recipe, name).seed
        set_seed(self.recipe.seed if seed is None else seed)
        # The other stages do not use the LLM, and their folders can be loaded without bitsandbytes.
        quantization = self.recipe.model.quantization if stage_of(name).reads_quantization else None
        train = self.studies["train"]
        if source is None:
            texts = [*train["report"], *(filter(None, train["indication"]) if self.recipe.prompts_indication else ())]
            model, processor = build_model(self.recipe.model, texts, quantization)
        else:
            model, processor = load_model(source, self.recipe.model, quantization)
        model.config.report_sections = list(SECTIONS) if has_sections(train["report"]) else None
        return model, processor

    def _train_stage(self, name: str, run: StageRun) -> None:
        """Train a stage, publish and evaluate its model."""
        stage = stage_of(name)
        run.model, results = stage.train(run)
        published = published_folder(self.output, name)
        if self.state.is_main_process:
            run.model.save_pretrained(published)
            run.processor.save_pretrained(published)
        self.state.wait_for_everyone()
        results |= stage.evaluate(run)
        self.results[name] = results
        self.record.end_stage(name, results["steps"])
        if self.state.is_main_process:
            write_json(self.output / "results.json", self.results)
            ended = self.record.sitting["stages"][name]["ended"]
            write_json(self.folder / FINISHED, {"steps": results["steps"], "ended": ended})
        _by_main_process(self.state, lambda: _upload(getattr(self.recipe, name), published))


def _upload(section: StageArguments, folder: Path) -> None:
    """Upload a published model, if the stage's section asks for it."""
    if not section.push_to_hub:
        return
    # The model's files only: a stage's own folder also has checkpoints and reports of the studies.
    files = ["*.safetensors", "*.json", "*.py", "*.jinja", "*.txt", "*.model"]
    try:
        url = HfApi().create_repo(section.hub_model_id, private=section.hub_private_repo, exist_ok=True)
        HfApi().upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            allow_patterns=files,
            ignore_patterns=["checkpoint-*", STARTED, FINISHED],
            revision=section.hub_revision,
            commit_message=f"Upload the model of stage {section.place}",
        )
    except Exception as error:  # the network, the Hub or its permissions fail in many ways
        raise ValueError(
            f"{section.place}.push_to_hub: the model is trained, but {folder} could not be uploaded to "
            f"{section.hub_model_id} ({' '.join(str(error).split())}): otdrg push uploads it"
        ) from error
    logger.info("uploaded %s to %s; otdrg push also writes a model card", folder, url)


def _pending_stages(recipe: Recipe, resume: bool, overwrite: bool) -> list[str]:
    """The recipe's stages that are trained now; raises `ValueError` if an unfinished one must not be overwritten."""
    pending = []
    for stage in recipe.stages:
        folder = Path(recipe.output_dir) / stage
        finished = is_finished(folder)
        if resume and finished and not pending:
            logger.info("stage %s is finished: %s", stage, folder)
            continue
        pending.append(stage)
        found, checkpoint = checkpoints_of(folder), last_checkpoint(folder)
        if finished or overwrite or not found:
            continue
        again = "--overwrite starts it again and deletes its checkpoints, another output_dir keeps it"
        if not resume:
            whole = checkpoint is not None
            place = checkpoint if whole else f"{found[-1]}, which is incomplete"
            way = "--resume continues from there" if whole else "--resume starts it again"
            raise ValueError(f"stage {stage} is unfinished, with {place}: {way}, {again}")
        if pending != [stage]:
            raise ValueError(f"stage {stage} would start again, after stage {pending[0]}, but has {found[-1]}: {again}")
        written = [path for path in found if is_written(path)]
        if written and checkpoint is None:
            raise ValueError(f"stage {stage} cannot continue from {written[-1]}, which lacks its optimizer: {again}")
    return pending


def _prepare_folder(recipe: Recipe, pending: list[str], resume: bool) -> None:
    """Write the recipe, and remove what a later `resume` would mistake for this run's."""
    output = Path(recipe.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    for position, stage in enumerate(pending):
        if resume and position == 0:
            remove_partial_checkpoints(output / stage)
            continue
        (output / stage / FINISHED).unlink(missing_ok=True)
        for checkpoint in checkpoints_of(output / stage):
            logger.info("removing %s of an earlier run", checkpoint)
            shutil.rmtree(checkpoint)
    write_text(output / "recipe.yaml", recipe.to_yaml())


def _where_to_continue(folder: Path) -> str:
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        return f"{folder} has no checkpoint yet, --resume starts the stage again"
    return f"the last good checkpoint is {checkpoint}, --resume continues from there"


def _interruption(error: BaseException, folder: Path) -> str | None:
    """What ended a run from outside, in a line: a signal, a full disk, memory, a dead process; else None."""
    if isinstance(error, KeyboardInterrupt):
        return ended_by(error)
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid"):
        return (
            f"a process that loads studies died: {' '.join(str(error).split())}; usually memory ran out, and a smaller "
            "dataloader_num_workers needs less"
        )
    if is_out_of_memory(error):
        reason = " ".join(str(error).split()).partition(". ")[0]
        return (
            f"out of memory ({reason}): a smaller per_device_train_batch_size with more gradient_accumulation_steps "
            "needs less"
        )
    reason = _write_failure(error)
    if reason is None:
        return None
    space = shutil.disk_usage(folder).free / 2**20 if folder.is_dir() else 0.0
    return f"cannot write to {folder}: {reason}; {space:,.1f} MB are free there"


def _write_failure(error: BaseException) -> str | None:
    """Why a file could not be written; None for an error of another kind."""
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in FULL else None
    for number in FULL:
        # safetensors gives the system's error number in its text only.
        if type(error).__name__ == "SafetensorError" and f"(os error {number})" in str(error):
            return os.strerror(number)
    # torch's archive writer reports that a write failed, and not why.
    if isinstance(error, RuntimeError) and ("inline_container" in str(error) or "PytorchStreamWriter" in str(error)):
        return "a file could not be written to its end"
    return None


__all__ = ["check_recipe", "run_recipe"]
