"""`otdrg ablate`: which runs there are, what they share, what is said of them, and what happens to those that fail."""

import json
import signal
import time
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from otdrg import FINDINGS
from otdrg.cli import main
from otdrg.evaluation.evaluate import Evaluation, SystemReports
from otdrg.evaluation.report import write_predictions
from otdrg.experiments.ablation import MODULES, Row, modules_of, plan_runs, table_rows
from otdrg.experiments.ablation_report import PAPER_COLUMNS, format_summary, summarize
from otdrg.experiments.runs import train_runs
from otdrg.labelers import load_labeler
from otdrg.metrics import nlg_scores, score_reports
from otdrg.runtime.output_lock import OutputLock, OutputLockedError
from otdrg.training.recipe import load_recipe
from PIL import Image

MODULE_FOLDERS = ["baseline", "ircp", "dle", "ircp+dle", "ircp+dle+fiot"]
BASELINE, DLE = Row("modules", ()), Row("modules", ("dle",))
METRICS = ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"]
HEARTS = ["heart size is normal .", "the heart is enlarged .", "there is mild cardiomegaly ."]
LUNGS = ["the lungs are clear .", "there is a small left pleural effusion .", "patchy basilar atelectasis ."]
NORMAL = f"{HEARTS[0]} {LUNGS[0]}"


@pytest.fixture(scope="module")
def recipe(tiny_recipe, tmp_path_factory):
    """A recipe of a second a stage, scored without Java."""
    path = tmp_path_factory.mktemp("ablation") / "tiny.yaml"
    tiny = yaml.safe_load(tiny_recipe.read_text(encoding="utf-8"))
    tiny["stages"] = ["ircp", "predictor", "report"]
    tiny["ircp"] = {"max_steps": 1, "per_device_train_batch_size": 4, "probe_studies": 4}
    tiny["report"]["evaluation"] = {"metrics": METRICS}
    path.write_text(yaml.safe_dump(tiny), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def references():
    rng = np.random.default_rng(0)
    return [f"{HEARTS[a]} {LUNGS[b]}" for a, b in zip(rng.choice(3, 60), rng.choice(3, 60), strict=True)]


LABELER = load_labeler("rules")


@cache
def scored(texts, references):
    states = LABELER.label(list(texts))
    found = score_reports(texts, references, states, LABELER.label(list(references)), METRICS)
    return SystemReports(list(texts), states, found, list(texts))


def finish(run, references, right):
    """Leave what a finished run leaves: the true report for a share `right` of the studies, else the normal one."""
    hits = np.random.default_rng(run.recipe.seed).random(60) < right
    reports = tuple(text if hit else NORMAL for text, hit in zip(references, hits, strict=True))
    true = tuple(references)
    evaluation = Evaluation(
        ids=[f"study-{position}" for position in range(60)],
        references=references,
        uncleaned_references=references,
        true_states=scored(true, true).report_states,
        finding_states=np.zeros((60, len(FINDINGS)), int),
        labeler="rules",
        rows={"model": scored(reports, true), "shuffled": scored(reports[::-1], true)},
        constants={"bleu_4": scored((NORMAL,) * 60, true)},
    )
    for stage in run.recipe.stages:
        (run.folder / stage).mkdir(parents=True)
        (run.folder / stage / "finished.json").write_text("{}")
    (run.folder / "recipe.yaml").write_text(run.recipe.to_yaml())
    results = {"report": {"evaluation": {"split": "validation", **evaluation.scores()}}}
    (run.folder / "results.json").write_text(json.dumps(results if "report" in run.recipe.stages else {}))
    if "report" in run.recipe.stages:
        write_predictions(evaluation, run.folder / "predictions.csv")


RIGHT = {(): 0.1, ("ircp",): 0.1, ("dle",): 0.9, ("ircp", "dle"): 0.9, ("dle", "fiot"): 0.5, MODULES: 0.5}


def finish_all(plan, references):
    for (row, _), run in plan.by_row.items():
        if not run.finished:
            finish(run, references, RIGHT[row.modules])
    for run in plan.runs:
        if not run.finished:
            finish(run, references, 0)


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("seed-*/**/*")}


# --- the runs there are ----------------------------------------------------------------------------------------------


def test_table_rows_are_the_papers():
    rows = table_rows()
    assert [row.modules for row in rows[:5]] == [(), ("ircp",), ("dle",), ("ircp", "dle"), ("ircp", "dle", "fiot")]
    assert [row.value for row in rows if row.table == "epsilon"] == [0.01, 0.05, 0.10, 0.12]
    assert [row.value for row in rows if row.table == "iterations"] == [1, 5, 10, 50, 100]
    assert {row.modules for row in rows[5:]} == {MODULES}


