"""DopQ-ViT: attention on a tangent grid, and robust shared scales (arXiv 2408.03291); a reading of its abstract.

Attention probabilities ``A`` need resolution near 1 as well as near 0. TanQ rounds them uniformly behind a tangent map
whose slope rises towards both ends of [0, 1]::

    g(A) = tan(theta (A - c)),    d = (g(high) - g(0)) / (2^b - 1)
    k = clamp(round((g(A) - g(0)) / d), 0, 2^b - 1),    A_q = c + arctan(k d + g(0)) / theta

with ``theta`` and ``high`` of the least squared error. Every other activation and every weight has the grids of
RepQ-ViT; in its reparameterization the shared scale and zero point are the medians of the channels' (MOSF). With
``iterations`` above 0 blocks are learned in the three stages of I&S-ViT.

The authors' code and the paper's equations could not be had: the map, its centre and the search are this package's
reading. The shared scale is a gauge: another one changes no code before learning, only what the zero point rounds.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import DivergedError
from methodbench.params import hyperparameters
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.quantizers import UniformGrid, round_ste
from methodbench_quant.vit.is_vit import Stages
from methodbench_quant.vit.repq_vit import (
    LogSqrt2,
    PercentileSettings,
    Shared,
    fold_channels,
    quantiles,
    require_foldable,
    search_uniform,
)
from methodbench_quant.vit.sites import Draft, Site, calibration_images

#: Shares of the largest ``theta`` that are tried; beyond 0.999 the tangent overflows.
SHARES = (0.50, 0.55, 0.60, 0.65, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 0.98, 0.99, 0.995, 0.999)

#: Quantiles of the probabilities that are tried as the upper end.
TOPS = (0.999, 0.9999, 0.99999, 1.0)


@hyperparameters
class DopQViT(PercentileSettings):
    """Quantizes weights and activations of every Linear, convolution and attention product."""

    softmax: Annotated[
        Literal["tan", "log-sqrt2"], Field(description="levels of the attention probabilities")
    ] = "tan"
    tan_center: Annotated[
        float, Field(ge=0, le=1, description="where the tangent grid is coarsest; 0: finer near 1 alone")
    ] = 0.5
    shared: Annotated[
        Shared, Field(description="scale and zero point behind a LayerNorm, from those of its channels")
    ] = "median"
    iterations: Annotated[
        int, Field(ge=0, le=100_000, description="steps per block and stage; 0: nothing is learned")
    ] = 0
    lr: Annotated[float, Field(gt=0, le=1, description="of Adam, falling to 0 along half a cosine")] = 4e-5
    batch: Annotated[int, Field(ge=1, description="images per step")] = 64

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` quantized, its weights packed where their width allows.

        Raises:
            NotApplicableError: no calibration images, or not a pre-norm vision transformer.
            DivergedError: an activation or a weight for which no finite scale exists, or a loss that is not finite.
        """
        images = calibration_images(model, data, self.calibration_images, ctx)
        facts: dict[str, object] = {"activations": f"{self.a_bits} bits, simulated"}
        draft = Draft(model, self.quantize_weight, self._fit_activation, rounded=not self.iterations)
        require_foldable(draft)
        with ctx.phase("calibration"):
            draft.calibrate(images)
        if self.iterations:
            stages = Stages(self.iterations, self.lr, self.batch, self.w_bits, self._grid, self.shared)
            facts |= stages.learn(draft, model, images, ctx)
        else:
            with ctx.phase("reparameterization"):
                fold_channels(draft, model, draft.requantize, shared=self.shared, round_zero=self.round_zero)
        return draft.finish(facts)

    def _grid(self, weight: Tensor, name: str) -> UniformGrid:
        return search_uniform(weight, self.w_bits, self.percentiles, f"a row of the weight of {name}")

    def _fit_activation(self, x: Tensor, site: Site) -> nn.Module:
        if site.kind != "softmax":
            return self.fit_uniform(x, site, per_channel=site.kind == "normed")
        if self.softmax == "tan":
            return Tangent.searched(x, self.a_bits, self.tan_center, str(site))
        return LogSqrt2.searched(x, self.a_bits, self.percentiles, str(site))


class Tangent(nn.Module):
    """TanQ with a fixed slope and range; gradients pass the rounding where the code is not clamped.

    Buffers: ``theta`` and ``high``, float32 [] each.
    """

    theta: Tensor
    high: Tensor

    def __init__(self, theta: Tensor, high: Tensor, center: float, bits: int) -> None:
        super().__init__()
        self.register_buffer("theta", theta)
        self.register_buffer("high", high)
        self.center = center
        self.bits = bits

    @classmethod
    def searched(cls, x: Tensor, bits: int, center: float = 0.5, name: str = "the tensor") -> Tangent:
        """Return the quantizer of least squared error on ``x`` [...] in [0, 1], the first among equals.

        Raises:
            DivergedError: ``x`` is 0 everywhere or not finite.
        """
        largest = math.pi / 2 / max(center, 1 - center)
        thetas = torch.tensor(SHARES, device=x.device) * largest
        tops = quantiles(x.flatten(), list(TOPS))
        best, least = None, math.inf
        for theta in thetas:
            for high in tops:
                tried = cls(theta, high, center, bits)
                error = float((tried(x) - x).square_().mean())
                # A range of one point makes the step 0 and the error NaN, which no comparison accepts.
                if error < least:
                    best, least = tried, error
        if best is None:
            raise DivergedError(f"{name} is constant or not finite, so that it has no range")
        return best

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` [...] on the levels, in its dtype."""
        low = torch.tan(-self.theta.float() * self.center)
        step = (torch.tan(self.theta * (self.high - self.center)) - low) / (2**self.bits - 1)
        # Beyond the range the tangent may wrap around.
        inside = x.float().clamp(max=self.high)
        code = (torch.tan(self.theta * (inside - self.center)) - low) / step
        code = round_ste(code).clamp(0, 2**self.bits - 1)
        return (self.center + torch.atan(code * step + low) / self.theta).to(x.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, center={self.center}"
