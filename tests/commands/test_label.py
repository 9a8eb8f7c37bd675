"""`otdrg label` as it is typed, in its three forms."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from datasets import load_dataset, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from otdrg.cli import main
from otdrg.findings_otdrg import FINDINGS
from otdrg.labelers import UnreadReportsWarning, load_labeler, read_states
from otdrg.labelers.report_table import read_reports
from otdrg.runtime.interruptions import Terminated
from otdrg.studies import prepare_studies
from otdrg.studies.build import BuildOptions

PHANTOMS = {"train": 7, "validation": 2, "test": 0, "image_size": 32}


@pytest.fixture(scope="module")
def _built(tmp_path_factory):
    """A dataset of a table of phantoms' reports, without states."""
    folder = tmp_path_factory.mktemp("studies")
    phantoms = prepare_studies("phantom", folder / "phantoms", **PHANTOMS).folder
    prepare_studies(
        "hub",
        folder / "built",
        build=BuildOptions(studies_per_shard=3),
        dataset=str(phantoms),
        column=["finding_states="],
    )
    return folder / "built"


@pytest.fixture
def built(_built, tmp_path):
    return shutil.copytree(_built, tmp_path / "built")


@pytest.fixture
def table(tmp_path):
    def write(*rows, header=("id", "report"), name="reports.csv"):
        path = tmp_path / name
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        return str(path)

    return write


def states_of(folder):
    return {row["id"]: row["finding_states"] for rows in load_from_disk(folder).values() for row in rows}


# --- a table of reports ----------------------------------------------------------------------------------------------


def test_label_table_of_reports_gives_states(table, tmp_path, capsys):
    reports = {"a": 'The heart is "enlarged".\nNo effusion, today.', "b": "", "c": "Clear lungs."}
    path = table(*((4, name, report) for name, report in reports.items()), header=("n", "ID", " Report "))
    output = tmp_path / "states.csv"
    assert main(["label", "--reports", path, "--labeler", "rules", "--output", str(output)]) == 0
    written = read_states(output)
    assert list(written) == list(reports)
    with pytest.warns(UnreadReportsWarning):
        expected = load_labeler("rules").label(list(reports.values()))
    assert np.array_equal(list(written.values()), expected)
    with output.open(encoding="utf-8") as file:
        assert next(csv.reader(file))[:3] == ["id", "No Finding", "Enlarged Cardiomediastinum"]
    shown = capsys.readouterr()
    assert shown.err == "1 reports have no state, empty or not understood: b\n"
    assert shown.out == f"3 reports labelled by rules: {output}\n"


def test_label_json_lines_are_read(tmp_path, capsys):
    path, output = tmp_path / "reports.jsonl", tmp_path / "states.csv"
    path.write_text('{"id": 7, "report": "Large heart.\\nNo \\"effusion\\"."}\n\n{"n": 1, "report": "", "id": "b"}\n')
    command = ["label", "--reports", str(path), "--labeler", "rules", "--output", str(output)]
    assert main(command) == 0
    assert "1 reports have no state, empty or not understood: b\n" in capsys.readouterr().err
    written = read_states(output)
    assert list(written) == ["7", "b"]
    assert written["7"].any() and not written["b"].any()
    for line, message in [
        ('{"id": "c"', "line 1: expected an object with the keys id and report"),
        ('{"id": "c", "text": ""}', "line 1: expected an object with the keys id and report"),
        ("[]", "line 1: expected an object with the keys id and report"),
        ('{"id": "c", "report": null}', "line 1: id is str and report NoneType, expected strings"),
        ('{"id": 7, "report": ""}\n{"id": "7", "report": ""}', "line 2, column id: '7' is in line 1 too"),
    ]:
        path.write_text(line)
        assert main([*command, "--overwrite"]) == 1
        error = capsys.readouterr().err
        assert f"{path}, {message}" in error and error.count("\n") == 1
    assert list(read_states(output)) == ["7", "b"]


@settings(max_examples=8, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=5))
def test_label_any_text_is_a_report(tmp_path_factory, reports):
    folder = tmp_path_factory.mktemp("reports")
    path, output = folder / "reports.csv", folder / "states.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "report"), *((str(place), text) for place, text in enumerate(reports))])
    assert list(read_reports(path)) == [(str(place), text) for place, text in enumerate(reports)]
    assert main(["label", "--reports", str(path), "--labeler", "rules", "--output", str(output)]) == 0
    assert list(read_states(output)) == [str(place) for place in range(len(reports))]


