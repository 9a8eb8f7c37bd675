"""The model of a run: built from the recipe or loaded from an earlier stage, with the parts that a stage trains."""

from __future__ import annotations

import inspect
import itertools
import os
import typing
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig

from ..configuration_otdrg import OTDRGConfig
from ..inference.features import cache_features, encoder_is_frozen
from ..inference.model_files import read_config, read_model, read_processor
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from ..runtime.interruptions import is_out_of_memory
from ..vision_otdrg import encoder_blocks
from ..weights_otdrg import load_backbone, quantization_of
from .data import Rows
from .dropout import use_fast_dropout
from .fields import convert, need, unknown_key
from .recipe import ModelRecipe, Recipe
from .stages import stage_of

#: What a recipe says of the quantisation of the LLM: a word, or fields of `BitsAndBytesConfig`.
Quantization = str | dict[str, Any] | None


def build_model(
    recipe: ModelRecipe, texts: Sequence[str], quantization: Quantization = None
) -> tuple[OTDRGForReportGeneration, OTDRGProcessor]:
    """A new model and its processor, without LoRA, on the recipe's or preset's backbones; other parts are from scratch.

    Args:
        recipe: the recipe's `model` section.
        texts: training reports, and indications if the LLM reads them, for the tokenizer of an LLM from scratch.
        quantization: as `model.quantization`, of a pretrained LLM's weights.

    Raises:
        ValueError: an unknown preset or override, an LLM without a vision encoder, or a quantised LLM from scratch.
        OSError: a backbone that cannot be loaded.
    """
    config = preset_config(recipe)
    vision, text = check_backbones(recipe, config)
    # A model made with these would have adapters at once; a stage that trains adapters sets them.
    config.lora = config.vision_lora = None
    if text is None and quantization is not None:
        raise ValueError(f"model.quantization={quantization!r}: expected null for a model from scratch")
    # The published configuration must not name a path of this machine.
    named = {
        part: None if source is None or os.path.exists(source) else source
        for part, source in (("vision", vision), ("text", text))
    }
    if text is None:
        model, processor = _with_llm_from_scratch(recipe, config, texts, vision)
        model.config.vision_backbone, model.config.text_backbone = named["vision"], None
    else:
        fields = {name: getattr(config, name) for name in _joining_fields()}
        model = OTDRGForReportGeneration.from_backbones(
            vision=vision,
            text=text,
            label_text_encoder=recipe.label_text_encoder,
            dtype=recipe.dtype,
            quantization_config=quantization_config(quantization),
            vision_backbone=named["vision"],
            text_backbone=named["text"],
            **fields,
        )
        processor = OTDRGProcessor.from_backbones(vision=vision, text=text, config=model.config)
    cast_backbones(model, recipe.dtype)
    return model, processor


def _with_llm_from_scratch(
    recipe: ModelRecipe, config: OTDRGConfig, texts: Sequence[str], vision: str | None
) -> tuple[OTDRGForReportGeneration, OTDRGProcessor]:
    """A model whose LLM has random weights and a tokenizer trained on `texts`; `vision` is loaded if there is one."""
    tower = None if vision is None else load_backbone("vision", AutoModel, vision, recipe.dtype)
    if tower is not None:
        config.vision_config = tower.config
    processor = OTDRGProcessor.from_texts(
        list(texts), config, vocab_size=recipe.vocab_size, tokenizer=recipe.tokenizer, vision=vision
    )
    try:
        return OTDRGForReportGeneration(config, tower), processor
    except Exception as error:  # the backbones' own code raises all kinds for sizes that do not fit together
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"model.overrides: no model can be made of them ({reason})") from error


#: `model.text` of an LLM with random weights.
SCRATCH = "scratch"


def check_backbones(recipe: ModelRecipe, config: OTDRGConfig) -> tuple[str | None, str | None]:
    """The references of the vision backbone and the LLM, the recipe's or the preset's; None for a part from scratch.

    Raises:
        ValueError: an LLM without a vision encoder, or a field that cannot be combined with them.
    """
    vision, text = recipe.vision or config.vision_backbone, recipe.text or config.text_backbone
    if text is None and vision is not None:
        raise ValueError(f"model.text is missing beside model.vision: expected an LLM, or {SCRATCH}")
    if text == SCRATCH:
        text = None
    if vision is None and text is not None:
        raise ValueError("model.vision is missing: expected a vision encoder beside model.text")
    if text is None and recipe.label_text_encoder is not None:
        raise ValueError(
            "model.label_text_encoder is given, but no pretrained LLM: expected model.vision and model.text beside it"
        )
    for part, source in (("vision_config", vision), ("text_config", text)):
        if source is not None and part in recipe.overrides:
            raise ValueError(f"model.overrides.{part} is given beside a backbone, which brings its own")
    return vision, text


