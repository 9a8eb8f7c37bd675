"""Measure the throughput and peak memory of `otdrg prepare` on phantoms.

    python benchmarks/studies.py --studies 2000 20000 --num-proc 1 2

Prints a Markdown table. Memory is the peak of the summed resident sets of the command and its child processes, sampled
ten times a second. Pages shared by several processes are counted once for each, so the sum is an upper bound.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, nargs="+", default=[2000, 20000], help="numbers of studies")
    parser.add_argument("--num-proc", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--image-size", type=int, default=224, help="height and width of a view in pixels")
    parser.add_argument("--views", nargs="+", default=["frontal"], help="views per study")
    options = parser.parse_args()
    print("| processes | studies | seconds | studies/s | peak memory, MiB | memory, ratio to the first |")
    print("|---|---|---|---|---|---|")
    for num_proc in options.num_proc:
        first = None
        for studies in options.studies:
            seconds, peak = measure(studies, num_proc, options.image_size, options.views)
            first = first or peak
            row = (num_proc, f"{studies:,}", f"{seconds:.1f}", f"{studies / seconds:.1f}", f"{peak / 2**20:.0f}")
            print(f"| {' | '.join(map(str, row))} | {peak / first:.3f} |", flush=True)


def measure(studies: int, num_proc: int, image_size: int, views: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes of one build."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "otdrg.cli", "prepare", "phantom", "--output", str(Path(folder) / "built")]
        command += ["--train", str(studies), "--validation", "0", "--test", "0", "--image-size", str(image_size)]
        command += ["--num-proc", str(num_proc), "--views", *views]
        start = time.perf_counter()
        process = psutil.Popen(command, stdout=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _resident(process))
            time.sleep(0.1)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
        return time.perf_counter() - start, peak


def _resident(process: psutil.Process) -> int:
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    except psutil.NoSuchProcess:
        pass  # the process has just ended
    return total


if __name__ == "__main__":
    main()
