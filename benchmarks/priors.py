"""Whether models use the prior study: the change words of their reports on phantoms with priors.

python benchmarks/priors.py runs/phantom_priors runs/phantom_no_priors

Reads the studies of each run's recipe (`recipes/phantom_priors.yaml`), generates the reports of its test split with and
without the images of the priors, and prints how often the report says "new", "unchanged" or "resolved" as the true one.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from otdrg.inference.generation import generate_reports
from otdrg.inference.loading import load_published
from otdrg.runtime.printable import markdown_table
from otdrg.training.data import build_studies
from otdrg.training.recipe import load_recipe

_CHANGE = re.compile(r"is (new|unchanged)\b|has (resolved)\b", re.IGNORECASE)


def change_word(report: str) -> str:
    """The last change that a report states; "" if it states none."""
    found = _CHANGE.findall(report)
    return "".join(found[-1]).lower() if found else ""


def accuracy(reports: Sequence[str], references: Sequence[str], among: Sequence[str]) -> float:
    """The share of reports with the change of the reference, of the studies whose reference has one of `among`."""
    pairs = [(change_word(report), change_word(truth)) for report, truth in zip(reports, references, strict=True)]
    chosen = [written == true for written, true in pairs if true in among]
    return sum(chosen) / len(chosen)


def rows_of(run: Path, batch_size: int) -> list[list[str]]:
    """The rows of a run: its test studies with their priors, and without."""
    recipe = load_recipe(run / "recipe.yaml")
    studies = build_studies(recipe.studies, recipe.labels, splits=("test",))["test"]
    model, processor = load_published(run / "model")
    references = list(studies["report"])
    conditions = {"": studies}
    if model.config.reads_prior_images:
        conditions = {
            "with the prior": studies,
            "the same model, prior removed": studies.remove_columns(["prior_images", "prior_report"]),
        }
    rows = []
    for name, condition in conditions.items():
        reports = generate_reports(model, processor, condition, batch_size, dict(recipe.report.generation)).reports
        shares = [
            accuracy(reports, references, among)
            for among in (("new", "unchanged", "resolved"), ("new", "unchanged"), ("resolved",))
        ]
        silent = sum(not change_word(report) for report in reports)
        title = f"{run.name}: priors={model.config.priors}{f', {name}' if name else ''}"
        rows.append([title, *(f"{share:.3f}" for share in shares), f"{silent} of {len(reports)}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run of phantom_priors.yaml")
    parser.add_argument("--batch-size", type=int, default=50, help="studies generated at a time (default: 50)")
    options = parser.parse_args()
    header = ["model", "all", "new or unchanged", "resolved", "no change word"]
    print(markdown_table(header, [row for run in options.runs for row in rows_of(run, options.batch_size)]))


if __name__ == "__main__":
    main()
