"""A stage is one module and one registry line: this module is the module of a stage."""

import json
from dataclasses import dataclass

import pytest
import torch
import yaml
from otdrg.train_hf import main
from otdrg.training.arguments import StageArguments
from otdrg.training.callbacks import LossCallback
from otdrg.training.collation import ReportCollator
from otdrg.training.fields import option
from otdrg.training.model import set_trained_parts
from otdrg.training.recipe import load_recipe
from otdrg.training.stages import STAGES, Stage
from otdrg.training.trainer import StageTrainer
from safetensors.torch import load_file


@dataclass
class ProjectorArguments(StageArguments):
    place = "projector"

    scale: float = option(1.0, "A field of the stage's own.")


class ProjectorStage(Stage):
    """Trains what joins the backbones, between the predictor and the report stage."""

    arguments = ProjectorArguments
    publishes = "projected"

    def check(self, recipe):
        if recipe.projector.scale > 10:
            raise ValueError(f"projector.scale={recipe.projector.scale}: expected at most 10")

    def train(self, run):
        section = run.recipe.projector
        frozen = set_trained_parts(run.model, vision="frozen", text="frozen", predictor="frozen", joining=True)
        collator = ReportCollator(run.processor, True)
        trainer = StageTrainer(
            run.model,
            section.prepare(run.folder, run.recipe.seed, [], evaluates=False, label_names=["labels"]),
            processor=run.processor,
            loss_callback=LossCallback(),
            frozen=frozen,
            train_collator=collator,
            eval_collator=collator,
            train_dataset=run.studies["train"],
        )
        trainer.train_stage(run.resume)
        return trainer.whole_model(), trainer.summary() | {"scale": section.scale}


STAGE = ProjectorStage()


@pytest.fixture
def registered(monkeypatch):
    stages = dict(STAGES)
    STAGES.clear()
    for name, module in stages.items():
        if name == "report":
            STAGES["projector"] = __name__
        STAGES[name] = module
    yield
    STAGES.clear()
    STAGES.update(stages)


def test_stage_registered_by_one_line_is_read_checked_trained_and_published(
    registered, tiny_recipe, tmp_path, capsys, caplog
):
    values = yaml.safe_load(tiny_recipe.read_text(encoding="utf-8"))
    values |= {"stages": ["predictor", "projector", "report"], "output_dir": str(tmp_path / "run")}
    values["projector"] = {"max_steps": 2, "per_device_train_batch_size": 4, "scale": 2, "logging_steps": 1}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main([str(path), "projector.scale=11"]) == 1
    assert "projector.scale=11: expected at most 10" in capsys.readouterr().err
    assert main([str(path), "projector.scall=1"]) == 1
    assert "unknown key 'scall' in projector: did you mean 'scale'?" in capsys.readouterr().err
    assert main([str(path)]) == 0
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))["projector"]
    assert (results["steps"], results["scale"]) == (2, 2)
    assert load_recipe(run / "recipe.yaml").projector.scale == 2
    before, after = (load_file(run / name / "model.safetensors") for name in ("predictor", "projected"))
    moved = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    assert moved and all("projector" in name for name in moved)
    assert f"stage report: {run / 'report'}, from {run / 'projected'}" in caplog.text
    assert main([str(path), "--resume"]) == 0 and "stage projector is finished" in caplog.text
    assert main([str(path), "--resume", "projector.learning_rate=1"]) == 1
    assert f"stage projector of {run} was trained with another recipe" in capsys.readouterr().err
