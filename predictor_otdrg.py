"""Disease label prediction (3.4): from view features to the states of the 14 findings, and its loss (eq. 10)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_otdrg import INDICATION_BUCKETS, OTDRGConfig
from .findings_otdrg import FINDING_STATES, FINDINGS, check_finding_states
from .sinkhorn_otdrg import cost_matrix, sinkhorn


def focal_loss(
    logits: torch.Tensor, labels: torch.Tensor, gamma: float = 2.0, reduction: str = "finding"
) -> torch.Tensor:
    """Focal loss over the four states of each finding (eq. 10), a scalar.

    Args:
        logits (`torch.Tensor` of shape `(B, 14, 4)`)
        labels (`torch.Tensor` of shape `(B, 14)`): state ids; -100 is ignored.
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


class FindingPrediction(NamedTuple):
    """
    What [`OTDRGFindingPredictor`] predicts for B studies, with H heads.

    Args:
        finding_logits (`torch.Tensor` of shape `(B, 14, 4)`): log of the heads' mean probabilities; of one head, its
            logits.
        head_logits (`torch.Tensor` of shape `(B, H, 14, 4)`): each head's.
        tag_logits (`torch.Tensor` of shape `(B, H, tags)`): of the auxiliary target; None without tags.
    """

    finding_logits: torch.Tensor
    head_logits: torch.Tensor
    tag_logits: torch.Tensor | None


def all_rows(embedding: nn.Embedding, device: torch.device | None) -> torch.Tensor:
    """The weight (N, D) of an embedding, through its `forward`, for which accelerate loads offloaded weights."""
    return embedding(torch.arange(embedding.num_embeddings, device=device))


class OTDRGQueries(nn.Embedding):
    """Attention queries: a class of its own because they start larger than other embeddings."""


class OTDRGWords(nn.Embedding):
    """Logits of words: a class of its own because they start at 0."""


class OTDRGClassifiers(nn.Linear):
    """G linear classifiers in one weight: features (B, G, D) -> logits (B, G, N)."""

    def __init__(self, feature_size: int, classifiers: int, classes: int, **where):
        super().__init__(feature_size, classifiers * classes, **where)
        self.classifiers = classifiers

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        weight, bias = (parameter.unflatten(0, (self.classifiers, -1)) for parameter in (self.weight, self.bias))
        return torch.einsum("bgd,gnd->bgn", features, weight) + bias


