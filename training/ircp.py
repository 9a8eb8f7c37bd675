"""Stage `ircp`: contrastive pre-training of the vision encoder (3.2.2, eq. 2)."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import save_file
from torch import nn

from ..evaluation.probe import ViewFeatures, alignment, encode_studies, linear_probe, uniformity
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from ..studies.streaming import StreamedStudies
from .build import StudySplits, attach_lora, known_states, set_trained_parts
from .callbacks import LossCallback
from .collation import ContrastiveCollator
from .contrastive import gather, gather_groups, global_mean, info_nce
from .recipe import IRCPRecipe, Recipe
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
    """Train the vision encoder so that the views of a study are told from those of others.

    Returns:
        The model with its new encoder, LoRA merged and the projection heads left behind; and the stage's results, with
        the figures of [`measure`] under `before` and `after` where there are validation studies with finding states.
    """
    stage = recipe.ircp
    train, validation = studies["train"], studies.get("validation")
    if len(train) < 2:
        raise ValueError("stage ircp needs at least 2 training studies: the negatives of one are the others")
    attach_lora(model, recipe, "ircp")
    frozen = set_trained_parts(model, vision=stage.vision, text="frozen", predictor="frozen", joining=False)
    pretraining = ContrastivePretraining(model, stage)
    args = training_arguments(
        stage,
        folder,
        recipe.seed,
        evaluates=validation is not None,
        report_to=recipe.report_to,
        label_names=[],
        prediction_loss_only=True,
    )
    pretraining.to(args.device)
    collator = ContrastiveCollator(processor, stage.max_report_tokens if stage.report_weight > 0 else None)
    trainer = ContrastiveTrainer(
        pretraining,
        args,
        processor=processor,
        loss_callback=LossCallback(),
        frozen=frozen,
        vision_learning_rate=stage.vision_learning_rate,
        train_collator=collator,
        eval_collator=collator,
        train_dataset=train,
        eval_dataset=validation,
    )
    measured = known_states(validation) if validation is not None else []
    measures = stage.probe_studies > 0 and len(measured) > 0
    before = measure(pretraining, processor, train, measured, args.per_device_eval_batch_size) if measures else None
    trainer.train_stage(resume)
    pretraining = trainer.whole_model().to(args.device)
    results = trainer.summary()
    if measures:
        after = measure(pretraining, processor, train, measured, args.per_device_eval_batch_size)
        results |= {"before": before, "after": after}
        logger.info("ircp on validation:\n%s", format_measures(before, after))
    pretraining.model.merge_lora()
    return pretraining.model, results


class ContrastivePretraining(nn.Module):
    """A model with the projection heads that its encoder is pre-trained through, and that are not published.

    The anchor of a view is its encoder's features, averaged over the image and, with `noise="normalized"`, scaled to
    length 1; its positive is that plus Gaussian noise. Both go through the head, and there they are compared. (Behind
    the head, on features of length 1, noise would say nothing: how far it moves a point is the same wherever it lies.)

    Args:
        model: trained are its vision encoder, as set by `set_trained_parts`, and the heads.
        stage: the recipe's section.
    """

    accepts_loss_kwargs = False

    def __init__(self, model: OTDRGForReportGeneration, stage: IRCPRecipe):
        super().__init__()
        self.model = model
        self.config = model.config
        self.stage = stage
        self.image_head = projection_head(model.image_projector.linear.in_features, stage.projection_size)
        if stage.report_weight > 0:
            hidden_size = model.config.text_config.get_text_config().hidden_size
            self.report_head = projection_head(hidden_size, stage.projection_size)

    def forward(
        self,
        pixel_values: torch.Tensor,
        view_mask: torch.Tensor,
        study_keys: torch.Tensor,
        report_ids: torch.Tensor | None = None,
        report_mask: torch.Tensor | None = None,
        report_keys: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Losses and figures of a batch; negatives are the views of other studies in the batches of all processes.

        Args:
            pixel_values (B, V, C, H, W), view_mask (B, V), study_keys, report_ids, report_mask, report_keys: as
                [`ContrastiveCollator`] makes them.

        Returns:
            `loss`, its parts `contrastive_loss` (eq. 2) and `report_contrastive_loss`, and `alignment` and
            `uniformity` of the batch. The mean of a loss over processes is that of the joined batch, and so is its
            gradient.
        """
        features = self.encode(pixel_values, view_mask)
        study = view_mask.nonzero()[:, 0]
        groups = study_keys[study]
        anchors, positives = self.project(features)
        keys, key_groups = gather(anchors, groups)
        compared = (self.stage.temperature, self.stage.similarity)
        losses = info_nce(anchors, positives, groups, keys, key_groups, *compared)
        outputs = {"contrastive_loss": global_mean(losses, len(keys))}
        outputs["loss"] = outputs["contrastive_loss"]
        if report_ids is not None:
            reports = self.embed_reports(report_ids, report_mask)
            own, wording = reports[study], report_keys[study]
            # Both directions; reports of one wording are no negatives of each other, nor are their views.
            to_reports = info_nce(anchors, own, wording, *gather(reports, report_keys), *compared)
            to_views = info_nce(own, anchors, wording, keys, gather_groups(wording), *compared)
            outputs["report_contrastive_loss"] = global_mean((to_reports + to_views) / 2, len(keys))
            outputs["loss"] = outputs["loss"] + self.stage.report_weight * outputs["report_contrastive_loss"]
        with torch.no_grad():
            outputs["alignment"] = alignment(anchors, positives)
            spread = uniformity(anchors, groups, keys, key_groups)
            if spread is not None:
                outputs["uniformity"] = spread
        return outputs

    def encode(self, pixel_values: torch.Tensor, view_mask: torch.Tensor) -> torch.Tensor:
        """The encoder's features of all views (A, D) of a batch, averaged over the image; study by study."""
        return self.model.encode_views(pixel_values, view_mask, reader="report")[view_mask].mean(dim=1)

    def project(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Anchors and their positives, (A, projection_size) each, of the encoder's features (A, D)."""
        if self.stage.noise == "normalized":
            features = F.normalize(features.float(), dim=-1)
        if self.training:
            noise = torch.randn_like(features)
        else:
            # Always the same, so that evaluations can be compared.
            noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(0)).to(features)
        return self.image_head(features), self.image_head(features + self.stage.sigma * noise)

    def embed_reports(self, report_ids: torch.Tensor, report_mask: torch.Tensor) -> torch.Tensor:
        """Reports (B, projection_size): the LLM's frozen embeddings of their tokens, averaged, scaled and projected."""
        with torch.no_grad():
            embeddings = self.model.get_input_embeddings()(report_ids).float() * report_mask[:, :, None]
            average = embeddings.sum(dim=1) / report_mask.sum(dim=1, keepdim=True).clamp(min=1)
            # Embeddings are short and their averages shorter: the head would see little but its own biases.
            average = F.layer_norm(average, average.shape[-1:], eps=1e-8)
        return self.report_head(average)

    def save_pretrained(self, folder: str | os.PathLike, state_dict: dict | None = None, **kwargs) -> None:
        """Write what is trained, encoder and heads, by the names it has here; the rest is where the stage began."""
        weights = self.state_dict() if state_dict is None else state_dict
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(
            {name: weights[name].contiguous() for name in self.trained_names()},
            Path(folder) / "model.safetensors",
            metadata={"format": "pt"},
        )

    def trained_names(self) -> list[str]:
        """Names in the state dictionary of encoder and heads, their buffers included."""
        prefixes = ("model.vision_tower.", "image_head.", "report_head.")
        return [name for name in self.state_dict() if name.startswith(prefixes)]


