"""Stage `predictor`: the label predictor, 14 findings in 4 states, learns from true states (3.4, eq. 10)."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from transformers.trainer_utils import PredictionOutput

from ..findings_otdrg import FINDING_STATES, FINDINGS, POSITIVE
from ..inference.collation import FindingCollator
from ..metrics.classification import finding_metrics, fit_thresholds, format_metrics
from ..modeling_otdrg import OTDRGForReportGeneration
from .arguments import StageArguments
from .callbacks import LossCallback
from .data import Rows, StudySplits, known_states
from .fields import Bounds, option
from .model import attach_lora, cached_where_frozen, set_trained_parts
from .recipe import Recipe
from .stages import Stage, StageRun
from .trainer import StageTrainer

logger = logging.getLogger(__name__)

#: Bootstrap resamples of validation studies, for the intervals of the areas under the curve.
RESAMPLES = 1000

#: Metrics of every evaluation during training.
_METRICS = ("macro_auc", "macro_f1_13", "macro_ece")


@dataclass
class PredictorArguments(StageArguments):
    """The section `predictor`: `TrainingArguments`, and the fields below.

    If the predictor has an encoder of its own (`model.overrides.predictor_encoder`), `vision` is about that encoder,
    which starts as a copy of the report's.
    """

    place = "predictor"
    after_training = ("fit_thresholds",)
    bounds: ClassVar[dict[str, Bounds]] = {**StageArguments.bounds, "logit_adjustment": {"least": 0}}

    logit_adjustment: float = option(
        0.0,
        "tau of Menon et al. (2021): tau times the log frequency of each state in training is added to the logits "
        "while the predictor learns, so that rare states are not learned to be unlikely.",
    )
    fit_thresholds: bool = option(False, "Fit a threshold for each finding on validation, into the configuration.")


class PredictorStage(Stage):
    """Trains the label predictor, and the vision encoder it reads if the recipe says so."""

    arguments = PredictorArguments
    first_reads = ("focal_gamma", "focal_reduction", "predictor_dropout", "finding_thresholds")
    trains_own_encoder = True

    def score_names(self) -> Collection[str]:
        return _METRICS

    def check_studies(self, recipe: Recipe, studies: StudySplits) -> None:
        validation = studies.get("validation")
        unknown = validation is None or all(states is None for states in validation["finding_states"])
        if recipe.predictor.fit_thresholds and unknown:
            raise ValueError(
                "predictor.fit_thresholds=True: expected a validation split with finding states to fit them on"
            )

    def train(self, run: StageRun) -> tuple[OTDRGForReportGeneration, dict[str, Any]]:
        """Train the predictor, and measure it on validation.

        An encoder of its own starts with the weights of the report's encoder, which does not change.

        Returns:
            The model with LoRA merged, and with fitted thresholds in its configuration if the recipe asks for them; and
            the results, with the metrics of [`finding_metrics`] under `validation`, and without fitted thresholds under
            `validation_default_threshold`.
        """
        validation = run.studies.get("validation")
        # A split without known states is no validation.
        validation = None if validation is None else known_states(validation) or None
        trainer, validation = predictor_trainer(run, validation)
        trainer.train_stage(run.resume)
        results = trainer.summary()
        if validation is not None:
            prediction = trainer.predict(validation, metric_key_prefix="validation")
            results |= fit_and_measure(run, prediction)
            logger.info("predictor on validation:\n%s", format_metrics(results["validation"]))
        model = trainer.whole_model()
        model.merge_lora()
        return model, results


def predictor_trainer(run: StageRun, validation: Rows | None) -> tuple[StageTrainer, Rows | None]:
    """The Trainer of the stage, and the validation studies as it reads them."""
    recipe, section, model = run.recipe, run.recipe.predictor, run.model
    own = model.config.predictor_encoder == "own"
    if own:
        model.finding_vision_tower.load_state_dict(model.vision_tower.state_dict())
    attach_lora(model, recipe, "predictor")
    frozen = set_trained_parts(
        model,
        vision="frozen" if own else section.vision,
        finding_vision=section.vision if own else "frozen",
        text="frozen",
        predictor="full",
        joining=False,
    )
    train = run.studies["train"]
    model.finding_logit_adjustment = logit_adjustment(train["finding_states"], section.logit_adjustment)
    evaluates, labels = validation is not None, ["finding_labels"]
    args = section.prepare(run.folder, recipe.seed, recipe.report_to, evaluates, label_names=labels)
    train, validation = (
        cached_where_frozen(model, run.processor, rows, recipe, "predictor", args.device)
        for rows in (train, validation)
    )
    collator = FindingCollator(run.processor)

    def compute_metrics(prediction: PredictionOutput) -> dict[str, float]:
        metrics = _metrics(model, torch.from_numpy(prediction.predictions), prediction.label_ids)
        return {name: metrics[name] for name in _METRICS if metrics[name] is not None}

    trainer = StageTrainer(
        model,
        args,
        processor=run.processor,
        loss_callback=LossCallback(),
        frozen=frozen,
        train_collator=collator,
        eval_collator=collator,
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=compute_metrics,
    )
    return trainer, validation


def fit_and_measure(run: StageRun, prediction: PredictionOutput) -> dict[str, Any]:
    """Fit the thresholds if the recipe says so, and return the metrics of the predictions on validation."""
    model, fits = run.model, run.recipe.predictor.fit_thresholds
    logits, labels = torch.from_numpy(prediction.predictions), prediction.label_ids
    results: dict[str, Any] = {}
    model.config.finding_thresholds = None
    if fits:
        results["validation_default_threshold"] = _metrics(model, logits, labels)
        probabilities = model.finding_probabilities(logits)[..., POSITIVE].numpy()
        model.config.finding_thresholds = fit_thresholds(probabilities, labels)
        results["thresholds"] = dict(zip(FINDINGS, model.config.finding_thresholds, strict=True))
    results["validation"] = _metrics(model, logits, labels, RESAMPLES, run.recipe.seed)
    if fits:
        # Fitted and measured on the same studies, so these figures are an upper bound.
        results["validation"]["thresholds_fitted_on"] = "validation"
    return results


def logit_adjustment(states: list[list[int]], tau: float) -> torch.Tensor | None:
    """The term added to the logits while the predictor learns: tau * log prior of each state (Menon et al., 2021).

    The logits without it, which inference reads, then say how much likelier than usual a state is. With tau 1 the
    likeliest state minimises the error averaged over states.

    Args:
        states: N rows of 14 states of the training studies; states other than the four are ignored.
        tau: 0 turns the adjustment off.

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


STAGE = PredictorStage()

__all__ = ["STAGE", "PredictorArguments", "PredictorStage", "logit_adjustment"]
