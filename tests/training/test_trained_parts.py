"""Runs in which parts are trained in their several modes: what moves, what stays, and what resumes."""

import json
import shutil

import pytest
import torch
import yaml
from otdrg.modeling_otdrg import OTDRGForReportGeneration
from otdrg.train_hf import main
from otdrg.training.model import build_model
from otdrg.training.recipe import load_recipe
from safetensors.torch import load_file
from transformers import set_seed

VISION_LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["qkv"]}
IRCP = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "probe_studies": 0,
    "eval_strategy": "no",
}


@pytest.fixture(scope="module")
def write_recipe(tiny_recipe):
    """Writes the tiny recipe with other fields of its sections."""

    def write(folder, overrides, **sections):
        recipe = yaml.safe_load(tiny_recipe.read_text(encoding="utf-8"))
        recipe["output_dir"] = str(folder / "run")
        recipe["model"]["overrides"] |= overrides
        for section, fields in sections.items():
            recipe[section] = {**recipe.get(section, {}), **fields} if isinstance(fields, dict) else fields
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def own_run(write_recipe, tmp_path_factory):
    """The predictor's own encoder is trained whole, then the report's by LoRA beside a frozen predictor."""
    path = write_recipe(
        tmp_path_factory.mktemp("own"),
        {"predictor_encoder": "own", "vision_lora": VISION_LORA},
        predictor={"vision": "full", "vision_learning_rate": 5e-4, "logit_adjustment": 0.5},
        report={"vision": "lora", "predictor": "frozen", "vision_learning_rate": 1e-2},
    )
    assert main([str(path)]) == 0
    return path


def weights(folder, part):
    loaded = load_file(folder / "model.safetensors")
    return {name.removeprefix(part): value for name, value in loaded.items() if name.startswith(part)}


