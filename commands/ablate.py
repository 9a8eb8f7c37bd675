"""`otdrg ablate`: train the paper's ablations of a recipe and tabulate them."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from pathlib import Path

from ..runtime.output_lock import OutputLock
from ..runtime.printable import PrintableFormatter, show
from .arguments import add_resamples, check_folder, check_least

DESCRIPTION = """\
The paper's ablations of a recipe: Table 3 (modules), Table 4 (epsilon) and Figure 4 (Sinkhorn iterations). Every row is
trained once with each seed, in a folder and a process of its own; stages that rows share are trained once. Without a
stage ircp in the recipe, no row has the module IRCP. Finished runs are kept: the same command continues an interrupted
ablation. Writes ablation.md, ablation.json and ablation.png.
"""
EPILOG = """\
Example: otdrg ablate recipes/phantom_ablation.yaml --tables modules --seeds 1 2 3 --output runs/ablation
"""


def add_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Add the arguments of the command. `arguments`, those on the command line, are not used."""
    parser.add_argument("recipe", help="YAML file of a training run; each row is the recipe with some fields changed")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="fields of the recipe to change, values in YAML"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the runs and tables")
    parser.add_argument(
        "--tables", nargs="+", metavar="TABLE", help="some of modules, epsilon, iterations (default: all three)"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[1, 2, 3], help="each row is trained with each (default: 1 2 3)"
    )
    parser.add_argument(
        "--epsilons", nargs="+", type=float, metavar="E", help="rows of epsilon (default: 0.01 0.05 0.1 0.12)"
    )
    parser.add_argument(
        "--iterations", nargs="+", type=int, metavar="T", help="rows of iterations (default: 1 5 10 50 100)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the CPU's threads (default: 1)"
    )
    parser.add_argument(
        "--accelerate-config", metavar="FILE", help="train by accelerate launch, with this --config_file"
    )
    add_resamples(parser)


def run(options: argparse.Namespace) -> None:
    """Train the unfinished runs, then write the tables; raise an error at the end if runs failed."""
    check_least(options, jobs=1, resamples=1)
    if options.accelerate_config is not None and not Path(options.accelerate_config).is_file():
        raise FileNotFoundError(f"--accelerate-config {options.accelerate_config}: no such file")
    for library, extra in (("pycocoevalcap", "metrics"), ("matplotlib", "figures")):
        # Checked now, because they are used after hours of training.
        if importlib.util.find_spec(library) is None:
            raise ImportError(f'an ablation needs {library}: pip install "otdrg[{extra}]"')

    # Imported here, because torch and transformers take seconds.
    from ..experiments.ablation import EPSILONS, ITERATIONS, TABLES, check_plan, modules_of, plan_runs, table_rows
    from ..experiments.ablation_report import write_summary
    from ..experiments.runs import train_runs
    from ..training.recipe import load_recipe

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("otdrg").setLevel(logging.INFO)
    recipe = load_recipe(options.recipe, options.overrides)
    tables = options.tables or list(TABLES)
    rows = table_rows(tables, options.epsilons or EPSILONS, options.iterations or ITERATIONS, modules_of(recipe))
    cpu_threads = None
    if options.jobs > 1:
        threads = recipe.cpu_threads or os.cpu_count() or 1
        cpu_threads = max(1, threads // options.jobs)
    check_folder("--output", options.output)
    with OutputLock(options.output):
        plan = plan_runs(options.recipe, options.overrides, rows, options.seeds, options.output, cpu_threads)
        check_plan(plan)
        train_runs(plan.runs, options.jobs, options.accelerate_config)
        document = write_summary(plan, options.output, options.recipe, options.overrides, options.resamples)
    show(f"{document}\nwritten: {options.output / 'ablation.md'}, ablation.json, ablation.png")
    failed = [run for run in plan.runs if run.error is not None]
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(plan.runs)} runs failed, the first: {failed[0].name}: {failed[0].error}; "
            "the same command tries them again"
        )
