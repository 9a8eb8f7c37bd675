"""The harness of benchmarks/run.py: its statistics, the order of measurements, and its page."""

import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

FOLDER = Path(__file__).parents[1] / "benchmarks"
VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def measure():
    return load("measure")


@pytest.fixture(scope="module")
def run():
    sys.path.append(str(FOLDER))
    try:
        yield load("run")
    finally:
        sys.path.remove(str(FOLDER))


def load(name):
    """A module of the folder, by its path."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@given(values=VALUES)
def test_median_interval_holds_the_median_and_no_other_values_than_given(measure, values):
    low, high = measure.median_interval(values)
    assert low in values and high in values
    assert low <= statistics.median(values) <= high


@given(count=st.integers(5, 60), confidence=st.floats(0.5, 0.93))
def test_median_interval_is_the_narrowest_of_its_confidence(measure, count, confidence):
    low, high = measure.median_interval(list(range(count)), confidence)

    def chance(k):
        """That at least k + 1 of the values lie on either side of the median."""
        return 1 - 2 * sum(math.comb(count, below) for below in range(k + 1)) / 2**count

    assert low == count - 1 - high
    assert chance(low) >= confidence
    assert chance(low + 1) < confidence or low == (count - 1) // 2


def test_median_interval_of_five_rounds_is_their_range(measure):
    assert measure.median_interval([3, 1, 2, 5, 4]) == (1, 5)
    assert measure.median_interval([3, 1, 2, 5, 4, 8, 7, 6]) == (2, 7)
    with pytest.raises(ValueError, match="no values: expected at least one"):
        measure.median_interval([])


@given(pairs=st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)), min_size=1), scale=st.floats(0.1, 10))
def test_ratios_do_not_depend_on_the_speed_of_a_round(measure, pairs, scale):
    top, bottom = zip(*pairs, strict=True)
    slower = measure.ratios([scale * value for value in top], [scale * value for value in bottom])
    assert slower == pytest.approx(measure.ratios(top, bottom))


def test_in_turns_alternates_and_leaves_out_the_warm_up(measure):
    order = []
    works = {name: lambda name=name: order.append(name) for name in "AB"}
    found = measure.in_turns(works, rounds=3, warm_up=1)
    assert "".join(order) == "ABABABAB"
    assert {name: len(seconds) for name, seconds in found.items()} == {"A": 3, "B": 3}
    assert all(seconds >= 0 for each in found.values() for seconds in each)


def test_cpu_seconds_do_not_count_waiting(measure):
    assert measure.cpu_seconds(lambda: time.sleep(0.2)) < 0.1


@pytest.mark.skipif(sys.platform == "win32", reason="os.wait4 is not there")
def test_spent_counts_the_command_and_its_children_and_names_a_failure(measure):
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    child = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])"
    found = measure.spent([sys.executable, "-c", child])
    assert found.cpu >= 0.3 and found.wall > 0 and found.peak > 2**20
    with pytest.raises(RuntimeError, match=r"exit status 3, .*went wrong"):
        measure.spent([sys.executable, "-c", "import sys\nprint('it went wrong', file=sys.stderr)\nsys.exit(3)"])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can forget an earlier peak")
def test_peak_bytes_counts_what_is_freed_again_but_nothing_from_before(measure):
    bytearray(300 * 2**20)
    before, peak = measure.peak_bytes(lambda: bytearray(100 * 2**20))
    assert 90 * 2**20 < peak - before < 200 * 2**20


@pytest.mark.parametrize(
    ("values", "reach", "cells"),
    [
        ([1.2, 1.6, 1.7, 1.8, 9.0], "≥ 1.5", ["1.7", "1.2 to 9", "5", "≥ 1.5 (reached)"]),
        ([1.2], "≥ 1.5", ["1.2", "–", "1", "≥ 1.5 (not reached)"]),
        ([0.5, 0.7], "≤ 0.6", ["0.6", "0.5 to 0.7", "2", "≤ 0.6 (reached)"]),
        ([1234.5], "", ["1.23e+03", "–", "1", ""]),
    ],
)
def test_line_says_whether_its_target_is_reached(measure, values, reach, cells):
    line = measure.Line("a | b", "ratio", values, reach)
    assert line.cells() == ["a \\| b", "ratio", *cells]


def test_page_has_a_table_for_each_row_and_groups_rows_by_versions(run):
    row = {"title": "Sinkhorn", "about": "About it.", "notes": ["Limited by exp."], "seconds": 3.0}
    row |= {"lines": [{"work": "unit", "figure": "time", "values": [0.5], "reach": "≤ 0.4"}]}
    row |= {"versions": {"torch": "2.14", "machine": "2 cores"}}
    other = {**row, "title": "Loading", "lines": [], "notes": ["Not measured: no file."]}
    page = run.format_page({"sinkhorn": row, "loading": other})
    assert "\nAll rows: torch 2.14, 2 cores.\n" in page
    assert "| unit | time | 0.5 | – | 1 | ≤ 0.4 (not reached) |" in page
    assert page.index("## Sinkhorn") < page.index("Limited by exp.") < page.index("## Loading")
    assert page.count("| work | figure |") == 1 and "Not measured: no file." in page
    newer = {**other, "versions": {"torch": "2.15", "machine": "2 cores"}}
    page = run.format_page({"sinkhorn": row, "loading": newer})
    assert "\nSinkhorn: torch 2.14, 2 cores.\n" in page and "\nLoading: torch 2.15, 2 cores.\n" in page


def test_run_keeps_finished_rows_and_names_failed_ones(run, tmp_path, monkeypatch):
    asked = []

    def process(command, **_):
        asked.append(command[command.index("--measure") + 1])
        return subprocess.CompletedProcess(command, asked[-1] == "score")

    record = {"title": "Sinkhorn", "about": "", "lines": [], "notes": [], "seconds": 1, "versions": {"torch": "2"}}
    (tmp_path / "sinkhorn.json").write_text(json.dumps(record))
    monkeypatch.setattr(run.subprocess, "run", process)
    arguments = ["--folder", str(tmp_path), "--output", str(tmp_path / "page.md"), "--rows", "sinkhorn", "score"]
    assert run.main(arguments) == 1
    assert asked == ["score"] and "## Sinkhorn" in (tmp_path / "page.md").read_text()
    assert run.main([*arguments, "--again"]) == 1
    assert asked == ["score", "sinkhorn", "score"]


def test_every_row_has_its_module_and_its_texts():
    sources = {path.stem: path.read_text() for path in (FOLDER / "rows").glob("*.py")}
    spec = (FOLDER / "run.py").read_text()
    names = spec[spec.index("ROWS = (") : spec.index(")\nPACKAGES")].split('"')[1::2]
    assert len(names) == 11
    for name in names:
        assert "\ndef measure(rounds: int, folder: Path) -> Row:" in sources[name]
        assert "\nTITLE = " in sources[name] and "\nABOUT = " in sources[name]
