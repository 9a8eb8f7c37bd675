"""Measure the labeler `rules`: the whole command `otdrg label` including start-up, on one core.

    python benchmarks/labelers.py
    python benchmarks/labelers.py --reports reports.csv --option repeat_mistakes=true

Without `--reports` it labels reports of phantoms, which repeat sentences more often than real reports do.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reports", type=Path, help="CSV with the columns id and report")
    parser.add_argument("--count", type=int, default=3000, help="reports to label; those given are repeated or cut")
    parser.add_argument("--option", nargs="*", default=[], metavar="NAME=VALUE", help="options of the labeler")
    parser.add_argument("--runs", type=int, default=5, help="runs, one row each")
    options = parser.parse_args()
    reports = phantom_reports(options.count) if options.reports is None else read_reports(options.reports)
    reports = [reports[position % len(reports)] for position in range(options.count)]
    print("| reports | different | seconds | reports/s |")
    print("|---|---|---|---|")
    for _ in range(options.runs):
        seconds = measure(reports, options.option)
        row = (f"{len(reports):,}", f"{len(set(reports)):,}", f"{seconds:.2f}", f"{len(reports) / seconds:,.0f}")
        print(f"| {' | '.join(row)} |", flush=True)


def phantom_reports(count: int) -> list[str]:
    from numpy.random import default_rng
    from otdrg.studies.phantom import sample_states, write_report

    streams = (default_rng([0, index]) for index in range(count))
    return [write_report(sample_states(stream), stream) for stream in streams]


def read_reports(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return [row["report"] for row in csv.DictReader(file)]


def measure(reports: list[str], options: list[str]) -> float:
    """Elapsed seconds of the command."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "reports.csv"
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "report"])
            writer.writerows(enumerate(reports))
        command = [sys.executable, "-m", "otdrg.cli", "label", "--reports", str(table), "--labeler", "rules"]
        command += ["--output", str(Path(folder) / "labels.csv")]
        command += [word for option in options for word in ("--option", option)]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, preexec_fn=_on_one_core)
        return time.perf_counter() - start


def _on_one_core() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


if __name__ == "__main__":
    main()
