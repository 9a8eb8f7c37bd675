"""`otdrg evaluate` as it is typed, on the phantoms of a tiny run: what it leaves, how it goes on, what it refuses."""

import csv
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from otdrg.cli import main
from otdrg.findings_otdrg import FINDING_STATES, FINDINGS
from otdrg.inference import generation
from otdrg.labelers import load_labeler
from otdrg.metrics import nlg_scores
from otdrg.metrics.faithfulness import faithfulness
from otdrg.runtime.interruptions import Terminated
from otdrg.studies import prepare_studies
from otdrg.studies.cleaning import clean_report

FEW = ["--num-beams", "1", "--max-new-tokens", "10", "--metrics", "bleu_1", "bleu_4", "rouge_l", "cider"]
FEW += ["--bootstrap", "20", "--floor", "1", "--limit", "6"]
ROWS = [
    "model",
    "images shuffled across studies",
    "nearest neighbour",
    "retrieval by expected utility",
    "best constant report",
    "true states given",
]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A folder of `otdrg prepare`, of other phantoms than the run's."""
    folder = tmp_path_factory.mktemp("phantoms") / "built"
    options = {"train": 8, "validation": 6, "test": 0, "image_size": 112, "views": ["frontal"], "seed": 5}
    prepare_studies("phantom", folder, **options)
    return folder


@pytest.fixture
def written(monkeypatch):
    """How many reports were generated."""
    counts = []
    collate = generation.PromptCollator.__call__

    def counting(self, rows):
        counts.append(len(rows))
        return collate(self, rows)

    monkeypatch.setattr(generation.PromptCollator, "__call__", counting)
    return counts


@pytest.fixture(scope="module")
def evaluated(trained_run, tmp_path_factory):
    """An evaluation of the run on its own validation studies."""
    output = tmp_path_factory.mktemp("evaluation") / "own"
    assert main(["evaluate", str(trained_run), *FEW, "--output", str(output)]) == 0
    return output


def table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def result_of(output):
    return json.loads((output / "evaluation.json").read_text(encoding="utf-8"))


def test_evaluate_rows_have_intervals_and_differences(evaluated):
    result = result_of(evaluated)
    assert list(result["rows"]) == ROWS and list(result["intervals"]) == ROWS
    assert list(result["differences"]) == ROWS[1:]
    predictions = table(evaluated / "predictions.csv")
    assert len(predictions) == result["studies"] == 5
    references = [row["reference"] for row in predictions]
    for name, scores in result["rows"].items():
        for column in ("bleu_4", "rouge_l", "cider", "macro_f1_13_uncertain_negative", "micro_f1_5_uncertain_positive"):
            interval = result["intervals"][name][column]
            assert interval["low"] <= interval["high"]
            if name != "model":
                difference = result["differences"][name][column]
                assert difference["difference"] == pytest.approx(
                    result["rows"]["model"][column] - scores[column], abs=1e-6
                )
    nearest = [row["report, nearest neighbour"] for row in predictions]
    found = nlg_scores(nearest, references, ["bleu_4", "rouge_l"])
    for name in ("bleu_4", "rouge_l"):
        assert result["rows"]["nearest neighbour"][name] == pytest.approx(found[name])
    assert result["zero_shot"] is False and result["training_from"] == "split train of the dataset"
    assert result["counts"]["train"]["studies"] == 16 and result["counts"]["validation"]["images"] == 5
    assert (result["labeler"], result["protocol"], result["cleaning"]) == ("rules", "full", "none")
    described = result["data"]
    assert {split: row["studies"] for split, row in described.items()} == {"validation": 5, "train": 16}
    assert described["validation"]["collections"] == ["phantom radiographs"]


def test_evaluate_document_names_its_settings(evaluated, capsys):
    document = (evaluated / "evaluation.md").read_text(encoding="utf-8")
    for text in (
        "- 5 studies of split validation of the model's own recipe",
        "- the dataset the model was trained on",
        "train 16 studies; validation 5 studies",
        "- constants and neighbours from split train of the dataset",
        "- greedy search, up to 10 tokens",
        "| fluency | BLEU-1 | BLEU-4 | ROUGE-L | CIDEr | in training |",
        "| F1, uncertain as negative | example-F1 (14) | example-F1 (5) | example-F1 (13) | micro-F1 (14) |",
        "by the labeler rules",
        "| model minus | BLEU-4 |",
    ):
        assert text in document


