"""`otdrg prepare` as it is typed."""

import csv
import inspect
import json

import numpy as np
import pytest
from datasets import load_from_disk
from otdrg.cli import main
from otdrg.studies import SOURCES, source_class
from PIL import Image

PHANTOM = ["prepare", "phantom", "--train", "4", "--validation", "1", "--test", "0", "--image-size", "32"]


@pytest.fixture
def table(tmp_path):
    """A CSV of three studies, one of whose images is missing."""
    Image.fromarray(np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "a.png")
    with (tmp_path / "reports.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "study_id", "report"])
        writer.writerows([["a.png", "1", "Clear."], ["a.png", "2", "Clear."], ["b.png", "3", "Clear."]])
    return tmp_path / "reports.csv"


@pytest.mark.parametrize("source", SOURCES)
def test_prepare_help_shows_options_and_example(source, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["prepare", source, "--help"])
    assert exit.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Example: otdrg prepare {source} --" in shown
    for words in (
        "options of the source",
        "--output DIR",
        "--resume",
        "--num-proc N",
        "--sections",
        "--shard I/N",
        "from 1/N to N/N",
        "--merge",
    ):
        assert words in shown
    described = inspect.getdoc(source_class(source)).partition("\n")[0]
    assert f"Make a dataset of studies from {SOURCES[source][2]}. {described}" in shown


def test_prepare_dicom_help_says_where_reports_are(capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "dicom", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "`report.txt` in a folder above" in shown and "StudyInstanceUID" in shown


def test_prepare_table_prints_counts(table, tmp_path, capsys):
    assert main(["prepare", "csv", "--table", str(table), "--output", str(tmp_path / "studies")]) == 0
    shown = capsys.readouterr().out
    assert "| total | 2 | 2 | 0 | 0 | 2 | 1 | 0 | 1 | 0 |" in shown
    assert f"skipped: 1 faults, each with its reason in {tmp_path / 'studies' / 'skipped.jsonl'}" in shown
    (fault,) = [json.loads(line) for line in (tmp_path / "studies" / "skipped.jsonl").open(encoding="utf-8")]
    assert (fault["id"], fault["kind"]) == ("3", "missing image") and "b.png" in fault["reason"]
    assert sum(map(len, load_from_disk(tmp_path / "studies").values())) == 2


def test_prepare_options_reach_source_and_build(tmp_path):
    output = ["--output", str(tmp_path / "o")]
    assert main([*PHANTOM, "--views", "frontal", "lateral", "--sections", "impression", "--limit", "3", *output]) == 0
    rows = load_from_disk(tmp_path / "o")["train"]
    assert len(rows) == 3
    assert rows["views"][0] == [0, 1] and rows["report"] == rows["impression"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "csv", "--table", "nowhere.csv"], "nowhere.csv does not exist: option 'table' names"),
        (["prepare", "r2gen", "--annotation", "a.json", "--images", "."], "a.json does not exist"),
        (["prepare", "mimic-cxr", "--root", "nowhere"], "nowhere"),
        (["prepare", "dicom", "--folder", "nowhere"], "nowhere does not exist"),
        (["prepare", "open-i", "--reports", "nowhere.tgz", "--images", "."], "nowhere.tgz does not exist"),
        ([*PHANTOM, "--num-proc", "0"], "num_proc=0: expected a whole number of 1 or more"),
        ([*PHANTOM, "--seed", "-1"], "option 'seed' is -1"),
        ([*PHANTOM, "--public"], "--public is given without --push-to-hub"),
        (
            [*PHANTOM, "--shard", "0/3"],
            "--shard 0/3: expected I/N with I from 1 to N, such as 1/64 for the first of 64",
        ),
        ([*PHANTOM, "--shard", "1/3", "--overwrite"], "--overwrite cannot be used with --shard or --merge: to start"),
        (
            [*PHANTOM, "--shard", "1/3", "--push-to-hub", "a/b"],
            "--push-to-hub uploads a whole dataset: expected it with",
        ),
        ([*PHANTOM, "--merge"], "studies.partial does not exist: expected the shards of the same command with --shard"),
    ],
)
def test_prepare_wrong_arguments_are_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--output", str(tmp_path / "studies")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("otdrg prepare: error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_prepare_strict_is_one_line_and_resumes(table, tmp_path, capsys):
    command = ["prepare", "csv", "--table", str(table), "--output", str(tmp_path / "studies")]
    assert main([*command, "--strict"]) == 1
    assert "study 3, " in capsys.readouterr().err
    assert main(command) == 1
    assert "studies.partial is an unfinished dataset: --resume continues it" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert "| total | 2 |" in capsys.readouterr().out


def test_prepare_shards_are_merged(table, tmp_path, capsys):
    command = ["prepare", "csv", "--table", str(table), "--studies-per-shard", "1", "--output", str(tmp_path / "o")]
    for share in ("2/2", "1/2"):
        assert main([*command, "--shard", share]) == 0
    shown = capsys.readouterr().out
    assert "skipped: 1 faults, which --merge lists with their reasons\nshard " in shown
    assert f"shard 1/2: 2 of 3 files, in {tmp_path / 'o.partial'}\n" in shown
    assert main([*command, "--merge"]) == 0
    assert "| total | 2 | 2 | 0 | 0 | 2 | 1 | 0 | 1 | 0 |" in capsys.readouterr().out
    assert len((tmp_path / "o" / "skipped.jsonl").read_text().splitlines()) == 1
