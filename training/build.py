"""From a recipe to what a stage works with: studies with reports and states, the model, the processor."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Collection, Sequence
from typing import TypeVar

import torch
from datasets import Dataset
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from ..configuration_otdrg import OTDRGConfig
from ..inference.features import CachedStudies, cache_features, encoder_is_frozen
from ..inference.model_files import read_config, read_model, read_processor
from ..labelers import read_states
from ..labelers.as_typed import labeler_of
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from ..runtime.interruptions import is_out_of_memory
from ..studies import load_studies
from ..studies.cleaning import clean_report
from ..studies.loading import load_prepared, undecoded, with_column
from ..studies.placeholders import present_text
from ..studies.schema import UNCLEANED
from ..studies.streaming import StreamedStudies
from .recipe import LabelsRecipe, ModelRecipe, Recipe, StageRecipe, StudiesRecipe

logger = logging.getLogger(__name__)

#: Studies by split; only training ones are ever streamed.
StudySplits = dict[str, Dataset | StreamedStudies]
#: Studies in any of the forms in which they are trained on.
Rows = TypeVar("Rows", Dataset, StreamedStudies, CachedStudies)


def build_studies(
    studies: StudiesRecipe, labels: LabelsRecipe, seed: int = 0, splits: Sequence[str] | None = None
) -> StudySplits:
    """The recipe's studies by split, with `report` cleaned and `finding_states` filled.

    Rows follow `STUDY_FEATURES`, with images as `{"bytes", "path"}`: the collator reads them as `generate` does. Where
    the recipe cleans reports, the column `uncleaned_report` holds them as they were.

    Studies without a report are left out and counted. States come from the CSV for the studies it names, else from the
    labeler, else they are the studies' own; a labeler reads the reports as they were before cleaning.

    Args:
        studies, labels: sections of the recipe.
        seed: of the order of streamed studies.
        splits: those that are wanted; all there are without it, of which training is one.

    Raises:
        ValueError: no training studies, or none of a split that is wanted, training studies whose states are not known,
            or a fault in source or CSV.
    """
    loaded = _streamed(studies, seed) if studies.streaming else _loaded(studies)
    for split in studies.limit:
        if split not in loaded:
            raise ValueError(f"studies.limit names the split {split}, which {studies.source} does not have here")
    found = {}
    for split, rows in loaded.items():
        if splits is not None and split not in splits:
            continue
        kept = [position for position, report in enumerate(rows["report"]) if present_text(report)]
        if len(kept) < len(rows):
            logger.warning(
                "%s: %d of %d studies skipped: their report is empty", split, len(rows) - len(kept), len(rows)
            )
        kept = kept[: studies.limit.get(split)]
        if kept:
            found[split] = rows.select(kept)
    for split in ["train"] if splits is None else splits:
        if split not in found:
            kind = "training" if split == "train" else split
            raise ValueError(f"studies.source={studies.source!r} gives no {kind} study with a report")
    labelled = _labelled(found, labels, {study for rows in loaded.values() for study in rows["id"]})
    for split, rows in labelled.items():
        unknown = sum(states is None for states in rows["finding_states"])
        if unknown and split == "train":
            raise ValueError(
                f"{unknown} of {len(rows)} training studies have no finding states: set labels.labeler (such as rules) "
                "or give a labels.csv that names all of them"
            )
        if unknown:
            logger.warning("%s: %d of %d studies have no finding states", split, unknown, len(rows))
    cleaned = {split: _cleaned(rows, studies.cleaning) for split, rows in labelled.items()}
    for split, rows in cleaned.items():
        logger.info("%s: %d studies", split, len(rows))
    return {split: undecoded(rows) if isinstance(rows, Dataset) else rows for split, rows in cleaned.items()}


def _loaded(studies: StudiesRecipe) -> StudySplits:
    return load_studies(studies.source, sections=studies.sections, **studies.options)


def _streamed(studies: StudiesRecipe, seed: int) -> StudySplits:
    folder = studies.options["folder"]
    train = StreamedStudies(folder, "train", seed, studies.shuffle_buffer)
    return {"train": train, **load_prepared(folder, leave_out=["train"])}


def _cleaned(rows: Dataset | StreamedStudies, style: str) -> Dataset | StreamedStudies:
    if style == "none":
        return rows
    reports = list(rows["report"])
    return with_column(
        with_column(rows, UNCLEANED, reports), "report", [clean_report(report, style) for report in reports]
    )


def _labelled(splits: StudySplits, labels: LabelsRecipe, ids: Collection[str]) -> StudySplits:
    """The splits with states; `ids` are those of all there are, of which a CSV has to name some."""
    if labels.csv is None and labels.labeler is None:
        return splits
    from_csv = read_states(labels.csv) if labels.csv is not None else {}
    labeler = labeler_of(labels.labeler, labels.options) if labels.labeler is not None else None
    if labels.csv is not None and from_csv.keys().isdisjoint(ids):
        raise ValueError(f"labels.csv={labels.csv!r} names none of the studies: expected their ids in its column id")
    labelled = {}
    for split, rows in splits.items():
        reports, states = rows["report"], list(rows["finding_states"])
        others = []
        for position, study in enumerate(rows["id"]):
            if study in from_csv:
                states[position] = from_csv[study].tolist()
            else:
                others.append(position)
        if labeler is not None and others:
            for position, row in zip(others, labeler.label([reports[i] for i in others]), strict=True):
                states[position] = row.tolist()
        labelled[split] = with_column(rows, "finding_states", states)
        logger.info(
            "%s: states of %d studies from %s, of %d from %s",
            split,
            len(rows) - len(others),
            labels.csv or "a CSV",
            len(others),
            f"the labeler {labels.labeler}" if labels.labeler else "the studies themselves",
        )
    return labelled


def build_model(
    recipe: ModelRecipe, reports: Sequence[str], quantization: str | None = None
) -> tuple[OTDRGForReportGeneration, OTDRGProcessor]:
    """A new model and its processor, without LoRA: on the recipe's or preset's backbones, or else from scratch.

    Args:
        recipe: the recipe's `model` section.
        reports: training reports, for the tokenizer of a model from scratch.
        quantization: "4bit" or "8bit", for the LLM's weights; of a pretrained LLM only.

    Raises:
        ValueError: an unknown preset or override, one backbone without the other, or a quantised LLM from scratch.
        OSError: a backbone that cannot be loaded.
    """
    config = _preset_config(recipe)
    vision, text = check_backbones(recipe, config)
    # LoRA belongs to the stage that trains it: in the configuration of a folder without adapters it would make them
    # load wrong.
    config.lora = config.vision_lora = None
    if vision is None:
        processor = OTDRGProcessor.from_texts(list(reports), config=config, vocab_size=recipe.vocab_size)
        try:
            model = OTDRGForReportGeneration(config)
        except Exception as error:  # whatever the backbones' own code raises of sizes that do not fit together
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())
            raise ValueError(f"model.overrides: no model can be made of them ({reason})") from error
    else:
        fields = {name: getattr(config, name) for name in _joining_fields()}
        for name, reference in (("vision_backbone", vision), ("text_backbone", text)):
            # A path of this machine means nothing to those who get the model.
            fields[name] = None if os.path.exists(reference) else reference
        model = OTDRGForReportGeneration.from_backbones(
            vision=vision,
            text=text,
            label_text_encoder=recipe.label_text_encoder,
            dtype=recipe.dtype,
            quantization_config=quantization_config(quantization),
            **fields,
        )
        processor = OTDRGProcessor.from_backbones(vision=vision, text=text, config=model.config)
    cast_backbones(model, recipe.dtype)
    return model, processor


def check_backbones(recipe: ModelRecipe, config: OTDRGConfig) -> tuple[str, str] | tuple[None, None]:
    """The references of the vision backbone and the LLM, the recipe's or the preset's; None for both from scratch.

    Raises:
        ValueError: one without the other, or a field that does not go with them.
    """
    vision, text = recipe.vision or config.vision_backbone, recipe.text or config.text_backbone
    if (vision is None) != (text is None):
        absent = "vision" if vision is None else "text"
        raise ValueError(f"model.{absent} is missing: expected backbones for both vision and text, or for neither")
    if vision is None and recipe.quantization is not None:
        raise ValueError(f"model.quantization={recipe.quantization!r}: expected null for a model from scratch")
    if vision is None and recipe.label_text_encoder is not None:
        raise ValueError("model.label_text_encoder is given, but no backbones: expected vision and text beside it")
    for part in ("vision_config", "text_config") if vision is not None else ():
        if part in recipe.overrides:
            raise ValueError(f"model.overrides.{part} is given beside a backbone, which brings its own")
    return vision, text


def _preset_config(recipe: ModelRecipe) -> OTDRGConfig:
    # A copy: from_preset takes the nested configurations out of what it is given.
    return OTDRGConfig.from_preset(recipe.preset, **dict(recipe.overrides))


def _joining_fields() -> list[str]:
    """Fields of the configuration that neither describe a backbone nor are bound to a tokenizer."""
    parameters = inspect.signature(OTDRGConfig.__init__).parameters.values()
    return [
        parameter.name
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY
        and not parameter.name.endswith(("_token_id", "_token_ids", "_backbone", "_sha256", "_revisions"))
        and parameter.name not in ("label_encoder_config", "lora", "vision_lora", "weights")
    ]


def lora_fields(recipe: Recipe, stage: str) -> dict[str, dict]:
    """The fields `lora` and `vision_lora` of the configuration, as far as a stage trains adapters.

    They are the overrides', or else the preset's.

    Raises:
        ValueError: neither has any.
    """
    config, section = _preset_config(recipe.model), getattr(recipe, stage)
    wanted = {}
    for mode, part, field in (("text", "LLM", "lora"), ("vision", "vision encoder", "vision_lora")):
        if getattr(section, mode, None) != "lora":
            continue
        wanted[field] = getattr(config, field)
        if wanted[field] is None:
            raise ValueError(
                f"{stage}.{mode}=lora, but the preset {recipe.model.preset} has no LoRA of the {part}: set "
                f"model.overrides.{field} to r, lora_alpha, lora_dropout and target_modules, or {stage}.{mode} to full"
            )
    return wanted


def attach_lora(model: OTDRGForReportGeneration, recipe: Recipe, stage: str) -> None:
    """Give a model the fresh adapters that a stage trains, as [`lora_fields`] has them."""
    wanted = lora_fields(recipe, stage)
    for field, value in wanted.items():
        setattr(model.config, field, value)
    if wanted:
        model.add_lora()


def load_model(
    folder: str | os.PathLike, recipe: ModelRecipe, quantization: str | None = None
) -> tuple[OTDRGForReportGeneration, OTDRGProcessor]:
    """A stage's model and processor from its folder, joined as the recipe now says.

    Backbones come in the recipe's `dtype`, the rest in float32. How the two are joined (DLE, FIOT, the transport's
    settings) is the recipe's business and not the folder's, so that stages can be run again under other switches;
    what a switch adds starts from scratch.

    Args:
        quantization: "4bit" or "8bit", for the LLM's weights.
    """
    config = read_config(folder)
    wanted = _preset_config(recipe)
    for name in _joining_fields():
        # The thresholds are what a stage found, and a text encoder of the labels comes with its weights.
        if name != "finding_thresholds" and not (name == "label_encoder" and recipe.label_text_encoder is not None):
            setattr(config, name, getattr(wanted, name))
    trained = read_processor(folder)
    views = trained.image_processor
    processor = OTDRGProcessor.from_config(config, trained.tokenizer, views.image_mean, views.image_std)
    # Loaded in one type or another, from_pretrained makes all of it that type and rounds what was trained in float32.
    model = read_model(
        folder, may_lack=True, config=config, dtype=torch.float32, quantization_config=quantization_config(quantization)
    )
    cast_backbones(model, recipe.dtype)
    return model, processor


def cast_backbones(model: OTDRGForReportGeneration, dtype: str) -> None:
    """Give the backbones' weights `dtype` and everything between them float32."""
    for name, part in model.named_children():
        wanted = getattr(torch, dtype) if name.endswith(("vision_tower", "language_model")) else torch.float32
        if not getattr(part, "is_quantized", False):
            part.to(wanted)
            continue
        for weight in part.parameters():
            # Packed weights are integers.
            if weight.is_floating_point():
                weight.data = weight.data.to(wanted)


