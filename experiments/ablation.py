"""The paper's ablations as training runs: what each row's recipe is, which stages rows share, and how they are run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..configuration_otdrg import OTDRGConfig
from ..files_otdrg import write_json, write_text
from ..runtime.interruptions import PARENT, terminations
from ..runtime.output_lock import OutputLock
from ..training.check import check_recipe, check_studies
from ..training.data import build_studies
from ..training.recipe import Recipe, load_recipe
from ..training.resumption import FINISHED, STARTED, format_changes, recipe_changes
from ..training.run_folder import read_results

logger = logging.getLogger(__name__)

#: The tables there are, and what each shows.
TABLES: dict[str, str] = {
    "modules": "Table 3, the modules IRCP, DLE and FIOT",
    "epsilon": "Table 4, epsilon of the transport",
    "iterations": "Figure 4, Sinkhorn iterations",
}

#: The rows of Table 3: none is the R2GenGPT baseline, all three the full model. FIOT needs DLE.
MODULE_ROWS: tuple[tuple[str, ...], ...] = ((), ("ircp",), ("dle",), ("ircp", "dle"), ("ircp", "dle", "fiot"))
FULL = MODULE_ROWS[-1]

#: The paper's values; of iterations its figure has no more than the range.
EPSILONS: tuple[float, ...] = (0.01, 0.05, 0.10, 0.12)
ITERATIONS: tuple[int, ...] = (1, 5, 10, 50, 100)

#: What the ablation sets itself.
_SET_HERE = {
    "output_dir": "--output says where runs go",
    "seed": "--seeds names the seeds",
    "stages": "each row has its own stages",
    "model.overrides.dle": "each row has its own modules",
    "model.overrides.fiot": "each row has its own modules",
}

#: Seconds in which the processes of an ablation that was killed end.
_ORPHANS_END = 20.0

#: Fields that do not change what a run finds.
_WITHOUT_EFFECT = ("output_dir", "cpu_threads")


class Row(NamedTuple):
    """A row of a table: the modules that are on, and the epsilon or the number of iterations it is about."""

    table: str
    modules: tuple[str, ...]
    value: float | None = None

    @property
    def name(self) -> str:
        """What it is called in files and messages: `baseline`, `ircp+dle`, `epsilon-0.05`."""
        if self.value is not None:
            return f"{self.table}-{self.value:g}"
        return "+".join(self.modules) or "baseline"

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of its runs: IRCP is one of its own, and only DLE needs a predictor."""
        trained = {"ircp": "ircp" in self.modules, "predictor": "dle" in self.modules, "report": True}
        return tuple(stage for stage, runs in trained.items() if runs)

    def transport(self, config: OTDRGConfig) -> dict[str, float]:
        """The fields of the transport in which the row differs from a configuration."""
        wanted: dict[str, float] = {}
        if self.table == "epsilon":
            wanted = {"ot_epsilon": self.value}
        elif self.table == "iterations":
            # Tolerance 0 stops nothing early.
            wanted = {"ot_max_iterations": self.value, "ot_tolerance": 0.0}
        return {name: value for name, value in wanted.items() if getattr(config, name) != value}


def table_rows(
    tables: Sequence[str] = tuple(TABLES),
    epsilons: Sequence[float] = EPSILONS,
    iterations: Sequence[int] = ITERATIONS,
) -> list[Row]:
    """The rows of the paper's tables, in its order.

    Raises:
        ValueError: an unknown table, or an epsilon or number of iterations that is not above 0 or stands twice.
    """
    rows = []
    for table in tables:
        if table not in TABLES:
            raise ValueError(f"table {table!r}: expected some of {', '.join(TABLES)}")
        if table == "modules":
            rows += [Row(table, modules) for modules in MODULE_ROWS]
            continue
        values = epsilons if table == "epsilon" else iterations
        if not values or min(values) <= 0 or len(set(values)) < len(values):
            told = " ".join(f"{value:g}" for value in values)
            raise ValueError(f"values of the table {table}: {told}: expected different numbers above 0")
        rows += [Row(table, FULL, value) for value in values]
    if len(set(rows)) < len(rows):
        raise ValueError(f"tables {' '.join(tables)}: expected each once")
    return rows


@dataclass
class Run:
    """A training run of the ablation.

    Args:
        name: how it is called in messages.
        recipe: what it trains; its `output_dir` is the run's own.
        shared: the run whose stages it begins with.
        error: what it failed with, in one line.
    """

    name: str
    recipe: Recipe
    shared: Run | None = None
    error: str | None = field(default=None, compare=False)

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output_dir)

    @property
    def finished(self) -> bool:
        return (self.folder / self.recipe.stages[-1] / FINISHED).is_file()

    @property
    def began(self) -> bool:
        """Whether the training of one of its own stages has begun."""
        own = [stage for stage in self.recipe.stages if self.shared is None or stage not in self.shared.recipe.stages]
        return any((self.folder / stage / STARTED).is_file() for stage in own)

    @property
    def log(self) -> Path:
        """Everything its process printed."""
        return self.folder / "train.log"


