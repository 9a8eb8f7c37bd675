"""OTDRG: a vision encoder, a label predictor, feature integration by optimal transport, and an LLM that writes reports.

The whole model is one module because it is what ships to the Hub, where a model is one file beside its configuration.
Section and equation numbers are those of "Bridging Vision and Language: Optimal Transport-Driven Radiology Report
Generation via LLMs".
"""

from __future__ import annotations

import copy
import inspect
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.utils import can_return_tuple, is_peft_available, logging

from .configuration_otdrg import FINDING_TEXT_TOKEN, OTDRGConfig, place_of, resolve_backbone
from .findings_otdrg import FINDING_STATES, FINDINGS, POSITIVE, UNMENTIONED, check_finding_states
from .weights_otdrg import (
    HUB_KEYWORDS,
    adapter_weights,
    backbone_weights,
    check_other_weights,
    check_shapes,
    check_weights,
    load_backbone,
    read_adapter,
    read_stated,
    record_sha256,
    remove_former_weights,
    weight_shapes,
)

if is_peft_available():
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

if TYPE_CHECKING:
    # Never run: this is what makes `save_pretrained` copy all our files beside the weights.
    from .pipeline_otdrg import ReportGenerationPipeline  # noqa: F401
    from .processing_otdrg import OTDRGProcessor  # noqa: F401

logger = logging.get_logger(__name__)

NO_FINDING, SUPPORT_DEVICES = FINDINGS.index("no_finding"), FINDINGS.index("support_devices")

#: What transformers calls an LLM's key-value cache: `cache` from 5.24 on.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)


# --- optimal transport (3.3.2) ---------------------------------------------------------------------------------------


@dataclass
class SinkhornOutput(ModelOutput):
    """
    Result of [`sinkhorn`] for B problems of M rows and N columns, in float32 (float64 for a float64 cost).

    Args:
        distance (`torch.Tensor` of shape `(B,)`): the transport cost <T, C>.
        regularized (`torch.Tensor` of shape `(B,)`): the minimised objective <T, C> + epsilon * sum T log T.
        plan (`torch.Tensor` of shape `(B, M, N)`): the transport plan T; 0 in masked rows and columns.
        iterations (`torch.Tensor` of shape `(B,)`): iterations each problem ran.
        marginal_error (`torch.Tensor` of shape `(B,)`): L1 distance of the plan's row sums from their marginal.
    """

    distance: torch.Tensor | None = None
    regularized: torch.Tensor | None = None
    plan: torch.Tensor | None = None
    iterations: torch.Tensor | None = None
    marginal_error: torch.Tensor | None = None


