"""The Trainer of every stage: how it continues from a checkpoint, its log lines, its checkpoints, and its optimizer."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import IntervalStrategy

from ..inference.attention import use_fastest_attention
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from ..runtime.processes import check_wrapper, fill, is_sharded, open_methods, weightless_copy
from .arguments import StageArguments
from .callbacks import FIGURES, HistoryCallback, LossCallback, NonFiniteLossError, SaveOnEvaluation
from .collation import StudySampler
from .resumption import last_checkpoint

logger = logging.getLogger(__name__)


# --- continuing from a checkpoint ------------------------------------------------------------------------------------


class ResumableTrainer(Trainer):
    """A `Trainer` whose resumed training has the losses of training without a break.

    Only this class overrides or calls private methods of transformers' Trainer, which have no public counterpart:

    - `_run_epoch` and `_finalize_training`: transformers writes a checkpoint that is due within an epoch before it
      evaluates at the epoch's end. A run that is killed in between and resumed would lose that evaluation, would train
      one step too many after the last step, and would forget that training had been stopped early. They use
      `_load_rng_state`, `_maybe_log_save_evaluate` and `_tr_loss`.
    - `_get_train_sampler`: transformers' length-grouped sampler draws from the global generator, whose state differs in
      a resumed run.
    - `_prepare_inputs`: `prediction_step` has to place its batch on the device.
    - `_save`: a checkpoint must have the names that weights have in memory, and leaves out what does not change.
    - `_issue_warnings_after_load`: a checkpoint that leaves out weights which do not change is loaded with a warning,
      and a checkpoint that does not fit is loaded with a warning too.

    If one of them changes, `tests/training/test_trainer.py` fails.
    """

    #: Number of tokens in each training report, by which batches are grouped; None leaves the order to transformers.
    train_lengths: Sequence[int] | None = None
    #: How often each study is drawn, in relation to the others; None draws all alike.
    train_weights: Sequence[float] | None = None

    def evaluate(self, *args, **kwargs):
        # A data loader draws a seed when it is iterated. Without the fork, dropout after an evaluation would differ
        # from dropout after resuming from a checkpoint that was written before the evaluation.
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def _run_epoch(self, **arguments):
        checkpoint = arguments["resume_from_checkpoint"]
        if checkpoint is not None and arguments["epoch"] == arguments["epochs_trained"]:
            at_end = self.state.global_step >= self.state.max_steps or _stopped_early(Path(checkpoint))
            if not at_end and arguments["steps_trained_in_current_epoch"] == 0:
                # The evaluation may write a checkpoint of its own.
                self._load_rng_state(checkpoint)
                self._evaluate_if_due(arguments["trial"], arguments["ignore_keys_for_eval"], arguments["start_time"])
            # Trainer does not read this before it has made a step.
            self.control.should_training_stop |= at_end
            if self.control.should_training_stop:
                return
        super()._run_epoch(**arguments)

    def _finalize_training(self, trial, num_train_samples, start_time):
        self._evaluate_if_due(trial, None, start_time)
        # The state has the path as it was when the checkpoint was written; the run's folder may have been moved.
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _evaluate_if_due(self, trial, ignore_keys_for_eval, start_time) -> None:
        """Evaluate at the end of an epoch or of training if that is due and has not been done."""
        if self.args.eval_strategy != IntervalStrategy.EPOCH or any(
            line["step"] == self.state.global_step and "eval_loss" in line for line in self.state.log_history
        ):
            return
        self.control.should_evaluate = True
        self._maybe_log_save_evaluate(
            self._tr_loss, None, self.model_wrapped, trial, self.state.epoch, ignore_keys_for_eval, start_time
        )

    def _get_train_sampler(self, train_dataset=None):
        if self.train_lengths is None and self.train_weights is None:
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        studies = len(self.train_dataset if train_dataset is None else train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return StudySampler(studies, seed, batch_size, self.train_lengths, self.train_weights)

    def on_device(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch on the model's device, in the type that DeepSpeed computes in."""
        return self._prepare_inputs(inputs)

    def write_checkpoint(self, folder: str, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Write the model of a checkpoint; `state_dict` has its weights if processes share them."""
        self.model.save_pretrained(folder, state_dict=state_dict)

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:
            folder = self.args.output_dir if output_dir is None else output_dir
            self.write_checkpoint(folder, state_dict)
            torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def check_loaded(self, missing: list[str], unexpected: list[str]) -> list[str]:
        """The missing names to warn of after a checkpoint was loaded; may raise `ValueError`."""
        return missing

    def _issue_warnings_after_load(self, load_result) -> None:
        load_result.missing_keys[:] = self.check_loaded(load_result.missing_keys, load_result.unexpected_keys)
        super()._issue_warnings_after_load(load_result)


def _stopped_early(checkpoint: Path) -> bool:
    """Whether training had been stopped before its last step when the checkpoint was written."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    control = state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
    return bool(control.get("should_training_stop")) and state.global_step < state.max_steps


# --- stages ----------------------------------------------------------------------------------------------------------


def _tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Number of report tokens in a batch, or the sum of their weights."""
    targets = batch["labels"] != -100
    return (batch["label_weights"] * targets).sum() if "label_weights" in batch else targets.sum()


class StageTrainer(ResumableTrainer):
    """A Trainer whose log lines hold the figures of the losses and whose checkpoints resume any encoder.

    Args:
        model: OTDRG, or a module around it with a `save_pretrained` of its own.
        args: of [`StageArguments.prepare`].
        processor: saved with the model in every checkpoint.
        loss_callback: receives every output.
        frozen: parts to keep in evaluation mode.
        train_collator, eval_collator: make batches of studies.
        train_lengths: tokens of each training report, to group batches by; None does not group.
        train_weights: how often each training study is drawn, in relation to the others; None draws all alike.
        score: scores of an evaluation at a step besides its losses, for example of generated reports.
    """

    def __init__(
        self,
        model: OTDRGForReportGeneration | nn.Module,
        args: StageArguments,
        *,
        processor: OTDRGProcessor,
        loss_callback: LossCallback,
        frozen: list[nn.Module],
        train_collator,
        eval_collator,
        train_lengths: Sequence[int] | None = None,
        train_weights: Sequence[float] | None = None,
        score: Callable[[int], dict[str, float]] | None = None,
        **kwargs,
    ):
        callbacks: list[TrainerCallback] = [loss_callback, HistoryCallback()]
        if args.load_best_model_at_end:
            callbacks.append(SaveOnEvaluation())
        if args.early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
        # Not as `processing_class`, to which Trainer would adapt the model's special tokens.
        super().__init__(model, args, data_collator=train_collator, callbacks=callbacks, **kwargs)
        use_fastest_attention(self.model, torch.bfloat16 if args.bf16 else None)
        self.processor = processor
        self.loss_callback = loss_callback
        self.frozen = frozen
        self.eval_collator = eval_collator
        self.train_lengths, self.train_weights = train_lengths, train_weights
        self.score = score
        self._eval_sums: dict[str, torch.Tensor] = {}
        self._wrapper: str | None = None
        self._checked = False
        self._whole: nn.Module | None = None
        # `compute_loss` takes the number of tokens in a step, which transformers counts for models that accept it.
        self.model_accepts_loss_kwargs = True

    def get_eval_dataloader(self, eval_dataset=None):
        with self._evaluation_batches():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        with self._evaluation_batches():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _evaluation_batches(self) -> Iterator[None]:
        """Give the dataloaders made in this context the collator of evaluation and every study, also in `predict`."""
        train_collator, self.data_collator = self.data_collator, self.eval_collator
        drops_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.data_collator, self.args.dataloader_drop_last = train_collator, drops_last

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of a step, and their number of tokens or, if tokens have weights, the sum of the weights."""
        batches, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        if tokens is not None and "label_weights" in batches[0]:
            tokens = self.accelerator.reduce(sum(_tokens(batch).to(device) for batch in batches))
        return batches, tokens

    def create_optimizer(self, model=None):
        """Trainer's optimizer; with `vision_learning_rate`, vision encoders have a learning rate of their own."""
        if self.args.vision_learning_rate is None:
            return super().create_optimizer(model)
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
                if is_vision:
                    group["lr"] = self.args.vision_learning_rate
                group["params"].append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            # The vision encoder's groups come last: the learning rate of the first group is logged.
            self.optimizer = optimizer_class([groups[key] for key in sorted(groups)], **options)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch; while training, frozen parts stay in evaluation mode and figures are collected."""
        training = model.training
        if training:
            self.keep_frozen(model)
        outputs = model(**self._with_finding_text(inputs))
        counts_tokens = training and num_items_in_batch is not None
        if counts_tokens:
            self._weigh_by_tokens(outputs, _tokens(inputs), num_items_in_batch)
        if training:
            self.loss_callback.observe(outputs)
        loss = outputs["loss"]
        if counts_tokens:
            # transformers leaves this division to a loss that takes the number of tokens.
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def keep_frozen(self, model: nn.Module) -> None:
        """Set the frozen parts to evaluation mode for a batch of training; the first one checks the wrapper."""
        if not self._checked:
            self._wrapper = check_wrapper(model, bool(self.args.fsdp), bool(self.args.deepspeed))
            self._checked = True
        for part in self.frozen:
            part.eval()

    def _with_finding_text(self, inputs):
        """`inputs` with the label text of the conditioning states written into the prompt, if there is one."""
        if "input_ids" not in inputs:
            return inputs
        open_methods(self.model, "expand_finding_text")
        with self.accelerator.autocast():
            return self.model.expand_finding_text(**inputs)

    def _weigh_by_tokens(self, outputs, own_tokens: torch.Tensor, tokens: torch.Tensor) -> None:
        """Weigh the report loss of a batch by its share of the tokens of the step.

        The mean over processes and accumulated batches is then the mean over tokens, as in one large batch (eq. 11).

        Args:
            own_tokens: number of tokens in the batch, or the sum of their weights.
            tokens: the same of the step, on all processes.
        """
        batches = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        if batches == 1:
            return
        own = outputs["report_loss"]
        weighed = own * (own_tokens * batches / tokens)
        outputs["loss"] = outputs["loss"] - own + weighed
        outputs["report_loss"] = weighed

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss and, unless `prediction_loss_only`, the finding logits (B, 14, 4) and labels (B, 14).

        The LLM's logits and the transport plans are not returned: gathered over a split they would fill the memory.
        """
        inputs = self.on_device(inputs)
        rows = len(next(iter(inputs.values())))
        own = self._own_rows(rows)
        # A process without a row of its own computes one all the same: under ZeRO-3 and FSDP the others wait for it.
        kept = {name: value[: max(own, 1)] for name, value in inputs.items()}
        if prediction_loss_only and "labels" in kept:
            kept["report_only"] = True
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, kept, return_outputs=True)
        self._add_to_evaluation(outputs, kept, own)
        loss = loss.detach().mean()
        if prediction_loss_only:
            return loss, None, None
        logits = outputs["finding_logits"].detach().float()
        # Gathering needs equal shapes and drops the padding.
        logits = torch.cat((logits, logits.new_zeros(rows - len(logits), *logits.shape[1:])))
        return loss, logits, inputs["finding_labels"]

    def _add_to_evaluation(self, outputs, inputs, rows: int) -> None:
        """Add a batch's figures, weighted by rows, and its report loss, weighted by tokens."""
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
        """Rows of this process's batch without the repeated ones that fill up the last batch of a split.

        Gathering drops repeated rows, but a mean over their batch includes them.
        """
        gradients = self.accelerator.gradient_state
        if not gradients.end_of_dataloader or gradients.remainder <= 0:
            return rows
        return min(max(gradients.remainder - self.accelerator.process_index * rows, 0), rows)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.score is not None:
            with self.compute_loss_context_manager():
                scores = self.score(self.state.global_step)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output

    def log(self, logs, start_time=None):
        """Add the figures' means, lambda, epsilon and the value of `metric_for_best_model` to a log line."""
        if "loss" in logs:
            logs.update(self.loss_callback.figures())
            if "ot_loss" in logs and self.model.config.fiot:
                logs.update(ot_weight=self.model.ot_weight, ot_epsilon=self.model.ot_epsilon)
        elif "eval_loss" in logs:
            sums = {name: self.accelerator.reduce(pair) for name, pair in self._eval_sums.items()}
            means = {name: float(total / weight) for name, (total, weight) in sums.items()}
            # The mean over the split's tokens, whatever the batches and processes.
            logs["eval_loss"] = means.pop("loss") + means.get("report_loss", 0.0)
            logs.update({f"eval_{name}": value for name, value in means.items()})
            self._eval_sums = {}
            if self.args.metric_for_best_model is not None:
                scores = {name.removeprefix("eval_"): value for name, value in logs.items()}
                logs[f"eval_{self.args.metric_for_best_model}"] = self.args.best(scores)
        super().log(logs, start_time)

    def write_checkpoint(self, folder, state_dict):
        if self._llm_is_quantized():
            # Leave out the LLM's packed weights, which are those the stage began with.
            weights = self.model.state_dict()
            state_dict = {name: weight for name, weight in weights.items() if not self._is_left_out(name)}
        # Trainer loads a checkpoint by the names weights have in memory. In their original names those of a trained
        # DINOv2 would be missing, with a warning only.
        self.model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)
        self.processor.save_pretrained(folder)

    def _llm_is_quantized(self) -> bool:
        return getattr(self.model, "is_llm_quantized", False)

    @staticmethod
    def _is_left_out(name: str) -> bool:
        return name.startswith("language_model.") and "lora_" not in name

    def check_loaded(self, missing: list[str], unexpected: list[str]) -> list[str]:
        # A checkpoint has one of the names of a tied weight.
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        kept = self._llm_is_quantized()
        return [name for name in missing if name not in tied and not (kept and self._is_left_out(name))]

    def train_stage(self, resume: bool) -> None:
        """Train to the end, from the last complete checkpoint in the stage's folder if `resume`.

        Raises:
            NonFiniteLossError: names the step and the last complete checkpoint.
            ValueError: a quantised LLM would be sharded.
        """
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            if self._llm_is_quantized():
                raise ValueError(
                    "model.quantization: expected null with FSDP or DeepSpeed, which cannot shard packed weights: use "
                    "recipes/accelerate/ddp.yaml"
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
                    # An open progress bar would be drawn once more after the error.
                    callback.training_bar.close()
            if not isinstance(error, NonFiniteLossError):
                raise
            kept = last_checkpoint(self.args.output_dir)
            raise NonFiniteLossError(
                f"step {self.state.global_step + 1} of {self.args.output_dir}: {error}; the weights are unchanged, "
                + (f"the last good checkpoint is {kept}" if kept else "and no checkpoint was written before it")
                + "; a lower learning rate or bf16: false may help"
            ) from None

    def whole_model(self) -> nn.Module:
        """The trained model without its wrapper, complete on every process; every process must call this.

        If the weights were sharded, the complete model is in main memory.
        """
        trained = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return fill(self._whole, trained) if is_sharded(trained) else trained

    def summary(self) -> dict[str, Any]:
        """The part of the results that every stage has: steps, processes, wrapper, log lines, and the best step."""
        results = {
            "steps": self.state.global_step,
            "processes": self.accelerator.num_processes,
            "wrapper": self._wrapper,
            "log_history": self.state.log_history,
        }
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            metric, value = self.args.best.text, self.state.best_metric
            results["best"] = {"step": self.state.best_global_step, "metric": metric, "value": value}
            logger.info("best of validation: step %d, %s = %.4f", self.state.best_global_step, metric, value)
        elif self.args.load_best_model_at_end:
            logger.warning(
                "the best checkpoint, of step %s, is missing: the last model is kept", self.state.best_global_step
            )
        return results


__all__ = ["ResumableTrainer", "StageTrainer"]
