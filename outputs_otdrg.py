"""What the model returns: the output of a forward pass, and the studies that reports are written from."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from .predictor_otdrg import FindingPrediction

#: The name of the LLM's key-value cache in transformers: `cache` from 5.24 on.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)


class OTDRGStudy(NamedTuple):
    """
    What the reports of B studies are written from: the result of [`OTDRGForReportGeneration.read_study`].

    Args:
        view_features (`torch.Tensor` of shape `(B, V, P * P, D)`): features of the encoded views, as of
            [`encode_views`].
        view_mask (`torch.Tensor` of shape `(B, V)`): true where there is a view.
        finding_logits (`torch.Tensor` of shape `(B, 14, 4)`): the label predictor's; None if it was not run.
        finding_states (`torch.Tensor` of shape `(B, 14)`): the states the LLM is conditioned on.
        prediction (`FindingPrediction`): all that the label predictor predicts; None if it was not run.
        prior_view_features, prior_view_mask: as the first two, of the prior studies; None if no study has one.
    """

    view_features: torch.Tensor
    view_mask: torch.Tensor
    finding_logits: torch.Tensor | None
    finding_states: torch.Tensor
    prediction: FindingPrediction | None = None
    prior_view_features: torch.Tensor | None = None
    prior_view_mask: torch.Tensor | None = None

    @property
    def encoded_views(self) -> dict[str, torch.Tensor]:
        """The views as arguments of [`OTDRGForReportGeneration.forward`] and `generate`."""
        names = ("view_features", "view_mask", "prior_view_features", "prior_view_mask")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class OTDRGOutput(ModelOutput):
    """
    Output of [`OTDRGForReportGeneration`]. M is the number of image tokens of a study.

    Args:
        loss (`torch.Tensor` of shape `()`): report_loss + lambda * ot_loss (eq. 12), plus predictor_loss where
            `finding_labels` were given.
        report_loss (`torch.Tensor` of shape `()`): L_RG (eq. 11), mean over the report's tokens; with `labels`.
        ot_loss (`torch.Tensor` of shape `()`): L_OT, mean <T, C> over the batch, plus
            `ot_contrastive_weight` times the contrastive term; with `labels`.
        predictor_loss (`torch.Tensor` of shape `()`): L_cls (eq. 10), while training with the tags' loss; with
            `finding_labels`.
        logits (`torch.Tensor` of shape `(B, L, vocab_size)`): the LLM's; while training on `labels` only those that
            predict the first label and what follows.
        transport_plan (`torch.Tensor` of shape `(B, M, 14)`): T.
        finding_logits (`torch.Tensor` of shape `(B, 14, 4)`): the label predictor's; None if all states are given
            without `finding_labels`, with `report_only` or while training a predictor with its own encoder.
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


__all__ = ["CACHE", "OTDRGOutput", "OTDRGStudy"]
