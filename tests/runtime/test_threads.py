"""How threads of OpenMP wait in our commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from otdrg.runtime.threads import VARIABLES, wait_passively_if_busy

ROOT = Path(__file__).parents[2]
#: Prints, at exit, the policy that libgomp shows once torch has loaded it, and the process's variables.
_SHOW = """\
import atexit, json, os, psutil, sys
psutil.cpu_percent = lambda seconds: {busy}
psutil.cpu_count = lambda: 4
def show():
    print("FOUND" + json.dumps({{name: os.environ.get(name) for name in {names}}}))
atexit.register(show)
{work}
"""
COMMANDS = {
    "otdrg": "from otdrg.cli import main\nmain([])",
    "train_hf": "import runpy\nsys.argv[1:] = ['--help']\nrunpy.run_path({path!r}, run_name='__main__')",
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("given", "busy", "expected"),
    [
        ({}, 25, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ({}, 10, {}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, 100, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "5"}, 100, {"GOMP_SPINCOUNT": "5"}),
        ({"KMP_BLOCKTIME": "200"}, 100, {"KMP_BLOCKTIME": "200"}),
    ],
)
def test_commands_wait_passively_on_a_busy_machine_unless_the_user_says_how(name, given, busy, expected):
    work = COMMANDS[name].format(path=str(ROOT / "train_hf.py"))
    code = _SHOW.format(names=VARIABLES, busy=busy, work=work)
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    done = subprocess.run([sys.executable, "-c", code], env={**environment, **given}, capture_output=True, text=True)
    found = json.loads(done.stdout.rpartition("FOUND")[2])
    assert {key: value for key, value in found.items() if value is not None} == expected


def test_waiting_passively_is_in_effect_before_torch_is_loaded():
    """libgomp itself shows the policy that it has read."""
    code = (
        "import psutil, sys\nfrom otdrg.runtime.threads import wait_passively_if_busy\n"
        "psutil.cpu_percent = lambda seconds: 100\nwait_passively_if_busy()\n"
        "assert 'torch' not in sys.modules\nimport otdrg.cli\nassert 'torch' not in sys.modules\nimport torch\n"
        "torch.ones(9).sum()"
    )
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, "OMP_DISPLAY_ENV": "VERBOSE"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if "OMP_WAIT_POLICY" not in done.stderr:
        pytest.skip("the OpenMP library of this PyTorch does not show its settings")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr


def test_machine_is_busy_while_a_process_computes(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        psutil.Process(process.pid).cpu_percent(0.5)
        wait_passively_if_busy()
    finally:
        process.kill()
        process.wait()
    assert os.environ.pop("OMP_WAIT_POLICY") == "PASSIVE"
