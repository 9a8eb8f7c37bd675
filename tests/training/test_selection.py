"""Evaluations during the report stage: reports are generated, scored, and the best checkpoint is kept."""

import csv
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from otdrg.modeling_otdrg import OTDRGForReportGeneration
from otdrg.train_hf import main
from otdrg.training.arguments import WeightedScores
from otdrg.training.collation import StudySampler
from otdrg.training.recipe import load_recipe
from safetensors.torch import load_file

SCORES = st.floats(-10, 10)


@given(bleu=SCORES, cider=SCORES, weight=st.floats(0, 5))
def test_weighted_scores_sum_is_its_arithmetic(bleu, cider, weight):
    found = WeightedScores.parse(f"{weight!r} * bleu_4 - cider + 1e-1*eval_bleu_4")
    assert found.weights.keys() == {"bleu_4", "cider"} and found.trainer_name == "selection"
    assert found({"bleu_4": bleu, "cider": cider, "meteor": None}) == pytest.approx((weight + 0.1) * bleu - cider)


def test_weighted_scores_single_score_keeps_its_name():
    assert WeightedScores.parse("macro_f1_13").trainer_name == "macro_f1_13"
    assert WeightedScores.parse("eval_loss").trainer_name == "loss"
    assert WeightedScores.parse("- loss").trainer_name == "selection"
    assert WeightedScores.parse("2 * loss")({"loss": 3.0}) == 6.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((name, False) for name in ("loss", "invented_comparisons", "ot_marginal_error", "alignment", "macro_ece")),
        *((name, True) for name in ("macro_f1_13", "label_spread", "- loss", "bleu_4 - 0.1 * ot_loss")),
        ("loss + 0.1 * ot_loss", False),
        ("- bleu_4 + unshared_comparisons", False),
        ("plan_entropy", None),
    ],
)
def test_weighted_scores_direction_is_that_of_the_scores(text, expected):
    scores = WeightedScores.parse(text)
    scores.check(scores.weights)
    assert scores.higher_is_better is expected


@pytest.mark.parametrize(
    "text", ["", "0.5 *", "2 + 3", "__import__('os')", "bleu_4 ** 2", "bleu_4 cider", "a.b", "1e999 * bleu_4", "+"]
)
def test_weighted_scores_other_text_is_refused(text):
    with pytest.raises(ValueError, match="expected a weighted sum of scores"):
        WeightedScores.parse(text)


def test_weighted_scores_undefined_score_is_named():
    with pytest.raises(ValueError, match="this evaluation has no score 'meteor'"):
        WeightedScores.parse("meteor + cider")({"meteor": None, "cider": 1.0})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("report.metric_for_best_model=bleu5", "report.metric_for_best_model='bleu5': unknown score 'bleu5', did you"),
        (
            "report.metric_for_best_model=cider ** 2",
            "report.metric_for_best_model='cider ** 2': expected a weighted sum",
        ),
        ("report.early_stopping_patience=0", "report.early_stopping_patience=0: expected a number of at least 1"),
        ("report.save_strategy=no", "report.save_strategy='no': expected steps or epoch"),
        (
            "report.save_total_limit=1",
            "report.save_total_limit=1: expected at least 2, or null: the best checkpoint and",
        ),
        (
            "report.train_sampling_strategy=1",
            "report.train_sampling_strategy=1: expected one of random, sequential, group",
        ),
    ],
)
def test_report_arguments_wrong_field_is_one_line(tiny_recipe, tmp_path, override, message, capsys):
    assert main([str(tiny_recipe), f"output_dir={tmp_path / 'run'}", override]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and not (tmp_path / "run").exists()


def evaluations(run):
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))["report"]
    return results, {line["step"]: line for line in results["log_history"] if "eval_selection" in line}


