"""The Trainer of every stage: what transformers' own does differently for this model, and nothing else."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..inference.processes import is_sharded, open_methods
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from .callbacks import FIGURES, LossCallback, NonFiniteLossError
from .checkpoints import last_checkpoint
from .distributed import check_wrapper, device_arguments, fill, has_accelerator, weightless_copy
from .history import HistoryCallback
from .recipe import StageRecipe
from .resumption import ResumableTrainer

logger = logging.getLogger(__name__)


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """transformers' sampler of batches of about equal length, the batches in an order that is the epoch's own.

    Left to itself it draws from the global generator, which a resumed run has in another state when an epoch begins,
    and goes from long to short batches, 50 at a time, of which the loss makes a saw.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int):
        super().__init__(batch_size, lengths=list(lengths))
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        places = list(super().__iter__())
        # The longest stays first, where memory runs out at once if at all, and what is left over stays last.
        whole = len(places) // self.batch_size
        batches = [
            places[start : start + self.batch_size] for start in range(0, whole * self.batch_size, self.batch_size)
        ]
        order = [0, *(torch.randperm(whole - 1, generator=self.generator) + 1).tolist()] if whole else []
        shuffled = [place for batch in order for place in batches[batch]]
        return iter(shuffled + places[whole * self.batch_size :])