def cost_matrix(x: torch.Tensor, y: torch.Tensor, normalization: str = "none") -> torch.Tensor:
    """Euclidean distance of every row of `x` (B, M, D) from every row of `y` (B, N, D), float32 (B, M, N) (eq. 6).

    `normalization="unit"` scales every feature to length 1 first. Coincident points have cost and gradient 0.
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x, y = x.to(dtype), y.to(dtype)
        if normalization == "unit":
            x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def sinkhorn(
    cost: torch.Tensor,
    epsilon: float = 0.1,
    max_iterations: int = 100,
    tolerance: float = 1e-5,
    row_mask: torch.Tensor | None = None,
    column_mask: torch.Tensor | None = None,
    gradient: str = "envelope",
) -> SinkhornOutput:
    r"""Entropic optimal transport between uniform marginals (eqs. 7 and 8, Algorithm 1), computed stably.

    Minimises <T, C> + epsilon * sum T log T over plans T with row sums u and column sums v, uniform over the unmasked
    rows and columns. The iterations are Algorithm 1's, on logarithms: its kernel exp(-C / epsilon) underflows to 0, and
    the result to NaN, as soon as costs exceed about 100 epsilon. A problem with no unmasked row or column has distance
    0 and plan 0.

    Args:
        cost (`torch.Tensor` of shape `(B, M, N)`): of any float type and scale; masked entries are ignored.
        epsilon (`float`): weight of the entropy, in units of the cost.
        max_iterations (`int`): most iterations; each updates the rows and then the columns.
        tolerance (`float`): a problem stops once its marginal error is at most this; 0 runs all iterations.
        row_mask, column_mask (`torch.Tensor` of shape `(B, M)` and `(B, N)`, *optional*): true where there is mass.
        gradient (`str`): `"envelope"` treats the plan as a constant, so that the derivative of both values by the cost
            is the plan; `"unroll"` differentiates through the iterations.

    Returns:
        [`SinkhornOutput`]

    Raises:
        ValueError: `cost` is not (B, M, N), a mask does not fit it, or epsilon is not above 0.
    """
    if cost.ndim != 3:
        raise ValueError(f"cost has shape {tuple(cost.shape)}: expected (batch, rows, columns)")
    if not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}: expected a number above 0")
    if gradient not in ("envelope", "unroll"):
        raise ValueError(f"gradient is {gradient!r}: expected 'envelope' or 'unroll'")
    batch, rows, columns = cost.shape
    if row_mask is None:
        row_mask = torch.ones(batch, rows, dtype=torch.bool, device=cost.device)
    if column_mask is None:
        column_mask = torch.ones(batch, columns, dtype=torch.bool, device=cost.device)
    for name, mask, shape in (("row_mask", row_mask, (batch, rows)), ("column_mask", column_mask, (batch, columns))):
        if tuple(mask.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(mask.shape)}: expected {shape}")

    with torch.autocast(cost.device.type, enabled=False):
        cost = cost.to(torch.float64 if cost.dtype == torch.float64 else torch.float32)
        row_mask, column_mask = row_mask.bool(), column_mask.bool()
        mask = row_mask[:, :, None] & column_mask[:, None, :]
        cost = cost.masked_fill(~mask, 0.0)
        with torch.set_grad_enabled(gradient == "unroll" and torch.is_grad_enabled()):
            plan, iterations, marginal_error = _sinkhorn_plan(
                cost, epsilon, max_iterations, tolerance, row_mask, column_mask
            )
        distance = (plan * cost).sum(dim=(1, 2))
        return SinkhornOutput(
            distance=distance,
            regularized=distance - epsilon * plan_entropy(plan),
            plan=plan,
            iterations=iterations,
            marginal_error=marginal_error,
        )


def _sinkhorn_plan(cost, epsilon, max_iterations, tolerance, row_mask, column_mask):
    # A problem without mass on a side is solved as if it were everywhere, and set to 0 at the end.
    solvable = row_mask.any(dim=1) & column_mask.any(dim=1)
    row_mask, column_mask = row_mask | ~solvable[:, None], column_mask | ~solvable[:, None]
    mask = row_mask[:, :, None] & column_mask[:, None, :]
    # A constant added to all costs leaves the plan as it is; without it the float32 exponents are more exact.
    shift = cost.masked_fill(~mask, torch.inf).amin(dim=(1, 2), keepdim=True)
    log_kernel = ((shift - cost) / epsilon).masked_fill(~mask, 0.0)
    # Masked rows and columns weigh nothing in the sums below because their own potential stays at minus infinity.
    log_u = -row_mask.sum(dim=1, keepdim=True).to(cost.dtype).log()
    log_v = -column_mask.sum(dim=1, keepdim=True).to(cost.dtype).log()
    u = log_u.exp() * row_mask

    def log_row_sums(g):
        return (log_kernel + g[:, None, :]).logsumexp(dim=2)

    # f and g are the logarithms of Algorithm 1's alpha and beta; beta starts at 1 / N.
    g = log_v.expand(column_mask.shape).masked_fill(~column_mask, -torch.inf)
    f = torch.zeros_like(u)
    row_sums = log_row_sums(g)
    active = torch.ones_like(solvable)
    iterations = torch.zeros(len(cost), dtype=torch.long, device=cost.device)
    for _ in range(max_iterations):
        new_f = (log_u - row_sums).masked_fill(~row_mask, -torch.inf)
        new_g = (log_v - (log_kernel + new_f[:, :, None]).logsumexp(dim=1)).masked_fill(~column_mask, -torch.inf)
        # A problem that is done stays as it is, so that a batch gives exactly what its problems give alone.
        keep = active[:, None]
        f, g = torch.where(keep, new_f, f), torch.where(keep, new_g, g)
        row_sums = torch.where(keep, log_row_sums(g), row_sums)
        iterations = iterations + active
        if tolerance > 0:
            active = active & (((f + row_sums).exp() - u).abs().sum(dim=1) > tolerance)
            if not active.any():
                break
    plan = (log_kernel + f[:, :, None] + g[:, None, :]).exp()
    plan = torch.where(solvable[:, None, None] & mask, plan, torch.zeros_like(plan))
    marginal_error = torch.where(solvable, (plan.sum(dim=2) - u).abs().sum(dim=1), torch.zeros_like(u[:, 0]))
    return plan, iterations * solvable, marginal_error.detach()


def plan_entropy(plan: torch.Tensor) -> torch.Tensor:
    """Entropy -sum T log T of transport plans (B, M, N), in nats, (B,)."""
    # entr's derivative is infinite at 0, where masked and underflown entries are
    entropy = torch.special.entr(plan.clamp(min=torch.finfo(plan.dtype).tiny))
    return entropy.masked_fill(plan == 0, 0.0).sum(dim=(1, 2))


# --- disease label prediction (3.4) ----------------------------------------------------------------------------------


def focal_loss(
    logits: torch.Tensor, labels: torch.Tensor, gamma: float = 2.0, reduction: str = "finding"
) -> torch.Tensor:
    """Focal loss over the four states of each finding (eq. 10), a scalar.

    Args:
        logits (`torch.Tensor` of shape `(B, 14, 4)`)
        labels (`torch.Tensor` of shape `(B, 14)`): state ids; -100 is left out.
        gamma (`float`): focusing exponent; 0 gives the cross-entropy.
        reduction (`str`): `"finding"` weighs each finding's cross-entropy by its own focal factor and takes the mean
            over all; `"study"` sums the cross-entropies of a study first.
    """
    known = labels != -100
    cross_entropy = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
    if reduction == "study":
        cross_entropy = cross_entropy.sum(dim=1)
        known = known.any(dim=1)
    # 1 - p_true, by expm1 because p_true is near 1 for most cells
    focal = (-torch.expm1(-cross_entropy)).clamp(min=0).pow(gamma) * cross_entropy
    return (focal * known).sum() / known.sum().clamp(min=1)


class OTDRGFindingPredictor(nn.Module):
    """14 x 4 logits from the encoder's view features: one attention query a finding over the tokens of all views."""

    def __init__(self, feature_size: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(feature_size)
        self.queries = nn.Embedding(len(FINDINGS), feature_size)
        self.key = nn.Linear(feature_size, feature_size)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(2 * feature_size, len(FINDINGS) * len(FINDING_STATES))

    def forward(self, view_features: torch.Tensor, view_mask: torch.Tensor) -> torch.Tensor:
        """`view_features` (B, V, N, D), `view_mask` (B, V) -> logits (B, 14, 4).

        Of an encoder of its own, the features are the last in D.
        """
        view_features = view_features[..., -self.queries.embedding_dim :]
        batch, views, tokens, size = view_features.shape
        features = self.norm(view_features.to(self.norm.weight.dtype)).reshape(batch, views * tokens, size)
        mask = view_mask.repeat_interleave(tokens, dim=1)
        scores = self.queries.weight @ self.key(features).transpose(1, 2) / size**0.5
        weights = scores.masked_fill(~mask[:, None, :], -torch.inf).softmax(dim=-1)
        mean = (features * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        pooled = torch.cat((weights @ features, mean[:, None].expand(-1, len(FINDINGS), -1)), dim=-1)
        logits = self.classifier(self.dropout(pooled)).reshape(batch, len(FINDINGS), len(FINDINGS), -1)
        return logits.diagonal(dim1=1, dim2=2).transpose(1, 2)


# --- label features and projections (3.3.1) --------------------------------------------------------------------------


class OTDRGLabelEncoder(nn.Module):
    """f_e(L) of eq. 3: features (14, 4, D) of the 56 texts "finding: state"."""

    def __init__(self, config: OTDRGConfig):
        super().__init__()
        self.kind = config.label_encoder
        self.token_ids = config.finding_text_token_ids
        hidden_size = config.text_config.get_text_config().hidden_size
        self.feature_size = hidden_size
        if self.kind == "table":
            self.feature_size = config.label_encoder_size or hidden_size
            self.table = nn.Embedding(len(FINDINGS) * len(FINDING_STATES), self.feature_size)
        elif self.kind == "text_encoder":
            self.token_ids = config.label_encoder_token_ids
            self.text_encoder = AutoModel.from_config(config.label_encoder_config)
            self.feature_size = self.text_encoder.config.hidden_size

    def train(self, mode: bool = True) -> OTDRGLabelEncoder:
        super().train(mode)
        if self.kind == "text_encoder":
            self.text_encoder.eval()  # it is frozen: its features are constants, without dropout
        return self

    def forward(self, word_embeddings: nn.Module) -> torch.Tensor:
        """Features (14, 4, D); `word_embeddings` is the LLM's, read as a constant."""
        if self.kind == "table":
            return self.table.weight.reshape(len(FINDINGS), len(FINDING_STATES), -1)
        texts = [torch.tensor(ids) for row in self.token_ids for ids in row]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(word_embeddings.weight.device)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True).to(ids.device)
        with torch.no_grad():
            if self.kind == "text_encoder":
                features = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            else:
                features = word_embeddings(ids)
            features = (features.float() * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
            # Uncentred, "x: positive" and "x: negative" are all but the same vector.
            features = features - features.mean(dim=0)
        return features.reshape(len(FINDINGS), len(FINDING_STATES), -1)


class OTDRGProjector(nn.Module):
    """Linear projection into the LLM's embedding space (eqs. 4 and 5), with the LayerNorm R2GenGPT puts behind it."""

    def __init__(self, feature_size: int, hidden_size: int, norm: bool):
        super().__init__()
        self.linear = nn.Linear(feature_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size) if norm else nn.Identity()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(features.to(self.linear.weight.dtype)))


# --- the model -------------------------------------------------------------------------------------------------------


@dataclass
class OTDRGStudy(ModelOutput):
    """
    What the report of B studies is written from: the result of [`OTDRGForReportGeneration.read_study`].

    Args:
        view_features (`torch.Tensor` of shape `(B, V, image_tokens, D)`): of the encoded views.
        view_mask (`torch.Tensor` of shape `(B, V)`): true where there is a view.
        finding_logits (`torch.Tensor` of shape `(B, 14, 4)`): the label predictor's, None if it was not run.
        finding_states (`torch.Tensor` of shape `(B, 14)`): the states the LLM is conditioned on.
    """

    view_features: torch.Tensor | None = None
    view_mask: torch.Tensor | None = None
    finding_logits: torch.Tensor | None = None
    finding_states: torch.Tensor | None = None


@dataclass
class OTDRGOutput(ModelOutput):
    """
    Output of [`OTDRGForReportGeneration`]. M is the number of image tokens of a study.

    Args:
        loss (`torch.Tensor` of shape `()`): report_loss + lambda * ot_loss (eq. 12), plus predictor_loss where
            `finding_labels` were given.
        report_loss (`torch.Tensor` of shape `()`): L_RG (eq. 11), mean over the report's tokens; with `labels`.
        ot_loss (`torch.Tensor` of shape `()`): L_OT, mean <T, C> over the batch; with `labels`.
        predictor_loss (`torch.Tensor` of shape `()`): L_cls (eq. 10).
        logits (`torch.Tensor` of shape `(B, L, vocab_size)`): the LLM's; while training on `labels` only those that
            predict the first label and what follows.
        transport_plan (`torch.Tensor` of shape `(B, M, 14)`): T.
        finding_logits (`torch.Tensor` of shape `(B, 14, 4)`): the label predictor's; not while training on given
            states, if its encoder is its own.
        past_key_values (`Cache`): the LLM's key-value cache; called `cache` from transformers 5.24 on.
        hidden_states, attentions (`tuple[torch.Tensor]`): the LLM's, with `output_hidden_states=True` and
            `output_attentions=True`.
        image_outputs (`BaseModelOutputWithPooling`): the encoded views, as [`get_image_features`] returns them.
        ot_marginal_error, plan_entropy, epsilon_to_cost, label_spread (`torch.Tensor` of shape `()`):
            figures to watch while training, with `labels`: mean L1 error of the plan's row marginals; entropy of the
            plan over its maximum (1 is a uniform plan); epsilon over the mean cost; distance of label features from
            their mean over their length.
    """

    loss: torch.Tensor | None = None
    report_loss: torch.Tensor | None = None
    ot_loss: torch.Tensor | None = None
    predictor_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    transport_plan: torch.Tensor | None = None
    finding_logits: torch.Tensor | None = None
    if CACHE == "cache":
        cache: object | None = None
    else:
        past_key_values: object | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    ot_marginal_error: torch.Tensor | None = None
    plan_entropy: torch.Tensor | None = None
    epsilon_to_cost: torch.Tensor | None = None
    label_spread: torch.Tensor | None = None


class _NoPlaceholders(LogitsProcessor):
    """Keeps placeholders out of reports, where they would be taken for places of features."""

    def __init__(self, config: OTDRGConfig):
        self.ids = config.placeholder_token_ids

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor(self.ids, device=scores.device), -torch.inf)


