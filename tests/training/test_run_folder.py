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
from otdrg.studies import prepare_studies
from otdrg.studies.build import BuildOptions
from otdrg.studies.fingerprint import fingerprint
from otdrg.train_hf import main
from otdrg.training.callbacks import draw_curves
from otdrg.training.data import build_studies
from otdrg.training.recipe import LabelsRecipe, StudiesRecipe, recipe_from
from otdrg.training.run_folder import commit, differing_splits, hub_dataset
from PIL import Image

PHANTOMS = {"train": 9, "validation": 3, "test": 0, "image_size": 112, "views": ["frontal", "lateral"]}


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


def test_hub_dataset_folder_is_none(tmp_path):
    def named(source, **options):
        return hub_dataset(recipe_from({"output_dir": "run", "studies": {"source": source, "options": options}}))

    assert named("hub", dataset="org/radiographs") == "org/radiographs"
    assert named("hub", dataset=str(tmp_path)) is None
    assert named("phantom", train=3) is None


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


# --- the studies' fingerprint ----------------------------------------------------------------------------------------


def built(**options):
    return build_studies(StudiesRecipe(source="phantom", options={**PHANTOMS, **options}), LabelsRecipe())


def test_fingerprint_other_studies_differ():
    studies = built()
    there = fingerprint(studies)
    assert there == fingerprint(built()) and {split: row["studies"] for split, row in there.items()} == {
        "train": 9,
        "validation": 3,
    }
    # Other reports (text), other views of the same reports, another order.
    assert differing_splits(there, fingerprint({**studies, "train": studies["train"].select(range(8))})) == ["train"]
    assert differing_splits(there, fingerprint(built(image_size=96))) == ["train", "validation"]
    assert fingerprint(built(image_size=96))["train"]["text"] == there["train"]["text"]
    moved = {**studies, "validation": studies["validation"].select([2, 1, 0])}
    assert differing_splits(there, fingerprint(moved)) == ["validation"]
    relabelled = StudiesRecipe(source="phantom", options=PHANTOMS)
    states = fingerprint(build_studies(relabelled, LabelsRecipe(labeler="rules")))
    assert states["train"]["views"] == there["train"]["views"]
    assert differing_splits(there, {"train": there["train"]}) == ["validation"]


def test_fingerprint_moved_studies_are_equal(tmp_path):
    """Built ones, in memory and streamed, here and moved; with some studies left out between others."""
    build = BuildOptions(studies_per_shard=4)
    prepare_studies("phantom", tmp_path / "built", build=build, **PHANTOMS)

    def prints(folder, streaming, limit=None):
        recipe = StudiesRecipe(
            source="prepared", options={"folder": str(folder)}, streaming=streaming, limit=limit or {}
        )
        return fingerprint(build_studies(recipe, LabelsRecipe()))

    mapped, streamed = (prints(tmp_path / "built", streaming) for streaming in (False, True))
    shutil.copytree(tmp_path / "built", tmp_path / "moved")
    assert mapped == prints(tmp_path / "moved", False) and streamed == prints(tmp_path / "moved", True)
    assert differing_splits(mapped, streamed) == []
    assert "views" in mapped["train"] and "shards" in streamed["train"]
    assert differing_splits(streamed, prints(tmp_path / "built", True, {"train": 5})) == ["train"]
    assert fingerprint(built())["train"]["text"] == mapped["train"]["text"]


def test_fingerprint_changed_file_size_differs(tmp_path, views):
    paths = []
    for number, view in enumerate(views[:4]):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(view).save(paths[-1])
    lines = [f"{n},{path.name},The lungs are clear.,train\n" for n, path in enumerate(paths)]
    (tmp_path / "reports.csv").write_text("id,image,findings,split\n" + "".join(lines), encoding="utf-8")
    options = {"table": str(tmp_path / "reports.csv"), "images": str(tmp_path)}

    def prints():
        return fingerprint(build_studies(StudiesRecipe(source="csv", options=options), LabelsRecipe(labeler="rules")))

    before = prints()
    assert before == prints()
    Image.fromarray(views[5][:50]).save(paths[2])
    assert differing_splits(before, prints()) == ["train"]


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