def quantization_config(kind: str | None) -> BitsAndBytesConfig | None:
    """transformers' configuration for the LLM in "4bit" (NF4, quantised twice, computed in bfloat16) or "8bit".

    Raises:
        ValueError: bitsandbytes is not there.
    """
    if kind is None:
        return None
    if not is_bitsandbytes_available():
        raise ValueError(f"model.quantization={kind!r} needs bitsandbytes: pip install bitsandbytes")
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def set_trained_parts(
    model: OTDRGForReportGeneration,
    *,
    vision: str,
    text: str,
    predictor: str,
    joining: bool,
    finding_vision: str = "frozen",
) -> list[nn.Module]:
    """Freeze and unfreeze the parts of a model; trained weights become float32 (`from_pretrained` loses freezing).

    Args:
        vision: "frozen", "lora" (adapters only) or "full".
        text: likewise.
        predictor: "frozen" or "full".
        joining: whether what joins the backbones, projections and a label table, is trained.
        finding_vision: as `vision`, of the predictor's own encoder.

    Returns:
        The parts that are wholly frozen, to be kept in evaluation mode: dropout and stochastic depth of a part that
        does not learn are noise.
    """
    model.requires_grad_(False)
    frozen = []
    modes = [(model.vision_tower, vision), (model.language_model, text), (model.finding_predictor, predictor)]
    if model.config.predictor_encoder == "own":
        modes.append((model.finding_vision_tower, finding_vision))
    for part, mode in modes:
        if mode == "frozen":
            frozen.append(part)
        for name, parameter in part.named_parameters():
            parameter.requires_grad_(mode == "full" or (mode == "lora" and "lora_" in name))
    if joining:
        model.image_projector.requires_grad_(True)
        if model.config.fiot:
            model.label_projector.requires_grad_(True)
            if model.config.label_encoder == "table":
                model.label_encoder.requires_grad_(True)
            else:
                frozen.append(model.label_encoder)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return frozen


def cached_where_frozen(
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    studies: Rows | None,
    recipe: Recipe,
    stage: StageRecipe,
    device: torch.device | str,
) -> Rows | None:
    """Studies with features in place of images where a stage of a recipe caches them and trains no vision encoder.

    Others, and None, come back as they are; the model is moved to `device` where it encodes.
    """
    if studies is None or not (stage.cache_features and encoder_is_frozen(model)):
        return studies
    batch_size = stage.eval_batch_size or stage.batch_size
    return cache_features(model.to(device), processor, studies, recipe.features_folder, batch_size)


def known_states(rows: Rows) -> Rows:
    """The studies of `rows` whose finding states are known."""
    return rows.select([position for position, states in enumerate(rows["finding_states"]) if states is not None])


__all__ = [
    "cached_where_frozen",
    "StudySplits",
    "attach_lora",
    "build_model",
    "build_studies",
    "cast_backbones",
    "check_backbones",
    "known_states",
    "load_model",
    "lora_fields",
    "quantization_config",
    "set_trained_parts",
]