class OTDRGForReportGeneration(PreTrainedModel, GenerationMixin):
    r"""
    Reads a study of chest radiographs and writes its report.

    ```python
    model = AutoModel.from_pretrained("org/otdrg", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained("org/otdrg", trust_remote_code=True)
    inputs = processor(images=[["frontal.png", "lateral.png"]])
    sequences = model.generate(**inputs)[:, inputs["input_ids"].shape[1]:]
    reports = processor.batch_decode(sequences, skip_special_tokens=True)
    ```

    Attributes:
        ot_weight (`float`): lambda of eq. 12 as it stands now; the configuration's until a schedule moves it.
        ot_epsilon (`float`): the transport's epsilon as it stands now, likewise.
        finding_logit_adjustment (`torch.Tensor` of shape `(14, 4)`): what training adds to the label predictor's
            logits in its loss, and nothing else does; None, as it is in a loaded model, adds nothing.
    """

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

    def __init__(
        self,
        config: OTDRGConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
        text_encoder: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        config.check_fields()
        for model in (vision_tower, language_model, text_encoder):
            if model is not None:
                _mark_initialized(model)
        if config.dle and config.finding_text_token_ids is None:
            raise ValueError(
                "OTDRGConfig.finding_text_token_ids=None: the label texts have no token ids yet; call "
                "config.bind_tokenizer(tokenizer), or make the processor first"
            )
        self.vision_tower = AutoModel.from_config(config.vision_config) if vision_tower is None else vision_tower
        self.language_model = (
            AutoModelForCausalLM.from_config(config.text_config) if language_model is None else language_model
        )
        if config.predictor_encoder == "own":
            if vision_tower is None:
                self.finding_vision_tower = AutoModel.from_config(config.vision_config)
            else:
                self.finding_vision_tower = copy.deepcopy(vision_tower)
                _mark_initialized(self.finding_vision_tower)  # copied parameters lose their mark
        feature_size = _vision_feature_size(self.vision_tower)
        hidden_size = config.text_config.get_text_config().hidden_size
        self.image_projector = OTDRGProjector(feature_size, hidden_size, config.projection_norm)
        if config.fiot:
            self.label_encoder = OTDRGLabelEncoder(config)
            if text_encoder is not None:
                self.label_encoder.text_encoder = text_encoder
            self.label_projector = OTDRGProjector(self.label_encoder.feature_size, hidden_size, config.projection_norm)
        self.finding_predictor = OTDRGFindingPredictor(feature_size, config.predictor_dropout)
        self.ot_weight = config.ot_weight
        self.ot_epsilon = config.ot_epsilon
        self.finding_logit_adjustment: torch.Tensor | None = None
        self.post_init()
        if vision_tower is None and language_model is None:
            # Behind post_init, which would initialise lora_B like any other weight: LoRA starts as the identity.
            self._inject_lora()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, OTDRGFindingPredictor):
            # As small as other embeddings, the queries would look at every token alike for most of a short training.
            init.normal_(module.queries.weight)

    # -- construction ---------------------------------------------------------------------------------------------

    @classmethod
    def from_backbones(
        cls,
        vision: str,
        text: str,
        label_text_encoder: str | None = None,
        dtype: str | torch.dtype | None = None,
        quantization_config=None,
        **config_fields,
    ) -> OTDRGForReportGeneration:
        """A new model on pretrained backbones: their weights, everything between them from scratch.

        Args:
            vision (`str`): Hub id, local folder or timm name (`timm/swin_...`) of the vision encoder.
            text (`str`): Hub id, local folder or GGUF file of a causal LLM with its tokenizer.
            label_text_encoder (`str`, *optional*): Hub id or folder of the text encoder of the labels, which sets
                `label_encoder="text_encoder"`.
            dtype (`str` or `torch.dtype`, *optional*): type of the backbones' weights; the checkpoint's by default.
            quantization_config (*optional*): transformers' for the LLM's weights, such as `BitsAndBytesConfig`.
            config_fields: fields of [`OTDRGConfig`].

        Raises:
            OSError: a backbone is not there, with the reference at fault.
            ValueError: a configuration field is wrong.
        """
        vision_tower = load_backbone("vision", AutoModel, vision, dtype)
        language_model = load_backbone("text", AutoModelForCausalLM, text, dtype, quantization_config)
        tokenizer = load_backbone("text", AutoTokenizer, text)
        text_encoder = None
        if label_text_encoder is not None:
            text_encoder = load_backbone("label_text_encoder", AutoModel, label_text_encoder, dtype)
            config_fields |= {"label_encoder": "text_encoder", "label_encoder_config": text_encoder.config}
        if "gguf_file" in resolve_backbone(text)[1]:
            # It was dequantised on loading, but may still say it is quantised and then refuse to be saved.
            language_model.hf_quantizer = None
            if hasattr(language_model.config, "quantization_config"):
                del language_model.config.quantization_config
        attention = [(model.config, model.config._attn_implementation) for model in (vision_tower, language_model)]
        config = cls.config_class(vision_tower.config, language_model.config, **config_fields)
        for part, implementation in attention:
            # A composite configuration resets its parts' to None, which is eager attention.
            part._attn_implementation = implementation
        config.bind_tokenizer(tokenizer)
        if text_encoder is not None:
            config.bind_label_tokenizer(load_backbone("label_text_encoder", AutoTokenizer, label_text_encoder))
        language_model.resize_token_embeddings(config.text_config.vocab_size, mean_resizing=False)
        model = cls(config, vision_tower, language_model, text_encoder)
        # Chat LLMs may end a turn in more than one way, and only their generation configuration tells.
        end = language_model.generation_config.eos_token_id
        model.generation_config.eos_token_id = config.text_config.eos_token_id if end is None else end
        model.settle_quantization()
        return model

    def add_lora(self) -> None:
        """Attach fresh LoRA adapters (an identity at first) as the configuration says; those there are kept.

        `config.lora` is the LLM's, `config.vision_lora` that of the vision encoders.

        Raises:
            ValueError: neither is set, or one names modules its part does not have.
        """
        if self.config.lora is None and self.config.vision_lora is None:
            raise ValueError("OTDRGConfig.lora=None: expected peft's r, lora_alpha, lora_dropout and target_modules")
        self._inject_lora()

    def _inject_lora(self) -> None:
        for field, parts in (("lora", (self.language_model,)), ("vision_lora", self.vision_towers)):
            lora = getattr(self.config, field)
            if lora is None:
                continue
            if not is_peft_available():
                raise ImportError(f"OTDRGConfig.{field} is set: LoRA needs peft (pip install peft)")
            for part in parts:
                if not _has_adapters(part):
                    try:
                        inject_adapter_in_model(LoraConfig(**lora), part)
                    except ValueError as error:
                        raise ValueError(f"OTDRGConfig.{field}={lora!r}: {error}") from None

    @property
    def has_lora(self) -> bool:
        """Whether the LLM or a vision encoder carries LoRA adapters."""
        return _has_adapters(self)

    def merge_lora(self) -> None:
        """Fold all LoRA adapters into the weights, so that peft is not needed; `lora` and `vision_lora` become None.

        A quantised LLM is dequantised first, so that nothing is rounded a second time and bitsandbytes is not needed.
        """
        adapters = {}
        if self.has_lora:
            adapters = {name: module for name, module in self.named_modules() if isinstance(module, BaseTunerLayer)}
        quantized = self.is_llm_quantized
        if quantized:
            self.language_model.dequantize(self.get_input_embeddings().weight.dtype)
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
        """Whether the LLM's weights are packed into fewer bits."""
        return bool(getattr(self.language_model, "is_quantized", False))

    def settle_quantization(self) -> None:
        """Make an LLM that was quantised on loading, by itself or with the whole, the only part that says it is."""
        quantizer = getattr(self, "hf_quantizer", None)
        if quantizer is not None:
            quantizer.remove_quantization_config(self)
            self.language_model.hf_quantizer = quantizer
            self.language_model.is_quantized = True
        for module in self.language_model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # On a CPU the first evaluation would pack the weights anew, and then no gradient passes through them.
                module.support_avx512bf16_for_cpu = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """A trained model, from a folder or a Hub id; see `PreTrainedModel`.

        Whole weights and adapters load alike. Weight files are of safetensors format, and those `weights_sha256` lists.
        With a `quantization_config` the LLM's weights are packed, and no others.

        Raises:
            OSError: there is no model, it is damaged, or it is an adapter of a backbone that is not there or another.
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
        hub.pop("force_download", None)  # done
        kwargs = {name: value for name, value in kwargs.items() if name not in HUB_KEYWORDS}
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _of_llm_only(kwargs["quantization_config"])
        if stated.get("weights") == "adapter":
            loaded = cls._from_adapter(source, stated, files, hub, *model_args, config=config, **kwargs)
        else:
            kwargs["use_safetensors"] = True
            if kwargs.get("state_dict") is None:
                described = config
                if not isinstance(config, PreTrainedConfig):
                    described = cls.config_class.from_pretrained(config or source, **hub)
                check_shapes(place_of(source, hub), cls._on_meta(described), weight_shapes(files))
            loaded = super().from_pretrained(source, *model_args, config=config, **hub, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.settle_quantization()
        # What is said of files is not true of a model, which may be trained and saved anew.
        model.config.weights, model.config.weights_sha256 = "full", None
        return loaded

    @classmethod
    def _on_meta(cls, config: OTDRGConfig) -> OTDRGForReportGeneration:
        """The model of a configuration without memory for its weights."""
        with torch.device("meta"), getattr(init, "meta_device_safe_creation_ops", nullcontext)():
            return cls(copy.deepcopy(config))

    @classmethod
    def _from_adapter(cls, source, stated: dict, files: dict, hub: dict, *model_args, config=None, **kwargs):
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
        weights, lora = read_adapter(source, config, files, **hub)
        check_shapes(
            place_of(source, hub),
            cls._on_meta(config),
            {name: tuple(weight.shape) for name, weight in (weights | lora).items()},
        )
        wanted = {field: getattr(config, field) for field in ("lora", "vision_lora")}
        # Behind the LLM's weights, which may have been packed by then: peft's layers follow what they are laid over.
        config.lora = config.vision_lora = None
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            None, *model_args, config=config, state_dict=weights, output_loading_info=True, **kwargs
        )
        for field, value in wanted.items():
            setattr(model.config, field, value)
        if model.config.lora is not None or model.config.vision_lora is not None:
            model.add_lora()
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

    def save_pretrained(self, save_directory, is_main_process: bool = True, *, weights: str = "full", **kwargs):
        """Write weights with their SHA-256, configuration, generation configuration and code; see `PreTrainedModel`.

        Args:
            save_directory (`str`): the folder.
            is_main_process (`bool`): whether this process is the one that writes.
            weights (`str`): `"full"`, or `"adapter"` for those that the backbones do not have: `config.vision_backbone`
                and `config.text_backbone` are read, compared, and referred to. Either is loaded by `from_pretrained`.
            kwargs: those of `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: the LLM is quantised, and there is no `state_dict` to be written in place of its weights; or an
                adapter has no backbones to refer to.
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
        }
        self.config.custom_pipelines = {
            "image-to-text": {
                "impl": "pipeline_otdrg.ReportGenerationPipeline",
                "pt": ["AutoModelForImageTextToText"],
                "type": "multimodal",
            }
        }
        stated = {"weights": weights, "weights_sha256": None, "backbone_sha256": None, "backbone_revisions": None}
        if weights == "adapter" and is_main_process:
            backbones, facts = backbone_weights(self.config, kwargs.get("token"))
            stated |= facts
            own = kwargs.pop("state_dict", None)
            own = self.state_dict() if own is None else own
            # By the names of a model in memory: those of the backbones it is compared and put together with.
            kwargs |= {
                "state_dict": adapter_weights(own, backbones, self.is_llm_quantized),
                "save_original_format": False,
            }
        # Of files, and not of the model, which has all of its weights.
        kept = {field: getattr(self.config, field) for field in stated} | {"weights": "full"}
        if is_main_process and not _is_another_rank() and kwargs.get("variant") is None:
            remove_former_weights(save_directory)
        try:
            self.config.update(stated)
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        finally:
            self.config.update(kept)
        if is_main_process and not _is_another_rank():
            record_sha256(save_directory)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # Called by save_pretrained(push_to_hub=True) before it comes back.
        record_sha256(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs):
        super()._set_gradient_checkpointing(enable, **kwargs)
        # The call above does not reach timm, whose models have a switch of their own.
        for tower in self.vision_towers:
            if hasattr(tower, "timm_model") and tower.supports_gradient_checkpointing:
                tower._set_gradient_checkpointing(enable)

    @property
    def base_model(self) -> PreTrainedModel:
        """The LLM, whose weights are a folder of their own only as a backbone: hence no `base_model_prefix`."""
        return self.language_model

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.language_model.set_output_embeddings(value)

    # -- vision ---------------------------------------------------------------------------------------------------

    @property
    def vision_towers(self) -> tuple[PreTrainedModel, ...]:
        """The report's vision encoder and, with `predictor_encoder="own"`, the label predictor's behind it."""
        if self.config.predictor_encoder == "own":
            return self.vision_tower, self.finding_vision_tower
        return (self.vision_tower,)

    def encode_views(
        self, pixel_values: torch.Tensor, view_mask: torch.Tensor | None = None, reader: str = "both"
    ) -> torch.Tensor:
        """X of eq. 1 for every view, pooled to the grid of image tokens.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, V, C, H, W)`)
            view_mask (`torch.Tensor` of shape `(B, V)`, *optional*): true where there is a view; each study has one.
            reader (`str`): for whom, `"report"`, `"predictor"` or `"both"`; it matters where they read two encoders.

        Returns:
            `torch.Tensor` of shape `(B, V, image_tokens, D)`; 0 where there is no view. With
            `predictor_encoder="own"`, the report's features and behind them the predictor's: D is the sum for `"both"`.
        """
        pixels, view_mask = self._views(pixel_values, view_mask)
        towers = {"report": self.vision_towers[:1], "predictor": self.vision_towers[-1:], "both": self.vision_towers}
        # A trained encoder is of a wider type than a frozen one: joined, both are of the wider.
        return _unflatten_views(torch.cat([self._encode(tower, pixels)[0] for tower in towers[reader]], -1), view_mask)

    def _encode(self, tower: PreTrainedModel, pixels: torch.Tensor, **kwargs) -> tuple[torch.Tensor, ModelOutput]:
        """Pixels (A, C, H, W) of A views -> their features (A, image_tokens, D) and the encoder's own output."""
        output = tower(pixels.to(tower.dtype), return_dict=True, **kwargs)
        grid = _as_grid(output.last_hidden_state, tower, tuple(pixels.shape[-2:]))
        return F.adaptive_avg_pool2d(grid, self.config.image_grid).flatten(2).transpose(1, 2), output

    def _views(self, pixel_values: torch.Tensor, view_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The A views that there are, (A, C, H, W), and their mask (B, V)."""
        if pixel_values.ndim != 5:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}: "
                "expected (studies, views, channels, height, width)"
            )
        view_mask = self._view_mask(pixel_values, view_mask)
        return pixel_values[view_mask], view_mask

    @staticmethod
    def _view_mask(views: torch.Tensor, view_mask: torch.Tensor | None) -> torch.Tensor:
        if view_mask is None:
            return torch.ones(views.shape[:2], dtype=torch.bool, device=views.device)
        if view_mask.shape != views.shape[:2]:
            raise ValueError(f"view_mask has shape {tuple(view_mask.shape)}: expected {tuple(views.shape[:2])}")
        if not view_mask.any(dim=1).all():
            raise ValueError("a study has no image: a report is only written from at least one view")
        return view_mask.bool()

    def _report_features(self, view_features: torch.Tensor) -> torch.Tensor:
        """Those of the report's encoder: the first in D, before those of the predictor's own."""
        return view_features[..., : self.image_projector.linear.in_features]

    def fuse_views(self, view_features: torch.Tensor, view_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, V, N, D) -> one sequence of image tokens a study (B, M, D) and its mask (B, M).

        Features of the predictor's own encoder, the last in D, are left out.
        """
        view_features = self._report_features(view_features)
        batch, views, tokens, size = view_features.shape
        if self.config.view_fusion == "concat":
            return view_features.reshape(batch, views * tokens, size), view_mask.repeat_interleave(tokens, dim=1)
        weights = view_mask / view_mask.sum(dim=1, keepdim=True)
        fused = (view_features * weights[:, :, None, None].to(view_features.dtype)).sum(dim=1)
        return fused, torch.ones(batch, tokens, dtype=torch.bool, device=fused.device)

    def project_views(
        self, view_features: torch.Tensor, view_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """f_p(X) of eq. 4, (B, M, hidden_size), and its mask (B, M), from [`encode_views`]' features."""
        fused, mask = self.fuse_views(view_features, self._view_mask(view_features, view_mask))
        return self.image_projector(fused), mask

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, view_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Encode views with the report's vision encoder and project them into the LLM's embedding space (eq. 4).

        Args:
            pixel_values, view_mask: as in [`encode_views`].
            kwargs: the encoder's, such as `output_hidden_states` and `output_attentions`.

        Returns:
            `last_hidden_state` (B, V, image_tokens, D), the features X; `pooler_output`, a list of each study's
            projected image tokens (M, hidden_size); `hidden_states` and `attentions` of the views that there are.
        """
        pixels, view_mask = self._views(pixel_values, view_mask)
        features, output = self._encode(self.vision_tower, pixels, **kwargs)
        view_features = _unflatten_views(features, view_mask)
        return BaseModelOutputWithPooling(
            last_hidden_state=view_features,
            pooler_output=_of_each_study(*self.project_views(view_features, view_mask)),
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )

    # -- labels ---------------------------------------------------------------------------------------------------

    def get_label_features(self, finding_states: torch.Tensor) -> torch.Tensor:
        """f_p(Y) of eq. 5, (B, 14, hidden_size), of states (B, 14)."""
        table = self.label_projector(self.label_encoder(self.get_input_embeddings()))
        return table[torch.arange(len(FINDINGS), device=finding_states.device), finding_states]

    def finding_probabilities(self, finding_logits: torch.Tensor) -> torch.Tensor:
        """Probabilities (B, 14, 4) of the states; "no finding" is only ever unmentioned or positive."""
        logits = finding_logits.float().clone()
        logits[:, NO_FINDING, POSITIVE + 1 :] = -torch.inf
        return logits.softmax(dim=-1)

    def predict_states(self, finding_logits: torch.Tensor) -> torch.Tensor:
        """States (B, 14) from the predictor's logits (B, 14, 4) (3.4).

        The likeliest state of each finding; with `config.finding_thresholds`, positive where its probability reaches
        the finding's threshold and the likeliest other state elsewhere.
        """
        probabilities = self.finding_probabilities(finding_logits)
        if self.config.finding_thresholds is None:
            return probabilities.argmax(dim=-1)
        thresholds = torch.tensor(self.config.finding_thresholds, device=probabilities.device)
        positive = probabilities[..., POSITIVE] >= thresholds
        others = probabilities.clone()
        others[..., POSITIVE] = -1.0
        return torch.where(positive, POSITIVE, others.argmax(dim=-1))

    # -- optimal transport ----------------------------------------------------------------------------------------

    def transport(
        self,
        image_features: torch.Tensor,
        image_mask: torch.Tensor,
        label_features: torch.Tensor,
        finding_states: torch.Tensor,
    ) -> tuple[SinkhornOutput, torch.Tensor]:
        """FIOT (3.3.2) of image tokens (B, M, hidden_size) and label features (B, 14, hidden_size).

        Returns:
            The transport and its cost (B, M, 14).
        """
        cost = cost_matrix(image_features, label_features, self.config.ot_cost_normalization)
        return self._sinkhorn(cost, image_mask, self._label_mask(finding_states)), cost

    @torch.no_grad()
    def transport_lift(
        self, view_features: torch.Tensor, view_mask: torch.Tensor, finding_states: torch.Tensor
    ) -> torch.Tensor:
        """The transport plan over each view's grid as a multiple of the uniform plan, for heatmaps (Figure 5).

        Returns:
            `torch.Tensor` of shape `(B, V, 14, rows, columns)`: 1 everywhere for a uniform plan, 0 where there is no
            view or no mass. With `view_fusion="mean"` all views of a study share one plan.
        """
        image_features, image_mask = self.project_views(view_features, view_mask)
        label_features = self.get_label_features(finding_states)
        plan = self.transport(image_features, image_mask, label_features, finding_states)[0].plan
        mass = image_mask.sum(dim=1) * self._label_mask(finding_states).sum(dim=1)
        lift = (plan * mass[:, None, None]).transpose(1, 2)
        lift = lift.unflatten(2, (-1, self.config.image_grid, self.config.image_grid)).transpose(1, 2)
        return lift.expand(-1, view_mask.shape[1], -1, -1, -1) * view_mask[:, :, None, None, None]

    def _label_mask(self, finding_states: torch.Tensor) -> torch.Tensor:
        if self.config.ot_labels == "mentioned":
            return finding_states != UNMENTIONED
        return torch.ones_like(finding_states, dtype=torch.bool)

    def _sinkhorn(self, cost, row_mask, column_mask) -> SinkhornOutput:
        config = self.config
        return sinkhorn(
            cost,
            self.ot_epsilon,
            config.ot_max_iterations,
            config.ot_tolerance,
            row_mask,
            column_mask,
            gradient=config.ot_gradient,
        )

    def _ot_loss(self, transport, image_features, image_mask, label_features, finding_states) -> torch.Tensor:
        """L_OT: the mean transport cost and, where it has a weight, the contrastive term."""
        loss = transport.distance.mean()
        if self.config.ot_contrastive_weight > 0 and len(finding_states) > 1:
            contrastive = self._contrastive_ot_loss(image_features, image_mask, label_features, finding_states)
            loss = loss + self.config.ot_contrastive_weight * contrastive
        return loss

    @torch.no_grad()
    def _transport_figures(self, transport, cost, image_mask, label_features, states) -> dict[str, torch.Tensor]:
        """Figures that show whether the transport has gone wrong, see [`OTDRGOutput`]."""
        mass = image_mask[:, :, None] & self._label_mask(states)[:, None, :]
        cells = mass.sum(dim=(1, 2)).clamp(min=2).float()
        label_features = label_features.float()
        centred = label_features - label_features.mean(dim=1, keepdim=True)
        return {
            "ot_marginal_error": transport.marginal_error.mean(),
            "plan_entropy": (plan_entropy(transport.plan) / cells.log()).mean(),
            "epsilon_to_cost": self.ot_epsilon / cost[mass].mean().clamp(min=1e-12),
            "label_spread": centred.norm(dim=-1).mean() / label_features.norm(dim=-1).mean().clamp(min=1e-12),
        }

    def _contrastive_ot_loss(self, image_features, image_mask, label_features, finding_states) -> torch.Tensor:
        """InfoNCE over -d_OT of each study's image with its own labels against other studies' different labels."""
        batch = len(finding_states)
        images, labels = torch.meshgrid(*2 * [torch.arange(batch, device=finding_states.device)], indexing="ij")
        images, labels = images.flatten(), labels.flatten()
        cost = cost_matrix(image_features[images], label_features[labels], self.config.ot_cost_normalization)
        distance = self._sinkhorn(cost, image_mask[images], self._label_mask(finding_states)[labels]).distance
        distance = distance.reshape(batch, batch)
        same = (finding_states[:, None] == finding_states[None]).all(dim=-1)
        same = same & ~torch.eye(batch, dtype=torch.bool, device=same.device)
        scale = self.config.ot_contrastive_temperature * distance.detach().mean().clamp(min=1e-6)
        target = torch.arange(batch, device=same.device)
        return F.cross_entropy((-distance / scale).masked_fill(same, -torch.inf), target)

    # -- prompt ---------------------------------------------------------------------------------------------------

    def get_placeholder_mask(
        self, token_id: int | None, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Where (B, L) a placeholder stands: in `input_ids` or, where given, in `inputs_embeds` (B, L, hidden_size)."""
        prompt = input_ids if inputs_embeds is None else inputs_embeds
        if token_id is None:
            return torch.zeros(prompt.shape[:2], dtype=torch.bool, device=prompt.device)
        if inputs_embeds is None:
            return input_ids == token_id
        placeholder = self.get_input_embeddings()(torch.tensor(token_id, device=inputs_embeds.device))
        return (inputs_embeds == placeholder).all(dim=-1)

    def _place_features(self, what, input_ids, inputs_embeds, features, mask) -> torch.Tensor:
        """`inputs_embeds` with the unmasked of `features` (B, M, D) in the places of the `what` token, in order."""
        token_id = self.config.image_token_id if what == "image" else self.config.finding_token_id
        placeholders = self.get_placeholder_mask(token_id, input_ids, None if input_ids is not None else inputs_embeds)
        tokens, expected = placeholders.sum(dim=1), mask.sum(dim=1)
        if input_ids is None and not tokens.any():
            return inputs_embeds  # the caller has put features in place
        wrong = (tokens != expected).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"{what} tokens and {what} features do not match in row {row}: tokens: {int(tokens[row])}, "
                f"features: {int(expected[row])}"
            )
        return inputs_embeds.masked_scatter(placeholders[:, :, None], features[mask].to(inputs_embeds.dtype))

    def _place_study(self, input_ids, inputs_embeds, image_features, image_mask, label_features) -> torch.Tensor:
        """`inputs_embeds` with image tokens and, with FIOT, label tokens (eqs. 4 and 5) in their places."""
        inputs_embeds = self._place_features("image", input_ids, inputs_embeds, image_features, image_mask)
        if label_features is None:
            return inputs_embeds
        every_label = torch.ones(label_features.shape[:2], dtype=torch.bool, device=label_features.device)
        return self._place_features("finding", input_ids, inputs_embeds, label_features, every_label)

    def _finding_text(self, states: list[int]) -> list[int]:
        table, wanted = self.config.finding_text_token_ids, self.config.finding_text
        return [
            token
            for finding, state in enumerate(states)
            if wanted == "all" or state != UNMENTIONED
            for token in table[finding][state]
        ]

    def expand_finding_text(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        view_mask: torch.Tensor | None = None,
        view_features: torch.Tensor | None = None,
        finding_states: torch.Tensor | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """Write out the label text of the states that condition the LLM, in place of its placeholder.

        [`forward`] keeps the lengths it is given, so this comes before it. `generate` and our Trainer call it; in a
        training loop of your own: `model(**model.expand_finding_text(**batch))`. The label predictor runs only where
        states are not given. While training on `labels`, `config.predicted_state_ratio` of the studies lose the states
        they are given.

        Args:
            input_ids, attention_mask (`torch.Tensor` of shape `(B, L)`): the processor's, padded on either side.
            labels, position_ids (`torch.Tensor` of shape `(B, L)`, *optional*): follow their tokens.
            inputs_embeds (`torch.Tensor` of shape `(B, L, hidden_size)`, *optional*): embeddings of `input_ids`.
            pixel_values, view_mask, view_features, finding_states: as in [`forward`].
            kwargs: returned as they are.

        Returns:
            The inputs of [`forward`]: of length L', padded on the side they were, with `finding_states` complete and,
            where views had to be encoded and no gradient is needed, `view_features` in place of `pixel_values`.

        Raises:
            ValueError: no image, states that cannot be, or arguments of different numbers of studies.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        views = {"pixel_values": pixel_values, "view_mask": view_mask, "view_features": view_features}
        _check_batch(**inputs, **views, finding_states=finding_states)
        if finding_states is not None and labels is not None and self.training and self.config.predicted_state_ratio:
            drawn = torch.rand(len(finding_states), 1, device=finding_states.device) < self.config.predicted_state_ratio
            finding_states = finding_states.masked_fill(drawn, -1)
        if finding_states is None or bool((finding_states < 0).any()):
            trains = torch.is_grad_enabled()  # then forward encodes the views itself
            with torch.no_grad():
                study = self.read_study(
                    **views, finding_states=finding_states, reader="predictor" if trains else "both"
                )
            finding_states = study.finding_states
            if not trains:
                views = {"view_mask": study.view_mask, "view_features": study.view_features}
        else:
            check_finding_states(finding_states, len(finding_states))
        prompt = inputs_embeds if input_ids is None else input_ids
        if prompt is not None:
            if attention_mask is None:
                inputs["attention_mask"] = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
            inputs = self._insert_finding_text(inputs, finding_states)
        given = {**inputs, **views, "finding_states": finding_states, **kwargs}
        return {name: value for name, value in given.items() if value is not None}

    def _insert_finding_text(self, inputs: dict[str, Any], finding_states: torch.Tensor) -> dict[str, Any]:
        mask, embeds = inputs["attention_mask"], inputs["inputs_embeds"]
        places = self.get_placeholder_mask(self.config.finding_text_token_id, inputs["input_ids"], embeds)
        if not places.any():
            return inputs
        if mask.shape != places.shape:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}: expected {tuple(places.shape)}")
        left = not bool(mask[:, 0].all()) or (bool(mask[:, -1].all()) and inputs["labels"] is None)
        # Of each new position: where its token was, the token that is written there (-1: the one that was), its shift.
        rows: list[list[tuple[int, int, int]]] = []
        for row, states in enumerate(finding_states.tolist()):
            new, shift = [], 0
            for position in mask[row].nonzero().flatten().tolist():
                if places[row, position]:
                    text = self._finding_text(states)
                    new += [(position, token, shift + offset) for offset, token in enumerate(text)]
                    shift += len(text) - 1
                else:
                    new.append((position, -1, shift))
            rows.append(new)
        length = max(map(len, rows))
        padding = [[(0, -1, 0)] * (length - len(new)) for new in rows]
        table = torch.tensor(
            [pad + new if left else new + pad for pad, new in zip(padding, rows, strict=True)], device=mask.device
        )
        source, written, shift = table.reshape(len(rows), length, 3).unbind(dim=-1)
        count = torch.tensor([len(new) for new in rows], device=mask.device)[:, None]
        position = torch.arange(length, device=mask.device)
        kept = position >= length - count if left else position < count
        is_text = written >= 0

        def moved(name: str, text, pad):
            values = inputs[name]
            if values is None:
                return None
            values = torch.where(is_text, text, values.expand(len(rows), -1).gather(1, source))
            return torch.where(kept, values, torch.full_like(values, pad))

        expanded = {
            "input_ids": moved("input_ids", written, self.config.text_config.pad_token_id or 0),
            "attention_mask": kept.to(mask.dtype),
            "labels": moved("labels", torch.full_like(written, -100), -100),
            "position_ids": None,
            "inputs_embeds": None,
        }
        if inputs["position_ids"] is not None:
            expanded["position_ids"] = inputs["position_ids"].expand(len(rows), -1).gather(1, source) + shift
        if embeds is not None:
            texts = self.get_input_embeddings()(written.clamp(min=0))
            gathered = embeds.gather(1, source[:, :, None].expand(-1, -1, embeds.shape[-1]))
            expanded["inputs_embeds"] = torch.where(is_text[:, :, None], texts.to(embeds.dtype), gathered)
        return expanded

    # -- forward --------------------------------------------------------------------------------------------------

    def read_study(
        self,
        pixel_values: torch.Tensor | None = None,
        view_mask: torch.Tensor | None = None,
        view_features: torch.Tensor | None = None,
        finding_states: torch.Tensor | None = None,
        reader: str = "both",
        supervised: bool = False,
    ) -> OTDRGStudy:
        """Encode the views, predict the finding states (3.4) and settle those that condition the LLM.

        Args:
            pixel_values, view_mask, view_features, finding_states: as in [`forward`].
            reader (`str`): as in [`encode_views`]; for `"report"` nothing is predicted and all states must be given.
            supervised (`bool`): whether gradients pass through the label predictor.

        Raises:
            ValueError: no image, states that cannot be, or arguments of different numbers of studies.
        """
        _check_batch(
            pixel_values=pixel_values, view_mask=view_mask, view_features=view_features, finding_states=finding_states
        )
        if view_features is None:
            if pixel_values is None:
                raise ValueError("no image: pixel_values is missing, and a report is never written from nothing")
            view_features = self.encode_views(pixel_values, view_mask, reader)
        view_mask = self._view_mask(view_features, view_mask)
        if finding_states is not None:
            check_finding_states(finding_states, len(view_features))
        if reader == "report":
            return OTDRGStudy(view_features, view_mask, None, finding_states)
        with torch.set_grad_enabled(supervised and torch.is_grad_enabled()):
            finding_logits = self.finding_predictor(view_features, view_mask)
        states = self.condition_states(finding_logits.detach(), finding_states)
        return OTDRGStudy(view_features, view_mask, finding_logits, states)

    def condition_states(
        self, finding_logits: torch.Tensor, finding_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """States (B, 14) the LLM is conditioned on: given ones, predicted ones where they are -1 or None is given.

        Beside a finding that is given as positive, support devices apart, "no finding" is predicted to be unmentioned.
        """
        predicted = self.predict_states(finding_logits)
        if finding_states is None:
            return predicted
        finding_states = finding_states.to(predicted.device)
        found = finding_states == POSITIVE
        found[:, [NO_FINDING, SUPPORT_DEVICES]] = False
        predicted[found.any(dim=1), NO_FINDING] = UNMENTIONED
        return torch.where(finding_states < 0, predicted, finding_states)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        cache=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        view_mask: torch.Tensor | None = None,
        view_features: torch.Tensor | None = None,
        finding_states: torch.Tensor | None = None,
        finding_labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        report_only: bool = False,
        **kwargs,
    ) -> OTDRGOutput:
        r"""
        Args:
            input_ids, attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
                The processor's prompt, its label text written out by [`expand_finding_text`]. Without it only the
                encoder and the label predictor run.
            inputs_embeds (`torch.Tensor` of shape `(B, L, hidden_size)`, *optional*):
                Embeddings in place of `input_ids`. Where placeholders are among them, features take their places.
            labels (`torch.Tensor` of shape `(B, L)`, *optional*): the report's token ids, -100 elsewhere.
            shift_labels (`torch.Tensor` of shape `(B, L)`, *optional*):
                The token that follows each position, in place of `labels`, for a sequence that is cut into parts.
            pixel_values (`torch.Tensor` of shape `(B, V, C, H, W)`) and view_mask (`torch.Tensor` of shape `(B, V)`):
                The views.
            view_features (`torch.Tensor` of shape `(B, V, image_tokens, D)`, *optional*):
                [`encode_views`]' features in place of `pixel_values`.
            finding_states (`torch.Tensor` of shape `(B, 14)`, *optional*):
                States that condition the LLM; those of -1, or all when there are none, are predicted.
            finding_labels (`torch.Tensor` of shape `(B, 14)`, *optional*):
                True states that supervise the label predictor and nothing else; -100 is left out.
            report_only (`bool`): compute what the report needs and nothing beside it: no finding logits, image outputs
                or transport plan.
            kwargs: the LLM's, such as `output_hidden_states` and `output_attentions`.

        Returns:
            [`OTDRGOutput`]

        Raises:
            ValueError: no image, placeholders that do not match the features, states that cannot be, or arguments of
                different numbers of studies.
        """
        if past_key_values is not None:
            if CACHE == "cache":
                warnings.warn("`past_key_values` is deprecated: use `cache`", FutureWarning, stacklevel=2)
            cache = past_key_values if cache is None else cache
        _check_batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            shift_labels=shift_labels,
            pixel_values=pixel_values,
            view_mask=view_mask,
            view_features=view_features,
            finding_states=finding_states,
            finding_labels=finding_labels,
        )
        targets = F.pad(labels[:, 1:], (0, 1), value=-100) if labels is not None else None
        targets = targets if shift_labels is None else shift_labels
        prompted = input_ids is not None or inputs_embeds is not None
        figures: dict[str, Any] = {}
        losses = []

        # 1. Encode the views (eq. 1), predict the findings (3.4)
        study = None
        if pixel_values is not None or view_features is not None:
            supervised = finding_labels is not None
            if supervised:
                check_finding_states(finding_labels, len(finding_labels), missing=-100, name="finding_labels")
            reader = self._reader(prompted, finding_states, finding_labels, report_only)
            study = self.read_study(pixel_values, view_mask, view_features, finding_states, reader, supervised)
            figures["finding_logits"] = study.finding_logits
            if supervised:
                figures["predictor_loss"] = self._predictor_loss(study.finding_logits, finding_labels)
        elif finding_labels is not None or (
            not _is_filled(cache) and (inputs_embeds is None or finding_states is not None)
        ):
            raise ValueError("no image: pixel_values is missing, and a report is never written from nothing")

        if prompted:
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            else:
                input_ids = None
            if study is not None:
                self._warn_of_finding_text(input_ids)
                # 2. Project both into the LLM's space (eqs. 3 to 5), in the places of their tokens
                states = study.finding_states
                image_features, image_mask = self.project_views(study.view_features, study.view_mask)
                label_features = self.get_label_features(states) if self.config.fiot else None
                inputs_embeds = self._place_study(input_ids, inputs_embeds, image_features, image_mask, label_features)
                if not report_only:
                    figures["image_outputs"] = BaseModelOutputWithPooling(
                        last_hidden_state=self._report_features(study.view_features),
                        pooler_output=_of_each_study(image_features, image_mask),
                    )
                # 3. Optimal transport between the two (3.3.2)
                if self.config.fiot and (targets is not None or not report_only):
                    transport, cost = self.transport(image_features, image_mask, label_features, states)
                    figures["transport_plan"] = transport.plan
                    if targets is not None:
                        figures["ot_loss"] = self._ot_loss(
                            transport, image_features, image_mask, label_features, states
                        )
                        figures |= self._transport_figures(transport, cost, image_mask, label_features, states)
            # 4. The LLM (3.5)
            if targets is not None and self.training:
                # The head is most of a small LLM's cost, and nothing is learned in front of the report.
                logits_to_keep = targets.shape[1] - int((targets != -100).any(dim=0).int().argmax())
            text_output = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                return_dict=True,
                **{CACHE: cache},
                **self._requested_outputs(kwargs),
            )
            for name in ("logits", CACHE, "hidden_states", "attentions"):
                figures[name] = text_output.get(name)
            if targets is not None:
                figures["report_loss"] = self._report_loss(text_output.logits, targets)

        # 5. The losses (eq. 12)
        if "report_loss" in figures:
            losses.append(figures["report_loss"])
            if "ot_loss" in figures:
                losses.append(self.ot_weight * figures["ot_loss"])
        if "predictor_loss" in figures:
            losses.append(figures["predictor_loss"])
        return OTDRGOutput(loss=sum(losses) if losses else None, **figures)

    def _reader(self, prompted: bool, finding_states, finding_labels, report_only: bool) -> str:
        """Whose features a forward pass needs: see [`encode_views`]."""
        if not prompted:
            return "predictor"
        skips_predictor = report_only or (
            # While training only: elsewhere the output holds the logits, given states or not.
            self.training and self.config.predictor_encoder == "own" and finding_labels is None
        )
        if skips_predictor and finding_states is not None and bool((finding_states >= 0).all()):
            return "report"
        return "both"

    def _warn_of_finding_text(self, input_ids: torch.Tensor | None) -> None:
        if input_ids is not None and (input_ids == self.config.finding_text_token_id).any():
            logger.warning_once(
                f"input_ids holds {FINDING_TEXT_TOKEN}: the LLM reads the placeholder and not the label text; call "
                "model(**model.expand_finding_text(**inputs))"
            )

    def _requested_outputs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """`kwargs` with the outputs that the configuration asks for where the caller does not say."""
        # Still there after accelerate has unwrapped a model trained in mixed precision, and `can_return_tuple` with it.
        kwargs = {name: value for name, value in kwargs.items() if name != "return_dict"}
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name) is None and getattr(self.config, name, None):
                kwargs = {**kwargs, name: True}
        return kwargs

    def _predictor_loss(self, finding_logits: torch.Tensor, finding_labels: torch.Tensor) -> torch.Tensor:
        """L_cls (eq. 10); while training, of logits with `finding_logit_adjustment` added."""
        if self.training and self.finding_logit_adjustment is not None:
            finding_logits = finding_logits + self.finding_logit_adjustment.to(finding_logits)
        return focal_loss(finding_logits, finding_labels, self.config.focal_gamma, self.config.focal_reduction)

    @staticmethod
    def _report_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """L_RG (eq. 11): mean cross-entropy of the tokens that follow the positions of `logits`, the last ones."""
        targets = targets[:, -logits.shape[1] :]
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        return loss / (targets != -100).sum().clamp(min=1)

    @torch.no_grad()
    def get_prompt_embeddings(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        view_mask: torch.Tensor | None = None,
        finding_states: torch.Tensor | None = None,
        view_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the LLM reads of studies, for an engine that serves the LLM alone and is given embeddings.

        Args:
            input_ids, attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
                The processor's prompts, padded on the left; the default prompt without them.
            pixel_values, view_mask, view_features, finding_states: as in [`forward`]; given states steer the report.

        Returns:
            Embeddings (B, L', hidden_size) of the prompt, image and label tokens in place and the label text written
            out, and their mask (B, L').

        Raises:
            ValueError: no image, states that cannot condition this model, placeholders that do not match, or arguments
                of different numbers of studies.
        """
        prompt = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs = self._read_prompt(prompt, pixel_values, view_mask, view_features, finding_states)
        image_features, image_mask = self.project_views(inputs["view_features"], inputs["view_mask"])
        label_features = self.get_label_features(inputs["finding_states"]) if self.config.fiot else None
        embeddings = self.get_input_embeddings()(inputs["input_ids"])
        embeddings = self._place_study(inputs["input_ids"], embeddings, image_features, image_mask, label_features)
        return embeddings, inputs["attention_mask"]

    # -- generation -----------------------------------------------------------------------------------------------

    def _read_prompt(self, prompt: dict, pixel_values, view_mask, view_features, finding_states) -> dict[str, Any]:
        """The study, read once, and `prompt`, or the default one, with its label text written out."""
        _check_batch(
            **prompt,
            pixel_values=pixel_values,
            view_mask=view_mask,
            view_features=view_features,
            finding_states=finding_states,
        )
        if finding_states is not None and not self.config.dle:
            raise ValueError(
                "finding_states were given, but OTDRGConfig.dle=False: this model does not use finding states"
            )
        study = self.read_study(pixel_values, view_mask, view_features, finding_states)
        if prompt.get("input_ids") is None and prompt.get("inputs_embeds") is None:
            prompt = {**prompt, **self._default_prompt(study.view_mask)}
        return self.expand_finding_text(
            **prompt,
            view_features=study.view_features,
            view_mask=study.view_mask,
            finding_states=study.finding_states,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config=None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        view_mask: torch.Tensor | None = None,
        view_features: torch.Tensor | None = None,
        finding_states: torch.Tensor | None = None,
        **kwargs,
    ):
        """Write reports; see `GenerationMixin.generate` for what else it takes.

        The views are encoded, the states predicted and the label text written out once, before decoding. No loss and no
        transport plan is computed.

        Args:
            inputs or input_ids, attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
                The processor's prompts, padded on the left; the default prompt without them.
            inputs_embeds (`torch.Tensor` of shape `(B, L, hidden_size)`, *optional*):
                Embeddings of the prompts, such as those of [`get_prompt_embeddings`]. Where there are no views, they
                are read as they are.
            pixel_values, view_mask, view_features, finding_states: as in [`forward`]; given states steer the report.
                With a key-value cache of the prompt they are not needed.

        Returns:
            `torch.Tensor` of shape `(B * num_return_sequences, L + new tokens)`: prompts, as given, and reports. From
            `inputs_embeds` alone, reports. In a dictionary of outputs, hidden states, attentions and the cache have the
            length of the prompt with its label text.

        Raises:
            ValueError: no image, states that cannot condition this model, placeholders that do not match, or arguments
                of different numbers of studies.
        """
        given = inputs if input_ids is None else input_ids
        prompt = {
            "input_ids": given,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        needs_views = inputs_embeds is None or finding_states is not None
        if (
            pixel_values is not None
            or view_features is not None
            or (needs_views and not _is_filled(kwargs.get("cache", kwargs.get("past_key_values"))))
        ):
            prompt = self._read_prompt(prompt, pixel_values, view_mask, view_features, finding_states)
            if given is None and inputs_embeds is None:
                given = self._default_prompt(prompt["view_mask"])["input_ids"]
        else:
            _check_batch(**prompt)
        kwargs["logits_processor"] = LogitsProcessorList(
            [*(kwargs.get("logits_processor") or ()), _NoPlaceholders(self.config)]
        )
        prompt = {name: value for name, value in prompt.items() if value is not None}
        output = super().generate(generation_config=generation_config, **prompt, **kwargs)
        if given is None:
            return output
        # Callers cut the prompt off by its length, and theirs does not have the label text written out.
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        repeated = given.repeat_interleave(len(sequences) // len(given), dim=0).to(sequences.device)
        sequences = torch.cat((repeated, sequences[:, prompt["input_ids"].shape[1] :]), dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    def _default_prompt(self, view_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        ids = self.config.prompt_token_ids
        if ids is None:
            raise ValueError("input_ids is missing, and OTDRGConfig.prompt_token_ids=None: pass the processor's output")
        first = ids.index(self.config.image_token_id)
        rows = []
        for views in view_mask.sum(dim=1).tolist():
            repeats = views - 1 if self.config.view_fusion == "concat" else 0
            more = [self.config.image_token_id] * (repeats * self.config.image_tokens)
            rows.append(torch.tensor(ids[:first] + more + ids[first:], device=view_mask.device))
        pad = self.config.text_config.pad_token_id or 0
        masks = [torch.ones_like(row) for row in rows]
        padded = nn.utils.rnn.pad_sequence
        return {
            "input_ids": padded(rows, batch_first=True, padding_value=pad, padding_side="left"),
            "attention_mask": padded(masks, batch_first=True, padding_side="left"),
        }

    def prepare_inputs_for_generation(
        self,
        input_ids,
        attention_mask=None,
        inputs_embeds=None,
        view_features=None,
        view_mask=None,
        finding_states=None,
        is_first_iteration=False,
        **kwargs,
    ):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        # Once the prompt is in the cache, the study is too.
        if view_features is not None and not _is_filled(kwargs.get(CACHE)):
            model_inputs |= {
                "view_features": view_features,
                "view_mask": view_mask,
                "finding_states": finding_states,
                "report_only": True,
            }
        return model_inputs


def _check_batch(**inputs: torch.Tensor | None) -> None:
    """Raise `ValueError` where tensors have different numbers of studies."""
    batched = {
        name: value
        for name, value in inputs.items()
        # Positions may be the same for all studies.
        if isinstance(value, torch.Tensor) and value.ndim > 0 and name != "position_ids"
    }
    for first, reference in batched.items():
        for name, value in batched.items():
            if len(value) != len(reference):
                found, expected = f"{len(value)} rows", len(reference)
                if name.startswith("finding_"):
                    found, expected = f"shape {tuple(value.shape)}", (len(reference), len(FINDINGS))
                raise ValueError(f"{name} has {found}: expected {expected}, as many rows as {first}")
        return


def _is_filled(cache) -> bool:
    """Whether a key-value cache holds tokens."""
    return cache is not None and bool(cache.get_seq_length() > 0)


def _is_another_rank() -> bool:
    """Whether another of the processes that train together writes what is saved, as transformers has it."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0


def _mark_initialized(model: PreTrainedModel) -> None:
    """Keep `post_init` from drawing a loaded backbone's weights anew."""
    for part in (*model.modules(), *model.parameters(), *model.buffers()):
        part._is_hf_initialized = True


#: Around the LLM: small, trained, and read by parts that know nothing of packed weights. Its head stays as it is, too.
_NEVER_QUANTIZED = (
    "vision_tower",
    "finding_vision_tower",
    "image_projector",
    "label_encoder",
    "label_projector",
    "finding_predictor",
    "lm_head",
)


def _of_llm_only(quantization_config):
    """transformers' configuration of quantisation, restricted to the LLM where it does not say itself what to skip."""
    quantization_config = copy.deepcopy(quantization_config)
    for field in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if isinstance(quantization_config, dict):
            quantization_config.setdefault(field, list(_NEVER_QUANTIZED))
        elif hasattr(quantization_config, field) and getattr(quantization_config, field) is None:
            setattr(quantization_config, field, list(_NEVER_QUANTIZED))
    return quantization_config


def _has_adapters(part: nn.Module) -> bool:
    return is_peft_available() and any(isinstance(module, BaseTunerLayer) for module in part.modules())


def _vision_feature_size(vision_tower: PreTrainedModel) -> int:
    if hasattr(vision_tower, "timm_model"):
        return vision_tower.timm_model.num_features
    config = vision_tower.config
    return config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else config.hidden_size


def _unflatten_views(features: torch.Tensor, view_mask: torch.Tensor) -> torch.Tensor:
    """Features (A, ...) of the views that there are as (B, V, ...), 0 where there is none."""
    unflattened = features.new_zeros(*view_mask.shape, *features.shape[1:])
    unflattened[view_mask] = features
    return unflattened


def _of_each_study(image_features: torch.Tensor, image_mask: torch.Tensor) -> list[torch.Tensor]:
    """Image tokens (B, M, D) with their mask (B, M) as a list of B tensors without what is masked."""
    return list(image_features[image_mask].split(image_mask.sum(dim=1).tolist()))


def _as_grid(output: torch.Tensor, vision_tower: PreTrainedModel, image_size: tuple[int, int]) -> torch.Tensor:
    """An encoder's last hidden state, NHWC, NCHW or tokens with or without a class token in front, as (B, D, h, w)."""
    size = _vision_feature_size(vision_tower)
    timm_model = getattr(vision_tower, "timm_model", None)
    if output.ndim == 4:
        channels_last = getattr(timm_model, "output_fmt", None) == "NHWC" or output.shape[1] != size
        return output.permute(0, 3, 1, 2) if channels_last else output
    tokens = output.shape[1]
    patch = getattr(vision_tower.config, "patch_size", None)
    patch = (patch, patch) if isinstance(patch, int) else patch
    height, width = (image_size[0] // patch[0], image_size[1] // patch[1]) if patch else (0, 0)
    if timm_model is not None:
        side = round((tokens - timm_model.num_prefix_tokens) ** 0.5)
        height, width = side, side
    elif not 0 < height * width <= tokens:
        # Hierarchical encoders merge patches: what is left is a square and a few tokens in front.
        height = width = int(tokens**0.5)
    if not 0 < height * width <= tokens or tokens - height * width > 16:
        raise ValueError(f"the vision encoder's {tokens} tokens are not a grid for images of {image_size} pixels")
    return output[:, tokens - height * width :].transpose(1, 2).unflatten(2, (height, width))


OTDRGForReportGeneration.register_for_auto_class("AutoModel")
if __name__ == "otdrg.modeling_otdrg":  # the installed package, not a copy that came with weights
    AutoModel.register(OTDRGConfig, OTDRGForReportGeneration, exist_ok=True)
    AutoModelForImageTextToText.register(OTDRGConfig, OTDRGForReportGeneration, exist_ok=True)

__all__ = [
    "OTDRGForReportGeneration",
    "OTDRGOutput",
    "OTDRGStudy",
    "SinkhornOutput",
    "cost_matrix",
    "focal_loss",
    "plan_entropy",
    "sinkhorn",
]
