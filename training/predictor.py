"""Stage `predictor`: the label predictor, 14 findings in 4 states, learns from true states (3.4, eq. 10)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from ..findings_otdrg import FINDINGS, POSITIVE
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from .build import StudySplits, known_states, set_trained_parts
from .callbacks import SinkhornLossCallback
from .collation import FindingCollator
from .recipe import Recipe
from .streaming import StreamedStudies
from .trainer import StageTrainer, training_arguments

logger = logging.getLogger(__name__)

#: Fewer validation positives than this say too little about where a threshold belongs.
MINIMUM_POSITIVES = 5
#: The threshold of a finding with fewer.
DEFAULT_THRESHOLD = 0.5

_NO_FINDING = FINDINGS.index("no_finding")


def run(
    recipe: Recipe,
    studies: StudySplits,
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    folder: Path,
    resume: bool,
) -> tuple[OTDRGForReportGeneration, dict[str, Any]]:
    """Train the predictor, and the vision encoder where the recipe says so.

    Returns:
        The model, with its thresholds in the configuration where they were fitted, and the stage's results: the metrics
        of [`finding_metrics`] on validation under `validation`, and `validation_default_threshold` without the fit.
    """
    stage = recipe.predictor
    frozen = set_trained_parts(model, vision=stage.vision, text="frozen", predictor="full", joining=False)
    train, validation = studies["train"], studies.get("validation")
    if validation is not None:
        validation = known_states(validation)
        validation = validation if len(validation) else None
    args = training_arguments(
        stage, folder, recipe.seed, evaluates=validation is not None, label_names=["finding_labels"]
    )
    if stage.vision == "frozen" and stage.cache_features:
        model.to(args.device)
        train = CachedFeatures(model, processor, train, args.per_device_eval_batch_size)
        if validation is not None:
            validation = CachedFeatures(model, processor, validation, args.per_device_eval_batch_size)
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
        results["validation"] = _metrics(model, logits, labels)
        if stage.fit_thresholds:
            probabilities = model.finding_probabilities(logits)[..., POSITIVE].numpy()
            model.config.finding_thresholds = fit_thresholds(probabilities, labels)
            results["validation_default_threshold"] = results["validation"]
            # Thresholds and figures come from the same studies: an upper bound, and named so.
            results["validation"] = {**_metrics(model, logits, labels), "thresholds_fitted_on": "validation"}
            results["thresholds"] = dict(zip(FINDINGS, model.config.finding_thresholds, strict=True))
        logger.info("predictor on validation:\n%s", format_metrics(results["validation"]))
    elif stage.fit_thresholds:
        raise ValueError(
            "predictor.fit_thresholds=True: expected a validation split with finding states to fit them on"
        )
    return trainer.whole_model(), results


class CachedFeatures(torch.utils.data.Dataset):
    """Studies of which a frozen encoder's view features are kept in memory instead of the images.

    Rows have `view_features` (V, image_tokens, D) in the encoder's type, and `finding_states`.
    """

    def __init__(
        self,
        model: OTDRGForReportGeneration,
        processor: OTDRGProcessor,
        studies: Dataset | StreamedStudies,
        batch_size: int,
    ):
        # Together with the features: the order of streamed studies is not that of their columns.
        self.states: list[list[int]] = []
        self.features: list[torch.Tensor] = []
        model.eval()
        logger.info("encoding the views of %d studies once", len(studies))
        for batch in DataLoader(studies, batch_size=batch_size, collate_fn=FindingCollator(processor)):
            self.states += batch["finding_labels"].tolist()
            view_mask = batch["view_mask"]
            with torch.no_grad():
                encoded = model.encode_views(batch["pixel_values"].to(model.device), view_mask.to(model.device)).cpu()
            self.features += [views[mask] for views, mask in zip(encoded, view_mask, strict=True)]

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {"view_features": self.features[position], "finding_states": self.states[position]}


# --- metrics ---------------------------------------------------------------------------------------------------------


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the ROC curve by ranks, ties counted half; None where there are no positives or no negatives.

    Args:
        scores: (N,), higher for more likely positive.
        positive: (N,) of bool.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return None
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    ranks = (last - (sizes - 1) / 2)[group]
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def finding_metrics(probabilities: np.ndarray, predicted: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """How well "positive" is told from the other three states.

    Args:
        probabilities: (N, 14) of the state positive.
        predicted: (N, 14) state ids.
        labels: (N, 14) true state ids; -100 is left out.

    Returns:
        `macro_auc` over the findings with positives and others (`auc_findings`, their number), `macro_f1_13`, the mean
        F1 without "no finding", 0 for findings that have no positives or none predicted (of the 13,
        `f1_findings_with_positives` have any), and under `findings` each one's positives, auc, precision, recall, f1.
    """
    findings = {}
    for position, name in enumerate(FINDINGS):
        known = labels[:, position] != -100
        true = labels[known, position] == POSITIVE
        said = predicted[known, position] == POSITIVE
        hits = int((true & said).sum())
        precision, recall = hits / max(int(said.sum()), 1), hits / max(int(true.sum()), 1)
        findings[name] = {
            "studies": int(known.sum()),
            "positives": int(true.sum()),
            "auc": area_under_curve(probabilities[known, position], true),
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        }
    areas = [row["auc"] for row in findings.values() if row["auc"] is not None]
    thirteen = [row for name, row in findings.items() if name != FINDINGS[_NO_FINDING]]
    return {
        "macro_auc": float(np.mean(areas)) if areas else None,
        "auc_findings": len(areas),
        "macro_f1_13": float(np.mean([row["f1"] for row in thirteen])),
        "f1_findings_with_positives": sum(row["positives"] > 0 for row in thirteen),
        "findings": findings,
    }


def fit_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> list[float]:
    """The threshold of each finding with the best F1, `DEFAULT_THRESHOLD` for those with fewer positives than
    `MINIMUM_POSITIVES`.

    Args:
        probabilities: (N, 14) of the state positive.
        labels: (N, 14) true state ids; -100 is left out.

    Returns:
        14 thresholds: a finding is positive where its probability is at least that. Each lies halfway between two
        observed probabilities.
    """
    thresholds = []
    for position in range(len(FINDINGS)):
        known = labels[:, position] != -100
        scores, true = probabilities[known, position].astype(np.float64), labels[known, position] == POSITIVE
        if true.sum() < MINIMUM_POSITIVES:
            thresholds.append(DEFAULT_THRESHOLD)
            continue
        order = np.argsort(-scores, kind="stable")
        scores, hits = scores[order], np.cumsum(true[order])
        f1 = 2 * hits / (np.arange(1, len(scores) + 1) + true.sum())
        # Only between two different probabilities is there room for a threshold.
        cuts = np.append(scores[:-1] > scores[1:], True)
        best = int(np.argmax(np.where(cuts, f1, -1.0)))
        below = scores[best + 1] if best + 1 < len(scores) else 0.0
        thresholds.append(float((scores[best] + below) / 2))
    return thresholds


def format_metrics(metrics: dict[str, Any]) -> str:
    """[`finding_metrics`]' result as a Markdown table."""
    lines = ["| finding | positives | AUC | precision | recall | F1 |", "|---|---|---|---|---|---|"]
    for name, row in metrics["findings"].items():
        area = "–" if row["auc"] is None else f"{row['auc']:.3f}"
        rates = " | ".join(f"{row[key]:.3f}" for key in ("precision", "recall", "f1"))
        lines.append(f"| {name} | {row['positives']} | {area} | {rates} |")
    area = "–" if metrics["macro_auc"] is None else f"{metrics['macro_auc']:.3f}"
    lines.append(
        f"macro AUC {area} over {metrics['auc_findings']} findings; "
        f"macro F1 without no_finding {metrics['macro_f1_13']:.3f}"
    )
    return "\n".join(lines)


def _metrics(model: OTDRGForReportGeneration, logits: torch.Tensor, labels: np.ndarray) -> dict[str, Any]:
    probabilities = model.finding_probabilities(logits)[..., POSITIVE]
    return finding_metrics(probabilities.numpy(), model.predict_states(logits).numpy(), labels)


def _summary(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: metrics[name] for name in ("macro_auc", "macro_f1_13") if metrics[name] is not None}


__all__ = ["CachedFeatures", "area_under_curve", "finding_metrics", "fit_thresholds", "format_metrics", "run"]
