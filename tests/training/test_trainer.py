"""A run cut off between two things that happen at one step, on a model of four weights with dropout."""

import shutil

import pytest
import torch
from otdrg.training.trainer import ResumableTrainer
from safetensors.torch import load_file
from torch import nn
from transformers import EarlyStoppingCallback, PretrainedConfig, PreTrainedModel, TrainingArguments


class Regression(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(4, 1, bias=False)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x, labels):
        return {"loss": (self.linear(self.dropout(x)).squeeze(-1) - labels).square().mean()}


@pytest.fixture
def trainer(tmp_path):
    """Builds a trainer: 16 rows in batches of 4, so 4 steps an epoch, evaluated at the end of each."""

    def build(callbacks=(), **fields):
        torch.manual_seed(0)
        x = torch.randn(24, 4)
        rows = [{"x": row, "labels": row.sum()} for row in x]
        arguments = TrainingArguments(
            tmp_path / "run", per_device_train_batch_size=4, learning_rate=0.1, logging_steps=1,
            use_cpu=True, report_to="none", disable_tqdm=True, restore_callback_states_from_checkpoint=True,
            **{"eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 4, **fields},
        )  # fmt: skip
        return ResumableTrainer(
            Regression(PretrainedConfig()), arguments, train_dataset=rows[:16], eval_dataset=rows[16:],
            callbacks=list(callbacks),
        )  # fmt: skip

    return build


def course(trainer):
    keys = ("loss", "eval_loss")
    return {(line["step"], key): line[key] for line in trainer.state.log_history for key in keys if key in line}


@pytest.mark.parametrize(
    ("fields", "last"),
    [
        # The checkpoint of an epoch's last step; of the last step, within an epoch and at its end.
        ({"num_train_epochs": 3}, 8),
        ({"num_train_epochs": 3}, 12),
        ({"max_steps": 10}, 10),
    ],
)
def test_resume_evaluation_after_the_checkpoint_is_not_lost(trainer, tmp_path, fields, last):
    unbroken = trainer(**fields)
    unbroken.train()
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        if int(folder.name.removeprefix("checkpoint-")) > last:
            shutil.rmtree(folder)
    resumed = trainer(**fields)
    resumed.train(resume_from_checkpoint=True)
    assert course(resumed) == pytest.approx(course(unbroken), abs=1e-6)
    assert resumed.state.global_step == unbroken.state.global_step
    assert torch.allclose(resumed.model.linear.weight, unbroken.model.linear.weight)


def test_resume_early_stopping_is_kept(trainer, tmp_path):
    fields = {"num_train_epochs": 9, "metric_for_best_model": "loss", "load_best_model_at_end": True}
    fields |= {"save_strategy": "epoch", "greater_is_better": True}
    # What is evaluated falls, so that greater is better never comes true.
    unbroken = trainer([EarlyStoppingCallback(2)], **fields)
    unbroken.train()
    assert unbroken.state.global_step == 12
    # Resumed after the decision, and after the first of the two evaluations that led to it.
    for last in (12, 8):
        for folder in (tmp_path / "run").glob("checkpoint-*"):
            if int(folder.name.removeprefix("checkpoint-")) > last:
                shutil.rmtree(folder)
        resumed = trainer([EarlyStoppingCallback(2)], **fields)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 12
        assert course(resumed) == pytest.approx(course(unbroken), abs=1e-6)


def test_resume_in_a_moved_folder_keeps_the_best_checkpoint(trainer, tmp_path):
    fields = {"metric_for_best_model": "loss", "load_best_model_at_end": True, "greater_is_better": True}
    fields |= {"save_strategy": "epoch", "num_train_epochs": 3}
    trainer(**fields).train()
    moved = shutil.move(tmp_path / "run", tmp_path / "moved")
    resumed = trainer(**fields)
    resumed.args.output_dir = str(moved)
    resumed.train(resume_from_checkpoint=str(moved / "checkpoint-12"))
    # The loss falls, so the first one is the greatest.
    best, last = (load_file(moved / f"checkpoint-{step}" / "model.safetensors") for step in (4, 12))
    assert torch.equal(resumed.model.linear.weight, best["linear.weight"])
    assert not torch.equal(best["linear.weight"], last["linear.weight"])


def test_data_seed_orders_weighted_studies(trainer):
    def order(seed):
        built = trainer(data_seed=seed)
        built.train_weights = [1.0] * 16
        return torch.cat([batch["labels"] for batch in built.get_train_dataloader()])

    assert torch.equal(order(1), order(1)) and not torch.equal(order(1), order(2))


def test_evaluate_does_not_change_training(trainer):
    often, never = trainer(max_steps=6), trainer(max_steps=6, eval_strategy="no")
    for one in (often, never):
        torch.manual_seed(1)
        one.train()
    assert torch.equal(often.model.linear.weight, never.model.linear.weight)
