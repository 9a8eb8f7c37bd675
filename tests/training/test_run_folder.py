"""A run's folder: run.json, the log of metrics, curves, and reports to trackers."""

import json
import os
import shutil
import subprocess
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import otdrg
import pytest
import transformers
from otdrg.runtime.run_record import commit
from otdrg.train_hf import main
from otdrg.training.callbacks import draw_curves
from PIL import Image


def sittings(run):
    return json.loads((run / "run.json").read_text(encoding="utf-8"))["sittings"]


def metrics(run, stage):
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def log_history(run, stage):
    return json.loads((run / "results.json").read_text(encoding="utf-8"))[stage]["log_history"]


# --- run.json --------------------------------------------------------------------------------------------------------


def test_run_record_sitting_is_complete(trained_run):
    (sitting,) = sittings(trained_run)
    assert sitting["outcome"] == "finished"
    assert sitting["command"] == sys.orig_argv and sitting["seed"] == 42
    assert sitting["versions"]["otdrg"] == otdrg.__version__
    for package in ("torch", "transformers", "peft", "accelerate", "datasets", "timm"):
        assert sitting["versions"][package] == version(package)
    assert (sitting["processes"], sitting["threads"]) == (1, 1)
    assert sitting["device"].partition(" ")[0] in ("cpu", "cuda", "mps", "xpu")
    assert sitting["cores"] == os.cpu_count() and sitting["processor"]
    assert {split: row["studies"] for split, row in sitting["studies"].items()} == {"train": 16, "validation": 5}
    assert {split: row["studies"] for split, row in sitting["data"].items()} == {"train": 16, "validation": 5}
    assert sitting["data"]["train"]["licences"] == ["Apache-2.0"] and sitting["hub_dataset"] is None
    assert list(sitting["stages"]) == ["predictor", "report"]
    for stage, steps in (("predictor", 2), ("report", 4)):
        record = sitting["stages"][stage]
        assert (record["steps"], record["checkpoint"]) == (steps, None)
        began, ended = (datetime.fromisoformat(record[key]) for key in ("began", "ended"))
        assert record["seconds"] == pytest.approx((ended - began).total_seconds()) and record["seconds"] > 0
    assert sitting["seconds"] >= sum(record["seconds"] for record in sitting["stages"].values())


def test_run_record_resumed_run_adds_a_sitting(tiny_recipe, trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    (run / "report" / "finished.json").unlink()
    shutil.rmtree(run / "report" / "checkpoint-4")
    # As a kill behind step 3 leaves it, within the writing of a line.
    lines = (run / "report" / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "report" / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20], encoding="utf-8")
    assert main([str(tiny_recipe), f"output_dir={run}", "--resume"]) == 0
    first, second = sittings(run)
    assert [first] == sittings(trained_run)
    assert list(second["stages"]) == ["report"]
    assert (second["stages"]["report"]["checkpoint"], second["stages"]["report"]["steps"]) == ("checkpoint-2", 4)
    assert second["studies"] == first["studies"]
    assert [line["step"] for line in metrics(run, "report") if "loss" in line] == [1, 2, 3, 4]
    assert metrics(run, "report") == log_history(run, "report")


def test_commit_is_the_checkouts():
    root = Path(otdrg.__file__).parent
    if shutil.which("git") is None or not (root / ".git").exists():
        assert commit() is None
        return

    def git(*arguments):
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True).stdout.strip()

    assert commit() == {"id": git("rev-parse", "HEAD"), "dirty": git("diff", "HEAD", "--name-only") != ""}


# --- the course of a stage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["predictor", "report"])
def test_history_callback_writes_metrics_and_curves(trained_run, stage):
    assert metrics(trained_run, stage) == log_history(trained_run, stage)
    pytest.importorskip("matplotlib")
    with Image.open(trained_run / stage / "curves.png") as picture:
        assert picture.width > 1000 and len(picture.convert("L").getcolors()) > 20


def test_draw_curves_draws_each_figure_once(trained_run, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = draw_curves(log_history(trained_run, "report"), tmp_path / "curves.png", "report")
    assert drawn[0] == "loss" and len(set(drawn)) == len(drawn)
    assert {"report_loss", "ot_loss", "plan_entropy", "learning_rate", "grad_norm"} <= set(drawn)
    assert not {"runtime", "epoch", "step", "train_runtime", "total_flos", "samples_per_second"} & set(drawn)
    many = [{"step": step, "loss": 1 / step, "eval_cider": step / 1e3} for step in range(1, 400)]
    assert draw_curves(many, tmp_path / "many.png", "report") == ["loss", "cider"]
    assert draw_curves([{"step": 3, "train_runtime": 2.0}], tmp_path / "none.png", "report") == []
    assert not (tmp_path / "none.png").exists()


# --- elsewhere -------------------------------------------------------------------------------------------------------


def test_report_to_tensorboard_has_the_transport_figures(tiny_recipe, trained_run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = shutil.copytree(trained_run, tmp_path / "run")
    arguments = [f"output_dir={run}", "stages=[report]", "report_to=[tensorboard]"]
    assert main([str(tiny_recipe), *arguments]) == 0
    (folder,) = {path.parent for path in (run / "report" / "runs").rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    lines = [line for line in metrics(run, "report") if "loss" in line]
    for name in ("ot_loss", "plan_entropy", "epsilon_to_cost", "label_spread", "ot_weight", "ot_epsilon"):
        logged = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert logged == [(line["step"], pytest.approx(line[name], abs=1e-6)) for line in lines]
    assert events.Scalars("eval/report_loss")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "report_to='tensorbord': expected some of azure_ml, "),
        ("trackio", "report_to='trackio': the package trackio is not installed"),
    ],
)
def test_report_to_unavailable_tracker_is_one_line(tiny_recipe, tmp_path, monkeypatch, name, message, capsys):
    monkeypatch.setattr(transformers.integrations.integration_utils, "is_trackio_available", lambda: False)
    assert main([str(tiny_recipe), f"output_dir={tmp_path / 'run'}", f"report_to=[{name}]"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
