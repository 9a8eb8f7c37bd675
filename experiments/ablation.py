"""The paper's ablations as training runs: the recipe of each row, and the stages that rows share."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..configuration_otdrg import OTDRGConfig
from ..training.data import build_studies
from ..training.recipe import Recipe, load_recipe
from ..training.resumption import FINISHED, STARTED, format_changes, recipe_changes
from ..training.run import check_recipe
from ..training.stages import stage_of

#: The tables, and their titles.
TABLES: dict[str, str] = {
    "modules": "Table 3, modules",
    "epsilon": "Table 4, epsilon of the transport",
    "iterations": "Figure 4, Sinkhorn iterations",
}

#: All modules, and the rows of Table 3, from the R2GenGPT baseline without modules to the full model. FIOT needs DLE.
MODULES: tuple[str, ...] = ("ircp", "dle", "fiot")
MODULE_ROWS: tuple[tuple[str, ...], ...] = ((), ("ircp",), ("dle",), ("ircp", "dle"), MODULES)

#: The paper's values; for iterations its figure gives only the range.
EPSILONS: tuple[float, ...] = (0.01, 0.05, 0.10, 0.12)
ITERATIONS: tuple[int, ...] = (1, 5, 10, 50, 100)

#: Recipe fields that the ablation sets, and why they cannot be overridden.
_SET_HERE = {
    "output_dir": "--output is the folder of the runs",
    "seed": "--seeds names the seeds",
    "model.overrides.dle": "each row has its own modules",
    "model.overrides.fiot": "each row has its own modules",
}

#: Fields that do not change a run's results.
_WITHOUT_EFFECT = ("output_dir", "cpu_threads")


class Row(NamedTuple):
    """A row of a table: the modules that are on, and the value of epsilon or of the number of iterations."""

    table: str
    modules: tuple[str, ...]
    value: float | None = None

    @property
    def name(self) -> str:
        """Its name in files and messages: `baseline`, `ircp+dle`, `epsilon-0.05`."""
        if self.value is not None:
            return f"{self.table}-{self.value:g}"
        return "+".join(self.modules) or "baseline"

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of its runs: the module IRCP is a stage, and only DLE needs a predictor."""
        trained = {"ircp": "ircp" in self.modules, "predictor": "dle" in self.modules, "report": True}
        return tuple(stage for stage, runs in trained.items() if runs)

    def transport(self, config: OTDRGConfig) -> dict[str, float]:
        """The transport's fields in which the row differs from a configuration."""
        wanted: dict[str, float] = {}
        if self.table == "epsilon":
            wanted = {"ot_epsilon": self.value}
        elif self.table == "iterations":
            # With tolerance 0, Sinkhorn does all iterations.
            wanted = {"ot_max_iterations": self.value, "ot_tolerance": 0.0}
        return {name: value for name, value in wanted.items() if getattr(config, name) != value}


def table_rows(
    tables: Sequence[str] = tuple(TABLES),
    epsilons: Sequence[float] = EPSILONS,
    iterations: Sequence[int] = ITERATIONS,
    modules: Sequence[str] = MODULES,
) -> list[Row]:
    """The rows of the paper's tables, in its order.

    Args:
        tables: keys of [`TABLES`].
        epsilons: rows of Table 4.
        iterations: rows of Figure 4.
        modules: of the full model, see [`modules_of`]; no row has others.

    Raises:
        ValueError: an unknown table, or values of epsilon or iterations that are not above 0 or not different.
    """
    rows = []
    full = tuple(module for module in MODULES if module in modules)
    # Without IRCP, Table 3 ends with a row that is the paper's last one without it.
    by_module = [row for row in MODULE_ROWS if set(row) <= set(full)]
    for table in tables:
        if table not in TABLES:
            raise ValueError(f"table {table!r}: expected some of {', '.join(TABLES)}")
        if table == "modules":
            rows += [Row(table, row) for row in dict.fromkeys([*by_module, full])]
            continue
        values = epsilons if table == "epsilon" else iterations
        if not values or min(values) <= 0 or len(set(values)) < len(values):
            shown = " ".join(f"{value:g}" for value in values)
            raise ValueError(f"values of the table {table}: {shown}: expected different numbers above 0")
        rows += [Row(table, full, value) for value in values]
    if len(set(rows)) < len(rows):
        raise ValueError(f"tables {' '.join(tables)}: expected each once")
    return rows


def modules_of(recipe: Recipe) -> tuple[str, ...]:
    """The modules of an ablation of a recipe: all, without IRCP if the recipe has no stage `ircp`."""
    return tuple(module for module in MODULES if module != "ircp" or "ircp" in recipe.stages)


