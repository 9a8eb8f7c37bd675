"""Stage `report`: feature integration by optimal transport and fine-tuning of the LLM (3.3, 3.5, eqs. 11 and 12).

The stage trains the projections and, as `report.text` says, the LLM on reports and true finding states. During training
it generates reports for validation studies and scores them; the best checkpoint is published, and the table of controls
is made with it.

Long, because the stage is here from its section of the recipe to the published model.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import PartialState
from datasets import Dataset

from ..configuration_otdrg import OTDRGConfig
from ..consensus_otdrg import ConsensusDecoder, ConsensusSettings, store_settings
from ..evaluation.evaluate import evaluate_model
from ..evaluation.report import format_table, write_predictions
from ..inference.features import CachedStudies
from ..inference.loading import consensus_decoder, described_consensus
from ..inference.model_files import read_config
from ..inference.retrieval import build_bank
from ..labelers.abnormal import abnormal_sentences
from ..labelers.as_typed import labeler_of
from ..metrics import metric_choices, metric_of, score_names
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from .arguments import StageArguments
from .callbacks import SinkhornLossCallback
from .collation import ReportCollator, study_weights
from .data import StudySplits, describe_studies
from .fields import COUNT, POSITIVE, Bounds, need, option
from .model import attach_lora, cached_where_frozen, check_backbones, preset_config, set_trained_parts
from .predictor import logit_adjustment
from .recipe import Recipe
from .resumption import is_finished
from .stages import Stage, StageRun
from .trainer import StageTrainer
from .validation import GENERATION, EvaluationRecipe, Validation, check_generation, decoding, generating_arguments

logger = logging.getLogger(__name__)

# --- the section of the recipe ---------------------------------------------------------------------------------------


@dataclass
class ReportArguments(StageArguments):
    """The section `report`: `TrainingArguments`, and the fields below."""

    place = "report"
    after_training = ("evaluation", "candidates", "consensus", "bank", "suppressed_words")
    bounds: ClassVar[dict[str, Bounds]] = {
        **StageArguments.bounds,
        "max_report_tokens": COUNT,
        "ot_weight_warmup": {"least": 0, "most": 1},
        "ot_epsilon_start": POSITIVE,
        "ot_epsilon_annealing": {"least": 0, "most": 1},
        "abnormal_study_weight": {"least": 1},
        "abnormal_sentence_weight": {"least": 1},
        "max_eval_samples": COUNT,
        "generation_num_beams": COUNT,
        "candidates": {"least": 2},
    }
    renamed: ClassVar[dict[str, str]] = {
        **StageArguments.renamed,
        "group_by_length": "train_sampling_strategy: group_by_length",
        "selection": "metric_for_best_model (selection.expression), early_stopping_patience (selection.patience), "
        "max_eval_samples (selection.limit) and generation_num_beams (selection.num_beams)",
    }

    text: Literal["frozen", "lora", "full"] = option("lora", "How the LLM is trained; lora uses model.overrides.lora.")
    predictor: Literal["frozen", "full"] = option(
        "frozen", "Whether the label predictor is trained further; it must be if an encoder it shares is trained."
    )
    max_report_tokens: int = option(120, "Tokens of a training report that are kept.")
    indication: bool = option(False, "Put the studies' indication into the prompt.")
    ot_weight_warmup: float = option(0.0, "Share of the steps over which lambda rises from 0 to the model's ot_weight.")
    ot_epsilon_start: float | None = option(None, "Epsilon at the first step, annealed to the model's ot_epsilon.")
    ot_epsilon_annealing: float = option(0.5, "Share of the steps over which epsilon is annealed, geometrically.")
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = option(
        "random",
        "Order of the training studies; group_by_length makes batches of reports of similar length: less padding.",
    )
    abnormal_study_weight: float = option(
        1.0,
        "How many times as often a training study with a positive or unclear finding is drawn. An epoch has as many "
        "studies as without it.",
    )
    abnormal_sentence_weight: float = option(
        1.0,
        "Weight, in the training loss, of the tokens of sentences in which labels.labeler (or rules) reads a positive "
        "or unclear finding; the loss is the weighted mean over tokens.",
    )
    load_best_model_at_end: bool = option(True, "Publish the checkpoint with the best metric_for_best_model.")
    metric_for_best_model: str | None = option(
        "0.5 * bleu_4 + 0.5 * cider",
        "Score of the best checkpoint, or a weighted sum of scores: bleu_4, cider, macro_f1_13, loss...",
    )
    max_eval_samples: int | None = option(
        None, "Maximum number of validation studies that reports are generated for, from the split's start."
    )
    generation_num_beams: int = option(1, "Beams of evaluations during training; 1 is greedy search.")
    candidates: int | None = option(
        None,
        "Consensus decoding of the table at the end and of the published model: samples per study; none is one report.",
    )
    consensus: dict[str, Any] = option(
        {}, "Other settings of consensus decoding: agreement_weight, utility, plan, retrieved, seed."
    )
    bank: bool = option(
        False, "Make a report bank of the training studies in the folder bank of the run, and use it for the table."
    )
    generation: dict[str, Any] = option(
        {}, "How reports are decoded: fields of GenerationConfig, merged into num_beams 3 and max_new_tokens 120."
    )
    suppressed_words: list[str] = option(
        [],
        "Words whose tokens are banned in generation, in this spelling, such as the placeholder of de-identified "
        "words; with a bank, its reports with one are no candidates.",
    )
    evaluation: EvaluationRecipe = field(
        default_factory=EvaluationRecipe, metadata={"help": "The table of generated reports."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.generation = {**GENERATION, **self.generation}
        check_generation(self.generation)
        right = all(isinstance(word, str) and len(word.split()) == 1 for word in self.suppressed_words)
        self.expect(right, "suppressed_words", "single words")
        if self.consensus or self.bank:
            need(
                self.candidates is not None,
                "report.candidates",
                None,
                "a number, beside report.consensus or report.bank",
            )
        need(
            "candidates" not in self.consensus,
            "report.consensus.candidates",
            self.consensus.get("candidates"),
            "report.candidates in its place",
        )
        try:
            ConsensusSettings.of(self.consensus)
        except ValueError as error:
            raise ValueError(f"report.{error}") from None


# --- the stage -------------------------------------------------------------------------------------------------------


class ReportStage(Stage):
    """Trains the projections and the LLM."""

    arguments = ReportArguments
    first_reads = (
        "dle",
        "fiot",
        "finding_text",
        "finding_tokens",
        "ot_epsilon",
        "ot_max_iterations",
        "ot_tolerance",
        "ot_cost_normalization",
        "ot_labels",
        "ot_gradient",
        "ot_weight",
        "ot_contrastive_weight",
        "ot_contrastive_temperature",
        "predicted_state_ratio",
        "finding_state_dropout",
        "image_dropout",
        "priors",
        "max_prior_tokens",
        "lora",
    )
    publishes = "model"
    reads_quantization = True

    def train(self, run: StageRun) -> tuple[OTDRGForReportGeneration, dict[str, Any]]:
        """Train on reports and true states, and return the best model with LoRA merged, in the recipe's type.

        Evaluations condition on predicted states, as generation does. What was trained on pretrained backbones is also
        saved as their adapter, in the folder `adapter` of the run.
        """
        trainer = report_trainer(run)
        trainer.train_stage(run.resume)
        results = trainer.summary()
        if "best" in results and trainer.score is not None and PartialState().is_main_process:
            constant = trainer.score.constant(run.studies["train"])
            if constant is not None:
                results["best"]["constant"] = constant
                logger.info("best constant report: %.4f, best step: %.4f", constant, results["best"]["value"])
        model = trained_model(trainer, run.recipe)
        if PartialState().is_main_process:
            save_adapter(model.eval(), run.processor, run.recipe, run.folder.parent / "adapter")
        return merged(model, trainer), results

    def evaluate(self, run: StageRun, folder: Path | None = None) -> dict[str, Any]:
        """The table of controls on the recipe's split; generated reports are written to `predictions.csv`.

        Args:
            folder: for `predictions.csv`; the run's by default.
        """
        wanted, recipe, model = run.recipe.report.evaluation, run.recipe, run.model
        if wanted.split == "none":
            return {}
        rows, training = run.studies[wanted.split], run.studies["train"]
        rows = rows.select(range(min(wanted.limit or len(rows), len(rows))))
        rows = cached_where_frozen(model, run.processor, rows, recipe, "report", model.device)
        if "retrieval" in wanted.controls or recipe.report.bank:
            training = cached_where_frozen(model, run.processor, training, recipe, "report", model.device)
        consensus = self._consensus(run, training)
        evaluation = evaluate_model(
            model,
            run.processor,
            rows,
            training=training,
            batch_size=recipe.report.eval_batch(),
            generation=decoding(recipe, run.processor),
            controls=wanted.controls,
            labeler=wanted.labeler,
            metrics=wanted.metrics,
            seed=recipe.seed,
            indication=recipe.gives_indication,
            consensus=consensus,
            collections=describe_studies({wanted.split: run.studies[wanted.split]})[wanted.split]["collections"],
        )
        write_predictions(evaluation, (folder or Path(recipe.output_dir)) / "predictions.csv")
        logger.info("%s, %d studies:\n%s", wanted.split, len(rows), format_table(evaluation))
        found = {"split": wanted.split, **evaluation.scores()}
        return {"evaluation": found if consensus is None else {**found, "generation": described_consensus(consensus)}}

    def _consensus(self, run: StageRun, training: Dataset | CachedStudies) -> ConsensusDecoder | None:
        """Consensus decoding as the recipe asks for it, with the bank of the training studies."""
        section, bank = run.recipe.report, None
        if section.bank:
            licences = describe_studies({"train": run.studies["train"]})["train"]["licences"]
            bank = build_bank(run.model, run.processor, training, licences, section.eval_batch(), run.recipe.seed)
            if PartialState().is_main_process:
                bank.save(Path(run.recipe.output_dir) / "bank")
        return consensus_decoder(run.model, run.processor, section.candidates, bank, **section.consensus)

    def check(self, recipe: Recipe) -> None:
        section, evaluation, quantization = recipe.report, recipe.report.evaluation, recipe.model.quantization
        for name in evaluation.metrics:
            need(name in metric_choices(), "report.evaluation.metrics", name, f"some of {', '.join(metric_choices())}")
        evaluation.expect(len(set(evaluation.metrics)) == len(evaluation.metrics), "metrics", "each once")
        try:
            # Finds out whether the labeler's weights are there.
            labeler_of(evaluation.labeler, {})
        except ValueError as error:
            raise ValueError(f"report.evaluation.labeler={evaluation.labeler!r}: {error}") from None
        section.expect(
            quantization is None or section.text != "full",
            "text",
            f"lora or frozen where model.quantization is {quantization}",
        )
        section.expect(
            section.train_sampling_strategy != "group_by_length" or not recipe.studies.streaming,
            "train_sampling_strategy",
            "random while studies.streaming is true (streamed studies have the order of their shards)",
        )
        section.expect(
            section.abnormal_study_weight == 1
            or not (recipe.studies.streaming or section.train_sampling_strategy == "sequential"),
            "abnormal_study_weight",
            "1 where studies are streamed or train_sampling_strategy is sequential",
        )
        section.expect(
            not section.indication or recipe.model.overrides.get("indication_reader") != "predictor",
            "indication",
            "false while model.overrides.indication_reader is predictor; both gives it to the LLM, too",
        )
        shares_encoder = recipe.model.overrides.get("predictor_encoder", "shared") == "shared"
        section.expect(
            section.vision == "frozen" or section.predictor == "full" or not shares_encoder,
            "predictor",
            f"full where report.vision is {section.vision} (the predictor shares the encoder), "
            "or model.overrides.predictor_encoder own",
        )
        config = preset_config(recipe.model)
        if check_backbones(recipe.model, config)[1] is None:
            check_positions(recipe, config)

    def check_start(self, recipe: Recipe, pending: Collection[str]) -> None:
        """Raise `ValueError` unless the predictor is or will be trained, on the encoder that the recipe has."""
        if "predictor" in pending or not recipe.model.overrides.get("dle", True):
            return
        folder = Path(recipe.output_dir) / "predictor"
        if not is_finished(folder):
            raise ValueError(
                f"stage report needs a trained predictor, and {folder} has none: run stages=[predictor,report]"
            )
        wanted = recipe.model.overrides.get("predictor_encoder", "shared")
        trained = read_config(folder).predictor_encoder
        expected = f"{trained}, as the predictor of {folder} was trained, or stages=[predictor,report]"
        need(trained == wanted, "model.overrides.predictor_encoder", wanted, expected)
        if "ircp" in pending:
            raise ValueError(
                f"stage report needs a trained predictor, and that of {folder} was trained without the encoder that "
                "stage ircp trains: run stages=[ircp,predictor,report]"
            )

    def check_studies(self, recipe: Recipe, studies: StudySplits) -> None:
        split = recipe.report.evaluation.split
        expected = f"one of the splits there are, {', '.join(studies)}, or none, for no table"
        need(split == "none" or split in studies, "report.evaluation.split", split, expected)

    def check_model(self, recipe: Recipe, model: OTDRGForReportGeneration) -> None:
        check_positions(recipe, model.config)

    def score_names(self) -> Collection[str]:
        return [name for name in score_names() if metric_of(name).default]


def check_positions(recipe: Recipe, config: OTDRGConfig) -> None:
    """Refuse reports for which the shortest prompt leaves too few of the LLM's positions; raises `ValueError`."""
    positions = config.text_positions
    prompt = len(config.prompt_token_ids or ()) or config.image_tokens
    for name, value in (
        ("report.max_report_tokens", recipe.report.max_report_tokens),
        ("report.generation.max_new_tokens", recipe.report.generation["max_new_tokens"]),
    ):
        if positions is not None and prompt + value > positions:
            raise ValueError(
                f"{name}={value}: expected at most {positions - prompt}, the LLM's {positions} positions without the "
                f"{prompt} of a prompt"
            )


