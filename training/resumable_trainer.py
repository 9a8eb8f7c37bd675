"""A Trainer that continues from a checkpoint exactly as it would have continued without a break.

Only this module overrides or calls private methods of transformers' Trainer, which have no public counterpart:

- `_run_epoch` and `_finalize_training`: transformers writes a checkpoint that is due within an epoch before it
  evaluates at the epoch's end. A run that is killed in between and resumed would lose that evaluation, would train one
  step too many after the last step, and would forget that training had been stopped early.
- `_get_train_sampler`: transformers' length-grouped sampler draws from the global generator, whose state differs in a
  resumed run.
- `_prepare_inputs`: `prediction_step` has to place its batch on the device.
- `_save`: a checkpoint must have the names that weights have in memory, and leaves out what does not change.
- `_issue_warnings_after_load`: a checkpoint that leaves out weights which do not change is loaded with a warning, and a
  checkpoint that does not fit is loaded with a warning too.

`_load_rng_state`, `_maybe_log_save_evaluate` and `_tr_loss` are used by the first two.

If one of them changes, `tests/training/test_resumable_trainer.py` fails.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Sampler
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import IntervalStrategy


class ResumableTrainer(Trainer):
    """A `Trainer` whose resumed training has the losses of training without a break."""

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
        return StudySampler(studies, self.args.seed, batch_size, self.train_lengths, self.train_weights)

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


class StudySampler(Sampler):
    """An order of the training studies that depends on the seed and the epoch only.

    With lengths, batches are of similar length, and they are shuffled: transformers' own order runs from long to short
    over 50 batches, and so does the loss.

    Args:
        studies: number of studies; each epoch has as many draws.
        seed: of the order; the same on all processes.
        batch_size: of a step, to group by length.
        lengths: of each study's report.
        weights: how often each study is drawn, in relation to the others; by default once an epoch. In every epoch a
            study is drawn its expected number of times, rounded up or down.
    """

    def __init__(
        self,
        studies: int,
        seed: int,
        batch_size: int,
        lengths: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
    ):
        self.studies, self.seed, self.batch_size = studies, seed, batch_size
        self.lengths, self.weights = lengths, weights
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.studies

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = list(range(self.studies)) if self.weights is None else self._draw(generator)
        if self.lengths is None:
            return iter([drawn[place] for place in torch.randperm(len(drawn), generator=generator).tolist()])
        lengths = [self.lengths[study] for study in drawn]
        places = get_length_grouped_indices(lengths, self.batch_size, generator=generator)
        # The longest batch stays first, so that memory runs out at once if at all; an incomplete one stays last.
        whole = len(places) // self.batch_size
        batches = [places[start : start + self.batch_size] for start in range(0, len(places), self.batch_size)]
        order = [0, *(torch.randperm(whole - 1, generator=generator) + 1).tolist()] if whole else []
        shuffled = [place for batch in order for place in batches[batch]]
        return iter([drawn[place] for place in shuffled + places[whole * self.batch_size :]])

    def _draw(self, generator: torch.Generator) -> list[int]:
        """Studies in proportion to their weights: systematic sampling from a random order."""
        order = torch.randperm(self.studies, generator=generator)
        shares = torch.tensor(self.weights, dtype=torch.float64)[order].cumsum(dim=0)
        points = torch.arange(self.studies, dtype=torch.float64) + torch.rand((), generator=generator).double()
        found = torch.searchsorted(shares, points * (shares[-1] / self.studies), right=True)
        return order[found.clamp(max=self.studies - 1)].tolist()


def _stopped_early(checkpoint: Path) -> bool:
    """Whether training had been stopped before its last step when the checkpoint was written."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    control = state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
    return bool(control.get("should_training_stop")) and state.global_step < state.max_steps


__all__ = ["ResumableTrainer", "StudySampler"]
