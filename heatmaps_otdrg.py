"""Heatmaps (Figure 5): how much of each place in a view is transported to a finding."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .configuration_otdrg import OTDRGConfig
from .predictor_otdrg import OTDRGFindingPredictor
from .sinkhorn_otdrg import SinkhornOutput
from .vision_otdrg import full_view_mask


class OTDRGHeatmapMixin:
    """Heatmaps of [`OTDRGForReportGeneration`], which has the attributes that are only declared here."""

    config: OTDRGConfig
    finding_predictor: OTDRGFindingPredictor
    project_views: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    get_label_features: Callable[[torch.Tensor], torch.Tensor]
    transport: Callable[..., tuple[SinkhornOutput, torch.Tensor]]
    _label_mask: Callable[[torch.Tensor], torch.Tensor]

    @torch.no_grad()
    def transport_lift(
        self, view_features: torch.Tensor, view_mask: torch.Tensor, finding_states: torch.Tensor
    ) -> torch.Tensor:
        """The transport plan over each view's grid as a multiple of the uniform plan, for heatmaps (Figure 5).

        The plan is FIOT's for the given states; with `predictor_pooling="transport"` the label predictor's.

        Returns:
            `torch.Tensor` of shape `(B, V, 14, rows, columns)`: 1 everywhere for a uniform plan, 0 where there is no
            view or no mass. With `view_fusion="mean"` all views of a study share one plan.
        """
        if self.config.predictor_pooling == "transport":
            return self.predictor_lift(view_features, view_mask)
        image_features, image_mask = self.project_views(view_features, view_mask)
        label_features = self.get_label_features(finding_states)
        plan = self.transport(image_features, image_mask, label_features, finding_states)[0].plan
        mass = image_mask.sum(dim=1) * self._label_mask(finding_states).sum(dim=1)
        lift = (plan * mass[:, None, None]).transpose(1, 2)
        lift = lift.unflatten(2, (-1, self.config.image_grid, self.config.image_grid)).transpose(1, 2)
        return lift.expand(-1, view_mask.shape[1], -1, -1, -1) * view_mask[:, :, None, None, None]

    @torch.no_grad()
    def predictor_lift(self, view_features: torch.Tensor, view_mask: torch.Tensor) -> torch.Tensor:
        """How much each token counts in the label predictor's pooling, as [`transport_lift`] returns it.

        Of any `predictor_pooling`; it does not depend on the states.
        """
        view_mask = full_view_mask(view_features, view_mask)
        tokens = view_features.shape[2]
        lift = self.finding_predictor.token_weights(view_features, view_mask)
        lift = lift * (tokens * view_mask.sum(dim=1))[:, None, None]
        side = round(tokens**0.5)
        return lift.unflatten(2, (-1, side, side)).transpose(1, 2)

    @property
    def has_heatmaps(self) -> bool:
        """Whether there is a transport plan: that of FIOT, or of a predictor that pools by transport."""
        return self.config.fiot or self.config.predictor_pooling == "transport"


__all__ = ["OTDRGHeatmapMixin"]
