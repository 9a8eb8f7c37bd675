"""The registry of sources: one module and one line make a source available everywhere."""

import subprocess
import sys

import pytest
from otdrg.cli import main
from otdrg.studies import SOURCES, load_studies
from otdrg.studies.card import collection_name
from otdrg.studies.schema import STUDY_FEATURES

TOY = '''
from dataclasses import dataclass

from otdrg.studies.source import Study, StudyEntry, StudySource, option
from PIL import Image


@dataclass
class ToySource(StudySource):
    """Gray squares."""

    name = "toy"

    count: int = option("Number of squares.", metavar="N")
    report: str = option("Report of each.", "Gray.")

    def entries(self):
        for index in range(self.count):
            yield StudyEntry(f"toy-{index}", f"toy-{index}", "train", index)

    def read(self, entry):
        gradient = Image.linear_gradient("L").resize((32, 32)).rotate(entry.location)
        return Study([gradient], ["frontal"], findings=self.report)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A source whose module exists and whose line is in the registry."""
    (tmp_path / "toy_source.py").write_text(TOY, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(SOURCES, "toy", ("toy_source", "ToySource", "gray squares"))
    yield
    sys.modules.pop("toy_source", None)


def test_prepare_registered_source_is_built_and_loaded(toy, tmp_path, capsys):
    output = tmp_path / "built"
    assert main(["prepare", "toy", "--count", "3", "--num-proc", "2", "--output", str(output)]) == 0
    assert "| total | 3 | 3 | 3 |" in capsys.readouterr().out
    assert "built by `otdrg prepare toy`" in (output / "README.md").read_text(encoding="utf-8")
    built, loaded = load_studies("prepared", folder=output)["train"], load_studies("toy", count=3)["train"]
    for name in ("id", "report", "source"):
        assert list(built[name]) == list(loaded[name])
    assert set(loaded["source"]) == {"toy"} and set(loaded["report"]) == {"Gray."}
    assert collection_name("toy", "") == "studies of source toy"


def test_prepare_registered_source_is_in_the_help(toy, capsys):
    for arguments, words in (
        ([], ("toy gray squares", "csv a table")),
        (
            ["toy"],
            ("--count N Number of squares.", "Report of each. (default: Gray.)", "toy --count N --output studies"),
        ),
    ):
        with pytest.raises(SystemExit) as exit:
            main(["prepare", *arguments, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert exit.value.code == 0 and all(word in shown for word in words), shown


def test_load_studies_unknown_source_names_the_known_ones():
    with pytest.raises(
        ValueError,
        match="unknown source of studies 'iu': expected one of chexpert-plus, csv, dicom, hub, mimic-cxr, open-i, "
        "phantom, r2gen, rexgradient",
    ):
        load_studies("iu")


def test_load_studies_unknown_option_names_the_allowed_ones():
    with pytest.raises(
        ValueError, match="unknown option 'folder' of source 'r2gen': expected one of annotation, images"
    ):
        load_studies("r2gen", folder="x")


def test_load_studies_missing_option_is_named():
    with pytest.raises(ValueError, match="source 'r2gen' needs the option 'images'"):
        load_studies("r2gen", annotation="annotation.json")


def test_load_studies_features_are_the_schema():
    studies = load_studies("phantom", train=1, validation=0, test=0, image_size=32)
    assert studies["train"].features == STUDY_FEATURES


def test_import_of_studies_does_not_import_datasets():
    code = "import sys, otdrg.studies; print([m for m in ('datasets', 'torch') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


@pytest.mark.parametrize("options", [{}, {"folder": "x", "limit": 3}, {"path": "x"}])
def test_load_studies_prepared_has_one_option(options):
    with pytest.raises(ValueError, match="source 'prepared' has one option, 'folder'"):
        load_studies("prepared", **options)
