"""Quality of an encoder's features: a linear probe, alignment and uniformity."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ..findings_otdrg import FINDINGS, POSITIVE
from ..inference.features import encode_batches
from ..metrics.classification import area_under_curve
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from ..studies.streaming import StreamedStudies


@dataclass
class ViewFeatures:
    """Features `views` (A, D) of the views of S studies, `study` (A,) their positions, and the `states` (S, 14)."""

    views: torch.Tensor
    study: torch.Tensor
    states: np.ndarray

    def by_study(self) -> torch.Tensor:
        """(S, D), the mean over each study's views."""
        sums = self.views.new_zeros(len(self.states), self.views.shape[1]).index_add_(0, self.study, self.views)
        return sums / self.study.bincount(minlength=len(self.states))[:, None]


def encode_studies(
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    studies: Dataset | StreamedStudies,
    limit: int,
    batch_size: int,
) -> ViewFeatures:
    """Features of the report's encoder for the first `limit` studies, averaged over each view's image tokens.

    The studies' finding states must be known; streamed studies are taken in the order of the first epoch.
    """
    if isinstance(studies, StreamedStudies):
        studies.set_epoch(0)
    views, study, states = [], [], []
    for rows, features, view_mask in encode_batches(
        model, processor, islice(studies, limit), batch_size, reader="report"
    ):
        views.append(features[view_mask].mean(dim=1).float().cpu())
        study.append(view_mask.nonzero()[:, 0].cpu() + len(states))
        states += [row["finding_states"] for row in rows]
    return ViewFeatures(torch.cat(views), torch.cat(study), np.array(states))


# --- alignment and uniformity ----------------------------------------------------------------------------------------


def alignment(anchors: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of normalised anchors (A, D) and positives (A, D) (Wang and Isola, 2020); 0 is best."""
    distance = F.normalize(anchors.float(), dim=-1) - F.normalize(positives.float(), dim=-1)
    return distance.square().sum(dim=-1).mean()


def uniformity(
    anchors: torch.Tensor, groups: torch.Tensor, keys: torch.Tensor, key_groups: torch.Tensor
) -> torch.Tensor | None:
    """Log of the mean of exp(-2 d^2) over pairs of different groups of normalised features (Wang and Isola, 2020).

    Args:
        anchors, groups: (A, D) and (A,).
        keys, key_groups: (K, D) and (K,).

    Returns:
        From 0, all in one point, towards -4; None where there is no pair.
    """
    anchors, keys = F.normalize(anchors.float(), dim=-1), F.normalize(keys.float(), dim=-1)
    other = groups[:, None] != key_groups[None]
    if not other.any():
        return None
    squared = 2 - 2 * (anchors @ keys.T)
    return (-2 * squared[other]).logsumexp(dim=0) - other.sum().log()


# --- the probe -------------------------------------------------------------------------------------------------------


def linear_probe(train: ViewFeatures, validation: ViewFeatures) -> dict[str, Any]:
    """AUC on validation of logistic regressions, positive against the other states, fitted on training studies.

    Features are averaged over a study's views, and standardised.

    Returns:
        `macro_auc` over the `auc_findings` findings with positives and others in both; `train_studies` and
        `validation_studies`; under `findings` each one's `positives` on validation and `auc`.
    """
    features, unseen = (part.by_study().double().numpy() for part in (train, validation))
    scaler = StandardScaler().fit(features)
    features, unseen = scaler.transform(features), scaler.transform(unseen)
    findings = {}
    for position, name in enumerate(FINDINGS):
        known, rows = (part.states[:, position] >= 0 for part in (train, validation))
        targets, positive = train.states[known, position] == POSITIVE, validation.states[rows, position] == POSITIVE
        area = None
        if targets.any() and not targets.all():
            probe = LogisticRegression(max_iter=1000).fit(features[known], targets)
            area = area_under_curve(probe.decision_function(unseen[rows]), positive) if rows.any() else None
        findings[name] = {"positives": int(positive.sum()), "auc": area}
    areas = [row["auc"] for row in findings.values() if row["auc"] is not None]
    return {
        "macro_auc": float(np.mean(areas)) if areas else None,
        "auc_findings": len(areas),
        "train_studies": len(train.states),
        "validation_studies": len(validation.states),
        "findings": findings,
    }


__all__ = ["ViewFeatures", "alignment", "encode_studies", "linear_probe", "uniformity"]
