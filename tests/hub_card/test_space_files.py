"""The files of a Space, run without the rest of the package."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import otdrg
import pytest
import yaml
from otdrg.hub_card.space_files import space_files

ROOT = Path(otdrg.__file__).parent
RUN = """
import gc, json, sys
gc.disable()
import app
from otdrg.hub_card.space.writing import stream_report
from PIL import Image

*_, record = stream_report(app.pipe, [Image.linear_gradient("L")], max_new_tokens=4)
ours = {name: module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] in ("app", "otdrg")}
kinds = [one["type"] for one in app.demo.config["components"]]
print(json.dumps({"ours": ours, "kinds": kinds, "model": app.MODEL, "record": sorted(record)}))
"""


def content(file):
    return file if isinstance(file, bytes) else file.read_bytes()


def header(files):
    _, header, _ = content(files["README.md"]).decode().split("---\n", 2)
    return yaml.safe_load(header)


def requirements(lines):
    """Name and lower bound, of those that have one."""
    return dict(re.findall(r"^([\w-]+)>=([\d.]+)$", "\n".join(lines), re.MULTILINE))


def test_space_header_is_valid():
    stated = header(space_files("someone/model"))
    assert stated["models"] == ["someone/model"]
    assert stated["sdk"] == "gradio" and stated["app_file"] == "app.py" and stated["license"] == "apache-2.0"
    assert stated["disable_embedding"] is True
    assert len(stated["short_description"]) <= 60  # the Hub refuses longer ones
    huggingface_hub = pytest.importorskip("huggingface_hub")
    card = huggingface_hub.SpaceCard(content(space_files("someone/model")["README.md"]).decode())
    assert card.data.sdk_version == stated["sdk_version"]
    assert "Not for clinical use" in card.text


def test_space_files_hold_the_model_id():
    files = space_files("someone/model")
    for name in ("app.py", "README.md"):
        assert b"someone/model" in content(files[name]) and b"org/otdrg" not in content(files[name])
    for wrong in ("model", "a/b/c", 'a/b"', ""):
        with pytest.raises(ValueError, match="expected an id on the Hub"):
            space_files(wrong)


def test_space_requirements_match_the_package():
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("the package is installed without its pyproject.toml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    package = requirements([*project["dependencies"], *extras["demo"], *extras["dicom"]])
    files = space_files("someone/model")
    needed = requirements(content(files["requirements.txt"]).decode().splitlines())
    assert needed == {name: package[name] for name in needed}
    assert header(files)["sdk_version"].startswith(package["gradio"])


def test_space_files_exclude_tests_documents_and_scripts():
    files = space_files("someone/model")
    names = {name.removeprefix("otdrg/").partition("/")[0] for name in files}
    assert not names & {"tests", "docs", "benchmarks", "recipes", "train_hf.py", "quickstart.py", "pyproject.toml"}
    assert sum(len(content(file)) for file in files.values()) < 5e6
    assert not [name for name in files if "__pycache__" in name]


def test_space_runs_on_its_own_files(model, processor, tmp_path):
    pytest.importorskip("gradio")
    space, weights = tmp_path / "space", tmp_path / "model"
    model.save_pretrained(weights)
    processor.save_pretrained(weights)
    files = space_files("someone/model")
    for name, file in files.items():
        path = space / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(file))
    elsewhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**elsewhere, "OTDRG_MODEL": str(weights), "GRADIO_TEMP_DIR": str(tmp_path / "uploads")}
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=space, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(Path(file).is_relative_to(space) for file in found["ours"].values())
    assert found["model"] == str(weights)
    assert found["record"] == ["complete", "contradictions", "findings", "generated_text", "heatmaps"]
    assert {"file", "textbox", "dropdown", "html"} <= set(found["kinds"])
    named = requirements(content(files["requirements.txt"]).decode().splitlines())
    modules = {"pillow": "PIL", "pyyaml": "yaml", "python-gdcm": "gdcm"}
    provided = {modules.get(name, name) for name in named} | set(sys.stdlib_module_names)
    provided |= {"app", "otdrg", "gradio", "huggingface_hub", "filelock", "safetensors", "tqdm"}  # with transformers
    assert imported(found["ours"].values()) <= provided


def imported(files):
    """Libraries that these files import when they are run; what only type checkers read is left out."""
    libraries = set()
    for file in files:
        nodes = ast.parse(Path(file).read_text(encoding="utf-8")).body
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.Import):
                libraries |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                libraries.add(node.module.partition(".")[0])
            elif isinstance(node, ast.If) and getattr(node.test, "id", "") != "TYPE_CHECKING":
                nodes += node.body + node.orelse
            elif isinstance(node, ast.Try):
                nodes += node.body
    return libraries
