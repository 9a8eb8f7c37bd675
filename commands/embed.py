"""`otdrg embed`: image features before and after alignment (paper, Figure 1b), and how far findings are apart."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..findings_otdrg import FINDINGS
from ..runtime.csv_files import write_csv
from ..runtime.output_lock import OutputLock
from ..runtime.printable import show

if TYPE_CHECKING:
    from datasets import Dataset

DESCRIPTION = """\
Picture the image features of studies before alignment (the vision encoder's) and after it (projected into the LLM's
embedding space, with the label features there as stars), coloured by finding: each the mean over a study's image
tokens, in the plane by t-SNE on cosine distances. Studies with exactly one positive finding are taken, so that each has
a colour. How far findings are apart is told by silhouettes in the features themselves, beside chance. Leaves
embedding.png, embedding.json and embedding.csv, a row a study.
"""
EPILOG = """\
Example: otdrg embed runs/quickstart --split train --limit 500 --output runs/quickstart/embedding
"""

_SPLITS = ("train", "validation", "test")


def add_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """The command's arguments; `arguments`, what was typed, does not change them."""
    parser.add_argument("model", help="folder of a run or a model, or a Hub id")
    parser.add_argument(
        "dataset",
        nargs="?",
        help="folder written by otdrg prepare, with states (default: the studies of the run's recipe)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder of the picture and the figures"
    )
    parser.add_argument("--split", choices=_SPLITS, default="test", help="whose studies are taken (default: test)")
    parser.add_argument("--limit", type=int, default=500, metavar="N", help="most studies (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of t-SNE, bootstrap and permutations (default: 0)")
    parser.add_argument(
        "--resamples", type=int, default=1000, metavar="N", help="of the bootstrap behind intervals (default: 1000)"
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="studies at a time (default: 16)")
    parser.add_argument("--overwrite", action="store_true", help="replace the results that are in --output")


def run(options: argparse.Namespace) -> None:
    """Encode the studies, write picture and figures, and print what they say."""
    with OutputLock(options.output):
        _run(options)


def _run(options: argparse.Namespace) -> None:
    for name, least in (("limit", 1), ("resamples", 1), ("batch_size", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least {least}")
    for library in ("sklearn", "matplotlib"):
        if importlib.util.find_spec(library) is None:
            raise ImportError(f'the picture needs {library}: pip install "otdrg[figures]"')

    # Not at the top, because torch, transformers and scikit-learn take seconds to import.
    from ..evaluation.embedding import aligned_features, embed, separation, single_findings
    from ..evaluation.embedding_figure import draw_embedding
    from ..files_otdrg import write_json
    from ..inference.loading import load_published
    from ..training.run_folder import new_results

    paths = new_results(options.output, "embedding", (".png", ".json", ".csv"), options.overwrite)
    studies = _studies(options)
    chosen = single_findings(studies["finding_states"], options.limit)
    model, processor = load_published(options.model)
    rows = studies.select(chosen.positions)
    features = aligned_features(model, processor, rows, options.batch_size)
    scores = separation(features.before, features.after, chosen.findings, options.resamples, seed=options.seed)

    labels = {name: feature for name, feature in features.labels.items() if name in chosen.findings}
    before = embed(features.before, options.seed)
    after = embed(np.concatenate([features.after, *(feature[None] for feature in labels.values())]), options.seed)
    after, stars = after[: len(before)], dict(zip(labels, after[len(before) :], strict=True))
    draw_embedding(before, after, stars, chosen.findings, scores, paths[".png"])
    silhouettes = [scores[space].pop("studies") for space in ("before", "after")]
    _write_studies(paths[".csv"], rows["id"], chosen.findings, before, after, silhouettes)
    result = {
        "model": options.model,
        "dataset": options.dataset or "the recipe's",
        "split": options.split,
        "seed": options.seed,
        "studies": len(rows),
        "by_finding": {name: chosen.findings.count(name) for name in FINDINGS if name in chosen.findings},
        "left_out": chosen.left_out,
        "distance": "cosine",
        "resamples": options.resamples,
        **scores,
    }
    write_json(paths[".json"], result)
    show(_summary(result))
    show(f"\nwritten: {paths['.png']}, embedding.json, embedding.csv")


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


def _summary(result: dict[str, Any]) -> str:
    left_out = ", ".join(f"{count} {reason}" for reason, count in result["left_out"].items() if count)
    lines = [
        f"{result['studies']} studies of {result['split']} with exactly one positive finding, "
        f"{len(result['by_finding'])} findings" + (f"; left out: {left_out}" if left_out else ""),
        "",
        "| image features | silhouette, cosine | 95 % interval | findings permuted |",
        "| --- | --- | --- | --- |",
    ]
    for space in ("before", "after"):
        row = result[space]
        lines.append(f"| {space} alignment | {row['silhouette']:.3f} | {_bounds(row)} | {_bounds(row['chance'])} |")
    difference = result["difference"]
    told = "farther apart" if difference["low"] > 0 else "nearer to each other" if difference["high"] < 0 else None
    lines.append(f"| difference | {difference['silhouette']:+.3f} | {_bounds(difference)} | |")
    lines += ["", f"Findings are {told} after alignment." if told else "Alignment does not show in the silhouette."]
    return "\n".join(lines)


def _bounds(row: dict[str, float]) -> str:
    return f"{row['low']:.3f} to {row['high']:.3f}"


def _write_studies(
    path: Path,
    ids: list[str],
    findings: list[str],
    before: np.ndarray,
    after: np.ndarray,
    silhouettes: list[list[float]],
) -> None:
    columns = [f"{space} {column}" for space in ("before", "after") for column in ("x", "y", "silhouette")]

    def rows() -> Iterator[list]:
        for row in zip(ids, findings, before, silhouettes[0], after, silhouettes[1], strict=True):
            study, finding, place, value, other_place, other_value = row
            numbers = (*place, value, *other_place, other_value)
            yield [study, finding, *(f"{number:.6f}" for number in numbers)]

    write_csv(path, ["id", "finding", *columns], rows())


__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]
