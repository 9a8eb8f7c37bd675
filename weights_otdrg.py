"""Load and save the weights of a model: all of them, or an adapter of its backbones; LoRA and quantisation.

Long, because both forms of a saved model are written and read here, and share their checks.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.utils import is_peft_available
from transformers.utils.hub import extract_commit_hash

from .configuration_otdrg import HUB_KEYWORDS, OTDRGConfig, place_of, resolve_backbone
from .files_otdrg import describe
from .weight_files_otdrg import (
    check_other_weights,
    check_shapes,
    check_weights,
    read_stated,
    record_sha256,
    replaced_weights,
    sha256,
    weight_files,
    weight_shapes,
)

_AUTO_CLASSES = {"vision": AutoModel, "text": AutoModelForCausalLM}
#: The backbone that each of these parts of the model is made of.
_BACKBONE_PARTS = {"vision_tower": "vision", "finding_vision_tower": "vision", "language_model": "text"}
#: Suffix of the rows that a matrix has in addition to the backbone's, such as those of added tokens.
_ADDED_ROWS = ".added_rows"
#: Only the LLM is quantised, without its head: the other parts are small and are trained.
_NEVER_QUANTIZED = (
    "vision_tower",
    "finding_vision_tower",
    "image_projector",
    "label_encoder",
    "label_projector",
    "finding_predictor",
    "lm_head",
)
#: The fields of `BitsAndBytesConfig` that a word stands for.
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "4bit": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    },
    "8bit": {"load_in_8bit": True},
}


class OTDRGPreTrainedModel(PreTrainedModel):
    """Base class of [`OTDRGForReportGeneration`] that loads and saves it, attaches LoRA and quantises its LLM."""

    config_class = OTDRGConfig
    config: OTDRGConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012

    vision_tower: PreTrainedModel
    language_model: PreTrainedModel

    @property
    def vision_towers(self) -> tuple[PreTrainedModel, ...]:
        """The vision encoder of the report and, with `predictor_encoder="own"`, then that of the label predictor."""
        if self.config.predictor_encoder == "own":
            return self.vision_tower, self.finding_vision_tower
        return (self.vision_tower,)

    # -- new models -----------------------------------------------------------------------------------------------

    @classmethod
    def from_backbones(
        cls,
        vision: str,
        text: str,
        label_text_encoder: str | None = None,
        dtype: str | torch.dtype | None = None,
        quantization_config=None,
        **config_fields,
    ):
        """A new model on pretrained backbones; everything between them is initialised from scratch.

        Args:
            vision (`str`): Hub id, local folder or timm name (`timm/swin_...`) of the vision encoder.
            text (`str`): Hub id, local folder or GGUF file of a causal LLM with its tokenizer.
            label_text_encoder (`str`, *optional*): Hub id or folder of a text encoder for the labels; sets
                `label_encoder="text_encoder"`.
            dtype (`str` or `torch.dtype`, *optional*): type of the backbones' weights; the checkpoint's by default.
            quantization_config (*optional*): of the LLM's weights, as in [`quantization_of`].
            config_fields: fields of [`OTDRGConfig`]. [`add_lora`] attaches the adapters that `lora` describes.

        Raises:
            OSError: a backbone cannot be loaded; the message names it.
            ValueError: a configuration field is wrong.
        """
        vision_tower = load_backbone("vision", AutoModel, vision, dtype)
        language_model = load_backbone("text", AutoModelForCausalLM, text, dtype, quantization_of(quantization_config))
        tokenizer = load_backbone("text", AutoTokenizer, text)
        text_encoder = label_tokenizer = None
        if label_text_encoder is not None:
            label_tokenizer = load_backbone("label_text_encoder", AutoTokenizer, label_text_encoder)
            text_encoder = load_backbone("label_text_encoder", AutoModel, label_text_encoder, dtype)
            config_fields |= {"label_encoder": "text_encoder", "label_encoder_config": text_encoder.config}
        attention = [(model.config, model.config._attn_implementation) for model in (vision_tower, language_model)]
        config = cls.config_class(vision_tower.config, language_model.config, **config_fields)
        for part, implementation in attention:
            # A composite configuration resets that of its parts to None, which means eager attention.
            part._attn_implementation = implementation
        config.bind_tokenizer(tokenizer)
        if label_tokenizer is not None:
            config.bind_label_tokenizer(label_tokenizer)
        language_model.resize_token_embeddings(config.text_config.vocab_size, mean_resizing=False)
        model = cls(config, vision_tower, language_model, text_encoder)
        # Chat LLMs may end a turn with several tokens, which only their generation configuration names.
        end = language_model.generation_config.eos_token_id
        model.generation_config.eos_token_id = config.text_config.eos_token_id if end is None else end
        model._settle_quantization()
        return model

    # -- LoRA and quantisation ------------------------------------------------------------------------------------

    def add_lora(self) -> None:
        """Attach new LoRA adapters as the configuration says; existing adapters are kept.

        `config.lora` describes those of the LLM, `config.vision_lora` those of the vision encoders.

        Raises:
            ValueError: both are None, one names modules that its part does not have, or one does not suit a quantised
                LLM.
        """
        self.config.check_fields()
        if self.config.lora is None and self.config.vision_lora is None:
            raise ValueError("OTDRGConfig.lora=None: expected the fields of peft.LoraConfig, such as r and lora_alpha")
        self._inject_lora()

    def _inject_lora(self, **changes) -> None:
        """Attach LoRA to the parts that have none; `changes` replace fields of the `LoraConfig`."""
        for field, parts in (("lora", (self.language_model,)), ("vision_lora", self.vision_towers)):
            fields = getattr(self.config, field)
            if fields is None:
                continue
            if not is_peft_available():
                raise ImportError(f"OTDRGConfig.{field} is set: LoRA needs peft (pip install peft)")
            peft = import_module("peft")
            for option in ("use_dora", "lora_bias"):
                if field == "lora" and self.is_llm_quantized and fields.get(option):
                    raise ValueError(
                        f"OTDRGConfig.lora.{option}={fields[option]!r}: expected false, since the LLM is quantised"
                    )
            for part in parts:
                if not _lora_layers(part):
                    try:
                        peft.inject_adapter_in_model(peft.LoraConfig(**{**fields, **changes}), part)
                    except ValueError as error:
                        raise ValueError(f"OTDRGConfig.{field}={fields!r}: {error}") from None
                    layers = [module.get_base_layer() for module in _lora_layers(part).values()]
                    if fields.get("lora_bias") and any(layer.bias is None for layer in layers):
                        raise ValueError(
                            f"OTDRGConfig.{field}.lora_bias=True: expected modules with a bias, to merge it"
                        )

    @property
    def has_lora(self) -> bool:
        """Whether the LLM or a vision encoder has LoRA adapters."""
        return bool(_lora_layers(self))

    def merge_lora(self) -> None:
        """Merge all LoRA adapters into the weights and set `lora` and `vision_lora` to None; peft is then not needed.

        A quantised LLM is dequantised first, so that no weight is rounded a second time.
        """
        adapters = _lora_layers(self)
        quantized = self.is_llm_quantized
        if quantized:
            self.language_model.dequantize(self.language_model.get_input_embeddings().weight.dtype)
        for name, module in adapters.items():
            if not quantized or not name.startswith("language_model."):
                module.merge()
                continue
            weight = module.get_base_layer().weight
            for adapter in module.active_adapters:
                weight.data = (weight.float() + module.get_delta_weight(adapter).float()).to(weight.dtype)
        for name, module in adapters.items():
            self.set_submodule(name, module.get_base_layer())
        self.config.lora = self.config.vision_lora = None

    @property
    def is_llm_quantized(self) -> bool:
        """Whether the LLM's weights are quantised."""
        return bool(getattr(self.language_model, "is_quantized", False))

    def _settle_quantization(self) -> None:
        """Mark the LLM, and not the whole model, as quantised."""
        quantizer = getattr(self, "hf_quantizer", None)
        if quantizer is not None:
            quantizer.remove_quantization_config(self)
            self.language_model.hf_quantizer = quantizer
            self.language_model.is_quantized = True
        for module in self.language_model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # On a CPU the first evaluation would pack the weights differently, and gradients would stop there.
                module.support_avx512bf16_for_cpu = False

    # -- loading --------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """A trained model from a folder or a Hub id, as in `PreTrainedModel`; full weights and adapters load alike.

        The weight files must be safetensors files and those that `weights_sha256` in `config.json` lists.
        `quantization_config` (as in [`quantization_of`]) applies to the LLM only.

        Raises:
            OSError: the model is missing or damaged, or an adapter's backbone is missing or another one.
            ValueError: there are weight files that are not listed, or the configuration does not fit the weights.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        source, hub = pretrained_model_name_or_path, {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}
        stated, commit = read_stated(source, **hub)
        if commit is not None and (config is None or isinstance(config, PreTrainedConfig)):
            # What is checked is what is loaded, even if the repository changes in between.
            hub["revision"] = commit
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False: expected True, the other format can run code when it is loaded")
        check_other_weights(source, stated.get("weights_sha256"), **hub)
        files = check_weights(source, stated.get("weights_sha256"), kwargs.get("variant"), **hub)
        hub.pop("force_download", None)  # the files have been downloaded again
        kwargs = {name: value for name, value in kwargs.items() if name not in HUB_KEYWORDS}
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _restricted_to_llm(quantization_of(kwargs["quantization_config"]))
        if stated.get("weights") == "adapter":
            loaded = cls._from_adapter(source, stated, files, hub, *model_args, config=config, **kwargs)
        else:
            kwargs["use_safetensors"] = True
            if kwargs.get("state_dict") is None:
                described = config
                if not isinstance(config, PreTrainedConfig):
                    described = cls.config_class.from_pretrained(config or source, **hub)
                shapes = weight_shapes(files)
                lora = any(kwargs.get(field, getattr(described, field)) for field in ("lora", "vision_lora"))
                if lora and not any(".lora_" in name for name in shapes):
                    raise ValueError(
                        f"{source} has no adapters, but OTDRGConfig.lora or vision_lora is set: load it without, then "
                        "set config.lora and call add_lora()"
                    )
                check_shapes(place_of(source, hub), cls._on_meta(described), shapes)
            loaded = super().from_pretrained(source, *model_args, config=config, **hub, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._settle_quantization()
        # These describe files; the model in memory has all its weights and may be trained further.
        model.config.weights, model.config.weights_sha256 = "full", None
        return loaded

    @classmethod
    def _on_meta(cls, config: OTDRGConfig):
        """The model of a configuration, without memory for its weights."""
        with torch.device("meta"), getattr(init, "meta_device_safe_creation_ops", nullcontext)():
            return cls(copy.deepcopy(config))

    @classmethod
    def _from_adapter(cls, source, stated: dict, files: dict, hub: dict, *model_args, config=None, **kwargs):
        """The model of an adapter: the weights of its backbones, then those of its own `files`, then LoRA."""
        kwargs.pop("use_safetensors", None)
        kwargs.pop("variant", None)
        if not isinstance(config, PreTrainedConfig):
            config, kwargs = cls.config_class.from_pretrained(
                config or source, return_unused_kwargs=True, **hub, **kwargs
            )
        config = copy.deepcopy(config)
        # A configuration that was not read from beside the weights may not know of their backbones.
        for field in ("vision_backbone", "text_backbone"):
            setattr(config, field, getattr(config, field) or stated.get(field))
        for field in ("backbone_sha256", "backbone_revisions"):
            setattr(config, field, stated.get(field))
        weights, lora = _read_adapter(source, config, files, **hub)
        shapes = {name: tuple(weight.shape) for name, weight in (weights | lora).items()}
        check_shapes(place_of(source, hub), cls._on_meta(config), shapes)
        # LoRA is attached after the other weights are loaded and perhaps quantised: its layers depend on theirs.
        fields = {field: getattr(config, field) for field in ("lora", "vision_lora")}
        config.lora = config.vision_lora = None
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            None, *model_args, config=config, state_dict=weights, output_loading_info=True, **kwargs
        )
        model.config.update(fields)
        model._inject_lora(init_lora_weights=True)
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.data = weight.data.to(model.get_input_embeddings().weight.dtype)
        absent = model.load_state_dict(lora, strict=False)
        missing = [*info["missing_keys"], *(name for name in absent.missing_keys if ".lora_" in name)]
        unknown = [*info["unexpected_keys"], *absent.unexpected_keys]
        if missing or unknown:
            raise OSError(
                f"{source} does not fit its backbones: {len(missing)} weights are missing"
                f"{f', such as {missing[0]}' if missing else ''}, and {len(unknown)} are unknown"
                f"{f', such as {unknown[0]}' if unknown else ''}; it was saved with transformers "
                f"{config.transformers_version}, this is {transformers.__version__}"
            )
        model.generation_config = GenerationConfig.from_pretrained(source, **hub)
        model.name_or_path = str(source)
        return (model.eval(), info) if with_info else model.eval()

    # -- saving ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory, is_main_process: bool = True, *, weights: str = "full", **kwargs):
        """Write weights, their SHA-256, configuration, generation configuration and code; see `PreTrainedModel`.

        Args:
            save_directory (`str`): the folder.
            is_main_process (`bool`): whether this process is the one that writes.
            weights (`str`): `"full"` writes all weights, `"adapter"` those that differ from the backbones
                `config.vision_backbone` and `config.text_backbone`. `from_pretrained` loads either.
            kwargs: those of `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: the LLM is quantised and no `state_dict` is given in place of its weights; or an adapter has no
                backbones to refer to.
            OSError: a backbone cannot be loaded.
        """
        if weights not in ("full", "adapter"):
            raise ValueError(f"weights={weights!r}: expected 'full' or 'adapter'")
        if weights == "full" and self.is_llm_quantized and kwargs.get("state_dict") is None:
            raise ValueError(
                "the LLM is quantised: call merge_lora(), which dequantises it, before save_pretrained, or save with "
                "weights='adapter'"
            )
        self.config.auto_map = {
            **(getattr(self.config, "auto_map", None) or {}),
            "AutoModelForImageTextToText": "modeling_otdrg.OTDRGForReportGeneration",
            "AutoModelForMultimodalLM": "modeling_otdrg.OTDRGForReportGeneration",
        }
        self.config.custom_pipelines = {
            "image-to-text": {
                "impl": "pipeline_otdrg.ReportGenerationPipeline",
                "pt": ["AutoModelForImageTextToText"],
                "type": "multimodal",
            }
        }
        stated: dict[str, Any] = {"weights": weights, "weights_sha256": None}
        stated |= {"backbone_sha256": None, "backbone_revisions": None}
        if weights == "adapter" and is_main_process:
            backbones, facts = _backbone_weights(self.config, kwargs.get("token"))
            stated |= facts
            own = kwargs.pop("state_dict", None)
            own = self.state_dict() if own is None else own
            # Under the names that weights have in memory, by which they are compared and later put together.
            kwargs |= {
                "state_dict": _adapter_weights(own, backbones, self.is_llm_quantized),
                "save_original_format": False,
            }
        for field, parts in (("lora", (self.language_model,)), ("vision_lora", self.vision_towers)):
            if not any(map(_lora_layers, parts)):
                stated[field] = None  # LoRA that has not been attached
        # These fields describe files and not the model, which has all its weights.
        kept = {field: getattr(self.config, field) for field in stated} | {"weights": "full"}
        writes = is_main_process and not _is_another_rank()
        replaces = writes and kwargs.get("variant") is None
        try:
            self.config.update(stated)
            with replaced_weights(save_directory) if replaces else nullcontext():
                super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        finally:
            self.config.update(kept)
        if writes:
            record_sha256(save_directory)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # save_pretrained(push_to_hub=True) uploads before it returns, and the SHA-256 must be there by then. A private
        # method, because transformers has no other hook between writing and uploading.
        record_sha256(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


def _is_another_rank() -> bool:
    """Whether this is a process of a distributed run other than the first."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0


def _lora_layers(part: nn.Module) -> dict[str, Any]:
    """The layers of a part that have adapters, by name."""
    # Importing peft takes a large part of a second, and without it there are none.
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return {}
    return {name: module for name, module in part.named_modules() if isinstance(module, tuners.BaseTunerLayer)}


def quantization_of(quantization):
    """transformers' quantisation configuration.

    Args:
        quantization: `"4bit"` (NF4, quantised twice, computed in bfloat16), `"8bit"`, a dictionary of the fields of
            `BitsAndBytesConfig`, a configuration of transformers, which is returned as it is, or None.

    Raises:
        ValueError: another text, or a field that `BitsAndBytesConfig` does not have.
        ImportError: bitsandbytes is not installed.
    """
    if isinstance(quantization, str):
        if quantization not in QUANTIZATIONS:
            raise ValueError(
                f"quantization_config={quantization!r}: expected {', '.join(map(repr, QUANTIZATIONS))} or the fields "
                "of BitsAndBytesConfig"
            )
        quantization = QUANTIZATIONS[quantization]
    if not isinstance(quantization, dict):
        return quantization
    known = {"quant_method", *inspect.signature(BitsAndBytesConfig).parameters} - {"kwargs"}
    for field in quantization.keys() - known:
        raise ValueError(f"quantization_config.{field}: expected one of the fields of BitsAndBytesConfig")
    if find_spec("bitsandbytes") is None:
        raise ImportError("quantisation needs bitsandbytes: pip install bitsandbytes")
    return BitsAndBytesConfig(**{name: value for name, value in quantization.items() if name != "quant_method"})


def _restricted_to_llm(quantization_config):
    """A quantisation configuration that applies to the LLM only, unless it says itself which modules to skip."""
    quantization_config = copy.deepcopy(quantization_config)
    for field in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(quantization_config, field) and getattr(quantization_config, field) is None:
            setattr(quantization_config, field, list(_NEVER_QUANTIZED))
    return quantization_config


# --- backbones -------------------------------------------------------------------------------------------------------


def load_backbone(part: str, auto_class, reference: str, dtype=None, quantization_config=None, **hub):
    """A backbone or its tokenizer.

    Args:
        part (`str`): "vision", "text" or another name for error messages.
        auto_class: `AutoModel`, `AutoTokenizer` or the like.
        reference (`str`): Hub id, folder or, for text, a GGUF file.
        dtype (`str` or `torch.dtype`, *optional*): of the weights; the checkpoint's by default.
        quantization_config (*optional*): transformers' quantisation configuration.
        hub: keyword arguments out of `HUB_KEYWORDS`.

    Raises:
        OSError: it cannot be loaded; the message names the reference.
        ValueError: a GGUF file with `quantization_config`.
    """
    name, located = resolve_backbone(reference)
    kwargs: dict[str, Any] = {**located, **hub}
    is_gguf, is_model = "gguf_file" in kwargs, auto_class in _AUTO_CLASSES.values()
    if is_gguf and quantization_config is not None:
        raise ValueError(f"quantization_config: expected None for {reference}, which is dequantised")
    if dtype is not None:
        kwargs["dtype"] = dtype
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if is_model and not is_gguf:
        kwargs["use_safetensors"] = True  # the other format can run code when it is loaded
    if auto_class is AutoModelForCausalLM and is_gguf and hasattr(transformers, "GgufConfig"):
        # Newer versions of transformers keep the weights packed otherwise, and then they can be neither trained nor
        # saved.
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        if is_model and not is_gguf:
            weight_files(name, **hub)  # an index can name files of the other format
        loaded = auto_class.from_pretrained(name, **kwargs)
    except Exception as error:  # damaged files make transformers raise errors of any type
        raise OSError(
            f"{part} backbone {reference!r} could not be loaded: expected a Hub id, a folder written by save_pretrained"
            f"{', a timm/ name' if part == 'vision' else ''}{' or a .gguf file' if part == 'text' else ''} "
            f"({describe(error)})"
        ) from error
    if is_model and is_gguf:
        # The weights are dequantised now, but a model that says it is quantised refuses to be saved.
        loaded.hf_quantizer = None
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config
    return loaded


# --- adapters --------------------------------------------------------------------------------------------------------


def _backbone_weights(
    config: OTDRGConfig, token: str | bool | None = None
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, dict[str, Any]]]:
    """State dicts of the backbones "vision" and "text", and the fields `backbone_sha256` and `backbone_revisions`."""
    weights: dict[str, dict[str, torch.Tensor]] = {}
    facts: dict[str, dict[str, Any]] = {"backbone_sha256": {}, "backbone_revisions": {}}
    for part, auto_class in _AUTO_CLASSES.items():
        reference = getattr(config, f"{part}_backbone")
        if reference is None:
            raise ValueError(
                f"OTDRGConfig.{part}_backbone=None: expected the Hub id or folder the {part} backbone was taken from, "
                "which an adapter refers to"
            )
        where: dict[str, Any] = {"revision": _revision(config, part), "token": token}
        weights[part] = load_backbone(part, auto_class, reference, **where).state_dict()
        files = weight_files(reference, **where)
        facts["backbone_sha256"][part] = {name: sha256(path) for name, path in files.items()}
        facts["backbone_revisions"][part] = extract_commit_hash(str(next(iter(files.values()))), None)
    return weights, facts


def _adapter_weights(
    weights: Mapping[str, torch.Tensor], backbones: Mapping[str, Mapping[str, torch.Tensor]], quantized: bool
) -> dict[str, torch.Tensor]:
    """The weights of a model that its backbones do not have, found by comparing them, and those of LoRA.

    Quantised weights cannot be compared and are never trained. Names are those of the model without LoRA. If a matrix
    has the backbone's rows and more, only the additional ones are kept, under its name with the suffix `.added_rows`.
    """
    trained = {}
    for key, weight in weights.items():
        module, _, inner = key.partition(".")
        if module not in _BACKBONE_PARTS or ".lora_" in key:
            trained[key] = weight
            continue
        inner = inner.replace(".base_layer.", ".")
        name, theirs = f"{module}.{inner}", backbones[_BACKBONE_PARTS[module]].get(inner)
        if module == "language_model" and quantized and (theirs is None or not weight.is_floating_point()):
            continue
        same_rows = slice(len(theirs)) if theirs is not None and theirs.ndim else ...
        if theirs is None or not torch.equal(weight[same_rows], theirs.to(weight.device, weight.dtype)):
            trained[name] = weight
        elif weight.shape != theirs.shape:
            trained[name + _ADDED_ROWS] = weight[len(theirs) :].clone()
    return trained


def _read_adapter(
    source: str, config: OTDRGConfig, own_files: Mapping[str, Path], **hub
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of a model without LoRA, from its backbones and its adapter's files, and the weights of LoRA.

    Raises:
        OSError: a backbone cannot be loaded, or is not the one the adapter was trained on.
    """
    weights: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    # The adapter's own revision and subfolder do not apply to its backbones.
    shared = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
    for part, auto_class in _AUTO_CLASSES.items():
        reference, where = getattr(config, f"{part}_backbone"), {**shared, "revision": _revision(config, part)}
        _check_backbone(source, config, part, reference, where)
        backbone = load_backbone(part, auto_class, reference, **where).state_dict()
        for module, kind in _BACKBONE_PARTS.items():
            if kind == part and (module != "finding_vision_tower" or config.predictor_encoder == "own"):
                weights |= {f"{module}.{name}": weight for name, weight in backbone.items()}
                tied |= {f"{module}.{name}": f"{module}.{other}" for name, other in _tied(backbone)}
    own: dict[str, torch.Tensor] = {}
    for path in own_files.values():
        own |= load_file(path)
    lora: dict[str, torch.Tensor] = {}
    for key, weight in own.items():
        if key.endswith(_ADDED_ROWS):
            name = key.removesuffix(_ADDED_ROWS)
            weights[name] = torch.cat((weights[name], weight.to(weights[name].dtype)))
        elif ".lora_" in key:
            lora[key] = weight
        else:
            weights[key] = weight
            if key in tied and tied[key] not in own:
                # Tied weights are saved once: under the other name the backbone's old ones would be loaded.
                weights.pop(tied[key], None)
    return weights, lora


def _check_backbone(source: str, config: OTDRGConfig, part: str, reference: str, where: dict[str, Any]) -> None:
    """Compare the SHA-256 of a backbone's weight files with those that the adapter was trained on."""
    try:
        files = weight_files(reference, **where)
    except (OSError, ValueError) as error:
        raise OSError(
            f"{source} is an adapter of the {part} backbone {reference!r}, which could not be loaded: {describe(error)}"
        ) from error
    found = {name: sha256(path) for name, path in files.items()}
    expected = (config.backbone_sha256 or {}).get(part, {})
    others = [str(path.resolve()) for name, path in files.items() if found[name] != expected.get(name)]
    if others or len(found) != len(expected):
        remedy = ""
        if others and not Path(reference).exists():
            remedy = f"; if it was damaged on its way, delete {' '.join(others)} and load it anew"
        raise OSError(
            f"{source} is an adapter of another {part} backbone than {reference!r}: the SHA-256 of its weights "
            f"is {found}, expected {expected}{remedy}"
        )


def _tied(weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    """Pairs of names of the same weight, in both orders."""
    names: dict[int, str] = {}
    for name, weight in weights.items():
        other = names.setdefault(weight.data_ptr(), name)
        if other != name and weight.numel():
            yield from ((name, other), (other, name))


def _revision(config: OTDRGConfig, part: str) -> str:
    return (config.backbone_revisions or {}).get(part) or "main"


__all__ = ["QUANTIZATIONS", "OTDRGPreTrainedModel", "load_backbone", "quantization_of"]
