"""Random-CAM, the control of class activation maps.

Channels are summed with weights drawn from U(-1, 1), and the map goes through the same steps as any other:
what remains is what the feature maps themselves and the pipeline contribute. A method that does not beat it
explains nothing. Follows pytorch-grad-cam 1.5.7::

    w_c ~ U(-1, 1)          L = ReLU(sum_c w_c A_c)
"""

from __future__ import annotations

import zlib
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from methodbench.params import hyperparameters
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.cam import activations, saliency


@hyperparameters
class RandomCAM:
    """Channels weighted at random."""

    seed: Annotated[
        int, Field(ge=0, le=2**31 - 1, description="seed of the weights, joined with the picture")
    ] = 0
    layer: Annotated[
        str | tuple[str, ...],
        Field(description="layers to read and average; by default the one that feeds the pooling"),
    ] = ""
    prefix_tokens: Annotated[
        int | None, Field(ge=0, description="tokens in front of the patches; by default what the model says")
    ] = None

    def explain(self, model: LoadedModel, x: Tensor, target: Tensor) -> Tensor:
        """Return maps [B, H, W] in [0, 1] for normalized images ``x`` [B, C, H, W]; ``target`` is not used."""
        layers = activations(model, x, layer=self.layer, prefix_tokens=self.prefix_tokens)
        raw = [
            (random_weights(x, maps.shape[1], self.seed)[:, :, None, None] * maps).sum(1) for maps in layers
        ]
        return saliency(raw, (x.shape[2], x.shape[3]))


def random_weights(x: Tensor, channels: int, seed: int) -> Tensor:
    """Return weights [B, channels] from U(-1, 1), the same for the same image and seed in whatever batch it comes."""
    pixels = x.detach().float().cpu().numpy()
    rows = []
    for image in pixels:
        generator = torch.Generator().manual_seed(seed << 32 | zlib.crc32(image.tobytes()))
        rows.append(2 * torch.rand(channels, generator=generator) - 1)
    return torch.stack(rows).to(x.device)
