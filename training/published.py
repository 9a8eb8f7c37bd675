"""Trained models as commands are given them: the folder of a run, the folder of a model, or a Hub id."""

from __future__ import annotations

from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from ..modeling_otdrg import OTDRGForReportGeneration
from ..pipeline_otdrg import ReportGenerationPipeline
from ..processing_otdrg import OTDRGProcessor
from ..weights_otdrg import read_stated
from .model_files import check_fit, read_model, read_processor
from .recipe import Recipe, load_recipe

#: Beams and most tokens of a report where neither the command nor the model says.
_BEAMS, _NEW_TOKENS = 3, 120


def load_published(model: str) -> tuple[OTDRGForReportGeneration, OTDRGProcessor]:
    """A trained model, in evaluation mode, and its processor.

    Args:
        model: folder of a run or a model, a Hub id, or a Hub id and a revision, "org/name@revision".

    Raises:
        ValueError: it is a folder without a model, or one of its files is damaged; the message names the file.
        OSError: it cannot be loaded, with what the Hub answered.
    """
    disable_progress_bar()
    if Path(model).is_dir():
        name, hub = published_folder(model), {}
    else:
        repo, _, revision = model.partition("@")
        name, hub = repo, {"revision": revision} if revision else {}
    try:
        commit = read_stated(name, **hub)[1]
        if commit is not None:
            hub = {"revision": commit}
        # Before the weights, which may be large.
        processor = read_processor(name, **hub)
        network = read_model(name, **hub)
    except OSError as error:
        status = _http_status(error)
        # transformers says "couldn't connect" where the Hub did answer.
        whose = "" if Path(model).is_dir() else f"{model}: "
        raise OSError(f"{whose}{error}{f' (the Hub answered {status})' if status else ''}") from error
    check_fit(name, network, processor, **hub)
    return network.eval(), processor


def published_folder(model: str | Path) -> Path:
    """The folder with the model of a run's folder, or of one that is a model itself.

    Raises:
        ValueError: there is none.
    """
    for folder in (Path(model) / "model", Path(model)):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"{model}: no config.json here or in its folder 'model', expected a trained run or a model")


def _http_status(error: BaseException | None) -> int | None:
    """Of the answer that an error, or one behind it, came from."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__ or error.__context__
    return None


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
        model: as in [`load_published`]; of a run's folder `model` or `adapter`, the run's recipe.
    """
    folder = Path(model).absolute()
    run = folder.parent if folder.name in ("model", "adapter") else folder
    return load_recipe(run / "recipe.yaml") if (run / "recipe.yaml").is_file() else None


__all__ = ["decoding", "load_pipeline", "load_published", "published_folder", "published_recipe"]
