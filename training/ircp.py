"""Stage `ircp`: contrastive pre-training of the vision encoder (3.2.2, eq. 2)."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import save_file
from torch import nn

from ..evaluation.probe import ViewFeatures, alignment, encode_studies, linear_probe, uniformity
from ..files_otdrg import follow_umask
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from ..studies.streaming import StreamedStudies
from .arguments import StageArguments
from .callbacks import LossCallback, is_distributed
from .collation import ContrastiveCollator
from .data import StudySplits, known_states
from .fields import COUNT, NOT_NEGATIVE, POSITIVE, Bounds, option
from .model import attach_lora, set_trained_parts
from .recipe import Recipe
from .stages import Stage, StageRun
from .trainer import StageTrainer

logger = logging.getLogger(__name__)


@dataclass
class IRCPArguments(StageArguments):
    """The section `ircp`: `TrainingArguments`, and the fields below."""

    place = "ircp"
    observing = ("probe_studies",)
    bounds: ClassVar[dict[str, Bounds]] = {
        **StageArguments.bounds,
        "sigma": NOT_NEGATIVE,
        "temperature": POSITIVE,
        "projection_size": COUNT,
        "report_weight": NOT_NEGATIVE,
        "max_report_tokens": COUNT,
        "probe_studies": NOT_NEGATIVE,
    }

    vision: Literal["frozen", "lora", "full"] = option(
        "full", "How the vision encoder, which this stage trains, is trained: full or lora."
    )
    cache_features: bool = option(False, "Always false: the features of an encoder that is trained change.")
    sigma: float = option(0.1, "Standard deviation of the noise that makes an anchor's positive.")
    noise: Literal["normalized", "raw"] = option(
        "normalized", "Add the noise to the pooled encoder feature scaled to length 1, or to it as it is (the paper)."
    )
    similarity: Literal["cosine", "euclidean"] = option(
        "cosine", "Of projected features: their cosine, or their negative Euclidean distance."
    )
    temperature: float = option(0.5, "By which similarities are divided.")
    projection_size: int = option(128, "Width of the projected features that are compared.")
    report_weight: float = option(0.0, "Weight of the loss that contrasts views with reports; 0 leaves it out.")
    max_report_tokens: int = option(120, "Tokens of a report that are read for that loss.")
    probe_studies: int = option(
        2000,
        "Maximum number of training and of validation studies that are encoded before and after training, to measure "
        "the encoder; 0 leaves that out.",
    )

    def __post_init__(self):
        super().__post_init__()
        self.expect(self.vision != "frozen", "vision", "full or lora: this stage trains the encoder")
        changes = "false: features of the encoder that this stage trains change"
        self.expect(not self.cache_features, "cache_features", changes)
        negatives = "at least 2: the negatives are the other studies of the batch"
        self.expect(self.per_device_train_batch_size > 1, "per_device_train_batch_size", negatives)


class IRCPStage(Stage):
    """Trains the vision encoder so that views of a study are more similar than views of different studies."""

    arguments = IRCPArguments
    compares_within_batch = True

    def check_studies(self, recipe: Recipe, studies: StudySplits) -> None:
        if len(studies["train"]) < 2:
            raise ValueError("stage ircp needs at least 2 training studies: the negatives of one are the others")

    def train(self, run: StageRun) -> tuple[OTDRGForReportGeneration, dict[str, Any]]:
        """Train the vision encoder.

        Returns:
            The model with its new encoder, LoRA merged and without the projection heads; and the results, with the
            figures of [`measure`] under `before` and `after` if there are validation studies with finding states.
        """
        section, train, validation = run.recipe.ircp, run.studies["train"], run.studies.get("validation")
        trainer = ircp_trainer(run)
        measured = known_states(validation) if validation is not None else []
        measures = section.probe_studies > 0 and len(measured) > 0
        settings = (run.processor, train, measured, section.eval_batch())
        before = measure(trainer.model, *settings) if measures else None
        trainer.train_stage(run.resume)
        pretraining = trainer.whole_model().to(trainer.args.device)
        results = trainer.summary()
        if measures:
            after = measure(pretraining, *settings)
            results |= {"before": before, "after": after}
            logger.info("ircp on validation:\n%s", format_measures(before, after))
        pretraining.model.merge_lora()
        return pretraining.model, results


def ircp_trainer(run: StageRun) -> ContrastiveTrainer:
    """The Trainer of the stage."""
    section, validation = run.recipe.ircp, run.studies.get("validation")
    attach_lora(run.model, run.recipe, "ircp")
    frozen = set_trained_parts(run.model, vision=section.vision, text="frozen", predictor="frozen", joining=False)
    pretraining = ContrastivePretraining(run.model, section)
    args = section.prepare(
        run.folder,
        run.recipe.seed,
        run.recipe.report_to,
        evaluates=validation is not None,
        label_names=[],
        prediction_loss_only=True,
    )
    pretraining.to(args.device)
    collator = ContrastiveCollator(run.processor, section.max_report_tokens if section.report_weight > 0 else None)
    return ContrastiveTrainer(
        pretraining,
        args,
        processor=run.processor,
        loss_callback=LossCallback(),
        frozen=frozen,
        train_collator=collator,
        eval_collator=collator,
        train_dataset=run.studies["train"],
        eval_dataset=validation,
    )


class ContrastivePretraining(nn.Module):
    """A model with projection heads, through which its encoder is pre-trained and which are not published.

    The anchor of a view is its encoder's features, averaged over the image and, with `noise="normalized"`, scaled to
    length 1. Its positive is the anchor plus Gaussian noise. Both are projected by the head and then compared. (Noise
    added after the head would not depend on the encoder: it moves every feature of length 1 by the same amount.)

    Args:
        model: its vision encoder, as set by `set_trained_parts`, and the heads are trained.
        stage: the recipe's section.
    """

    accepts_loss_kwargs = False

    def __init__(self, model: OTDRGForReportGeneration, stage: IRCPArguments):
        super().__init__()
        self.model = model
        self.config = model.config
        self.stage = stage
        self.image_head = projection_head(model.image_projector.linear.in_features, stage.projection_size)
        if stage.report_weight > 0:
            hidden_size = model.config.text_config.hidden_size
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

    def activation_checkpointing_enable(self, **options) -> None:
        """Let the model recompute activations in the backward pass; options as of `PreTrainedModel`'s method."""
        self.model.activation_checkpointing_enable(**options)

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
            # The same noise in every evaluation, so that they can be compared.
            noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(0)).to(features)
        return self.image_head(features), self.image_head(features + self.stage.sigma * noise)

    def embed_reports(self, report_ids: torch.Tensor, report_mask: torch.Tensor) -> torch.Tensor:
        """Reports (B, projection_size): the LLM's frozen embeddings of their tokens, averaged, scaled and projected."""
        with torch.no_grad():
            embeddings = self.model.get_input_embeddings()(report_ids).float() * report_mask[:, :, None]
            average = embeddings.sum(dim=1) / report_mask.sum(dim=1, keepdim=True).clamp(min=1)
            # Averages of embeddings are so short that the head's biases would dominate.
            average = F.layer_norm(average, average.shape[-1:], eps=1e-8)
        return self.report_head(average)

    def save_pretrained(self, folder: str | os.PathLike, state_dict: dict | None = None, **kwargs) -> None:
        """Write the trained weights, encoder and heads, by their names in this module."""
        weights = self.state_dict() if state_dict is None else state_dict
        path = Path(folder) / "model.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: weights[name].contiguous() for name in self.trained_names()}, path, metadata={"format": "pt"})
        follow_umask(path)

    def trained_names(self) -> list[str]:
        """Names in the state dictionary of encoder and heads, their buffers included."""
        prefixes = ("model.vision_tower.", "image_head.", "report_head.")
        return [name for name in self.state_dict() if name.startswith(prefixes)]


