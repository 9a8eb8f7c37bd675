"""Measure whole commands on phantoms, including start-up: time, CPU time and peak memory.

python benchmarks/commands.py prepare --sizes 2000 20000 --num-proc 2 --views frontal
python benchmarks/commands.py label --sizes 3000 --cores 1 --option repeat_mistakes=true
python benchmarks/commands.py score --sizes 600 3858 --bootstrap 1000

Other options are passed to the command. `label` and `score` read reports of phantoms, which repeat sentences more often
than real reports do. Memory is the peak of the summed resident sets of all processes, sampled ten times a second, with
shared pages counted once for each process. `score` computes METEOR if Java is installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from numpy.random import default_rng
from otdrg.studies.phantom import sample_states, write_report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Other options are passed to the command."
    )
    parser.add_argument("command", choices=("prepare", "label", "score"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[2000], help="numbers of studies (default: 2000)")
    parser.add_argument("--cores", type=int, default=2, help="cores the command may use (default: 2)")
    parser.add_argument("--runs", type=int, default=1, help="runs for each size, one row each (default: 1)")
    options, others = parser.parse_known_args()
    print("| studies | seconds | studies/s | CPU seconds | peak memory, MiB |")
    print("|---|---|---|---|---|")
    for size in options.sizes:
        for _ in range(options.runs):
            with tempfile.TemporaryDirectory() as folder:
                arguments = arguments_of(options.command, size, Path(folder))
                command = [sys.executable, "-m", "otdrg.cli", options.command, *arguments, *others]
                seconds, cpu, peak = measure(command, options.cores)
            print(f"| {size:,} | {seconds:.1f} | {size / seconds:,.1f} | {cpu:.1f} | {peak / 2**20:.0f} |", flush=True)


def arguments_of(command: str, size: int, folder: Path) -> list[str]:
    """Arguments of a command on this many phantoms; writes the files that it reads."""
    if command == "prepare":
        splits = ["--train", str(size), "--validation", "0", "--test", "0"]
        return ["phantom", *splits, "--output", str(folder / "studies")]
    paths = [folder / "references.jsonl", folder / "predictions.jsonl"]
    for seed, path in enumerate(paths):
        streams = [default_rng([seed, index]) for index in range(size)]
        reports = [write_report(sample_states(stream), stream) for stream in streams]
        lines = [json.dumps({"id": index, "report": report}) for index, report in enumerate(reports)]
        path.write_text("\n".join(lines), encoding="utf-8")
    references, predictions = map(str, paths)
    if command == "label":
        return ["--reports", references, "--labeler", "rules", "--output", str(folder / "states.csv")]
    return ["--references", references, "--predictions", predictions, "--output", str(folder / "scores.json")]


def measure(command: list[str], cores: int) -> tuple[float, float, int]:
    """Elapsed seconds, CPU seconds and peak bytes of a command and its child processes."""
    start, peak, cpu = time.perf_counter(), 0, {}
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    if hasattr(process, "cpu_affinity"):
        process.cpu_affinity(process.cpu_affinity()[:cores])
    while process.poll() is None:
        memory = 0
        try:
            for one in (process, *process.children(recursive=True)):
                memory += one.memory_info().rss
                cpu[one.pid] = sum(one.cpu_times()[:2])
        except psutil.NoSuchProcess:
            pass  # the process has just ended
        peak = max(peak, memory)
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return time.perf_counter() - start, sum(cpu.values()), peak


if __name__ == "__main__":
    main()
