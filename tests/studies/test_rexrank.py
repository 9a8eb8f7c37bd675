"""ReXrank's files: studies are read, reports are written into them, and the same file is scored."""

import json
import runpy
import sys
from pathlib import Path

import otdrg
import pytest
from otdrg.cli import main
from otdrg.inference.listing import rexrank_studies
from otdrg.studies.rexrank import rexrank_reports, study_indication

ROOT = Path(otdrg.__file__).parent
FEW = ["--num-beams", "1", "--max-new-tokens", "6"]
CONTEXTS = {
    "Indication: Cough. Comparison: None.": "Cough.",
    "<context>Age:50-60.Gender:M.Indication: ___-year-old male with fever.</context>": "___-year-old male with fever.",
    "<context>Indication: Chest pain.Comparison: ___.</context>": "Chest pain.",
    "Comparison: None": None,
    "Indication:  Comparison: None": None,
    "": None,
}


def study(images, findings="The heart is large.", impression="Cardiomegaly.", **fields):
    """A study in the shape of the data sets that ReXrank publishes."""
    return {
        "key_image_path": images[0],
        "image_path": images,
        "report": f"Findings: {findings} Impression: {impression}",
        "section_findings": findings,
        "section_impression": impression,
        "frontal_lateral": ["Frontal"] * len(images),
        "context": "Indication: Cough. Comparison: None.",
        "split": "test",
        **fields,
    }


@pytest.fixture
def source(paths, tmp_path):
    """Two studies whose images are in tmp_path, and one whose image is missing."""
    names = [path.removeprefix(str(tmp_path)) for path in paths]
    studies = {"one": study(names[:2]), "two": study([names[2].lstrip("/")], "Clear lungs.", None)}
    (tmp_path / "in.json").write_text(json.dumps({**studies, "gone": study(["/gone.png"])}))
    return tmp_path / "in.json"


@pytest.fixture
def generate(run_folder, tmp_path, capsys):
    """Runs the command; its exit status and error."""

    def generate(*arguments):
        typed = ["generate", str(run_folder), "--format", "rexrank", *map(str, arguments), *FEW]
        return main(typed), capsys.readouterr().err

    return generate


def test_rexrank_file_is_written_scored_and_read_back(generate, source, paths, run_folder, tmp_path, capsys):
    output, given = tmp_path / "out.json", json.loads(source.read_text())
    files = ["--studies", source, "--image-root", tmp_path, "--output", output]
    status, error = generate(*files)
    assert status == 1 and "left out: gone: " in error and "1 of 3 studies were left out" in error
    assert f"2 reports written: {output}" in error
    written = json.loads(output.read_text())
    assert list(written) == ["one", "two"]
    for name, fields in written.items():
        report = fields.pop("model_prediction")
        assert fields == given[name] and isinstance(report, str) and report
        views = [str(tmp_path / path.lstrip("/")) for path in fields["image_path"]]
        assert main(["generate", str(run_folder), "--json", "--study", *views, *FEW]) == 0
        assert json.loads(capsys.readouterr().out)["report"] == report

    scores = tmp_path / "scores.json"
    typed = ["score", "--format", "rexrank", "--predictions", str(output), "--bootstrap", "0"]
    fast = ["--metrics", "rouge_l", "comparisons", "--overwrite", "--output", str(scores)]
    assert main([*typed, *fast]) == 0
    assert json.loads(scores.read_text())["counts"] == {"studies": 2, "references": 2, "predictions": 2}
    findings = ["--reference-column", "section_findings", "--against", str(output)]
    assert main([*typed[:-2], "--bootstrap", "5", *findings, *fast]) == 0
    assert json.loads(scores.read_text())["comparison"]["rouge_l"]["difference"] == 0


def test_rexrank_ids_are_those_of_the_input(generate, source, paths, tmp_path):
    given = json.loads(source.read_text())
    source.write_text(json.dumps({"s1 ": given["one"], "s2": given["two"], " s1": given["one"]}))
    output = tmp_path / "out.json"
    status, error = generate("--studies", source, "--image-root", tmp_path, "--output", output)
    assert status == 0 and f"3 reports written: {output}" in error
    written = json.loads(output.read_text())
    assert list(written) == ["s1 ", "s2", " s1"] and all(study["model_prediction"] for study in written.values())


