"""A run's folder with the tiny model, and views on disk."""

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def run_folder(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def paths(views, tmp_path):
    """Three views, the name of one with spaces in it."""
    names = [str(tmp_path / name) for name in ("0.png", "a view.png", "2.png")]
    for name, view in zip(names, views, strict=False):
        Image.fromarray(view).save(name)
    return names
