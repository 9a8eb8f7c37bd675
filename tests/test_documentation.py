"""The README, `docs/` and `examples/`: each command and program in them runs here, or is marked with what it needs.

A fenced block of `sh` or `python` runs, in the order of its page, in a folder that holds tiny files and models under
the names that the pages use. A block after the comment `<!-- needs: WHAT -->` does not run; its commands are parsed,
its recipe is loaded with its overrides, and the names that it imports must exist. `<!-- slow -->` leaves a block to the
slow tests. An example runs with the command in its docstring.
"""

import argparse
import ast
import contextlib
import csv
import inspect
import io
import json
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import otdrg
import pytest
from markdown_it import MarkdownIt

ROOT = Path(otdrg.__file__).parent
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem != "quickstart"]
#: Options that make an example short.
SHORT = {
    "phantom_table": "--studies 4",
    "prepare_with_datatrove": "--tasks 2 --workers 1",
    "train_in_python": "--studies 12 --max-steps 1",
}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SLOW_MARK, SLOW = "<!-- slow -->", "the slow tests"
NEEDS = re.compile(r"<!-- needs: (\S.*\S) -->\s*")
#: A field of a recipe, not the name of a file such as studies.jsonl.
RECIPE_FIELD = re.compile(r"(studies|labels|model|ircp|predictor|report|reward)\.(?!(jsonl|txt)\b)\w")
OTHER_LANGUAGES = {"bibtex", "csv", "json", "text", "yaml"}
#: Programs that are not ours; the tests do not know their arguments.
OTHER_PROGRAMS = {"docker", "git", "hf", "pip", "pre-commit", "sbatch", "source", "ssh"}


class Block(NamedTuple):
    line: int
    language: str
    code: str
    needs: str | None


def read_blocks(page):
    """The fenced blocks of a page."""
    blocks, needs = [], None
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence":
            blocks.append(Block(token.map[0] + 1, token.info.strip(), token.content, needs))
        mark = NEEDS.fullmatch(token.content) if token.type == "html_block" else None
        needs = mark[1] if mark else SLOW if token.content.strip() == SLOW_MARK else None
    return blocks


def read_commands(code):
    """The lines of a shell block, continued lines joined, without comments."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


# --- running ---------------------------------------------------------------------------------------------------------


class ParsedError(Exception):
    """Raised in place of what a program does once its arguments are parsed."""


def main_of(words):
    """The `main` that a command calls, and its arguments."""
    from otdrg import cli, train_hf

    if words[0] == "otdrg":
        return cli.main, words[1:]
    if words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        launch = launch_command_parser().parse_args(words[2:])
        assert launch.config_file is None or (ROOT / launch.config_file).is_file(), launch.config_file
        if launch.module:
            assert launch.training_script == "otdrg"
            return cli.main, launch.training_script_args
        assert launch.training_script == "train_hf.py"
        return train_hf.main, launch.training_script_args
    assert words[0] == "python", f"the tests do not know how to run {words[0]}"

    def run_script(arguments):
        sys.argv = words[1:]
        runpy.run_path(words[1], run_name="__main__")

    return run_script, words[2:]


def run_command(line, monkeypatch):
    """Run a line of the shell in this process, because most of a command's time is that of importing torch."""
    before, pipe, last = line.rpartition(" | ")
    words = shlex.split(last, comments=True)
    if words[0] == "export":
        set_variable(words[1], monkeypatch)
        return
    if pipe:
        given = subprocess.run(before, shell=True, stdout=subprocess.PIPE, check=True).stdout
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
    if words[:2] == ["otdrg", "prepare"] and "--output" in words:
        # It refuses to write over the folder that other pages read.
        shutil.rmtree(words[words.index("--output") + 1], ignore_errors=True)
    if words[:2] in (["otdrg", "evaluate"], ["otdrg", "score"]):
        words += ["--bootstrap", "50"]
    if words[:2] == ["otdrg", "localise"]:
        words += ["--studies", "20"]  # the last one counts
    run, arguments = main_of(words)
    monkeypatch.setattr("sys.argv", words)
    try:
        status = run(arguments)
    except SystemExit as stop:
        status = stop.code
    assert not status, f"{line}: exit status {status}"


