"""Grad-CAM.

Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, ICCV 2017
(1610.02391). The gradient of a class score with respect to the last feature maps, averaged over positions,
says how much each channel speaks for the class. The channels are summed with these weights, and what speaks
against the class is cut off. On a network that ends in global average pooling and one Linear this is CAM, up
to a factor::

    alpha_c = 1/(h w) sum_ij dy/dA_cij          L = ReLU(sum_c alpha_c A_c)
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from methodbench.params import hyperparameters
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.cam import LayerChoice, PrefixTokens, features, saliency
from methodbench_vision.eigen_cam import first_projection


@hyperparameters
class GradCAM:
    """Channels weighted by their mean gradient."""

    layer: LayerChoice = ""
    eigen_smooth: Annotated[
        bool,
        Field(description="project the weighted channels on their first component instead of adding them"),
    ] = False
    prefix_tokens: PrefixTokens = None

    def explain(self, model: LoadedModel, x: Tensor, target: Tensor) -> Tensor:
        """Return maps [B, H, W] in [0, 1] of normalized images ``x`` [B, C, H, W] for classes [B]."""
        layers = features(model, x, target, layer=self.layer, prefix_tokens=self.prefix_tokens)
        weighted = [
            channel_weights(gradient)[:, :, None, None] * activation for activation, gradient in layers
        ]
        raw = [first_projection(maps) if self.eigen_smooth else maps.sum(1) for maps in weighted]
        return saliency(raw, (x.shape[2], x.shape[3]))


def channel_weights(gradient: Tensor) -> Tensor:
    """Return alpha [B, C], the mean over positions of the gradient [B, C, h, w] (equation 1)."""
    return gradient.mean((2, 3))
