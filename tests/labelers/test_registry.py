"""The registry of labelers: one module and one line make a labeler available everywhere."""

import csv
import sys

import pytest
import yaml
from otdrg.cli import main
from otdrg.labelers import LABELERS, read_states
from otdrg.studies import load_studies, prepare_studies
from otdrg.training.data import build_studies
from otdrg.training.recipe import load_recipe

TOY = """
import numpy as np


class ToyLabeler:
    name = "toy"

    def __init__(self, state: int = 1):
        self.state = state

    def label(self, reports):
        return np.full((len(reports), 14), self.state)
"""
PHANTOMS = {"train": 2, "validation": 1, "test": 0, "image_size": 32}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A labeler whose module exists and whose line is in the registry."""
    (tmp_path / "toy_labeler.py").write_text(TOY, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(LABELERS, "toy", ("toy_labeler", "ToyLabeler"))
    yield
    sys.modules.pop("toy_labeler", None)


def test_label_registered_labeler_labels_a_table(toy, tmp_path):
    reports, states = tmp_path / "reports.csv", tmp_path / "states.csv"
    with reports.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "report"), ("a", "Clear."), ("b", "Edema.")])
    assert main(["label", "--reports", str(reports), "--labeler", "toy", "--output", str(states)]) == 0
    assert {study: set(row) for study, row in read_states(states).items()} == {"a": {1}, "b": {1}}


def test_label_registered_labeler_labels_a_dataset_with_its_options(toy, tmp_path):
    folder = tmp_path / "built"
    prepare_studies("phantom", folder, **PHANTOMS)
    assert main(["label", str(folder), "--labeler", "toy", "--option", "state=2", "--relabel"]) == 0
    assert load_studies("prepared", folder=folder)["train"]["finding_states"] == [[2] * 14] * 2


def test_recipe_registered_labeler_labels_the_studies(toy, tmp_path):
    recipe = {
        "output_dir": str(tmp_path / "run"),
        "studies": {"source": "phantom", "options": PHANTOMS},
        "labels": {"labeler": "toy", "options": {"state": 3}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    loaded = load_recipe(path)
    assert build_studies(loaded.studies, loaded.labels)["train"]["finding_states"] == [[3] * 14] * 2
