"""Stage `reward`: the LLM learns from the metrics of reports that it samples itself (REINFORCE leave-one-out).

It follows the report stage, which learns the training reports token by token. Rennie et al., "Self-critical Sequence
Training for Image Captioning" (2017), with the baseline of Ahmadian et al., "Back to Basics" (2024).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import GenerationConfig

from ..inference.collation import PromptCollator
from ..metrics.rewards import REWARDS, RewardFunction, completion_texts
from ..modeling_otdrg import OTDRGForReportGeneration
from ..runtime.processes import is_sharded, open_methods
from .arguments import StageArguments
from .callbacks import LossCallback, everywhere
from .collation import ReportCollator
from .fields import NOT_NEGATIVE, POSITIVE, Bounds, need, option
from .model import attach_lora, cached_where_frozen, set_trained_parts
from .recipe import Recipe
from .report import ReportArguments, ReportStage, merged, trained_model
from .resumption import is_finished
from .stages import StageRun
from .trainer import StageTrainer
from .validation import Validation, generating_arguments

_REWARDS = {"cider": 1.0, "bleu_4": 1.0, "agreement": 0.5}


@dataclass
class RewardArguments(StageArguments):
    """The section `reward`: `TrainingArguments`, and the fields below.

    Decoding, indications, labeler and final evaluation are those of the section `report`.
    """

    place = "reward"
    bounds: ClassVar[dict[str, Bounds]] = {
        **StageArguments.bounds,
        "num_samples": {"least": 2},
        "kl_weight": NOT_NEGATIVE,
        "temperature": POSITIVE,
        "top_p": {"above": 0, "most": 1},
    }

    text: Literal["lora", "full"] = option(
        "lora", "How the LLM is trained; lora uses model.overrides.lora. All other parts are frozen."
    )
    num_samples: int = option(
        8, "Reports sampled for each study of a batch; each is compared with the mean of the others."
    )
    rewards: dict[str, float] = option(
        _REWARDS, f"Weights of the metrics of a sample whose sum is its reward: {', '.join(REWARDS)}."
    )
    kl_weight: float = option(0.05, "Weight of the KL divergence, per token, from the LLM that the stage began with.")
    temperature: float = option(1.0, "Temperature of the samples.")
    top_p: float = option(1.0, "Share of the probability from which the samples are drawn.")
    load_best_model_at_end: bool = option(True, "Publish the checkpoint with the best metric_for_best_model.")
    metric_for_best_model: str | None = option(
        ReportArguments.metric_for_best_model,
        "Score of the best checkpoint, or a weighted sum of scores: bleu_4, cider, macro_f1_13, loss...",
    )

    def __post_init__(self):
        super().__post_init__()
        for name, weight in self.rewards.items():
            need(name in REWARDS, "reward.rewards", name, f"some of {', '.join(REWARDS)}")
            need(math.isfinite(weight), f"reward.rewards.{name}", weight, "a finite number")
        self.expect(any(self.rewards.values()), "rewards", "a weight other than 0")
        self.expect(self.vision == "frozen", "vision", "frozen: only the LLM is trained")
        # Dropout is off, and with it the training mode without which backbones do not checkpoint.
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            self.expect(not getattr(self, name, False), name, "false in this stage")


# --- the loss --------------------------------------------------------------------------------------------------------


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """Advantages (B, k): each reward (B, k) minus the mean of the other k - 1 of its study."""
    others = rewards.sum(dim=1, keepdim=True) - rewards
    return rewards - others / (rewards.shape[1] - 1)


def policy_losses(
    logits: torch.Tensor,
    reference_logits: torch.Tensor,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    advantages: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy-gradient loss and the KL divergence from the reference, both sums over tokens.

    Args:
        logits, reference_logits: (N, T, V), those that predict each token of N samples.
        tokens: (N, T) ids.
        mask: (N, T), true up to the end of each sample.
        advantages: (N,).

    Returns:
        `-sum_nt A_n log p(y_nt)` and `sum_nt KL(p(. | y_n<t) || p_reference(. | y_n<t))`, exact over the vocabulary.
    """
    log_probabilities = logits.float().log_softmax(dim=-1)
    chosen = log_probabilities.gather(-1, tokens[:, :, None])[:, :, 0]
    difference = log_probabilities - reference_logits.float().log_softmax(dim=-1)
    divergence = (log_probabilities.exp() * difference).sum(dim=-1)
    return -(advantages[:, None] * chosen * mask).sum(), (divergence * mask).sum()


# --- the trainer -----------------------------------------------------------------------------------------------------


class Samples(NamedTuple):
    """k sampled reports for each of B studies, N = B * k.

    Attributes:
        inputs: of `forward` for the prompts and the samples after them.
        tokens, mask: (N, T) ids of the samples, and true up to their end.
        finding_states: (N, 14) states that condition them.
    """

    inputs: dict[str, Any]
    tokens: torch.Tensor
    mask: torch.Tensor
    finding_states: torch.Tensor


