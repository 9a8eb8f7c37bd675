"""`otdrg bank`: make the report bank of a model from training studies."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..runtime.shared_work import by_main_process, continue_alone, shared_lock
from ..studies.cleaning import CLEANING_STYLES
from .arguments import add_device, check_device, check_folder, check_least, placement

DESCRIPTION = """\
Make a report bank: the reports of training studies, cleaned as the model writes them, and the image features that the
model sees. With it, generate, evaluate, demo and serve (--bank) choose the report that agrees most with those of
similar studies. The bank holds reports word for word and falls under the licence of its studies, which it names; a
model is published without it.
"""
EPILOG = """\
Examples:
  otdrg bank runs/iu_xray_small --output bank
  otdrg bank org/otdrg prepared --output bank
"""


def add_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Add the arguments of the command. `arguments`, those on the command line, are not used."""
    parser.add_argument("model", metavar="MODEL", help="folder of a run or a model, or a Hub id")
    parser.add_argument(
        "dataset",
        nargs="?",
        metavar="DATASET",
        help="recipe or folder of otdrg prepare, whose training studies are read (default: the run's own recipe)",
    )
    parser.add_argument(
        "--cleaning",
        choices=CLEANING_STYLES,
        help="cleaning of the reports (default: that of the reports the model learned, by its recipe or metrics.json)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder of the bank")
    parser.add_argument(
        "--limit",
        type=int,
        default=4000,
        metavar="N",
        help="maximum number of studies, drawn at random: time and memory grow with its square (default: 4000)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default: 0)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="studies in a batch (default: 8)")
    parser.add_argument("--overwrite", action="store_true", help="replace the bank in --output")
    add_device(parser)


def run(options: argparse.Namespace) -> None:
    """Encode the studies, and write the bank."""
    check_least(options, limit=1, batch_size=1, seed=0)
    check_device(options)
    check_folder("--output", options.output)
    with shared_lock(options.output):
        if by_main_process((options.output / "bank.json").exists) and not options.overwrite:
            raise ValueError(f"{options.output} holds a report bank: --overwrite replaces it")
        _bank(options)


def _bank(options: argparse.Namespace) -> None:
    # Imported after the checks, because they take seconds.
    from ..inference.loading import load_published, published_cleaning
    from ..inference.retrieval import build_bank
    from ..training.data import bank_studies, describe_studies
    from ..training.recipe import published_recipe

    own, cleaning = published_recipe(options.model), options.cleaning
    if cleaning is None and own is None:
        cleaning = by_main_process(lambda: published_cleaning(options.model))
    studies = bank_studies(options.dataset, own, cleaning)
    licences = [licence for licence in describe_studies({"train": studies})["train"]["licences"] if licence]
    model, processor = load_published(options.model, **placement(options))
    bank = build_bank(model, processor, studies, licences, options.batch_size, options.seed, options.limit)
    continue_alone()
    bank.save(options.output)
    print(
        f"{len(bank):,} distinct reports of {int(bank.counts.sum()):,} studies, licence: "
        f"{', '.join(licences) or 'not stated'}: {options.output}"
    )
