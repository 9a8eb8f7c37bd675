"""How threads of OpenMP wait in our commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from otdrg.runtime.threads import VARIABLES, wait_passively

ROOT = Path(__file__).parents[2]
#: Prints, at exit, the policy that libgomp shows once torch has loaded it, and the process's variables.
_SHOW = """\
import atexit, json, os, sys
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
    ("given", "expected"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
    ],
)
def test_commands_wait_passively_unless_the_user_says_how(name, given, expected):
    work = COMMANDS[name].format(path=str(ROOT / "train_hf.py"))
    code = _SHOW.format(names=VARIABLES, work=work)
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    done = subprocess.run([sys.executable, "-c", code], env={**environment, **given}, capture_output=True, text=True)
    found = json.loads(done.stdout.rpartition("FOUND")[2])
    assert {key: value for key, value in found.items() if value is not None} == expected


def test_wait_passively_is_in_effect_before_torch_is_loaded():
    """libgomp itself shows the policy that it has read."""
    code = (
        "import sys\nfrom otdrg.runtime.threads import wait_passively\nwait_passively()\n"
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


def test_wait_passively_leaves_a_variable_of_another_library(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KMP_BLOCKTIME", "200")
    wait_passively()
    assert "OMP_WAIT_POLICY" not in os.environ