class RewardCollator(PromptCollator):
    """Batches of prompts with the true states, which condition the LLM as in the report stage, and the reports."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **super().__call__(rows),
            "finding_states": torch.tensor([row["finding_states"] for row in rows]),
            "references": [row["report"] for row in rows],
        }


class RewardTrainer(StageTrainer):
    """A Trainer whose batches are studies that it samples reports for, and whose loss is that of RLOO.

    Args:
        rewards: by name, the functions of `args.rewards`.
        max_new_tokens: of a sample.
        reference: the model with the weights that the stage began with; None for the model itself without LoRA.
    """

    def __init__(
        self,
        *args,
        rewards: dict[str, RewardFunction],
        max_new_tokens: int,
        reference: OTDRGForReportGeneration | None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.rewards, self.max_new_tokens, self.reference = rewards, max_new_tokens, reference
        self._part = self._part_of = -1

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.keep_frozen(model)
        samples = self.sample(inputs)
        rewards, total = self.judge(samples, inputs["references"])
        with torch.no_grad(), starting_weights(self.model, self.reference) as reference:
            reference_logits = self._logits(reference, samples)
        policy_loss, divergence = policy_losses(
            self._logits(model, samples),
            reference_logits,
            samples.tokens,
            samples.mask,
            leave_one_out(total).flatten(),
        )
        # The mean over processes, which the wrapper takes of the gradients, is then the mean over all tokens.
        count = samples.mask.sum()
        tokens = self.accelerator.reduce(count) / self.accelerator.num_processes
        policy_loss, divergence = policy_loss / tokens, divergence / tokens
        outputs = {
            "loss": policy_loss + self.args.kl_weight * divergence,
            "policy_loss": policy_loss,
            "kl": divergence,
            "reward": total.mean(),
            **{f"rewards/{name}": values.mean() for name, values in rewards.items()},
            "completion_length": count / len(samples.mask),
        }
        self.loss_callback.observe(outputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    @torch.no_grad()
    def sample(self, inputs: dict[str, Any]) -> Samples:
        """Sample k reports for each study of a batch, by a seed that depends on the step; views are encoded once."""
        model = self.model
        open_methods(model, "read_study", "expand_finding_text", "generate")
        names = ("pixel_values", "view_mask", "view_features", "indication_ids")
        priors = ("prior_pixel_values", "prior_view_mask", "prior_view_features")
        views = {name: inputs[name] for name in (*names, *priors) if name in inputs}
        prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self.accelerator.autocast():
            torch.manual_seed(self._seed())
            # With labels, some of the given states are replaced as in training on reports.
            drawn = model.expand_finding_text(
                labels=prompt["input_ids"], finding_states=inputs["finding_states"], **views
            )
            # Image dropout is off from here on: samples and log-probabilities must be of the same model.
            model.eval()
            study = model.read_study(**views, finding_states=drawn["finding_states"])
            prompt = model.expand_finding_text(**prompt, **study.encoded_views, finding_states=study.finding_states)
            given = prompt if model.config.dle else {**prompt, "finding_states": None}
            sequences = model.generate(
                **given,
                do_sample=True,
                temperature=self.args.temperature,
                top_p=self.args.top_p,
                top_k=0,
                num_return_sequences=self.args.num_samples,
                max_new_tokens=self.max_new_tokens,
                **({"synced_gpus": True} if is_sharded(model) else {}),
            )
        tokens = sequences[:, prompt["input_ids"].shape[1] :]
        ends = torch.isin(tokens, torch.as_tensor(model.generation_config.eos_token_id, device=tokens.device)).long()
        mask = ends.cumsum(dim=1) - ends == 0
        repeated = {name: value.repeat_interleave(self.args.num_samples, dim=0) for name, value in prompt.items()}
        attention_mask = torch.cat((repeated["attention_mask"], mask.to(repeated["attention_mask"])), dim=1)
        whole = {
            **repeated,
            "input_ids": sequences,
            "attention_mask": attention_mask,
            # As in `generate`: prompts are padded on the left.
            "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
            "logits_to_keep": tokens.shape[1] + 1,
            "report_only": True,
            "use_cache": False,
        }
        return Samples(whole, tokens, mask, repeated["finding_states"])

    def _seed(self) -> int:
        """The seed of a batch: of the stage's seed, the step, the batch's place in the step and the process."""
        step = self.state.global_step
        self._part = self._part + 1 if step == self._part_of else 0
        self._part_of = step
        key = [self.args.seed, step, self._part, self.accelerator.process_index]
        return int(np.random.SeedSequence(key).generate_state(1)[0])

    def judge(self, samples: Samples, references: list[str]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Each reward (B, k), and their weighted sum.

        Raises:
            ValueError: a reward is not finite on this or another process.
        """
        k = self.args.num_samples
        # Padding after the end may be a token that is written.
        written = [tokens[mask].tolist() for tokens, mask in zip(samples.tokens, samples.mask, strict=True)]
        texts = self.processor.batch_decode(written, skip_special_tokens=True)
        columns = {
            "completions": completion_texts(texts),
            "references": [reference for reference in references for _ in range(k)],
            "finding_states": samples.finding_states.cpu().numpy(),
        }
        device = samples.tokens.device
        rewards = {
            name: torch.tensor(reward(**columns), dtype=torch.float32, device=device).reshape(-1, k)
            for name, reward in self.rewards.items()
        }
        for name, values in rewards.items():
            wrong = values[~values.isfinite()]
            if not everywhere(torch.tensor(not len(wrong), device=device)):
                shown = float(wrong[0]) if len(wrong) else "not finite on another process"
                raise ValueError(f"reward.rewards: {name} of a sample is {shown}, expected a finite number")
        return rewards, sum(weight * rewards[name] for name, weight in self.args.rewards.items())

    def _logits(self, model: nn.Module, samples: Samples) -> torch.Tensor:
        """Logits (N, T, V) that predict the tokens of the samples, at the temperature of the samples."""
        return model(**samples.inputs)["logits"][:, :-1] / self.args.temperature