# --- training --------------------------------------------------------------------------------------------------------


def report_trainer(run: StageRun) -> StageTrainer:
    """The Trainer of the stage, with the model's parts frozen and unfrozen as the recipe says."""
    recipe, section, model, processor = run.recipe, run.recipe.report, run.model, run.processor
    attach_lora(model, recipe, "report")
    frozen = set_trained_parts(
        model, vision=section.vision, text=section.text, predictor=section.predictor, joining=True
    )
    trains_predictor = section.predictor == "full"
    if trains_predictor:
        tau = recipe.predictor.logit_adjustment
        model.finding_logit_adjustment = logit_adjustment(run.studies["train"]["finding_states"], tau)
    train, validation = run.studies["train"], run.studies.get("validation")
    args = generating_arguments(
        run,
        section,
        # Training studies are grouped by our sampler; transformers would also group those of evaluations, and fail.
        train_sampling_strategy="random"
        if section.train_sampling_strategy == "group_by_length"
        else section.train_sampling_strategy,
    )
    train, validation = (
        cached_where_frozen(model, processor, rows, recipe, "report", args.device) for rows in (train, validation)
    )
    schedules = SinkhornLossCallback(section.ot_weight_warmup, section.ot_epsilon_start, section.ot_epsilon_annealing)
    tokens, indication = section.max_report_tokens, recipe.gives_indication
    lengths = None
    if section.train_sampling_strategy == "group_by_length":
        ids = processor.tokenizer(list(train["report"]), add_special_tokens=False)["input_ids"]
        lengths = [min(len(row), tokens) for row in ids]
    abnormal = None
    if section.abnormal_sentence_weight != 1:
        labels = recipe.labels
        labeler = labeler_of(labels.labeler or "rules", labels.options if labels.labeler else {})
        abnormal = abnormal_sentences(list(train["report"]), labeler)
    return StageTrainer(
        model,
        args,
        processor=processor,
        loss_callback=schedules,
        frozen=frozen,
        train_collator=ReportCollator(
            processor,
            training=True,
            max_report_tokens=tokens,
            supervise_predictor=trains_predictor,
            indication=indication,
            sentence_weight=section.abnormal_sentence_weight,
            abnormal=abnormal,
        ),
        eval_collator=ReportCollator(processor, training=False, max_report_tokens=tokens, indication=indication),
        train_lengths=lengths,
        train_weights=study_weights(train["finding_states"], section.abnormal_study_weight),
        score=Validation.of(run, args, validation),
        train_dataset=train,
        eval_dataset=validation,
    )


