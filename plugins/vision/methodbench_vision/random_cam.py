"""Random-CAM, the control of class activation maps.

Channels are summed with weights drawn from U(-1, 1), and the map goes through the same steps as any other:
what remains is what the feature maps themselves and the pipeline contribute. A method that does not beat it
explains nothing. Follows pytorch-grad-cam 1.5.7::

    w_c ~ U(-1, 1)          L = ReLU(sum_c w_c A_c)
"""

from __future__ import annotations

import zlib
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from methodbench.params import hyperparameters
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.cam import LayerChoice, PrefixTokens, activations, saliency


@hyperparameters
class RandomCAM:
    """Channels weighted at random."""

    seed: Annotated[
        int, Field(ge=0, le=2**31 - 1, description="seed of the weights, joined with the picture")
    ] = 0
    layer: LayerChoice = ""
    prefix_tokens: PrefixTokens = None

    def explain(self, model: LoadedModel, x: Tensor, target: Tensor) -> Tensor:
        """Return maps [B, H, W] in [0, 1] of normalized images ``x`` [B, C, H, W], whatever the class."""
        layers = activations(model, x, layer=self.layer, prefix_tokens=self.prefix_tokens)
        raw = [
            (random_weights(x, maps.shape[1], self.seed)[:, :, None, None] * maps).sum(1) for maps in layers
        ]
        return saliency(raw, (x.shape[2], x.shape[3]))


def random_weights(x: Tensor, channels: int, seed: int) -> Tensor:
    """Return weights [B, channels] from U(-1, 1) that depend on seed and image, not on the batch."""
    return drawn_per_image(x, (channels,), seed, -1, 1)


def drawn_per_image(x: Tensor, shape: tuple[int, ...], seed: int, low: float, high: float) -> Tensor:
    """Return float32 [B, *shape] from U(low, high), one stream per image of ``x`` and seed."""
    values = [
        np.random.default_rng((seed, zlib.crc32(image.tobytes()))).uniform(low, high, shape)
        for image in x.detach().float().cpu().numpy()
    ]
    return torch.from_numpy(np.stack(values)).to(x.device, torch.float32)
