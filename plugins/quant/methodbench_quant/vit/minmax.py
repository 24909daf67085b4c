"""Min-max quantization of vision transformers: the zero line that other quantizers are compared with.

Weights have one asymmetric grid per output channel, every activation (attention probabilities included) has
one per tensor, and both run from the minimum to the maximum, widened to include 0::

    s = (max - min) / (2^b - 1),    z = round(-min / s)

Activation ranges are those of one batch of calibration images, each seen behind the quantizers before it;
they stay fixed afterwards.
"""

from __future__ import annotations

from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import DivergedError
from methodbench.params import hyperparameters
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.quantizers import Quantized, find_grid, quantize
from methodbench_quant.vit.sites import Draft, Site, Uniform, calibration_images


@hyperparameters
class MinMaxViT:
    """Quantizes weights and activations of every Linear, convolution and attention product."""

    w_bits: Annotated[int, Field(ge=2, le=8, description="weight bits; packed at 2, 3, 4 and 8")] = 8
    a_bits: Annotated[int, Field(ge=2, le=8, description="activation bits, simulated")] = 8
    image_bits: Annotated[int, Field(ge=2, le=8, description="bits of the input of convolutions")] = 8
    calibration_images: Annotated[int, Field(ge=1, le=4096, description="images in the one batch")] = 32

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` quantized, its weights packed where their width allows.

        Raises:
            NotApplicableError: no calibration images, or not a vision transformer of plain attention.
            DivergedError: an activation or a weight that is not finite.
        """
        images = calibration_images(model, data, self.calibration_images, ctx)
        draft = Draft(model, self._quantize_weight, self._fit_activation)
        with ctx.phase("calibration"):
            draft.calibrate(images)
        return draft.finish({"activations": f"{self.a_bits} bits, simulated"})

    def _quantize_weight(self, weight: Tensor, name: str) -> Quantized:
        return quantize(weight, self.w_bits, convention="gptq", name=name)

    def _fit_activation(self, x: Tensor, site: Site) -> nn.Module:
        bits = self.image_bits if site.kind == "image" else self.a_bits
        grid = find_grid(x.flatten(), bits, "gptq")
        if not bool(torch.isfinite(grid.scale).all()):
            raise DivergedError(f"{site} holds NaN or infinity, so that it has no scale")
        return Uniform(grid.scale.squeeze(-1), cast(Tensor, grid.zero).squeeze(-1), bits)
