"""`otdrg bank`, and the commands that use what it writes."""

import json
import shutil

import pytest
import yaml
from otdrg.bank_otdrg import ReportBank
from otdrg.cli import main
from otdrg.consensus_otdrg import store_settings
from otdrg.inference.loading import load_published
from otdrg.labelers.rules import RulesLabeler
from otdrg.studies import prepare_studies
from otdrg.studies.cleaning import clean_report
from PIL import Image

FEW = ["--max-new-tokens", "8"]
REPORTS = ["The Heart is NORMAL in size. No effusion.", "1. Small LEFT effusion. 2. No pneumothorax."]


@pytest.fixture(scope="module")
def bank(trained_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank") / "bank"
    assert main(["bank", str(trained_run), "--output", str(folder)]) == 0
    return folder


def test_bank_holds_the_training_reports_and_their_licence(bank, trained_run, capsys):
    found = ReportBank.load(bank)
    assert found.counts.sum() == 16 and all(licence for licence in found.licences)
    assert main(["bank", str(trained_run), "--output", str(bank)]) == 1
    assert f"{bank} holds a report bank: --overwrite replaces it" in capsys.readouterr().err
    assert main(["bank", str(trained_run), "--output", str(bank), "--limit", "5", "--overwrite"]) == 0
    assert ReportBank.load(bank).counts.sum() == 5
    assert main(["bank", str(trained_run), "--output", str(bank), "--overwrite"]) == 0
    assert ReportBank.load(bank).reports == found.reports


def test_generate_with_a_bank_lists_runners_up_and_resumes(bank, trained_run, paths, tmp_path, capsys):
    output = tmp_path / "reports.jsonl"
    command = ["generate", str(trained_run), "--candidates", "4", "--bank", str(bank), *FEW, "--runners-up", "2"]
    listed = tmp_path / "studies.txt"
    listed.write_text("\n".join(paths[:2]))
    assert main([*command, "--studies", str(listed), "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    for row in rows:
        assert len(row["candidates"]) == 3 and row["candidates"][0]["report"] == row["report"]
        assert row["retrieved"] == (row["report"] in ReportBank.load(bank))
    output.write_text(output.read_text().splitlines(keepends=True)[0])
    assert main([*command, "--studies", str(listed), "--output", str(output), "--resume"]) == 0
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows
    changed = [*command[:3], "5", *command[4:]]
    assert main([*changed, "--studies", str(listed), "--output", str(output), "--resume"]) == 1
    assert "was made with other settings (consensus=" in capsys.readouterr().err
    assert main([*command, "--study", paths[0]]) == 0
    assert "runners-up" in capsys.readouterr().out


def test_evaluate_with_a_bank_names_the_decoding(bank, trained_run, tmp_path, capsys):
    command = ["evaluate", str(trained_run), "--candidates", "4", "--bank", str(bank), *FEW, "--bootstrap", "0"]
    command += ["--metrics", "bleu_1", "--limit", "3", "--output", str(tmp_path / "out")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert (
        f"consensus of 4 samples and the report bank by utility against a bank of {len(ReportBank.load(bank))}" in shown
    )
    assert "| model, without retrieved candidates |" in shown and "| model, without consensus decoding |" in shown
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["consensus"]["candidates"] == 4 and settings["bank"]["digest"] == ReportBank.load(bank).digest()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--candidates", "-1"], "--candidates is -1: expected 0 or more"),
        (["--candidates", "0"], "--candidates 0 needs --bank: expected both"),
        (["--no-retrieved"], "--retrieved needs --bank: expected both"),
        (["--candidates", "4", "--num-beams", "2"], "--num-beams and --candidates were both given"),
        (["--agreement-weight", "1", "--num-beams", "2"], "--num-beams and --agreement-weight were both given"),
        (["--candidates", "1", "--agreement-weight", "1"], "--candidates 1 and --agreement-weight were both given"),
        (["--candidates", "1", "--bank", "x"], "--candidates 1 and --bank were both given"),
        (["--bank", "nowhere"], "nowhere has no bank.safetensors"),
        (["--runners-up", "2"], "--runners-up needs --candidates or --bank"),
    ],
)
def test_generate_consensus_options_that_do_not_fit_are_one_line(run_folder, paths, capsys, arguments, message):
    assert main(["generate", str(run_folder), "--study", paths[0], *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


@pytest.fixture
def prepared(tmp_path, views):
    """A dataset without finding states."""
    for number in range(len(REPORTS)):
        Image.fromarray(views[number]).save(tmp_path / f"{number}.png")
    lines = [f"{number}.png,{report},train\n" for number, report in enumerate(REPORTS)]
    (tmp_path / "reports.csv").write_text("image,report,split\n" + "".join(lines), encoding="utf-8")
    prepare_studies("csv", tmp_path / "prepared", table=str(tmp_path / "reports.csv"))
    return tmp_path / "prepared"


@pytest.fixture
def published(run_folder, tmp_path):
    """A published model, without a recipe."""
    return shutil.copytree(run_folder / "model", tmp_path / "published")


def write_metrics(model, cleaning):
    (model / "metrics.json").write_text(json.dumps({"recipe": {"studies": {"cleaning": cleaning}}}), encoding="utf-8")


def test_bank_of_a_published_model_is_cleaned_as_the_model_writes(published, prepared, tmp_path, capsys):
    command = ["bank", str(published), str(prepared), "--output", str(tmp_path / "bank")]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "neither recipe.yaml nor metrics.json" in error and "expected --cleaning, one of r2gen_iu" in error
    assert error.count("\n") == 1
    write_metrics(published, "r2gen_iu")
    assert main(command) == 0, capsys.readouterr().err
    assert ReportBank.load(tmp_path / "bank").reports == [clean_report(report, "r2gen_iu") for report in REPORTS]
    assert main([*command, "--overwrite", "--cleaning", "none"]) == 0
    assert ReportBank.load(tmp_path / "bank").reports == REPORTS
    write_metrics(published, "other")
    capsys.readouterr()
    assert main([*command, "--overwrite"]) == 1
    assert "metrics.json: recipe.studies.cleaning='other': expected one of r2gen_iu" in capsys.readouterr().err


def test_bank_needs_no_finding_states(published, prepared, trained_run, tmp_path, monkeypatch, capsys):
    def fails(self, reports):
        raise AssertionError("the studies were labelled")

    monkeypatch.setattr(RulesLabeler, "label", fails)
    folder = tmp_path / "bank"
    assert main(["bank", str(published), str(prepared), "--cleaning", "none", "--output", str(folder)]) == 0
    recipe = yaml.safe_load((trained_run / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["labels"] = {"labeler": "rules"}
    (published / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["bank", str(published), "--output", str(folder), "--overwrite"]) == 0, capsys.readouterr().err
    assert ReportBank.load(folder).counts.sum() == 16


def test_bank_of_a_model_that_writes_one_candidate_needs_candidates(bank, trained_run, paths, tmp_path, capsys):
    shutil.copytree(trained_run / "model", tmp_path / "model")
    model, _ = load_published(str(trained_run), "cpu")
    store_settings(model, {"candidates": 1})
    model.generation_config.save_pretrained(tmp_path / "model")
    command = ["generate", str(tmp_path / "model"), "--study", paths[0], "--bank", str(bank), *FEW]
    assert main(command) == 1
    assert "this model writes candidates=1: expected --candidates too" in capsys.readouterr().err
    assert main([*command, "--candidates", "2"]) == 0


@pytest.mark.parametrize("command", ["bank", "embed", "localise"])
def test_output_folder_that_is_a_file_is_refused_first(tmp_path, capsys, command):
    (tmp_path / "file").write_text("kept")
    assert main([command, str(tmp_path / "no_model"), "--output", str(tmp_path / "file"), "--overwrite"]) == 1
    assert f"--output {tmp_path / 'file'}: this is a file, expected a folder\n" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


def test_bank_without_studies_is_one_line(run_folder, tmp_path, capsys):
    assert main(["bank", str(run_folder), "--output", str(tmp_path / "bank")]) == 1
    assert "DATASET is missing, and no recipe.yaml lies beside the model" in capsys.readouterr().err
