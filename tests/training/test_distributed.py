"""Two CPU processes give what one gives, and what was asked for is what runs."""

import csv
import json
import shutil

import pytest
from otdrg.train_hf import main

# Noise that each process would draw for itself, and losses that compare the studies of one process's batch, are off.
SAME = [
    "model.overrides.lora.lora_dropout=0.0",
    "model.overrides.vision_config.model_args.drop_path_rate=0.0",
    "report.evaluation={split: validation, metrics: [bleu_4, rouge_l], controls: [true_states]}",
    "report.ot_weight_warmup=0.0",
    "report.learning_rate=1e-2",
]


def results(run):
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


def lines(run, stage, field):
    return [line for line in results(run)[stage]["log_history"] if field in line]


def predictions(run):
    with (run / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def one_process(tiny_recipe, tmp_path_factory):
    run = tmp_path_factory.mktemp("one")
    assert main([str(tiny_recipe), f"output_dir={run}", *SAME]) == 0
    return run


@pytest.fixture(scope="module")
def two_processes(tiny_recipe, tmp_path_factory, launch):
    run = tmp_path_factory.mktemp("two")
    batches = ["predictor.batch_size=2", "report.batch_size=2"]
    launch(["-m", "otdrg.train_hf", str(tiny_recipe), f"output_dir={run}", *SAME, *batches], OMP_NUM_THREADS="1")
    return run


def assert_same(one, two, stage, field, names):
    for single, joined in zip(lines(one, stage, field), lines(two, stage, field), strict=True):
        for name in {*names} & {*single}:
            assert joined[name] == pytest.approx(single[name], abs=1e-3), name


@pytest.mark.parametrize("stage", ["predictor", "report"])
def test_two_processes_train_as_one(one_process, two_processes, stage):
    for run, told in ((one_process, (1, None)), (two_processes, (2, "DistributedDataParallel"))):
        assert (results(run)[stage]["processes"], results(run)[stage]["wrapper"]) == told
    assert_same(one_process, two_processes, stage, "loss", ("loss", "report_loss", "ot_loss", "grad_norm"))


def test_accumulated_batches_train_as_one(tiny_recipe, one_process, tmp_path):
    shutil.copytree(one_process / "predictor", tmp_path / "predictor")
    batches = ["report.batch_size=2", "report.gradient_accumulation=2", "stages=[report]"]
    assert main([str(tiny_recipe), f"output_dir={tmp_path}", *SAME, *batches]) == 0
    assert_same(one_process, tmp_path, "report", "loss", ("loss", "report_loss", "ot_loss", "grad_norm"))


def test_validation_counts_every_study_once(one_process, two_processes):
    """Of 5 studies in batches of 4 and of 2, the last of which two processes fill up with studies seen before."""
    assert_same(one_process, two_processes, "predictor", "eval_loss", ("eval_loss", "eval_macro_auc"))
    assert_same(one_process, two_processes, "report", "eval_loss", ("eval_loss", "eval_report_loss", "eval_ot_loss"))
    one, two = (results(run)["predictor"]["validation"] for run in (one_process, two_processes))
    assert two["findings"]["edema"]["studies"] == 5 and one == two


def test_reports_are_there_once_and_the_same(one_process, two_processes):
    one, two = (predictions(run) for run in (one_process, two_processes))
    assert len({row["id"] for row in two}) == len(two) == 5
    assert one == two and len({row["report"] for row in one}) > 1
