"""A metric that is registered appears in every command, table and selection."""

import csv
import json
import re
from pathlib import Path

import otdrg
import pytest
from otdrg.cli import main
from otdrg.evaluation.evaluate import ROWS, SystemReports, evaluate_model
from otdrg.evaluation.report import bootstrap_rows, format_scores, format_table, write_scores
from otdrg.experiments.ablation_report import columns
from otdrg.inference.loading import load_published
from otdrg.metrics import (
    METRICS,
    Metric,
    MetricResult,
    Score,
    display_name,
    full_score_name,
    higher_is_better,
    main_scores,
    metric_of,
    register,
    score_names,
    score_reports,
    score_tables,
)
from otdrg.studies import load_studies
from otdrg.training.recipe import load_recipe
from otdrg.training.run import check_recipe
from otdrg.training.stages import stage_of

PREDICTIONS, REFERENCES = ["the heart is normal", "clear lungs"], ["the heart is large", "the lungs are clear"]


def mean_words(predictions, references):
    return MetricResult.from_means({"mean_words": [len(text.split()) for text in predictions]})


@pytest.fixture
def toy():
    """A metric that counts words, registered for one test."""
    register(Metric("words", {"mean_words": Score("mean words", main=True, higher_is_better=False)}, mean_words))
    yield
    del METRICS["words"]


def test_registered_metric_can_select_and_has_names(toy):
    assert "mean_words" in score_names() and metric_of("mean_words").name == "words"
    assert "mean_words" in stage_of("report").score_names()
    assert display_name("mean_words") == "mean words" and not higher_is_better("mean_words")
    assert main_scores()["mean_words"] == "mean words"
    assert score_tables()["other metrics"] == {"mean_words": "mean words"}
    # The columns of the ablation's tables.
    assert columns()["mean_words"] == "mean words"


def test_registered_metric_selects_the_best_checkpoint(toy, tiny_recipe):
    check_recipe(load_recipe(tiny_recipe, ["report.metric_for_best_model=mean_words"]))
    with pytest.raises(ValueError, match="unknown score 'mean_word', did you mean 'mean_words'"):
        check_recipe(load_recipe(tiny_recipe, ["report.metric_for_best_model=mean_word"]))


def test_registered_metric_is_scored_with_per_study_values(toy):
    found = score_reports(PREDICTIONS, REFERENCES, metrics=["words", "bleu_4"])
    assert found.scores["mean_words"] == 3 and found.per_study["mean_words"] == [4, 2]
    assert list(found.statistics.aggregates()) == ["bleu_4", "mean_words"]
    assert list(found.per_study) == ["bleu_4", "mean_words"]