class OTDRGFindingPredictor(nn.Module):
    """14 x 4 logits from view features: for each finding, a classifier of the pooled tokens of all views.

    Heads have their own queries, classifiers and dropout. The words of an indication, as buckets of a hash, add their
    logits to all heads; without one nothing is added.
    """

    def __init__(self, config: OTDRGConfig, feature_size: int):
        super().__init__()
        self.feature_size, self.heads, self.pooling = feature_size, config.predictor_heads, config.predictor_pooling
        self.epsilon, self.iterations = config.predictor_epsilon, config.predictor_iterations
        cells = self.heads * len(FINDINGS)
        self.norm = nn.LayerNorm(feature_size)
        if self.pooling != "mean":
            self.queries = (OTDRGQueries if self.pooling == "attention" else nn.Embedding)(cells, feature_size)
            self.key = nn.Linear(feature_size, feature_size)
        else:
            # Means of tokens vary little between studies; without standardisation the classifier learns slowly.
            self.standardize = nn.BatchNorm1d(feature_size, affine=False)
        self.dropout = nn.Dropout(config.predictor_dropout)
        pooled_size = 2 * feature_size if self.pooling == "attention" else feature_size
        # Of the mean, which is the same for all findings, a head has one classifier for all 14.
        classifiers = self.heads if self.pooling == "mean" else cells
        self.classifier = OTDRGClassifiers(pooled_size, classifiers, cells // classifiers * len(FINDING_STATES))
        self.set_tags(len(config.predictor_tags or ()))
        if config.indication_reader != "report":
            self.words = OTDRGWords(INDICATION_BUCKETS, len(FINDINGS) * len(FINDING_STATES))

    def set_tags(self, tags: int) -> None:
        """Give the predictor a classifier of this number of tags, or with 0 take it away."""
        size, weight = self.classifier.in_features, self.classifier.weight
        where = {"device": weight.device, "dtype": weight.dtype}
        self.tag_classifier = OTDRGClassifiers(size, self.heads, tags, **where) if tags else None

    def forward(
        self,
        view_features: torch.Tensor,
        view_mask: torch.Tensor,
        indication_ids: torch.Tensor | None = None,
    ) -> FindingPrediction:
        """`view_features` (B, V, N, D), `view_mask` (B, V), `indication_ids` (B, W) -> [`FindingPrediction`].

        What the predictor reads are the last features in D.
        """
        features, mask = self._features(view_features, view_mask)
        pooled = self.dropout(self._pooled(features, mask))
        head_logits = self.classifier(pooled.flatten(1, 2)).reshape(-1, self.heads, len(FINDINGS), len(FINDING_STATES))
        if indication_ids is not None and hasattr(self, "words"):
            head_logits = head_logits + self._indication_logits(indication_ids)[:, None]
        finding_logits = head_logits[:, 0]
        if self.heads > 1:
            finding_logits = head_logits.log_softmax(dim=-1).logsumexp(dim=1) - math.log(self.heads)
        tag_logits = None
        if self.tag_classifier is not None:
            tag_logits = self.tag_classifier(pooled.mean(dim=2))
        return FindingPrediction(finding_logits, head_logits, tag_logits)

    def token_weights(self, view_features: torch.Tensor, view_mask: torch.Tensor) -> torch.Tensor:
        """The weight (B, 14, V * N) of each token in what is pooled for a finding, mean over heads; sums to 1."""
        features, mask = self._features(view_features, view_mask)
        if self.pooling == "mean":
            return (mask / mask.sum(dim=1, keepdim=True))[:, None].expand(-1, len(FINDINGS), -1)
        return self._weights(features, mask).unflatten(1, (self.heads, len(FINDINGS))).mean(dim=1)

    def _features(self, view_features: torch.Tensor, view_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The normalised tokens (B, V * N, D) of all views, and their mask (B, V * N)."""
        features = self.norm(view_features[..., -self.feature_size :].to(self.norm.weight.dtype))
        return features.flatten(1, 2), view_mask.repeat_interleave(features.shape[2], dim=1)

    def _pooled(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What the classifiers read, (B, H, 14, P); (B, H, 1, P) if it is the same for all findings."""
        mean = (features * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        if self.pooling == "mean":
            if self.training and len(mean) == 1:  # statistics of a batch need more than one study
                running = self.standardize.running_mean, self.standardize.running_var
                mean = F.batch_norm(mean, *running, eps=self.standardize.eps)
            else:
                mean = self.standardize(mean)
            # All findings share one dropout mask: 14 masks would take most of the time of a step, without benefit.
            return mean[:, None, None].expand(-1, self.heads, -1, -1)
        pooled = self._weights(features, mask) @ features
        if self.pooling == "attention":
            pooled = torch.cat((pooled, mean[:, None].expand_as(pooled)), dim=-1)
        return pooled.unflatten(1, (self.heads, len(FINDINGS)))

    def _weights(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pooling weights (B, H * 14, V * N): attention, or the plan of each head, its columns scaled to sum 1."""
        keys, queries = self.key(features), all_rows(self.queries, features.device)
        if self.pooling == "attention":
            scores = queries @ keys.transpose(1, 2) / self.feature_size**0.5
            return scores.masked_fill(~mask[:, None, :], -torch.inf).softmax(dim=-1)
        anchors = queries.unflatten(0, (self.heads, len(FINDINGS)))
        cost = torch.stack([cost_matrix(keys, head.expand(len(keys), -1, -1), "unit") for head in anchors], dim=1)
        row_mask = mask.repeat_interleave(self.heads, dim=0)
        plan = sinkhorn(cost.flatten(0, 1), self.epsilon, self.iterations, 0.0, row_mask, gradient="unroll").plan
        # The iterations end with the columns, so that these sums are exact.
        return (len(FINDINGS) * plan).transpose(1, 2).reshape(len(keys), -1, keys.shape[1]).to(features.dtype)

    def _indication_logits(self, indication_ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, 14, 4) of the words' buckets (B, W), -1 where there is none; 0 without any."""
        known = indication_ids >= 0
        words = (self.words(indication_ids.clamp(min=0)) * known[:, :, None]).sum(dim=1)
        words = words / known.sum(dim=1, keepdim=True).clamp(min=1).sqrt()
        return words.unflatten(1, (len(FINDINGS), len(FINDING_STATES)))


def predictor_loss(
    prediction: FindingPrediction,
    finding_labels: torch.Tensor,
    tag_labels: torch.Tensor | None,
    config: OTDRGConfig,
    training: bool,
    logit_adjustment: torch.Tensor | None = None,
    tag_weight: float = 0.0,
) -> torch.Tensor:
    """L_cls (eq. 10) of the mean of the heads; while training, the mean of the heads' own losses.

    Args:
        prediction: of B studies.
        finding_labels (`torch.Tensor` of shape `(B, 14)`): state ids; -100 is ignored.
        tag_labels (`torch.Tensor` of shape `(B, tags)`): 1, 0, or -100, which is ignored; or None.
        training (`bool`): whether the two arguments below count.
        logit_adjustment (`torch.Tensor` of shape `(14, 4)`): added to the logits.
        tag_weight (`float`): of the tags' cross-entropy in the loss.
    """
    check_finding_states(finding_labels, len(finding_labels), missing=-100, name="finding_labels")
    gamma, reduction = config.focal_gamma, config.focal_reduction
    if not training:
        return focal_loss(prediction.finding_logits, finding_labels, gamma, reduction)
    heads = config.predictor_heads
    logits = prediction.head_logits.flatten(0, 1)
    if logit_adjustment is not None:
        logits = logits + logit_adjustment.to(logits)
    loss = focal_loss(logits, finding_labels.repeat_interleave(heads, dim=0), gamma, reduction)
    if tag_labels is None or prediction.tag_logits is None:
        return loss
    known = (tag_labels != -100)[:, None].expand_as(prediction.tag_logits)
    targets = tag_labels[:, None].expand_as(prediction.tag_logits).float()
    entropies = F.binary_cross_entropy_with_logits(prediction.tag_logits.float(), targets, reduction="none")
    return loss + tag_weight * (entropies * known).sum() / known.sum().clamp(min=1)


__all__ = ["FindingPrediction", "OTDRGFindingPredictor", "OTDRGQueries", "OTDRGWords", "focal_loss", "predictor_loss"]
