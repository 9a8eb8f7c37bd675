"""What a terminal shows of a study."""

import io
import re

import pytest
from otdrg import FINDINGS
from otdrg.commands.terminal import format_record, terminal_width, wants_colour


def record(**more):
    findings = {name: {"state": "unmentioned", "probability": 0.5} for name in FINDINGS}
    findings["edema"] = {"state": "negative", "probability": 0.25}
    findings["fracture"] = {"state": "positive", "probability": 0.75}
    findings["cardiomegaly"] = {"state": "unclear", "probability": 0.1}
    return {
        "id": "frontal.png + lateral.png",
        "report": "There is edema. " * 20,
        "complete": True,
        "findings": findings,
        "contradictions": [
            {"finding": "lung_lesion", "given": "unmentioned", "said": "positive", "kind": "added"},
            {"finding": "edema", "given": "negative", "said": "positive", "kind": "contradicted"},
            {"finding": "fracture", "given": "positive", "said": "unmentioned", "kind": "omitted"},
        ],
        **more,
    }


def row_of(shown, finding):
    return next(line for line in shown.splitlines() if finding in line)


@pytest.mark.parametrize("width", [80, 120])
def test_format_record_fits_the_width(width):
    shown = format_record(record(indication="cough and " * 30, steered={"fracture": "positive"}), width)
    assert max(map(len, shown.splitlines())) <= width
    assert any(len(line) > width - 20 for line in shown.splitlines())
    assert " ".join(shown.split()).count("There is edema.") == 20


def test_format_record_truncated_report_is_marked():
    mark = "! cut off at --max-new-tokens"
    assert mark in format_record(record(complete=False), 80) and mark not in format_record(record(), 80)


def test_format_record_mentioned_findings_come_first():
    shown = format_record(record(), 80)
    places = [shown.index(name) for name in ("Fracture", "Cardiomegaly", "Edema", "Lung Lesion", "unmentioned: ")]
    assert places == sorted(places)
    assert row_of(shown, "Fracture").split()[:4] == ["+", "Fracture", "positive", "0.75"]
    assert row_of(shown, "Cardiomegaly").split()[:4] == ["?", "Cardiomegaly", "unclear", "0.10"]
    assert "  Pleural Other 0.50," in shown or ", Pleural Other 0.50," in shown


def test_format_record_finding_that_is_not_given_has_no_probability():
    found = record()
    found["findings"]["edema"] = {"state": "not_given", "probability": None}
    found["contradictions"] = []
    assert row_of(format_record({**found, "steered": {"edema": "not_given"}}, 80), "Edema").split() == [
        *("Edema", "not_given", "-", "given")
    ]


def test_format_record_disagreements_are_marked_and_listed_below():
    shown = format_record(record(), 80)
    assert row_of(shown, "Edema").endswith("! says positive")
    assert row_of(shown, "Fracture").endswith("! not mentioned")
    assert row_of(shown, "Lung Lesion").endswith("! says positive")
    for line in (
        "  ! Lung Lesion: conditioned on unmentioned, says positive",
        "  ! Edema: conditioned on negative, says positive",
        "  ! Fracture: conditioned on positive, not mentioned",
    ):
        assert line in shown.splitlines()
    assert "!" not in format_record(record(contradictions=[]), 80)


def test_format_record_given_states_are_marked():
    shown = format_record(record(steered={"edema": "negative"}), 80)
    assert "given" in row_of(shown, "Edema") and "given" not in row_of(shown, "Fracture")


def test_format_record_without_conditioning_has_predicted_states():
    predicted = record()
    del predicted["contradictions"]
    assert " predicted " in format_record(predicted, 80) and " predicted " not in format_record(record(), 80)


def test_format_record_colour_keeps_the_text():
    plain, painted = (format_record(record(heatmap="a.png"), 80, colour) for colour in (False, True))
    assert "\033" not in plain
    assert re.sub(r"\033\[\d+m", "", painted) == plain and painted.count("\033[0m") > 5


def test_wants_colour_follows_terminal_and_environment():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert wants_colour(Terminal(), {"NO_COLOR": ""})
    assert not wants_colour(Terminal(), {"NO_COLOR": "1"})
    assert not wants_colour(Terminal(), {"TERM": "dumb"})
    assert not wants_colour(io.StringIO(), {})


def test_terminal_width_has_a_minimum(monkeypatch):
    for columns, width in (("100", 100), ("10", 40)):
        monkeypatch.setenv("COLUMNS", columns)
        assert terminal_width() == width
