"""Time of a step of the report stage with features read from disk and with views encoded anew, on the tiny preset.

    python benchmarks/features.py

Prints a Markdown table: seconds a step as the Trainer counts them, reading and collating studies included. Encoding
each view once, before the first step, is not in them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from otdrg.training.recipe import load_recipe
from otdrg.training.run import run_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "phantom_tiny.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=200, help="training studies")
    parser.add_argument("--steps", type=int, default=20, help="steps of the report stage")
    parser.add_argument("--text", nargs="+", default=["full"], help="how the LLM is trained")
    parser.add_argument("--runs", type=int, default=3, help="pairs of runs; each has a row")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"output_dir={folder}",
            f"studies.options={{train: {options.studies}, validation: 8, test: 0}}",
            "predictor.max_steps=1",
            "predictor.fit_thresholds=false",
            f"report.max_steps={options.steps}",
            "report.save_strategy=no",
            "report.evaluation.split=none",
        ]
        run_recipe(load_recipe(RECIPE, [*overrides, "stages=[predictor]"]))
        print("| LLM | run | seconds a step from images | from features | ratio |")
        print("|---|---|---|---|---|")
        for text in options.text:
            for run in range(1, options.runs + 1):
                images, features = (
                    measure([*overrides, f"report.text={text}", f"report.cache_features={cached}"], options.steps)
                    for cached in ("false", "true")
                )
                print(f"| {text} | {run} | {images:.3f} | {features:.3f} | {images / features:.2f} |", flush=True)


def measure(overrides: list[str], steps: int) -> float:
    """Seconds a step of the report stage, from the predictor's folder."""
    results = run_recipe(load_recipe(RECIPE, [*overrides, "stages=[report]"]))
    return results["report"]["log_history"][-1]["train_runtime"] / steps


if __name__ == "__main__":
    main()