def test_rows_of_a_recipe_without_ircp_have_no_ircp(recipe, references, tmp_path):
    """Table 3 then has three rows, and the full model of the other tables is DLE + FIOT."""
    overrides = ["stages=[predictor, report]"]
    rows = table_rows(["modules", "epsilon"], epsilons=[0.01], modules=modules_of(load_recipe(recipe, overrides)))
    assert [row.modules for row in rows] == [(), ("dle",), ("dle", "fiot"), ("dle", "fiot")]
    plan = plan_runs(recipe, overrides, rows, [1, 2], tmp_path)
    assert not any("ircp" in run.recipe.stages for run in plan.runs)
    finish_all(plan, references)
    summary = summarize(plan, resamples=50)
    assert [row["name"] for row in summary["contributions"]] == ["DLE alone", "FIOT", "the full model"]
    assert summary["contributions"][1]["scores"]["bleu_4"]["verdict"] == "lowers"
    document = format_summary(summary, "Title")
    assert "| DLE | FIOT | Pre." in document and "IRCP" not in document


def test_plan_runs_set_only_the_rows_modules(recipe, tmp_path):
    plan = plan_runs(recipe, ["report.max_steps=3"], table_rows(["modules"]), [7], tmp_path)
    for (row, _), run in plan.by_row.items():
        overrides = run.recipe.model.overrides
        assert (overrides["dle"], overrides["fiot"]) == ("dle" in row.modules, "fiot" in row.modules)
        assert ("ircp" in run.recipe.stages, "predictor" in run.recipe.stages) == (
            "ircp" in row.modules,
            "dle" in row.modules,
        )
        assert (run.recipe.seed, run.recipe.report.max_steps) == (7, 3)
        assert overrides["ot_epsilon"] == 0.05


def test_plan_runs_of_iterations_have_no_tolerance(recipe, tmp_path):
    plan = plan_runs(recipe, [], table_rows(["iterations"], iterations=[3]), [1], tmp_path)
    overrides = plan.runs[-1].recipe.model.overrides
    assert (overrides["ot_max_iterations"], overrides["ot_tolerance"]) == (3, 0.0)


