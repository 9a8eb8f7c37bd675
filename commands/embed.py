"""`otdrg embed`: plot image features before and after alignment (paper, Figure 1b), and measure their separation."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.printable import show
from ..runtime.shared_work import by_main_process, continue_alone, shared_lock, temporary_journal
from .arguments import SPLITS, add_device, add_resamples, check_device, check_folder, check_least, placement

if TYPE_CHECKING:
    from datasets import Dataset

DESCRIPTION = """\
Picture the image features of studies before alignment (the vision encoder's) and after it (projected into the LLM's
embedding space, with the label features there as stars), coloured by finding: means over a study's image tokens, in the
plane by t-SNE on cosine distances. Only studies with exactly one positive finding are used, so that each has one
colour. Silhouettes of the features themselves, with their chance level, measure how well findings are separated.
Features are saved as they are computed: the same command continues an interrupted one. Writes embedding.png,
embedding.json and embedding.csv, one row per study.
"""
EPILOG = """\
Examples:
  otdrg embed runs/quickstart --split train --limit 500 --output runs/quickstart/embedding
  accelerate launch -m otdrg embed runs/quickstart --split train --limit 5000 --output runs/quickstart/embedding
"""


def add_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Add the arguments of the command. `arguments`, those on the command line, are not used."""
    parser.add_argument("model", help="folder of a run or a model, or a Hub id")
    parser.add_argument(
        "dataset",
        nargs="?",
        help="folder written by otdrg prepare, with states (default: the studies of the run's recipe)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder of the picture and the figures"
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="split of the studies (default: test)")
    parser.add_argument("--limit", type=int, default=500, metavar="N", help="maximum number of studies (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="seed of t-SNE, bootstrap and permutations (default: 0)")
    add_resamples(parser)
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="studies in a batch (default: 16)")
    parser.add_argument("--overwrite", action="store_true", help="replace the results in --output")
    add_device(parser)


def run(options: argparse.Namespace) -> None:
    """Encode the studies, write picture and figures, and print them."""
    check_least(options, limit=1, resamples=1, batch_size=1, seed=0)
    check_device(options)
    check_folder("--output", options.output)
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('the picture needs matplotlib: pip install "otdrg[figures]"')
    with shared_lock(options.output):
        _embed(options)


def _embed(options: argparse.Namespace) -> None:
    # Imported here, because torch, transformers and scikit-learn take seconds.
    from ..evaluation.embedding import aligned_features, single_findings
    from ..inference.loading import load_published, model_settings
    from ..runtime.output_lock import new_results
    from ..studies.fingerprint import fingerprint

    suffixes = (".png", ".json", ".csv")
    paths = by_main_process(lambda: new_results(options.output, "embedding", suffixes, options.overwrite))
    studies = _studies(options)
    chosen = single_findings(studies["finding_states"], options.limit)
    model, processor = load_published(options.model, **placement(options))
    rows = studies.select(chosen.positions)

    def depends_on() -> dict[str, Any]:
        return {**model_settings(model, processor), "studies": fingerprint({options.split: rows})}

    with temporary_journal(options.output / "embedding.features.jsonl", depends_on, options.overwrite) as journal:
        features = aligned_features(model, processor, rows, options.batch_size, journal)
        continue_alone()
        _write(options, paths, chosen, list(rows["id"]), features)


def _write(options: argparse.Namespace, paths: dict[str, Path], chosen, ids: list[str], features) -> None:
    """Write picture and figures, and print them."""
    from ..evaluation.embedding import write_embedding

    settings = {
        "model": options.model,
        "dataset": options.dataset or "the recipe's",
        "split": options.split,
        "seed": options.seed,
        "resamples": options.resamples,
    }
    summary = write_embedding(paths, settings, chosen, ids, features)
    show(f"{summary}\n\nwritten: {paths['.png']}, embedding.json, embedding.csv")


def _studies(options: argparse.Namespace) -> Dataset:
    from ..studies.loading import load_prepared
    from ..training.data import build_studies
    from ..training.recipe import published_recipe

    if options.dataset is not None:
        splits, whose = load_prepared(options.dataset), options.dataset
    else:
        recipe = published_recipe(options.model)
        if recipe is None:
            raise ValueError(f"{options.model} has no recipe.yaml: expected DATASET, a folder written by otdrg prepare")
        splits = build_studies(replace(recipe.studies, streaming=False), recipe.labels, recipe.seed)
        whose = f"{options.model}, recipe.yaml"
    if options.split not in splits:
        raise ValueError(f"--split {options.split}: {whose} has {', '.join(splits)}")
    studies = splits[options.split]
    if all(states is None for states in studies["finding_states"]):
        raise ValueError(
            f"{whose}: no study of {options.split} has finding states, expected some: otdrg label fills them"
        )
    return studies