class StageTrainer(ResumableTrainer):
    """A Trainer whose log lines hold the losses' figures and whose checkpoints resume any encoder.

    Args:
        model: OTDRG, or what wraps it and has a `save_pretrained` of its own.
        processor: saved beside the model in every checkpoint.
        loss_callback: is shown every output.
        frozen: parts to be kept in evaluation mode.
        vision_learning_rate: peak learning rate of the vision encoder, if another than the rest's.
        train_collator, eval_collator: make batches of studies.
        train_lengths: of the training studies, by which batches are grouped; None leaves them at random.
    """

    def __init__(
        self,
        model: OTDRGForReportGeneration | nn.Module,
        args: TrainingArguments,
        *,
        processor: OTDRGProcessor,
        loss_callback: LossCallback,
        frozen: list[nn.Module],
        vision_learning_rate: float | None,
        train_collator,
        eval_collator,
        train_lengths: Sequence[int] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs,
    ):
        callbacks = [loss_callback, HistoryCallback(), *callbacks]
        super().__init__(model, args, data_collator=train_collator, callbacks=callbacks, **kwargs)
        self.processor = processor
        self.loss_callback = loss_callback
        self.frozen = frozen
        self.vision_learning_rate = vision_learning_rate
        self.eval_collator = eval_collator
        self.train_lengths = train_lengths
        self._eval_sums: dict[str, torch.Tensor] = {}
        self._wrapper: str | None = None
        self._checked = False
        self._whole: nn.Module | None = None
        # `compute_loss` takes the number of tokens in a step that transformers counts for models that do.
        self.model_accepts_loss_kwargs = True

    def get_eval_dataloader(self, eval_dataset=None):
        train_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = train_collator

    def _get_train_sampler(self, train_dataset=None):
        if self.train_lengths is None:
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return EpochLengthGroupedSampler(batch_size, self.train_lengths, self.args.seed)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[bool, bool], dict] = {}
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad:
                    continue
                is_vision, decays = "vision_tower." in name, name in decayed
                group = groups.setdefault(
                    (is_vision, decays), {"params": [], "weight_decay": self.args.weight_decay if decays else 0.0}
                )
                if is_vision and self.vision_learning_rate is not None:
                    group["lr"] = self.vision_learning_rate
                group["params"].append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            # The vision encoder's groups go last: the learning rate that is logged is that of the first.
            self.optimizer = optimizer_class([groups[key] for key in sorted(groups)], **options)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        training = model.training
        if training:
            if not self._checked:
                self._wrapper, self._checked = check_wrapper(model), True
            for part in self.frozen:
                part.eval()
        outputs = model(**self._with_finding_text(inputs))
        if training and num_items_in_batch is not None:
            self._weigh_by_tokens(outputs, inputs["labels"], num_items_in_batch)
        if training:
            self.loss_callback.observe(outputs)
        loss = outputs["loss"]
        if training and num_items_in_batch is not None:
            # Which transformers leaves to those who take the number of tokens.
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def _with_finding_text(self, inputs):
        """`inputs`, the label text of the conditioning states written out where there is a prompt."""
        if "input_ids" not in inputs:
            return inputs
        open_methods(self.model, "expand_finding_text")
        with self.accelerator.autocast():
            return self.model.expand_finding_text(**inputs)

    def _weigh_by_tokens(self, outputs, labels: torch.Tensor, tokens: torch.Tensor) -> None:
        """Give the report loss of a batch the weight that its tokens have among those of all batches of the step.

        The mean over processes and accumulated batches is then that over tokens, as of one large batch (eq. 11).

        Args:
            tokens: in the step, on all processes.
        """
        batches = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        if batches == 1:
            return
        own = outputs["report_loss"]
        weighed = own * ((labels != -100).sum() * batches / tokens)
        outputs["loss"] = outputs["loss"] - own + weighed
        outputs["report_loss"] = weighed

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss and, unless only that is wanted, the finding logits (B, 14, 4) and labels (B, 14).

        The LLM's logits and the transport plans are left where they are: gathered over a split they fill the memory.
        """
        inputs = self._prepare_inputs(inputs)
        rows = len(next(iter(inputs.values())))
        own = self._own_rows(rows)
        # A process with none of its own goes along with one: under ZeRO-3 and FSDP the others wait for it.
        kept = {name: value[: max(own, 1)] for name, value in inputs.items()}
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, kept, return_outputs=True)
        self._add_to_evaluation(outputs, kept, own)
        loss = loss.detach().mean()
        if prediction_loss_only:
            return loss, None, None
        logits = outputs["finding_logits"].detach().float()
        # The rest is cut off when processes are gathered, for which they must be of one shape.
        logits = torch.cat((logits, logits.new_zeros(rows - len(logits), *logits.shape[1:])))
        return loss, logits, inputs["finding_labels"]

    def _add_to_evaluation(self, outputs, inputs, rows: int) -> None:
        """Add a batch's figures, with the weight of its rows, and the report loss, with that of its tokens."""
        values = {name: (outputs[name], rows) for name in FIGURES if outputs.get(name) is not None}
        values["loss"] = (outputs["loss"], rows)
        if "report_loss" in values:
            tokens = int((inputs["labels"] != -100).sum()) if rows else 0
            values["report_loss"] = (outputs["report_loss"], tokens)
            values["loss"] = (outputs["loss"] - outputs["report_loss"], rows)
        for name, (value, weight) in values.items():
            value = value.detach().float()
            pair = torch.stack((value * weight, torch.full_like(value, weight)))
            self._eval_sums[name] = self._eval_sums.get(name, 0.0) + pair

    def _own_rows(self, rows: int) -> int:
        """Rows of this process's batch that are not there a second time, to fill up the last batch of a split.

        Gathering drops such rows, but not from a mean over the batch they are in.
        """
        gradients = self.accelerator.gradient_state
        if not gradients.end_of_dataloader or gradients.remainder <= 0:
            return rows
        return min(max(gradients.remainder - self.accelerator.process_index * rows, 0), rows)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs.update(self.loss_callback.figures())
            if "ot_loss" in logs and self.model.config.fiot:
                logs.update(ot_weight=self.model.ot_weight, ot_epsilon=self.model.ot_epsilon)
        elif "eval_loss" in logs:
            sums = {name: self.accelerator.reduce(pair) for name, pair in self._eval_sums.items()}
            means = {name: float(total / weight) for name, (total, weight) in sums.items()}
            # The mean over the split's tokens, however it was cut into batches and dealt to processes.
            logs["eval_loss"] = means.pop("loss") + means.get("report_loss", 0.0)
            logs.update({f"eval_{name}": value for name, value in means.items()})
            self._eval_sums = {}
        super().log(logs, start_time)

    def _save(self, output_dir=None, state_dict=None):
        if not self.args.should_save:
            return
        # Trainer loads a checkpoint by the names weights have in memory; in their original names those of a trained
        # DINOv2 would only be warned of as missing.
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        if self._llm_is_quantized():
            state_dict = {
                name: weight for name, weight in self.model.state_dict().items() if not self._is_left_out(name)
            }
        self.model.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)
        self.processor.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def _llm_is_quantized(self) -> bool:
        """Whether the LLM is quantised: its weights are those the stage began with, and no checkpoint repeats them."""
        return getattr(self.model, "is_llm_quantized", False)

    @staticmethod
    def _is_left_out(name: str) -> bool:
        return name.startswith("language_model.") and "lora_" not in name

    def _issue_warnings_after_load(self, load_result) -> None:
        if self._llm_is_quantized():
            load_result.missing_keys[:] = [name for name in load_result.missing_keys if not self._is_left_out(name)]
        super()._issue_warnings_after_load(load_result)

    def train_stage(self, resume: bool) -> None:
        """Train to the end, from the last whole checkpoint in the stage's folder if `resume`.

        Raises:
            NonFiniteLossError: with the step, and the last checkpoint that is whole.
        """
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            if self._llm_is_quantized():
                raise ValueError(
                    "model.quantization: expected null with FSDP or DeepSpeed, which do not share packed weights out: "
                    "use recipes/accelerate/ddp.yaml"
                )
            self._whole = weightless_copy(self.model)
        checkpoint = last_checkpoint(self.args.output_dir) if resume else None
        if checkpoint is not None:
            logger.info("resuming from %s", checkpoint)
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        except BaseException as error:
            for callback in self.callback_handler.callbacks:
                if getattr(callback, "training_bar", None) is not None:
                    # An open progress bar would be drawn once more behind the error.
                    callback.training_bar.close()
            if not isinstance(error, NonFiniteLossError):
                raise
            kept = last_checkpoint(self.args.output_dir)
            raise NonFiniteLossError(
                f"step {self.state.global_step + 1} of {self.args.output_dir}: {error}; the weights were spared, "
                + (f"the last good checkpoint is {kept}" if kept else "and no checkpoint was written before it")
                + "; a lower learning rate or bf16: false may help"
            ) from None

    def whole_model(self) -> nn.Module:
        """The trained model without its wrapper, whole on every process, which must all call it.

        Where each had its share of the weights, the whole is in main memory.
        """
        trained = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return fill(self._whole, trained) if is_sharded(trained) else trained

    def summary(self) -> dict[str, Any]:
        """What every stage's results begin with: steps, log lines, processes and what made them one."""
        return {
            "steps": self.state.global_step,
            "processes": self.accelerator.num_processes,
            "wrapper": self._wrapper,
            "log_history": self.state.log_history,
        }


