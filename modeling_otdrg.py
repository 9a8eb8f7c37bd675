"""OTDRG: a vision encoder, a label predictor, feature integration by optimal transport, and an LLM that writes reports.

Section and equation numbers are those of "Bridging Vision and Language: Optimal Transport-Driven Radiology Report
Generation via LLMs". Long, because it is the method, to be read from top to bottom. Beside it: `vision_otdrg` (the
encoder), `predictor_otdrg`, `sinkhorn_otdrg`, `prompt_otdrg`, `generation_otdrg` and `weights_otdrg` (loading, saving).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple, logging

from .configuration_otdrg import FINDING_TEXT_TOKEN, OTDRGConfig
from .findings_otdrg import (
    FINDING_STATES,
    FINDINGS,
    NO_FINDING,
    NOT_GIVEN,
    POSITIVE,
    UNMENTIONED,
    check_finding_states,
)
from .generation_otdrg import NO_IMAGE, OTDRGGenerationMixin, given_cache, needs_views
from .heatmaps_otdrg import OTDRGHeatmapMixin
from .outputs_otdrg import CACHE, OTDRGOutput, OTDRGStudy
from .predictor_otdrg import (
    OTDRGFindingPredictor,
    OTDRGQueries,
    OTDRGWords,
    all_rows,
    predictor_loss,
)
from .prompt_otdrg import OTDRGBackbone, check_batch
from .sinkhorn_otdrg import SinkhornOutput, cost_matrix, plan_entropy, sinkhorn
from .vision_otdrg import (
    blocks_feature_size,
    encode_pixels,
    existing_views,
    full_view_mask,
    unflatten_views,
    vision_feature_size,
)
from .weights_otdrg import OTDRGPreTrainedModel

if TYPE_CHECKING:
    # Never run: because of these imports, `save_pretrained` copies all our files beside the weights.
    from .pipeline_otdrg import ReportGenerationPipeline  # noqa: F401
    from .processing_otdrg import OTDRGProcessor  # noqa: F401

logger = logging.get_logger(__name__)

SUPPORT_DEVICES = FINDINGS.index("support_devices")


# --- label features and projections (3.3.1) --------------------------------------------------------------------------


class OTDRGLabelEncoder(nn.Module):
    """f_e(L) of eq. 3: features (14, 4, D) of the 56 texts "finding: state", or learned."""

    def __init__(self, config: OTDRGConfig):
        super().__init__()
        self.kind = config.label_encoder
        self.token_ids = config.finding_text_token_ids
        hidden_size = config.text_config.hidden_size
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
            self.text_encoder.eval()  # frozen: its features are constants, computed without dropout
        return self

    def forward(self, embed: Callable[..., torch.Tensor], device: torch.device | None = None) -> torch.Tensor:
        """Features (14, 4, D); `embed` gives the LLM's word embeddings, as constants, of token ids on `device`."""
        if self.kind == "table":
            return all_rows(self.table, device).unflatten(0, (len(FINDINGS), len(FINDING_STATES)))
        texts = [torch.tensor(ids) for row in self.token_ids for ids in row]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True).to(ids.device)
        with torch.no_grad():
            if self.kind == "text_encoder":
                features = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            else:
                features = embed(ids)
            features = (features.float() * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
            # Uncentred, "x: positive" and "x: negative" are almost the same vector.
            features = features - features.mean(dim=0)
        return features.reshape(len(FINDINGS), len(FINDING_STATES), -1)


class OTDRGPriorEmbedding(nn.Embedding):
    """Added to the image tokens of prior studies: a class of its own because it starts larger than other embeddings."""


class OTDRGProjector(nn.Module):
    """Linear projection into the LLM's embedding space (eqs. 4 and 5), followed by R2GenGPT's LayerNorm."""

    def __init__(self, feature_size: int, hidden_size: int, norm: bool):
        super().__init__()
        self.linear = nn.Linear(feature_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size) if norm else nn.Identity()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(features.to(self.linear.weight.dtype)))


# --- the model -------------------------------------------------------------------------------------------------------


