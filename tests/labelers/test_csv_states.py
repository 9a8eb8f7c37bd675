"""States read from CSV files of chexpert-labeler or CheXbert."""

import csv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from otdrg.findings_otdrg import FINDING_DISPLAY_NAMES, FINDINGS
from otdrg.labelers import read_states

VALUES = {0: "", 1: "1.0", 2: "0", 3: "-1"}
HEADER = ["id", *reversed(FINDING_DISPLAY_NAMES.values())]


def write(path, rows, header=HEADER, encoding="utf-8"):
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def blank(study):
    return [study] + [""] * 14


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=14, max_size=14), min_size=1, max_size=5), st.randoms())
def test_read_states_columns_in_any_order(tmp_path_factory, states, random):
    for row in states:
        row[-1] %= 2
    order = list(FINDINGS)
    random.shuffle(order)
    header = [
        "REPORT",
        *(random.choice([str.upper, str.lower])(FINDING_DISPLAY_NAMES[n]) + " " for n in order),
        "Study",
    ]
    rows = [
        ["a, b", *(VALUES[row[FINDINGS.index(name)]] for name in order), f"s{position}"]
        for position, row in enumerate(states)
    ]
    path = write(tmp_path_factory.mktemp("csv") / "a.csv", rows, header, random.choice(["utf-8", "utf-8-sig"]))
    read = read_states(path, id_column="study")
    assert list(read) == [f"s{position}" for position in range(len(states))]
    np.testing.assert_array_equal(np.array(list(read.values())), states)


def test_read_states_negative_no_finding_is_unmentioned(tmp_path):
    row = blank("a")
    row[HEADER.index("No Finding")] = "0"
    assert not read_states(write(tmp_path / "a.csv", [row]))["a"].any()


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (["study", *HEADER[1:]], [], r"a\.csv: no column of study ids, expected a column 'id'; columns: study, "),
        (HEADER[:-1], [], r"a\.csv: columns missing: Enlarged Cardiomediastinum"),
        ([*HEADER, "edema"], [], r"a\.csv: 2 columns 'Edema'"),
        (HEADER, [["a", "", "2", *[""] * 12]], r"a\.csv, line 2, column Support Devices: '2', expected 1 \(positive\)"),
        (HEADER, [["a", "", "yes", *[""] * 12]], r"line 2, column Support Devices: 'yes'"),
        (HEADER, [["a", "-1", *[""] * 13]], r"line 2, column No Finding: -1, expected 1, 0 or blank"),
        (HEADER, [blank("a"), blank("b"), blank("a")], r"line 4, column id: 'a' is in line 2 too"),
        (HEADER, [blank(" ")], r"line 2, column id: empty"),
        (HEADER, [["a", "1"]], r"line 2: 2 values, expected 15"),
        ([], [], r"no column of study ids"),
    ],
)
def test_read_states_faults_are_named(tmp_path, header, rows, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_states(write(tmp_path / "a.csv", rows, header))
    assert "\n" not in str(caught.value)


def test_read_states_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.csv: cannot be read"):
        read_states(tmp_path / "none.csv")
    path = write(tmp_path / "a.csv", [blank("müller")], encoding="latin-1")
    with pytest.raises(ValueError, match=r"a\.csv: not UTF-8"):
        read_states(path)
