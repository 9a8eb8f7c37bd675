"""Runs that are ended from outside: what they say, and that they go on as if nothing had been.

Long, because each way of ending a run has to be brought about in a process of its own.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager

import pytest
import torch
import transformers.modeling_utils
import yaml
from otdrg.train_hf import main
from otdrg.training.collation import ReportCollator
from otdrg.training.trainer import StageTrainer
from safetensors.torch import load_file
from transformers import TrainerState

#: Both stages: 16 studies in batches of 2, two of them a step, so 4 steps an epoch; checkpoint-3 lies within one.
STAGE = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 2,
}

RUN = "import sys; from otdrg.train_hf import main; sys.exit(main(sys.argv[1:]))"

# Runs a recipe until it is killed: by the N-th backward pass, or when a file has been half written for the N-th time.
UNTIL_KILLED = """
import os, signal, sys
import torch
import transformers.modeling_utils
from transformers import TrainerState

what, last = sys.argv[1], int(sys.argv[2])
calls = 0

def killing(function, path_of):
    def call(*arguments, **options):
        global calls
        result = function(*arguments, **options)
        path = path_of(arguments)
        calls += os.path.basename(str(path)) == what
        if calls == last:
            if os.path.isfile(path):
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

torch.Tensor.backward = killing(torch.Tensor.backward, lambda arguments: "backward")
torch.save = killing(torch.save, lambda arguments: arguments[1])
TrainerState.save_to_json = killing(TrainerState.save_to_json, lambda arguments: arguments[1])
save_file = transformers.modeling_utils.safe_save_file
transformers.modeling_utils.safe_save_file = killing(save_file, lambda arguments: arguments[1])

from otdrg.train_hf import main