def test_registered_metric_appears_in_otdrg_score(toy, tmp_path, capsys):
    for name, texts in (("ours", PREDICTIONS), ("theirs", REFERENCES), ("true", REFERENCES)):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("id", "report"), *enumerate(texts)])
    files = {"predictions": "ours", "against": "theirs", "references": "true"}
    typed = [word for flag, name in files.items() for word in (f"--{flag}", str(tmp_path / f"{name}.csv"))]
    output = tmp_path / "out.json"
    typed += ["--metrics", "words", "rouge_l", "--bootstrap", "20"]
    assert main(["score", *typed, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["other"] == {"mean_words": 3} and result["comparison"]["mean_words"]["against"] == 4
    shown = capsys.readouterr().out
    assert "| other metrics | score |" in shown and shown.count("| mean words | 3.000 |") == 2
    assert '"mean_words"' in json.dumps(result["intervals"])
    assert output.with_suffix(".csv").read_text().splitlines()[0].count("mean_words") == 2


def test_registered_metric_appears_in_the_evaluations_tables(toy, trained_run):
    model, processor = load_published(str(trained_run))
    options = {"train": 4, "validation": 3, "test": 0, "image_size": 112, "views": ["frontal"]}
    splits = load_studies("phantom", **options)
    evaluation = evaluate_model(
        model,
        processor,
        splits["validation"],
        splits["train"],
        generation={"num_beams": 1, "max_new_tokens": 4},
        controls=["shuffled", "constant"],
        metrics=["bleu_4", "words"],
    )
    row = evaluation.rows["model"]
    assert evaluation.scores()["rows"]["model"]["mean_words"] == sum(len(text.split()) for text in row.reports) / 3
    assert format_table(evaluation).startswith("|  | BLEU-4 | macro-F1 (13) | mean words |")
    document = format_scores(evaluation, *bootstrap_rows(evaluation, 10, 0))
    assert "| other metrics | mean words |" in document and "| model minus | BLEU-4 | macro-F1 (13) | mean words |"
    assert "no best constant report is searched for mean words" in evaluation.notes


def test_score_names_short_clinical_score_means_unclear_as_negative():
    assert full_score_name("macro_f1_13") == "macro_f1_13_uncertain_negative"
    with pytest.raises(ValueError, match=r"unknown score 'blue_4': did you mean 'bleu_4'\?"):
        full_score_name("blue_4")


def test_register_taken_name_is_refused():
    with pytest.raises(ValueError, match="metric 'mine': the name 'bleu_4' is taken"):
        register(Metric("mine", {"bleu_4": Score("mine")}, mean_words))


def test_metrics_table_of_the_pages_names_all_and_which_are_chest_only():
    page = (Path(otdrg.__file__).parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    table = page.partition("| `--metrics` |")[2].partition("\n\n")[0]
    stated = {}
    for row in table.splitlines()[2:]:
        names, _, chest_only = (cell.strip() for cell in row.strip("|").split("|"))
        stated |= dict.fromkeys(re.findall(r"`(\w+)`", names), chest_only == "yes")
    assert stated == {name: metric.chest_only for name, metric in METRICS.items()}


@pytest.fixture
def refusing():
    """A metric without intervals that refuses files with a blank report."""

    def compute(predictions, references):
        if "" in predictions:
            return MetricResult({"length": None}, notes={"length": "a report is blank"})
        lengths = [float(len(text)) for text in predictions]
        return MetricResult({"length": max(lengths)}, {"length": lengths})

    register(Metric("refusing", {"length": Score("longest")}, compute, default=False))
    yield
    del METRICS["refusing"]


@pytest.mark.parametrize(("ours", "theirs"), [("Clear.", "Edema seen."), ("Clear.", ""), ("", "Edema seen.")])
def test_score_against_has_scores_without_intervals(refusing, tmp_path, capsys, ours, theirs):
    for name, text in (("ours", ours), ("theirs", theirs), ("true", "Edema.")):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("id", "report"), ("a", text), ("b", "Clear.")])
    files = {"predictions": "ours", "against": "theirs", "references": "true"}
    typed = [word for flag, name in files.items() for word in (f"--{flag}", str(tmp_path / f"{name}.csv"))]
    output = tmp_path / "out.json"
    typed += ["--metrics", "refusing", "rouge_l", "--bootstrap", "20", "--output", str(output)]
    assert main(["score", *typed]) == 0
    result = json.loads(output.read_text())
    values = [float(max(len(text), 6)) if text else None for text in (ours, theirs)]
    compared = result["comparison"]["length"]
    assert [compared["value"], compared["against"]] == values
    assert compared["difference"] == (None if None in values else values[0] - values[1])
    assert compared["low"] is None and compared["p_permutation"] is None
    assert (result["notes"].get("length, against") == "a report is blank") == (values[1] is None)
    shown = ["–" if value is None else f"{value:.3f}" for value in values]
    assert f"| longest | {' | '.join(shown)} |" in capsys.readouterr().out


@pytest.mark.parametrize("blank", ["model", "shuffled"])
def test_evaluation_is_written_if_a_metric_fails_for_one_row(refusing, trained_run, tmp_path, blank):
    model, processor = load_published(str(trained_run))
    studies = load_studies("phantom", train=0, validation=3, test=0, image_size=112, views=["frontal"])["validation"]
    generation = {"num_beams": 1, "max_new_tokens": 4}
    evaluation = evaluate_model(
        model, processor, studies, None, 4, generation, ["shuffled"], metrics=["rouge_l", "refusing"]
    )
    for name, row in evaluation.rows.items():
        reports = ["" if name == blank else "Clear.", "Edema.", "No edema."]
        found = score_reports(
            reports, evaluation.references, row.report_states, evaluation.true_states, ["rouge_l", "refusing"]
        )
        evaluation.rows[name] = SystemReports(reports, row.report_states, found, reports)
    write_scores(evaluation, tmp_path / "scores.csv")
    document = format_scores(evaluation, *bootstrap_rows(evaluation, 10, 0))
    assert "–" in document
    with (tmp_path / "scores.csv").open(newline="") as file:
        lengths = {(row["id"], row["system"]): row["length"] for row in csv.DictReader(file)}
    assert {system for (_, system), value in lengths.items() if value == ""} == {ROWS[blank]}
