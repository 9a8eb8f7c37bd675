"""`otdrg localise`: whether a model's heatmaps lie where the findings of phantoms are."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..findings_otdrg import FINDING_STATES, FINDINGS, finding_key
from ..metrics.localisation import JudgedMap
from ..runtime.csv_files import write_csv
from ..runtime.output_lock import OutputLock
from ..runtime.printable import show

if TYPE_CHECKING:
    from ..evaluation.localisation import JudgedPhantoms

DESCRIPTION = """\
Judge the heatmaps of a model, its transport plan over the image, on phantoms, whose masks say where each finding is:
the pointing game (does the highest point lie in the mask?) and soft IoU, beside what a uniform map and the maps of
other studies are worth on the same masks, with 95 % intervals. The phantoms are held-out ones, with the views and the
size of those in the run's recipe. Leaves localisation.md, localisation.json and localisation.csv, a row a map.
"""
EPILOG = """\
Example: otdrg localise runs/quickstart --studies 400 --output runs/quickstart/localisation
"""

_SPLITS = ("train", "validation", "test")


def add_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """The command's arguments; `arguments`, what was typed, does not change them."""
    parser.add_argument("model", help="folder of a run or a model, or a Hub id")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--studies", type=int, default=200, metavar="N", help="phantoms (default: 200)")
    parser.add_argument("--split", choices=_SPLITS, default="test", help="of the phantoms (default: test)")
    parser.add_argument("--seed", type=int, help="of the phantoms (default: the recipe's, else 0)")
    parser.add_argument(
        "--views", nargs="+", metavar="VIEW", help="frontal, lateral (default: the recipe's, else frontal)"
    )
    parser.add_argument(
        "--findings", nargs="+", metavar="FINDING", help="those that are judged (default: all but No Finding)"
    )
    parser.add_argument(
        "--predicted", action="store_true", help="make the plans for the states the model predicts, not the true ones"
    )
    parser.add_argument(
        "--resamples", type=int, default=1000, metavar="N", help="of the bootstrap behind intervals (default: 1000)"
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="studies at a time (default: 16)")
    parser.add_argument("--overwrite", action="store_true", help="replace the results that are in --output")


def run(options: argparse.Namespace) -> None:
    """Judge the maps, write the results and print the table."""
    with OutputLock(options.output):
        _run(options)


def _run(options: argparse.Namespace) -> None:
    findings = _findings(options.findings)
    for name in ("studies", "resamples", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least 1")

    # Not at the top, because torch and transformers take seconds to import.
    from ..evaluation.localisation import judge_phantoms
    from ..files_otdrg import write_json, write_text
    from ..inference.loading import load_published
    from ..metrics.localisation import localisation_scores
    from ..metrics.tables import localisation_table, localisation_verdicts
    from ..studies.phantom import SPLIT_STARTS, PhantomSource
    from ..training.recipe import published_recipe
    from ..training.run_folder import new_results

    paths = new_results(options.output, "localisation", (".md", ".json", ".csv"), options.overwrite)
    recipe = published_recipe(options.model)
    like = dict(recipe.studies.options) if recipe is not None and recipe.studies.source == "phantom" else {}
    like |= {name: value for name in ("seed", "views") if (value := getattr(options, name)) is not None}
    PhantomSource(**like)  # A wrong option is better told of before a large model is loaded than after.
    model, processor = load_published(options.model)
    source = PhantomSource(**{"image_size": model.config.image_size, **like})
    judged = judge_phantoms(
        model,
        processor,
        source,
        SPLIT_STARTS[options.split],
        options.studies,
        findings,
        options.predicted,
        options.batch_size,
    )
    scores = localisation_scores(judged.maps, len(judged.ids), options.resamples, source.seed)
    result = {
        "model": options.model,
        "split": options.split,
        "studies": len(judged.ids),
        "image_size": source.image_size,
        "views": source.views,
        "seed": source.seed,
        "states": "predicted" if options.predicted else "true",
        "image_grid": model.config.image_grid,
        "resamples": options.resamples,
        **scores,
        "counts": {name: asdict(counts) for name, counts in judged.counts.items()},
        "verdicts": localisation_verdicts(scores),
    }
    document = "\n\n".join([_heading(result), *result["verdicts"], localisation_table(scores), _left_out(result)])
    write_text(paths[".md"], f"{document}\n")
    write_json(paths[".json"], result)
    _write_maps(paths[".csv"], judged)
    show(f"{document}\n\nwritten: {paths['.md']}, localisation.json, localisation.csv")


def _findings(names: list[str] | None) -> list[str]:
    chosen = FINDINGS[:-1] if names is None else [finding_key(name) for name in names]
    if FINDINGS[-1] in chosen:
        raise ValueError(f"--findings {FINDINGS[-1]}: it is nowhere in an image, expected one of the 13 others")
    return list(dict.fromkeys(chosen))


def _heading(result: dict[str, Any]) -> str:
    shared = ", which share one plan" if len(result["views"]) > 1 else ""
    return (
        f"# Localisation of {result['model']}\n\n"
        f"{result['studies']} phantoms of the split {result['split']} (seed {result['seed']}), "
        f"{' and '.join(result['views'])} views of {result['image_size']} pixels{shared}; plans for {result['states']} "
        f"states, over {result['image_grid']} x {result['image_grid']} image tokens, resampled bilinearly."
    )


def _left_out(result: dict[str, Any]) -> str:
    totals = {
        name: sum(counts[name] for counts in result["counts"].values())
        for name in ("positive", "told_positive", "judged", "unseen", "covering", "without_mass")
    }
    return (
        f"Of {totals['positive']} findings that are there, the plan is made for the state positive in "
        f"{totals['told_positive']}. {totals['judged']} masks were judged; left out were {totals['unseen']} views that "
        f"do not show the finding and {totals['covering']} whose mask covers more than half of the view. "
        f"{totals['without_mass']} maps without any mass count as 0."
    )


def _write_maps(path: Path, judged: JudgedPhantoms) -> None:
    def rows() -> Iterator[list]:
        for study, finding, view, *values in judged.maps:
            state = FINDING_STATES[judged.states[study, FINDINGS.index(finding)]]
            numbers = ("" if value != value else f"{value:.6f}" for value in values)
            yield [judged.ids[study], finding, state, view + 1, *numbers]

    write_csv(path, ["id", "finding", "state", "view", *JudgedMap._fields[3:]], rows())


__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]
