"""A model as it is named on a command line: a run's folder, a model's folder or a Hub id."""

from __future__ import annotations

from pathlib import Path


def load_pipeline(model: str):
    """The `image-to-text` pipeline of a run's folder, a model's folder or a Hub id.

    Raises:
        ValueError: it is a folder without a model.
    """
    from transformers.utils.logging import disable_progress_bar

    from . import OTDRGForReportGeneration, OTDRGProcessor, ReportGenerationPipeline

    disable_progress_bar()
    path = Path(model)
    if path.is_dir():
        path = next((folder for folder in (path / "model", path) if (folder / "config.json").is_file()), None)
        if path is None:
            raise ValueError(
                f"{model}: no config.json here or in its folder 'model', expected a trained run or a model"
            )
    network = OTDRGForReportGeneration.from_pretrained(path).eval()
    processor = OTDRGProcessor.from_pretrained(path)
    return ReportGenerationPipeline(model=network, processor=processor, task="image-to-text")


__all__ = ["load_pipeline"]