@dataclass
class Run:
    """A training run of the ablation.

    Args:
        name: its name in messages.
        recipe: its recipe, with its own `output_dir`.
        shared: the run that trains the stages before its own.
        error: the reason of a failure, in one line.
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
        """Whether training of one of its own stages has begun."""
        own = [stage for stage in self.recipe.stages if self.shared is None or stage not in self.shared.recipe.stages]
        return any((self.folder / stage / STARTED).is_file() for stage in own)

    @property
    def log(self) -> Path:
        """The output of its process."""
        return self.folder / "train.log"


@dataclass
class Plan:
    """All runs of an ablation.

    Args:
        runs: each once, after the run whose stages it shares.
        by_row: the run of each row and seed; rows that equal the full model have its run.
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
    """Plan one run for each row and seed.

    The stages before `report` depend only on the stages before them. For each seed they are trained once, with all
    modules on, in `output/shared`, and copied into the rows' own folders.

    Args:
        recipe: YAML file; each row is the recipe with overrides.
        overrides: further ones, `section.field=value`.
        rows: of [`table_rows`].
        seeds: each row is trained once with each seed.
        output: folder of the ablation.
        cpu_threads: of each run, instead of the recipe's.

    Raises:
        ValueError: a wrong argument, a recipe not fit for an ablation, or a run of another recipe in `output`.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if key in _SET_HERE:
            raise ValueError(f"override {override!r}: an ablation sets this field itself, {_SET_HERE[key]}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {' '.join(map(str, seeds))}: expected at least one, each once")
    given = load_recipe(recipe, list(overrides))
    config = OTDRGConfig.from_preset(given.model.preset, **{**given.model.overrides, **_switches(MODULES)})
    _check_recipe(recipe, given, config, rows)
    plan = Plan([], {})
    made: dict[tuple[str, int], Run] = {}

    def run_of(name: str, stages: Sequence[str], seed: int, own: dict[str, Any]) -> Run:
        if (name, seed) not in made:
            before = stages[:-1]
            shared = run_of(f"shared/{'+'.join(before)}", before, seed, _switches(MODULES)) if before else None
            wanted = {
                **{f"model.overrides.{field}": value for field, value in own.items()},
                "seed": seed,
                "stages": list(stages),
                "output_dir": str(Path(output) / name / f"seed-{seed}"),
                **({"cpu_threads": cpu_threads} if cpu_threads else {}),
            }
            # JSON is valid YAML.
            fields = [f"{field}={json.dumps(value)}" for field, value in wanted.items()]
            run = Run(f"{name}, seed {seed}", load_recipe(recipe, [*overrides, *fields]), shared)
            _check_folder(run)
            plan.runs.append(run)
            made[name, seed] = run
        return made[name, seed]

    for seed in seeds:
        for row in rows:
            transport = row.transport(config)
            # With the recipe's own value the row equals the full model, which is trained once.
            name = row.name if row.value is None or transport else Row("modules", row.modules).name
            plan.by_row[row, seed] = run_of(name, row.stages, seed, {**_switches(row.modules), **transport})
    return plan


def _switches(modules: Sequence[str]) -> dict[str, Any]:
    # Only FIOT has label tokens to transport the image to.
    tokens = {} if "fiot" in modules else {"finding_tokens": "labels"}
    return {"dle": "dle" in modules, "fiot": "fiot" in modules, **tokens}


def _check_recipe(path: str | os.PathLike, recipe: Recipe, config: OTDRGConfig, rows: Sequence[Row]) -> None:
    if recipe.report.evaluation.split == "none":
        raise ValueError(f"recipe {path}: report.evaluation.split='none': expected validation or test, to be compared")
    if config.finding_text == "none" and any("dle" in row.modules and "fiot" not in row.modules for row in rows):
        raise ValueError(
            f"recipe {path}: model.overrides.finding_text='none': without FIOT's label tokens the LLM would not read "
            "the findings, and rows with DLE would equal those without; expected mentioned or all"
        )
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
    """Refuse a folder with a run of another recipe."""
    path = run.folder / "recipe.yaml"
    if not path.is_file():
        return
    changes = recipe_changes(load_recipe(path).to_dict(), run.recipe)
    changes = {name: pair for name, pair in changes.items() if name not in _WITHOUT_EFFECT}
    if changes:
        raise ValueError(
            f"{path} is another recipe: {format_changes(changes)}; give another --output, or delete the runs that are "
            "to be trained again"
        )


def check_plan(plan: Plan) -> None:
    """Check the recipe of every run, and the studies that all runs share, before the first run is started.

    Raises:
        ValueError: a recipe is wrong; the message names the run.
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
            for stage in run.recipe.stages:
                stage_of(stage).check_studies(run.recipe, studies)
