"""The Trainer of every stage: what transformers' own does differently for this model, and nothing else."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments

from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from .callbacks import FIGURES, LossCallback, NonFiniteLossError
from .checkpoints import last_checkpoint
from .history import HistoryCallback
from .recipe import StageRecipe
from .resumption import ResumableTrainer

logger = logging.getLogger(__name__)


class StageTrainer(ResumableTrainer):
    """A Trainer whose log lines hold the losses' figures and whose checkpoints resume any encoder.

    Args:
        model: OTDRG, or what wraps it and has a `save_pretrained` of its own.
        processor: saved beside the model in every checkpoint.
        loss_callback: is shown every output.
        frozen: parts to be kept in evaluation mode.
        vision_learning_rate: peak learning rate of the vision encoder, if another than the rest's.
        train_collator, eval_collator: make batches of studies.
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
        **kwargs,
    ):
        super().__init__(
            model, args, data_collator=train_collator, callbacks=[loss_callback, HistoryCallback()], **kwargs
        )
        self.processor = processor
        self.loss_callback = loss_callback
        self.frozen = frozen
        self.vision_learning_rate = vision_learning_rate
        self.eval_collator = eval_collator
        self._eval_sums: dict[str, list[torch.Tensor]] = {}

    def get_eval_dataloader(self, eval_dataset=None):
        train_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = train_collator

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
            for part in self.frozen:
                part.eval()
        outputs = model(**inputs)
        if training:
            self.loss_callback.observe(outputs)
        else:
            for name in FIGURES:
                if outputs.get(name) is not None:
                    self._eval_sums.setdefault(name, []).append(outputs[name].detach().float())
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss and, unless only that is wanted, the finding logits (B, 14, 4) and labels (B, 14).

        The LLM's logits and the transport plans are left where they are: gathered over a split they fill the memory.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach().mean(), None, None
        return loss.detach().mean(), outputs["finding_logits"].detach().float(), inputs["finding_labels"]

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs.update(self.loss_callback.figures())
            if "ot_loss" in logs and self.model.config.fiot:
                logs.update(ot_weight=self.model.ot_weight, ot_epsilon=self.model.ot_epsilon)
        elif "eval_loss" in logs:
            for name, values in self._eval_sums.items():
                gathered = self.accelerator.gather(torch.stack(values).mean())
                logs[f"eval_{name}"] = float(gathered.mean())
            self._eval_sums = {}
        super().log(logs, start_time)

    def _save(self, output_dir=None, state_dict=None):
        if not self.args.should_save:
            return
        # Trainer loads a checkpoint by the names weights have in memory; in their original names those of a trained
        # DINOv2 would only be warned of as missing.
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        self.model.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)
        self.processor.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def train_stage(self, resume: bool) -> None:
        """Train to the end, from the last whole checkpoint in the stage's folder if `resume`.

        Raises:
            NonFiniteLossError: with the step, and the last checkpoint that is whole.
        """
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
        use_cpu=not has_accelerator(),
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


def has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()


__all__ = ["StageTrainer", "has_accelerator", "training_arguments"]
