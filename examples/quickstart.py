"""The second half of `make quickstart`: load the trained model, show its reports, and check its scores.

python examples/quickstart.py runs/quickstart
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import yaml
from otdrg import FINDING_DISPLAY_NAMES, FINDING_STATES, FINDINGS
from otdrg.inference.heatmaps import draw_heatmaps
from otdrg.studies.phantom import SPLIT_STARTS, make_phantom
from transformers import pipeline
from transformers.utils.logging import disable_progress_bar

#: The scores in which the model must beat the best constant report, but not with the images of other studies.
COLUMNS = {
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "macro_f1_13_uncertain_negative": "macro-F1 (13)",
}


def main(arguments: list[str] | None = None) -> int:
    """Show three new studies, a heatmap and the table of scores; return 1 if the model fails a control."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder of recipes/phantom_tiny.yaml")
    parser.add_argument("--studies", type=int, default=3, help="number of studies to show (default: 3)")
    options = parser.parse_args(arguments)
    recipe = yaml.safe_load((options.run / "recipe.yaml").read_text(encoding="utf-8"))
    show_studies(options.run, recipe["studies"]["options"], options.studies)
    results = json.loads((options.run / "results.json").read_text(encoding="utf-8"))
    return check(results["report"]["evaluation"])


def show_studies(run: Path, phantom_options: dict, count: int) -> None:
    """Load the model with `pipeline`, print its reports of `count` new phantoms, and draw one heatmap."""
    disable_progress_bar()
    pipe = pipeline("image-to-text", model=str(run / "model"), trust_remote_code=True, device="cpu")
    views = tuple(phantom_options.get("views", ("frontal",)))
    seed, size = phantom_options.get("seed", 0), phantom_options["image_size"]
    phantoms = [make_phantom(seed, SPLIT_STARTS["test"] + index, size, views) for index in range(count)]
    records = pipe([phantom.images for phantom in phantoms], return_heatmaps=True)
    for phantom, (record, *_) in zip(phantoms, records, strict=True):
        print(f"\n{phantom.id}\n  generated: {record['generated_text']}\n  true:      {phantom.report}")
        print(f"  {'finding':<27} {'predicted':<12} {'p':<5} true")
        for name, true in zip(FINDINGS, phantom.states, strict=True):
            finding = record["findings"][name]
            print(
                f"  {FINDING_DISPLAY_NAMES[name]:<27} {finding['state']:<12} {finding['probability']:.2f}  "
                f"{FINDING_STATES[true]}"
            )
    # The heatmap is of the study with the most positive findings.
    best = max(range(count), key=lambda index: sum(state == 1 for state in phantoms[index].states[:-1]))
    phantom, (record, *_) = phantoms[best], records[best]
    path = run / "heatmap.png"
    names = draw_heatmaps(phantom.images, record["heatmaps"], record["findings"], path, masks=phantom.masks)
    print(f"\nheatmap of {phantom.id} ({', '.join(names)}; the true findings are outlined): {path}")


def check(evaluation: dict) -> int:
    """Print the table of an evaluation; return 1 if the model fails a control, else 0."""
    rows = evaluation["rows"]
    width = max(map(len, rows))
    print(f"\n{evaluation['studies']} new studies; states read by the labeler {evaluation['labeler']}\n")
    print(" " * width + "".join(f"{name:>15}" for name in COLUMNS.values()))
    for name, scores in rows.items():
        print(f"{name:<{width}}" + "".join(f"{scores[column]:>15.3f}" for column in COLUMNS))
    model, shuffled, constant = rows["model"], rows["images shuffled across studies"], rows["best constant report"]
    worse = [name for column, name in COLUMNS.items() if model[column] <= constant[column]]
    blind = [name for column, name in COLUMNS.items() if shuffled[column] > constant[column]]
    print()
    if worse:
        print(f"FAILED: the model does not beat the best constant report in {', '.join(worse)}")
    if blind:
        print(f"FAILED: with shuffled images the model still beats the best constant report in {', '.join(blind)}")
    if worse or blind:
        return 1
    for name in ("nearest neighbour", "retrieval by expected utility"):
        better = [shown for column, shown in COLUMNS.items() if rows.get(name, model)[column] > model[column]]
        if better:
            print(f"Without a decoder, {name} is above the model in {', '.join(better)}.")
    print(
        "The model uses the image: it beats the best constant report in all four columns, and in none when the images "
        "are shuffled."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
