"""The stages of training: what a stage is, and the registry.

A stage is one module with a `STAGE`, an instance of a [`Stage`], and one line in `STAGES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..modeling_otdrg import OTDRGForReportGeneration
    from ..processing_otdrg import OTDRGProcessor
    from .arguments import StageArguments
    from .data import StudySplits
    from .recipe import Recipe

#: The stages in the order in which they run, and the module of each (relative to this package, or absolute).
STAGES: dict[str, str] = {"ircp": ".ircp", "predictor": ".predictor", "report": ".report", "reward": ".reward"}

#: The stages of a recipe that names none: without `ircp`, the encoder is used as it is given.
DEFAULT_STAGES: tuple[str, ...] = ("predictor", "report")


@dataclass
class StageRun:
    """What a stage trains on.

    Attributes:
        recipe: the whole recipe.
        studies: studies by split.
        model, processor: what the stage starts from.
        folder: where the stage writes.
        resume: whether it continues from the last checkpoint in `folder`.
    """

    recipe: Recipe
    studies: StudySplits
    model: OTDRGForReportGeneration
    processor: OTDRGProcessor
    folder: Path
    resume: bool = False


class Stage(ABC):
    """A stage of training. Subclasses set `arguments` and write `train`; the other methods are optional.

    Attributes:
        arguments: the dataclass of the stage's section, whose `place` is the stage's name.
        first_reads: fields of `OTDRGConfig` that no earlier stage reads. When one of them changes in a recipe, finished
            earlier stages are still valid.
        publishes: the folder in the run's folder to which the trained model is written; the stage's own by default.
        reads_quantization: whether the LLM is quantised while the stage trains.
        trains_own_encoder: whether `vision` is about the predictor's own encoder, if it has one.
        compares_within_batch: whether the loss compares the studies of a batch, so that accumulated batches are not the
            same as one large batch.
    """

    arguments: type[StageArguments]
    first_reads: tuple[str, ...] = ()
    publishes: str | None = None
    reads_quantization: bool = False
    trains_own_encoder: bool = False
    compares_within_batch: bool = False

    def check(self, recipe: Recipe) -> None:
        """Check the recipe before anything is read; raises `ValueError`."""

    def check_start(self, recipe: Recipe, pending: Collection[str]) -> None:
        """Check that the stage can start when the stages in `pending` are run; raises `ValueError`."""

    def check_studies(self, recipe: Recipe, studies: StudySplits) -> None:
        """Check what the stage reads of the studies; raises `ValueError`."""

    def check_model(self, recipe: Recipe, model: OTDRGForReportGeneration) -> None:
        """Check what the stage needs of the model that the first stage of the run starts from; raises `ValueError`."""

    def score_names(self) -> Collection[str]:
        """Scores of an evaluation besides the losses, of which `metric_for_best_model` may be made."""
        return ()

    @abstractmethod
    def train(self, run: StageRun) -> tuple[OTDRGForReportGeneration, dict[str, Any]]:
        """Train, and return the model to publish and the stage's part of `results.json`, which has `steps`."""

    def evaluate(self, run: StageRun) -> dict[str, Any]:
        """Evaluate the published model `run.model`; what this returns is added to the stage's results."""
        return {}


def stage_of(name: str) -> Stage:
    """The registered stage of a name."""
    return import_module(STAGES[name], __package__).STAGE


def published_folder(output: Path, name: str) -> Path:
    """The folder of a run to which a stage's model is written, and from which the next stage starts."""
    return output / (stage_of(name).publishes or name)


def earlier_stages(name: str) -> list[str]:
    """The stages that run before one."""
    order = list(STAGES)
    return order[: order.index(name)]


__all__ = ["DEFAULT_STAGES", "STAGES", "Stage", "StageRun", "earlier_stages", "published_folder", "stage_of"]
