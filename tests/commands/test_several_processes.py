"""Commands in several processes: they write what one process writes, also after they were killed."""

import json
import os
import time
from pathlib import Path

import pytest
from otdrg.cli import main
from otdrg.studies import prepare_studies

FEW = ["--num-beams", "1", "--max-new-tokens", "6"]
ALONE = {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def listed(paths, tmp_path):
    """A list of seven studies, of which one has given findings."""
    studies = [{"id": f"s{number}", "images": paths[number % 3 : 3]} for number in range(7)]
    studies[3]["findings"] = {"edema": "positive"}
    path = tmp_path / "list"
    path.write_text("\n".join(map(json.dumps, studies)))
    return path


def bytes_of(folder):
    """The files of a folder but those of the feature cache; hidden ones among them, because none may be left."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_relative_to(folder / "features")
    }


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(FEW, id="greedy"),
        pytest.param(["--candidates", "4", "--max-new-tokens", "6"], id="consensus", marks=pytest.mark.slow),
    ],
)
def test_generate_two_processes_write_the_same_file(run_folder, listed, launch, tmp_path, more):
    command = ["generate", str(run_folder), "--studies", str(listed), "--batch-size", "2", *more, "--output"]
    assert main([*command, str(tmp_path / "one" / "reports.jsonl")]) == 0
    printed = launch(["-m", "otdrg", *command, tmp_path / "two" / "reports.jsonl"], **ALONE)
    assert printed == ["", ""]
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")


SLOW = """
import sys, time
from otdrg.inference import records
whole = records.study_records
def slow(*arguments):
    found = whole(*arguments)
    time.sleep(0.5)
    return found
records.study_records = slow
from otdrg.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("others", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_generate_killed_in_two_processes_is_finished_by_another_number(
    run_folder, listed, launch, start_together, tmp_path, capsys, others
):
    command = ["generate", str(run_folder), "--studies", str(listed), *FEW, "--output"]
    assert main([*command, str(tmp_path / "whole" / "reports.jsonl")]) == 0
    killed = tmp_path / "killed"
    processes = start_together(["-c", SLOW, *command, killed / "reports.jsonl"], **ALONE)
    parts = [killed / "reports.jsonl", killed / ".reports.jsonl.part1"]
    deadline = time.monotonic() + 120
    while not all(path.exists() and path.read_bytes() for path in parts) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.wait()
    found = sum(path.read_bytes().count(b"\n") for path in parts)
    assert 2 <= found < 7
    with parts[1].open("a") as part:
        part.write('{"id": "s6", "repo')
    capsys.readouterr()
    assert main([*command, str(killed / "reports.jsonl")]) == 1
    assert "reports.jsonl exists: --resume continues it" in capsys.readouterr().err
    if others == 1:
        assert main([*command, str(killed / "reports.jsonl"), "--resume"]) == 0
        assert f"{7 - found} reports written, {found} were there" in capsys.readouterr().err
    else:
        launch(["-m", "otdrg", *command, killed / "reports.jsonl", "--resume"], others, **ALONE)
    assert bytes_of(killed) == bytes_of(tmp_path / "whole")


FAILING = """
import os, sys
import torch
from otdrg.inference import records
whole = records.study_records
def failing(pipe, studies, *more):
    if os.environ["RANK"] == "1" and studies[0].id == "s3":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    return whole(pipe, studies, *more)
records.study_records = failing
from otdrg.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run_together(processes):
    """Exit statuses, and what all of them printed to the error stream."""
    errors = [process.communicate(timeout=200)[1] for process in processes]
    return [process.returncode for process in processes], "".join(errors)


def test_error_in_one_process_ends_all_with_one_line(run_folder, listed, start_together, tmp_path):
    output = tmp_path / "out" / "reports.jsonl"
    command = ["generate", str(run_folder), "--studies", str(listed), *FEW, "--output", str(output)]
    statuses, error = run_together(start_together(["-c", FAILING, *command], **ALONE))
    assert statuses == [1, 1]
    lines = [line for line in error.splitlines() if "study/s" not in line]
    assert lines == [
        "otdrg generate: error: out of memory (CUDA out of memory): use a smaller batch, fewer beams or candidates, "
        "shorter reports, or a smaller dtype or quantization of the weights"
    ]
    # What was finished is kept.
    assert main([*command, "--resume"]) == 0
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == [f"s{n}" for n in range(7)]
    assert sorted(os.listdir(output.parent)) == ["reports.jsonl", "reports.settings.json"]
    wrong = ["-m", "otdrg", "generate", tmp_path / "nowhere", "--studies", listed]
    statuses, error = run_together(start_together(wrong, **ALONE))
    assert statuses == [1, 1] and error.count("\n") == 1 and "nowhere" in error


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "otdrg prepare runs in one process: start it without accelerate launch"),
        ({"ACCELERATE_USE_CPU": "true", "MASTER_PORT": "1"}, "was asked for several processes and started one"),
    ],
)
def test_wrong_launch_is_one_line(monkeypatch, capsys, tmp_path, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["prepare", "phantom", "--output", str(tmp_path / "built")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("otdrg prepare: error: ") and message in error and error.count("\n") == 1


EVALUATE = ["--num-beams", "1", "--max-new-tokens", "8", "--metrics", "bleu_1", "--bootstrap", "20", "--floor", "1"]
EVALUATE += ["--batch-size", "2"]


def test_evaluate_two_processes_write_the_same_files(trained_run, launch, tmp_path):
    command = ["evaluate", str(trained_run), *EVALUATE, "--output"]
    assert main([*command, str(tmp_path / "one")]) == 0
    launch(["-m", "otdrg", *command, tmp_path / "two"], **ALONE)
    one = bytes_of(tmp_path / "one")
    assert {"evaluation.json", "predictions.csv", "reports/model.jsonl", "reports/flipped.jsonl"} <= one.keys()
    assert bytes_of(tmp_path / "two") == one
    # As two processes that were killed leave it.
    reports = tmp_path / "one" / "reports"
    lines = (reports / "model.jsonl").read_text().splitlines(keepends=True)
    (reports / "model.jsonl").write_text(lines[0])
    (reports / ".model.jsonl.part1").write_text(lines[2] + lines[3][:40])
    (reports / "flipped.jsonl").unlink()
    assert main([*command, str(tmp_path / "one")]) == 0
    assert bytes_of(tmp_path / "one") == one


@pytest.mark.slow
def test_evaluate_killed_in_two_processes_is_finished_by_three(trained_run, launch, start_together, tmp_path):
    command = ["evaluate", str(trained_run), *EVALUATE, "--output"]
    assert main([*command, str(tmp_path / "one")]) == 0
    processes = start_together(["-m", "otdrg", *command, tmp_path / "three"], **ALONE)
    deadline = time.monotonic() + 200
    while not (tmp_path / "three" / "reports").is_dir() and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.wait()
    launch(["-m", "otdrg", *command, tmp_path / "three"], 3, **ALONE)
    assert bytes_of(tmp_path / "three") == bytes_of(tmp_path / "one")


@pytest.mark.slow
def test_localise_two_processes_write_the_same_files(trained_run, launch, tmp_path):
    command = ["localise", str(trained_run), "--resamples", "20", "--studies", "24", "--batch-size", "5", "--output"]
    assert main([*command, str(tmp_path / "one")]) == 0
    launch(["-m", "otdrg", *command, tmp_path / "two"], **ALONE)
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")
    assert {path.suffix for path in (tmp_path / "two").iterdir()} == {".md", ".json", ".csv"}


@pytest.mark.slow
def test_embed_two_processes_write_the_same_files(trained_run, launch, tmp_path):
    pytest.importorskip("matplotlib")
    options = {"train": 1, "validation": 0, "test": 140, "image_size": 112, "views": ["frontal"]}
    prepare_studies("phantom", tmp_path / "built", **options)
    command = ["embed", str(trained_run), str(tmp_path / "built"), "--resamples", "20", "--output"]
    assert main([*command, str(tmp_path / "one")]) == 0
    launch(["-m", "otdrg", *command, tmp_path / "two"], **ALONE)
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "evaluate", "localise", "embed", "bank", "demo"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "float7"], "--dtype is 'float7': expected one of float32, bfloat16, float16"),
        (["--quantization", "2bit"], "--quantization is '2bit': expected one of 4bit, 8bit"),
    ],
)
def test_wrong_type_of_weights_is_one_line(run_folder, paths, tmp_path, capsys, command, arguments, message):
    studies = ["--study", paths[0]] if command == "generate" else []
    output = [] if command in ("generate", "demo") else ["--output", str(tmp_path / "out")]
    assert main([command, str(run_folder), *studies, *output, *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"otdrg {command}: error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "toaster"], "device='toaster': not available here"),
        (["--device", "cuda:99"], "device='cuda:99': not available here"),
        (["--device", "meta"], "device='meta': not available here (it holds no values)"),
        (["--quantization", "4bit"], "needs bitsandbytes: pip install"),
    ],
)
def test_generate_device_that_is_not_there_is_one_line(run_folder, paths, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("otdrg.weights_otdrg.find_spec", lambda name: None)
    assert main(["generate", str(run_folder), "--study", paths[0], *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("otdrg generate: error: ") and message in error and error.count("\n") == 1


def test_generate_dtype_is_that_of_the_weights_and_of_the_journal(run_folder, paths, tmp_path, capsys):
    output = tmp_path / "reports.jsonl"
    command = ["generate", str(run_folder), "--study", paths[0], *FEW, "--output", str(output)]
    assert main([*command, "--dtype", "bfloat16", "--device", "cpu"]) == 0
    assert json.loads(Path(tmp_path / "reports.settings.json").read_text())["dtype"] == "bfloat16"
    capsys.readouterr()
    assert main([*command, "--resume"]) == 1
    assert "(model; dtype='bfloat16', now 'float32')" in capsys.readouterr().err
    assert main([*command, "--resume", "--dtype", "bfloat16"]) == 0
