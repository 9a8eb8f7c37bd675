"""`otdrg score` as it is typed: files joined by id, what is written, what is refused."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
from otdrg.cli import main
from otdrg.labelers import load_labeler
from otdrg.labelers.as_typed import label_quietly
from otdrg.metrics import clinical_efficacy_scores, nlg_scores
from otdrg.studies.cleaning import clean_report
from transformers import AutoTokenizer

REFERENCES = {
    "a": "The heart is enlarged. There is a small left pleural effusion.",
    "b": "The lungs are clear. No pneumothorax or pleural effusion.",
    "c": "There is mild pulmonary edema, with cardiomegaly.",
    "d": "No acute disease. The heart is normal in size.",
    "e": "There is a right pneumothorax. A chest tube is present.",
}
OURS = {
    "a": "The heart is enlarged. The lungs are clear.",
    "b": "The lungs are clear. No pleural effusion.",
    "c": "There is pulmonary edema.",
    "d": "",
    "e": "There is a left pneumothorax. \U0001fac1 \ud83d",
}
THEIRS = dict.fromkeys(REFERENCES, "The heart is normal in size. The lungs are clear.")
FAST = ["--metrics", "bleu", "rouge_l", "cider", "clinical_efficacy", "--bootstrap", "50"]


def write_jsonl(path, reports, **extra):
    path.write_text("".join(json.dumps({"id": i, "report": r, **extra}) + "\n" for i, r in reports.items()))
    return str(path)


def write_csv(path, reports, column="report"):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "ID", column])
        writer.writerows(["test", study, report] for study, report in reports.items())
    return str(path)


@pytest.fixture
def files(tmp_path):
    order = list(REFERENCES)
    random.Random(3).shuffle(order)
    return {
        "references": write_csv(tmp_path / "references.csv", REFERENCES),
        "predictions": write_jsonl(tmp_path / "ours.jsonl", {i: OURS[i] for i in order}, beam=3),
        "against": write_csv(tmp_path / "theirs.csv", THEIRS),
        "output": str(tmp_path / "out.json"),
    }


def score(files, *arguments, metrics=FAST):
    given = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    return main(["score", *given, *metrics, *map(str, arguments)])


def result_of(files):
    with open(files["output"], encoding="utf-8") as file:
        return json.load(file)


def table_of(files):
    with open(files["output"].replace(".json", ".csv"), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_score_equals_the_functions_joined_by_id(files, capsys):
    assert score(files, "--cleaning", "r2gen_iu") == 0
    result, table = result_of(files), table_of(files)
    written, true = ([clean_report(side[i], "r2gen_iu") for i in REFERENCES] for side in (OURS, REFERENCES))
    labeler = load_labeler("rules")
    nlg = nlg_scores(written, true, ["bleu", "rouge_l", "cider"])
    clinical = clinical_efficacy_scores(label_quietly(labeler, written), label_quietly(labeler, true))
    for_table = {**nlg.pop("per_study"), **clinical.pop("per_study")}
    nlg.pop("notes")
    assert result["nlg"] == nlg
    assert result["per_finding"] == clinical.pop("per_finding")
    assert result["clinical_efficacy"] == clinical
    assert [row["id"] for row in table] == list(REFERENCES)
    for name, values in for_table.items():
        assert [float(row[name]) for row in table] == pytest.approx(values, abs=1e-6)
    assert table[2]["edema, report"] == "positive" and table[1]["pleural_effusion, reference"] == "negative"
    recorded = ("labeler", "labeler_options", "cleaning", "protocol", "tokenizer", "bootstrap", "counts")
    assert {name: result[name] for name in recorded} == {
        "labeler": "rules",
        "labeler_options": {},
        "cleaning": "r2gen_iu",
        "protocol": "full",
        "tokenizer": None,
        "bootstrap": {"resamples": 50, "confidence": 0.95, "seed": 0},
        "counts": {"studies": 5, "references": 5, "predictions": 5, "against": 5},
    }
    assert result["without_states"]["predictions"] == ["d"]
    shown = capsys.readouterr()
    assert f"| BLEU-4 | {nlg['bleu_4']:.3f} |" in shown.out and "states by rules" in shown.out
    assert "no state is read in 1 of the predictions: d" in shown.err


def test_score_against_gives_every_score_interval_and_comparison(files):
    assert score(files) == 0
    result = result_of(files)
    averages = [n for n in result["clinical_efficacy"] if not n.startswith("findings_with")]
    names = {*result["nlg"], *averages}
    assert len(names) == 6 + 54
    assert set(result["intervals"]) == set(result["comparison"]) == names
    for name, interval in result["intervals"].items():
        assert interval["low"] <= interval["high"], name
    compared = result["comparison"]["rouge_l"]
    assert compared["value"] == pytest.approx(result["nlg"]["rouge_l"], abs=1e-12)
    assert compared["difference"] == pytest.approx(compared["value"] - compared["against"], abs=1e-12)
    assert {"low", "high", "p_bootstrap", "p_permutation"} <= set(compared)
    assert "document frequencies of all references" in result["notes"]["cider"]
    assert table_of(files)[0]["rouge_l, against"] == f"{nlg_rouge(THEIRS['a'], REFERENCES['a']):.6f}"


def nlg_rouge(written, true):
    return nlg_scores([written], [true], ["rouge_l"])["rouge_l"]


def test_score_is_seeded(files):
    assert score(files) == 0
    first = result_of(files)
    assert score(files, "--overwrite") == 0
    assert result_of(files) == first
    assert score(files, "--overwrite", "--seed", 1) == 0
    assert result_of(files)["intervals"] != first["intervals"]


def test_score_of_predictions_csv_uses_its_references(tmp_path, files):
    del files["against"]
    assert score(files) == 0
    first = result_of(files)
    again = {"predictions": files["output"].replace(".json", ".csv"), "output": str(tmp_path / "again.json")}
    assert score(again) == 0
    for name in ("nlg", "clinical_efficacy", "intervals"):
        assert result_of(again)[name] == first[name]
    again["references"] = again["predictions"]
    assert score(again, "--overwrite") == 0
    truth = write_csv(tmp_path / "truth.csv", REFERENCES, column="True Report")
    assert score({**files, "references": truth}, "--overwrite", "--reference-column", "true_report") == 0
    assert result_of(files)["nlg"] == first["nlg"]


def test_score_one_metric_without_intervals(files, capsys):
    del files["against"]
    assert score(files, metrics=["--metrics", "bleu_4", "--bootstrap", "0"]) == 0
    result = result_of(files)
    assert list(result["nlg"]) == ["bleu_4"] and result["clinical_efficacy"] == {} and result["intervals"] == {}
    assert result["labeler"] is None and "comparison" not in result
    assert "| BLEU-4 | " in capsys.readouterr().out
    assert score(files, "--overwrite", metrics=["--metrics", "bleu_4", "--bootstrap", "10"]) == 0
    assert list(result_of(files)["intervals"]) == ["bleu_4"]


def test_score_without_java_has_no_meteor(files, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert score(files, metrics=["--bootstrap", "10"]) == 0
    result = result_of(files)
    assert result["nlg"]["meteor"] is None and result["nlg"]["cider"] > 0
    assert "meteor" not in result["comparison"] and "meteor" not in table_of(files)[0]
    assert "| METEOR | – | – |" in capsys.readouterr().out
    assert "apt-get install" in result["notes"]["meteor"]


def test_score_labeler_options_are_recorded(files):
    assert score(files, "--labeler", "rules", "--option", "repeat_mistakes=true") == 0
    assert result_of(files)["labeler_options"] == {"repeat_mistakes": True}


def test_score_r2gengpt_cuts_references_at_a_token(files, processor, tmp_path):
    processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    protocol = ["--protocol", "r2gengpt", "--tokenizer", tmp_path / "tokenizer", "--reference-tokens", 5]
    assert score(files, *protocol) == 0
    result, table = result_of(files), table_of(files)
    for row in table:
        whole = REFERENCES[row["id"]]
        assert whole.startswith(row["reference"])
        ids, cut = (tokenizer(text, add_special_tokens=False).input_ids for text in (whole, row["reference"]))
        assert cut == ids[:5]
    assert result["nlg"]["rouge_l"] == pytest.approx(
        np.mean([nlg_rouge(OURS[row["id"]], row["reference"]) for row in table]), abs=1e-12
    )
    assert (result["protocol"], result["reference_tokens"]) == ("r2gengpt", 5)
    assert result["tokenizer"] == str(tmp_path / "tokenizer")
    # clinical efficacy is of the whole reports
    assert table[0]["pleural_effusion, reference"] == "positive"
    assert "whole true reports" in result["notes"]["clinical_efficacy"]
    assert score(files, "--overwrite", "--cleaning", "r2gen_iu", *protocol[:4]) == 0
    assert result_of(files)["reference_tokens"] == 60
    assert table_of(files)[0]["reference"] == clean_report(REFERENCES["a"], "r2gen_iu")


def test_score_missing_ids_are_refused_or_listed(files, tmp_path, capsys):
    files["predictions"] = write_jsonl(tmp_path / "fewer.jsonl", {"a": OURS["a"], "c": OURS["c"], "x": "clear"})
    assert score(files) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "references.csv (references) lacks 1 (x)" in error
    assert "fewer.jsonl (predictions) lacks 3 (b, d, e)" in error
    assert "--allow-missing scores the 2 in common" in error
    assert score(files, "--allow-missing") == 0
    result = result_of(files)
    assert result["counts"] == {"studies": 2, "references": 5, "predictions": 3, "against": 5}
    assert result["missing_from"] == {"references": ["x"], "predictions": ["b", "d", "e"], "against": ["x"]}
    assert [row["id"] for row in table_of(files)] == ["a", "c"]
    assert "fewer.jsonl: 3 ids: b, d, e" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no report in it, expected at least one"),
        ('{"id": "a", "report": "x"}\nnot JSON\n', "line 2: expected an object with the keys id and report"),
        ('{"id": "a", "text": "x"}\n', "line 1: expected an object with the keys id and report"),
        ('{"id": "a", "report": null}\n', "report NoneType, expected strings"),
        ('{"id": "a", "report": "x"}\n{"id": "a", "report": "y"}\n', "line 2, column id: 'a' is in line 1 too"),
        ('{"id": "z", "report": "x"}\n', "no id in common"),
    ],
)
def test_score_wrong_files_are_one_line(files, tmp_path, capsys, content, message):
    (tmp_path / "wrong.jsonl").write_text(content)
    files["predictions"] = str(tmp_path / "wrong.jsonl")
    assert score(files) == 1
    error = capsys.readouterr().err
    assert message in error and "wrong.jsonl" in error and error.count("\n") == 1


def test_score_missing_column_is_one_line(files, tmp_path, capsys):
    files["references"] = write_csv(tmp_path / "other.csv", REFERENCES, column="text")
    assert score(files) == 1
    assert "other.csv: 0 columns 'report', expected one; columns: split, ID, text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bootstrap", "0"], "--bootstrap is 0: expected at least 1 with --against"),
        (["--seed", "-1"], "--seed is -1"),
        (["--tokenizer", "x"], "--tokenizer needs --protocol r2gengpt"),
        (["--protocol", "r2gengpt"], "expected --tokenizer"),
        (["--protocol", "r2gengpt", "--tokenizer", "x"], "expected --reference-tokens, 60 for IU X-Ray"),
        (["--protocol", "r2gengpt", "--tokenizer", "x", "--reference-tokens", "-1"], "-1, expected at least 1"),
        (
            ["--cleaning", "r2gen_iu", "--protocol", "r2gengpt", "--tokenizer", "x", "--reference-tokens", "0"],
            "0, expected at least 1",
        ),
        (["--protocol", "r2gengpt", "--tokenizer", "no/folder/here", "--reference-tokens", "9"], "tokenizer no/folder"),
        (["--option", "repeat_mistakes"], "expected NAME=VALUE"),
        (["--option", "repeat_mistake=true"], "unknown option 'repeat_mistake'"),
        (["--metrics", "bleu", "--labeler", "rules"], "which --metrics does not name"),
        (["--output", "out.txt"], "expected a name that ends in .json"),
        (["--output", "nowhere/out.json"], "there is no folder nowhere"),
        (["--references", "nowhere.csv"], "nowhere.csv: cannot be read"),
    ],
)
def test_score_wrong_arguments_are_one_line(files, capsys, arguments, message):
    assert score(files, *arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_score_without_overwrite_keeps_files(files, tmp_path, capsys):
    assert score(files) == 0
    assert score(files) == 1
    assert "out.json exists: --overwrite replaces it" in capsys.readouterr().err
    assert score({**files, "predictions": tmp_path / "out.csv"}, "--overwrite") == 1
    assert "out.csv would be written over, and is --predictions" in capsys.readouterr().err
    assert score({**files, "references": files["predictions"]}, "--reference-column", "report", "--overwrite") == 1
    assert "the predictions themselves" in capsys.readouterr().err


def test_score_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["score", "--help"])
    assert ended.value.code == 0
    assert "otdrg score --predictions ours.jsonl --references test.jsonl" in capsys.readouterr().out


def test_score_reads_states_before_cleaning(files):
    references = {**REFERENCES, "d": "Bibasilar scarring/atelectasis."}
    write_csv(Path(files["references"]), references)
    write_jsonl(Path(files["predictions"]), {**OURS, "d": "There is atelectasis/scarring."})
    assert score(files, "--cleaning", "r2gen_iu") == 0
    row = table_of(files)[list(REFERENCES).index("d")]
    assert row["reference"] == "bibasilar scarringatelectasis ." and row["uncleaned reference"] == references["d"]
    assert row["atelectasis, reference"] != "unmentioned" and row["atelectasis, report"] != "unmentioned"
    clinical = result_of(files)["clinical_efficacy"]
    table = files["output"].replace(".json", ".csv")
    again = {"predictions": table, "output": files["output"].replace("out", "again")}
    assert score(again) == 0
    assert result_of(again)["clinical_efficacy"] == clinical


def test_score_of_sections_against_plain_reports_leaves_headings_out(files, capsys):
    headed = {study: f"Findings: {text} Impression: As above." for study, text in REFERENCES.items()}
    plain = {study: f"{text} As above." for study, text in REFERENCES.items()}
    write_csv(Path(files["references"]), plain)
    write_jsonl(Path(files["predictions"]), headed)
    for cleaning in ("none", "r2gen_iu"):
        assert score(files, "--cleaning", cleaning, "--overwrite") == 0
        result = result_of(files)
        assert result["nlg"]["bleu_4"] == pytest.approx(1) and result["nlg"]["rouge_l"] == pytest.approx(1)
        assert "sections" not in result
