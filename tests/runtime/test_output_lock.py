"""Outputs are held by one process at a time, and a killed process holds none."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import yaml
from otdrg.cli import main
from otdrg.runtime.output_lock import OutputLock, OutputLockedError
from otdrg.train_hf import main as train

HOLD = """
import sys
from otdrg.runtime.output_lock import OutputLock
with OutputLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder():
    """Starts a process that holds the lock on a path until its standard input is closed."""
    started = []

    def start(path):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_output_lock_held_by_another_process_names_it(holder, tmp_path):
    output = tmp_path / "reports.jsonl"
    process = holder(output)
    with pytest.raises(OutputLockedError) as refused, OutputLock(output):
        pass
    assert str(refused.value).startswith(f"{output} is being written by process {process.pid} on ")
    assert " since 20" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_output_lock_killed_holder_releases_it(holder, tmp_path, how):
    process = holder(tmp_path / "out")
    process.send_signal(how)
    process.wait()
    with OutputLock(tmp_path / "out"):
        written = json.loads((tmp_path / ".out.lock.json").read_text())
        assert written["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_output_lock_waits_for_a_process_that_ends(holder, tmp_path):
    process = holder(tmp_path / "out")
    timer = threading.Timer(0.5, process.stdin.close)
    timer.start()
    with OutputLock(tmp_path / "out", wait=20):
        assert process.wait(timeout=20) == 0
    timer.join()


def test_output_lock_link_and_target_are_one_output(holder, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    holder(tmp_path / "link")
    with pytest.raises(OutputLockedError), OutputLock(tmp_path / "real"):
        pass


def test_output_lock_empty_folders_are_removed(tmp_path):
    with OutputLock(tmp_path / "deep" / "er" / "out"):
        assert (tmp_path / "deep" / "er").is_dir()
    assert list(tmp_path.iterdir()) == []
    with OutputLock(tmp_path / "deep" / "out"):
        (tmp_path / "deep" / "out").write_text("kept")
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_output_lock_many_processes_one_at_a_time(tmp_path):
    """Each reads a number, and writes the next one: an overlap would lose one."""
    script = """
import sys, time
from pathlib import Path
from otdrg.runtime.output_lock import OutputLock
counter = Path(sys.argv[1])
for _ in range(25):
    with OutputLock(counter, wait=60):
        number = int(counter.read_text())
        time.sleep(0.001)
        counter.write_text(str(number + 1))
"""
    counter = tmp_path / "counter"
    counter.write_text("0")
    running = [subprocess.Popen([sys.executable, "-c", script, str(counter)]) for _ in range(4)]
    assert [process.wait(timeout=120) for process in running] == [0] * 4
    assert counter.read_text() == "100"
    assert os.listdir(tmp_path) == ["counter"]


# --- every command that writes ---------------------------------------------------------------------------------------

COMMANDS = {
    "prepare": ["phantom", "--train", "2", "--output", "OUT"],
    "label dataset": ["FOLDER", "--output", "OUT"],
    "label in place": ["OUT"],
    "label reports": ["--reports", "FOLDER/reports.csv", "--output", "OUT.csv"],
    "label compare": ["--compare", "a.csv", "b.csv", "--output", "OUT"],
    "generate": ["FOLDER", "--study", "FOLDER/view.png", "--output", "OUT.jsonl"],
    "score": ["--predictions", "FOLDER/reports.csv", "--output", "OUT.json"],
    "evaluate": ["FOLDER", "--output", "OUT"],
    "localise": ["FOLDER", "--output", "OUT"],
    "embed": ["FOLDER", "--output", "OUT"],
    "push": ["FOLDER", "org/name", "--dry-run", "--output", "OUT"],
    "ablate": ["FOLDER/recipe.yaml", "--output", "OUT"],
}


@pytest.fixture
def inputs(tmp_path):
    folder = tmp_path / "inputs"
    folder.mkdir()
    (folder / "reports.csv").write_text("id,report\na,Clear lungs.\n", encoding="utf-8")
    recipe = {"output_dir": str(tmp_path / "out"), "studies": {"source": "phantom"}, "report": {"text": "full"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


def listed(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", COMMANDS)
def test_command_second_process_is_refused_and_writes_nothing(inputs, tmp_path, capsys, name):
    arguments = [
        argument.replace("FOLDER", str(inputs)).replace("OUT", str(tmp_path / "out")) for argument in COMMANDS[name]
    ]
    output = arguments[0] if name == "label in place" else arguments[arguments.index("--output") + 1]
    with OutputLock(output):
        before = listed(tmp_path)
        assert main([name.split()[0], *arguments]) == 1
        assert listed(tmp_path) == before
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f": error: {output} is being written by process {os.getpid()} on " in error


def test_training_second_process_is_refused_and_writes_nothing(inputs, tmp_path, capsys):
    with OutputLock(tmp_path / "out"):
        before = listed(tmp_path)
        assert train([str(inputs / "recipe.yaml")]) == 1
        assert listed(tmp_path) == before
    error = capsys.readouterr().err
    assert f"train_hf.py: error: {tmp_path / 'out'} is being written by process {os.getpid()} on " in error
    assert error.count("\n") == 1