def test_evaluate_writes_scores_per_system_and_study(evaluated):
    scores = table(evaluated / "scores.csv")
    assert len(scores) == 5 * 5 and {row["system"] for row in scores} == set(ROWS) - {"best constant report"}
    result = result_of(evaluated)
    for name in ("model", "nearest neighbour"):
        values = [float(row["rouge_l"]) for row in scores if row["system"] == name]
        assert np.mean(values) == pytest.approx(result["rows"][name]["rouge_l"], abs=1e-5)


def journal(evaluated, name):
    """Conditioning states (N, 14) and reports of a journal."""
    rows = [json.loads(line) for line in (evaluated / "reports" / f"{name}.jsonl").read_text("utf-8").splitlines()]
    conditioning = np.array([[FINDING_STATES.index(row[finding]) for finding in FINDINGS] for row in rows])
    return conditioning, [row["report"] for row in rows], [row["id"] for row in rows]


def test_evaluate_faithfulness_is_to_the_conditioning_states(evaluated):
    conditions = result_of(evaluated)["faithfulness"]["conditions"]
    assert list(conditions) == ["predicted", "true_states", "flipped"]
    listed = {(row["states"], row["study"], row["finding"]) for row in table(evaluated / "contradictions.csv")}
    labeler = load_labeler("rules")
    true, *_ = journal(evaluated, "true_states")
    for condition, name in (("predicted", "model"), ("true_states", "true_states"), ("flipped", "flipped")):
        conditioning, reports, ids = journal(evaluated, name)
        within = conditioning != true if condition == "flipped" else None
        if within is not None:
            within[:, FINDINGS.index("no_finding")] = False
            assert (within.sum(axis=1) == 1).all()
        said = labeler.label(reports)
        found = faithfulness(conditioning, said, 1, within)
        for key in ("macro", "micro", "counted", "contradicted", "omitted", "added"):
            assert conditions[condition]["model"][key] == pytest.approx(getattr(found, key))
        assert sum(states == condition for states, *_ in listed) == found.contradicted
        assert {study for states, study, _ in listed if states == condition} <= set(ids)


def test_evaluate_killed_continues_with_the_same_command(trained_run, evaluated, tmp_path, written, capsys):
    output = tmp_path / "again"
    shutil.copytree(evaluated, output)
    path = output / "reports" / "model.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:20], encoding="utf-8")
    (output / "reports" / "flipped.jsonl").unlink()
    arguments = ["evaluate", str(trained_run), *FEW, "--output", str(output)]
    assert main(arguments) == 0
    # A batch is written again as a whole, and what is known of it is kept.
    assert sum(written) == 5 + 5
    for path in sorted((output / "reports").iterdir()):
        assert path.read_bytes() == (evaluated / "reports" / path.name).read_bytes()
    before, after = result_of(evaluated), result_of(output)
    assert after == before
    written.clear()
    # Nothing is left to be written; scores are others where they are asked for.
    assert main([*arguments, "--floor", "2", "--batch-size", "2"]) == 0
    assert not written and result_of(output)["faithfulness"]["conditions"]["predicted"]["model"]["floor"] == 2
    capsys.readouterr()
    assert main([*arguments, "--max-new-tokens", "4", "--seed", "1"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "was made with other settings (max_new_tokens=10, now 4; seed=0, now 1)" in error
    assert "--overwrite, which starts anew" in error and not written
    assert main([*arguments, "--max-new-tokens", "4", "--overwrite"]) == 0
    assert sum(written) == 3 * 5


def test_evaluate_another_dataset_is_zero_shot_and_cleaned(trained_run, phantoms, tmp_path):
    output = tmp_path / "zero"
    arguments = ["evaluate", str(trained_run / "model"), str(phantoms), "--cleaning", "r2gen_iu", *FEW]
    cache = tmp_path / "features"
    assert main([*arguments, "--output", str(output), "--feature-cache", str(cache), "--bootstrap", "0"]) == 0
    result = result_of(output)
    assert result["zero_shot"] is True and result["training_from"] == "split train of the model's own recipe"
    assert result["generated_reports_cleaned"] and result["intervals"] == {} and list(cache.iterdir())
    rows = table(output / "predictions.csv")
    assert len(rows) == 6
    _, reports, _ = journal(output, "model")
    assert [row["report"] for row in rows] == [" ".join(clean_report(text, "r2gen_iu").split()) for text in reports]
    for name in ("reference", "report, nearest neighbour"):
        assert all(row[name].endswith(" .") and row[name].islower() for row in rows)
    assert main([*arguments, "--output", str(output), "--train-from", str(phantoms), "--bootstrap", "0"]) == 0
    assert result_of(output)["training_from"] == f"split train of {phantoms}"
    assert "zero-shot: the model was trained on another dataset" in (output / "evaluation.md").read_text("utf-8")


def test_evaluate_model_without_recipe_uses_the_datasets_baselines(build_model, phantoms, tmp_path):
    model = tmp_path / "alone" / "model"
    for part in build_model(indication_reader="both"):
        part.save_pretrained(model)
    arguments = ["evaluate", str(model), str(phantoms), *FEW, "--limit", "2", "--bootstrap", "0"]
    assert main([*arguments, "--protocol", "r2gengpt", "--tokenizer", str(model), "--reference-tokens", "5"]) == 0
    result = result_of(model / "evaluation-validation")
    assert result["zero_shot"] is None and result["training_from"] == "split train of the dataset"
    assert (result["protocol"], result["reference_tokens"]) == ("r2gengpt", 5)
    assert result["generation"]["indication"], "the label predictor reads it"
    assert all(len(row["reference"].split()) <= 5 for row in table(model / "evaluation-validation" / "predictions.csv"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "0"], "--limit is 0: expected 1 or more"),
        (["--bootstrap", "-1"], "--bootstrap is -1: expected 0 or more"),
        (["--option", "wrong=1"], "unknown option 'wrong' of labeler 'rules'"),
        (["--split", "test"], "gives no test study with a report"),
        (["nowhere"], "nowhere does not exist: expected a recipe (YAML) or a folder of otdrg prepare"),
        (["--train-from", "nowhere"], "nowhere does not exist: expected a recipe"),
        (["--tokenizer", "x"], "--tokenizer needs --protocol r2gengpt"),
        (["--protocol", "r2gengpt", "--tokenizer", "x"], "expected --reference-tokens"),
        (["--output", "{recipe}"], "this is a file, expected a folder"),
    ],
)
def test_evaluate_wrong_input_is_one_line(trained_run, tiny_recipe, tmp_path, capsys, arguments, message):
    arguments = [word.format(recipe=tiny_recipe) for word in arguments]
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "out")]
    assert main(["evaluate", str(trained_run), *arguments, *output]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last and last.startswith("otdrg evaluate: error: ")
    assert not (tmp_path / "out").exists()


def test_evaluate_without_model_or_dataset_is_one_line(tiny_recipe, phantoms, tmp_path, capsys):
    assert main(["evaluate", "org/nothing", str(phantoms)]) == 1
    assert "org/nothing is not a folder here: expected --output" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "DATASET is missing, and no recipe.yaml lies beside the model" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), str(phantoms)]) == 1
    assert f"{tmp_path}: no config.json here" in capsys.readouterr().err
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump({"output_dir": "x", "studies": {"sauce": "phantom"}}), encoding="utf-8")
    assert main(["evaluate", str(tmp_path), str(wrong)]) == 1
    assert "unknown key 'sauce' in studies: did you mean 'source'?" in capsys.readouterr().err


