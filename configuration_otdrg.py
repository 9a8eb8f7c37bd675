"""Configuration of OTDRG.

Long, because every option of the model is declared, documented and checked here.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import cached_file, is_peft_available

from .findings_otdrg import FINDING_DISPLAY_NAMES, FINDING_STATES, FINDINGS
from .sections_otdrg import SECTIONS

DEFAULT_PROMPT = (
    "Generate a comprehensive diagnosis report for this radiology image. ###Focus on diagnostic accuracy###"
)
#: Buckets of the hash by which the label predictor knows the words of an indication.
INDICATION_BUCKETS = 4096
IMAGE_TOKEN, FINDING_TOKEN, FINDING_TEXT_TOKEN = "<image>", "<finding>", "<finding_text>"
_PLACEHOLDER_FIELDS = ("image_token_id", "finding_token_id", "finding_text_token_id")
#: Keyword arguments of `from_pretrained` that locate files.
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

#: Upper limits far beyond any real model, so that a wrong value is refused before it takes memory or time.
MAXIMUM_IMAGE_TOKENS, MAXIMUM_IMAGE_SIZE = 4096, 8192
_MAXIMUM_SIZE, _MAXIMUM_ITERATIONS, _MAXIMUM_PROMPT_TOKENS, _MAXIMUM_TEXT_TOKENS = 65_536, 100_000, 65_536, 1024
_MAXIMUM_RANK, _MAXIMUM_GRID = 4096, 64
_MAXIMUM_HEADS, _MAXIMUM_LAYERS, _MAXIMUM_TAGS = 64, 16, 4096
#: Fields of peft's LoraConfig that train or copy whole modules of the model, which merging could not undo.
_NOT_LORA_LAYERS = ("modules_to_save", "trainable_token_indices", "layer_replication")
#: Maximum counts in a backbone's configuration, by the ends of the names of its fields.
_MAXIMUM_COUNTS = {
    re.compile(r"(layers?|depths?|blocks?|stages?|experts)$"): 1000,
    re.compile(r"num_(labels|classes)$"): 100_000,
}


class OTDRGConfig(PreTrainedConfig):
    r"""
    Configuration of [`OTDRGForReportGeneration`]: two backbones and how they are connected.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the vision encoder, of any type `AutoModel` knows (timm through `timm_wrapper`).
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of a text-only LLM, of any type `AutoModelForCausalLM` knows: of a model for text and images
            that of its LLM, such as `gemma3_text` in place of `gemma3`; others are a `ValueError`.
        image_size (`int`, defaults to 224):
            Height and width in pixels to which the processor resizes each view.
        image_tokens (`int`, defaults to 49):
            Image tokens a view is pooled to, a square number (49 is the paper's 7 x 7).
        view_fusion (`str`, defaults to `"mean"`):
            `"mean"` averages the views' tokens (R2GenGPT), `"concat"` puts them one after another.
        projection_norm (`bool`, defaults to `True`):
            LayerNorm after both projections (eqs. 4 and 5), as R2GenGPT has.
        dle (`bool`, defaults to `True`):
            Disease labels reach the LLM (Table 3). Off: no label text and no label tokens.
        fiot (`bool`, defaults to `True`):
            Feature integration by optimal transport (3.3.2): label tokens in the prompt and the loss L_OT. Needs `dle`.
        label_encoder (`str`, defaults to `"embeddings"`):
            f_e(L) of eq. 3. `"embeddings"`: the LLM's own token embeddings of "finding: state", taken as constants,
            mean-pooled and centred over the 56 texts; `"text_encoder"`: any `AutoModel`, described by
            `label_encoder_config`, frozen, pooled and centred likewise; `"table"`: a learned 14 x 4 table.
        label_encoder_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the text encoder for `label_encoder="text_encoder"`.
        label_encoder_token_ids (`list[list[list[int]]]`, *optional*):
            Token ids of the 14 x 4 texts in that encoder's own tokenizer; set by `bind_label_tokenizer`.
        label_encoder_size (`int`, *optional*):
            Width of the `"table"`; the LLM's hidden size by default.
        finding_text (`str`, defaults to `"mentioned"`):
            Which findings the label text names: `"mentioned"` those not unmentioned, `"all"`, or `"none"`.
        finding_tokens (`str`, defaults to `"labels"`):
            Label tokens that the LLM reads. `"labels"`: the projected label features (eq. 5); `"transported"`: each
            plus the image transported to that label, N sum_m T_mj x_m over the projected image tokens. Needs `fiot`.
        ot_epsilon (`float`, defaults to 0.1):
            Entropic regularisation (eq. 8), in units of the cost.
        ot_max_iterations (`int`, defaults to 100):
            Most Sinkhorn iterations t (Algorithm 1).
        ot_tolerance (`float`, defaults to 1e-5):
            Sinkhorn stops for a study once the L1 error of its row marginals falls below this.
        ot_cost_normalization (`str`, defaults to `"none"`):
            `"none"`: Euclidean distance of the projected features (eq. 6); `"unit"`: of the L2-normalised ones.
        ot_labels (`str`, defaults to `"all"`):
            Label side of the transport: all 14 (the paper) or only the `"mentioned"` ones.
        ot_gradient (`str`, defaults to `"envelope"`):
            `"envelope"`: the plan is a constant in the backward pass; `"unroll"`: through the iterations.
        ot_weight (`float`, defaults to 0.1):
            lambda of eq. 12.
        ot_contrastive_weight (`float`, defaults to 0.0):
            Weight of a contrastive term: InfoNCE over -d_OT with other studies' labels in the batch as negatives.
        ot_contrastive_temperature (`float`, defaults to 0.1):
            Temperature of that term, as a share of the mean distance.
        focal_gamma (`float`, defaults to 2.0):
            gamma of eq. 10.
        focal_reduction (`str`, defaults to `"finding"`):
            `"finding"`: focal factor per finding, mean over studies and findings; `"study"`: the cross-entropies of a
            study are summed first (eq. 10 read literally).
        predictor_encoder (`str`, defaults to `"shared"`):
            Whose features the label predictor reads: `"shared"` those of the report's vision encoder, `"own"` those of
            a second encoder of the same `vision_config`, so that training the report's leaves the predictor as it is
            (3.4: it stands outside of the training of the report).
        predictor_dropout (`float`, defaults to 0.0):
            Dropout of the label predictor.
        predictor_heads (`int`, defaults to 1):
            Predictors that are initialised and supervised one by one; their probabilities are averaged.
        predictor_layers (`list[int]`, *optional*):
            Blocks of the vision encoder, counted from 1, whose tokens the predictor reads beside the encoder's output.
        predictor_grid (`int`, *optional*):
            Side P of the grid of tokens that the predictor reads of a view, a multiple of the side of the image tokens'
            grid, which is the default; at most that of the finest features it reads (`predictor_layers`). The LLM and
            FIOT read these tokens averaged to `image_tokens`.
        predictor_pooling (`str`, defaults to `"attention"`):
            How the predictor pools tokens for a finding. `"attention"`: one query per finding, and the mean beside it;
            `"mean"`, standardised by batch normalisation; `"transport"`: entropic transport (`predictor_epsilon`,
            `predictor_iterations`) between the tokens and 14 learned anchors, whose plan is then the heatmap.
        predictor_epsilon (`float`, defaults to 0.05):
            Entropic regularisation of that transport; its cost is the Euclidean distance of L2-normalised features.
        predictor_iterations (`int`, defaults to 20):
            Its Sinkhorn iterations, through which the gradient passes.
        predictor_tags (`list[str]`, *optional*):
            Further labels of studies that the predictor learns as an auxiliary target; set by training.
        indication_reader (`str`, defaults to `"report"`):
            What reads a study's indication: `"report"`, the LLM in its prompt; `"predictor"`, as a hashed bag of words
            that is added to its logits; or `"both"`. A study without an indication is predicted from its views alone.
        priors (`str`, defaults to `"none"`):
            What the LLM reads of an earlier study of the patient, where there is one: `"images"`, as image tokens
            marked by a learned embedding; `"report"`, as text in the prompt; `"both"`; or `"none"`. FIOT and the label
            predictor read the current views only, because the finding states are those of the current study.
        max_prior_tokens (`int`, defaults to 128):
            Longer prior reports are cut to this many tokens.
        predicted_state_ratio (`float`, defaults to 0.0):
            Share of training studies conditioned on predicted instead of given states (0 is the paper), drawn by
            the model's `expand_finding_text`.
        finding_state_dropout (`float`, defaults to 0.0):
            Probability that a finding is not given to the LLM in training, drawn for each finding of each study by
            `expand_finding_text`, so that the model can write without it. State guidance needs about 0.1. "No finding"
            is not given in half of the studies in which another finding is not.
        image_dropout (`float`, defaults to 0.0):
            Share of training studies whose image tokens the LLM reads as zeros. L_OT is computed as without it.
        finding_thresholds (`list[float]`, *optional*):
            14 probabilities above which a finding is predicted positive; without them the likeliest state wins.
        finding_calibration (`list[list[float]]`, *optional*):
            14 pairs of slope and intercept (Platt scaling): the calibrated log odds of "positive" are slope * log odds
            + intercept. The other states keep their proportions. Logits are not changed.
        lora (`dict` or `peft.LoraConfig`, *optional*):
            LoRA adapters in the LLM, by the fields of peft's `LoraConfig` (`r`, `lora_alpha`, `lora_dropout`,
            `target_modules`, `use_rslora`, `use_dora`, ...); stored as a dictionary. DoRA and `lora_bias` need an LLM
            that is not quantised.
        vision_lora (`dict` or `peft.LoraConfig`, *optional*):
            LoRA adapters in the vision encoder and in the predictor's own: `target_modules` are `["qkv"]` in timm's
            encoders and `["q_proj", "v_proj"]` in DINOv2.
        report_sections (`list[str]`, *optional*):
            The sections of the reports, `["findings", "impression"]`, each below its heading, which the pipeline also
            returns apart; without them a report is one text. Set by training, from the training reports.
        prompt (`str`, *optional*):
            Instruction after the image; the paper's by default.
        image_token_id, finding_token_id, finding_text_token_id (`int`, *optional*):
            Ids of the placeholders for image tokens, label tokens and the label text; set by `bind_tokenizer`.
        prompt_token_ids (`list[int]`, *optional*):
            Token ids of the default prompt for one view; set by the processor, used by `generate` without `input_ids`.
        finding_text_token_ids (`list[list[list[int]]]`, *optional*):
            Token ids of the 14 x 4 texts "finding: state"; set by `bind_tokenizer`.
        vision_backbone, text_backbone (`str`, *optional*):
            Hub ids the backbones' weights were taken from; folders and GGUF files are fine in an adapter of one's own.
        weights (`str`, defaults to `"full"`):
            What the weight files beside this configuration hold: `"full"` all weights, `"adapter"` those that
            `vision_backbone` and `text_backbone` do not have. A model that is loaded has all.
        weights_sha256 (`dict[str, str]`, *optional*):
            SHA-256 of each of these files, checked when they are loaded; written by `save_pretrained`.
        backbone_sha256 (`dict[str, dict[str, str]]`, *optional*):
            Of an adapter: SHA-256 of each weight file of its backbones, "vision" and "text"; others are refused.
        backbone_revisions (`dict[str, str]`, *optional*):
            Of an adapter: the commits of its backbones on the Hub.
    """

    model_type = "otdrg"
    # A list, because transformers' Trainer adds one to it.
    keys_to_ignore_at_inference = ["cache", "past_key_values", "hidden_states", "attentions", "image_outputs"]  # noqa: RUF012
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig, "label_encoder_config": AutoConfig}  # noqa: RUF012

    #: Fields that `encode_views` does not depend on. Cached features are valid for one set of values of all the others,
    #: so list a new field here if it does not change the features.
    _NOT_IN_VIEW_FEATURES = frozenset(
        {
            *("text_config", "text_backbone", "vision_backbone", "lora", "view_fusion", "projection_norm", "dle"),
            *("fiot", "label_encoder", "label_encoder_config", "label_encoder_token_ids", "label_encoder_size"),
            *("ot_epsilon", "ot_max_iterations", "ot_tolerance", "ot_cost_normalization", "ot_labels", "ot_gradient"),
            *("ot_weight", "ot_contrastive_weight", "ot_contrastive_temperature", "focal_gamma", "focal_reduction"),
            *("predictor_dropout", "predictor_heads", "predictor_pooling", "predictor_epsilon", "predictor_iterations"),
            *("predictor_tags", "indication_reader", "predicted_state_ratio", "finding_state_dropout", "image_dropout"),
            *("priors", "max_prior_tokens"),
            *("finding_thresholds", "finding_calibration", "finding_text", "report_sections", "prompt"),
            *("image_token_id", "finding_token_id", "finding_text_token_id", "prompt_token_ids"),
            *(
                "finding_tokens",
                "finding_text_token_ids",
                "weights",
                "weights_sha256",
                "backbone_sha256",
                "backbone_revisions",
            ),
            # Written by transformers or `save_pretrained`.
            *("auto_map", "custom_pipelines", "processor_class", "tie_word_embeddings", "use_cache"),
        }
    )

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict | None = None,
        text_config: PreTrainedConfig | dict | None = None,
        *,
        image_size: int = 224,
        image_tokens: int = 49,
        view_fusion: str = "mean",
        projection_norm: bool = True,
        dle: bool = True,
        fiot: bool = True,
        label_encoder: str = "embeddings",
        label_encoder_config: PreTrainedConfig | dict | None = None,
        label_encoder_token_ids: list[list[list[int]]] | None = None,
        label_encoder_size: int | None = None,
        finding_text: str = "mentioned",
        finding_tokens: str = "labels",
        ot_epsilon: float = 0.1,
        ot_max_iterations: int = 100,
        ot_tolerance: float = 1e-5,
        ot_cost_normalization: str = "none",
        ot_labels: str = "all",
        ot_gradient: str = "envelope",
        ot_weight: float = 0.1,
        ot_contrastive_weight: float = 0.0,
        ot_contrastive_temperature: float = 0.1,
        focal_gamma: float = 2.0,
        focal_reduction: str = "finding",
        predictor_encoder: str = "shared",
        predictor_dropout: float = 0.0,
        predictor_heads: int = 1,
        predictor_layers: list[int] | None = None,
        predictor_grid: int | None = None,
        predictor_pooling: str = "attention",
        predictor_epsilon: float = 0.05,
        predictor_iterations: int = 20,
        predictor_tags: list[str] | None = None,
        indication_reader: str = "report",
        priors: str = "none",
        max_prior_tokens: int = 128,
        predicted_state_ratio: float = 0.0,
        finding_state_dropout: float = 0.0,
        image_dropout: float = 0.0,
        finding_thresholds: list[float] | None = None,
        finding_calibration: list[list[float]] | None = None,
        lora: Any = None,
        vision_lora: Any = None,
        report_sections: list[str] | None = None,
        prompt: str = DEFAULT_PROMPT,
        image_token_id: int | None = None,
        finding_token_id: int | None = None,
        finding_text_token_id: int | None = None,
        prompt_token_ids: list[int] | None = None,
        finding_text_token_ids: list[list[list[int]]] | None = None,
        vision_backbone: str | None = None,
        text_backbone: str | None = None,
        weights: str = "full",
        weights_sha256: dict[str, str] | None = None,
        backbone_sha256: dict[str, dict[str, str]] | None = None,
        backbone_revisions: dict[str, str] | None = None,
        **kwargs,
    ):
        fields = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        for name, value in fields.items():
            setattr(self, name, _sub_config(name, value) if name in self.sub_configs else value)
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        _check_counts("", kwargs)
        super().__init__(**kwargs)
        self.check_fields()

    def check_fields(self) -> None:
        """Raises `ValueError` if a field is wrong; the message names the field, its value and what is allowed."""

        def need(condition: bool, field: str, allowed: str) -> None:
            if not condition:
                raise ValueError(f"OTDRGConfig.{field}={_shown(getattr(self, field))}: expected {allowed}")

        check_values("OTDRGConfig", {field: getattr(self, field) for field in ALLOWED_VALUES})
        need(round(self.image_tokens**0.5) ** 2 == self.image_tokens, "image_tokens", "a square number, such as 49")
        need(
            self.view_grid % self.image_grid == 0,
            "predictor_grid",
            f"a multiple of {self.image_grid}, the side of the image tokens' grid, or null",
        )
        need(self.dle or not self.fiot, "fiot", "false when dle is false (label tokens need labels)")
        need(
            self.fiot or self.finding_tokens == "labels",
            "finding_tokens",
            "labels when fiot is false (only FIOT has label tokens)",
        )
        need(
            self.label_encoder != "text_encoder" or self.label_encoder_config is not None,
            "label_encoder",
            "another encoder, or a label_encoder_config beside it",
        )
        for field in ("lora", "vision_lora"):
            setattr(self, field, _lora_fields(field, getattr(self, field)))
        size = self.text_config.vocab_size
        if not _is_int(size):
            raise ValueError(f"OTDRGConfig.text_config.vocab_size={_shown(size)}: expected a number of tokens")
        prompt, texts = self.prompt_token_ids, self.finding_text_token_ids
        for field, tokens in (
            *((field, [getattr(self, field)]) for field in _PLACEHOLDER_FIELDS if getattr(self, field) is not None),
            ("finding_text_token_ids", [token for row in texts or () for text in row for token in text]),
            ("prompt_token_ids", prompt or ()),
        ):
            is_valid = isinstance(tokens, (list, tuple)) and all(_is_int(token, 0, size - 1) for token in tokens)
            what = "a token id" if field in _PLACEHOLDER_FIELDS else "token ids"
            need(is_valid, field, f"{what} from 0 to {size - 1} (the LLM's vocab_size is {size})")
        need(
            prompt is None or (0 < len(prompt) <= _MAXIMUM_PROMPT_TOKENS and self.image_token_id in prompt),
            "prompt_token_ids",
            f"up to {_MAXIMUM_PROMPT_TOKENS:,} token ids, image_token_id among them",
        )

    def bind_label_tokenizer(self, tokenizer) -> None:
        """Record the ids of the 14 x 4 label texts in the tokenizer of the label encoder's own text encoder."""
        self.label_encoder_token_ids = [
            [tokenizer.encode(_label_text(name, state)) for state in FINDING_STATES] for name in FINDINGS
        ]

    def bind_tokenizer(self, tokenizer) -> None:
        """Add the placeholders to `tokenizer` and record their ids and those of the 14 x 4 label texts.

        The LLM's `vocab_size` grows to the tokenizer's where it is smaller; a model that exists already must be
        resized to it (`from_backbones` does).
        """
        placeholders = [IMAGE_TOKEN, FINDING_TOKEN, FINDING_TEXT_TOKEN]
        tokenizer.add_special_tokens({"additional_special_tokens": placeholders}, replace_extra_special_tokens=False)
        ids = tokenizer.convert_tokens_to_ids(placeholders)
        self.text_config.vocab_size = max(self.text_config.vocab_size, len(tokenizer))
        for field, token in zip(_PLACEHOLDER_FIELDS, ids, strict=True):
            setattr(self, field, token)
        self.finding_text_token_ids = [
            [tokenizer.encode(f" {_label_text(name, state)};", add_special_tokens=False) for state in FINDING_STATES]
            for name in FINDINGS
        ]
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(tokenizer, field) is not None:
                setattr(self.text_config, field, getattr(tokenizer, field))
        self.check_fields()

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """The content of a `config.json`, as in `PreTrainedConfig`, but a missing file is an `OSError`."""
        content, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not content.get("model_type"):
            place = place_of(pretrained_model_name_or_path, kwargs)
            raise OSError(f"{place} has no config.json with a model_type: expected a model")
        return content, rest

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields to save, without the folders on this machine that the parts were loaded from."""
        saved = super().to_diff_dict()
        for part in self.sub_configs:
            (saved.get(part) or {}).pop("_name_or_path", None)
        return saved

    def vision_fields(self) -> dict[str, Any]:
        """The fields that the features of `encode_views` depend on: all but those declared not to."""
        others = self._NOT_IN_VIEW_FEATURES.union(PreTrainedConfig().to_dict())
        fields = {name: value for name, value in self.to_dict().items() if name not in others}
        if self.predictor_grid is None:
            # Features that were cached before this field existed stay valid.
            del fields["predictor_grid"]
        return fields

    @property
    def placeholder_token_ids(self) -> list[int]:
        """Ids of the placeholder tokens that are set."""
        ids = (getattr(self, field) for field in _PLACEHOLDER_FIELDS)
        return [token for token in ids if token is not None]

    @property
    def text_positions(self) -> int | None:
        """Most tokens that the LLM reads and writes together; None if it states no maximum."""
        return getattr(self.text_config, "max_position_embeddings", None)

    @property
    def reads_prior_images(self) -> bool:
        """Whether the model reads the views of prior studies."""
        return self.priors in ("images", "both")

    @property
    def image_grid(self) -> int:
        """Side of the grid of image tokens of one view."""
        return round(self.image_tokens**0.5)

    @property
    def view_grid(self) -> int:
        """Side P of the grid of the features of `encode_views`: `predictor_grid`, or that of the image tokens."""
        return self.predictor_grid or self.image_grid

    @classmethod
    def from_preset(cls, name: str, **overrides) -> OTDRGConfig:
        """A named configuration.

        `"tiny"`: a narrow timm ResNet-10 and a small LLaMA, both from scratch, for CPUs (a Swin as small learns far
        more slowly from few images); `"small"`: DINOv2-small and SmolLM2-135M; `"paper"`: Swin-B/224 and
        Llama-2-7b-chat (sections 3.2.2 and 4). Fields in `overrides` win; a dictionary given for `vision_config` or
        `text_config` is merged into the preset's.

        Raises:
            ValueError: no such preset, or an override the configuration does not have.
        """
        if name not in _PRESETS:
            raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(_PRESETS)}")
        fields = _PRESETS[name]()
        unknown = set(overrides) - set(cls.__init__.__annotations__)
        if unknown:
            raise ValueError(
                f"unknown OTDRGConfig field {sorted(unknown)[0]!r}: see OTDRGConfig for the fields there are"
            )
        for part in ("vision_config", "text_config"):
            if isinstance(overrides.get(part), dict) and "model_type" not in overrides[part]:
                fields[part] = {**fields[part], **overrides.pop(part)}
        return cls(**{**fields, **overrides})


def _label_text(finding: str, state: str) -> str:
    return f"{FINDING_DISPLAY_NAMES[finding].lower()}: {state}"


def place_of(source: str | os.PathLike, hub: Mapping[str, Any]) -> str:
    """A folder or a Hub id, joined with the `subfolder` in keyword arguments of `from_pretrained`."""
    return os.path.join(source, hub.get("subfolder") or "").rstrip("/\\")


def find_file(source: str | os.PathLike, name: str, **hub) -> str | None:
    """The path of a file of a folder or Hub repository, downloaded if need be; None if there is no such file.

    The argument is private, but the public way raises the same error for a missing file and a missing network.
    """
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)


def resolve_backbone(reference: str) -> tuple[str, dict[str, str]]:
    """Name and keyword arguments of `from_pretrained` for a backbone: a GGUF file is given by its folder and name."""
    path = Path(reference)
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    return str(reference), {}


def _is_int(value, least: float = 0, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _lora_fields(field: str, lora) -> dict[str, Any] | None:
    """The fields of a `LoraConfig`, given as such or as a dictionary, as JSON has them; checked by peft itself.

    Raises:
        ValueError: a field is wrong, or describes more than LoRA layers.
    """
    if lora is None:
        return None
    if not isinstance(lora, dict) and hasattr(lora, "to_dict"):
        defaults = type(lora)().to_dict()
        lora = {name: value for name, value in lora.to_dict().items() if value != defaults[name]}
    if not isinstance(lora, dict):
        raise ValueError(f"OTDRGConfig.{field}={_shown(lora)}: expected the fields of peft.LoraConfig")
    lora = {name: sorted(value) if isinstance(value, set) else value for name, value in lora.items()}
    if not _is_int(lora.get("r", 8), 1, _MAXIMUM_RANK):
        raise ValueError(f"OTDRGConfig.{field}.r={_shown(lora['r'])}: expected an integer from 1 to {_MAXIMUM_RANK:,}")
    for name in _NOT_LORA_LAYERS:
        if lora.get(name):
            raise ValueError(f"OTDRGConfig.{field}.{name}={_shown(lora[name])}: expected null, only LoRA is supported")
    if is_peft_available():
        try:
            import_module("peft").LoraConfig(**lora)
        except (TypeError, ValueError) as error:
            reason = str(error).replace("LoraConfig.__init__() ", "")
            raise ValueError(
                f"OTDRGConfig.{field}={_shown(lora)}: {reason}, expected peft.LoraConfig's fields"
            ) from None
    return lora


def _is_id_list(value, most: int) -> bool:
    return isinstance(value, (list, tuple)) and 0 < len(value) <= most and all(map(_is_int, value))


def _is_set(value) -> bool:
    return len(set(value)) == len(value)


def _is_table(value) -> bool:
    """Whether a value has a list of token ids for each state of each finding."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == len(FINDINGS)
        and all(isinstance(row, (list, tuple)) and len(row) == len(FINDING_STATES) for row in value)
        and all(_is_id_list(ids, _MAXIMUM_TEXT_TOKENS) for row in value for ids in row)
    )


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in choices, "one of " + ", ".join(map(repr, choices))


