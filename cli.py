"""The `otdrg` command. Training is `accelerate launch train_hf.py`."""

from __future__ import annotations

import argparse
import logging
import sys
from importlib import import_module

from .interruptions import exit_status
from .printable import PrintableFormatter


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status ([`exit_status`])."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser(arguments)
    options = parser.parse_args(arguments)
    if not hasattr(options, "run"):
        parser.print_help()
        return 2
    if logging.lastResort is not None:
        # Warnings of ours name studies.
        logging.lastResort.setFormatter(PrintableFormatter("%(message)s"))
    return exit_status(f"otdrg {options.command}", lambda: options.run(options))


#: Commands that live in rooms of their own, and what they do. A room is entered when its command is typed.
_ROOMS = {
    "generate": ("generate.command", "write the reports of studies"),
    "prepare": ("studies.command", "make a dataset of studies from radiographs and reports"),
    "label": ("labelers.command", "read the states of 14 findings out of reports"),
    "score": ("metrics.command", "score the reports of any system, and test two systems against each other"),
    "evaluate": ("training.evaluation_command", "score a model's reports beside baselines and controls"),
    "localise": ("training.localisation_command", "judge a model's heatmaps on phantoms, beside chance"),
    "embed": ("training.embedding_command", "picture image features before and after alignment, by finding"),
    "push": ("hub_card.push_command", "publish a trained model on the Hub, with its card and its demo"),
    "ablate": ("training.ablation_command", "train the paper's ablations of a recipe and table them"),
    "demo": ("hub_card.demo_command", "try a model in a browser on this machine"),
}


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="otdrg",
        description="Radiology report generation from chest radiographs.",
        epilog="Training: accelerate launch train_hf.py recipes/phantom_tiny.yaml",
    )
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    for name, (module, summary) in _ROOMS.items():
        room = import_module(f".{module}", __package__) if arguments[:1] == [name] else None
        told = {"description": room.DESCRIPTION, "epilog": room.EPILOG} if room else {}
        subparser = commands.add_parser(name, help=summary, **told)
        if room:
            room.add_arguments(subparser, arguments[1:])
            subparser.set_defaults(run=room.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
