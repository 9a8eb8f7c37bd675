"""Stage `predictor`: the label predictor, 14 findings in 4 states, learns from true states (3.4, eq. 10).

Long, because what is fitted after training is here as well: the words of indications, calibration and thresholds.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers.trainer_utils import PredictionOutput

from ..configuration_otdrg import INDICATION_BUCKETS
from ..findings_otdrg import FINDING_STATES, FINDINGS, NO_FINDING, POSITIVE
from ..inference.collation import FindingCollator, expand_tags
from ..metrics.classification import DEFAULT_THRESHOLD, finding_metrics, fit_thresholds, format_metrics
from ..modeling_otdrg import OTDRGForReportGeneration
from ..vision_otdrg import PATCH_DROPOUT_ENCODERS, encoder_blocks
from .arguments import StageArguments
from .callbacks import LossCallback
from .data import Rows, StudySplits, known_states
from .fields import COUNT, NOT_NEGATIVE, Bounds, need, option
from .model import attach_lora, cached_where_frozen, preset_config, set_trained_parts
from .recipe import Recipe
from .stages import Stage, StageRun
from .trainer import StageTrainer

logger = logging.getLogger(__name__)

#: Bootstrap resamples of validation studies, for the intervals of the areas under the curve.
RESAMPLES = 1000

#: Folds of the training studies for thresholds by cross-validation.
FOLDS = 5
#: Tags of fewer training studies are not learned.
MINIMUM_TAG_STUDIES = 15
#: Words in fewer indications are ignored; the weight of the logits of the others.
MINIMUM_WORD_STUDIES, WORD_WEIGHT = 3, 0.5
#: Threshold of a finding as frequent as the average, and the exponent of its relative frequency. Fixed on IU X-Ray.
RULE_THRESHOLD, RULE_EXPONENT = 0.13, 0.3
#: Thresholds among which cross-validation chooses.
RULE_BASES = tuple(np.arange(0.04, 0.61, 0.02).round(2).tolist())

#: Metrics of every evaluation during training.
_METRICS = ("macro_auc", "macro_f1_13", "macro_ece")


@dataclass
class PredictorArguments(StageArguments):
    """The section `predictor`: `TrainingArguments`, and the fields below.

    If the predictor has an encoder of its own (`model.overrides.predictor_encoder`), `vision` is about that encoder,
    which starts as a copy of the report's.
    """

    place = "predictor"
    after_training = ("calibration", "thresholds")
    bounds: ClassVar[dict[str, Bounds]] = {
        **StageArguments.bounds,
        "logit_adjustment": NOT_NEGATIVE,
        "tag_weight": NOT_NEGATIVE,
        "vision_layers": COUNT,
        "patch_dropout": {"least": 0, "below": 1},
    }
    renamed: ClassVar[dict[str, str]] = {
        **StageArguments.renamed,
        "fit_thresholds": "thresholds (validation in place of true, none in place of false)",
    }

    logit_adjustment: float = option(
        0.0,
        "tau of Menon et al. (2021): tau times the log frequency of each state in training is added to the logits "
        "while the predictor learns, so that rare states are not learned to be unlikely.",
    )
    calibration: Literal["none", "cross_validation"] = option(
        "none",
        "Calibration of the probabilities of positive in the configuration. cross_validation: a slope of the log odds "
        "and an intercept of each finding, fitted on held-out training studies (five more trainings).",
    )
    thresholds: Literal["none", "rule", "cross_validation", "validation"] = option(
        "none",
        "Thresholds of the findings in the configuration. none: the likeliest state is predicted. rule: "
        "0.13 (p / m)^0.3, where p is the finding's mean predicted probability on the training studies and m the mean "
        "of the findings'. cross_validation: the same with the number in place of 0.13 that is best for micro F1 + "
        "macro F1 on held-out training studies (the five trainings of calibration). validation: those with the best "
        "F1 on validation, whose figures are then no measurement.",
    )
    tag_weight: float = option(
        0.0,
        "Weight of an auxiliary target: the studies' tags, of which A/b is also the tag A, as far as "
        f"{MINIMUM_TAG_STUDIES} training studies have them. The finished model does not predict them.",
    )
    vision_layers: int | None = option(
        None, "Last blocks of the vision encoder that vision: full trains, with what follows them; null: all of it."
    )
    patch_dropout: float = option(
        0.0,
        "Share of a view's patches, drawn anew at every step, that a trained vision encoder does not read; its cost "
        "falls by about that share. For DINOv2 and ViT of transformers.",
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("calibration", "thresholds"):
            folds = getattr(self, name) == "cross_validation"
            self.expect(not folds or self.vision == "frozen", name, "another one while predictor.vision is trained")
            schedule = "another one while predictor.lr_scheduler_type follows the metric of an evaluation"
            self.expect(not folds or not self.follows_metric, name, schedule)
        is_full = self.vision_layers is None or self.vision == "full"
        self.expect(is_full, "vision_layers", "null while predictor.vision is not full")
        is_trained = self.patch_dropout == 0 or self.vision != "frozen"
        self.expect(is_trained, "patch_dropout", "0 while predictor.vision is frozen")


class PredictorStage(Stage):
    """Trains the label predictor, and the vision encoder it reads if the recipe says so."""

    arguments = PredictorArguments
    first_reads = (
        *("focal_gamma", "focal_reduction", "predictor_dropout", "predictor_heads", "predictor_pooling"),
        *("predictor_epsilon", "predictor_iterations", "predictor_tags", "finding_thresholds"),
        *("finding_calibration", "indication_reader"),
    )
    trains_own_encoder = True

    def score_names(self) -> Collection[str]:
        return _METRICS

    def check(self, recipe: Recipe) -> None:
        section = recipe.predictor
        for name, field in (("thresholds", "finding_thresholds"), ("calibration", "finding_calibration")):
            given = recipe.model.overrides.get(field) is not None
            section.expect(not given or getattr(section, name) == "none", name, f"none beside model.overrides.{field}")

    def check_studies(self, recipe: Recipe, studies: StudySplits) -> None:
        validation = studies.get("validation")
        unknown = validation is None or all(states is None for states in validation["finding_states"])
        if recipe.predictor.thresholds == "validation" and unknown:
            raise ValueError("predictor.thresholds='validation': expected a validation split with finding states")
        if recipe.predictor.tag_weight and not tag_names(studies["train"]):
            raise ValueError(
                f"predictor.tag_weight={recipe.predictor.tag_weight}: expected studies with tags, of which one has at "
                f"least {MINIMUM_TAG_STUDIES} training studies"
            )

    def check_model(self, recipe: Recipe, model: OTDRGForReportGeneration) -> None:
        section, tower = recipe.predictor, model.vision_towers[-1]
        if section.vision_layers is not None:
            blocks = len(encoder_blocks(tower))
            expected = f"1 to {blocks}" if blocks else "null, this encoder is not a sequence of blocks"
            need(section.vision_layers <= blocks, "predictor.vision_layers", section.vision_layers, expected)
        if section.patch_dropout:
            has_patches = tower.config.model_type in PATCH_DROPOUT_ENCODERS
            expected = f"0, or one of the encoders {', '.join(PATCH_DROPOUT_ENCODERS)} of transformers"
            need(has_patches, "predictor.patch_dropout", section.patch_dropout, expected)

    def train(self, run: StageRun) -> tuple[OTDRGForReportGeneration, dict[str, Any]]:
        """Train the predictor, and measure it on validation.

        An encoder of its own starts with the weights of the report's encoder, which does not change.

        Returns:
            The model with LoRA merged, and with the calibration and the thresholds in its configuration that the
            recipe asks for; and the results, with the metrics of [`finding_metrics`] under `validation`, without
            thresholds under `validation_default_threshold`, and without calibration under `validation_uncalibrated`.
        """
        validation = run.studies.get("validation")
        # A split without known states is no validation.
        validation = None if validation is None else known_states(validation) or None
        trainer, train, validation = predictor_trainer(run, validation)
        initial = {name: weight.clone() for name, weight in run.model.finding_predictor.state_dict().items()}
        trainer.train_stage(run.resume)
        fit_words(run, train)
        results = trainer.summary()
        prediction = None if validation is None else trainer.predict(validation, metric_key_prefix="validation")
        results |= decide(run, trainer, train, prediction, initial)
        if validation is not None:
            logger.info("predictor on validation:\n%s", format_metrics(results["validation"]))
        model = trainer.whole_model()
        model.merge_lora()
        model.set_tags(None)
        return model, results


def predictor_trainer(run: StageRun, validation: Rows | None) -> tuple[StageTrainer, Rows, Rows | None]:
    """The Trainer of the stage, and the training and validation studies as it reads them."""
    recipe, section, model = run.recipe, run.recipe.predictor, run.model
    own = model.config.predictor_encoder == "own"
    if own:
        model.finding_vision_tower.load_state_dict(model.vision_tower.state_dict())
    attach_lora(model, recipe, "predictor")
    train = run.studies["train"]
    if section.tag_weight:
        model.set_tags(tag_names(train))
        model.tag_weight = section.tag_weight
    frozen = set_trained_parts(
        model,
        vision="frozen" if own else section.vision,
        finding_vision=section.vision if own else "frozen",
        text="frozen",
        predictor="full",
        joining=False,
        vision_layers=section.vision_layers,
    )
    model.patch_dropout = section.patch_dropout
    model.finding_logit_adjustment = logit_adjustment(train["finding_states"], section.logit_adjustment)
    evaluates = validation is not None
    device = section.prepare(run.folder, recipe.seed, recipe.report_to, evaluates).device
    train, validation = (
        cached_where_frozen(model, run.processor, rows, recipe, "predictor", device) for rows in (train, validation)
    )
    return stage_trainer(run, train, validation, frozen), train, validation


def stage_trainer(
    run: StageRun, train: Rows, validation: Rows | None, frozen: list[nn.Module], folder: str | None = None
) -> StageTrainer:
    """A Trainer of the stage on these studies, or of a fold, which writes to `folder` and reports to no tracker."""
    recipe, section, model = run.recipe, run.recipe.predictor, run.model
    evaluates = validation is not None
    fixed: dict[str, Any] = {"label_names": ["finding_labels"]}
    if folder is not None:
        fixed |= {"output_dir": folder, "save_strategy": "no"}
    args = section.prepare(run.folder, recipe.seed, recipe.report_to, evaluates, **fixed)
    if folder is not None:
        args.report_to = []

    def compute_metrics(prediction: PredictionOutput) -> dict[str, float]:
        metrics = _metrics(model, prediction.predictions, prediction.label_ids)
        return {name: metrics[name] for name in _METRICS if metrics[name] is not None}

    return StageTrainer(
        model,
        args,
        processor=run.processor,
        loss_callback=LossCallback(),
        frozen=frozen,
        train_collator=FindingCollator(run.processor, model.config.predictor_tags, indication=False),
        eval_collator=FindingCollator(run.processor),
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=compute_metrics,
    )


# --- calibration and thresholds --------------------------------------------------------------------------------------


def decide(
    run: StageRun,
    trainer: StageTrainer,
    train: Rows,
    validation: PredictionOutput | None,
    initial: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """Put the calibration and the thresholds that the recipe asks for into the configuration; it keeps given ones.

    Args:
        run, trainer, train: the stage, its trained Trainer and its training studies.
        validation: the predictions on validation.
        initial: the predictor's weights before training, for cross-validation.

    Returns:
        The thresholds, and the metrics on validation after each of the two steps.
    """
    config, section = run.model.config, run.recipe.predictor
    given = preset_config(run.recipe.model)
    config.finding_calibration, config.finding_thresholds = given.finding_calibration, given.finding_thresholds
    results: dict[str, Any] = {}

    def measure(name: str, resamples: int = 0) -> None:
        if validation is not None:
            results[name] = _metrics(
                run.model, validation.predictions, validation.label_ids, resamples, run.recipe.seed
            )

    held_out = None
    if "cross_validation" in (section.calibration, section.thresholds):
        held_out = out_of_fold(run, trainer, train, initial)
    thresholds = find_thresholds(run, trainer, train, validation, held_out)
    if section.calibration == "cross_validation":
        measure("validation_uncalibrated")
        pairs = fit_calibration(_positive(run.model, held_out[0]), held_out[1])
        config.finding_calibration = pairs
        if thresholds is not None:
            # They decide as without calibration. Fitted on calibrated probabilities, the rule scores lower on
            # validation studies of IU X-Ray, and slightly higher on held-out training studies.
            slopes, intercepts = np.array(pairs).T
            thresholds = expit(slopes * logit(np.array(thresholds)) + intercepts).tolist()
    if thresholds is not None:
        results["thresholds"] = dict(zip(FINDINGS, thresholds, strict=True))
        measure("validation_default_threshold")
        config.finding_thresholds = thresholds
    measure("validation", RESAMPLES)
    if validation is not None and section.thresholds == "validation":
        # Fitted and measured on the same studies, so these figures are an upper bound.
        results["validation"]["thresholds_fitted_on"] = "validation"
    return results


def fit_calibration(probabilities: np.ndarray, labels: np.ndarray) -> list[list[float]]:
    """Slope and intercept of each finding's log odds of "positive", by logistic regression (Platt, 1999).

    All findings share the slope, so that calibration changes no area under a curve: slopes of rare findings would be
    noise, and could be negative.

    Args:
        probabilities: (N, 14) of the state positive on studies that were not learned from.
        labels: (N, 14) true state ids; -100 is left out.

    Returns:
        14 pairs of which the slope is above 0; (1, 0), which changes nothing, if no such slope fits.
    """
    known = labels != -100
    true = labels[known] == POSITIVE
    if not true.any() or true.all():
        return [[1.0, 0.0] for _ in FINDINGS]
    odds = logit(probabilities.astype(np.float64).clip(1e-7, 1 - 1e-7))
    inputs = np.column_stack((odds[known], np.eye(len(FINDINGS))[np.nonzero(known)[1]]))
    # The weak penalty keeps the intercept of a finding without positives finite.
    slope, *intercepts = LogisticRegression(C=100, fit_intercept=False, max_iter=1000).fit(inputs, true).coef_[0]
    return [[float(slope), float(intercept)] if slope > 0 else [1.0, 0.0] for intercept in intercepts]


def find_thresholds(
    run: StageRun,
    trainer: StageTrainer,
    train: Rows,
    validation: PredictionOutput | None,
    held_out: tuple[np.ndarray, np.ndarray] | None,
) -> list[float] | None:
    """The 14 thresholds of uncalibrated probabilities that the recipe asks for.

    Args:
        run, trainer, train, validation: as in [`decide`].
        held_out: the result of [`out_of_fold`], for cross-validation.
    """
    model, kind = run.model, run.recipe.predictor.thresholds
    if kind == "none":
        return None
    if kind == "cross_validation":
        return fit_rule(_positive(model, held_out[0]), held_out[1])
    if kind == "validation":
        return fit_thresholds(_positive(model, validation.predictions), validation.label_ids)
    prediction = trainer.predict(train, metric_key_prefix="train")
    return rule_thresholds(_positive(model, prediction.predictions))


def rule_thresholds(probabilities: np.ndarray, base: float = RULE_THRESHOLD) -> list[float]:
    """Thresholds base * (p / m)^0.3: higher for more frequent findings, though much less than in proportion.

    Args:
        probabilities: (N, 14) of the state positive on training studies.
        base: the threshold of a finding as frequent as the average.

    Returns:
        14 thresholds; p is the mean of a finding and m that of the 13 findings. That of "no finding" is 0.5.
    """
    means = probabilities.mean(axis=0)
    thresholds = base * (means / means[:NO_FINDING].mean()) ** RULE_EXPONENT
    thresholds[NO_FINDING] = DEFAULT_THRESHOLD
    return np.minimum(thresholds, 1.0).tolist()


def fit_rule(probabilities: np.ndarray, labels: np.ndarray) -> list[float]:
    """[`rule_thresholds`] with the base that is best for micro F1 + macro F1 of the 13 findings.

    One number is fitted and not 13: thresholds of rare findings, fitted one by one, do not carry over to other studies.

    Args:
        probabilities: (N, 14) of the state positive on studies that were not learned from.
        labels: (N, 14) true state ids; -100 is left out.
    """
    true, known = labels[:, :NO_FINDING] == POSITIVE, labels[:, :NO_FINDING] != -100

    def f1(base: float) -> float:
        thresholds = rule_thresholds(probabilities, base)[:NO_FINDING]
        said = (probabilities[:, :NO_FINDING] >= thresholds) & known
        hits, total = (said & true).sum(axis=0), said.sum(axis=0) + true.sum(axis=0)
        return 2 * hits.sum() / max(total.sum(), 1) + np.mean(2 * hits / np.maximum(total, 1))

    return rule_thresholds(probabilities, max(RULE_BASES, key=f1))


def out_of_fold(
    run: StageRun, trainer: StageTrainer, train: Rows, initial: dict[str, torch.Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, 14, 4) and true states (N, 14) of the training studies, each by a predictor that did not learn from
    it. The model is left as it was."""
    predictor = run.model.finding_predictor
    trained = {name: weight.clone() for name, weight in predictor.state_dict().items()}
    order = np.random.default_rng(run.recipe.seed).permutation(len(train))
    logits, labels = [], []
    for fold in range(FOLDS):
        held_out = order[fold::FOLDS]
        predictor.load_state_dict(initial)
        with tempfile.TemporaryDirectory() as folder:
            others = train.select(np.setdiff1d(order, held_out))
            of_fold = stage_trainer(run, others, None, trainer.frozen, folder)
            of_fold.train()
            fit_words(run, others)
            prediction = of_fold.predict(train.select(held_out), metric_key_prefix="fold")
        logits.append(prediction.predictions)
        labels.append(prediction.label_ids)
    predictor.load_state_dict(trained)
    return np.concatenate(logits), np.concatenate(labels)