def _count(most: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: _is_int(value, 1, most), f"a positive integer up to {most:,}"


def _or_none(allowed: tuple[Callable[[Any], bool], str]) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value is None or allowed[0](value), allowed[1]


_FLAG = (lambda value: isinstance(value, bool), "true or false")
_ABOVE_0 = (lambda value: _is_number(value) and value > 0, "a number above 0")
_PROBABILITY = (lambda value: _is_number(value) and 0 <= value < 1, "0 <= p < 1")
_AT_LEAST_0 = (lambda value: _is_number(value) and value >= 0, "a number of at least 0")
_TEXT_TABLE = (
    _is_table,
    f"{len(FINDINGS)} x {len(FINDING_STATES)} lists of token ids, none empty, of at most {_MAXIMUM_TEXT_TOKENS:,} each",
)
#: For each field, the check of its value and what is allowed, in words.
ALLOWED_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "image_size": _count(MAXIMUM_IMAGE_SIZE),
    "image_tokens": _count(MAXIMUM_IMAGE_TOKENS),
    "view_fusion": _one_of("mean", "concat"),
    "projection_norm": _FLAG,
    "dle": _FLAG,
    "fiot": _FLAG,
    "label_encoder": _one_of("embeddings", "text_encoder", "table"),
    "label_encoder_token_ids": _or_none(_TEXT_TABLE),
    "label_encoder_size": _or_none(_count(_MAXIMUM_SIZE)),
    "finding_text": _one_of("mentioned", "all", "none"),
    "finding_tokens": _one_of("labels", "transported"),
    "ot_epsilon": _ABOVE_0,
    "ot_max_iterations": _count(_MAXIMUM_ITERATIONS),
    "ot_tolerance": _AT_LEAST_0,
    "ot_cost_normalization": _one_of("none", "unit"),
    "ot_labels": _one_of("all", "mentioned"),
    "ot_gradient": _one_of("envelope", "unroll"),
    "ot_weight": _AT_LEAST_0,
    "ot_contrastive_weight": _AT_LEAST_0,
    "ot_contrastive_temperature": _ABOVE_0,
    "focal_gamma": _AT_LEAST_0,
    "focal_reduction": _one_of("finding", "study"),
    "predictor_encoder": _one_of("shared", "own"),
    "predictor_dropout": _PROBABILITY,
    "predictor_heads": _count(_MAXIMUM_HEADS),
    "predictor_layers": (
        lambda value: value is None or (_is_id_list(value, _MAXIMUM_LAYERS) and 0 not in value and _is_set(value)),
        "numbers of blocks of the vision encoder, from 1 on and each once, or null",
    ),
    "predictor_grid": _or_none(_count(_MAXIMUM_GRID)),
    "predictor_pooling": _one_of("attention", "mean", "transport"),
    "predictor_epsilon": _ABOVE_0,
    "predictor_iterations": _count(_MAXIMUM_ITERATIONS),
    "predictor_tags": (
        lambda value: (
            value is None
            or (
                isinstance(value, (list, tuple))
                and 0 < len(value) <= _MAXIMUM_TAGS
                and all(isinstance(tag, str) for tag in value)
                and _is_set(value)
            )
        ),
        f"up to {_MAXIMUM_TAGS:,} different strings, or null",
    ),
    "indication_reader": _one_of("report", "predictor", "both"),
    "priors": _one_of("none", "images", "report", "both"),
    "max_prior_tokens": _count(_MAXIMUM_PROMPT_TOKENS),
    "predicted_state_ratio": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "finding_state_dropout": _PROBABILITY,
    "report_sections": (
        lambda value: value is None or (isinstance(value, (list, tuple)) and tuple(value) == SECTIONS),
        f"{list(SECTIONS)}, or null",
    ),
    "image_dropout": _PROBABILITY,
    "finding_thresholds": (
        lambda value: (
            value is None
            or (
                isinstance(value, (list, tuple))
                and len(value) == len(FINDINGS)
                and all(_is_number(threshold) and 0 <= threshold <= 1 for threshold in value)
            )
        ),
        f"{len(FINDINGS)} numbers from 0 to 1",
    ),
    "finding_calibration": (
        lambda value: (
            value is None
            or (
                isinstance(value, (list, tuple))
                and len(value) == len(FINDINGS)
                and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value)
                and all(_is_number(number) for pair in value for number in pair)
            )
        ),
        f"{len(FINDINGS)} pairs of numbers, or null",
    ),
    "prompt": (lambda value: isinstance(value, str), "a string"),
    "finding_text_token_ids": _or_none(_TEXT_TABLE),
    "weights": _one_of("full", "adapter"),
}


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 1000 else f"{text[:1000]}..."


