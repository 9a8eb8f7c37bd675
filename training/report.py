"""Stage `report`: feature integration by optimal transport and fine-tuning of the LLM (3.3, 3.5, eqs. 11 and 12)."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from .build import StudySplits, lora_fields, set_trained_parts
from .callbacks import SinkhornLossCallback
from .collation import ReportCollator
from .evaluation import evaluate_model, format_table, write_predictions
from .recipe import Recipe
from .trainer import StageTrainer, training_arguments

logger = logging.getLogger(__name__)


def run(
    recipe: Recipe,
    studies: StudySplits,
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    folder: Path,
    resume: bool,
) -> tuple[OTDRGForReportGeneration, dict[str, Any]]:
    """Train what joins the backbones, and the LLM as the recipe says, on reports and true states.

    Evaluation during training is teacher-forced and conditions on predicted states, as generation does.

    Returns:
        The model, LoRA merged and all of it in the recipe's type, as it is published; and the stage's results.
    """
    stage = recipe.report
    if stage.text == "lora":
        model.config.lora = lora_fields(recipe.model)
        model.add_lora()
    frozen = set_trained_parts(model, vision=stage.vision, text=stage.text, predictor=stage.predictor, joining=True)
    validation = studies.get("validation")
    args = training_arguments(
        stage,
        folder,
        recipe.seed,
        evaluates=validation is not None,
        label_names=["labels"],
        prediction_loss_only=True,
    )
    sinkhorn = SinkhornLossCallback(
        ot_weight_warmup=stage.ot_weight_warmup,
        ot_epsilon_start=stage.ot_epsilon_start,
        ot_epsilon_annealing=stage.ot_epsilon_annealing,
    )
    trainer = StageTrainer(
        model,
        args,
        processor=processor,
        loss_callback=sinkhorn,
        frozen=frozen,
        vision_learning_rate=stage.vision_learning_rate,
        train_collator=ReportCollator(
            processor, True, stage.max_report_tokens, supervise_predictor=stage.predictor == "full"
        ),
        eval_collator=ReportCollator(processor, False, stage.max_report_tokens),
        train_dataset=studies["train"],
        eval_dataset=validation,
    )
    trainer.train_stage(resume)
    results = trainer.summary()
    model = trainer.whole_model()
    model.merge_lora()
    # One type throughout, because from_pretrained gives one: what is scored is what will be loaded.
    model.to(args.device, getattr(torch, recipe.model.dtype)).eval()
    model.generation_config.update(**asdict(stage.generation))
    return model, results


def evaluate(
    recipe: Recipe, studies: StudySplits, model: OTDRGForReportGeneration, processor: OTDRGProcessor, folder: Path
) -> dict[str, Any]:
    """The controls table of the published model on the recipe's split; predictions go to `folder/predictions.csv`.

    Raises:
        ValueError: the split is not among the studies.
    """
    wanted = recipe.report.evaluation
    if wanted.split not in studies:
        raise ValueError(
            f"report.evaluation.split={wanted.split!r}: the studies have {', '.join(studies)}; or none, for no table"
        )
    rows = studies[wanted.split]
    rows = rows.select(range(min(wanted.limit or len(rows), len(rows))))
    evaluation = evaluate_model(
        model,
        processor,
        rows,
        training_reports=studies["train"]["report"],
        batch_size=recipe.report.eval_batch_size or recipe.report.batch_size,
        generation=asdict(recipe.report.generation),
        controls=wanted.controls,
        labeler=wanted.labeler,
        metrics=wanted.metrics,
        seed=recipe.seed,
    )
    write_predictions(evaluation, folder / "predictions.csv")
    logger.info("%s, %d studies:\n%s", wanted.split, len(rows), format_table(evaluation))
    return {"split": wanted.split, **evaluation.scores()}


__all__ = ["evaluate", "run"]