@pytest.fixture(scope="module")
def selected_run(tiny_recipe, trained_run, tmp_path_factory):
    """A run whose metric never changes, so that its first evaluation is the best."""
    run = tmp_path_factory.mktemp("selected") / "run"
    shutil.copytree(trained_run / "predictor", run / "predictor")
    overrides = ["stages=[report]", "report.eval_strategy=steps", "report.eval_steps=1", "report.save_steps=3"]
    overrides += ["report.max_steps=6", "report.max_eval_samples=3", "report.early_stopping_patience=3"]
    overrides += ["report.metric_for_best_model=0 * macro_f1_13 - 0 * loss", "report.learning_rate=1e-2"]
    overrides += ["report.train_sampling_strategy=group_by_length"]
    assert main([str(tiny_recipe), f"output_dir={run}", *overrides]) == 0
    return run


def test_report_stage_evaluations_have_scores_and_reports(selected_run):
    results, lines = evaluations(selected_run)
    names = ("bleu_1", "bleu_4", "rouge_l", "cider", "macro_f1_13", "selection", "report_loss", "ot_loss", "loss")
    for step, line in lines.items():
        assert line.keys() >= {f"eval_{name}" for name in names} and "eval_meteor" not in line
        with (selected_run / "report" / "validation" / f"step-{step:06d}.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 3 and {"id", "reference", "report", "cider", "predicted edema"} <= rows[0].keys()
    assert results["best"] == {"step": 1, "metric": "0 * macro_f1_13 - 0 * loss", "value": 0.0}


def test_report_stage_without_a_new_best_stops_early(selected_run):
    results, lines = evaluations(selected_run)
    assert sorted(lines) == [1, 2, 3, 4] and results["steps"] == 4


def test_report_stage_publishes_the_best_checkpoint(selected_run):
    report = selected_run / "report"
    # The best and the last are kept, whatever else is saved.
    assert {path.name for path in report.glob("checkpoint-*")} >= {"checkpoint-1", "checkpoint-4"}
    published = load_file(selected_run / "model" / "model.safetensors")
    best, last = (load_file(report / f"checkpoint-{step}" / "model.safetensors") for step in (1, 4))
    weight = "image_projector.linear.weight"
    assert torch.equal(published[weight], best[weight]) and not torch.equal(published[weight], last[weight])
    merged = OTDRGForReportGeneration.from_pretrained(report / "checkpoint-1")
    merged.merge_lora()
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(tensor, published[name], atol=1e-6), name


def test_length_sampler_order_depends_on_the_epoch_only():
    lengths = [(37 * position) % 101 for position in range(120)]
    sampler = StudySampler(len(lengths), 5, 4, lengths)
    first = list(sampler)
    assert sorted(first) == list(range(120)) and list(sampler) == first

    def padding(order):
        batches = [[lengths[position] for position in order[start : start + 4]] for start in range(0, 120, 4)]
        return sum(4 * max(batch) - sum(batch) for batch in batches)

    assert padding(first) < 0.3 * padding(range(120))
    longest = [max(lengths[position] for position in first[start : start + 4]) for start in range(0, 120, 4)]
    assert longest[0] == max(lengths) and longest != sorted(longest, reverse=True)
    torch.rand(1)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert sorted(StudySampler(10, 5, 4, lengths[:10])) == list(range(10))
    assert sorted(StudySampler(3, 5, 4, lengths[:3])) == list(range(3))


def losses(run):
    lines = json.loads((run / "results.json").read_text(encoding="utf-8"))["report"]["log_history"]
    return [line["loss"] for line in lines if "loss" in line]


def train_report(tiny_recipe, trained_run, run, *overrides):
    shutil.copytree(trained_run / "predictor", run / "predictor", dirs_exist_ok=True)
    arguments = [str(tiny_recipe), f"output_dir={run}", "stages=[report]", "report.eval_strategy=no", *overrides]
    assert main(arguments) == 0
    return losses(run)


def test_length_sampler_resumed_in_the_second_epoch_equals_unbroken(tiny_recipe, trained_run, tmp_path):
    overrides = ["report.train_sampling_strategy=group_by_length", "report.max_steps=8"]
    overrides += ["report.abnormal_study_weight=2.5", "report.abnormal_sentence_weight=2.5"]
    overrides += ["model.overrides.finding_state_dropout=0.1", "model.overrides.image_dropout=0.2"]
    unbroken = train_report(tiny_recipe, trained_run, tmp_path / "run", *overrides)
    shutil.rmtree(tmp_path / "run" / "report" / "checkpoint-8")
    (tmp_path / "run" / "report" / "finished.json").unlink()
    resumed = train_report(tiny_recipe, trained_run, tmp_path / "run", "--resume", *overrides)
    assert resumed == pytest.approx(unbroken, abs=1e-5)


def test_gradient_checkpointing_gives_the_same_losses(tiny_recipe, trained_run, tmp_path):
    plain = train_report(tiny_recipe, trained_run, tmp_path / "plain")
    checkpointed = train_report(tiny_recipe, trained_run, tmp_path / "other", "report.gradient_checkpointing=true")
    assert checkpointed == pytest.approx(plain, abs=1e-4)


@pytest.mark.slow
def test_torch_compile_gives_the_same_losses(tiny_recipe, trained_run, tmp_path):
    plain = train_report(tiny_recipe, trained_run, tmp_path / "plain", "report.max_steps=2")
    compiled = train_report(
        tiny_recipe, trained_run, tmp_path / "other", "report.max_steps=2", "report.torch_compile=true"
    )
    assert compiled == pytest.approx(plain, abs=1e-3)


def test_load_model_reads_switches_from_the_recipe(tiny_recipe, trained_run, tmp_path):
    overrides = ["model.overrides.fiot=false", "model.overrides.ot_weight=0.3", "report.max_steps=1"]
    train_report(tiny_recipe, trained_run, tmp_path / "run", *overrides)
    model = OTDRGForReportGeneration.from_pretrained(tmp_path / "run" / "model")
    assert (model.config.fiot, model.config.dle, model.config.ot_weight) == (False, True, 0.3)
    assert not hasattr(model, "label_projector")
    processor = json.loads((tmp_path / "run" / "model" / "processor_config.json").read_text(encoding="utf-8"))
    assert processor["fiot"] is False and model.config.finding_token_id not in model.config.prompt_token_ids
    predictor = load_file(trained_run / "predictor" / "model.safetensors")
    assert torch.equal(model.finding_predictor.queries.weight, predictor["finding_predictor.queries.weight"])
    assert load_recipe(tmp_path / "run" / "recipe.yaml").model.overrides["fiot"] is False


def test_report_stage_schedule_on_a_plateau_follows_the_metric(tiny_recipe, trained_run, tmp_path):
    overrides = ["report.lr_scheduler_type=reduce_lr_on_plateau", "report.lr_scheduler_kwargs={patience: 0}"]
    overrides += ["report.load_best_model_at_end=false", "report.metric_for_best_model=-loss"]
    overrides += ["report.eval_strategy=steps", "report.eval_steps=1", "report.learning_rate=1e-5"]
    train_report(tiny_recipe, trained_run, tmp_path / "run", *overrides)
    lines = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))["report"]["log_history"]
    for line in lines:
        if "eval_loss" in line:
            assert line["eval_selection"] == -line["eval_loss"] < 0
    # The loss rises with lambda, so the rate falls after each evaluation but the first.
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates == pytest.approx([1e-5, 1e-5, 1e-6, 1e-7])


def test_report_stage_metric_for_best_model_loss_selects_the_lowest(tiny_recipe, trained_run, tmp_path):
    overrides = ["report.eval_strategy=steps", "report.eval_steps=2", "report.metric_for_best_model=loss"]
    train_report(tiny_recipe, trained_run, tmp_path / "run", *overrides)
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))["report"]
    losses = {line["step"]: line["eval_loss"] for line in results["log_history"] if "eval_loss" in line}
    step = min(losses, key=losses.get)
    assert len(losses) == 2
    assert results["best"] == {"step": step, "metric": "loss", "value": pytest.approx(losses[step])}