def set_variable(assignment, monkeypatch):
    name, _, value = assignment.partition("=")
    monkeypatch.setenv(name, os.path.expanduser(value))


# --- checking what does not run --------------------------------------------------------------------------------------


def check_command(line, monkeypatch):
    """Parse the arguments of a command that does not run."""
    words = shlex.split(line.rpartition(" | ")[2], comments=True)
    if words[0] == "export":
        set_variable(words[1], monkeypatch)
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(f"^{target}:", makefile, re.M) for target in words[1:]), line
    elif words[:2] == ["pip", "install"]:
        check_extras(words[2:])
    elif words[0] not in OTHER_PROGRAMS:
        check_arguments(words, monkeypatch)


def check_extras(arguments):
    """The extras of `pip install "otdrg[a,b]"` are those of pyproject.toml."""
    known = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M))
    for extras in re.findall(r"(?:otdrg|\.)\[([\w,]+)\]", " ".join(arguments)):
        assert set(extras.split(",")) <= known, extras


def check_arguments(words, monkeypatch):
    run, arguments = main_of(words)

    def parsed(*_, **__):
        raise ParsedError

    def parse(parser, *given, **named):
        original(parser, *given, **named)
        raise ParsedError

    with monkeypatch.context() as patch:
        if words[0] == "accelerate" and "-m" not in words:  # its recipe is read as well
            for variable in ("OTDRG_IU_XRAY", "OTDRG_MIMIC_CXR"):
                patch.setenv(variable, os.environ.get(variable, "collection"))
            patch.setattr("otdrg.training.run.run_recipe", parsed)
            patch.setattr("otdrg.runtime.interruptions.end_with_parent", lambda: None)
            patch.setattr("otdrg.runtime.interruptions.exit_status", lambda name, work, **_: work())
        else:
            original = argparse.ArgumentParser.parse_args
            patch.setattr("argparse.ArgumentParser.parse_args", parse)
        patch.setattr("sys.argv", words)
        with pytest.raises(ParsedError):
            run(arguments)


