"""The record of a run, `run.json`: when, how and on which studies it was trained."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from .. import __version__
from ..files_otdrg import read_json, write_json

RUN = "run.json"
#: Packages whose versions are kept beside our own.
PACKAGES: tuple[str, ...] = ("torch", "transformers", "peft", "accelerate", "datasets", "timm")


class RunRecord:
    """`run.json` in a run's folder: its sittings in order; the last one is this.

    A sitting has its begin, end and outcome (`ended` is null if it was killed or is still running), the command line,
    seed, versions, the package's git commit, processes, threads, device, processor and cores, the studies of each split
    with their fingerprint and description, their dataset on the Hub, and the stages that were run. The file is replaced
    as a whole at every change.

    Args:
        folder: of the run.
        state: of the processes; the main one writes.
        facts: what else a sitting has: seed, studies (their fingerprint), data (their description) and hub_dataset.
    """

    def __init__(self, folder: Path, state: PartialState, facts: dict[str, Any]):
        self.path = folder / RUN
        self.is_main_process = state.is_main_process
        self.sitting: dict[str, Any] = {
            "began": _now(),
            "ended": None,
            "outcome": None,
            "command": sys.orig_argv,
            "versions": versions(),
            "commit": commit(),
            "processes": state.num_processes,
            "threads": torch.get_num_threads(),
            "device": device_name(state.device),
            "processor": processor_name(),
            "cores": os.cpu_count(),
            **facts,
            "stages": {},
        }
        self.earlier = read_sittings(self.path)
        self._write()

    def begin_stage(self, stage: str, checkpoint: Path | None) -> None:
        """A stage begins, or continues from a checkpoint."""
        self.sitting["stages"][stage] = {
            "began": _now(),
            "ended": None,
            "checkpoint": None if checkpoint is None else checkpoint.name,
        }
        self._write()

    def end_stage(self, stage: str, steps: int) -> None:
        """A stage has ended after `steps` steps, including those of earlier sittings."""
        record = self.sitting["stages"][stage]
        record["ended"] = _now()
        record["seconds"] = _seconds(record)
        record["steps"] = steps
        self._write()

    def end(self, outcome: str) -> None:
        """The sitting has ended: `outcome` is "finished", or what ended it."""
        self.sitting |= {"ended": _now(), "outcome": outcome}
        self.sitting["seconds"] = _seconds(self.sitting)
        self._write()

    def _write(self) -> None:
        if self.is_main_process:
            write_json(self.path, {"sittings": [*self.earlier, self.sitting]})


def read_sittings(path: Path) -> list[dict[str, Any]]:
    """The sittings of a `run.json`; an empty list if it does not exist.

    Raises:
        ValueError: it is damaged.
    """

    def sittings(content: dict[str, Any]) -> list[dict[str, Any]]:
        found = content["sittings"]
        if not isinstance(found, list) or not all(isinstance(sitting, dict) for sitting in found):
            raise ValueError("sittings is not a list of JSON objects")
        return found

    return read_json(path, parse=sittings) if path.is_file() else []


def read_results(output: Path) -> dict[str, Any]:
    """The results of the stages in `results.json`; empty if it does not exist.

    Raises:
        ValueError: it is damaged.
    """

    def results(content: dict[str, Any]) -> dict[str, Any]:
        for stage, found in content.items():
            if not isinstance(found, dict):
                raise ValueError(f"{stage} is {type(found).__name__}, expected a JSON object")
        return content

    path = output / "results.json"
    return read_json(path, parse=results) if path.is_file() else {}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _seconds(record: dict[str, Any]) -> float:
    return (datetime.fromisoformat(record["ended"]) - datetime.fromisoformat(record["began"])).total_seconds()


# --- machine and versions --------------------------------------------------------------------------------------------


def versions() -> dict[str, str | None]:
    """Python's, ours, and those of `PACKAGES`; None for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "otdrg": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit() -> dict[str, Any] | None:
    """The package's git commit as `id`, and whether tracked files differ (`dirty`); None outside a repository."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package:
            return None
        return {
            "id": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(device: torch.device) -> str:
    """A device with its name, if it has one: "cuda (NVIDIA A100-SXM4-80GB)"."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return device.type


def processor_name() -> str | None:
    """The CPU's name on Linux, elsewhere its architecture; None if neither is known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(filter(None, names), None) or platform.processor() or platform.machine() or None


__all__ = ["RUN", "RunRecord", "read_results", "read_sittings"]