def _check_counts(place: str, fields: dict) -> None:
    """Refuse an impossible number of layers or labels, which transformers would build one by one.

    Raises:
        ValueError: names the field.
    """
    for name, value in fields.items():
        if isinstance(value, dict):
            _check_counts(f"{place}{name}.", value)
            continue
        for pattern, most in _MAXIMUM_COUNTS.items():
            if pattern.search(str(name)):
                for count in value if isinstance(value, (list, tuple)) else [value]:
                    if _is_int(count, -math.inf) and not 0 <= count <= most:
                        raise ValueError(f"OTDRGConfig.{place}{name}={_shown(value)}: expected 0 to {most:,}")


def check_values(owner: str, fields: Mapping[str, Any]) -> None:
    """Check values of fields that `ALLOWED_VALUES` knows.

    Raises:
        ValueError: names the owner, the field, its value and what is allowed.
    """
    for name, value in fields.items():
        is_allowed, allowed = ALLOWED_VALUES[name]
        if not is_allowed(value):
            raise ValueError(f"{owner}.{name}={_shown(value)}: expected {allowed}")


#: `model_type` of a part whose configuration has none.
_DEFAULT_PARTS = {"vision_config": "timm_wrapper", "text_config": "llama"}


def _sub_config(field: str, value) -> PreTrainedConfig | None:
    """The configuration of a part, given as such, as a dictionary or as None."""
    default = _DEFAULT_PARTS.get(field)
    if value is None and default is not None:
        return CONFIG_MAPPING[default]()
    if value is None:
        return None
    if isinstance(value, PreTrainedConfig):
        return _text_only(value) if field == "text_config" else value
    if not isinstance(value, dict):
        raise ValueError(f"OTDRGConfig.{field}={_shown(value)}: expected a mapping")
    model_type = value.get("model_type", default)
    _check_counts(f"{field}.", value)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(f"OTDRGConfig.{field}.model_type={model_type!r}: expected a model type transformers knows")
    made = CONFIG_MAPPING[model_type](**value)
    return _text_only(made) if field == "text_config" else made