def test_rexrank_output_is_resumed_or_replaced(generate, source, tmp_path):
    output = tmp_path / "out.json"
    files = ["--studies", source, "--image-root", tmp_path, "--output", output]
    others = tmp_path / "out.jsonl"
    others.write_text("the reports of another command")
    assert generate(*files)[0] == 1
    first = output.read_text()
    status, error = generate(*files)
    assert status == 1 and "out.otdrg.jsonl exists: --resume continues it" in error
    studies = json.loads(source.read_text())
    source.write_text(json.dumps({name: studies[name] for name in ("one", "two")}))
    output.unlink()
    status, error = generate(*files, "--resume")
    assert status == 0 and f"0 reports written, 2 were there: {output}" in error and output.read_text() == first
    output.with_suffix(".otdrg.jsonl").unlink()
    status, error = generate(*files, "--resume")
    assert status == 1 and f"{output} exists, and no out.otdrg.jsonl: --overwrite replaces it" in error
    assert generate(*files, "--overwrite")[0] == 0 and output.read_text() == first
    assert others.read_text() == "the reports of another command"


@pytest.mark.parametrize(("context", "expected"), CONTEXTS.items())
def test_rexrank_indication_is_read_from_the_context(context, expected):
    assert study_indication({"context": context}) == expected
    assert study_indication({"context": None}) is None


def test_rexrank_studies_have_indications_where_the_model_reads_them(source, tmp_path):
    for asked, own, expected in ((None, False, None), (None, True, "Cough."), ("fever", True, "fever")):
        studies = rexrank_studies(str(source), tmp_path, asked, own, {})
        assert [one.indication for one in studies] == [expected] * 3
    assert [len(one.images) for one in studies] == [2, 1, 1]
    assert studies[2].images == (str(tmp_path / "gone.png"),)


def test_rexrank_reports_are_joined_as_rexrank_does_it(tmp_path):
    path, sections = tmp_path / "in.json", study(["a.png"], impression=float("nan"))
    del sections["report"]
    path.write_text(json.dumps({"one": study(["a.png"]), "two": sections}))
    assert dict(rexrank_reports(path, "report")) == {
        "one": "Findings: The heart is large. Impression: Cardiomegaly.",
        "two": "Findings: The heart is large.",
    }
    assert dict(rexrank_reports(path, "section_impression")) == {"one": "Cardiomegaly.", "two": ""}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "in.json holds a list: expected a JSON object"),
        ("{}", "in.json: no study in it"),
        ('{"one": 1}', "in.json, study 'one': int, expected a JSON object with an object for each study"),
        ('{"one": {"image_path": []}}', "in.json, study 'one': image_path is None, expected a list of paths"),
        ('{"one": {"image_path": [1]}}', "in.json, study 'one': image_path is [1], expected a list of paths"),
        ("{", "in.json is not valid JSON"),
    ],
)
def test_rexrank_damaged_file_is_one_line(generate, tmp_path, content, message):
    (tmp_path / "in.json").write_text(content)
    files = ["--studies", tmp_path / "in.json", "--image-root", tmp_path, "--output", tmp_path / "out.json"]
    status, error = generate(*files)
    assert status == 1 and message in error and error.count("\n") == 1 and not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--studies", "in.json", "--output", "out.json"],
            "--format rexrank needs --studies IN.json, --output OUT.json",
        ),
        (["--studies", "in.json", "--image-root", "."], "--output is missing"),
        (["--studies", "in.json", "--image-root", "no", "--output", "out.json"], "--image-root no: expected a folder"),
        (
            ["--studies", "in.json", "--image-root", ".", "--output", "out.otdrg.jsonl"],
            "expected the name of a .json file",
        ),
        (["--studies", "in.json", "--image-root", ".", "--output", "in.json"], "would be written over"),
    ],
)
def test_rexrank_wrong_arguments_are_one_line(generate, source, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, error = generate(*arguments)
    assert status == 1 and message in error and error.count("\n") == 1


def test_rexrank_predictions_without_a_report_are_one_line(source, tmp_path, capsys):
    typed = ["score", "--format", "rexrank", "--predictions", str(source), "--output", str(tmp_path / "scores.json")]
    assert main(typed) == 1
    assert "in.json, study 'one': model_prediction is missing, expected a text" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [False, True])
def test_rexrank_inference_script_takes_their_arguments(source, run_folder, tmp_path, monkeypatch, capsys, flags):
    names = ("--input_json_file", "--save_json_file", "--img_root_dir")
    values = (str(source), str(tmp_path / "out.json"), str(tmp_path))
    arguments = [word for pair in zip(names, values, strict=True) for word in pair] if flags else values
    monkeypatch.setattr(sys, "argv", ["inference.py", *arguments, "--model", str(run_folder)])
    monkeypatch.chdir(tmp_path)
    assert runpy.run_path(str(ROOT / "examples" / "rexrank_inference.py"))["main"]() == 1  # one study has no image
    assert set(json.loads((tmp_path / "out.json").read_text())) == {"one", "two"}
