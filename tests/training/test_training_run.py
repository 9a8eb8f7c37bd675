import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from otdrg.bank_otdrg import ReportBank
from otdrg.modeling_otdrg import OTDRGForReportGeneration
from otdrg.processing_otdrg import OTDRGProcessor
from otdrg.train_hf import main
from otdrg.training.recipe import load_recipe
from safetensors.torch import load_file

FIGURES = {"report_loss", "ot_loss", "ot_marginal_error", "plan_entropy", "epsilon_to_cost", "label_spread"}


def results(run):
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


def training_lines(stage_results):
    return {line["step"]: line for line in stage_results["log_history"] if "loss" in line}


@pytest.fixture
def copied_run(trained_run, tmp_path):
    """A copy of the finished run, to be broken."""
    return shutil.copytree(trained_run, tmp_path / "run")


def test_run_recipe_writes_the_folders_of_its_stages(trained_run):
    assert {path.name for path in trained_run.iterdir()} == {
        "features",
        "predictor",
        "report",
        "model",
        "recipe.yaml",
        "results.json",
        "run.json",
    }
    assert (trained_run / "report" / "checkpoint-4" / "trainer_state.json").is_file()
    assert results(trained_run)["report"]["steps"] == 4
    assert len(results(trained_run)["predictor"]["validation"]["findings"]) == 14
    assert load_recipe(trained_run / "recipe.yaml").report.max_steps == 4


def test_report_stage_log_lines_have_the_transport_figures(trained_run):
    lines = training_lines(results(trained_run)["report"])
    assert sorted(lines) == [1, 2, 3, 4]
    for line in lines.values():
        assert line.keys() >= FIGURES
        assert line["loss"] == pytest.approx(line["report_loss"] + line["ot_weight"] * line["ot_loss"], rel=1e-4)
    assert [lines[step]["ot_weight"] for step in (1, 2, 3, 4)] == pytest.approx([0, 0.05, 0.1, 0.1])
    assert [lines[step]["ot_epsilon"] for step in (1, 2, 3, 4)] == pytest.approx([0.2, 0.1, 0.05, 0.05])
    (evaluation,) = [line for line in results(trained_run)["report"]["log_history"] if "eval_loss" in line]
    assert evaluation["eval_report_loss"] > 0


def test_report_stage_published_model_has_no_adapters(trained_run):
    model = OTDRGForReportGeneration.from_pretrained(trained_run / "model")
    OTDRGProcessor.from_pretrained(trained_run / "model")
    assert model.config.lora is None and not model.has_lora
    assert (model.generation_config.num_beams, model.generation_config.max_new_tokens) == (1, 12)
    assert model.config.ot_epsilon == 0.05


def test_report_stage_frozen_weights_do_not_change(trained_run):
    before = load_file(trained_run / "predictor" / "model.safetensors")
    after = load_file(trained_run / "model" / "model.safetensors")
    for name, weight in before.items():
        changed = not torch.equal(weight, after[name])
        adapted = name.startswith("language_model.") and ("q_proj" in name or "v_proj" in name)
        assert changed == (adapted or name.startswith(("image_projector.", "label_projector."))), name


@pytest.mark.parametrize("cached", [True, False], ids=["features", "images"])
def test_report_stage_run_again_gives_the_same_losses(tiny_recipe, copied_run, cached, caplog):
    first = training_lines(results(copied_run)["report"])
    overrides = ["stages=[report]", f"report.cache_features={str(cached).lower()}"]
    assert main([str(tiny_recipe), f"output_dir={copied_run}", *overrides]) == 0
    found = f"features of 16 studies: 16 views found in {copied_run / 'features'}"
    assert (found in caplog.text and ", 0 to be encoded" in caplog.text) == cached
    again = training_lines(results(copied_run)["report"])
    assert [line["loss"] for line in again.values()] == pytest.approx([line["loss"] for line in first.values()])
    assert "validation" in results(copied_run)["predictor"]


def test_resume_equals_an_unbroken_run(tiny_recipe, trained_run, copied_run):
    # Killed while writing checkpoint-4: Trainer writes its state last.
    (copied_run / "report" / "finished.json").unlink()
    (copied_run / "report" / "checkpoint-4" / "trainer_state.json").unlink()
    weights = copied_run / "report" / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    shutil.rmtree(copied_run / "model")
    predictor = (copied_run / "predictor" / "model.safetensors").stat().st_mtime_ns

    assert main([str(tiny_recipe), f"output_dir={copied_run}", "--resume"]) == 0
    assert (copied_run / "predictor" / "model.safetensors").stat().st_mtime_ns == predictor
    unbroken, resumed = (training_lines(results(run)["report"]) for run in (trained_run, copied_run))
    for step in (3, 4):
        assert resumed[step]["loss"] == pytest.approx(unbroken[step]["loss"], abs=1e-5)
    one, other = (load_file(run / "model" / "model.safetensors") for run in (trained_run, copied_run))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_run_recipe_unfinished_stage_is_not_overwritten(tiny_recipe, copied_run, capsys):
    (copied_run / "report" / "finished.json").unlink()
    arguments = [str(tiny_recipe), f"output_dir={copied_run}", "stages=[report]"]
    assert main(arguments) == 1
    assert "checkpoint-4: --resume continues from there, --overwrite starts it again" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "report.max_steps=2"]) == 0
    assert [path.name for path in (copied_run / "report").glob("checkpoint-*")] == ["checkpoint-2"]