class OTDRGForReportGeneration(OTDRGPreTrainedModel, OTDRGHeatmapMixin, OTDRGGenerationMixin):
    r"""
    Reads a study of chest radiographs and writes its report.

    ```python
    model = AutoModel.from_pretrained("org/otdrg", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained("org/otdrg", trust_remote_code=True)
    inputs = processor(images=[["frontal.png", "lateral.png"]])
    sequences = model.generate(**inputs)[:, inputs["input_ids"].shape[1]:]
    reports = processor.batch_decode(sequences, skip_special_tokens=True)
    ```

    Args:
        config (`OTDRGConfig`)
        vision_tower, language_model, text_encoder (`PreTrainedModel`, *optional*): the backbones; by default new ones.
        backbone_dtype (`str` or `torch.dtype`, *optional*): type of the weights of new backbones, also in
            `from_pretrained`, where `dtype` is that of the others.

    Attributes:
        ot_weight (`float`): lambda of eq. 12; the configuration's unless a schedule changes it.
        ot_epsilon (`float`): epsilon of the transport; likewise.
        finding_logit_adjustment (`torch.Tensor` of shape `(14, 4)`): added to the label predictor's logits in its loss
            while training, and nowhere else; None, as in a loaded model, adds nothing.
        tag_weight (`float`): of the label predictor's auxiliary target in its loss while training.
        patch_dropout (`float`): share of a view's patches that a vision encoder in training mode does not read.
    """

    def __init__(
        self,
        config: OTDRGConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
        text_encoder: PreTrainedModel | None = None,
        backbone_dtype: str | torch.dtype | None = None,
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
        # In the type in which their weights are loaded, so that they are not held in a wider one first.
        typed = {} if backbone_dtype is None else {"dtype": backbone_dtype}
        if vision_tower is None:
            self.vision_tower = AutoModel.from_config(config.vision_config, **typed)
        else:
            self.vision_tower = vision_tower
        if language_model is None:
            self.language_model = AutoModelForCausalLM.from_config(config.text_config, **typed)
        else:
            self.language_model = language_model
        if config.predictor_encoder == "own":
            if vision_tower is None:
                self.finding_vision_tower = AutoModel.from_config(config.vision_config, **typed)
            else:
                self.finding_vision_tower = copy.deepcopy(vision_tower)
                _mark_initialized(self.finding_vision_tower)  # copied parameters lose their mark
        feature_size = vision_feature_size(self.vision_tower)
        hidden_size = config.text_config.hidden_size
        self.image_projector = OTDRGProjector(feature_size, hidden_size, config.projection_norm)
        if config.fiot:
            self.label_encoder = OTDRGLabelEncoder(config)
            if text_encoder is not None:
                self.label_encoder.text_encoder = text_encoder
            self.label_projector = OTDRGProjector(self.label_encoder.feature_size, hidden_size, config.projection_norm)
        feature_size += blocks_feature_size(self.vision_towers[-1], config.predictor_layers or ())
        self.finding_predictor = OTDRGFindingPredictor(config, feature_size)
        if config.reads_prior_images:
            self.prior_embedding = OTDRGPriorEmbedding(1, hidden_size)
        self.ot_weight = config.ot_weight
        self.ot_epsilon = config.ot_epsilon
        self.finding_logit_adjustment: torch.Tensor | None = None
        self.tag_weight = 0.0
        self.patch_dropout = 0.0
        self.post_init()
        if vision_tower is None and language_model is None:
            # After post_init, which would initialise lora_B like any other weight: LoRA starts as the identity.
            self._inject_lora(init_lora_weights=True)

    def set_tags(self, tags: Sequence[str] | None) -> None:
        """Give the label predictor an auxiliary target, a new classifier of tags; with None take it away."""
        self.config.predictor_tags = None if tags is None else list(tags)
        self.finding_predictor.set_tags(0 if tags is None else len(tags))

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # transformers skips custom modules without weights of their own: these are the classes of parts with weights.
        if isinstance(module, (OTDRGQueries, OTDRGPriorEmbedding)):
            # With weights as small as those of other embeddings, attention stays uniform for most of a short training,
            # and image tokens, whose features are of unit variance, would hardly be marked.
            init.normal_(module.weight)
        elif isinstance(module, OTDRGWords):
            init.zeros_(module.weight)

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs):
        super()._set_gradient_checkpointing(enable, **kwargs)
        # The call above does not reach timm, whose models have a switch of their own.
        for tower in self.vision_towers:
            if hasattr(tower, "timm_model") and tower.supports_gradient_checkpointing:
                tower._set_gradient_checkpointing(enable)

    @property
    def base_model(self) -> OTDRGBackbone:
        """The model without the LLM's head. `base_model_prefix` stays empty: saved weights are the whole model's."""
        return OTDRGBackbone(self)

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.language_model.set_output_embeddings(value)

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
        label_weights: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        view_mask: torch.Tensor | None = None,
        view_features: torch.Tensor | None = None,
        finding_states: torch.Tensor | None = None,
        finding_labels: torch.Tensor | None = None,
        tag_labels: torch.Tensor | None = None,
        indication_ids: torch.Tensor | None = None,
        prior_pixel_values: torch.Tensor | None = None,
        prior_view_mask: torch.Tensor | None = None,
        prior_view_features: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        report_only: bool = False,
        **kwargs,
    ) -> OTDRGOutput:
        r"""Losses, logits and transport plan of a batch of studies.

        Args:
            input_ids, attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
                The processor's prompt, its label text written out by [`expand_finding_text`]. Without it only the
                encoder and the label predictor run.
            inputs_embeds (`torch.Tensor` of shape `(B, L, hidden_size)`, *optional*):
                Embeddings in place of `input_ids`. Where placeholders are among them, features take their places.
            labels (`torch.Tensor` of shape `(B, L)`, *optional*): the report's token ids, -100 elsewhere.
            shift_labels (`torch.Tensor` of shape `(B, L)`, *optional*):
                The token that follows each position, in place of `labels`, for a sequence that is cut into parts.
            label_weights (`torch.Tensor` of shape `(B, L)`, *optional*):
                Weights of the tokens in `labels`: `report_loss` is their weighted mean.
            pixel_values (`torch.Tensor` of shape `(B, V, C, H, W)`) and view_mask (`torch.Tensor` of shape `(B, V)`):
                The views.
            view_features (`torch.Tensor` of shape `(B, V, P * P, D)`, *optional*):
                Features from [`encode_views`] in place of `pixel_values`.
            finding_states (`torch.Tensor` of shape `(B, 14)`, *optional*):
                States that condition the LLM; -1 stands for a state to predict, 4 for one that is not given: the LLM
                reads no text and a label token of zeros, and the transport leaves it out. Without them all are
                predicted.
            finding_labels (`torch.Tensor` of shape `(B, 14)`, *optional*):
                True states that supervise the label predictor and nothing else; -100 is ignored.
            tag_labels (`torch.Tensor` of shape `(B, tags)`, *optional*):
                1 where a study has a tag of `config.predictor_tags`, 0 where not, -100 is ignored; with
                `finding_labels`.
            indication_ids (`torch.Tensor` of shape `(B, W)`, *optional*):
                The indications' words as the processor hashes them, -1 where there is none, for the label predictor.
            prior_pixel_values, prior_view_mask, prior_view_features (*optional*):
                As the arguments of the same names without `prior_`, of an earlier study of the patient, for a model
                that reads them (`config.priors`). A study need not have any view.
            report_only (`bool`): compute only what the report and the losses need: no image outputs, without `labels`
                no transport plan, and without `finding_labels` no logits of given states.
            logits_to_keep: as the LLM's; while training on `labels`, or with `report_only`, the positions before the
                first one with a loss are left out instead.
            position_ids, past_key_values or cache, use_cache: the LLM's.
            kwargs: the LLM's, such as `output_hidden_states` and `output_attentions`.

        Returns:
            [`OTDRGOutput`]

        Raises:
            ValueError: no image, placeholders that do not match the features, impossible states, arguments of
                different numbers of studies, or `labels` beyond the LLM's positions.
        """
        cache = given_cache(cache, past_key_values)
        check_batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            shift_labels=shift_labels,
            label_weights=label_weights,
            pixel_values=pixel_values,
            view_mask=view_mask,
            view_features=view_features,
            finding_states=finding_states,
            finding_labels=finding_labels,
            tag_labels=tag_labels,
            indication_ids=indication_ids,
            prior_pixel_values=prior_pixel_values,
            prior_view_mask=prior_view_mask,
            prior_view_features=prior_view_features,
        )
        targets = shift_labels
        if targets is None and labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        if label_weights is not None:
            if labels is None or shift_labels is not None:
                raise ValueError("label_weights were given: expected labels beside them, and no shift_labels")
            label_weights = F.pad(label_weights[:, 1:], (0, 1))
        has_prompt = input_ids is not None or inputs_embeds is not None
        study: OTDRGStudy | None = None
        output: dict[str, Any] = {}

        # 1. Encode the views (eq. 1) and predict the findings (3.4)
        if pixel_values is not None or view_features is not None:
            reader = self._select_reader(has_prompt, finding_states, finding_labels, report_only)
            supervised = finding_labels is not None
            priors = prior_pixel_values, prior_view_mask, prior_view_features
            study = self.read_study(
                pixel_values, view_mask, view_features, finding_states, reader, supervised, indication_ids, *priors
            )
            output["finding_logits"] = study.finding_logits
            if finding_labels is not None and study.prediction is not None:
                output["predictor_loss"] = predictor_loss(
                    study.prediction,
                    finding_labels,
                    tag_labels,
                    self.config,
                    self.training,
                    self.finding_logit_adjustment,
                    self.tag_weight,
                )
        elif finding_labels is not None or needs_views(inputs_embeds, finding_states, cache):
            raise ValueError(NO_IMAGE)

        if has_prompt:
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            else:
                input_ids = None
            length, positions = inputs_embeds.shape[1], self.config.text_positions
            if targets is not None and position_ids is None and positions is not None and length > positions:
                raise ValueError(
                    f"a prompt and its report of {length} tokens: expected at most {positions}, the positions of the "
                    "LLM: shorten the indication or the report"
                )
            if study is not None:
                # 2. Project image and label features into the LLM's space (eqs. 3 to 5), to the places of their tokens
                image_features, image_mask = self.project_views(study.view_features, study.view_mask)
                features = image_features, image_mask, self._label_features(study.finding_states), study.finding_states
                prior_features = self.project_priors(study.prior_view_features, study.prior_view_mask)
                inputs_embeds, transport = self._place_study(input_ids, inputs_embeds, *features, prior_features)
                # 3. Align them by optimal transport (3.3.2)
                if self.config.fiot and (targets is not None or not report_only):
                    output |= self._align(*features, transport, with_loss=targets is not None)
                if not report_only:
                    output["image_outputs"] = BaseModelOutputWithPooling(
                        last_hidden_state=self._report_features(study.view_features),
                        pooler_output=_split_by_study(image_features, image_mask),
                    )
            # 4. Run the LLM (3.5)
            if targets is not None and (self.training or report_only):
                # Skip the head, most of a small LLM's cost, before the first target: those positions have no loss. By
                # index, because the slice of an int is not contiguous, and the head's weights are then copied per row.
                first = int((targets != -100).any(dim=0).int().argmax())
                logits_to_keep = torch.arange(first, targets.shape[1], device=targets.device)
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
                output[name] = text_output.get(name)
            if targets is not None:
                output["report_loss"] = self._report_loss(text_output.logits, targets, label_weights)

        # 5. Add up the losses (eq. 12)
        weights = {"report_loss": 1.0, "ot_loss": self.ot_weight, "predictor_loss": 1.0}
        losses = [weight * output[name] for name, weight in weights.items() if name in output]
        return OTDRGOutput(loss=sum(losses) if losses else None, **output)

    def _select_reader(self, has_prompt: bool, finding_states, finding_labels, report_only: bool) -> str:
        """Which of [`encode_views`]' readers a forward pass needs features for."""
        if not has_prompt:
            return "predictor"
        # While training only: otherwise the output always has the logits.
        trains_report = self.training and self.config.predictor_encoder == "own"
        skips_predictor = finding_labels is None and (report_only or trains_report)
        if skips_predictor and finding_states is not None and bool((finding_states >= 0).all()):
            return "report"
        return "both"

    def _requested_outputs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """`kwargs` with the outputs that the configuration asks for unless the caller decides."""
        # accelerate's unwrapping of `forward` removes `can_return_tuple`, and then return_dict arrives here.
        kwargs = {name: value for name, value in kwargs.items() if name != "return_dict"}
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name) is None and getattr(self.config, name, None):
                kwargs[name] = True
        return kwargs

    @staticmethod
    def _report_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """L_RG (eq. 11): (weighted) mean of the cross-entropies; `logits` are those of the last positions."""
        targets = targets[:, -logits.shape[1] :]
        logits = logits.float().flatten(0, 1)
        if weights is None:
            loss = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")
            return loss / (targets != -100).sum().clamp(min=1)
        losses = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="none")
        weights = (weights[:, -targets.shape[1] :] * (targets != -100)).flatten().to(losses.dtype)
        return (losses * weights).sum() / weights.sum().clamp(min=torch.finfo(losses.dtype).tiny)

    # -- step 1: views and finding states -------------------------------------------------------------------------

    def read_study(
        self,
        pixel_values: torch.Tensor | None = None,
        view_mask: torch.Tensor | None = None,
        view_features: torch.Tensor | None = None,
        finding_states: torch.Tensor | None = None,
        reader: str = "both",
        supervised: bool = False,
        indication_ids: torch.Tensor | None = None,
        prior_pixel_values: torch.Tensor | None = None,
        prior_view_mask: torch.Tensor | None = None,
        prior_view_features: torch.Tensor | None = None,
    ) -> OTDRGStudy:
        """Encode the views, predict the finding states (3.4) and determine those that condition the LLM.

        Args:
            pixel_values, view_mask, view_features, finding_states: as in [`forward`].
            reader (`str`): as in [`encode_views`]; for `"report"` nothing is predicted and all states must be given.
            supervised (`bool`): whether gradients pass through the label predictor.
            indication_ids, prior_pixel_values, prior_view_mask, prior_view_features: as in [`forward`].

        Raises:
            ValueError: no image, impossible states, or arguments of different numbers of studies.
        """
        check_batch(
            pixel_values=pixel_values,
            view_mask=view_mask,
            view_features=view_features,
            finding_states=finding_states,
            indication_ids=indication_ids,
            prior_pixel_values=prior_pixel_values,
            prior_view_mask=prior_view_mask,
            prior_view_features=prior_view_features,
        )
        if view_features is None:
            if pixel_values is None:
                raise ValueError(NO_IMAGE)
            view_features = self.encode_views(pixel_values, view_mask, reader)
        view_mask = full_view_mask(view_features, view_mask)
        priors: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if reader != "predictor":
            priors = self._encode_priors(prior_pixel_values, prior_view_mask, prior_view_features)
        if finding_states is not None:
            check_finding_states(finding_states, len(view_features))
            if reader == "report":
                return OTDRGStudy(view_features, view_mask, None, finding_states, None, *priors)
        with torch.set_grad_enabled(supervised and torch.is_grad_enabled()):
            prediction = self.finding_predictor(view_features, view_mask, indication_ids)
        states = self.condition_states(prediction.finding_logits.detach(), finding_states)
        return OTDRGStudy(view_features, view_mask, prediction.finding_logits, states, prediction, *priors)

    def encode_views(
        self, pixel_values: torch.Tensor, view_mask: torch.Tensor | None = None, reader: str = "both"
    ) -> torch.Tensor:
        """X of eq. 1 for every view, pooled to a grid of P x P tokens, `config.view_grid`: that of the image tokens, or
        the finer one of the label predictor (`predictor_grid`).

        Args:
            pixel_values (`torch.Tensor` of shape `(B, V, C, H, W)`)
            view_mask (`torch.Tensor` of shape `(B, V)`, *optional*): true where there is a view; each study has one.
            reader (`str`): what reads the features, `"report"`, `"predictor"` or `"both"`. With
                `predictor_encoder="own"` these have different encoders, and only the ones needed run.

        Returns:
            `torch.Tensor` of shape `(B, V, P * P, D)`; 0 where there is no view. With
            `predictor_encoder="own"` and `"both"`, the report's features and the predictor's, concatenated in D. Those
            of `predictor_layers`, of unit variance, come last, and are left out for `"report"`.
        """
        pixels, view_mask = existing_views(pixel_values, view_mask)
        towers = {"report": self.vision_towers[:1], "predictor": self.vision_towers[-1:], "both": self.vision_towers}
        features = []
        for tower in towers[reader]:
            for_predictor = reader != "report" and tower is self.vision_towers[-1]
            patch_dropout = self.patch_dropout if tower.training else 0.0
            features.append(encode_pixels(tower, pixels, self.config, for_predictor, patch_dropout)[0])
        # Concatenating a trained encoder's features and a frozen one's gives the wider of their types.
        return unflatten_views(torch.cat(features, -1), view_mask)

    def _encode_priors(
        self, pixel_values: torch.Tensor | None, view_mask: torch.Tensor | None, view_features: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """Features (B, V', P * P, D) of the views of prior studies, and their mask (B, V'); None without any."""
        given = pixel_values if view_features is None else view_features
        if given is None:
            return None, None
        if not self.config.reads_prior_images:
            raise ValueError(
                f"prior views were given: expected none, this model does not read them (OTDRGConfig.priors="
                f"{self.config.priors!r})"
            )
        view_mask = full_view_mask(given, view_mask, required=False)
        if not view_mask.any():
            return None, None
        if view_features is None:
            pixels, _ = existing_views(given, view_mask, required=False)
            patch_dropout = self.patch_dropout if self.vision_tower.training else 0.0
            features = encode_pixels(self.vision_tower, pixels, self.config, patch_dropout=patch_dropout)[0]
            view_features = unflatten_views(features, view_mask)
        return view_features, view_mask

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
            projected image tokens (M, hidden_size); `hidden_states` and `attentions` of the existing views.
        """
        pixels, view_mask = existing_views(pixel_values, view_mask)
        features, output = encode_pixels(self.vision_tower, pixels, self.config, **kwargs)
        view_features = unflatten_views(features, view_mask)
        return BaseModelOutputWithPooling(
            last_hidden_state=self._report_features(view_features),
            pooler_output=_split_by_study(*self.project_views(view_features, view_mask)),
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )

    def finding_probabilities(self, finding_logits: torch.Tensor) -> torch.Tensor:
        """Probabilities (B, 14, 4) of the states, calibrated with `config.finding_calibration` if there is one.

        "No finding" can only be unmentioned or positive.
        """
        logits = finding_logits.float().clone()
        logits[:, NO_FINDING, POSITIVE + 1 :] = -torch.inf
        if self.config.finding_calibration is not None:
            slope, intercept = torch.tensor(self.config.finding_calibration, device=logits.device).unbind(dim=-1)
            others = logits[..., [state for state in range(len(FINDING_STATES)) if state != POSITIVE]].logsumexp(dim=-1)
            logits[..., POSITIVE] = others + slope * (logits[..., POSITIVE] - others) + intercept
        return logits.softmax(dim=-1)

    def predict_states(self, finding_logits: torch.Tensor) -> torch.Tensor:
        """States (B, 14) from the predictor's logits (B, 14, 4) (3.4).

        The most likely state of each finding; with `config.finding_thresholds`, positive where its probability reaches
        the finding's threshold and the most likely other state elsewhere.
        """
        probabilities = self.finding_probabilities(finding_logits)
        if self.config.finding_thresholds is None:
            return probabilities.argmax(dim=-1)
        thresholds = torch.tensor(self.config.finding_thresholds, device=probabilities.device)
        positive = probabilities[..., POSITIVE] >= thresholds
        others = probabilities.clone()
        others[..., POSITIVE] = -1.0
        return torch.where(positive, POSITIVE, others.argmax(dim=-1))

    def condition_states(
        self, finding_logits: torch.Tensor, finding_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """States (B, 14) that condition the LLM: the given ones, and predicted ones in place of -1 or None.

        If any finding except support devices is given as positive, "no finding" is predicted as unmentioned.
        """
        predicted = self.predict_states(finding_logits)
        if finding_states is None:
            return predicted
        finding_states = finding_states.to(predicted.device)
        found = finding_states == POSITIVE
        found[:, [NO_FINDING, SUPPORT_DEVICES]] = False
        predicted[found.any(dim=1), NO_FINDING] = UNMENTIONED
        return torch.where(finding_states < 0, predicted, finding_states)

    # -- step 2: projections, and features in the prompt -----------------------------------------------------------

    def _report_features(self, view_features: torch.Tensor) -> torch.Tensor:
        """The features (B, V, image_tokens, D) of the report's encoder, averaged to the grid of image tokens.

        They stand before those of the predictor's own encoder.
        """
        features, side = view_features[..., : self.image_projector.linear.in_features], self.config.image_grid
        if self.config.view_grid == side:
            return features
        factor = self.config.view_grid // side
        return features.unflatten(2, (side, factor, side, factor)).mean(dim=(3, 5)).flatten(2, 3)

    def fuse_views(self, view_features: torch.Tensor, view_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, V, P * P, D) -> one sequence of image tokens per study (B, M, D) and its mask (B, M).

        What only the predictor reads, the last features in D, is left out, and the tokens of its grid averaged.
        """
        view_features = self._report_features(view_features)
        batch, views, tokens, size = view_features.shape
        if self.config.view_fusion == "concat":
            return view_features.reshape(batch, views * tokens, size), view_mask.repeat_interleave(tokens, dim=1)
        weights = view_mask / view_mask.sum(dim=1, keepdim=True).clamp(min=1)
        fused = (view_features * weights[:, :, None, None].to(view_features.dtype)).sum(dim=1)
        return fused, view_mask.any(dim=1, keepdim=True).expand(-1, tokens)

    def project_views(
        self, view_features: torch.Tensor, view_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """f_p(X) of eq. 4, (B, M, hidden_size), and its mask (B, M), from the features of [`encode_views`]."""
        fused, mask = self.fuse_views(view_features, full_view_mask(view_features, view_mask))
        return self.image_projector(fused), mask

    def project_priors(
        self, view_features: torch.Tensor | None, view_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Image tokens (B, M', hidden_size) of the views of prior studies, marked as such, and their mask (B, M').

        They are fused among themselves, not with the current views, and only studies with a prior have any.
        """
        if view_features is None or view_mask is None:
            return None
        fused, mask = self.fuse_views(view_features, view_mask)
        tokens = self.image_projector(fused)
        return tokens + all_rows(self.prior_embedding, tokens.device), mask

    def _drop_images(self, image_features: torch.Tensor) -> torch.Tensor:
        """Image tokens (B, M, hidden_size); while training, those of a share of the studies are 0 (`image_dropout`)."""
        if not (self.training and self.config.image_dropout):
            return image_features
        kept = torch.rand(len(image_features), 1, 1, device=image_features.device) >= self.config.image_dropout
        return image_features * kept

    def get_label_features(self, finding_states: torch.Tensor) -> torch.Tensor:
        """f_p(Y) of eq. 5, (B, 14, hidden_size), of states (B, 14); 0 for a finding that is not given."""
        word_embeddings = self.get_input_embeddings()
        # A function, because accelerate moves modules among the arguments to the part's device.
        features = self.label_encoder(lambda ids: word_embeddings(ids), finding_states.device)
        table = self.label_projector(features)
        table = F.pad(table, (0, 0, 0, 1))
        return table[torch.arange(len(FINDINGS), device=finding_states.device), finding_states]

    def _label_features(self, finding_states: torch.Tensor) -> torch.Tensor | None:
        """[`get_label_features`] of a model with FIOT; None without."""
        return self.get_label_features(finding_states) if self.config.fiot else None

    def _place_study(
        self, input_ids, inputs_embeds, image_features, image_mask, label_features, finding_states, priors=None
    ) -> tuple[torch.Tensor, tuple[SinkhornOutput, torch.Tensor] | None]:
        """`inputs_embeds` with image tokens and, with FIOT, label tokens (eqs. 4 and 5) in their places.

        `priors`, the result of [`project_priors`], follow the study's own image tokens.

        With `finding_tokens="transported"` a label token is the label feature plus the image transported to the label,
        N sum_m T_mj x_m, of N labels: the mean of the image tokens, weighted by column j of the plan.

        Returns:
            The embeddings, and the result of [`transport`] if it was computed.
        """
        if input_ids is not None and (input_ids == self.config.finding_text_token_id).any():
            logger.warning_once(
                f"input_ids holds {FINDING_TEXT_TOKEN}: the LLM reads the placeholder and not the label text; call "
                "model(**model.expand_finding_text(**inputs))"
            )
        placed, placed_mask = image_features, image_mask
        if priors is not None:
            placed, placed_mask = torch.cat((placed, priors[0]), dim=1), torch.cat((placed_mask, priors[1]), dim=1)
        elif self.training and self.config.reads_prior_images:
            # Distributed training wants a gradient of every weight, also where no study of the batch has a prior.
            placed = placed + 0 * all_rows(self.prior_embedding, placed.device)
        placed = self._drop_images(placed)
        read = placed[:, : image_features.shape[1]]
        inputs_embeds = self._place_features("image", input_ids, inputs_embeds, placed, placed_mask)
        if label_features is None:
            return inputs_embeds, None
        transport, tokens = None, label_features
        if self.config.finding_tokens == "transported":
            transport = self.transport(image_features, image_mask, label_features, finding_states)
            labels = self._label_mask(finding_states).sum(dim=1)[:, None, None]
            plan = transport[0].plan.transpose(1, 2) * labels
            tokens = label_features + plan.to(read.dtype) @ read
        every_label = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return self._place_features("finding", input_ids, inputs_embeds, tokens, every_label), transport

    # -- step 3: optimal transport --------------------------------------------------------------------------------

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
        return self._solve(cost, image_mask, self._label_mask(finding_states)), cost

    def _solve(self, cost: torch.Tensor, image_mask: torch.Tensor, label_mask: torch.Tensor) -> SinkhornOutput:
        """The transport of costs (B, M, 14) with masks (B, M) and (B, 14)."""
        return sinkhorn(
            cost,
            self.ot_epsilon,
            self.config.ot_max_iterations,
            self.config.ot_tolerance,
            row_mask=image_mask,
            column_mask=label_mask,
            gradient=self.config.ot_gradient,
        )

    def _label_mask(self, finding_states: torch.Tensor) -> torch.Tensor:
        """The labels (B, 14) that take part in the transport: those that are given."""
        given = finding_states != NOT_GIVEN
        return given & (finding_states != UNMENTIONED) if self.config.ot_labels == "mentioned" else given

    def _align(
        self, image_features, image_mask, label_features, finding_states, transported, with_loss: bool
    ) -> dict[str, Any]:
        """The transport plan and, on request, L_OT and the figures to watch (see [`OTDRGOutput`]).

        `transported` is the result of [`transport`] if there is one already.
        """
        transport, cost = transported or self.transport(image_features, image_mask, label_features, finding_states)
        output = {"transport_plan": transport.plan}
        if with_loss:
            output["ot_loss"] = transport.distance.mean()
            if self.config.ot_contrastive_weight > 0 and len(finding_states) > 1:
                contrastive = self._contrastive_ot_loss(image_features, image_mask, label_features, finding_states)
                output["ot_loss"] = output["ot_loss"] + self.config.ot_contrastive_weight * contrastive
            output |= self._transport_figures(transport, cost, image_mask, label_features, finding_states)
        return output

    def _contrastive_ot_loss(self, image_features, image_mask, label_features, finding_states) -> torch.Tensor:
        """InfoNCE over -d_OT of each study's image with its own labels against other studies' different labels.

        Labels that differ only in what is not given may be the same. A study without labels has no distance.
        """
        batch = len(finding_states)
        # One matrix of all tokens with all labels takes a small part of the memory, and of the time, of one per pair.
        tokens, labels = image_features.flatten(0, 1)[None], label_features.flatten(0, 1)[None]
        cost = cost_matrix(tokens, labels, self.config.ot_cost_normalization)
        cost = cost.reshape(batch, -1, batch, label_features.shape[1]).transpose(1, 2).flatten(0, 1)
        label_mask = self._label_mask(finding_states)
        masks = image_mask.repeat_interleave(batch, dim=0), label_mask.repeat(batch, 1)
        distance = self._solve(cost, *masks).distance.reshape(batch, batch)
        one, other = finding_states[:, None], finding_states[None]
        same = ((one == other) | (one == NOT_GIVEN) | (other == NOT_GIVEN)).all(dim=-1)
        labelled = label_mask.any(dim=1)
        studies = torch.arange(batch, device=finding_states.device)
        no_negative = (same | ~labelled) & (studies[:, None] != studies)
        scale = self.config.ot_contrastive_temperature * distance.detach().mean().clamp(min=1e-6)
        losses = F.cross_entropy((-distance / scale).masked_fill(no_negative, -torch.inf), studies, reduction="none")
        return (losses * labelled).sum() / labelled.sum().clamp(min=1)

    @torch.no_grad()
    def _transport_figures(self, transport, cost, image_mask, label_features, states) -> dict[str, torch.Tensor]:
        """The figures to watch while training (see [`OTDRGOutput`])."""
        mass = image_mask[:, :, None] & self._label_mask(states)[:, None, :]
        cells = mass.sum(dim=(1, 2)).clamp(min=2).float()
        label_features = label_features.float()
        centred = label_features - label_features.mean(dim=1, keepdim=True)
        return {
            "ot_marginal_error": transport.marginal_error.mean(),
            "plan_entropy": (plan_entropy(transport.plan) / cells.log()).mean(),
            "epsilon_to_cost": self.ot_epsilon / ((cost * mass).sum() / mass.sum().clamp(min=1)).clamp(min=1e-12),
            "label_spread": centred.norm(dim=-1).mean() / label_features.norm(dim=-1).mean().clamp(min=1e-12),
        }


def _mark_initialized(model: PreTrainedModel) -> None:
    """Keep `post_init` from initialising the weights of a loaded backbone again."""
    for part in (*model.modules(), *model.parameters(), *model.buffers()):
        part._is_hf_initialized = True


def _split_by_study(image_features: torch.Tensor, image_mask: torch.Tensor) -> list[torch.Tensor]:
    """Image tokens (B, M, D) as a list of B tensors without those that the mask (B, M) excludes."""
    return list(image_features[image_mask].split(image_mask.sum(dim=1).tolist()))


OTDRGForReportGeneration.register_for_auto_class("AutoModel")
if __name__ == "otdrg.modeling_otdrg":  # the installed package, not a copy that came with weights
    AutoModel.register(OTDRGConfig, OTDRGForReportGeneration, exist_ok=True)
    AutoModelForImageTextToText.register(OTDRGConfig, OTDRGForReportGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(OTDRGConfig, OTDRGForReportGeneration, exist_ok=True)

__all__ = ["OTDRGForReportGeneration", "OTDRGOutput", "OTDRGStudy"]
