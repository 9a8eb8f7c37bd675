"""`otdrg ablate`: the paper's ablation tables over a recipe."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..experiments.ablation import Plan

from ..runtime.printable import PrintableFormatter, show

DESCRIPTION = """\
The paper's ablations of a recipe: Table 3 (modules), Table 4 (epsilon) and Figure 4 (Sinkhorn iterations). Every row is
trained once a seed, in a folder and a process of its own; stages that rows share are trained once. Finished runs are
kept: the same command goes on where it was interrupted. Leaves ablation.md, ablation.json and ablation.png.
"""
EPILOG = """\
Example: otdrg ablate recipes/phantom_ablation.yaml --tables modules --seeds 1 2 3 --output runs/ablation
"""


def add_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """The command's arguments; `arguments`, what was typed, does not change them."""
    parser.add_argument("recipe", help="YAML file of a training run, of which every row is a variant")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="fields of the recipe to be changed, values in YAML"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the runs and tables")
    parser.add_argument(
        "--tables", nargs="+", metavar="TABLE", help="some of modules, epsilon, iterations (default: all three)"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[1, 2, 3], help="a run of each row each (default: 1 2 3)"
    )
    parser.add_argument(
        "--epsilons", nargs="+", type=float, metavar="E", help="rows of epsilon (default: 0.01 0.05 0.1 0.12)"
    )
    parser.add_argument(
        "--iterations", nargs="+", type=int, metavar="T", help="rows of iterations (default: 1 5 10 50 100)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the CPU's threads"
    )
    parser.add_argument(
        "--accelerate-config", metavar="FILE", help="train by accelerate launch, with this --config_file"
    )
    parser.add_argument(
        "--resamples", type=int, default=1000, metavar="N", help="of the bootstrap behind intervals (default: 1000)"
    )


def run(options: argparse.Namespace) -> None:
    """Train what is not finished, then write the tables; an error in the end where runs failed."""
    for name in ("jobs", "resamples"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: expected at least 1")
    if options.accelerate_config is not None and not Path(options.accelerate_config).is_file():
        raise FileNotFoundError(f"--accelerate-config {options.accelerate_config}: no such file")
    for library, extra in (("pycocoevalcap", "metrics"), ("matplotlib", "demo")):
        # Hours before they are used.
        if importlib.util.find_spec(library) is None:
            raise ImportError(f'an ablation needs {library}: pip install "otdrg[{extra}]"')

    # Not at the top, because torch and transformers take seconds to import.
    from ..experiments.ablation import EPSILONS, ITERATIONS, TABLES, check_plan, plan_runs, table_rows, train_runs
    from ..runtime.output_lock import OutputLock
    from ..training.recipe import load_recipe

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("otdrg").setLevel(logging.INFO)
    rows = table_rows(options.tables or list(TABLES), options.epsilons or EPSILONS, options.iterations or ITERATIONS)
    cpu_threads = None
    if options.jobs > 1:
        threads = load_recipe(options.recipe, options.overrides).cpu_threads or os.cpu_count() or 1
        cpu_threads = max(1, threads // options.jobs)
    with OutputLock(options.output):
        plan = plan_runs(options.recipe, options.overrides, rows, options.seeds, options.output, cpu_threads)
        check_plan(plan)
        train_runs(plan.runs, options.jobs, options.accelerate_config)
        _summarize(options, plan)


def _summarize(options: argparse.Namespace, plan: Plan) -> None:
    """Write and print the tables."""
    from ..experiments.ablation_figure import draw_ablation
    from ..experiments.ablation_report import format_summary, summarize
    from ..files_otdrg import write_json, write_text

    summary = {"recipe": options.recipe, "overrides": options.overrides, **summarize(plan, options.resamples)}
    document = format_summary(summary, f"Ablations of {options.recipe}", "ablation.png")
    write_json(options.output / "ablation.json", summary)
    draw_ablation(summary, options.output / "ablation.png")
    write_text(options.output / "ablation.md", document)
    show(f"{document}\nwritten: {options.output / 'ablation.md'}, ablation.json, ablation.png")
    failed = [run for run in plan.runs if run.error is not None]
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(plan.runs)} runs failed, the first: {failed[0].name}: {failed[0].error}; "
            "the same command tries them again"
        )


__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]
