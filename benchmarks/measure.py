"""How rows of `make benchmark` are measured: designs in turns, CPU time, medians of paired ratios, peak memory.

CPU time is that of all threads, in user and system mode. It depends less than the clock on what else the machine does.
"""

from __future__ import annotations

import math
import multiprocessing
import operator
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CONFIDENCE = 0.9
_COMPARISONS = {"≥": operator.ge, "≤": operator.le}


class NotAvailable(Exception):
    """A row whose inputs are missing; the message says which."""


# --- what a row finds ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Args:
        work: what was compared.
        figure: what the values are, such as "samples/s, ours / theirs".
        values: one for each round.
        reach: the target, such as "≥ 1.5"; empty for none.
    """

    work: str
    figure: str
    values: list[float]
    reach: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def is_reached(self) -> bool | None:
        """Whether the median reaches the target; None without one."""
        if not self.reach:
            return None
        sign, number = self.reach.split()
        return _COMPARISONS[sign](self.median, float(number))

    def cells(self) -> list[str]:
        """The cells of the line in Markdown."""
        low, high = median_interval(self.values)
        interval = f"{low:.3g} to {high:.3g}" if len(self.values) > 1 else "–"
        reached = {None: "", True: " (reached)", False: " (not reached)"}[self.is_reached]
        cells = [self.work, self.figure, f"{self.median:.3g}", interval, str(len(self.values)), self.reach + reached]
        return [cell.replace("|", "\\|") for cell in cells]


@dataclass
class Row:
    """What a row found: its lines, and sentences and pictures that are shown below the table."""

    lines: list[Line]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Row:
        return cls([Line(**line) for line in saved["lines"]], list(saved["notes"]))


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """An interval that holds the true median with at least this confidence, whatever the distribution.

    It runs from the k-th smallest to the k-th largest value, by the sign test; k is as large as the confidence allows.
    With fewer than 5 values the smallest and the largest are returned, and the confidence is lower.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values: expected at least one")
    ordered, count = sorted(values), len(values)
    k = 0
    # From the (k + 1)-th smallest to the (k + 1)-th largest: outside lies the median if at most k values are on a side.
    while k + 1 <= (count - 1) // 2:
        outside = 2 * sum(math.comb(count, below) for below in range(k + 2)) / 2**count
        if 1 - outside < confidence:
            break
        k += 1
    return ordered[k], ordered[count - 1 - k]


# --- time ------------------------------------------------------------------------------------------------------------


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of all threads of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def in_turns(works: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """CPU seconds of each work in each round; rounds run all works in turn: A B A B."""
    measures = {name: lambda work=work: cpu_seconds(work) for name, work in works.items()}
    return measured_in_turns(measures, rounds, warm_up)


def measured_in_turns(measures: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 0) -> dict[str, list[Any]]:
    """What each function returns in each round, after some rounds that are not kept."""
    found: dict[str, list[Any]] = {name: [] for name in measures}
    for number in range(warm_up + rounds):
        for name, measure in measures.items():
            value = measure()
            if number >= warm_up:
                found[name].append(value)
    return found


def ratios(top: Sequence[float], bottom: Sequence[float]) -> list[float]:
    """The ratio of each round."""
    return [one / other for one, other in zip(top, bottom, strict=True)]


@dataclass(frozen=True)
class Spent:
    """What a command took: elapsed and CPU seconds, and the largest resident set of one of its processes in bytes."""

    wall: float
    cpu: float
    peak: int


def spent(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Spent:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed; the message holds its last line.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode}, {said.strip().splitlines()[-1:]}")
    return Spent(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, _bytes(usage.ru_maxrss))


# --- memory ----------------------------------------------------------------------------------------------------------


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a new process, whose memory holds nothing else."""
    with multiprocessing.get_context("spawn").Pool(1, quiet) as pool:
        return pool.apply(function, arguments)


def quiet() -> None:
    """Hide progress bars and warnings of transformers in this process."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()


def peak_bytes(work: Callable[[], object]) -> tuple[int, int]:
    """The resident set before some work, and its peak during the work, in bytes.

    Raises:
        NotAvailable: only Linux can forget an earlier peak.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        raise NotAvailable("peak memory is measured on Linux only") from None
    before = _status("VmRSS")
    work()
    return before, _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _bytes(maximum: int) -> int:
    """`ru_maxrss` in bytes; macOS counts bytes, Linux KiB."""
    return maximum if sys.platform == "darwin" else maximum * 1024


__all__ = [
    "Line",
    "NotAvailable",
    "Row",
    "Spent",
    "cpu_seconds",
    "in_process",
    "in_turns",
    "measured_in_turns",
    "median_interval",
    "peak_bytes",
    "quiet",
    "ratios",
    "spent",
]