def moved(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def results(run):
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


def training_losses(run, stage):
    return {line["step"]: line["loss"] for line in results(run)[stage]["log_history"] if "loss" in line}


def test_predictor_stage_own_encoder_starts_from_the_reports(own_run):
    recipe = load_recipe(own_run)
    set_seed(recipe.seed)
    model, _ = build_model(recipe.model, ["the lungs are clear ."])
    given, folder = model.vision_tower.state_dict(), own_run.parent / "run" / "predictor"
    assert not moved(given, weights(folder, "vision_tower."))
    assert len(moved(given, weights(folder, "finding_vision_tower."))) > 20


def test_report_stage_trained_encoder_keeps_predictor_logits(own_run):
    run = own_run.parent / "run"
    assert not moved(weights(run / "predictor", "finding_"), weights(run / "model", "finding_"))
    adapted = moved(weights(run / "predictor", "vision_tower."), weights(run / "model", "vision_tower."))
    assert adapted and all(name.endswith("qkv.weight") for name in adapted)
    torch.manual_seed(0)
    pixels, mask = torch.randn(2, 2, 3, 112, 112), torch.tensor([[True, True], [True, False]])
    logits, features = [], []
    for folder in (run / "predictor", run / "model"):
        model = OTDRGForReportGeneration.from_pretrained(folder)
        assert model.config.vision_lora is None and not model.has_lora
        assert model.finding_logit_adjustment is None
        with torch.no_grad():
            logits.append(model(pixel_values=pixels, view_mask=mask).finding_logits)
            features.append(model.encode_views(pixels, mask, reader="report"))
    assert torch.equal(*logits)
    assert not torch.allclose(*features, atol=1e-4)


def test_report_stage_checkpoint_with_adapters_resumes(own_run, tmp_path):
    run = shutil.copytree(own_run.parent / "run", tmp_path / "run")
    checkpoint = OTDRGForReportGeneration.from_pretrained(run / "report" / "checkpoint-2")
    assert (checkpoint.config.vision_lora, checkpoint.has_lora) == (VISION_LORA, True)
    steps = [weights(run / "report" / f"checkpoint-{step}", "") for step in (2, 4)]
    trained = ("image_projector.", "label_projector.", "language_model.", "vision_tower.")
    assert all(name.startswith(trained) for name in moved(*steps))
    assert all("lora_" in name for name in moved(*steps) if name.startswith(trained[2:]))
    # Killed while writing checkpoint-4: Trainer writes its state last.
    (run / "report" / "finished.json").unlink()
    (run / "report" / "checkpoint-4" / "trainer_state.json").unlink()
    assert main([str(own_run), f"output_dir={run}", "--resume"]) == 0
    unbroken, resumed = (training_losses(folder, "report") for folder in (own_run.parent / "run", run))
    for step in (3, 4):
        assert resumed[step] == pytest.approx(unbroken[step], abs=1e-5)
    one, other = (weights(folder / "model", "") for folder in (own_run.parent / "run", run))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_ircp_stage_lora_reaches_both_encoders(write_recipe, tmp_path):
    path = write_recipe(
        tmp_path,
        {"predictor_encoder": "own", "vision_lora": VISION_LORA},
        stages=["ircp", "predictor"],
        ircp={**IRCP, "vision": "lora"},
        predictor={"vision": "lora"},
    )
    assert main([str(path)]) == 0
    recipe, run = load_recipe(path), tmp_path / "run"
    set_seed(recipe.seed)
    given = build_model(recipe.model, ["the lungs are clear ."])[0].vision_tower.state_dict()
    pretrained = weights(run / "ircp", "vision_tower.")
    assert moved(given, pretrained) and all(name.endswith("qkv.weight") for name in moved(given, pretrained))
    assert not moved(pretrained, weights(run / "predictor", "vision_tower."))
    own = moved(pretrained, weights(run / "predictor", "finding_vision_tower."))
    assert own and all(name.endswith("qkv.weight") for name in own)


def test_predictor_stage_lora_trains_the_shared_encoder(write_recipe, tmp_path):
    path = write_recipe(
        tmp_path, {"vision_lora": VISION_LORA}, stages=["predictor"], predictor={"vision": "lora", "max_steps": 2}
    )
    assert main([str(path)]) == 0
    stage = results(tmp_path / "run")["predictor"]
    assert stage["steps"] == 2
    assert stage["validation"].keys() >= {"macro_auc", "macro_auc_interval", "macro_ece"}
    model = OTDRGForReportGeneration.from_pretrained(tmp_path / "run" / "predictor")
    assert not model.has_lora and not hasattr(model, "finding_vision_tower")


def test_predictor_stage_frozen_own_encoder_equals_the_reports(write_recipe, tmp_path):
    evaluation = {"split": "validation", "controls": ["shuffled"], "metrics": ["bleu_4"]}
    path = write_recipe(
        tmp_path,
        {"predictor_encoder": "own"},
        predictor={"vision": "frozen", "cache_features": True, "thresholds": "validation"},
        report={"max_steps": 1, "evaluation": evaluation},
    )
    assert main([str(path)]) == 0
    run = tmp_path / "run"
    assert not moved(weights(run / "model", "vision_tower."), weights(run / "model", "finding_vision_tower."))
    assert results(run)["predictor"]["validation"]["thresholds_fitted_on"] == "validation"
    assert set(results(run)["report"]["evaluation"]["rows"]) == {"model", "images shuffled across studies"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["predictor.vision=lora"],
            "predictor.vision=lora, but the preset tiny has no LoRA of the vision encoder: set "
            "model.overrides.vision_lora to r, lora_alpha",
        ),
        (["report.vision=lora", "report.predictor=full"], "report.vision=lora, but the preset tiny has no LoRA"),
        (["model.overrides.predictor_encoder=mine"], "predictor_encoder='mine': expected one of 'shared', 'own'"),
        (
            ["predictor.vision=lora", "model.overrides.vision_lora={r: 2, target_modules: [query]}"],
            "OTDRGConfig.vision_lora={'r': 2, 'target_modules': ['query']}: Target modules",
        ),
    ],
)
def test_run_recipe_unfit_modes_are_one_line(tiny_recipe, tmp_path, overrides, message, capsys):
    assert main([str(tiny_recipe), f"output_dir={tmp_path / 'run'}", *overrides]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_report_stage_predictor_with_shared_encoder_is_refused(tiny_recipe, trained_run, tmp_path, capsys):
    run = shutil.copytree(trained_run, tmp_path / "run")
    overrides = ["stages=[report]", "report.vision=full", "model.overrides.predictor_encoder=own"]
    assert main([str(tiny_recipe), f"output_dir={run}", *overrides]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"predictor_encoder='own': expected shared, as the predictor of {run / 'predictor'} was trained" in error