# --- what is learned -------------------------------------------------------------------------------------------------


def tag_names(studies: Rows) -> list[str]:
    """The tags that at least `MINIMUM_TAG_STUDIES` studies have, the most frequent first."""
    if "tags" not in studies.column_names:
        return []
    counts = Counter(tag for tags in studies["tags"] for tag in expand_tags(tags))
    return [
        tag
        for tag, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if count >= MINIMUM_TAG_STUDIES
    ]


def fit_words(run: StageRun, train: Rows) -> None:
    """Fit the logits of the indications' words by logistic regression, if the predictor reads indications.

    By itself and not by gradient steps together with the heads: hundreds of words in few studies each need a penalty of
    their own. The logits count half, because views and words hold in part the same information.
    """
    model, processor = run.model, run.processor
    if model.config.indication_reader == "report":
        return
    texts = [(text or "").strip() for text in train["indication"]]
    buckets = processor.encode_indications(texts).get("indication_ids")
    weights = torch.zeros(INDICATION_BUCKETS, len(FINDINGS), len(FINDING_STATES))
    if buckets is not None:
        rows, places = (buckets >= 0).nonzero(as_tuple=True)
        columns = buckets[rows, places]
        frequent = torch.bincount(columns, minlength=INDICATION_BUCKETS) >= MINIMUM_WORD_STUDIES
        values = (buckets >= 0).sum(dim=1)[rows].double().rsqrt() * frequent[columns]
        words = csr_matrix((values.numpy(), (rows.numpy(), columns.numpy())), (len(texts), INDICATION_BUCKETS))
        states = np.array(train["finding_states"])
        for finding in range(len(FINDINGS)):
            classes = np.unique(states[:, finding])
            if len(classes) < 2:
                continue
            fitted = LogisticRegression(C=1.0, max_iter=200).fit(words, states[:, finding]).coef_
            fitted = np.concatenate((-fitted, fitted)) / 2 if len(classes) == 2 else fitted
            weights[:, finding, classes] = WORD_WEIGHT * torch.from_numpy(fitted.T).float()
    with torch.no_grad():
        model.finding_predictor.words.weight.copy_(weights.flatten(1))


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


def _positive(model: OTDRGForReportGeneration, logits: np.ndarray) -> np.ndarray:
    """Probabilities (N, 14) of the state positive."""
    return model.finding_probabilities(torch.from_numpy(logits))[..., POSITIVE].numpy()


def _metrics(
    model: OTDRGForReportGeneration, logits: np.ndarray, labels: np.ndarray, resamples: int = 0, seed: int = 0
) -> dict[str, Any]:
    states = model.predict_states(torch.from_numpy(logits)).numpy()
    return finding_metrics(_positive(model, logits), states, labels, resamples, seed)


STAGE = PredictorStage()

__all__ = [
    "STAGE",
    "PredictorArguments",
    "PredictorStage",
    "fit_calibration",
    "fit_rule",
    "logit_adjustment",
    "rule_thresholds",
    "tag_names",
]