def test_run_recipe_checkpoints_without_optimizer_are_not_deleted(tiny_recipe, copied_run, capsys):
    stage = copied_run / "report"
    (stage / "finished.json").unlink()
    for checkpoint in stage.glob("checkpoint-*"):
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (checkpoint / name).unlink()
    arguments = [str(tiny_recipe), f"output_dir={copied_run}"]
    for more, message in (
        (["stages=[report]"], f"stage report is unfinished, with {stage / 'checkpoint-4'}, which is incomplete"),
        (["--resume"], f"stage report cannot continue from {stage / 'checkpoint-4'}, which lacks its optimizer"),
    ):
        assert main([*arguments, *more]) == 1
        assert message in capsys.readouterr().err
    # A checkpoint of a later stage is none of the stage that continues.
    (copied_run / "predictor" / "finished.json").unlink()
    assert main([*arguments, "--resume"]) == 1
    assert "stage report would start again, after stage predictor" in capsys.readouterr().err
    assert {path.name for path in stage.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


def test_report_stage_non_finite_loss_stops(tiny_recipe, copied_run, capsys):
    shutil.rmtree(copied_run / "report")
    # lambda is 0 in the first step; in the second the loss is beyond float32.
    overrides = ["stages=[report]", "model.overrides.ot_weight=1e41", "report.ot_weight_warmup=1.0"]
    overrides.append("report.save_steps=1")
    assert main([str(tiny_recipe), f"output_dir={copied_run}", *overrides]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train_hf.py: error: step 2 of ") and "the loss is not finite (loss inf" in error
    checkpoint = copied_run / "report" / "checkpoint-1"
    assert f"the last good checkpoint is {checkpoint}" in error
    assert [path.name for path in (copied_run / "report").glob("checkpoint-*")] == ["checkpoint-1"]
    assert all(weight.isfinite().all() for weight in load_file(checkpoint / "model.safetensors").values())


def test_report_stage_without_predictor_is_refused(tiny_recipe, tmp_path, capsys):
    assert main([str(tiny_recipe), f"output_dir={tmp_path / 'run'}", "stages=[report]"]) == 1
    assert "stage report needs a trained predictor" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.preset=large", "unknown preset 'large'"),
        ("model.overrides.ot_epsilonn=1", "unknown OTDRGConfig field 'ot_epsilonn'"),
        ("model.vision=some/encoder", "model.text is missing"),
        ("studies.source=nowhere", "unknown source of studies 'nowhere'"),
        ("studies.limit={test: 3}", "studies.limit names the split test"),
    ],
)
def test_run_recipe_unfit_recipe_is_one_line(tiny_recipe, tmp_path, override, message, capsys):
    assert main([str(tiny_recipe), f"output_dir={tmp_path / 'run'}", override]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_run_recipe_phantom_tiny_losses_are_those_of_its_earlier_fields(tmp_path):
    """Computed before recipes had the names and defaults of TrainingArguments, with the present initial queries."""
    expected = {"ircp": [10.8281, 10.7816], "predictor": [0.80393, 0.82999], "report": [6.44620, 6.66573, 5.68575]}
    batches = {"ircp": 8, "predictor": 8, "report": 4}
    overrides = ["studies.options={train: 16, validation: 0, test: 0}", "predictor.thresholds=none"]
    for stage, losses in expected.items():
        overrides += [f"{stage}.max_steps={len(losses)}", f"{stage}.per_device_train_batch_size={batches[stage]}"]
        overrides += [f"{stage}.logging_steps=1"]
    recipe = Path(__file__).parents[2] / "recipes" / "phantom_tiny.yaml"
    assert main([str(recipe), f"output_dir={tmp_path}", "report.evaluation.split=none", *overrides]) == 0
    for stage, losses in expected.items():
        lines = training_lines(results(tmp_path)[stage])
        assert [line["loss"] for line in lines.values()] == pytest.approx(losses, rel=1e-3), stage


def test_report_stage_with_a_bank_evaluates_and_publishes_consensus_decoding(tiny_recipe, copied_run):
    arguments = ["stages=[report]", "report.candidates=4", "report.bank=true", "report.consensus={seed: 3}"]
    arguments.append("report.suppressed_words=[heart]")
    evaluation = "report.evaluation={split: validation, metrics: [bleu_1], controls: []}"
    assert main([str(tiny_recipe), f"output_dir={copied_run}", *arguments, evaluation, "--overwrite"]) == 0
    bank = ReportBank.load(copied_run / "bank")
    assert bank.counts.sum() == 16
    model, processor = (
        kind.from_pretrained(copied_run / "model") for kind in (OTDRGForReportGeneration, OTDRGProcessor)
    )
    bank.check(model, processor)
    assert model.generation_config.consensus == {"candidates": 4, "seed": 3}
    found = results(copied_run)["report"]["evaluation"]
    assert {"model, without retrieved candidates", "model, without consensus decoding"} <= found["rows"].keys()
    assert found["generation"]["consensus"]["seed"] == 3 and found["generation"]["bank"]["reports"] == len(bank)
    assert not (copied_run / "model" / "bank.json").exists()
    assert "heart" in " ".join(bank.reports)
    with (copied_run / "predictions.csv").open(encoding="utf-8") as file:
        assert not any("heart" in row["report"].split() for row in csv.DictReader(file))
    suppressed = [processor.tokenizer.decode(ids) for ids in model.generation_config.bad_words_ids]
    assert {text.strip() for text in suppressed} == {"heart"}