def _text_only(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of an LLM, unless it is that of a model of more than text, which holds another."""
    inner = config.get_text_config()
    if inner is not config:
        raise ValueError(
            f"OTDRGConfig.text_config.model_type={config.model_type!r}: expected a text-only LLM, such as "
            f"{inner.model_type}"
        )
    return config


def _tiny() -> dict:
    return {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "resnet10t",
            # A stride of 16 gives 112-pixel views the paper's 7 x 7 grid.
            "model_args": {"channels": [16, 32, 64, 128], "stem_width": 8, "output_stride": 16},
            # timm's own initialisation is lost; at such widths the usual 0.02 would start training late.
            "initializer_range": 0.1,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "initializer_range": 0.08,
            "tie_word_embeddings": True,
        },
        "image_size": 112,
        "ot_cost_normalization": "unit",
    }


_LORA = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}


def _small() -> dict:
    return {
        "vision_config": {
            "model_type": "dinov2",
            "hidden_size": 384,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "image_size": 518,
            "patch_size": 14,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        },
        "lora": dict(_LORA),
        "ot_cost_normalization": "unit",
        "ot_epsilon": 0.01,
        "vision_backbone": "facebook/dinov2-small",
        "text_backbone": "HuggingFaceTB/SmolLM2-135M-Instruct",
    }


def _paper() -> dict:
    return {
        "vision_config": {"model_type": "timm_wrapper", "architecture": "swin_base_patch4_window7_224"},
        "text_config": {"model_type": "llama"},
        "lora": dict(_LORA),
        "vision_backbone": "timm/swin_base_patch4_window7_224.ms_in22k_ft_in1k",
        "text_backbone": "meta-llama/Llama-2-7b-chat-hf",
    }


_PRESETS = {"tiny": _tiny, "small": _small, "paper": _paper}

OTDRGConfig.register_for_auto_class()
if __name__ == "otdrg.configuration_otdrg":  # the installed package, not a copy that came with weights
    AutoConfig.register("otdrg", OTDRGConfig, exist_ok=True)

__all__ = [
    "DEFAULT_PROMPT",
    "HUB_KEYWORDS",
    "INDICATION_BUCKETS",
    "OTDRGConfig",
    "check_values",
    "find_file",
    "place_of",
    "resolve_backbone",
]