def check_model_recipe(model: ModelRecipe) -> None:
    """Check the configuration, its backbones and LoRA without loading a backbone; raises `ValueError`."""
    try:
        config = preset_config(model)
    except Exception as error:  # the configurations of backbones raise whatever their fields raise
        reason = " ".join(str(error).split())
        raise ValueError(reason if isinstance(error, ValueError) else f"model.overrides: {reason}") from error
    check_backbones(model, config)
    for field in ("predictor_tags", "report_sections"):
        given = model.overrides.get(field)
        need(given is None, f"model.overrides.{field}", given, "null, the run finds it in the studies")
    for field in ("lora", "vision_lora"):
        if getattr(config, field) is not None:
            _check_lora(f"model.overrides.{field}", getattr(config, field))


def preset_config(recipe: ModelRecipe) -> OTDRGConfig:
    """The configuration of the preset with the recipe's overrides."""
    # A copy, because from_preset removes the nested configurations from its arguments.
    return OTDRGConfig.from_preset(recipe.preset, **dict(recipe.overrides))


def _joining_fields() -> list[str]:
    """Fields of the configuration that neither describe a backbone nor depend on a tokenizer."""
    parameters = inspect.signature(OTDRGConfig.__init__).parameters.values()
    return [
        parameter.name
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY
        and not parameter.name.endswith(("_token_id", "_token_ids", "_backbone", "_sha256", "_revisions"))
        and parameter.name not in ("label_encoder_config", "lora", "vision_lora", "weights")
    ]


def lora_fields(recipe: Recipe, stage: str) -> dict[str, dict[str, Any]]:
    """The fields `lora` and `vision_lora` of the configuration for which a stage trains adapters.

    Raises:
        ValueError: neither the overrides nor the preset has them, or DoRA on a quantised LLM.
    """
    config, section = preset_config(recipe.model), getattr(recipe, stage)
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
    if wanted.get("lora", {}).get("use_dora") and recipe.model.quantization is not None:
        raise ValueError(
            "model.overrides.lora.use_dora=True: expected false while model.quantization is set: DoRA needs the "
            "weights themselves"
        )
    return wanted


def _check_lora(where: str, lora: dict[str, Any]) -> None:
    """Check types and bounds of LoRA fields, where peft accepts values that fail later or train nothing."""
    kinds = {**typing.get_type_hints(LoraConfig), "lora_alpha": float}
    for name, value in lora.items():
        if kinds.get(name) in (bool, float) or name in ("r", "target_modules", "bias"):
            convert(value, kinds[name], (*where.split("."), name))
    for name in ("r", "lora_alpha"):
        need(lora.get(name, 8) > 0, f"{where}.{name}", lora.get(name), "a number above 0")
    dropout = lora.get("lora_dropout", 0.0)
    need(0 <= dropout < 1, f"{where}.lora_dropout", dropout, "a number of at least 0 and below 1")
    targets = lora.get("target_modules")
    need(
        bool(targets) and all(targets), f"{where}.target_modules", targets, "names of modules, such as [q_proj, v_proj]"
    )