class ContrastiveTrainer(StageTrainer):
    """A [`StageTrainer`] whose checkpoints hold the trained weights only."""

    def check_loaded(self, missing: list[str], unexpected: list[str]) -> list[str]:
        misfits = sorted({*set(self.model.trained_names()).intersection(missing), *unexpected})
        if misfits:
            raise ValueError(
                f"a checkpoint of {self.args.output_dir} does not fit the recipe, {len(misfits)} weights such as "
                f"{misfits[0]}: --overwrite starts the stage again"
            )
        # The other weights are those the stage began with.
        return []


def projection_head(in_features: int, out_features: int) -> nn.Sequential:
    """Two layers; the hidden one is as wide as the input."""
    return nn.Sequential(nn.Linear(in_features, in_features), nn.GELU(), nn.Linear(in_features, out_features))


def measure(
    pretraining: ContrastivePretraining,
    processor: OTDRGProcessor,
    train: Dataset | StreamedStudies,
    validation: Dataset,
    batch_size: int,
) -> dict[str, Any]:
    """How well the encoder's features of validation views are spread, and how well a linear probe predicts findings.

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
        cells = " | ".join("–" if value is None else f"{value:.3f}" for value in values)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


STAGE = IRCPStage()

# --- the contrastive loss (eq. 2), its negatives gathered from all processes -----------------------------------------


def info_nce(
    anchors: torch.Tensor,
    positives: torch.Tensor,
    groups: torch.Tensor,
    keys: torch.Tensor,
    key_groups: torch.Tensor,
    temperature: float,
    similarity: str,
) -> torch.Tensor:
    """Eq. 2 for every anchor: -log(exp(s(a, a+) / t) / (exp(s(a, a+) / t) + sum over k of exp(s(a, k) / t))).

    Args:
        anchors, positives: (A, D).
        groups: (A,); keys of an anchor's own group are not its negatives.
        keys, key_groups: (K, D) and (K,), the negatives of anchors of other groups.
        temperature: t.
        similarity: "cosine", or "euclidean" for the distance, negated.

    Returns:
        (A,), 0 where an anchor has no negative.
    """
    # Under autocast as well: similarities in bfloat16 have two digits.
    with torch.autocast(anchors.device.type, enabled=False):
        anchors, positives, keys = anchors.float(), positives.float(), keys.float()
        if similarity == "cosine":
            anchors, positives, keys = (F.normalize(part, dim=-1) for part in (anchors, positives, keys))
            positive, others = (anchors * positives).sum(dim=-1), anchors @ keys.T
        else:
            positive = -(anchors - positives).norm(dim=-1)
            others = -torch.cdist(anchors, keys, compute_mode="donot_use_mm_for_euclid_dist")
        others = others.masked_fill(groups[:, None] == key_groups[None], -torch.inf)
        logits = torch.cat((positive[:, None], others), dim=1) / temperature
        return logits.logsumexp(dim=1) - logits[:, 0]


class _AllGather(torch.autograd.Function):
    """(N, D) of every process as (processes, N, D); the gradient of each part comes back from all processes."""

    @staticmethod
    def forward(ctx, tensor):
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


def gather(features: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D) and groups (N,) of all processes, whose N may differ; with gradient.

    Every process must call it, with features of one width.
    """
    if not is_distributed():
        return features, groups
    groups, missing = _gather_padded(groups)
    features = _AllGather.apply(F.pad(features, (0, 0, 0, missing)))
    return features[groups >= 0], groups[groups >= 0]


def gather_groups(groups: torch.Tensor) -> torch.Tensor:
    """Groups (N,), at least 0, of all processes, in the order of [`gather`]."""
    if not is_distributed():
        return groups
    groups, _ = _gather_padded(groups)
    return groups[groups >= 0]


def _gather_padded(groups: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(processes, longest), -1 where a process has fewer, and how many this one lacks."""
    longest = torch.tensor(len(groups), device=groups.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    missing = int(longest) - len(groups)
    return _AllGather.apply(F.pad(groups, (0, missing), value=-1)), missing


def global_mean(losses: torch.Tensor, total: int) -> torch.Tensor:
    """What this process has to give for the mean over processes to be that over all `total` anchors."""
    processes = dist.get_world_size() if is_distributed() else 1
    return losses.sum() * processes / total


__all__ = [
    "STAGE",
    "ContrastivePretraining",
    "ContrastiveTrainer",
    "IRCPArguments",
    "IRCPStage",
    "format_measures",
    "gather",
    "gather_groups",
    "global_mean",
    "info_nce",
]
