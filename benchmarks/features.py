"""Measure a step of the report stage with cached features and with encoding, with the preset `tiny`.

    python benchmarks/features.py

Prints a Markdown table of medians over steps. A step reads and collates the studies, then runs forward, backward and
AdamW. Steps with and without the cache alternate on the same studies, so that other load on the machine affects both.
CPU seconds are summed over threads. Encoding each view once, before the first step, is reported separately.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from otdrg.inference.features import cache_features
from otdrg.training.collation import ReportCollator
from otdrg.training.data import build_studies
from otdrg.training.model import build_model, set_trained_parts
from otdrg.training.recipe import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "phantom_tiny.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=16, help="studies per step")
    parser.add_argument("--steps", type=int, default=20, help="timed steps with and without the cache")
    options = parser.parse_args()
    size, steps = options.batch_size, options.steps + 1  # the first is not timed
    phantoms = f"studies.options={{train: {size * steps}, validation: 0, test: 0}}"
    recipe = load_recipe(RECIPE, [phantoms])
    images = build_studies(recipe.studies, recipe.labels)["train"]
    torch.manual_seed(recipe.seed)
    model, processor = build_model(recipe.model, images["report"])
    frozen = set_trained_parts(model, vision="frozen", text=recipe.report.text, predictor="frozen", joining=True)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    collator = ReportCollator(processor, True, recipe.report.max_report_tokens)

    def step(rows: list[dict]) -> None:
        model(**model.expand_finding_text(**collator(rows))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        encoding = timed(lambda: cache_features(model, processor, images, folder, size))
        features = cache_features(model, processor, images, folder, size)
        model.train()
        for part in frozen:
            part.eval()
        times: dict[str, list[tuple[float, float]]] = {"images": [], "features": []}
        for number in range(steps):
            for name, studies in (("images", images), ("features", features)):
                places = range(number * size, (number + 1) * size)
                times[name].append(timed(lambda rows=studies, where=places: step([rows[i] for i in where])))
    print(f"{len(images)} views encoded once: {encoding[0]:.1f} s, {encoding[1]:.1f} CPU seconds\n")
    print("| step | seconds | CPU seconds |")
    print("|---|---|---|")
    medians = {
        name: [statistics.median(column) for column in zip(*rows[1:], strict=True)] for name, rows in times.items()
    }
    for name, (wall, cpu) in medians.items():
        print(f"| from {name} | {wall:.3f} | {cpu:.3f} |")
    ratios = [one / other for one, other in zip(*medians.values(), strict=True)]
    print(f"| ratio | {ratios[0]:.2f} | {ratios[1]:.2f} |")


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Elapsed seconds and CPU seconds."""
    start = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start[0], time.process_time() - start[1]


if __name__ == "__main__":
    main()