class ContrastiveTrainer(StageTrainer):
    """A [`StageTrainer`] whose checkpoints hold what is trained, all of it and nothing else."""

    def _issue_warnings_after_load(self, load_result) -> None:
        missing = set(self.model.trained_names()) & set(load_result.missing_keys)
        if missing or load_result.unexpected_keys:
            names = sorted({*missing, *load_result.unexpected_keys})
            raise ValueError(
                f"a checkpoint of {self.args.output_dir} does not fit the recipe, {len(names)} weights such as "
                f"{names[0]}: --overwrite starts the stage anew"
            )


def projection_head(in_features: int, out_features: int) -> nn.Sequential:
    """Two layers, as wide inside as what comes in."""
    return nn.Sequential(nn.Linear(in_features, in_features), nn.GELU(), nn.Linear(in_features, out_features))


# --- before and after ------------------------------------------------------------------------------------------------


def measure(
    pretraining: ContrastivePretraining,
    processor: OTDRGProcessor,
    train: Dataset | StreamedStudies,
    validation: Dataset,
    batch_size: int,
) -> dict[str, Any]:
    """How well the encoder's features of validation views are spread, and what a linear probe reads out of them.

    Args:
        train, validation: studies whose finding states are known, of which the first `probe_studies` are taken.

    Returns:
        `alignment` and `uniformity` of projected features (what the loss sees), `encoder_uniformity` of the encoder's,
        and [`linear_probe`]'s result under `probe`.
    """
    training = pretraining.training
    pretraining.eval()
    device = next(pretraining.parameters()).device

    def encoded(studies) -> ViewFeatures:
        with torch.autocast(device.type, torch.bfloat16, enabled=pretraining.stage.bf16):
            return encode_studies(pretraining.model, processor, studies, pretraining.stage.probe_studies, batch_size)

    known, unseen = encoded(train), encoded(validation)
    with torch.no_grad():
        anchors, positives = (part.float().cpu() for part in pretraining.project(unseen.views.to(device)))
    pretraining.train(training)
    spreads = [uniformity(features, unseen.study, features, unseen.study) for features in (anchors, unseen.views)]
    return {
        "studies": len(unseen.states),
        "views": len(unseen.views),
        "alignment": float(alignment(anchors, positives)),
        **{
            name: None if spread is None else float(spread)
            for name, spread in zip(("uniformity", "encoder_uniformity"), spreads, strict=True)
        },
        "probe": linear_probe(known, unseen),
    }


def format_measures(before: dict[str, Any], after: dict[str, Any]) -> str:
    """[`measure`]'s results as a Markdown table, the AUC of each finding's probe below the others."""
    rows = [(name, before[name], after[name]) for name in ("alignment", "uniformity", "encoder_uniformity")]
    rows.append(("probe, macro AUC", before["probe"]["macro_auc"], after["probe"]["macro_auc"]))
    for name, row in after["probe"]["findings"].items():
        rows.append((f"{name} ({row['positives']})", before["probe"]["findings"][name]["auc"], row["auc"]))
    lines = ["| | before | after |", "|---|---|---|"]
    for name, *values in rows:
        told = " | ".join("–" if value is None else f"{value:.3f}" for value in values)
        lines.append(f"| {name} | {told} |")
    return "\n".join(lines)


__all__ = ["ContrastivePretraining", "ContrastiveTrainer", "format_measures", "measure", "run"]