sys.exit(main(sys.argv[3:]))
"""


def write_recipe(tiny_recipe, tiny_dinov2, folder):
    """A trained DINOv2 and LoRA, dropout in both stages."""
    recipe = yaml.safe_load(tiny_recipe.read_text(encoding="utf-8"))
    overrides = recipe["model"]["overrides"]
    overrides |= {"vision_config": tiny_dinov2, "predictor_dropout": 0.1}
    overrides["text_config"] |= {"attention_dropout": 0.1}
    recipe["predictor"] |= {**STAGE, "vision": "full"}
    recipe["report"] |= {**STAGE, "eval_strategy": "no"}
    recipe["output_dir"] = str(folder / "run")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def recipe(tiny_recipe, tiny_dinov2, tmp_path_factory):
    return write_recipe(tiny_recipe, tiny_dinov2, tmp_path_factory.mktemp("restart"))


@pytest.fixture(scope="module")
def unbroken(recipe):
    """Folder of a run that nothing happened to."""
    assert main([str(recipe)]) == 0
    return recipe.parent / "run"


@pytest.fixture
def copied(unbroken, tmp_path):
    """A copy of it whose report stage is unfinished, with both of its checkpoints."""
    run = shutil.copytree(unbroken, tmp_path / "run")
    (run / "report" / "finished.json").unlink()
    shutil.rmtree(run / "model")
    return run


@pytest.fixture
def until_killed(start_process):
    """Starts a run that kills itself; returns what it printed on standard error."""

    def until_killed(what, count, *arguments):
        process = start_process(["-c", UNTIL_KILLED, what, count, *arguments])
        _, error = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, error[-2000:]
        return error

    return until_killed


def losses(run, stage):
    """Losses of training by step, and of validation, as `metrics.jsonl` has them."""
    lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = {line["step"]: line["loss"] for line in lines if "loss" in line}
    evaluated = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    return trained, evaluated


def assert_as_unbroken(run, unbroken):
    for stage in ("predictor", "report"):
        for resumed, expected in zip(losses(run, stage), losses(unbroken, stage), strict=True):
            assert resumed == pytest.approx(expected, abs=1e-5)
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))[stage]
        assert results["steps"] == 6
    for folder in ("predictor", "model"):
        one, other = (load_file(path / folder / "model.safetensors") for path in (run, unbroken))
        assert one.keys() == other.keys()
        for name, weight in one.items():
            assert torch.allclose(weight, other[name], atol=1e-6), name


@contextmanager
def trainable_names(monkeypatch):
    """Yields, stage by stage, the names of the parameters that are trained when a training begins."""
    seen, train = [], StageTrainer.train

    def watched(self, *arguments, **options):
        seen.append({name for name, parameter in self.model.named_parameters() if parameter.requires_grad})
        return train(self, *arguments, **options)

    monkeypatch.setattr(StageTrainer, "train", watched)
    yield seen


# --- killed ----------------------------------------------------------------------------------------------------------


def test_run_killed_twice_resumes_to_the_same_losses(recipe, unbroken, until_killed, tmp_path, monkeypatch, caplog):
    """While a checkpoint of a trained DINOv2 is written, whose weights have other names on the Hub; then in a step."""
    run = tmp_path / "run"
    until_killed("optimizer.pt", 2, recipe, f"output_dir={run}")
    assert (run / "predictor" / "checkpoint-6" / "optimizer.pt").is_file()
    # 6 backward passes of the predictor stage from checkpoint-3; the 16th is the second of the report stage's step 5.
    error = until_killed("backward", 16, recipe, f"output_dir={run}", "--resume")
    assert f"removing {run / 'predictor' / 'checkpoint-6'}, which is incomplete" in error
    assert f"resuming from {run / 'predictor' / 'checkpoint-3'}" in error
    assert "missing keys" not in error
    assert list(losses(run, "report")[0]) == [1, 2, 3, 4]
    with trainable_names(monkeypatch) as trained:
        assert main([str(recipe), f"output_dir={run}", "--resume"]) == 0
    assert f"resuming from {run / 'report' / 'checkpoint-3'}" in caplog.text
    assert_as_unbroken(run, unbroken)
    (names,) = trained
    assert {name.split(".")[0] for name in names} == {"image_projector", "label_projector", "language_model"}
    assert all("lora_" in name for name in names if name.startswith("language_model."))
    before, after = (load_file(run / folder / "model.safetensors") for folder in ("predictor", "model"))
    for name, weight in before.items():
        if name.startswith(("vision_tower.", "finding_predictor.")):
            assert torch.equal(weight, after[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "count", "stage", "checkpoint"),
    [
        ("model.safetensors", 1, "predictor", None),
        ("model.safetensors", 2, "predictor", 3),
        ("model.safetensors", 5, "report", 3),
        ("scheduler.pt", 3, "report", None),
        ("rng_state.pth", 4, "report", 3),
        ("trainer_state.json", 4, "report", 3),
        # What is published, behind the last checkpoint.
        ("model.safetensors", 6, "report", 6),
    ],
)
def test_run_killed_while_any_file_is_written_resumes(
    recipe, unbroken, until_killed, tmp_path, caplog, what, count, stage, checkpoint
):
    run = tmp_path / "run"
    until_killed(what, count, recipe, f"output_dir={run}")
    assert main([str(recipe), f"output_dir={run}", "--resume"]) == 0
    if checkpoint is None:
        assert "resuming from" not in caplog.text
    else:
        assert f"resuming from {run / stage / f'checkpoint-{checkpoint}'}" in caplog.text
    assert_as_unbroken(run, unbroken)


@pytest.mark.slow
def test_run_killed_at_random_times_resumes(recipe, unbroken, start_process, tmp_path):
    run, moments = tmp_path / "run", random.Random(0)
    for _ in range(6):
        process = start_process(["-c", RUN, recipe, f"output_dir={run}", "--resume"])
        try:
            process.communicate(timeout=moments.uniform(2, 14))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    assert main([str(recipe), f"output_dir={run}", "--resume"]) == 0
    assert_as_unbroken(run, unbroken)


def test_run_killed_after_the_last_checkpoint_resumes(recipe, unbroken, copied):
    assert main([str(recipe), f"output_dir={copied}", "--resume"]) == 0
    assert_as_unbroken(copied, unbroken)


# --- ended with a word -----------------------------------------------------------------------------------------------


@contextmanager
def at_backward(monkeypatch, number, act):
    """Act behind the backward pass of this number."""
    backward, calls = torch.Tensor.backward, 0

    def counted(*arguments, **options):
        nonlocal calls
        backward(*arguments, **options)
        calls += 1
        if calls == number:
            act()

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", counted)
        yield


def outcome(run):
    return json.loads((run / "run.json").read_text(encoding="utf-8"))["sittings"][-1]["outcome"]


def error_lines(capsys):
    """What stands on standard error behind the last progress bar."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "train_hf.py:" in line or "Traceback" in line]
    assert len(lines) == 1
    return lines[0]


