"""Memory of loading a model for training."""

from __future__ import annotations

from pathlib import Path

from measure import Line, Row, in_process, peak_bytes

from . import models

TITLE = "Loading for training"
ABOUT = (
    "The model of an earlier stage (preset `small`, backbones in bfloat16, the rest in float32) loaded as the "
    "next stage loads it, in a new process: how far the resident set rises, at its peak, over the size of the "
    "weights' file. Then all weights are read once, because a file that is mapped into memory counts only with "
    "the pages that were read."
)
NOTES: tuple[str, ...] = ()


def measure(rounds: int, folder: Path) -> Row:
    stage = folder / "stage"
    if not (stage / "model.safetensors").is_file():
        in_process(save_stage, str(stage), *models.backbones(folder))
    size = (stage / "model.safetensors").stat().st_size
    # Once: the memory of repeated runs is the same to a thousandth.
    return Row([Line("small", "peak rise / file", [in_process(rise, str(stage)) / size], "≤ 1.3")], list(NOTES))


def save_stage(stage: str, vision: str, text: str) -> None:
    model, processor = models.small_model(vision, text)
    model.merge_lora()
    model.save_pretrained(stage)
    processor.save_pretrained(stage)


def rise(stage: str) -> int:
    """How many bytes the resident set rises at its peak."""
    from otdrg.training.model import load_model
    from otdrg.training.recipe import ModelRecipe

    recipe = ModelRecipe(preset="small", dtype="bfloat16")

    def load() -> None:
        model, _ = load_model(stage, recipe)
        for weight in model.parameters():
            weight.sum()  # reads the pages of a file that is mapped into memory

    before, peak = peak_bytes(load)
    return peak - before
