"""Grad-CAM++.

Chattopadhyay et al., Grad-CAM++: Generalized Gradient-Based Visual Explanations for Deep Convolutional Networks,
WACV 2018 (1710.11063). Where a class is seen several times, the mean gradient favours the largest region.
Grad-CAM++ weighs each position so that every region counts alike, and lets only positive gradients speak. The
weights come from second and third derivatives of exp(y), which are powers of the first one for a network that
is linear behind A::

    a_cij = G^2 / (2 G^2 + (sum_ij A_c) G^3)          w_c = sum_ij a_cij ReLU(G_cij)
    L = ReLU(sum_c w_c A_c)                           G = dy/dA, a = 0 where G = 0

As in pytorch-grad-cam 1.5.7, G is the gradient of the raw logit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methodbench.params import hyperparameters
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.cam import Features, LayerChoice, PrefixTokens, features, saliency

_EPSILON = 1e-6


@hyperparameters
class GradCAMPlusPlus:
    """Channels weighted by their positive gradients, each position counted by its own share."""

    layer: LayerChoice = ""
    prefix_tokens: PrefixTokens = None

    def explain(self, model: LoadedModel, x: Tensor, target: Tensor) -> Tensor:
        """Return maps [B, H, W] in [0, 1] of normalized images ``x`` [B, C, H, W] for classes [B]."""
        layers = features(model, x, target, layer=self.layer, prefix_tokens=self.prefix_tokens)
        raw = [(channel_weights(pair)[:, :, None, None] * pair.activation).sum(1) for pair in layers]
        return saliency(raw, (x.shape[2], x.shape[3]))


def channel_weights(pair: Features) -> Tensor:
    """Return w [B, C] from activation and gradient [B, C, h, w] (equations 9 and 19 of the paper)."""
    activation, gradient = pair
    square = gradient**2
    sums = activation.sum((2, 3), keepdim=True)
    shares = square / (2 * square + sums * gradient**3 + _EPSILON)
    return (torch.where(gradient != 0, shares, 0) * gradient.clamp_min(0)).sum((2, 3))
