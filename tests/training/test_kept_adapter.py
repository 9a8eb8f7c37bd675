"""The adapter that the report stage leaves beside the whole model."""

import logging
import re

import pytest
import torch
from otdrg import OTDRGForReportGeneration
from otdrg.training.recipe import load_recipe
from otdrg.training.report import save_adapter


@pytest.fixture
def trained(tmp_path, build_backbones, build_on_backbones, monkeypatch):
    """A model, its processor and a function that makes the recipe of it, whose backbones are named from here."""
    monkeypatch.chdir(tmp_path)
    backbones = build_backbones(tmp_path / "backbones")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: run\nstudies: {source: phantom}\nmodel: {preset: small}\n")

    def recipe_with(text, *more):
        paths = ["model.vision=backbones/vision", f"model.text={text}"]
        return load_recipe(recipe, [*paths, *more])

    return *build_on_backbones(backbones, vision_backbone=None, text_backbone=None), recipe_with


def test_save_adapter_relative_backbones_load_from_any_folder(trained, views, tmp_path, monkeypatch):
    model, processor, recipe_with = trained
    save_adapter(model, processor, recipe_with("backbones/text", "report.text=lora"), tmp_path / "run" / "adapter")
    assert model.config.vision_backbone is None and model.config.text_backbone is None
    monkeypatch.chdir("/")
    again = OTDRGForReportGeneration.from_pretrained(tmp_path / "run" / "adapter")
    inputs = processor(images=[views[:2]])
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("text", "mode", "warning"),
    [("backbones/text", "full", None), ("backbones/gone", "lora", "no adapter is kept: text backbone .*gone")],
    ids=["a whole LLM", "a backbone that is gone"],
)
def test_save_adapter_of_an_earlier_run_is_deleted(trained, tmp_path, caplog, text, mode, warning):
    model, processor, recipe_with = trained
    folder = tmp_path / "run" / "adapter"
    save_adapter(model, processor, recipe_with("backbones/text", "report.text=lora"), folder)
    assert (folder / "model.safetensors").is_file()
    with caplog.at_level(logging.WARNING):
        save_adapter(model, processor, recipe_with(text, f"report.text={mode}"), folder)
    assert not folder.exists()
    if warning:
        assert re.search(warning, caplog.text)
