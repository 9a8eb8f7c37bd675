"""benchmarks/gpu_check.sh, which no test can run on a GPU: the order of its parts and, with `--cpu`, the parts."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_check.sh"
#: Limits of the parts in seconds, by name.
LIMITS = {
    name: int(limit)
    for name, limit in re.findall(r"(\w+):(\d+)", re.search(r'^parts="(.*)"', SCRIPT.read_text(), re.M)[1])
}

pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="the command timeout is missing")


def check(tmp_path, *arguments, **variables):
    """Run the script, without the inputs of its parts."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTDRG_")}
    environment |= {"OTDRG_CHECK": str(tmp_path / "check"), "PYTHON": sys.executable, **variables}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_limits_are_those_of_all_parts_and_below_twelve_minutes():
    tree = ast.parse(SCRIPT.with_suffix(".py").read_text())
    parts = next(node.value for node in tree.body if isinstance(node, ast.AnnAssign) and node.target.id == "PARTS")
    assert [key.value for key in parts.keys] == list(LIMITS)
    # A part that does not end on the first signal has five seconds more.
    assert sum(LIMITS.values()) + 5 * len(LIMITS) < 12 * 60


def test_a_failed_and_a_skipped_part_do_not_stop_the_others(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase $2 in\nsdpa) echo "RuntimeError: no | kernel" >&2; exit 1;;\n'
        "4bit) echo bitsandbytes is not installed; exit 3;;\n*) echo $2 is fine;;\nesac\n"
    )
    python.chmod(0o755)
    done = check(tmp_path, PYTHON=str(python))
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    found = {name: (result, note) for name, result, _, note in rows}
    assert list(found) == list(LIMITS)[1:] and done.stdout.startswith("versions is fine")
    assert found["sdpa"] == ("FAILED", "RuntimeError: no / kernel")
    assert found["4bit"] == ("skipped", "bitsandbytes is not installed")
    assert found["iu_xray"] == ("passed", "iu_xray is fine")
    assert done.returncode == 1 and "7 passed, 1 failed, 1 skipped" in done.stdout


def test_unknown_option_is_refused(tmp_path):
    done = check(tmp_path, "--gpu")
    assert done.returncode == 2 and "unknown option --gpu: expected --cpu or nothing" in done.stderr


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(tmp_path):
    done = check(tmp_path, "--cpu")
    rows = re.findall(r"^\| (\w+) \| (passed|skipped) \|", done.stdout, re.M)
    assert done.returncode == 0, done.stdout
    assert [name for name, _ in rows] == list(LIMITS)[1:]
    results = dict(rows)
    assert results["iu_xray"] == results["fsdp2"] == results["flash_attention"] == "skipped"
    for name in ("bf16", "sdpa", "paper_step", "generation", "phantoms"):
        assert results[name] == "passed", name