def check_lora_targets(model: OTDRGForReportGeneration, recipe: Recipe, stage: str) -> None:
    """Check that the model has the modules to which a stage attaches LoRA; raises `ValueError`."""
    own = model.config.predictor_encoder == "own" and stage_of(stage).trains_own_encoder
    towers = {"lora": model.language_model, "vision_lora": model.finding_vision_tower if own else model.vision_tower}
    for field, lora in lora_fields(recipe, stage).items():
        config = LoraConfig(**lora)
        names = [part for part, _ in towers[field].named_modules()]
        all_linear = str(config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
        if not all_linear and not any(check_target_module_exists(config, part) for part in names if part):
            raise ValueError(
                f"OTDRGConfig.{field}={lora!r}: Target modules are not in the backbone, expected some of "
                f"{', '.join(_layer_names(towers[field]))}"
            )


def _layer_names(tower: nn.Module) -> list[str]:
    """Last parts of the names of a backbone's linear layers."""
    return sorted({name.rpartition(".")[2] for name, part in tower.named_modules() if isinstance(part, nn.Linear)})


def attach_lora(model: OTDRGForReportGeneration, recipe: Recipe, stage: str) -> None:
    """Add the fresh adapters that a stage trains, configured by [`lora_fields`]."""
    wanted = lora_fields(recipe, stage)
    for field, value in wanted.items():
        setattr(model.config, field, value)
    if wanted:
        model.add_lora()
        use_fast_dropout(model)


def load_model(
    folder: str | os.PathLike, recipe: ModelRecipe, quantization: Quantization = None
) -> tuple[OTDRGForReportGeneration, OTDRGProcessor]:
    """A stage's model and processor from its folder, joined as the recipe now says.

    Backbones have the recipe's `dtype`, the rest is float32. How they are joined (DLE, FIOT, the settings of the
    transport) is read from the recipe and not from the folder, so that a stage can be run again with other switches;
    parts that a switch adds start from scratch.

    Args:
        quantization: as `model.quantization`, of the LLM's weights.
    """
    config = read_config(folder)
    wanted = preset_config(recipe)
    for name in _joining_fields():
        # A stage found these, and a text encoder of the labels is stored with its weights.
        if name not in ("finding_thresholds", "finding_calibration", "predictor_tags", "report_sections") and not (
            name == "label_encoder" and recipe.label_text_encoder is not None
        ):
            setattr(config, name, getattr(wanted, name))
    trained = read_processor(folder)
    views = trained.image_processor
    processor = OTDRGProcessor.from_config(config, trained.tokenizer, views.image_mean, views.image_std)
    # Weights of a quantised LLM are loaded in the type of all others, and packed.
    model = read_model(
        folder,
        may_lack=True,
        config=config,
        dtype=torch.float32,
        backbone_dtype=recipe.dtype if quantization is None else None,
        quantization_config=quantization_config(quantization),
    )
    cast_backbones(model, recipe.dtype)
    return model, processor


def cast_backbones(model: OTDRGForReportGeneration, dtype: str) -> None:
    """Cast the backbones' weights to `dtype` and everything between them to float32.

    Buffers that are not saved keep their type, as in `from_pretrained`: frequencies of rotary embeddings are float32.
    """
    for name, part in model.named_children():
        wanted = getattr(torch, dtype) if name.endswith(("vision_tower", "language_model")) else torch.float32
        if not getattr(part, "is_quantized", False):
            saved = part.state_dict().keys()
            kept = {path: buffer for path, buffer in part.named_buffers() if path not in saved}
            part.to(wanted)
            for path, buffer in kept.items():
                owner, _, leaf = path.rpartition(".")
                setattr(part.get_submodule(owner), leaf, buffer)
            continue
        for weight in part.parameters():
            # Packed weights are integers.
            if weight.is_floating_point():
                weight.data = weight.data.to(wanted)


def quantization_config(quantization: Quantization) -> BitsAndBytesConfig | None:
    """transformers' configuration of the LLM's quantisation.

    Args:
        quantization: "4bit" (NF4, quantised twice, computed in bfloat16), "8bit", or fields of `BitsAndBytesConfig`.

    Raises:
        ValueError: fields that `BitsAndBytesConfig` does not have or refuses, or bitsandbytes is not installed.
    """
    if isinstance(quantization, dict):
        known = inspect.signature(BitsAndBytesConfig).parameters.keys() - {"kwargs"}
        for name in quantization:
            if name not in known:
                raise unknown_key(name, "model.quantization", known, {})
        if not (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
            raise ValueError(f"model.quantization={quantization!r}: expected load_in_4bit or load_in_8bit in it")
    try:
        return quantization_of(quantization)
    except ImportError:
        raise ValueError(f"model.quantization={quantization!r} needs bitsandbytes: pip install bitsandbytes") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"model.quantization={quantization!r}: {' '.join(str(error).split())}") from error


def set_trained_parts(
    model: OTDRGForReportGeneration,
    *,
    vision: str,
    text: str,
    predictor: str,
    joining: bool,
    finding_vision: str = "frozen",
    vision_layers: int | None = None,
) -> list[nn.Module]:
    """Freeze and unfreeze the parts of a model; trained weights become float32.

    Args:
        vision, text: "frozen", "lora" (adapters only) or "full".
        predictor: "frozen" or "full".
        joining: whether the projections, a label table and the mark of prior views are trained.
        finding_vision: as `vision`, of the predictor's own encoder.
        vision_layers: last blocks that "full" trains in an encoder, with what follows them; None trains all of it.

    The words of indications are never trained by gradient steps: the stage `predictor` fits them.

    Returns:
        The parts that are completely frozen. Keep them in evaluation mode: their dropout would only add noise.
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
        if mode == "full" and part in model.vision_towers and vision_layers is not None:
            frozen += _freeze_before(part, encoder_blocks(part)[-vision_layers])
    if model.config.indication_reader != "report":
        model.finding_predictor.words.requires_grad_(False)
    if joining:
        model.image_projector.requires_grad_(True)
        if model.config.reads_prior_images:
            model.prior_embedding.requires_grad_(True)
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


def _freeze_before(tower: nn.Module, block: nn.Module) -> list[nn.Module]:
    """Freeze what an encoder computes before one of its blocks, and return these modules."""
    first = next(block.parameters())
    # Parameters are in the order in which an encoder uses them.
    for parameter in itertools.takewhile(lambda parameter: parameter is not first, tower.parameters()):
        parameter.requires_grad_(False)
    weights = ((part, list(part.parameters())) for part in tower.modules())
    return [part for part, own in weights if own and not any(parameter.requires_grad for parameter in own)]


def cached_where_frozen(
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    studies: Rows | None,
    recipe: Recipe,
    stage: str,
    device: torch.device | str,
) -> Rows | None:
    """Studies with features in place of images if a stage caches them and trains no vision encoder.

    Otherwise they are returned unchanged. The model is moved to `device` to encode.
    """
    section = getattr(recipe, stage)
    if studies is None or not (section.cache_features and encoder_is_frozen(model)):
        return studies
    return cache_features(model.to(device), processor, studies, recipe.features_folder, section.eval_batch())


__all__ = [
    "attach_lora",
    "build_model",
    "cached_where_frozen",
    "cast_backbones",
    "check_backbones",
    "check_lora_targets",
    "check_model_recipe",
    "load_model",
    "lora_fields",
    "preset_config",
    "quantization_config",
    "set_trained_parts",
]