def test_plan_runs_train_shared_stages_once_per_seed(recipe, tmp_path):
    plan = plan_runs(recipe, [], table_rows(["modules", "epsilon"], epsilons=[0.05, 0.1]), [1, 2], tmp_path)
    names = [str(run.folder.relative_to(tmp_path)) for run in plan.runs if run.recipe.seed == 1]
    # Epsilon 0.05 is the recipe's own: the full model of the first table.
    assert sorted(names) == sorted(
        f"{name}/seed-1"
        for name in (*MODULE_FOLDERS, "epsilon-0.1", "shared/ircp", "shared/predictor", "shared/ircp+predictor")
    )
    assert len(plan.runs) == 2 * len(names)
    full = plan.by_row[Row("modules", MODULES), 2]
    assert plan.by_row[Row("epsilon", MODULES, 0.05), 2] is full
    assert full.shared is plan.by_row[Row("modules", ("ircp", "dle")), 2].shared
    assert full.shared.recipe.stages == ["ircp", "predictor"] and full.shared.shared.recipe.stages == ["ircp"]
    assert full.shared.recipe.seed == 2
    for run in plan.runs:
        assert run.shared is None or plan.runs.index(run.shared) < plan.runs.index(run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tables", "module"], "table 'module': expected some of modules, epsilon, iterations"),
        (["--tables", "modules", "modules"], "expected each once"),
        (["--epsilons", "0", "0.1"], "values of the table epsilon: 0 0.1: expected different numbers above 0"),
        (["--seeds", "1", "1"], "seeds 1 1: expected at least one, each once"),
        (["--jobs", "0"], "--jobs is 0: expected 1 or more"),
        (["--accelerate-config", "nowhere.yaml"], "--accelerate-config nowhere.yaml: no such file"),
    ],
)
def test_ablate_wrong_arguments_are_one_line(recipe, tmp_path, capsys, arguments, message):
    assert main(["ablate", str(recipe), "--output", str(tmp_path / "out"), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=3", "override 'seed=3': an ablation sets this field itself, --seeds names the seeds"),
        ("model.overrides.dle=false", "each row has its own modules"),
        ("report.evaluation.split=none", "report.evaluation.split='none': expected validation or test"),
        ("model.overrides.finding_text=none", "rows with DLE would equal those without; expected mentioned or all"),
        ("report={vision: full, predictor: full}", "would learn from labels in the rows without DLE"),
        ("report.learning_rat=1", "unknown key 'learning_rat' in report: did you mean 'learning_rate'?"),
        ("model.overrides.ot_epsilonn=1", "unknown OTDRGConfig field 'ot_epsilonn'"),
    ],
)
def test_ablate_unfit_recipe_is_one_line(recipe, tmp_path, capsys, override, message):
    assert main(["ablate", str(recipe), override, "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_ablate_missing_recipe_is_one_line(tmp_path, capsys):
    assert main(["ablate", str(tmp_path / "none.yaml"), "--output", str(tmp_path / "out")]) == 1
    assert f"recipe {tmp_path / 'none.yaml'} does not exist" in capsys.readouterr().err


def test_ablate_refuses_runs_of_another_recipe(recipe, references, tmp_path, capsys):
    finish_all(plan_runs(recipe, [], table_rows(["modules"]), [1], tmp_path), references)
    arguments = ["ablate", str(recipe), "report.max_steps=5", "--tables", "modules", "--seeds", "1"]
    assert main([*arguments, "--output", str(tmp_path)]) == 1
    assert "recipe.yaml is another recipe: report.max_steps=4 then, 5 now" in capsys.readouterr().err
    # Threads change nothing a run finds.
    plan_runs(recipe, [], table_rows(["modules"]), [1], tmp_path, cpu_threads=2)


# --- what is said of them --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(recipe, references, tmp_path_factory):
    """An ablation of all tables whose runs are finished, and its folder."""
    output = tmp_path_factory.mktemp("finished")
    arguments = ["--epsilons", "0.01", "0.05", "--iterations", "1", "10", "--seeds", "1", "2", "3"]
    plan = plan_runs(recipe, [], table_rows(epsilons=[0.01, 0.05], iterations=[1, 10]), [1, 2, 3], output)
    finish_all(plan, references)
    return plan, ["ablate", str(recipe), *arguments, "--output", str(output)], output


@pytest.fixture(scope="module")
def summary(finished):
    return summarize(finished[0], resamples=400)


def test_ablate_finished_runs_are_kept_and_tabled(finished, capsys):
    _, arguments, output = finished
    before = stamps(output)
    assert main([*arguments, "--resamples", "100"]) == 0
    assert stamps(output) == before
    document = (output / "ablation.md").read_text(encoding="utf-8")
    assert document in capsys.readouterr().out
    assert "60 studies of the split validation, seeds 1, 2, 3" in document and "labeler rules" in document
    assert json.loads((output / "ablation.json").read_text(encoding="utf-8"))["seeds"] == [1, 2, 3]
    with Image.open(output / "ablation.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(2**24)) > 50


def test_summarize_means_and_deviations_are_over_seeds(finished, summary, references):
    plan, _, _ = finished
    for place, row in enumerate(table_rows(["modules"])):
        scores = summary["tables"]["modules"]["rows"][place]["scores"]
        assert "meteor" not in scores
        for column in PAPER_COLUMNS.keys() - {"meteor"}:
            values = [
                json.loads((plan.by_row[row, seed].folder / "results.json").read_text())["report"]["evaluation"][
                    "rows"
                ]["model"][column]
                for seed in (1, 2, 3)
            ]
            assert scores[column]["mean"] == pytest.approx(np.mean(values))
            assert scores[column]["sd"] == pytest.approx(np.std(values, ddof=1))
    controls = summary["tables"]["modules"]["controls"]
    constant = nlg_scores([NORMAL] * 60, references, ["bleu_4"])["bleu_4"]
    assert controls["of"] == "IRCP + DLE + FIOT" and controls["constant"]["bleu_4"]["mean"] == pytest.approx(constant)
    assert controls["shuffled"]["cider"]["mean"] < summary["tables"]["modules"]["rows"][-1]["scores"]["cider"]["mean"]


def test_summarize_contributions_are_words_of_any_sign(summary):
    by_name = {row["name"]: row for row in summary["contributions"]}
    rows = {row["label"]: row["scores"] for row in summary["tables"]["modules"]["rows"]}
    macro = "macro_f1_13_uncertain_negative"
    for row in by_name.values():
        for column, score in row["scores"].items():
            means = [rows[row[place]][column]["mean"] for place in ("row", "against")]
            assert score["difference"] == pytest.approx(means[0] - means[1], abs=1e-9)
            assert score["low"] - 1e-9 <= score["difference"] <= score["high"] + 1e-9
    assert by_name["DLE alone"]["scores"][macro]["verdict"] == "raises"
    assert by_name["FIOT"]["scores"][macro]["verdict"] == "lowers"
    assert by_name["IRCP alone"]["scores"][macro]["verdict"] == "undecided"
    assert by_name["IRCP alone"]["sentence"].startswith("IRCP alone (IRCP against baseline): the effect on Pre.")
    assert by_name["DLE alone"]["sentence"].startswith("DLE alone (DLE against baseline) raises Pre., Rec., F1")
    assert "lowers" in by_name["FIOT"]["sentence"]


def test_format_summary_has_the_papers_form(summary, references):
    document = format_summary(summary, "Title", "ablation.png")
    lines = document.splitlines()
    start = lines.index(next(line for line in lines if line.startswith("| IRCP | DLE | FIOT | Pre. | Rec. | F1 |")))
    assert [line.split(" | ")[:3] for line in lines[start + 2 : start + 7]] == [
        ["| ", "", ""],
        ["| ✓", "", ""],
        ["| ", "✓", ""],
        ["| ✓", "✓", ""],
        ["| ✓", "✓", "✓"],
    ]
    width = lines[start].count("|")
    assert all(line.count("|") == width for line in lines[start + 1 : start + 9])
    constant = nlg_scores([NORMAL] * 60, references, ["bleu_4"])["bleu_4"]
    assert lines[start + 7].startswith("| best constant report, each column its own |")
    assert f"| {constant:.3f}" in lines[start + 7]
    assert lines[start + 8].startswith("| IRCP + DLE + FIOT, images shuffled across studies |")
    assert "| ε | Pre." in document and "| iterations | Pre." in document and "![" in document


def test_format_summary_of_one_seed_has_no_deviation(recipe, references, tmp_path):
    plan = plan_runs(recipe, [], table_rows(["modules"]), [1], tmp_path)
    finish_all(plan, references)
    document = format_summary(summarize(plan, resamples=50), "Title")
    assert "±" not in document and "do not cover training again" in document
    assert "- With one seed, the initialisation alone may make such differences" in document
    assert "raises" not in document and "lowers" not in document


def test_summarize_refuses_runs_scored_on_other_studies(recipe, references, tmp_path):
    plan = plan_runs(recipe, [], [BASELINE, DLE], [1], tmp_path)
    finish(plan.by_row[BASELINE, 1], references, 0.5)
    finish(plan.by_row[DLE, 1], [*references[1:], references[0]], 0.5)
    with pytest.raises(ValueError, match=r"predictions\.csv have different studies"):
        summarize(plan)


# --- how they are run ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_runs_start_after_their_shared_stages(recipe, tmp_path):
    plan = plan_runs(recipe, [], [BASELINE, DLE], [1], tmp_path, cpu_threads=1)
    train_runs(plan.runs, jobs=2)
    assert [run.error for run in plan.runs] == [None] * 3
    shared, dle = plan.by_row[DLE, 1].shared, plan.by_row[DLE, 1]
    weights = [(run.folder / "predictor" / "model.safetensors").read_bytes() for run in (shared, dle)]
    assert weights[0] == weights[1]
    assert not list((dle.folder / "predictor").glob("checkpoint-*"))
    results = json.loads((dle.folder / "results.json").read_text(encoding="utf-8"))
    assert results["predictor"]["steps"] == 2 and results["report"]["steps"] == 4
    assert load_recipe(dle.folder / "recipe.yaml") == dle.recipe
    for row in (BASELINE, DLE):
        config = json.loads((plan.by_row[row, 1].folder / "model" / "config.json").read_text(encoding="utf-8"))
        assert (config["dle"], config["fiot"]) == ("dle" in row.modules, False)
    before = stamps(tmp_path)
    train_runs(plan.runs)
    assert stamps(tmp_path) == before


@pytest.mark.slow
def test_ablate_failed_run_is_reported_and_others_continue(recipe, references, tmp_path, capsys):
    # Only the predictor's stage can fail by this, and only while it is trained.
    overrides = ["predictor.learning_rate=1e30", "predictor.max_steps=3"]
    rows = table_rows(["modules"])
    plan = plan_runs(recipe, overrides, rows, [1], tmp_path)
    for row in (rows[0], rows[1], rows[3], rows[4]):
        finish(plan.by_row[row, 1], references, 0.5)
    arguments = ["ablate", str(recipe), *overrides, "--tables", "modules", "--seeds", "1", "--output", str(tmp_path)]
    for shared in ("ircp", "ircp+predictor"):
        finish(next(run for run in plan.runs if run.name == f"shared/{shared}, seed 1"), references, 0)
    assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        "2 of 8 runs failed, the first: shared/predictor, seed 1: step 2 of " in error
        and "the weights are unchanged" in error
    )
    document = (tmp_path / "ablation.md").read_text(encoding="utf-8")
    assert "|  | ✓ |  | failed: shared/predictor, seed 1: step " in document
    assert "DLE alone (DLE against baseline): undecided, no seed finished in both rows." in document
    assert "- dle, seed 1: shared/predictor, seed 1: step " in document


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("studies.source=nope", "studies.source='nope': unknown source of studies 'nope'"),
        ("studies.options.train=many", "studies.options.train='many': expected an integer"),
        ("labels.csv=nowhere.csv", "nowhere.csv"),
        ("report.evaluation.metrics=[nope]", "report.evaluation.metrics='nope': expected some of bleu, bleu_1"),
        (
            "report.evaluation.split=test",
            "report.evaluation.split='test': expected one of the splits there are, train, validation",
        ),
        ("model.overrides.lora.r=0", "expected an integer from 1 to 4,096"),
    ],
)
def test_ablate_wrong_recipe_starts_no_run(recipe, tmp_path, capsys, override, message):
    few = ["--tables", "modules", "--seeds", "1"]
    assert main(["ablate", str(recipe), override, *few, "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("otdrg ablate: error: ") and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow  # a process of its own that imports everything
def test_ablate_failure_before_training_starts_no_other_run(recipe, tmp_path):
    # Found when the model is built.
    overrides = ["model.overrides.vision_config.architecture=nope"]
    plan = plan_runs(recipe, overrides, table_rows(["modules"]), [1], tmp_path)
    train_runs(plan.runs)
    assert "no model can be made of them" in plan.runs[0].error
    first = plan.runs[0].name
    expected = (f"not started: {first} failed before its training began", f"{first}: ")
    assert all(run.error.startswith(expected) for run in plan.runs[1:])
    assert not any(run.log.exists() for run in plan.runs[1:])


@pytest.mark.slow
def test_ablate_killed_ends_its_runs_and_leaves_no_lock(recipe, start_process, tmp_path, capsys):
    longer = ["report.max_steps=100000", "report.logging_steps=1000", "report.save_steps=100000"]
    command = ["ablate", str(recipe), *longer, "--tables", "modules", "--seeds", "1", "--output", str(tmp_path / "out")]
    process = start_process(["-m", "otdrg.cli", *command])
    baseline = tmp_path / "out" / "baseline" / "seed-1"
    deadline = time.monotonic() + 120
    while not (baseline / "report" / "started.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    (child,) = [one for one in psutil.Process(process.pid).children() if "otdrg.train_hf" in one.cmdline()]
    assert main(command) == 1
    assert f"is being written by process {process.pid} on " in capsys.readouterr().err
    with pytest.raises(OutputLockedError, match=f"process {child.pid} on "), OutputLock(baseline):
        pass
    process.kill()
    # Not waited for: a parent that is a zombie is gone, too.
    child.wait(timeout=20)
    with OutputLock(baseline):
        pass
    process.wait()


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ablate_interrupted_stops_its_processes(recipe, start_process, tmp_path, how):
    command = ["ablate", str(recipe), "--tables", "modules", "--seeds", "1", "--output", str(tmp_path)]
    process = start_process(["-m", "otdrg.cli", *command])
    deadline = time.monotonic() + 120

    def training():
        # Python itself starts others for a moment when it looks for libraries.
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if "otdrg.train_hf" in child.cmdline()]

    while not (started := training()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(how)
    assert process.wait(timeout=60) == (130 if how == signal.SIGINT else 143)
    assert started and not any(child.is_running() for child in started)


@pytest.mark.slow
def test_ablate_trains_and_tables_a_recipe(recipe, tmp_path):
    arguments = ["ablate", str(recipe), "--tables", "epsilon", "--epsilons", "0.05", "0.1", "--seeds", "1", "2"]
    arguments += ["--output", str(tmp_path), "--jobs", "2"]
    assert main(arguments) == 0
    summary = json.loads((tmp_path / "ablation.json").read_text(encoding="utf-8"))
    rows = summary["tables"]["epsilon"]["rows"]
    assert [row["value"] for row in rows] == [0.05, 0.1]
    assert all(set(row["scores"]["rouge_l"]["by_seed"]) == {"1", "2"} for row in rows)
    # At the recipe's own epsilon the row is the full model.
    configs = [tmp_path / name / "seed-2" / "model" / "config.json" for name in ("ircp+dle+fiot", "epsilon-0.1")]
    assert [json.loads(path.read_text(encoding="utf-8"))["ot_epsilon"] for path in configs] == [0.05, 0.1]
    before = stamps(tmp_path)
    assert main(arguments) == 0
    assert stamps(tmp_path) == before
