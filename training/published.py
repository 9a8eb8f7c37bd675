"""Trained models as commands are given them: the folder of a run, the folder of a model, or a Hub id."""

from __future__ import annotations

from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from ..modeling_otdrg import OTDRGForReportGeneration
from ..pipeline_otdrg import ReportGenerationPipeline
from ..processing_otdrg import OTDRGProcessor
from .recipe import Recipe, load_recipe

#: Beams and most tokens of a report where neither the command nor the model says.
_BEAMS, _NEW_TOKENS = 3, 120


def load_published(model: str) -> tuple[OTDRGForReportGeneration, OTDRGProcessor]:
    """A trained model, in evaluation mode, and its processor.

    Args:
        model: folder of a run or a model, or a Hub id.

    Raises:
        ValueError: it is a folder without a model.
    """
    disable_progress_bar()
    path: str | Path = model
    if Path(model).is_dir():
        folders = (Path(model) / "model", Path(model))
        path = next((folder for folder in folders if (folder / "config.json").is_file()), None)
        if path is None:
            raise ValueError(
                f"{model}: no config.json here or in its folder 'model', expected a trained run or a model"
            )
    return OTDRGForReportGeneration.from_pretrained(path).eval(), OTDRGProcessor.from_pretrained(path)


def load_pipeline(model: str) -> ReportGenerationPipeline:
    """The `image-to-text` pipeline of a trained model; argument and errors as of [`load_published`]."""
    network, processor = load_published(model)
    return ReportGenerationPipeline(model=network, processor=processor, task="image-to-text")


def decoding(
    model: OTDRGForReportGeneration, num_beams: int | None = None, max_new_tokens: int | None = None
) -> dict[str, int]:
    """Arguments of `generate`, as a command was given them, or else as the model's generation configuration says."""
    asked = model.generation_config
    return {
        "num_beams": num_beams or asked.num_beams or _BEAMS,
        "max_new_tokens": max_new_tokens or asked.max_new_tokens or _NEW_TOKENS,
    }


def published_recipe(model: str) -> Recipe | None:
    """The recipe by which a model was trained, as it lies in its run's folder; None where there is none.

    Args:
        model: as in [`load_published`]; of a run's folder `model`, the run's recipe.
    """
    folder = Path(model).absolute()
    run = folder.parent if folder.name == "model" else folder
    return load_recipe(run / "recipe.yaml") if (run / "recipe.yaml").is_file() else None


__all__ = ["decoding", "load_pipeline", "load_published", "published_recipe"]