def test_label_long_reports_keep_the_csv_limit(table, tmp_path):
    limit = csv.field_size_limit()
    path, output = table(("a", "Clear lungs. " * (limit // 10))), tmp_path / "states.csv"
    assert main(["label", "--reports", path, "--labeler", "rules", "--output", str(output)]) == 0
    assert read_states(output)["a"].any()
    assert csv.field_size_limit() == limit
    path = table(("a", "Clear lungs."), ("a", ""))
    with pytest.raises(ValueError, match="is in line 2 too"):  # kept, and with it what was open
        list(read_reports(path))
    assert csv.field_size_limit() == limit


def test_label_impossible_output_is_named(table, tmp_path, capsys):
    command = ["label", "--reports", table(("a", "Clear lungs.")), "--labeler", "rules", "--overwrite", "--output"]
    assert main([*command, str(tmp_path / "none" / "states.csv")]) == 1
    assert f"states.csv: there is no folder {tmp_path / 'none'}" in capsys.readouterr().err
    assert main([*command, str(tmp_path)]) == 1
    assert f"{tmp_path} is a folder" in capsys.readouterr().err


def test_label_rules_are_the_default(table, tmp_path):
    path = table(("a", "No effusion."))
    assert main(["label", "--reports", path, "--output", str(tmp_path / "states.csv")]) == 0
    assert read_states(tmp_path / "states.csv")["a"][FINDINGS.index("pleural_effusion")] == 2


def test_label_options_reach_the_labeler(table, tmp_path):
    path = table(("a", "No displaced rib fractures."))
    for value, state in (("false", 2), ("true", 1)):
        command = ["label", "--reports", path, "--labeler", "rules", "--option", f"repeat_mistakes={value}"]
        assert main([*command, "--output", str(tmp_path / f"{value}.csv")]) == 0
        assert read_states(tmp_path / f"{value}.csv")["a"][FINDINGS.index("fracture")] == state


def test_label_table_imports_no_torch(table, tmp_path):
    path = table(("a", "Clear lungs."))
    code = (
        "import sys\nfrom otdrg.cli import main\n"
        f"command = ['label', '--reports', {path!r}, '--labeler', 'rules', '--output', {path + '.states'!r}]\n"
        "status = main(command)\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pandas', 'pyarrow') if m in sys.modules], status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"


# --- a dataset -------------------------------------------------------------------------------------------------------


def test_label_dataset_is_replaced(built, tmp_path, capsys):
    before = load_from_disk(built)
    reports = {row["id"]: row["report"] for rows in before.values() for row in rows}
    views = [image.tobytes() for rows in before.values() for row in rows for image in row["images"]]
    assert set(states_of(built).values()) == {None}
    assert main(["label", str(built), "--labeler", "rules"]) == 0
    expected = dict(zip(reports, load_labeler("rules").label(list(reports.values())).tolist(), strict=True))
    assert states_of(built) == expected
    loaded = load_dataset(str(built), cache_dir=str(tmp_path / "cache"))
    assert {row["id"]: row["finding_states"] for rows in loaded.values() for row in rows} == expected
    after = load_from_disk(built)
    assert [image.tobytes() for rows in after.values() for row in rows for image in row["images"]] == views
    assert after["train"].features == before["train"].features
    assert after["train"]._fingerprint != before["train"]._fingerprint
    assert "| train | 7 | 7 | 0 | 0 |" in capsys.readouterr().out
    assert json.loads((built / "summary.json").read_text())["labels"]["labeler"] == "rules"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("built")] == ["built"]


def test_label_existing_states_are_kept_without_relabel(built, tmp_path, table, capsys):
    ids = list(states_of(built))
    findings = [name.replace("_", " ") for name in FINDINGS]
    path = table((ids[0], *["1"] * 14), ("other", *[""] * 14), header=("id", *findings))
    command = ["label", str(built), "--labeler", "csv", "--csv", path, "--output", str(tmp_path / "labelled")]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "not in" in shown.err and ids[1] in shown.err and "1 ids of" in shown.err
    assert states_of(tmp_path / "labelled")[ids[0]] == [1] * 14
    assert set(states_of(built).values()) == {None}
    assert ids[1] in (tmp_path / "labelled" / "unlabelled.txt").read_text().split()
    assert main(["label", str(tmp_path / "labelled"), "--labeler", "rules"]) == 0
    assert states_of(tmp_path / "labelled")[ids[0]] == [1] * 14
    assert None not in states_of(tmp_path / "labelled").values()
    assert main(["label", str(tmp_path / "labelled"), "--labeler", "rules", "--relabel"]) == 0
    assert states_of(tmp_path / "labelled")[ids[0]] != [1] * 14


class Interrupted:
    """The rules, interrupted at the third shard the first time."""

    name = "interrupted"
    calls = 0

    def label(self, reports):
        type(self).calls += 1
        if type(self).calls == 3:
            raise ValueError("out of luck")
        return load_labeler("rules").label(reports)


def test_label_interrupted_is_resumed(built, monkeypatch, capsys):
    monkeypatch.setattr(Interrupted, "calls", 0)
    real = load_labeler
    monkeypatch.setattr(
        "otdrg.labelers.as_typed.load_labeler", lambda name, **options: Interrupted() if not options else real(name)
    )
    monkeypatch.setattr(sys.modules[__name__], "load_labeler", real)
    command = ["label", str(built), "--labeler", "rules"]
    assert main(command) == 1
    assert "out of luck" in capsys.readouterr().err
    assert set(states_of(built).values()) == {None}
    assert main(command) == 1
    assert "unfinished dataset: --resume continues it" in capsys.readouterr().err
    assert main([*command, "--relabel", "--resume"]) == 1
    assert "was made with other settings (relabel=False, now True)" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    # Two shards before the interruption, one at it, and the two that were left.
    assert Interrupted.calls == 5
    assert None not in states_of(built).values()


def test_label_csv_interrupted_counts_all_studies(built, table, monkeypatch, capsys):
    findings = [name.replace("_", " ") for name in FINDINGS]
    ids = list(states_of(built))
    rows = [(study, *["1"] * 14) for study in (*ids[:-1], "other")]
    path = table(*rows, header=("study", *findings))
    command = ["label", str(built), "--labeler", "csv", "--csv", path, "--id-column", "study"]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("otdrg.labelers.labelling._copy_rest", killed)
        assert main(command) == 130
    table(*rows[1:], header=("study", *findings))
    assert main([*command, "--resume"]) == 1
    assert "was made with other settings (csv_sha256=" in capsys.readouterr().err
    table(*rows, header=("study", *findings))
    assert main([*command, "--resume"]) == 0
    error = capsys.readouterr().err
    assert f"not in {path}: 1 studies: {ids[-1]}\n" in error
    assert f"1 ids of {path} belong to no study\n" in error


def test_label_csv_of_other_studies_is_refused(built, table, capsys):
    path = table(("x", *["1"] * 14), header=("id", *(name.replace("_", " ") for name in FINDINGS)))
    assert main(["label", str(built), "--labeler", "csv", "--csv", path]) == 1
    assert "none of the 9 studies is in it (studies: " in capsys.readouterr().err
    assert [entry.name for entry in built.parent.iterdir() if entry.name.startswith("built")] == ["built"]


# --- two tables of states --------------------------------------------------------------------------------------------


def test_label_compare_measures_agreement(table, tmp_path, capsys):
    names = [name.replace("_", " ").title() for name in FINDINGS]
    one = table(("a", *["1"] * 14), ("b", *["0"] * 13, ""), ("x", *[""] * 14), header=("id", *names), name="a.csv")
    two = table(("b", "", *["0"] * 13), ("a", "1", *["1.0"] * 13), header=("id", *names[::-1]), name="b.csv")
    folder = tmp_path / "agreement"
    assert main(["label", "--compare", one, two, "--output", str(folder)]) == 0
    shown = capsys.readouterr()
    assert "2 reports, 1.000 of the cells equal" in shown.out
    assert f"only in {one}: 1 reports: x" in shown.err
    assert json.loads((folder / "agreement.json").read_text())["accuracy"] == 1
    assert len((folder / "agreement.csv").read_text().splitlines()) == 1 + 14 * 5
    assert (folder / "disagreements.csv").read_text() == "id,finding,reference,candidate\n"
    assert main(["label", "--compare", one, two, "--output", two]) == 1
    assert f"--output {two}: this is a file, expected a folder" in capsys.readouterr().err
    three = table(("a", "", *["1"] * 13), header=("id", *names), name="c.csv")
    assert main(["label", "--compare", one, three, "--output", str(folder)]) == 1
    assert "exists and is not empty: --overwrite" in capsys.readouterr().err
    assert main(["label", "--compare", one, three, "--output", str(folder), "--overwrite"]) == 0
    assert (folder / "disagreements.csv").read_text().splitlines()[
        1
    ] == "a,enlarged_cardiomediastinum,positive,unmentioned"


def test_label_closed_pipe_ends_quietly(table):
    """As with `| head`."""
    names = [name.replace("_", " ") for name in FINDINGS]
    states = table(("a", *["1"] * 14), header=("id", *names))
    command = [sys.executable, "-m", "otdrg.cli", "label", "--compare", states, states]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(60) == 141
    assert error == ""


def test_label_help_shows_each_form(capsys):
    with pytest.raises(SystemExit):
        main(["label", "--help"])
    lines = capsys.readouterr().out.splitlines()
    for example in ("studies --labeler rules", "--reports reports.csv --labeler rules", "--compare chexpert.csv"):
        assert any(line.startswith(f"  otdrg label {example}") for line in lines)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing given: expected one of DATASET, --reports and --compare"),
        (["studies", "--reports", "r.csv"], "dataset and reports given"),
        (["--reports", "r.csv", "--labeler", "rules"], "--output is missing"),
        (["--reports", "r.csv", "--labeler", "csv", "--output", "o"], "--labeler csv joins states to studies by id"),
        (["--reports", "r.csv", "--labeler", "rules", "--output", "o", "--relabel"], "--relabel cannot be used with"),
        (["--compare", "a.csv", "b.csv", "--labeler", "rules"], "--labeler cannot be used with --compare"),
        (["studies", "--labeler", "csv"], "--labeler csv and --csv FILE: expected both or neither"),
        (["studies", "--labeler", "rules", "--option", "x"], "--option x: expected NAME=VALUE"),
        (["studies", "--labeler", "rules", "--option", "size=3"], "unknown option 'size' of labeler 'rules'"),
        (["studies", "--labeler", "rules", "--option", "vocabulary=["], "--option vocabulary=[: the value is not YAML"),
        (["studies", "--labeler", "rules", "--option", "vocabulary=3"], "does not take vocabulary=3: "),
        (["studies", "--labeler", "rules", "--option", "repeat_mistakes=maybe"], "is 'maybe': expected true or false"),
        (["studies", "--labeler", "rules", *["--option", "vocabulary=v"] * 2], "--option vocabulary is given twice"),
        (["studies", "--labeler", "rules", "--id-column", "x"], "--id-column is a column of --csv"),
        (
            ["studies", "--labeler", "csv", "--csv", "s.csv", "--option", "a=1"],
            "--option cannot be used with --labeler csv",
        ),
        (["studies", "--labeler", "llm"], "labeler 'llm' needs the option 'model'"),
        (
            ["studies", "--labeler", "rules"],
            "studies is not a prepared dataset: expected a folder",
        ),
        (["--compare", "a.csv", "b.csv"], "a.csv: cannot be read"),
        (["--reports", "no.csv", "--labeler", "rules", "--output", "o"], "no.csv: cannot be read"),
    ],
)
def test_label_wrong_arguments_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["label", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,text\n1,Clear.\n", "0 columns 'report', expected one; columns: id, text"),
        (b"id,report,Report\n1,a,b\n", "2 columns 'report', expected one"),
        (b"", "0 columns 'id', expected one; columns: none"),
        (b"id,report\n1,Clear.\n1,Clear.\n", "line 3, column id: '1' is in line 2 too"),
        (b"id,report\n ,Clear.\n", "line 2, column id: empty"),
        (b"id,report\n1,Clear, no.\n", "line 2: 3 values, expected 2"),
        (b"id,report\n1,Clear.\n2,R\xf6ntgen\n", "not UTF-8 (line 3)"),
        (b'id,report\n1,"Clear.\nNo effusion."\n2,"open\n', "not a CSV (line 4: "),
        (b'id,report\n1,"Clear.\nNo effusion."\n1,"No\nchange."\n', "line 4, column id: '1' is in line 2 too"),
    ],
)
def test_label_faulty_table_leaves_no_output(content, message, tmp_path, capsys):
    path = tmp_path / "reports.csv"
    path.write_bytes(content)
    output = tmp_path / "states.csv"
    assert main(["label", "--reports", str(path), "--labeler", "rules", "--output", str(output)]) == 1
    error = capsys.readouterr().err
    assert str(path) in error and message in error and error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["reports.csv"]


def test_label_existing_output_is_kept_without_overwrite(table, tmp_path, capsys):
    path = table(("a", "Clear lungs."))
    output = tmp_path / "states.csv"
    output.write_text("mine")
    command = ["label", "--reports", path, "--labeler", "rules", "--output"]
    assert main([*command, str(output)]) == 1
    assert "states.csv exists: --overwrite replaces it" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert main([*command, path, "--overwrite"]) == 1
    assert "holds the reports themselves" in capsys.readouterr().err
    assert main([*command, str(output), "--overwrite"]) == 0
    assert list(read_states(output)) == ["a"]


@pytest.mark.parametrize(("stop", "status"), [(Terminated, 143), (KeyboardInterrupt, 130)])
def test_label_signal_reports_what_is_kept(built, monkeypatch, capsys, stop, status):
    def stopped(*_):
        raise stop

    monkeypatch.setattr("otdrg.labelers.labelling._copy_rest", stopped)
    assert main(["label", str(built)]) == status
    error = capsys.readouterr().err.splitlines()[-1]
    ended = "terminated (SIGTERM)" if stop is Terminated else "interrupted"
    assert error.startswith(f"otdrg label: {ended}; 4 complete shards are kept in {built}.partial; --resume continues")
