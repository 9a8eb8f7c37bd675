"""What a wheel contains, and that the settings outside the code agree with pyproject.toml."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import otdrg
import pytest
import yaml

ROOT = Path(otdrg.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
#: Folders that a wheel leaves out; of the root it takes modules, py.typed and the licence.
NOT_INSTALLED = {".ci", ".github", "benchmarks", "checkpoints", "docs", "examples", "recipes", "tests"}


@pytest.fixture(scope="module")
def tracked():
    """Paths of the files in the repository, tracked or new."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    return [Path(name) for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_wheel_has_every_file_of_the_package(tracked, tmp_path):
    source = tmp_path / "source"
    for path in tracked:
        if path.parts[0] not in NOT_INSTALLED:
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, source / path)
    code = "import setuptools.build_meta as backend; print(backend.build_wheel('..'))"
    built = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    wheel = zipfile.ZipFile(tmp_path / built.stdout.split()[-1])
    installed = {name.removeprefix("otdrg/") for name in wheel.namelist() if name.startswith("otdrg/")}
    expected = {
        path.as_posix()
        for path in tracked
        if path.parts[0] not in NOT_INSTALLED
        and (len(path.parts) > 1 or path.suffix == ".py" or path.name in ("py.typed", "LICENSE"))
    }
    assert expected == installed


def lowest(requirement):
    """The lower bound of a requirement or of `requires-python`."""
    return re.search(r">=([\d.]+)", requirement)[1]


def test_workflow_matrix_has_the_lowest_versions_of_pyproject():
    jobs = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    assert matrix["python"][0] == lowest(PROJECT["project"]["requires-python"])
    assert matrix["transformers"] == ["lowest", "newest"]
    (transformers,) = [name for name in PROJECT["project"]["dependencies"] if name.startswith("transformers")]
    commands = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    assert f"transformers=={lowest(transformers)}.*" in commands
    assert {"make test", "make lint", "make docs"} <= set(commands.splitlines())


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")), ids=lambda path: path.stem)
def test_issue_template_fields_have_ids_and_labels(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    fields = [item for item in form["body"] if item["type"] != "markdown"]
    assert len({item["id"] for item in fields}) == len(fields) > 0
    assert all(item["attributes"]["label"] for item in fields)


def test_pre_commit_runs_the_linter_of_make_lint():
    hooks = [
        hook["id"]
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
        for hook in repo["hooks"]
    ]
    assert {"ruff-check", "ruff-format"} <= set(hooks)


def test_mkdocs_navigation_has_every_page():
    def pages(navigation):
        for item in navigation:
            (value,) = item.values()
            yield from [value] if isinstance(value, str) else pages(value)

    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert set(pages(navigation)) == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_dockerfile_copies_the_package_and_dockerignore_allows_it():
    if not (ROOT / "Dockerfile").is_file():
        pytest.skip("the package is installed without its Dockerfile")
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert copied and all(list(ROOT.glob(name)) for name in copied)
    rooms = {name.partition(".")[2].partition(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]} - {""}
    assert {name.rstrip("/") for name in copied if name.endswith("/")} == rooms
    assert {"*.py", "pyproject.toml", *PROJECT["tool"]["setuptools"]["package-data"]["otdrg"]} <= set(copied)
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in allowed and {f"!{name.rstrip('/')}" for name in copied} == {one for one in allowed if one[:1] == "!"}
    user, entry = (next(line for line in reversed(lines) if line.startswith(word)) for word in ("USER", "ENTRYPOINT"))
    assert user == "USER 1000" and lines.index(user) < lines.index(entry)
    extras = re.search(r'pip install "\.\[([\w,]+)\]"', "\n".join(lines))[1]
    assert set(extras.split(",")) <= PROJECT["project"]["optional-dependencies"].keys()
