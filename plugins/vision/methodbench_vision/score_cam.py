"""Score-CAM.

Wang et al., Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks, CVPR Workshops 2020
(1910.01279). Gradients may be noisy or saturated. Score-CAM asks the network instead: each channel, enlarged to
the picture and scaled to [0, 1], masks the picture once, and the class score of what is left is the channel's
weight::

    M_c = minmax(upsample(A_c))          w = softmax_c(y(x * M_c))          L = ReLU(sum_c w_c A_c)

One forward pass per channel. As in pytorch-grad-cam 1.5.7, the score is the raw logit, without that of an empty
picture taken off, and the enlargement is bilinear with aligned corners.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from methodbench.params import hyperparameters
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.cam import (
    LayerChoice,
    PrefixTokens,
    activations,
    check_images,
    class_scores,
    saliency,
)

_EPSILON = 1e-8


@hyperparameters
class ScoreCAM:
    """Channels weighted by the score of what they let through."""

    layer: LayerChoice = ""
    batch_size: Annotated[int, Field(ge=1, le=4096, description="masked pictures per forward pass")] = 64
    prefix_tokens: PrefixTokens = None

    def explain(self, model: LoadedModel, x: Tensor, target: Tensor) -> Tensor:
        """Return maps [B, H, W] in [0, 1] of normalized images ``x`` [B, C, H, W] for classes [B]."""
        check_images(model, x)
        class_scores(model, x, target)  # refuses targets that are no classes before C passes are spent
        raw = []
        for maps in activations(model, x, layer=self.layer, prefix_tokens=self.prefix_tokens):
            weights = masked_scores(model, x, target, maps, self.batch_size).softmax(1)
            raw.append((weights[:, :, None, None] * maps).sum(1))
        return saliency(raw, (x.shape[2], x.shape[3]))


def masked_scores(model: LoadedModel, x: Tensor, target: Tensor, maps: Tensor, batch_size: int) -> Tensor:
    """Return the logit of each image's class behind each channel's mask, float32 [B, C].

    Args:
        x: images [B, 3, H, W].
        target: int64 [B].
        maps: float32 [B, C, h, w].
        batch_size: masked images per forward pass, of one or several images.
    """
    images, channels = maps.shape[:2]
    scores = []
    for part in torch.arange(images * channels, device=x.device).split(batch_size):
        image, channel = part // channels, part % channels
        masks = _masks(maps[image, channel][:, None], (x.shape[2], x.shape[3])).to(x.dtype)
        scores.append(class_scores(model, x[image] * masks, target[image]))
    return torch.cat(scores).view(images, channels)


def _masks(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge [N, 1, h, w] to ``size`` and scale each to [0, 1]."""
    large = F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
    low, high = large.amin((2, 3), keepdim=True), large.amax((2, 3), keepdim=True)
    return (large - low) / (high - low + _EPSILON)