@dataclass
class Plan:
    """All runs of an ablation, each behind the one whose stages it shares.

    Args:
        runs: without repeats.
        by_row: the run of each row and seed; of a row that is the full model it is the full model's.
    """

    runs: list[Run]
    by_row: dict[tuple[Row, int], Run]


def plan_runs(
    recipe: str | os.PathLike,
    overrides: Sequence[str],
    rows: Sequence[Row],
    seeds: Sequence[int],
    output: str | os.PathLike,
    cpu_threads: int | None = None,
) -> Plan:
    """The runs of all rows and seeds.

    Stages before `report` do not read what rows differ in, but for the stages that ran before them: of each seed they
    are trained once, with all modules on, in `output/shared`, and copied into the rows' own folders.

    Args:
        recipe: YAML file; rows are overrides of it.
        overrides: further ones, `section.field=value`.
        rows: of [`table_rows`].
        seeds: one run of each row each.
        output: folder of the ablation.
        cpu_threads: of each run, in place of the recipe's.

    Raises:
        ValueError: the recipe is wrong or not fit for an ablation, an override is the ablation's own, a seed stands
            twice, or a folder in `output` holds a run of another recipe.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if key in _SET_HERE:
            raise ValueError(f"override {override!r}: an ablation sets this field itself, {_SET_HERE[key]}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {' '.join(map(str, seeds))}: expected at least one, each once")
    given = load_recipe(recipe, list(overrides))
    _check_recipe(recipe, given, rows)
    config = OTDRGConfig.from_preset(given.model.preset, **{**given.model.overrides, **_switches(FULL)})
    plan = Plan([], {})
    made: dict[tuple[str, int], Run] = {}

    def run_of(name: str, stages: Sequence[str], seed: int, own: dict[str, Any]) -> Run:
        if (name, seed) not in made:
            before = stages[:-1]
            shared = run_of(f"shared/{'+'.join(before)}", before, seed, _switches(FULL)) if before else None
            wanted = {
                **{f"model.overrides.{field}": value for field, value in own.items()},
                "seed": seed,
                "stages": list(stages),
                "output_dir": str(Path(output) / name / f"seed-{seed}"),
                **({"cpu_threads": cpu_threads} if cpu_threads else {}),
            }
            # JSON is YAML, and quotes what needs it.
            laid = [f"{field}={json.dumps(value)}" for field, value in wanted.items()]
            run = Run(f"{name}, seed {seed}", load_recipe(recipe, [*overrides, *laid]), shared)
            _check_folder(run)
            plan.runs.append(run)
            made[name, seed] = run
        return made[name, seed]

    for seed in seeds:
        for row in rows:
            transport = row.transport(config)
            # At the recipe's own value a row is the full model, and not trained again.
            name = row.name if row.value is None or transport else Row("modules", row.modules).name
            plan.by_row[row, seed] = run_of(name, row.stages, seed, {**_switches(row.modules), **transport})
    return plan


def _switches(modules: Sequence[str]) -> dict[str, bool]:
    return {"dle": "dle" in modules, "fiot": "fiot" in modules}


def _check_recipe(path: str | os.PathLike, recipe: Recipe, rows: Sequence[Row]) -> None:
    if recipe.report.evaluation.split == "none":
        raise ValueError(f"recipe {path}: report.evaluation.split='none': expected validation or test, to be compared")
    shares = recipe.model.overrides.get("predictor_encoder") != "own"
    if (
        shares
        and recipe.report.vision != "frozen"
        and recipe.report.predictor != "frozen"
        and any("dle" not in row.modules for row in rows)
    ):
        raise ValueError(
            f"recipe {path}: report.vision={recipe.report.vision!r} and report.predictor={recipe.report.predictor!r}: "
            "the encoder that the predictor shares would learn from labels in the rows without DLE as well; expected "
            "report.vision=frozen, or model.overrides.predictor_encoder=own and report.predictor=frozen"
        )


def _check_folder(run: Run) -> None:
    """Refuses what an earlier ablation with another recipe left in the run's folder."""
    path = run.folder / "recipe.yaml"
    if not path.is_file():
        return
    changes = recipe_changes(load_recipe(path).to_dict(), run.recipe)
    told = {name: pair for name, pair in changes.items() if name not in _WITHOUT_EFFECT}
    if told:
        raise ValueError(
            f"{path} is of another recipe: {format_changes(told)}; give another --output, or remove what is to be made "
            "anew"
        )


