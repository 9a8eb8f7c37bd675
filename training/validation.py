"""Reports that the stages `report` and `reward` generate: how they are decoded, and how validation scores them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import GenerationConfig

from ..evaluation.evaluate import CONTROLS, Control, evaluate_model
from ..evaluation.report import write_predictions
from ..inference.features import CachedStudies
from ..labelers.as_typed import label_quietly, labeler_of
from ..metrics import best_constants, full_score_name, score_names, score_reports
from ..metrics.baselines import SEARCHED_SCORES
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from ..sections_otdrg import without_headings
from ..studies.loading import uncleaned_reports
from ..studies.streaming import StreamedStudies
from .arguments import StageArguments, WeightedScores
from .fields import COUNT, Bounds, Section, need, option, unknown_key
from .recipe import Recipe
from .stages import StageRun

#: Scores of every evaluation during training. METEOR starts Java and is computed only if the best model depends on it.
VALIDATION_SCORES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider", "micro_f1_13", "macro_f1_13")

#: Decoding of generated reports; a recipe's `report.generation` is merged into it.
GENERATION = {"num_beams": 3, "max_new_tokens": 120}


@dataclass
class EvaluationRecipe(Section):
    """The table of generated reports at the end of the report stage."""

    place = "report.evaluation"
    bounds: ClassVar[dict[str, Bounds]] = {"limit": COUNT}

    split: Literal["validation", "test", "none"] = option("validation", "Split that is scored; none skips the table.")
    limit: int | None = option(None, "Maximum number of studies scored, from the split's start.")
    controls: list[Control] = option(
        list(CONTROLS),
        "Rows besides the model's own. Retrieval encodes the training views once, unless they are cached.",
    )
    labeler: str = option("rules", "Labeler that reads the states from generated and true reports.")
    metrics: list[str] = option(
        ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider"], "Metrics of `otdrg.metrics.registry`."
    )


def check_generation(generation: dict[str, Any]) -> None:
    """Check fields of `GenerationConfig`, which validates their values.

    Raises:
        ValueError: an unknown field, or a value it refuses.
    """
    config = GenerationConfig()
    for name in generation:
        if not hasattr(config, name) or name.startswith("_"):
            raise unknown_key(name, "report.generation", config.to_dict(), {})
    for name in ("num_beams", "max_new_tokens"):
        value = generation[name]
        is_count = isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31
        need(is_count, f"report.generation.{name}", value, "a number of at least 1")
    try:
        config.update(**generation)
        # As saving the model does, which would fail when it is trained.
        config.validate(strict=True)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"report.generation={generation!r}: {' '.join(str(error).split())}") from None


def decoding(recipe: Recipe, processor: OTDRGProcessor) -> dict[str, Any]:
    """The fields of `GenerationConfig`: `report.generation`, and `report.suppressed_words` as token ids."""
    section = recipe.report
    if not section.suppressed_words:
        return section.generation
    # A tokenizer of pieces has other ids for a word at the start of the text.
    texts = [text for word in section.suppressed_words for text in (word, f" {word}")]
    ids = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return {**section.generation, "bad_words_ids": [list(row) for row in dict.fromkeys(map(tuple, ids))]}


def generating_arguments(run: StageRun, section: StageArguments, **fixed) -> StageArguments:
    """The complete arguments of a stage that learns to generate reports; `fixed` as of [`StageArguments.prepare`]."""
    return section.prepare(
        run.folder,
        run.recipe.seed,
        run.recipe.report_to,
        evaluates="validation" in run.studies,
        label_names=["labels"],
        prediction_loss_only=True,
        **fixed,
    )


@dataclass
class Validation:
    """Generates reports for validation studies, scores them and writes them to `FOLDER/validation/step-N.csv`.

    Reports are decoded with `generation_num_beams` and without consensus decoding, and read by `evaluation.labeler`;
    `best` is the stage's `metric_for_best_model`.
    """

    recipe: Recipe
    model: OTDRGForReportGeneration
    processor: OTDRGProcessor
    studies: Dataset | CachedStudies
    folder: Path
    best: WeightedScores

    @classmethod
    def of(cls, run: StageRun, args: StageArguments, studies: Dataset | CachedStudies | None) -> Validation | None:
        """The validation of a stage; None without studies or without `metric_for_best_model`."""
        if studies is None or args.metric_for_best_model is None:
            return None
        return cls(run.recipe, run.model, run.processor, studies, run.folder, args.best)

    def __call__(self, step: int) -> dict[str, float]:
        """`VALIDATION_SCORES` and the scores of `metric_for_best_model`; every process must call it."""
        section = self.recipe.report
        names = (name for name in (*VALIDATION_SCORES, *self.best.weights) if name in score_names())
        wanted = {name: full_score_name(name) for name in names}
        evaluation = evaluate_model(
            self.model,
            self.processor,
            self._rows(),
            batch_size=section.eval_batch(),
            generation={**decoding(self.recipe, self.processor), "num_beams": section.generation_num_beams},
            controls=(),
            labeler=section.evaluation.labeler,
            metrics=wanted.values(),
            seed=self.recipe.seed,
            indication=self.recipe.gives_indication,
            sections=False,
        )
        if PartialState().is_main_process:
            write_predictions(evaluation, self.folder / "validation" / f"step-{step:06d}.csv")
        found = evaluation.rows["model"].scores
        return {name: found[full] for name, full in wanted.items()}

    def _rows(self) -> Dataset | CachedStudies:
        limit = self.recipe.report.max_eval_samples
        return self.studies.select(range(min(limit or len(self.studies), len(self.studies))))

    def constant(self, training: Dataset | StreamedStudies) -> float | None:
        """The best `metric_for_best_model` that one constant report of training reaches on validation.

        None if the metric has a score outside `SEARCHED_SCORES`, such as `loss`.
        """
        wanted = {name: full_score_name(name) for name in self.best.weights if name in score_names()}
        if wanted.keys() != self.best.weights.keys() or not set(SEARCHED_SCORES).issuperset(wanted.values()):
            return None
        labeler, rows = labeler_of(self.recipe.report.evaluation.labeler, {}), self._rows()
        # As in the evaluation, reports are compared without the headings of their sections.
        read = without_headings if self.model.config.report_sections else str
        reports, references = (list(map(read, texts)) for texts in (training["report"], rows["report"]))
        states, true_states = (
            label_quietly(labeler, list(map(read, uncleaned_reports(studies)))) for studies in (training, rows)
        )
        chosen = best_constants(reports, states, labeler, list(wanted.values()), self.recipe.seed)
        values = []
        for report in set(chosen.reports.values()):
            said = np.tile(label_quietly(labeler, [report]), (len(rows), 1))
            found = score_reports([report] * len(rows), references, said, true_states, list(wanted.values())).scores
            values.append(self.best({name: found[full] for name, full in wanted.items()}))
        return (min if self.best.higher_is_better is False else max)(values, default=None)


__all__ = [
    "GENERATION",
    "VALIDATION_SCORES",
    "EvaluationRecipe",
    "Validation",
    "check_generation",
    "decoding",
    "generating_arguments",
]
