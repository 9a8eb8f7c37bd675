"""The `otdrg` command. Training is `accelerate launch train_hf.py`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from importlib import import_module

from .runtime.interruptions import exit_status
from .runtime.printable import PrintableFormatter
from .runtime.shared_work import launched_processes, leave_processes, run_together
from .runtime.threads import wait_passively_if_busy


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status ([`exit_status`])."""
    wait_passively_if_busy()
    arguments = sys.argv[1:] if arguments is None else arguments
    is_first = os.environ.get("RANK", "0") == "0"
    if not is_first:
        # What all processes would print, progress bars and warnings of libraries among it, the first one prints.
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    parser = _parser(arguments)
    options = parser.parse_args(arguments)
    if not hasattr(options, "run"):
        parser.print_help()
        return 2
    if logging.lastResort is not None:
        # Warnings contain names of studies, which may hold control characters.
        logging.lastResort.setFormatter(PrintableFormatter("%(message)s"))
    try:
        return exit_status(f"otdrg {options.command}", lambda: _run(options), speaks=is_first)
    finally:
        leave_processes()


def _run(options: argparse.Namespace) -> None:
    """Run the command in this process and those that were launched with it."""
    if launched_processes() == 1:
        options.run(options)
        return
    if options.command not in _SHARED:
        raise ValueError(
            f"otdrg {options.command} runs in one process: start it without accelerate launch (with it: "
            f"{', '.join(_SHARED)})"
        )
    # Imported here, because it takes seconds.
    from .runtime.devices import join_processes

    join_processes(options.device)
    run_together(lambda: options.run(options))


#: Commands and what they do; each is a module of `commands`, imported when its command is typed.
_COMMANDS = {
    "generate": "write the reports of studies",
    "prepare": "convert radiographs and reports to a dataset",
    "bank": "make a report bank of training studies, for consensus decoding",
    "label": "read the states of 14 findings from reports",
    "score": "score the reports of any system, and test two systems against each other",
    "evaluate": "score a model's reports, compared with baselines and controls",
    "localise": "measure a model's heatmaps on phantoms, compared with chance",
    "embed": "plot image features before and after alignment, by finding",
    "push": "publish a trained model on the Hub, with its card and its demo",
    "ablate": "train the paper's ablations of a recipe and tabulate them",
    "demo": "try a model in a browser on this machine",
    "serve": "serve a model by OpenAI's API",
}

#: Commands that share their studies among several processes.
_SHARED = ("generate", "evaluate", "label", "localise", "embed", "bank")


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="otdrg",
        description="Radiology report generation from chest radiographs.",
        epilog="Training: accelerate launch train_hf.py recipes/phantom_tiny.yaml",
    )
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        command = import_module(f".commands.{name}", __package__) if arguments[:1] == [name] else None
        texts = {"description": command.DESCRIPTION, "epilog": command.EPILOG} if command else {}
        form = argparse.RawDescriptionHelpFormatter
        subparser = commands.add_parser(name, help=summary, formatter_class=form, **texts)
        if command:
            command.add_arguments(subparser, arguments[1:])
            subparser.set_defaults(run=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