@contextmanager
def starting_weights(
    model: OTDRGForReportGeneration, copied: OTDRGForReportGeneration | None
) -> Iterator[OTDRGForReportGeneration]:
    """The model that the stage began with: a copy of it or, where only LoRA is trained, the model without LoRA."""
    if copied is not None:
        yield copied
        return
    adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for adapter in adapters:
            adapter.enable_adapters(False)
        yield model
    finally:
        for adapter in adapters:
            adapter.enable_adapters(True)


# --- the stage -------------------------------------------------------------------------------------------------------


class RewardStage(ReportStage):
    """Trains the LLM on rewards of its own reports."""

    arguments = RewardArguments
    first_reads = ()
    publishes = None

    def train(self, run: StageRun) -> tuple[OTDRGForReportGeneration, dict[str, Any]]:
        """Train on rewards, and return the best model with LoRA merged, in the recipe's type."""
        trainer = reward_trainer(run)
        trainer.train_stage(run.resume)
        return merged(trained_model(trainer, run.recipe), trainer), trainer.summary()

    def evaluate(self, run: StageRun, folder: Path | None = None) -> dict[str, Any]:
        """As the report stage's; generated reports are written to the stage's folder."""
        return super().evaluate(run, folder or run.folder)

    def check(self, recipe: Recipe) -> None:
        section, quantization = recipe.reward, recipe.model.quantization
        section.expect(
            quantization is None or section.text == "lora", "text", f"lora where model.quantization is {quantization}"
        )

    def check_start(self, recipe: Recipe, pending: Collection[str]) -> None:
        """Raise `ValueError` unless the report stage is or will be trained on what the recipe trains."""
        if "report" in pending:
            return
        folder = Path(recipe.output_dir) / "report"
        if not is_finished(folder) or set(pending) != {"reward"}:
            raise ValueError(
                f"stage reward starts from the model of stage report, and {folder} has none of this run: run "
                f"stages=[{','.join([*(name for name in pending if name != 'reward'), 'report', 'reward'])}]"
            )


def reward_trainer(run: StageRun) -> RewardTrainer:
    """The Trainer of the stage, with everything but the LLM frozen."""
    recipe, section, model, processor = run.recipe, run.recipe.reward, run.model, run.processor
    # Samples and validation are decoded as the recipe says, and not as the model is published.
    ids = {name: getattr(model.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    train, validation = run.studies["train"], run.studies.get("validation")
    args = generating_arguments(run, section)
    reference = None
    if section.text == "full":
        reference = copy.deepcopy(model, {id(tower): tower for tower in model.vision_towers})
        reference.requires_grad_(False).eval().to(args.device)
    attach_lora(model, recipe, "reward")
    set_trained_parts(model, vision="frozen", text=section.text, predictor="frozen", joining=False)
    labeler = recipe.report.evaluation.labeler
    rewards = {name: REWARDS[name](train["report"], labeler) for name in section.rewards}
    train, validation = (
        cached_where_frozen(model, processor, rows, recipe, "reward", args.device) for rows in (train, validation)
    )
    figures = ("policy_loss", "kl", "reward", *(f"rewards/{name}" for name in rewards), "completion_length")
    tokens, indication = recipe.report.max_report_tokens, recipe.gives_indication
    return RewardTrainer(
        model,
        args,
        processor=processor,
        loss_callback=LossCallback(figures),
        # Without dropout, log-probabilities are those of the model that sampled.
        frozen=[*model.children()],
        train_collator=RewardCollator(processor, indication),
        eval_collator=ReportCollator(processor, False, tokens, indication=indication),
        score=Validation.of(run, args, validation),
        train_dataset=train,
        eval_dataset=validation,
        rewards=rewards,
        max_new_tokens=recipe.report.generation["max_new_tokens"],
        reference=reference,
    )


STAGE = RewardStage()

__all__ = [
    "STAGE",
    "RewardArguments",
    "RewardCollator",
    "RewardStage",
    "RewardTrainer",
    "Samples",
    "leave_one_out",
    "policy_losses",
    "reward_trainer",
    "starting_weights",
]
