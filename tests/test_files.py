"""Files of text: JSON, YAML and CSV are read and written in one place each, and text of others is shown escaped."""

import csv
import json
import logging
import os
import stat
import time
import tracemalloc
import unicodedata

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from otdrg.files_otdrg import follow_umask, read_json, write_json, write_text
from otdrg.labelers import read_states, write_states
from otdrg.labelers.report_table import read_reports
from otdrg.runtime.csv_files import escape_cell, unescape_cell, write_csv
from otdrg.runtime.printable import PrintableFormatter, one_line, printable
from otdrg.runtime.yaml_files import parse_yaml, read_yaml

CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))

# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not valid JSON"),
        (b'{"a": ', "is not valid JSON"),
        (b"{\0}", "is not valid JSON"),
        (b"\xff\xfe{}", "is not UTF-8 text"),
        (b"null", "holds null: expected a JSON object"),
        (b"[1]", "holds a list: expected a JSON object"),
        (b'"a"', "holds a str: expected a JSON object"),
        (b"[" * 1_000_000, "nested too deeply"),
        (b'{"a":' * 150 + b"1" + b"}" * 150, "nested too deeply"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "is not valid JSON"),
        (b" " * 2000, "has more than 1,000 bytes"),
    ],
    ids=["empty", "cut", "NUL", "UTF-16", "null", "list", "string", "deep", "deep and closed", "digits", "large"],
)
def test_read_json_damaged_file_is_named(tmp_path, data, message):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(path, limit=1000 if b" " * 100 in data else 2**27)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "parse", [lambda it: it["b"], lambda it: it["a"]["b"], lambda it: it.b, lambda it: [*it["a"]], lambda it: int("x")]
)
def test_read_json_content_of_another_form_is_named(tmp_path, parse):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError) as caught:
        read_json(path, parse=parse)
    assert str(caught.value).startswith(f"{path}: ")


def test_read_json_endless_file_is_refused():
    with pytest.raises(ValueError, match="/dev/zero has more than 1,000 bytes"):
        read_json("/dev/zero", limit=1000)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_write_text_replaces_a_file_as_a_whole_and_follows_the_umask(tmp_path, umask):
    path = tmp_path / "a.json"
    before = os.umask(umask)
    try:
        write_json(path, {"b": "é", "a": 1})
        with pytest.raises(UnicodeEncodeError):
            write_text(path, "\ud800")
    finally:
        os.umask(before)
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": "é", "a": 1}
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask and list(tmp_path.iterdir()) == [path]


def test_follow_umask_leaves_permissions_that_were_set(tmp_path):
    path = tmp_path / "a"
    path.write_text("")
    path.chmod(0o640)
    follow_umask(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


# --- YAML ------------------------------------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 30)
)


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "more than 1,000,000 values"),
        ("a: &a [*a]", r"the alias \*a is undefined or contains itself"),
        ("a: *b", "not valid YAML"),
        ("[" * 100_000, "nested more than 100 levels"),
        ("a: [", "not valid YAML"),
        ("a:\n\tb: 1", "not valid YAML"),
        ("a: 1\na: 2", "the key 'a' is repeated"),
        ("a: {b: 1, b: 2}", "the key 'b' is repeated"),
        ("a: \0", "not valid YAML"),
        ("a: !!python/object/apply:os.system [true]", "not valid YAML"),
        ("? [a]\n: 1", "expected scalars as keys"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
    ],
)
def test_read_yaml_damaged_file_is_named(tmp_path, text, message, as_text):
    if as_text and "!!python" in text:
        text = "a: ["  # without types there is nothing to refuse
        message = "not valid YAML"
    path = tmp_path / "a.yaml"
    path.write_text(text)
    began = time.monotonic()
    tracemalloc.start()
    with pytest.raises(ValueError, match=message) as caught:
        read_yaml(path, as_text)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert time.monotonic() - began < 10 and used < 2**26


def test_parse_yaml_date_that_is_none_is_refused():
    with pytest.raises(ValueError, match="x is not valid YAML: month must be in"):
        parse_yaml("a: 2001-99-99", "x")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text("abé#:- ", max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
        max_leaves=8,
    )
)
def test_parse_yaml_reads_what_yaml_writes(content):
    assert parse_yaml(yaml.safe_dump(content, allow_unicode=True), "x") == content


def test_parse_yaml_anchors_merges_and_exponents_are_read():
    text = "a: &a {x: 1e-4, y: 1}\nb: {<<: *a, y: 2}\nc: *a"
    assert parse_yaml(text, "x") == {"a": {"x": 1e-4, "y": 1}, "b": {"x": 1e-4, "y": 2}, "c": {"x": 1e-4, "y": 1}}
    assert parse_yaml("a: no", "x", as_text=True) == {"a": "no"}


# --- CSV -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=1+1", "'=1+1"),
        ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("\r=1", "'\r=1"),
        ("＝1", "'＝1"),
        ("'=1", "''=1"),
        ("'quoted'", "'quoted'"),
        ("-1", "-1"),
        ("+1.5", "+1.5"),
        ("-.5e-3", "-.5e-3"),
        (-1, -1),
        (-0.5, -0.5),
        (None, None),
        ("", ""),
        ("No effusion - stable.", "No effusion - stable."),
    ],
)
def test_escape_cell_formula_becomes_text_and_number_stays(cell, written):
    assert escape_cell(cell) == written
    assert not isinstance(cell, str) or unescape_cell(written) == cell


@given(CELLS)
def test_unescape_cell_gives_the_text_back(cell):
    written = escape_cell(cell)
    assert unescape_cell(written) == cell
    assert not written.startswith(("=", "@", "\t", "\r"))


def test_write_csv_is_read_back_by_the_readers_of_reports_and_states(tmp_path):
    ids = ["=a", "-1", "@b", "'=c", "+d", "e"]
    write_csv(tmp_path / "reports.csv", ["id", "report"], [(name, f"-{name}\nclear") for name in ids])
    with (tmp_path / "reports.csv").open(newline="") as file:
        assert all(cell[:1] not in ("=", "@", "+") for row in csv.reader(file) for cell in row)
    assert list(read_reports(tmp_path / "reports.csv")) == [(name, f"-{name}\nclear") for name in ids]
    write_states(tmp_path / "states.csv", [(name, [2, 3, 1, *[0] * 11]) for name in ids])
    assert "-1" in (tmp_path / "states.csv").read_text().splitlines()[1].split(",")
    states = read_states(tmp_path / "states.csv")
    assert list(states) == ids and states["=a"].tolist()[:3] == [2, 3, 1]


# --- the terminal ----------------------------------------------------------------------------------------------------


@given(st.text())
def test_printable_text_has_no_controls_and_stays_the_same_json(text):
    shown = printable(text)
    assert not {unicodedata.category(it) for it in shown if it not in "\n\t"} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert json.loads(printable(json.dumps(text, ensure_ascii=False))) == text
    assert "\n" not in one_line(text)
    shown.encode()


@pytest.mark.parametrize("character", ["\x1b", "\x9b", "\x07", "\b", "\x7f", "\u202e", "\u2066", "\u200e", "\u2028"])
def test_printable_escapes_what_a_terminal_obeys(character):
    assert printable(f"a{character}b") == f"a{json.dumps(character)[1:-1]}b"


def test_printable_formatter_escapes_what_is_logged():
    record = logging.LogRecord("otdrg", logging.WARNING, "", 1, "%s left out", ("\x1b[2Ja",), None)
    assert PrintableFormatter("%(message)s").format(record) == "\\u001b[2Ja left out"
