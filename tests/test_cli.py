"""`otdrg generate` as it is typed, on a model folder, a run and what is neither."""

import json

import pytest
from otdrg.cli import main
from PIL import Image


@pytest.fixture(scope="module")
def run_folder(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def studies(views, tmp_path):
    for number, view in enumerate(views[:3]):
        Image.fromarray(view).save(tmp_path / f"{number}.png")
    return [str(tmp_path / f"{number}.png") for number in range(3)]


FEW = ["--num-beams", "1", "--max-new-tokens", "6"]


def test_text_names_study_report_and_all_findings(run_folder, studies, capsys):
    assert main(["generate", str(run_folder), "--study", studies[0], studies[1], *FEW]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{studies[0]} + {studies[1]}\n")
    for name in ("Enlarged Cardiomediastinum", "Pleural Effusion", "No Finding"):
        assert name in shown


def test_json_has_one_object_a_study_and_the_states_asked_for(run_folder, studies, tmp_path, capsys):
    heatmaps = tmp_path / "heatmaps"
    arguments = ["generate", str(run_folder / "model"), "--study", studies[0], "--study", studies[1], studies[2]]
    arguments += ["--findings", "Edema=positive", "fracture=uncertain", "--json", "--heatmap", str(heatmaps), *FEW]
    assert main(arguments) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["study"] for record in records] == [studies[:1], studies[1:]]
    for record in records:
        assert record["findings"]["edema"]["state"] == "positive"
        assert record["findings"]["fracture"]["state"] == "unclear"
        with Image.open(record["heatmap"]) as picture:
            assert picture.format == "PNG"
    assert len(list(heatmaps.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--findings", "edema"], "--findings edema: expected FINDING=STATE"),
        (["--findings", "oedema=positive"], "unknown finding 'oedema'"),
        (["--findings", "edema=maybe"], "unknown finding state 'maybe'"),
    ],
)
def test_wrong_findings_are_one_line(run_folder, studies, capsys, arguments, message):
    assert main(["generate", str(run_folder), "--study", studies[0], *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_is_not_a_model_or_an_image_is_one_line(run_folder, studies, tmp_path, capsys):
    assert main(["generate", str(tmp_path), "--study", studies[0]]) == 1
    assert f"{tmp_path}: no config.json" in capsys.readouterr().err
    note = tmp_path / "note.png"
    note.write_text("not an image")
    assert main(["generate", str(run_folder), "--study", str(note)]) == 1
    error = capsys.readouterr().err
    assert f"{note}: not an image" in error and error.count("\n") == 1


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    assert "generate" in capsys.readouterr().out