def check_plan(plan: Plan) -> None:
    """Check every run's recipe, and once the studies, which all runs share, before the first run is started.

    Raises:
        ValueError: a recipe is wrong; names the run and what is wrong.
    """
    pending = [run for run in plan.runs if not run.finished]
    for run in pending:
        try:
            check_recipe(run.recipe)
        except ValueError as error:
            raise ValueError(f"{run.name}: {error}") from None
    if pending:
        recipe = pending[0].recipe
        studies = build_studies(recipe.studies, recipe.labels, recipe.seed)
        for run in pending:
            check_studies(run.recipe, studies, run.recipe.stages)


def train_runs(runs: Sequence[Run], jobs: int = 1, accelerate_config: str | None = None) -> None:
    """Train the runs that are not finished, each in a process of its own, going on where one was interrupted.

    A run that fails has `error` set, as have those that share its stages; the others go on. Where a run fails before
    its training has begun and no run is finished, all are taken to fail for the same reason: no other is started.

    The processes end when this one is killed. A folder that such a process is still writing to is waited for.

    Args:
        runs: of [`plan_runs`]; those that share stages behind those they share.
        jobs: processes at a time.
        accelerate_config: file of `accelerate config`, for runs by `accelerate launch`.

    Raises:
        OutputLockedError: another process writes to the folder of a run.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the message says how many runs are finished.
    """
    waiting = [run for run in runs if not run.finished]
    count, kept = len(waiting), len(runs) - len(waiting)
    logger.info("%d runs to train%s", count, f", {kept} finished before" if kept else "")
    running: dict[int, _Started] = {}
    # A batch system ends a job by SIGTERM, and the processes started here must end with it.
    with terminations():
        try:
            while waiting or running:
                for run in list(waiting):
                    if run.shared is not None and run.shared.error is not None:
                        run.error = f"{run.shared.name}: {run.shared.error}"
                        waiting.remove(run)
                    elif len(running) < jobs and (run.shared is None or run.shared.finished):
                        waiting.remove(run)
                        started = _start(run, accelerate_config)
                        running[started.process.pid] = started
                for pid, started in list(running.items()):
                    run, status = started.run, started.process.poll()
                    if status is None:
                        continue
                    del running[pid]
                    if status or not run.finished:
                        run.error = _last_error(started, status)
                    logger.info(
                        "[%d/%d] %s: %s (%.0f s)",
                        count - len(waiting) - len(running),
                        count,
                        run.name,
                        f"failed: {run.error}" if run.error else run.folder,
                        time.monotonic() - started.time,
                    )
                    if run.error and not run.began and not any(other.finished for other in runs):
                        for other in waiting:
                            other.error = f"not started: {run.name} failed before its training began"
                        waiting.clear()
                time.sleep(0.1)
        except KeyboardInterrupt as stop:
            finished = sum(run.finished for run in runs)
            told = f"{finished} of {len(runs)} runs are finished; the same command goes on with the others"
            raise type(stop)(told) from stop
        finally:
            for started in running.values():
                _stop(started.process)


class _Started(NamedTuple):
    """A run's process, when it began, and where its own lines begin in the log."""

    run: Run
    process: subprocess.Popen
    time: float
    log_begin: int


def _start(run: Run, accelerate_config: str | None) -> _Started:
    path = run.folder / "recipe.yaml"
    with OutputLock(run.folder, wait=_ORPHANS_END):
        run.folder.mkdir(parents=True, exist_ok=True)
        if run.shared is not None:
            _take_stages(run)
        write_text(path, run.recipe.to_yaml())
    launch = ["-m", "otdrg.train_hf"]
    if accelerate_config is not None:
        launch = ["-m", "otdrg.training.launch", "--quiet", "--config_file", accelerate_config, *launch]
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
            # A group of its own, to be stopped with what it starts.
            start_new_session=True,
        )
    return _Started(run, process, time.monotonic(), begin)


def _take_stages(run: Run) -> None:
    """Copy the finished stages of the run it shares them with, so that the folder is a whole run of its own."""
    results = read_results(run.folder)
    for stage in run.shared.recipe.stages:
        folder = run.folder / stage
        if not (folder / FINISHED).is_file():
            # Renamed when it is whole: a copy that was cut off is not taken for a stage.
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
    """The line in which a run's process said what was wrong; the last it printed, where it did not."""
    with started.run.log.open("rb") as log:
        log.seek(started.log_begin)
        printed = log.read().decode("utf-8", errors="replace")
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    told = [line.partition("error: ")[2] for line in lines if line.startswith("train_hf.py: error: ")]
    if told:
        return told[-1]
    ended = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
    return f"{ended}, {started.run.log} ends with: {lines[-1]}" if lines else ended


__all__ = [
    "EPSILONS",
    "FULL",
    "ITERATIONS",
    "MODULE_ROWS",
    "TABLES",
    "Plan",
    "Row",
    "Run",
    "check_plan",
    "plan_runs",
    "table_rows",
    "train_runs",
]
