"""Train the runs of an ablation, each in its own process."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from ..files_otdrg import write_json, write_text
from ..runtime.interruptions import PARENT, terminations
from ..runtime.output_lock import OutputLock
from ..runtime.run_record import read_results
from ..training.resumption import FINISHED
from .ablation import Run

logger = logging.getLogger(__name__)

#: Seconds to wait for the processes of an ablation that was killed to end.
_ORPHANS_END = 20.0


class _Started(NamedTuple):
    """A run's process, when it began, and where its output begins in the log."""

    run: Run
    process: subprocess.Popen
    time: float
    log_begin: int


def train_runs(runs: Sequence[Run], jobs: int = 1, accelerate_config: str | None = None) -> None:
    """Train the runs that are not finished; interrupted ones continue.

    A run that fails has `error` set, as have the runs that share its stages; the others continue. If a run fails before
    its training has begun and no run is finished, the other runs are not started, because they would fail for the same
    reason.

    The processes end when this one is killed. If such a process is still writing to a folder, this one waits for it.

    Args:
        runs: of [`plan_runs`], in its order.
        jobs: processes at a time.
        accelerate_config: file of `accelerate config`, for runs by `accelerate launch`.

    Raises:
        OutputLockedError: another process writes to the folder of a run.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the message says how many runs are finished.
    """
    waiting = [run for run in runs if not run.finished]
    count, kept = len(waiting), len(runs) - len(waiting)
    logger.info("%d runs to train%s", count, f", {kept} finished before" if kept else "")
    running: list[_Started] = []
    # A batch system ends a job by SIGTERM, and the processes started here must end with it.
    with terminations():
        try:
            while waiting or running:
                _start_ready(waiting, running, jobs, accelerate_config)
                for started in [one for one in running if one.process.poll() is not None]:
                    running.remove(started)
                    done = f"[{count - len(waiting) - len(running)}/{count}]"
                    _note_end(started, done)
                    run = started.run
                    if run.error and not run.began and not any(other.finished for other in runs):
                        for other in waiting:
                            other.error = f"not started: {run.name} failed before its training began"
                        waiting.clear()
                time.sleep(0.1)
        except KeyboardInterrupt as stop:
            finished = sum(run.finished for run in runs)
            kept = f"{finished} of {len(runs)} runs are finished; the same command continues with the others"
            raise type(stop)(kept) from stop
        finally:
            for started in running:
                _stop(started.process)


def _start_ready(waiting: list[Run], running: list[_Started], jobs: int, accelerate_config: str | None) -> None:
    """Start the runs whose shared stages are finished, as far as `jobs` allows; drop those whose stages failed."""
    for run in list(waiting):
        if run.shared is not None and run.shared.error is not None:
            run.error = f"{run.shared.name}: {run.shared.error}"
            waiting.remove(run)
        elif len(running) < jobs and (run.shared is None or run.shared.finished):
            waiting.remove(run)
            running.append(_start(run, accelerate_config))


def _note_end(started: _Started, done: str) -> None:
    run, status = started.run, started.process.returncode
    if status or not run.finished:
        run.error = _last_error(started, status)
    outcome = f"failed: {run.error}" if run.error else run.folder
    logger.info("%s %s: %s (%.0f s)", done, run.name, outcome, time.monotonic() - started.time)


def _start(run: Run, accelerate_config: str | None) -> _Started:
    path = run.folder / "recipe.yaml"
    with OutputLock(run.folder, wait=_ORPHANS_END):
        run.folder.mkdir(parents=True, exist_ok=True)
        if run.shared is not None:
            _copy_stages(run)
        write_text(path, run.recipe.to_yaml())
    launch = ["-m", "otdrg.train_hf"]
    if accelerate_config is not None:
        launch = ["-m", "otdrg.experiments.launch", "--quiet", "--config_file", accelerate_config, *launch]
    environment = {**os.environ, PARENT: str(os.getpid())}
    if run.recipe.cpu_threads is not None:
        environment["OMP_NUM_THREADS"] = str(run.recipe.cpu_threads)
    with run.log.open("ab") as log:
        begin = log.tell()
        process = subprocess.Popen(
            [sys.executable, *launch, str(path), "--resume"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            # A process group of its own, so that it is stopped together with the processes it starts.
            start_new_session=True,
        )
    return _Started(run, process, time.monotonic(), begin)


def _copy_stages(run: Run) -> None:
    """Copy the finished stages that the run shares, so that its folder is complete."""
    results = read_results(run.folder)
    for stage in run.shared.recipe.stages:
        folder = run.folder / stage
        if not (folder / FINISHED).is_file():
            # Renamed when it is complete, so that an interrupted copy is not taken for a finished stage.
            copy = folder.with_suffix(".copy")
            for stale in (copy, folder):
                shutil.rmtree(stale, ignore_errors=True)
            shutil.copytree(run.shared.folder / stage, copy, ignore=shutil.ignore_patterns("checkpoint-*"))
            copy.rename(folder)
    shared = read_results(run.shared.folder)
    write_json(run.folder / "results.json", {**{stage: shared[stage] for stage in run.shared.recipe.stages}, **results})


def _stop(process: subprocess.Popen) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(timeout=10)
        except ProcessLookupError:
            process.wait()
        except subprocess.TimeoutExpired:
            continue
        return


def _last_error(started: _Started, status: int) -> str:
    """The error line of a run's process, or the last line of its output."""
    with started.run.log.open("rb") as log:
        log.seek(started.log_begin)
        printed = log.read().decode("utf-8", errors="replace")
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line.partition("error: ")[2] for line in lines if line.startswith("train_hf.py: error: ")]
    if errors:
        return errors[-1]
    ended = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
    return f"{ended}, {started.run.log} ends with: {lines[-1]}" if lines else ended
