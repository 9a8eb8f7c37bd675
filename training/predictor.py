"""Stage `predictor`: the label predictor, 14 findings in 4 states, learns from true states (3.4, eq. 10)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..findings_otdrg import FINDING_STATES, FINDINGS, POSITIVE
from ..inference.collation import FindingCollator
from ..metrics.classification import finding_metrics, fit_thresholds, format_metrics
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from .build import StudySplits, attach_lora, cached_where_frozen, known_states, set_trained_parts
from .callbacks import SinkhornLossCallback
from .recipe import Recipe
from .trainer import StageTrainer, training_arguments

logger = logging.getLogger(__name__)

#: Resamples of validation studies behind the intervals of the areas under the curve.
RESAMPLES = 1000


def run(
    recipe: Recipe,
    studies: StudySplits,
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    folder: Path,
    resume: bool,
) -> tuple[OTDRGForReportGeneration, dict[str, Any]]:
    """Train the predictor, and the vision encoder it reads where the recipe says so.

    An encoder of its own takes the report encoder's weights first, which stays as it is.

    Returns:
        The model, LoRA merged and with its thresholds in the configuration where they were fitted, and the stage's
        results: the metrics of [`finding_metrics`] on validation under `validation`, and under
        `validation_default_threshold` without the fit.
    """
    stage = recipe.predictor
    own = model.config.predictor_encoder == "own"
    if own:
        model.finding_vision_tower.load_state_dict(model.vision_tower.state_dict())
    attach_lora(model, recipe, "predictor")
    frozen = set_trained_parts(
        model,
        vision="frozen" if own else stage.vision,
        finding_vision=stage.vision if own else "frozen",
        text="frozen",
        predictor="full",
        joining=False,
    )
    model.finding_logit_adjustment = logit_adjustment(studies["train"]["finding_states"], stage.logit_adjustment)
    train, validation = studies["train"], studies.get("validation")
    if validation is not None:
        validation = known_states(validation)
        validation = validation if len(validation) else None
    args = training_arguments(
        stage,
        folder,
        recipe.seed,
        evaluates=validation is not None,
        report_to=recipe.report_to,
        label_names=["finding_labels"],
    )
    train, validation = (
        cached_where_frozen(model, processor, rows, recipe, stage, args.device) for rows in (train, validation)
    )
    collator = FindingCollator(processor)
    trainer = StageTrainer(
        model,
        args,
        processor=processor,
        loss_callback=SinkhornLossCallback(),
        frozen=frozen,
        vision_learning_rate=stage.vision_learning_rate,
        train_collator=collator,
        eval_collator=collator,
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=lambda prediction: _summary(
            _metrics(model, torch.from_numpy(prediction.predictions), prediction.label_ids)
        ),
    )
    trainer.train_stage(resume)
    results = trainer.summary()
    if validation is not None:
        prediction = trainer.predict(validation, metric_key_prefix="validation")
        logits, labels = torch.from_numpy(prediction.predictions), prediction.label_ids
        model.config.finding_thresholds = None
        if stage.fit_thresholds:
            results["validation_default_threshold"] = _metrics(model, logits, labels)
            probabilities = model.finding_probabilities(logits)[..., POSITIVE].numpy()
            model.config.finding_thresholds = fit_thresholds(probabilities, labels)
            results["thresholds"] = dict(zip(FINDINGS, model.config.finding_thresholds, strict=True))
        results["validation"] = _metrics(model, logits, labels, RESAMPLES, recipe.seed)
        if stage.fit_thresholds:
            # Thresholds and figures come from the same studies: an upper bound, and named so.
            results["validation"]["thresholds_fitted_on"] = "validation"
        logger.info("predictor on validation:\n%s", format_metrics(results["validation"]))
    model = trainer.whole_model()
    model.merge_lora()
    return model, results


def logit_adjustment(states: list[list[int]], tau: float) -> torch.Tensor | None:
    """What is added to the logits while the predictor learns: tau * log prior of each state (Menon et al., 2021).

    The logits themselves, which inference reads, then say how much likelier than usual a state is; at tau 1 the
    likeliest state minimises the error averaged over states.

    Args:
        states: N rows of 14 states, those of training; others than the four are left out.
        tau: 0 adjusts nothing.

    Returns:
        (14, 4), the prior counted with add-one smoothing; None for tau 0.
    """
    if tau == 0:
        return None
    counts = (torch.tensor(states)[:, :, None] == torch.arange(len(FINDING_STATES))).sum(dim=0) + 1
    return tau * (counts / counts.sum(dim=1, keepdim=True)).log()


def _metrics(
    model: OTDRGForReportGeneration, logits: torch.Tensor, labels: np.ndarray, resamples: int = 0, seed: int = 0
) -> dict[str, Any]:
    probabilities = model.finding_probabilities(logits)[..., POSITIVE].numpy()
    return finding_metrics(probabilities, model.predict_states(logits).numpy(), labels, resamples, seed)


def _summary(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: metrics[name] for name in ("macro_auc", "macro_f1_13", "macro_ece") if metrics[name] is not None}


__all__ = ["logit_adjustment", "run"]