def test_run_sigterm_names_the_last_checkpoint(recipe, start_process, tmp_path):
    run = tmp_path / "run"
    # Long enough that it is still running when the checkpoint has been seen.
    process = start_process(["-c", RUN, recipe, f"output_dir={run}", "stages=[predictor]", "predictor.max_steps=2000"])
    checkpoint, deadline = run / "predictor" / "checkpoint-3", time.monotonic() + 120
    while not (checkpoint / "trainer_state.json").is_file() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in error
    # A progress bar that was cut off in an evaluation may still be wiped away behind it.
    last = [line for line in error.splitlines() if line.startswith("train_hf.py: ")][-1]
    assert last.startswith("train_hf.py: terminated (SIGTERM); the last good checkpoint is ")
    assert str(run / "predictor" / "checkpoint-") in last and last.endswith("--resume continues from there")
    assert outcome(run) == "terminated (SIGTERM)"


def test_run_ctrl_c_names_the_last_checkpoint(recipe, copied, monkeypatch, capsys):
    shutil.rmtree(copied / "report" / "checkpoint-6")
    # A shell's background jobs, and what they start, ignore Ctrl-C by default.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with at_backward(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGINT)):
            assert main([str(recipe), f"output_dir={copied}", "--resume"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    checkpoint = copied / "report" / "checkpoint-3"
    line = f"train_hf.py: interrupted; the last good checkpoint is {checkpoint}, --resume continues"
    assert error_lines(capsys).startswith(line)
    assert outcome(copied) == "interrupted"


@contextmanager
def small_disk(folder):
    """Mounts 30 MB at a folder; yields what fills them but for 4 KB, and what makes room again."""
    ballast = folder / "ballast"

    def fill():
        ballast.write_bytes(b"0" * max(0, shutil.disk_usage(folder).free - 4096))

    command = ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield fill, ballast.unlink
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def small_files(folder):
    """The same with a limit to the size of files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def restore():
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1])), restore
    finally:
        restore()


@pytest.mark.parametrize(
    ("limited", "module", "writer", "name", "reason"),
    [
        pytest.param(
            *(
                small_disk,
                transformers.modeling_utils,
                "safe_save_file",
                "model.safetensors",
                "No space left on device",
            ),
            marks=pytest.mark.slow,
        ),
        (small_files, torch, "save", "optimizer.pt", "a file could not be written to its end"),
        pytest.param(
            *(small_files, TrainerState, "save_to_json", "trainer_state.json", "File too large"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_run_full_disk_names_the_last_checkpoint(
    recipe, unbroken, tmp_path, monkeypatch, capsys, limited, module, writer, name, reason
):
    """Full from the moment at which a file of checkpoint-6 is to be written."""
    folder = tmp_path / "disk"
    folder.mkdir()
    write = getattr(module, writer)
    with limited(folder) as (fill, make_room):

        def filling(content, path, *arguments, **options):
            if os.path.basename(path) == name:
                fill()
            return write(content, path, *arguments, **options)

        run = shutil.copytree(unbroken, folder / "run")
        (run / "report" / "finished.json").unlink()
        shutil.rmtree(run / "report" / "checkpoint-6")
        monkeypatch.setattr(module, writer, filling)
        assert main([str(recipe), f"output_dir={run}", "--resume"]) == 1
        line = error_lines(capsys)
        assert line.startswith(f"train_hf.py: error: cannot write to {run / 'report'}: {reason}; ")
        assert "MB are free there" in line
        assert f"the last good checkpoint is {run / 'report' / 'checkpoint-3'}, --resume continues from there" in line

        monkeypatch.undo()
        make_room()
        assert main([str(recipe), f"output_dir={run}", "--resume"]) == 0
        assert_as_unbroken(run, unbroken)


def test_run_dead_data_worker_names_the_last_checkpoint(recipe, unbroken, copied, monkeypatch, capsys):
    collate = ReportCollator.__call__

    def killed(self, rows):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return collate(self, rows)

    shutil.rmtree(copied / "report" / "checkpoint-6")
    arguments = [str(recipe), f"output_dir={copied}", "--resume", "report.dataloader_num_workers=1"]
    with monkeypatch.context() as patch:
        patch.setattr(ReportCollator, "__call__", killed)
        assert main(arguments) == 1
    line = error_lines(capsys)
    assert line.startswith("train_hf.py: error: a process that loads studies died: DataLoader worker (pid")
    assert f"the last good checkpoint is {copied / 'report' / 'checkpoint-3'}" in line
    assert main(arguments) == 0
    assert_as_unbroken(copied, unbroken)


def test_run_error_in_data_worker_is_one_line(recipe, copied, monkeypatch, capsys):
    def fail(self, rows):
        raise ValueError("study 7: its view is broken")

    monkeypatch.setattr(ReportCollator, "__call__", fail)
    shutil.rmtree(copied / "report" / "checkpoint-6")
    assert main([str(recipe), f"output_dir={copied}", "--resume", "report.dataloader_num_workers=1"]) == 1
    assert error_lines(capsys) == "train_hf.py: error: study 7: its view is broken"


def test_run_other_error_is_raised_unchanged(recipe, copied, monkeypatch):
    def fail():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    shutil.rmtree(copied / "report" / "checkpoint-6")
    with at_backward(monkeypatch, 1, fail), pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes"):
        main([str(recipe), f"output_dir={copied}", "--resume"])
    assert outcome(copied) == "RuntimeError: mat1 and mat2 shapes cannot be multiplied"


# --- with another recipe ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--resume", "predictor.learning_rate=1e-4"],
            "stage predictor of {run} was trained with another recipe: predictor.learning_rate=0.001 then, 0.0001 now; "
            "restore the recipe, or stages=[predictor,report] --overwrite trains it again",
        ),
        (
            ["--resume", "report.learning_rate=1e-4", "model.overrides.fiot=false"],
            "stage report of {run} was begun with another recipe: model.overrides.fiot=unset then, False now; "
            "report.learning_rate=0.001 then, 0.0001 now; restore the recipe, or stages=[report] --overwrite",
        ),
        (
            ["stages=[report]", "--overwrite", "model.overrides.image_tokens=4"],
            "stage predictor of {run} was trained with another recipe: model.overrides.image_tokens=9 then, 4 now; "
            "restore the recipe, or stages=[predictor,report] --overwrite",
        ),
        (
            ["--resume", "studies.options.train=15"],
            "stage predictor of {run} was trained on other studies (train 16 then, 15 now; studies.options.train=16 "
            "then, 15 now): restore them",
        ),
    ],
)
def test_resume_changed_recipe_is_refused(recipe, copied, capsys, arguments, message):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    assert main([str(recipe), f"output_dir={copied}", *arguments]) == 1
    assert f"train_hf.py: error: {message.format(run=copied)}" in error_lines(capsys)
    assert before == {path: path.stat().st_mtime_ns for path in copied.rglob("*")}


def test_resume_finished_run_changed_recipe_is_refused(recipe, unbroken, capsys):
    assert main([str(recipe), "--resume", "report.generation.num_beams=2"]) == 1
    assert "report.generation.num_beams=1 then, 2 now" in error_lines(capsys)
    assert main([str(recipe), "--resume", "report.logging_steps=5"]) == 0


def test_resume_longer_stage_continues(recipe, unbroken, copied, caplog):
    shutil.rmtree(copied / "report" / "checkpoint-6")
    arguments = ["report.max_steps=7", "report.save_total_limit=3", "report.lr_scheduler_type=cosine"]
    assert main([str(recipe), f"output_dir={copied}", "--resume", *arguments]) == 0
    changed = "report.max_steps=6 then, 7 now; report.save_total_limit=2 then, 3 now"
    assert f"stage report continues with another recipe: {changed}" in caplog.text
    trained, _ = losses(copied, "report")
    assert list(trained) == [1, 2, 3, 4, 5, 6, 7]
    for step in (1, 2, 3):
        assert trained[step] == losses(unbroken, "report")[0][step]


def test_resume_origin_trained_again_is_refused(recipe, copied, capsys):
    finished = copied / "predictor" / "finished.json"
    finished.write_text(json.dumps({"steps": 6, "ended": "later"}), encoding="utf-8")
    assert main([str(recipe), f"output_dir={copied}", "--resume"]) == 1
    assert f"stage report of {copied} began from an earlier run of stage predictor" in error_lines(capsys)
