"""A Trainer that goes on from a checkpoint exactly as it would have gone on without a break."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy


class ResumableTrainer(Trainer):
    """A `Trainer` that can be cut off between two things that happen at the same step.

    transformers writes a checkpoint that is due within an epoch before it evaluates at the epoch's end, and what was
    to happen behind the checkpoint is lost on resuming: that evaluation, the end of training at the last step, and the
    decision to stop early. Here all three are made up for.
    """

    def _evaluate(self, *args, **kwargs):
        # A loader draws a seed when it is iterated over. Drawn from the state of training, dropout would go on
        # differently behind an evaluation than behind the checkpoint that was written before it.
        with torch.random.fork_rng(devices=[]):
            return super()._evaluate(*args, **kwargs)

    def _run_epoch(self, **arguments):
        checkpoint = arguments["resume_from_checkpoint"]
        if checkpoint is not None and arguments["epoch"] == arguments["epochs_trained"]:
            at_end = self.state.global_step >= self.state.max_steps or _stopped_early(Path(checkpoint))
            if not at_end and arguments["steps_trained_in_current_epoch"] == 0:
                # The evaluation may write a checkpoint of its own.
                self._load_rng_state(checkpoint)
                self._make_up_evaluation(arguments["trial"], arguments["ignore_keys_for_eval"], arguments["start_time"])
            # Trainer does not look at this before it has made a step.
            self.control.should_training_stop |= at_end
            if self.control.should_training_stop:
                return
        super()._run_epoch(**arguments)

    def _finalize_training(self, trial, num_train_samples, start_time):
        self._make_up_evaluation(trial, None, start_time)
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _make_up_evaluation(self, trial, ignore_keys_for_eval, start_time) -> None:
        """Evaluate at the end of an epoch or of training, where that is due and has not been done."""
        if self.args.eval_strategy != IntervalStrategy.EPOCH or any(
            line["step"] == self.state.global_step and "eval_loss" in line for line in self.state.log_history
        ):
            return
        self.control.should_evaluate = True
        self._maybe_log_save_evaluate(
            self._tr_loss, None, self.model_wrapped, trial, self.state.epoch, ignore_keys_for_eval, start_time
        )


def _stopped_early(checkpoint: Path) -> bool:
    """Whether a checkpoint was written when it had been decided that training ends before its last step."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    control = state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
    return bool(control.get("should_training_stop")) and state.global_step < state.max_steps


__all__ = ["ResumableTrainer"]
