"""Compute the row "best constant report" of a recipe's results table, without a model.

python benchmarks/constants.py recipes/phantom_tiny.yaml
OTDRG_IU_XRAY=~/iu_xray python benchmarks/constants.py recipes/iu_xray_small.yaml --metrics bleu_4 meteor rouge_l cider
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from otdrg.labelers.as_typed import label_quietly, labeler_of
from otdrg.metrics import best_constants, score_reports
from otdrg.studies.loading import uncleaned_reports
from otdrg.training.data import build_studies
from otdrg.training.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="recipe with the studies, cleaning, split and labeler")
    parser.add_argument("--split", help="split to score (default: report.evaluation.split of the recipe)")
    parser.add_argument("--metrics", nargs="+", default=["bleu_4", "rouge_l", "cider"])
    parser.add_argument(
        "--f1", nargs="+", default=["micro_f1_13", "macro_f1_13"], help="F1 columns, with uncertain as negative"
    )
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    split = options.split or recipe.report.evaluation.split
    studies = build_studies(recipe.studies, recipe.labels, recipe.seed, ("train", split))
    labeler = labeler_of(recipe.report.evaluation.labeler, {})
    training, held_out = studies["train"], studies[split]
    start = time.perf_counter()
    columns = [*options.metrics, *(f"{name}_uncertain_negative" for name in options.f1)]
    states = label_quietly(labeler, uncleaned_reports(training))
    best = best_constants(list(training["report"]), states, labeler, columns, recipe.seed)
    print(f"{len(training)} training studies searched in {time.perf_counter() - start:.1f} s", *best.notes, sep="\n")
    references, true_states = list(held_out["report"]), label_quietly(labeler, uncleaned_reports(held_out))
    print(f"| {len(references)} studies of {split} | {' | '.join(best.reports)} |")
    print("|---" * (len(best.reports) + 1) + "|")
    found = []
    for column, report in best.reports.items():
        reports = [report] * len(references)
        predicted = np.tile(label_quietly(labeler, [report]), (len(references), 1))
        metrics = [column] if column in options.metrics else []
        scores = score_reports(reports, references, predicted, true_states, metrics)
        found.append(scores.scores[column])
    print(f"| best constant report, each column its own | {' | '.join(f'{value:.3f}' for value in found)} |")


if __name__ == "__main__":
    main()
