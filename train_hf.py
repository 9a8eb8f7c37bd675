"""Train a recipe: `accelerate launch train_hf.py RECIPE [section.field=value ...]`."""

from __future__ import annotations

import argparse
import logging
import os
import sys

_EXAMPLE = """\
example:
  accelerate launch train_hf.py recipes/phantom_tiny.yaml output_dir=runs/short report.max_steps=100
"""


def main(argv: list[str] | None = None) -> int:
    """Run a recipe.

    Returns:
        The exit status: 0 or, after one line on what is wrong, 1; after Ctrl-C 130, after SIGTERM 143.
    """
    from otdrg.runtime.threads import wait_passively_if_busy

    wait_passively_if_busy()
    parser = argparse.ArgumentParser(
        prog="train_hf.py",
        description="Train OTDRG by a recipe: its stages in order, each from the folder of the one before.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="YAML file, such as recipes/phantom_tiny.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="fields to change, with values in YAML"
    )
    parser.add_argument("--resume", action="store_true", help="keep finished stages, continue from the last checkpoint")
    parser.add_argument(
        "--overwrite", action="store_true", help="start an unfinished stage again, deleting its checkpoints"
    )
    parser.add_argument("--fields", action=_PrintFields, nargs=0, help="print all fields of a recipe, and exit")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.resume and arguments.overwrite:
        parser.error("--resume and --overwrite exclude each other")

    from otdrg.runtime.interruptions import end_with_parent, exit_status
    from otdrg.runtime.printable import PrintableFormatter

    end_with_parent()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # Only the first of several processes logs.
    is_first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("otdrg").setLevel(logging.INFO if is_first else logging.ERROR)
    return exit_status("train_hf.py", lambda: _run(arguments), speaks=is_first, traceback=arguments.traceback)


class _PrintFields(argparse.Action):
    """Prints the fields of a recipe and ends the program, as `--help` does."""

    def __call__(self, parser, namespace, values, option_string=None):
        from otdrg.runtime.interruptions import exit_status
        from otdrg.training.recipe import fields_text

        parser.exit(exit_status("train_hf.py", lambda: print(fields_text())))


def _run(arguments: argparse.Namespace) -> None:
    from otdrg.training.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from otdrg.training.run import run_recipe
    from transformers.utils.logging import disable_progress_bar

    # The bars of reading and writing weights at every checkpoint; the Trainer's own stays.
    disable_progress_bar()
    run_recipe(recipe, resume=arguments.resume, overwrite=arguments.overwrite)


if __name__ == "__main__":
    sys.exit(main())
