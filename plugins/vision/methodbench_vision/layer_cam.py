"""Layer-CAM.

Jiang et al., LayerCAM: Exploring Hierarchical Class Activation Maps for Localization, IEEE Transactions on Image
Processing 2021. A mean gradient per channel is right only for the last layer; in earlier, finer layers the
gradient of one channel differs from place to place. Layer-CAM therefore weighs each position by its own positive
gradient, so that maps of several layers can be joined::

    L = ReLU(sum_c ReLU(G_c) A_c)          G = dy/dA, elementwise
"""

from __future__ import annotations

from torch import Tensor

from methodbench.params import hyperparameters
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.cam import LayerChoice, PrefixTokens, features, saliency


@hyperparameters
class LayerCAM:
    """Activations weighted by their own positive gradients."""

    layer: LayerChoice = ""
    prefix_tokens: PrefixTokens = None

    def explain(self, model: LoadedModel, x: Tensor, target: Tensor) -> Tensor:
        """Return maps [B, H, W] in [0, 1] of normalized images ``x`` [B, C, H, W] for classes [B]."""
        layers = features(model, x, target, layer=self.layer, prefix_tokens=self.prefix_tokens)
        raw = [(gradient.clamp_min(0) * activation).sum(1) for activation, gradient in layers]
        return saliency(raw, (x.shape[2], x.shape[3]))