def check_imports(code):
    """What a program imports from `otdrg` exists."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "otdrg":
            module = import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


# --- the files that the pages name -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def files(trained_run, build_backbones, tmp_path_factory):
    """A folder with tiny files and models under the names that the pages use."""
    from otdrg import cli
    from otdrg.studies import load_studies, prepare_studies
    from otdrg.studies.phantom import make_phantom

    folder = tmp_path_factory.mktemp("files")
    for name in ("recipes", "train_hf.py", "examples", "benchmarks", "docs", "checkpoints"):
        (folder / name).symlink_to(ROOT / name)
    phantoms = [make_phantom(0, index, 112, ("frontal", "lateral")) for index in range(12)]
    for name, image in zip(("frontal", "lateral", "other"), [*phantoms[0].images, phantoms[1].images[0]], strict=True):
        image.save(folder / f"{name}.png")
    write_dicom(folder / "other.dcm", phantoms[1].images[0])

    (folder / "images").mkdir()
    rows = []
    for phantom in phantoms:
        name = f"{phantom.id}.png"
        phantom.images[0].save(folder / "images" / name)
        rows.append({"id": phantom.id, "image": name, "report": phantom.report})
        write_dicom(folder / "archive" / phantom.id / "view.dcm", phantom.images[0])
        (folder / "archive" / phantom.id / "report.txt").write_text(f"FINDINGS: {phantom.report}\n")
        (folder / "images" / name).with_suffix(".txt").write_text(phantom.report)
    write_table(folder / "reports.csv", rows)
    write_table(folder / "theirs.csv", rows)
    for name in ("ours", "test"):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    entries = [{"id": row["id"], "report": row["report"], "image_path": [row["image"]]} for row in rows]
    rexrank = {row["id"]: {"image_path": [row["image"]], "report": row["report"]} for row in rows[:2]}
    (folder / "in.json").write_text(json.dumps(rexrank))
    annotation = {"train": entries[:8], "val": entries[8:10], "test": entries[10:]}
    (folder / "annotation.json").write_text(json.dumps(annotation))

    options = {"train": 16, "validation": 5, "test": 5, "image_size": 112, "views": ["frontal"]}
    prepare_studies("phantom", folder / "studies", **options)
    studies = load_studies("prepared", folder=folder / "studies")
    label = ["label", "--reports", str(folder / "reports.csv"), "--output", str(folder / "chexpert.csv")]
    assert cli.main(label) == 0
    studies.rename_column("findings", "text").remove_columns(["report"]).save_to_disk(folder / "org" / "name")

    predictions = [{**row, "reference": row["report"]} for row in rows]
    for run in ("quickstart", "iu_xray_small"):
        shutil.copytree(trained_run, folder / "runs" / run, ignore=shutil.ignore_patterns("checkpoint-*"))
        write_table(folder / "runs" / run / "predictions.csv", predictions)
    # `otdrg embed` needs several studies of a finding.
    recipe = folder / "runs" / "quickstart" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("validation: 5\n", "validation: 80\n"))
    shutil.copytree(trained_run / "model", folder / "org" / "otdrg")
    backbones = build_backbones(tmp_path_factory.mktemp("backbones"))
    shutil.copytree(backbones["vision"], folder / "facebook" / "dinov2-small")
    shutil.copytree(backbones["text"], folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    return folder


def write_table(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def write_dicom(path, image):
    import numpy as np
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

    pixels = np.asarray(image.convert("L"))
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = ComputedRadiographyImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.StudyInstanceUID, data.Modality, data.ViewPosition = generate_uid(), "DX", "PA"
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = *pixels.shape, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


@pytest.fixture
def workspace(files, tmp_path, monkeypatch):
    """A copy of `files` that is the working directory."""
    folder = tmp_path / "workspace"
    shutil.copytree(files, folder, symlinks=True)
    monkeypatch.chdir(folder)
    # Without Java, which takes seconds for each METEOR score.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ls").symlink_to(shutil.which("ls"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # Training takes a thread for each core, and the other cores are those of other test processes.
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    return folder


# --- the tests -------------------------------------------------------------------------------------------------------


def run_page(page, monkeypatch, slow):
    """Run the blocks of a page in order; without `slow`, those marked slow are checked only."""
    namespace = {}
    for block in read_blocks(page):
        runs = block.needs is None or (slow and block.needs == SLOW)
        where = f"{page.name}:{block.line}"
        if block.language == "sh":
            for line in read_commands(block.code):
                print(f"{where}: {line}")  # shown when the test fails
                (run_command if runs else check_command)(line, monkeypatch)
        elif block.language == "python":
            print(where)
            check_imports(block.code)
            if runs:
                exec(compile(block.code, where, "exec"), namespace)
        else:
            assert block.language in OTHER_LANGUAGES, f"{where}: language {block.language!r}, expected sh or python"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_documentation_blocks_run_or_are_marked(page, workspace, monkeypatch):
    run_page(page, monkeypatch, slow=False)


@pytest.fixture
def registries():
    """Removes what an example registers."""
    from otdrg.metrics import METRICS
    from otdrg.studies import SOURCES

    before = [(registry, dict(registry)) for registry in (METRICS, SOURCES)]
    yield
    for registry, content in before:
        registry.clear()
        registry.update(content)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_as_its_docstring_says(example, workspace, registries, monkeypatch):
    if example.stem == "prepare_with_datatrove":
        pytest.importorskip("datatrove", reason="datatrove is not installed (the extra `distributed`)")
    docstring = ast.get_docstring(ast.parse(example.read_text(encoding="utf-8")))
    (command,) = re.findall(rf"^python examples/{example.name}.*", docstring, re.M)
    run_command(f"{command} {SHORT.get(example.stem, '')}", monkeypatch)


def test_quickstart_shows_reports_and_a_heatmap(workspace, capsys):
    quickstart = runpy.run_path("examples/quickstart.py")
    quickstart["show_studies"](Path("runs/quickstart"), {"image_size": 112}, 2)
    shown = capsys.readouterr().out
    assert shown.count("generated: ") == 2
    assert Path("runs/quickstart/heatmap.png").is_file()


SLOW_PAGES = [page for page in PAGES if any(block.needs == SLOW for block in read_blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW_PAGES, ids=lambda page: page.stem)
def test_documentation_slow_blocks_run(page, workspace, monkeypatch, build_backbones, tmp_path):
    backbones = build_backbones(tmp_path)
    monkeypatch.setenv("OTDRG_DINOV2", backbones["vision"])
    monkeypatch.setenv("OTDRG_LLM", backbones["text"])
    run_page(page, monkeypatch, slow=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_documentation_links_lead_to_files(page):
    for token in inline_tokens(page):
        target = token.attrs.get("href") or token.attrs.get("src")
        if target and "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.fixture(scope="module")
def known_options():
    """The options of every command of ours and of `accelerate launch`."""
    from accelerate.commands.launch import launch_command_parser
    from otdrg import cli, train_hf
    from otdrg.studies import SOURCES

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        helps = [[command] for command in cli._COMMANDS] + [["prepare", source] for source in SOURCES]
        for run, words in [(train_hf.main, []), *((cli.main, words) for words in helps)]:
            with pytest.raises(SystemExit):
                run([*words, "--help"])
    return {*re.findall(r"--[\w-]+", shown.getvalue()), *launch_command_parser()._option_string_actions}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_documentation_words_in_code_exist(page, known_options):
    """Commands, options, files, recipe fields and fields of the configuration that the text names."""
    from otdrg import cli
    from otdrg.training.recipe import load_recipe

    recipe = load_recipe(ROOT / "recipes" / "phantom_tiny.yaml")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs"}
    for token in inline_tokens(page):
        if token.type != "code_inline" or token.content.startswith("<!--"):
            continue
        words = token.content.split()
        if words[0] == "otdrg" and len(words) > 1:
            assert words[1] in cli._COMMANDS or words[1].isupper(), token.content
        elif words[0] == "python" and len(words) > 1:
            assert (ROOT / words[1]).is_file(), token.content
        elif words[0] == "make":
            assert re.search(f"^{words[1]}:", makefile, re.M), token.content
        elif words[0].startswith("otdrg."):
            pkgutil.resolve_name(words[0].partition("(")[0])
        elif words[0].partition("/")[0] in folders and "/" in words[0]:
            assert list(ROOT.glob(words[0].rstrip("/"))), token.content
        elif RECIPE_FIELD.match(words[0]) and "(" not in words[0]:
            check_recipe_field(recipe, re.split("[=:]", words[0])[0])
        if words[0] != "pip":
            unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - known_options
            assert not unknown, token.content


def check_recipe_field(recipe, path):
    from otdrg import OTDRGConfig
    from otdrg.studies import SOURCES, source_class

    options = {
        "model.overrides": set(inspect.signature(OTDRGConfig).parameters),
        "studies.options": {item.name for source in SOURCES for item in fields(source_class(source))},
    }
    value = recipe
    for name in path.removesuffix(".NAME").split("."):
        if isinstance(value, dict):
            assert name in options.get(".".join(path.split(".")[:2]), value), path
            return
        value = getattr(value, name)


def inline_tokens(page):
    """Links, images and code spans of a page's text."""
    tokens = MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))
    return [child for token in tokens for child in token.children or []]
