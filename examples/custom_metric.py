"""Add a metric: the length of the generated report, relative to the true one.

python examples/custom_metric.py runs/quickstart/predictions.csv

The table has the columns id, report and reference, like predictions.csv in a run folder.
"""

from __future__ import annotations

import argparse
import csv

from otdrg.metrics import Metric, MetricResult, Score, register, score_reports


def length_ratio(predictions: list[str], references: list[str]) -> MetricResult:
    """Words of the generated report per word of the true report, averaged over studies."""
    pairs = zip(predictions, references, strict=True)
    return MetricResult.from_means({"length_ratio": [len(one.split()) / len(other.split()) for one, other in pairs]})


# In the package, this metric is a module of metrics/ and a line of `METRICS` in metrics/registry.py.
register(
    Metric(name="length_ratio", scores={"length_ratio": Score(display="length ratio", main=True)}, compute=length_ratio)
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", help="CSV with the columns id, report and reference")
    options = parser.parse_args()
    with open(options.table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    scored = score_reports(
        [row["report"] for row in rows], [row["reference"] for row in rows], metrics=["length_ratio", "rouge_l"]
    )
    for name, score in scored.scores.items():
        print(f"{name}: {score:.3f}")


if __name__ == "__main__":
    main()
