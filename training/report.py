"""Stage `report`: feature integration by optimal transport and fine-tuning of the LLM (3.3, 3.5, eqs. 11 and 12)."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback

from ..configuration_otdrg import OTDRGConfig
from ..evaluation.evaluate import evaluate_model
from ..evaluation.report import format_table, write_predictions
from ..findings_otdrg import FINDINGS
from ..inference.features import CachedStudies
from ..metrics import NLG_METRICS, clinical_efficacy_scores
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from .build import StudySplits, attach_lora, cached_where_frozen, set_trained_parts
from .callbacks import SinkhornLossCallback
from .collation import ReportCollator
from .predictor import logit_adjustment
from .recipe import Recipe, ReportRecipe
from .selection import SelectionExpression
from .trainer import StageTrainer, training_arguments

logger = logging.getLogger(__name__)

#: Scores of every evaluation during training; METEOR, which starts Java, only where the expression names it.
VALIDATION_SCORES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider", "macro_f1_13")

#: The policy of a clinical score that is named without one.
_POLICY = "uncertain_negative"


def check(recipe: Recipe) -> None:
    """Check what only the metrics know of a recipe.

    Raises:
        ValueError: the selection's expression names a score that does not exist, or has no value.
    """
    try:
        expression = SelectionExpression(recipe.report.selection.expression)
        expression.check_names(list(_full_names()))
        expression.check_value()
    except ValueError as error:
        raise ValueError(f"report.selection.expression={error}") from None


def _full_names() -> dict[str, str]:
    """The scores an expression can name, and the names the metrics have for them."""
    blank = np.zeros((1, len(FINDINGS)), dtype=int)
    clinical = [name for name, value in clinical_efficacy_scores(blank, blank).items() if isinstance(value, float)]
    short = {name.removesuffix(f"_{_POLICY}"): name for name in clinical if name.endswith(_POLICY)}
    return {**{name: name for name in (*NLG_METRICS, *clinical)}, **short}


def run(
    recipe: Recipe,
    studies: StudySplits,
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    folder: Path,
    resume: bool,
) -> tuple[OTDRGForReportGeneration, dict[str, Any]]:
    """Train what joins the backbones, and the LLM as the recipe says, on reports and true states.

    Evaluation during training conditions on predicted states, as generation does: the teacher-forced losses of
    validation, and scores of the reports that are generated for it, by which the best checkpoint is selected.

    What was trained on pretrained backbones is kept as their adapter, too, in the folder `adapter` beside the stage's.

    Returns:
        The best model, or the last where nothing is evaluated, LoRA merged and all of it in the recipe's type, as it is
        published; and the stage's results, with step and value of the selection under `best`.
    """
    stage = recipe.report
    attach_lora(model, recipe, "report")
    frozen = set_trained_parts(model, vision=stage.vision, text=stage.text, predictor=stage.predictor, joining=True)
    if stage.predictor == "full":
        tau = recipe.predictor.logit_adjustment
        model.finding_logit_adjustment = logit_adjustment(studies["train"]["finding_states"], tau)
    train, validation = studies["train"], studies.get("validation")
    selects = validation is not None and stage.eval_strategy != "no"
    args = training_arguments(
        stage,
        folder,
        recipe.seed,
        evaluates=validation is not None,
        report_to=recipe.report_to,
        label_names=["labels"],
        prediction_loss_only=True,
        metric_for_best_model="selection" if selects else None,
        greater_is_better=True,
    )
    # Set behind the constructor, which wants checkpoints at the steps of evaluations and at no others: here they may
    # be more frequent, because `SaveOnEvaluation` sees to it that what is evaluated is also saved.
    args.load_best_model_at_end = selects
    callbacks: list[TrainerCallback] = [SaveOnEvaluation()] if selects else []
    if selects and stage.selection.patience is not None:
        callbacks.append(EarlyStoppingCallback(stage.selection.patience))
    train, validation = (
        cached_where_frozen(model, processor, rows, recipe, stage, args.device) for rows in (train, validation)
    )
    sinkhorn = SinkhornLossCallback(
        ot_weight_warmup=stage.ot_weight_warmup,
        ot_epsilon_start=stage.ot_epsilon_start,
        ot_epsilon_annealing=stage.ot_epsilon_annealing,
    )
    trainer = ReportTrainer(
        model,
        args,
        processor=processor,
        loss_callback=sinkhorn,
        frozen=frozen,
        vision_learning_rate=stage.vision_learning_rate,
        train_collator=ReportCollator(
            processor, True, stage.max_report_tokens, stage.predictor == "full", stage.indication
        ),
        eval_collator=ReportCollator(processor, False, stage.max_report_tokens, indication=stage.indication),
        train_lengths=_report_lengths(processor, train["report"], stage) if stage.group_by_length else None,
        callbacks=callbacks,
        validate=Validation(recipe, model, processor, validation, folder) if selects else None,
        train_dataset=train,
        eval_dataset=validation,
    )
    trainer.train_stage(resume)
    results = trainer.summary()
    if selects:
        best = {"expression": stage.selection.expression, "value": trainer.state.best_metric}
        results["best"] = {"step": trainer.state.best_global_step, **best}
        logger.info("best of validation: step %d, %s = %.4f", *(results["best"][k] for k in ("step", *best)))
    model = trainer.whole_model()
    model.generation_config.update(**asdict(stage.generation))
    # One type throughout, because from_pretrained gives one: what is scored is what will be loaded.
    dtype = getattr(torch, recipe.model.dtype)
    for weight in model.parameters():
        # Packed weights are integers.
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    if PartialState().is_main_process:
        save_adapter(model.eval(), processor, recipe, folder.parent / "adapter")
    model.merge_lora()
    model.to(args.device, dtype).eval()
    return model, results


def save_adapter(model: OTDRGForReportGeneration, processor: OTDRGProcessor, recipe: Recipe, folder: Path) -> None:
    """Write what was trained as an adapter of the recipe's backbones, which are kept as the recipe refers to them.

    Not of a model from scratch, nor of one whose LLM is trained as a whole; an adapter that an earlier run left is
    deleted in any case. A backbone that cannot be loaded any more is warned of.
    """
    # It is of other weights than those that will lie beside it.
    shutil.rmtree(folder, ignore_errors=True)
    preset = OTDRGConfig.from_preset(recipe.model.preset)
    references = {
        "vision_backbone": recipe.model.vision or preset.vision_backbone,
        "text_backbone": recipe.model.text or preset.text_backbone,
    }
    if recipe.report.text == "full" or None in references.values():
        return
    published = {field: getattr(model.config, field) for field in references}
    for field, reference in references.items():
        # So that it is found from any folder.
        setattr(model.config, field, os.path.abspath(reference) if os.path.exists(reference) else reference)
    try:
        model.save_pretrained(folder, weights="adapter")
        processor.save_pretrained(folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        logger.warning("no adapter is kept: %s", error)
    finally:
        for field, reference in published.items():
            setattr(model.config, field, reference)


class SaveOnEvaluation(TrainerCallback):
    """A checkpoint at every evaluation, so that the best can be gone back to."""

    def on_evaluate(self, args, state, control, **kwargs):
        control.should_save = True


@dataclass
class Validation:
    """Generates reports for validation studies, scores them and writes them to `FOLDER/validation/step-N.csv`.

    Args:
        recipe: `report.selection` says how, `report.generation` and `report.evaluation` what it does not.
        model, processor: as they are trained.
        studies: the validation split.
        folder: of the stage.
    """

    recipe: Recipe
    model: OTDRGForReportGeneration
    processor: OTDRGProcessor
    studies: Dataset | CachedStudies
    folder: Path

    def __call__(self, step: int) -> dict[str, float]:
        """`VALIDATION_SCORES`, those the expression names, and its value as `selection`; every process calls it."""
        stage = self.recipe.report
        expression = SelectionExpression(stage.selection.expression)
        names = {name: _full_names()[name] for name in (*VALIDATION_SCORES, *expression.names)}
        rows = self.studies.select(range(min(stage.selection.limit or len(self.studies), len(self.studies))))
        evaluation = evaluate_model(
            self.model,
            self.processor,
            rows,
            batch_size=stage.eval_batch_size or stage.batch_size,
            generation={**asdict(stage.generation), "num_beams": stage.selection.num_beams},
            controls=(),
            labeler=stage.evaluation.labeler,
            metrics=[name for name in NLG_METRICS if name in names],
            seed=self.recipe.seed,
            indication=stage.indication,
        )
        if PartialState().is_main_process:
            write_predictions(evaluation, self.folder / "validation" / f"step-{step:06d}.csv")
        found = evaluation.rows["model"].scores
        scores = {name: found[full] for name, full in names.items()}
        return {**scores, "selection": expression(scores)}


class ReportTrainer(StageTrainer):
    """A [`StageTrainer`] whose evaluations generate reports too.

    Args:
        validate: gives the scores of an evaluation at a step; None leaves it at the losses.
    """

    def __init__(self, *args, validate: Callable[[int], dict[str, float]] | None, **kwargs):
        super().__init__(*args, **kwargs)
        self.validate = validate

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.validate is not None:
            with self.compute_loss_context_manager():
                scores = self.validate(self.state.global_step)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output


def _report_lengths(processor: OTDRGProcessor, reports: list[str], stage: ReportRecipe) -> list[int]:
    """Tokens of each report that are learned."""
    ids = processor.tokenizer(list(reports), add_special_tokens=False)["input_ids"]
    return [min(len(row), stage.max_report_tokens) for row in ids]


def evaluate(
    recipe: Recipe, studies: StudySplits, model: OTDRGForReportGeneration, processor: OTDRGProcessor, folder: Path
) -> dict[str, Any]:
    """The controls table of the published model on the recipe's split; predictions go to `folder/predictions.csv`."""
    stage, wanted = recipe.report, recipe.report.evaluation
    rows, training = studies[wanted.split], studies["train"]
    rows = rows.select(range(min(wanted.limit or len(rows), len(rows))))
    rows = cached_where_frozen(model, processor, rows, recipe, stage, model.device)
    if "retrieval" in wanted.controls:
        training = cached_where_frozen(model, processor, training, recipe, stage, model.device)
    evaluation = evaluate_model(
        model,
        processor,
        rows,
        training=training,
        batch_size=stage.eval_batch_size or stage.batch_size,
        generation=asdict(stage.generation),
        controls=wanted.controls,
        labeler=wanted.labeler,
        metrics=wanted.metrics,
        seed=recipe.seed,
        indication=stage.indication,
    )
    write_predictions(evaluation, folder / "predictions.csv")
    logger.info("%s, %d studies:\n%s", wanted.split, len(rows), format_table(evaluation))
    return {"split": wanted.split, **evaluation.scores()}


__all__ = ["VALIDATION_SCORES", "ReportTrainer", "SaveOnEvaluation", "Validation", "check", "evaluate", "run"]
