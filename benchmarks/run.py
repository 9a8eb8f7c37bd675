"""Measure the rows of `benchmarks/results.md`, one process for each, and write the page.

    python benchmarks/run.py
    python benchmarks/run.py --rows sinkhorn score --again
    python benchmarks/run.py --rounds 1 --output results.md

A row that is measured is kept in build/benchmark and not measured again, so that an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measure import CONFIDENCE, NotAvailable, Row, quiet

FOLDER = Path(__file__).parent
#: Modules of `rows`, in the order of the page; each has TITLE, ABOUT and `measure(rounds, folder)`.
ROWS = (
    "training_step",
    "gemm_share",
    "attention",
    "sinkhorn",
    "generation",
    "loading",
    "evaluation_loss",
    "score",
    "first_report",
    "scaling",
    "busy_machine",
)
PACKAGES = ("torch", "transformers", "peft", "timm", "numpy", "POT", "pycocoevalcap")


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing, and write the page.

    Returns:
        The exit status: 1 if a row failed.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=5, help="paired measurements (default: 5)")
    parser.add_argument("--again", action="store_true", help="measure rows that are measured already")
    parser.add_argument("--folder", type=Path, default=FOLDER.parent / "build" / "benchmark", help="of finished rows")
    parser.add_argument("--output", type=Path, default=FOLDER / "results.md", help="the page")
    parser.add_argument("--measure", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}: expected at least 1")
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.measure:
        return measure(options.measure, options.rounds, options.folder)
    failed = []
    for name in options.rows:
        if options.again or not (options.folder / f"{name}.json").is_file():
            print(f"{name} ...", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--measure", name, "--rounds", str(options.rounds)]
            # One thread: what is compared is work, and the work of two threads depends on how they wait.
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            status = subprocess.run([*command, "--folder", str(options.folder)], env=environment).returncode
            failed += [name] if status else []
    saved = {name: options.folder / f"{name}.json" for name in ROWS}
    found = {name: json.loads(path.read_text("utf-8")) for name, path in saved.items() if path.is_file()}
    options.output.write_text(format_page(found), encoding="utf-8")
    print(f"{options.output}; failed: {', '.join(failed) or 'none'}", file=sys.stderr)
    return 1 if failed else 0


def measure(name: str, rounds: int, folder: Path) -> int:
    """Measure a row in this process, and keep what it found."""
    quiet()
    module, start = import_module(f"rows.{name}"), time.perf_counter()
    try:
        row = module.measure(rounds, folder)
    except NotAvailable as reason:
        row = Row([], [f"Not measured: {reason}."])
    record = {
        "title": module.TITLE,
        "about": module.ABOUT,
        **row.to_dict(),
        "seconds": time.perf_counter() - start,
        "versions": versions(),
    }
    unfinished = folder / f"{name}.json.unfinished"
    unfinished.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    unfinished.rename(folder / f"{name}.json")
    return 0


def versions() -> dict[str, str]:
    """Versions of the packages that are compared, and the machine in general words."""
    import torch

    found = {"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    capability = torch.backends.cpu.get_cpu_capability()
    return {**found, "machine": f"{platform.machine()}, {os.cpu_count()} cores, {capability}"}


def format_page(found: dict[str, dict[str, Any]]) -> str:
    """The page of rows `{name: record}`."""
    lines = [
        "# Measured comparisons",
        "",
        "Written by `make benchmark` (`benchmarks/run.py`; one row again: `--rows NAME --again`). Each figure is the",
        "median of paired measurements: in each round the alternatives run in turn (A B A B), on one thread, and their",
        "CPU times (user and system, all threads) are divided. The interval holds the median with a confidence of at",
        f"least {CONFIDENCE:.0%} (sign test; with fewer than 5 rounds it is the range).",
    ]
    for machine, names in _by_versions(found).items():
        lines += ["", f"{', '.join(names) if len(found) > len(names) else 'All rows'}: {machine}."]
    for record in found.values():
        row = Row.of(record)
        lines += ["", f"## {record['title']}", "", record["about"]]
        if row.lines:
            lines += ["", "| work | figure | median | interval | rounds | reach |", "|---|---|---|---|---|---|"]
            lines += [f"| {' | '.join(line.cells())} |" for line in row.lines]
        for note in row.notes:
            lines += ["", note]
        lines += ["", f"Measured in {record['seconds']:.0f} s."]
    return "\n".join(lines) + "\n"


def _by_versions(found: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """The rows that were measured with the same versions on the same machine."""
    groups: dict[str, list[str]] = {}
    for record in found.values():
        text = ", ".join(
            value if name == "machine" else f"{name} {value}" for name, value in record["versions"].items()
        )
        groups.setdefault(text, []).append(record["title"])
    return groups


if __name__ == "__main__":
    sys.exit(main())
