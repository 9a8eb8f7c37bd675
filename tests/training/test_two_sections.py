"""Findings and impression as sections, from a table to reports, scores and a card: one run for all tests."""

import csv
import json
import shutil

import numpy as np
import pytest
import yaml
from otdrg.cli import main
from otdrg.hub_card.card import build_card
from otdrg.metrics import nlg_scores
from otdrg.sections_otdrg import has_sections, split_sections, without_headings
from otdrg.studies import load_studies, prepare_studies
from otdrg.studies.build import BuildOptions
from otdrg.train_hf import main as train
from otdrg.training.data import build_studies
from otdrg.training.recipe import LabelsRecipe, StudiesRecipe
from PIL import Image
from transformers import pipeline

TEXTS = (("The heart is enlarged. No effusion.", "Cardiomegaly."), ("The lungs are clear.", "No acute disease."))
WRITTEN = (("the heart is enlarged . no effusion .", "cardiomegaly ."), ("the lungs are clear .", "no acute disease ."))
METRICS = ["bleu_1", "bleu_4", "rouge_l", "cider"]


@pytest.fixture(scope="module")
def table(tmp_path_factory, view):
    """A table of dark and bright views, each with its own report; one training study has no impression."""
    folder = tmp_path_factory.mktemp("table")
    rows = [["image", "study_id", "split", "findings", "impression"]]
    for number in range(16):
        pixels = view(number, 112) // 4 + (150 if number % 2 else 0)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        findings, impression = TEXTS[number % 2]
        split = "train" if number < 10 else "val"
        rows.append([f"{number}.png", f"s{number}", split, findings, "" if number == 9 else impression])
    with (folder / "reports.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return folder / "reports.csv"


@pytest.fixture(scope="module")
def run(table, tiny_recipe, tmp_path_factory):
    """A run that knows both reports by heart, on a dataset of `otdrg prepare`."""
    folder = tmp_path_factory.mktemp("sections")
    prepare = ["prepare", "csv", "--table", table, "--sections", "findings+impression", "--output", folder / "studies"]
    assert main(list(map(str, prepare))) == 0
    recipe = yaml.safe_load(tiny_recipe.read_text(encoding="utf-8"))
    options = {"folder": str(folder / "studies")}
    recipe |= {
        "output_dir": str(folder / "run"),
        "studies": {"source": "prepared", "options": options, "cleaning": "r2gen_iu"},
        "labels": {"labeler": "rules"},
    }
    steps = {"per_device_train_batch_size": 10, "learning_rate": 1e-2, "logging_steps": 40}
    recipe["predictor"] |= {**steps, "max_steps": 25}
    recipe["report"] |= {
        **steps,
        "max_steps": 35,
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "text": "full",
        "generation": {"num_beams": 1, "max_new_tokens": 40},
        "evaluation": {"split": "validation", "controls": [], "metrics": METRICS},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert train([str(folder / "recipe.yaml")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def evaluation(run):
    """The folder of an evaluation of the run."""
    arguments = ["--metrics", *METRICS, "--bootstrap", "20", "--floor", "1", "--batch-size", "4"]
    assert main(["evaluate", str(run), *arguments]) == 0
    return run / "evaluation-validation"


def test_pipeline_returns_the_sections_a_model_learned(run, table):
    assert json.loads((run / "model/config.json").read_text())["report_sections"] == ["findings", "impression"]
    pipe = pipeline("image-to-text", model=str(run / "model"), trust_remote_code=True)
    images = [str(table.parent / f"{number}.png") for number in (10, 11)]
    for (record,), (findings, impression) in zip(pipe(images, return_contradictions=True), WRITTEN, strict=True):
        assert record["generated_text"] == f"Findings: {findings} Impression: {impression}"
        assert (record["findings_section"], record["impression"]) == (findings, impression)
        assert record["contradictions"] == []


def test_consensus_decoding_chooses_a_report_of_two_sections(run, table, tmp_path):
    assert main(["bank", str(run), "--output", str(tmp_path / "bank")]) == 0
    assert has_sections(json.loads((tmp_path / "bank/bank.json").read_text())["reports"])
    chosen = ["--candidates", "4", "--bank", str(tmp_path / "bank"), "--output", str(tmp_path / "reports.jsonl")]
    assert main(["generate", str(run), "--study", str(table.parent / "11.png"), *chosen]) == 0
    record = json.loads((tmp_path / "reports.jsonl").read_text())
    assert (record["findings_section"], record["impression"]) == WRITTEN[1] and record["retrieved"]


def test_generate_prints_each_section_in_a_block(run, table, capsys):
    assert main(["generate", str(run), "--study", str(table.parent / "10.png")]) == 0
    blocks = [" ".join(block.split()) for block in capsys.readouterr().out.split("\n\n")]
    assert blocks[1:3] == [f"Findings: {WRITTEN[0][0]}", f"Impression: {WRITTEN[0][1]}"]


def test_evaluate_scores_sections_apart_and_the_whole_without_headings(evaluation):
    result = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
    assert result["rows"]["model"]["rouge_l"] == 1.0 and list(result["sections"]) == ["findings", "impression"]
    with (evaluation / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert has_sections(row["reference"] for row in rows)
    shuffled = [row["report, images shuffled across studies"] for row in rows]
    references = [row["reference"] for row in rows]
    whole = nlg_scores(*([without_headings(text) for text in texts] for texts in (shuffled, references)), METRICS)
    name = "images shuffled across studies"
    assert {score: result["rows"][name][score] for score in METRICS} == pytest.approx({s: whole[s] for s in METRICS})
    for section, found in result["sections"].items():
        assert found["studies"] == 6 and found["rows"]["model"]["rouge_l"] == 1.0
        part = nlg_scores(
            *([getattr(split_sections(text), section) for text in texts] for texts in (shuffled, references)), METRICS
        )
        assert found["rows"][name]["cider"] == pytest.approx(part["cider"])
        # Half of the studies have the constant's text, and the other half another one.
        assert 0 < found["rows"]["best constant report"]["bleu_1"] < 1
    document = (evaluation / "evaluation.md").read_text(encoding="utf-8")
    assert document.index("## The section findings") < document.index("| impression | BLEU-4 |")


def test_score_of_predictions_csv_gives_the_scores_of_the_evaluation(evaluation, tmp_path, capsys):
    arguments = ["--metrics", *METRICS, "--bootstrap", "0", "--output", str(tmp_path / "scores.json")]
    with (evaluation / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    # One report in the wrong order, and one without headings.
    first = split_sections(rows[0]["report"])
    rows[0]["report"] = f"Impression: {first.impression} Findings: {first.findings}"
    rows[1]["report"] = without_headings(rows[1]["report"])
    with (tmp_path / "predictions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert main(["score", "--predictions", str(evaluation / "predictions.csv"), *arguments]) == 0
    result = json.loads((tmp_path / "scores.json").read_text())
    expected = json.loads((evaluation / "evaluation.json").read_text())["sections"]
    for section, found in result["sections"].items():
        assert found == {
            "studies": 6,
            **{name: expected[section]["rows"]["model"][name] for name in found if name != "studies"},
        }
    assert "0 of 6 generated reports have no headings" in result["notes"]["sections"]
    capsys.readouterr()
    arguments += ["--overwrite"]
    assert main(["score", "--predictions", str(tmp_path / "predictions.csv"), *arguments]) == 0
    damaged = json.loads((tmp_path / "scores.json").read_text())["sections"]
    assert damaged["impression"]["rouge_l"] == pytest.approx(4 / 6) and damaged["findings"]["rouge_l"] < 1
    assert "2 of 6 generated reports have no headings or misplaced ones" in capsys.readouterr().out


def test_score_r2gengpt_refuses_sections(run, evaluation, tmp_path, capsys):
    cut = ["--protocol", "r2gengpt", "--tokenizer", str(run / "model"), "--reference-tokens", "6"]
    files = ["--predictions", str(evaluation / "predictions.csv"), "--output", str(tmp_path / "scores.json")]
    assert main(["score", *files, *cut]) == 1
    assert "would cut the impression off true reports with sections: expected full" in capsys.readouterr().err


def test_evaluate_of_reports_without_sections_compares_whole_texts(run, table, tmp_path):
    prepare_studies("csv", tmp_path / "findings", table=str(table))
    arguments = ["--metrics", *METRICS, "--bootstrap", "0", "--limit", "2", "--output", str(tmp_path / "out")]
    assert main(["evaluate", str(run), str(tmp_path / "findings"), *arguments]) == 0
    result = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert "sections" not in result
    assert "true reports do not consist of sections: those of the model are not scored apart" in result["notes"]
    (report, *_), (reference, *_) = zip(*[(" ".join(texts), texts[0]) for texts in WRITTEN], strict=True)
    assert result["rows"]["model"]["bleu_1"] < 1 and report.startswith(reference)


def test_card_shows_the_sections(run, evaluation):
    text = build_card(run, "org/tiny").text
    assert "The section findings, 6 studies:" in text and "| impression | BLEU-4 |" in text
    assert 'pipe("frontal.png")[0]["impression"]' in text
    assert "Reports consist of findings and impression, each below its heading" in text
    for texts in (*TEXTS, *WRITTEN):
        assert not any(part in text for part in texts), "no report is published"


def test_dataset_of_joined_sections_is_learned_as_one_text(table, tmp_path, caplog):
    prepare_studies("csv", tmp_path / "new", build=BuildOptions(sections="findings+impression"), table=str(table))
    studies = StudiesRecipe(source="prepared", options={"folder": str(tmp_path / "new")}, cleaning="r2gen_iu")
    labels = LabelsRecipe(labeler="rules")
    assert has_sections(build_studies(studies, labels)["train"]["report"])
    assert "joined without headings" not in caplog.text
    # As an older version made it.
    summary = json.loads((tmp_path / "new/summary.json").read_text())
    assert summary["settings"].pop("headings") == ["Findings:", "Impression:"]
    (tmp_path / "new/summary.json").write_text(json.dumps(summary))
    rows = load_studies("prepared", folder=str(tmp_path / "new"))
    rows = rows.map(
        lambda row: {"report": f"{row['findings']} {row['impression']}".strip()}, load_from_cache_file=False
    )
    shutil.rmtree(tmp_path / "new/data")
    (tmp_path / "new/data").mkdir()
    for split, part in rows.items():
        part.to_parquet(tmp_path / f"new/data/{split}-00000.parquet")
        shutil.rmtree(tmp_path / "new" / split)
    (tmp_path / "new/dataset_dict.json").unlink()
    reports = build_studies(studies, labels)["train"]["report"]
    assert reports[0] == " ".join(WRITTEN[0]) and not has_sections(reports)
    assert "joined without headings by an older version" in caplog.text