def trained_model(trainer: StageTrainer, recipe: Recipe) -> OTDRGForReportGeneration:
    """The whole model after training, in the recipe's type and with its decoding as the default; LoRA not merged."""
    model = trainer.whole_model()
    section = recipe.report
    model.generation_config.update(**decoding(recipe, trainer.processor))
    if section.candidates is not None:
        store_settings(model, {"candidates": section.candidates, **section.consensus})
    # One type, as `from_pretrained` gives: the model that is scored is the model that will be loaded.
    dtype = getattr(torch, recipe.model.dtype)
    for weight in model.parameters():
        # Packed weights are integers.
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    return model


def merged(model: OTDRGForReportGeneration, trainer: StageTrainer) -> OTDRGForReportGeneration:
    """A [`trained_model`] with LoRA merged, on the device and in evaluation mode, to be published and evaluated."""
    dtype = model.image_projector.linear.weight.dtype
    model.merge_lora()
    return model.to(trainer.args.device, dtype).eval()


def save_adapter(model: OTDRGForReportGeneration, processor: OTDRGProcessor, recipe: Recipe, folder: Path) -> None:
    """Write what was trained as an adapter of the recipe's backbones.

    There is none for a model from scratch or an LLM that is trained completely. An adapter of an earlier run is deleted
    in any case. If a backbone cannot be loaded any more, a warning says so.
    """
    shutil.rmtree(folder, ignore_errors=True)
    vision, text = check_backbones(recipe.model, preset_config(recipe.model))
    references = {"vision_backbone": vision, "text_backbone": text}
    if recipe.report.text == "full" or None in references.values():
        return
    published = {name: getattr(model.config, name) for name in references}
    for name, reference in references.items():
        # An absolute path is found from any folder.
        setattr(model.config, name, os.path.abspath(reference) if os.path.exists(reference) else reference)
    try:
        model.save_pretrained(folder, weights="adapter")
        processor.save_pretrained(folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        logger.warning("no adapter is kept: %s", error)
    finally:
        for name, reference in published.items():
            setattr(model.config, name, reference)


STAGE = ReportStage()

__all__ = [
    "STAGE",
    "ReportArguments",
    "ReportStage",
    "merged",
    "save_adapter",
    "trained_model",
]
