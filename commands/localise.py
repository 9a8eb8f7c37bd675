"""`otdrg localise`: measure whether a model's heatmaps lie on the findings of phantoms."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..findings_otdrg import FINDINGS, finding_key
from ..runtime.printable import show
from ..runtime.shared_work import by_main_process, shared_lock, temporary_journal
from .arguments import SPLITS, add_device, add_resamples, check_device, check_folder, check_least, placement

DESCRIPTION = """\
Judge the heatmaps of a model, its transport plan over the image, on phantoms, whose masks say where each finding is:
the pointing game (does the highest point lie in the mask?) and soft IoU, beside the scores of a uniform map and of the
maps of other studies on the same masks, with 95 % intervals. The phantoms are held-out ones, with the views and the
size of those in the run's recipe. Plans are kept as they are made: the same command continues an interrupted one.
Writes localisation.md, localisation.json and localisation.csv, one row per map.
"""
EPILOG = """\
Examples:
  otdrg localise runs/quickstart --studies 400 --output runs/quickstart/localisation
  accelerate launch -m otdrg localise runs/quickstart --studies 4000 --output runs/quickstart/localisation
"""


def add_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Add the arguments of the command. `arguments`, those on the command line, are not used."""
    parser.add_argument("model", help="folder of a run or a model, or a Hub id")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--studies", type=int, default=200, metavar="N", help="number of phantoms (default: 200)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="split of the phantoms (default: test)")
    parser.add_argument("--seed", type=int, help="seed of the phantoms (default: the recipe's, else 0)")
    parser.add_argument(
        "--views", nargs="+", metavar="VIEW", help="frontal, lateral or both (default: the recipe's, else frontal)"
    )
    parser.add_argument(
        "--findings", nargs="+", metavar="FINDING", help="findings to judge (default: all but No Finding)"
    )
    parser.add_argument(
        "--predicted", action="store_true", help="make the plans for the states the model predicts, not the true ones"
    )
    add_resamples(parser)
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="studies in a batch (default: 16)")
    parser.add_argument("--overwrite", action="store_true", help="replace the results in --output")
    add_device(parser)


def run(options: argparse.Namespace) -> None:
    """Judge the maps, write the results and print the table."""
    findings = FINDINGS[:-1] if options.findings is None else [finding_key(name) for name in options.findings]
    if FINDINGS[-1] in findings:
        raise ValueError(f"--findings {FINDINGS[-1]}: it has no place in an image, expected one of the 13 others")
    check_least(options, studies=1, resamples=1, batch_size=1)
    check_device(options)
    check_folder("--output", options.output)
    with shared_lock(options.output):
        _localise(options, list(dict.fromkeys(findings)))


def _localise(options: argparse.Namespace, findings: list[str]) -> None:
    # Imported here, because torch and transformers take seconds.
    from ..evaluation.localisation import judge_phantoms
    from ..inference.loading import load_published, model_settings
    from ..runtime.output_lock import new_results
    from ..studies.phantom import SPLIT_STARTS, PhantomSource
    from ..training.recipe import published_recipe

    suffixes = (".md", ".json", ".csv")
    paths = by_main_process(lambda: new_results(options.output, "localisation", suffixes, options.overwrite))
    recipe = published_recipe(options.model)
    like = dict(recipe.studies.options) if recipe is not None and recipe.studies.source == "phantom" else {}
    like |= {name: value for name in ("seed", "views") if (value := getattr(options, name)) is not None}
    PhantomSource(**like)  # refuses a wrong option before a large model is loaded
    model, processor = load_published(options.model, **placement(options))
    source = PhantomSource(**{"image_size": model.config.image_size, **like})
    first = SPLIT_STARTS[options.split]

    def depends_on() -> dict[str, Any]:
        asked = {"studies": options.studies, "findings": findings, "predicted": options.predicted, "first": first}
        drawn = {name: getattr(source, name) for name in ("seed", "image_size", "views")}
        return {**model_settings(model, processor), **asked, **drawn}

    with temporary_journal(options.output / "localisation.plans.jsonl", depends_on, options.overwrite) as journal:
        asked = options.studies, findings, options.predicted, options.batch_size
        judged = judge_phantoms(model, processor, source, first, *asked, journal)
        _write(options, model, source, judged, paths)


def _write(options: argparse.Namespace, model, source, judged, paths: dict[str, Path]) -> None:
    """Score the maps, write the results and print the table."""
    from ..evaluation.localisation import write_localisation
    from ..metrics import localisation_scores

    scores = localisation_scores(judged.maps, len(judged.ids), options.resamples, source.seed)
    # A predictor that pools by transport makes its plans before there are states.
    before = model.config.predictor_pooling == "transport"
    settings = {
        "model": options.model,
        "split": options.split,
        "studies": len(judged.ids),
        "image_size": source.image_size,
        "views": source.views,
        "seed": source.seed,
        "states": None if before else "predicted" if options.predicted else "true",
        "image_grid": judged.grid,
        "resamples": options.resamples,
    }
    document = write_localisation(paths, settings, judged, scores)
    show(f"{document}\n\nwritten: {paths['.md']}, localisation.json, localisation.csv")