def training_arguments(
    stage: StageRecipe, folder: Path, seed: int, evaluates: bool, report_to: list[str], **more
) -> TrainingArguments:
    """`TrainingArguments` of a stage's recipe.

    Args:
        stage: its section of the recipe.
        folder: the stage's.
        seed, report_to: the recipe's.
        evaluates: whether there is a split to evaluate on.
        more: fields that this stage alone has.
    """
    names = {field.name for field in fields(TrainingArguments)}
    # The name gradient checkpointing has in later versions of transformers, which deprecate the other.
    checkpointing = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in names)
    more[checkpointing] = stage.gradient_checkpointing
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=stage.epochs,
        max_steps=stage.max_steps,
        per_device_train_batch_size=stage.batch_size,
        per_device_eval_batch_size=stage.eval_batch_size or stage.batch_size,
        gradient_accumulation_steps=stage.gradient_accumulation,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="constant_with_warmup" if stage.schedule == "constant" else stage.schedule,
        warmup_steps=stage.warmup_ratio,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        bf16=stage.bf16,
        torch_compile=stage.compile,
        **device_arguments(),
        logging_steps=stage.logging_steps,
        logging_first_step=True,
        # A loss that is not finite ends the run; it is not to be filtered out of what is logged.
        logging_nan_inf_filter=False,
        eval_strategy=stage.eval_strategy if evaluates else "no",
        eval_steps=stage.eval_steps,
        save_strategy=stage.save_strategy,
        save_steps=stage.save_steps,
        save_total_limit=stage.save_total_limit,
        dataloader_num_workers=stage.workers,
        dataloader_pin_memory=has_accelerator(),
        # Of streamed studies each process reads all and takes its share: batches of one process, cut up for all, would
        # have to be of one length.
        accelerator_config={"dispatch_batches": False},
        # The columns of studies are not the arguments of forward; the collator makes those of them.
        remove_unused_columns=False,
        report_to=report_to,
        project=folder.parent.name,
        run_name=f"{folder.parent.name}-{folder.name}",
        seed=seed,
        **more,
    )


__all__ = ["StageTrainer", "training_arguments"]
