"""A training step with two threads beside another job, by how OpenMP's threads wait."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

from measure import Line, NotAvailable, Row, ratios

TITLE = "A busy machine"
ABOUT = (
    "Elapsed time of 4 steps of the quick start's report stage (batch of 16, features cached) on two cores, alone "
    "and beside a process that keeps one of them busy. All processes are started before and measured in turns. "
    "PyTorch for Linux brings GNU's OpenMP library (libgomp), which reads `OMP_WAIT_POLICY` and `GOMP_SPINCOUNT` "
    "when it is loaded; `KMP_BLOCKTIME` belongs to Intel's and LLVM's."
)
NOTES = (
    "No setting is best on both an idle and a busy machine: threads that sleep wake up late where nobody else wants "
    "the core. So commands set `OMP_WAIT_POLICY=PASSIVE` only if other jobs keep at least half a core busy when they "
    "start; by default no OpenMP variable is set. Beside one busy process the two threads have a core and a half, so "
    "that a step takes at least 1.33 times as long as alone.",
)
SETTINGS: dict[str, dict[str, str]] = {
    "spinning": {"OMP_WAIT_POLICY": "ACTIVE"},
    "libgomp's default": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OTDRG_STEP_THREADS": "1"},
}
#: Of `busy_step.py` for each line.
STEPS = 4
_BASELINE = "libgomp's default"
_STEP = Path(__file__).with_name("busy_step.py")


def measure(rounds: int, folder: Path) -> Row:
    if (os.cpu_count() or 1) < 2:
        raise NotAvailable("it needs two cores")
    steps = {name: start(variables) for name, variables in SETTINGS.items()}
    seconds: dict[str, dict[str, list[float]]] = {}
    try:
        for state in ("alone", "busy"):
            other = multiprocessing.get_context("spawn").Process(target=spin, daemon=True)
            if state == "busy":
                other.start()
            seconds[state] = {name: [] for name in steps}
            for number in range(1 + rounds):
                for name, step in steps.items():
                    value = make_steps(step)
                    seconds[state][name] += [value] if number else []
            if state == "busy":
                other.kill()
    finally:
        for step in steps.values():
            step.kill()
    lines = []
    for name in steps:
        lines.append(Line(name, "seconds a step, alone", [value / STEPS for value in seconds["alone"][name]]))
        lines.append(Line(name, "seconds a step, busy", [value / STEPS for value in seconds["busy"][name]]))
        if name != _BASELINE:
            alone, busy = (ratios(seconds[state][name], seconds[state][_BASELINE]) for state in ("alone", "busy"))
            lines.append(Line(name, "elapsed / default, alone", alone, ""))
            lines.append(Line(name, "elapsed / default, busy", busy, "≤ 0.5" if "=" in name else ""))
    return Row(lines, list(NOTES))


def start(variables: dict[str, str]) -> subprocess.Popen:
    """A process that makes a few steps for each line that it reads, and writes how long they took."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, str(_STEP)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**others, **variables}
    )


def make_steps(step: subprocess.Popen) -> float:
    """Elapsed seconds. Between its turns a process is stopped, because threads that spin do so while it waits too."""
    assert step.stdin is not None and step.stdout is not None
    step.send_signal(signal.SIGCONT)
    step.stdin.write("\n")
    step.stdin.flush()
    answer = step.stdout.readline()
    if not answer:
        raise RuntimeError("a process of the busy machine ended early")
    step.send_signal(signal.SIGSTOP)
    return float(answer)


def spin() -> None:
    """Keep a core busy."""
    while True:
        pass