def test_evaluate_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--help"])
    assert ended.value.code == 0
    assert "otdrg evaluate runs/iu_xray_small --split test" in capsys.readouterr().out


def test_evaluate_ended_by_sigterm_says_what_is_kept(trained_run, tmp_path, monkeypatch, capsys):
    def stopped(self, rows):
        raise Terminated

    monkeypatch.setattr(generation.PromptCollator, "__call__", stopped)
    command = ["evaluate", str(trained_run), *FEW, "--output", str(tmp_path / "own")]
    assert main(command) == 143
    assert capsys.readouterr().err.splitlines()[-1].startswith("otdrg evaluate: terminated (SIGTERM); ")


def test_evaluate_unreadable_study_is_left_out_and_named(trained_run, phantoms, tmp_path, capsys):
    folder = shutil.copytree(phantoms, tmp_path / "built")
    (file,) = (folder / "data").glob("validation-*")
    table = pq.read_table(file)
    images = table.column("images").to_pylist()
    images[1][0]["bytes"] = b"\x89PNG broken"
    place = table.schema.get_field_index("images")
    table = table.set_column(place, table.schema.field("images"), pa.array(images, table.schema.field("images").type))
    pq.write_table(table, file)
    for split in ("train", "validation"):
        shutil.rmtree(folder / split)
    (folder / "dataset_dict.json").unlink()
    ids = table.column("id").to_pylist()
    assert main(["evaluate", str(trained_run), str(folder), *FEW, "--output", str(tmp_path / "out")]) == 0
    assert f"left out: study '{ids[1]}', view 0: not an image" in capsys.readouterr().err
    with (tmp_path / "out" / "predictions.csv").open(newline="", encoding="utf-8") as predictions:
        assert [row["id"] for row in csv.DictReader(predictions)] == [ids[0], *ids[2:]]
    assert f"left out: study '{ids[1]}'" in (tmp_path / "out" / "evaluation.md").read_text(encoding="utf-8")
