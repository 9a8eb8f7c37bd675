"""Measure `otdrg score`: the whole command including start-up, on at most two cores.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --reports 600 3858 --against

The reports are those of phantoms. All scores are computed, including METEOR if Java is installed. CPU seconds include
those of Java.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from numpy.random import default_rng
from otdrg.studies.phantom import sample_states, write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reports", type=int, nargs="+", default=[600], help="numbers of reports")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples")
    parser.add_argument("--against", action="store_true", help="also compare with a second system")
    parser.add_argument("--runs", type=int, default=3, help="runs for each number of reports, one row each")
    options = parser.parse_args()
    print("" if shutil.which("java") else "no java on the PATH: METEOR is not computed\n", end="")
    print("| reports | resamples | seconds | CPU seconds |")
    print("|---|---|---|---|")
    for reports in options.reports:
        for _ in range(options.runs):
            seconds, cpu = measure(reports, options.bootstrap, options.against)
            print(f"| {reports:,} | {options.bootstrap:,} | {seconds:.1f} | {cpu:.1f} |", flush=True)


def measure(reports: int, resamples: int, against: bool) -> tuple[float, float]:
    """Elapsed seconds and CPU seconds of the command."""
    with tempfile.TemporaryDirectory() as folder:
        names = ["references", "predictions", *(["against"] if against else [])]
        command = [sys.executable, "-m", "otdrg.cli", "score", "--output", str(Path(folder) / "scores.json")]
        command += ["--bootstrap", str(resamples)]
        for seed, name in enumerate(names):
            path = Path(folder) / f"{name}.jsonl"
            write_phantom_reports(path, reports, seed)
            command += [f"--{name}", str(path)]
        start, before = time.perf_counter(), os.times()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, preexec_fn=_on_two_cores)
        seconds, after = time.perf_counter() - start, os.times()
        return seconds, sum(after[2:4]) - sum(before[2:4])


def write_phantom_reports(path: Path, reports: int, seed: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for index in range(reports):
            stream = default_rng([seed, index])
            report = write_report(sample_states(stream), stream)
            file.write(json.dumps({"id": index, "report": report}) + "\n")


def _on_two_cores() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:2]))


if __name__ == "__main__":
    main()
