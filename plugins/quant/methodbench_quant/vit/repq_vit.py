"""RepQ-ViT: scale reparameterization for post-training quantization of vision transformers (Li et al., ICCV
2023).

Activations behind a LayerNorm differ so much between channels that they need a scale ``s_c`` and a zero point
``z_c`` per channel; inference can afford one of each per tensor. So they are searched per channel, and then the
LayerNorm and the weight behind it are rescaled such that the means ``s~`` and ``z~`` fit every channel::

    r_c = s_c / s~,    t_c = m_c / r_c - m~    with  m_c = -z_c s_c,  m~ = -z~ s~
    gamma <- gamma / r,    beta <- beta / r - t,    W <- W r (columns),    b <- b + W t

Attention probabilities ``A``, of which few are large, get levels that are powers of sqrt(2)::

    k = round(-2 log2(A / s)),    A_q = s 2^(-k/2),  0 for k >= 2^b

Every other activation has one uniform grid per tensor, every weight one per output channel; scales are the
best of a few clipping percentiles in mean squared error.

The authors' code is followed where it settles more than the paper: each scale is searched on activations that
the quantizers before it have rounded already, ``z~`` is not rounded to an integer, the input of the patch
embedding has 8 bits, and after the reparameterization only the weights that it changed are searched again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.quantizers import Quantized, UniformGrid
from methodbench_quant.vit.sites import Draft, Site, Uniform, calibration_images

#: How the scale and the zero point of a tensor come from those of its channels.
Shared = Literal["mean", "median"]

#: Values above which sorting in float32 no longer gives exact ranks; percentiles are then found in float64.
_EXACT_RANKS = 2**24


@hyperparameters
class PercentileSettings:
    """What RepQ-ViT and the methods built on its quantizers let a user choose."""

    w_bits: Annotated[int, Field(ge=2, le=8, description="weight bits; packed at 2, 3, 4 and 8")] = 4
    a_bits: Annotated[int, Field(ge=2, le=8, description="activation bits, simulated")] = 4
    image_bits: Annotated[int, Field(ge=2, le=8, description="bits of the input of convolutions")] = 8
    percentiles: Annotated[
        tuple[float, ...],
        Field(min_length=1, description="upper ends of the ranges that are tried, in order"),
    ] = (0.999, 0.9999, 0.99999)
    round_zero: Annotated[
        bool, Field(description="round the shared zero point to an integer, as integer arithmetic needs")
    ] = False
    calibration_images: Annotated[int, Field(ge=1, le=4096, description="images in the one batch")] = 32

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(0.5 < p <= 1 for p in self.percentiles):
            raise ValueError("percentiles are shares above 0.5 and up to 1, such as 0.999")
        return self

    def quantize_weight(self, weight: Tensor, name: str) -> Quantized:
        """Return ``weight`` [rows, n] on the best percentile grid of every row."""
        grid = search_uniform(weight, self.w_bits, self.percentiles, f"a row of the weight of {name}")
        return encoded(weight, grid, self.w_bits)

    def fit_uniform(self, x: Tensor, site: Site, *, per_channel: bool) -> Uniform:
        """Return the best percentile grid of ``x`` [..., C], or of every channel of it."""
        bits = self.image_bits if site.kind == "image" else self.a_bits
        grid = search_uniform(
            x.flatten(0, -2).T if per_channel else x.flatten(), bits, self.percentiles, str(site)
        )
        return Uniform(grid.scale.squeeze(-1), cast(Tensor, grid.zero).squeeze(-1), bits)


@hyperparameters
class RepQViT(PercentileSettings):
    """Quantizes weights and activations of every Linear, convolution and attention product."""

    reparameterize: Annotated[
        bool, Field(description="search LayerNorm outputs per channel, then fold; false: per tensor")
    ] = True
    softmax: Annotated[
        Literal["log-sqrt2", "uniform"], Field(description="levels of the attention probabilities")
    ] = "log-sqrt2"

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` quantized, its weights packed where their width allows.

        Raises:
            NotApplicableError: no calibration images, or not a pre-norm vision transformer.
            DivergedError: an activation or a weight for which no finite scale exists.
        """
        with ctx.phase("calibration"):
            draft = self.calibrate(model, data, ctx)
        if self.reparameterize:
            with ctx.phase("reparameterization"):
                fold_channels(draft, model, draft.requantize, round_zero=self.round_zero)
        return draft.finish({"activations": f"{self.a_bits} bits, simulated"})

    def calibrate(self, model: LoadedModel, data: Calibration, ctx: Context) -> Draft:
        """Return ``model`` with rounded weights and every activation's scale, not reparameterized yet."""
        images = calibration_images(model, data, self.calibration_images, ctx)
        draft = Draft(model, self.quantize_weight, self._fit_activation)
        if self.reparameterize:
            require_foldable(draft, "Set reparameterize to false to quantize it per tensor.")
        draft.calibrate(images)
        return draft

    def _fit_activation(self, x: Tensor, site: Site) -> nn.Module:
        if site.kind == "softmax" and self.softmax == "log-sqrt2":
            return LogSqrt2.searched(x, self.a_bits, self.percentiles, str(site))
        return self.fit_uniform(x, site, per_channel=site.kind == "normed" and self.reparameterize)


def require_foldable(draft: Draft, hint: str = "") -> None:
    """Check that every block has two LayerNorms that one Linear each reads.

    Raises:
        NotApplicableError: one has not.
    """
    if len(draft.normed) < 2 * len(draft.model.adapter.blocks(draft.model.module)):
        raise NotApplicableError(
            f"{draft.model.name} has a block without two LayerNorms that one Linear each reads", hint
        )


def fold_channels(
    draft: Draft,
    source: LoadedModel,
    put: Callable[[str, Tensor, Tensor], None],
    *,
    shared: Shared = "mean",
    round_zero: bool = False,
) -> None:
    """Make scales and zero points of channels one per tensor, in place, by :func:`reparameterize`.

    Args:
        draft: calibrated, with one grid per channel behind every LayerNorm.
        source: holds the weights and LayerNorms to rescale.
        put: stores the weight [out, C] and the bias [out] of the layer of a name.
        shared: how the scale and zero point of the tensor come from those of the channels.
        round_zero: round the shared zero point to an integer.
    """
    for name, norm_name in draft.normed.items():
        linear = cast(nn.Linear, source.module.get_submodule(name))
        layer = draft.model.module.get_submodule(name)
        norm = cast(nn.LayerNorm, draft.model.module.get_submodule(norm_name))
        channels = cast(Uniform, layer.input_quantizer)
        folded = reparameterize(
            norm, linear, channels.scale, channels.zero, shared=shared, round_zero=round_zero
        )
        norm.weight = nn.Parameter(folded.gamma.to(norm.weight), requires_grad=False)
        norm.bias = nn.Parameter(folded.beta.to(norm.weight), requires_grad=False)
        layer.input_quantizer = Uniform(folded.scale, folded.zero, channels.bits)
        put(name, folded.weight, folded.bias)


def encoded(weight: Tensor, grid: UniformGrid, bits: int) -> Quantized:
    """Return ``weight`` [rows, n] on a grid of codes from 0 to ``2^bits - 1``."""
    return Quantized(grid.encode(weight).to(torch.int16), grid.scale, grid.zero, 0, bits)


class LogSqrt2(nn.Module):
    """:func:`log_sqrt2` with a fixed scale, computed in float32."""

    scale: Tensor

    def __init__(self, scale: Tensor, bits: int) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.bits = bits

    @classmethod
    def searched(cls, x: Tensor, bits: int, percentiles: Sequence[float], name: str) -> LogSqrt2:
        """Return the quantizer with the scale of :func:`search_log_sqrt2`."""
        return cls(search_log_sqrt2(x, bits, percentiles, name), bits)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` [...] on the levels, in its dtype."""
        return log_sqrt2(x.float(), self.scale.float(), self.bits).to(x.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


@dataclass(frozen=True, slots=True)
class Folded:
    """What :func:`reparameterize` returns; float32, ``C`` channels.

    Attributes:
        gamma, beta: of the LayerNorm, [C].
        weight, bias: of the Linear behind it, [out, C] and [out].
        scale, zero: of the LayerNorm's output, [].
        ratio, shift: ``r`` and ``t`` of the paper, [C].
    """

    gamma: Tensor
    beta: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor
    zero: Tensor
    ratio: Tensor
    shift: Tensor


def reparameterize(
    norm: nn.LayerNorm,
    linear: nn.Linear,
    scale: Tensor,
    zero: Tensor,
    *,
    shared: Shared = "mean",
    round_zero: bool = False,
) -> Folded:
    """Fold the scales of channels into a LayerNorm and the Linear behind it.

    The two layers together keep their function (the paper's reparameterization for LayerNorm activations). A
    code becomes ``round(x / s_c + z_c - z~) + z~``: the same as before where ``z_c - z~`` is an integer.

    Args:
        norm: with a gain [C]; without a bias, one of zeros is assumed.
        linear: [out, C]; without a bias, one of zeros is assumed.
        scale: float32 [C], above 0.
        zero: float32 [C].
        shared: ``s~`` and ``z~`` are the mean of the channels', as in the paper, or their (lower) median.
        round_zero: round ``zero~`` to an integer.
    """
    centre = torch.mean if shared == "mean" else torch.median
    shared_scale, shared_zero = centre(scale), centre(zero)
    if round_zero:
        shared_zero = shared_zero.round()
    ratio = scale / shared_scale
    shift = -zero * scale / ratio + shared_zero * shared_scale
    beta = torch.zeros_like(scale) if norm.bias is None else norm.bias.detach().float()
    weight = linear.weight.detach().float() * ratio
    bias = weight @ shift
    if linear.bias is not None:
        bias = linear.bias.detach().float() + bias
    gamma = norm.weight.detach().float() / ratio
    return Folded(gamma, beta / ratio - shift, weight, bias, shared_scale, shared_zero, ratio, shift)


def search_uniform(
    x: Tensor, bits: int, percentiles: Sequence[float], name: str = "the tensor"
) -> UniformGrid:
    """Return the grid of every group of ``x`` on the range of :func:`search_range`.

    Returns:
        ``scale`` float32 [..., 1] and a ``zero`` of integer values, which may lie outside of the levels.

    Raises:
        DivergedError: a group is constant between its percentiles, or not finite.
    """
    return range_grid(*search_range(x, bits, percentiles, name), bits)


def range_grid(low: Tensor, high: Tensor, bits: int) -> UniformGrid:
    """Return the grid of ``2^bits`` levels from ``low`` to ``high``; the zero point is an integer."""
    top = 2**bits - 1
    scale = (high - low) / top
    return UniformGrid(scale, (-low / scale).round(), 0, top)


def search_range(
    x: Tensor, bits: int, percentiles: Sequence[float], name: str = "the tensor"
) -> tuple[Tensor, Tensor]:
    """Return both ends of the clipped range of least mean squared error for every group of ``x``.

    For each ``p``, in order, the range runs from the quantile ``1 - p`` to the quantile ``p`` (linear
    interpolation) and need not include 0; a later one wins only where it is strictly better.

    Args:
        x: float32 [..., n]; a group is the last axis.
        bits: ``2^bits`` levels.
        percentiles: upper ends of the ranges.
        name: for the error message.

    Returns:
        float32 [..., 1] each.

    Raises:
        DivergedError: a group is constant between its percentiles, or not finite.
    """
    ends = quantiles(x, [*percentiles, *(1.0 - p for p in percentiles)]).unsqueeze(-1)
    best_low = best_high = torch.zeros_like(ends[0])
    least = torch.full_like(best_low, torch.inf)
    for high, low in zip(*ends.split(len(percentiles)), strict=True):
        error = range_grid(low, high, bits).snap(x).sub_(x).square_().mean(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best_low = torch.where(better, low, best_low)
        best_high = torch.where(better, high, best_high)
    _check_found(least, name)
    return best_low, best_high


def search_log_sqrt2(x: Tensor, bits: int, percentiles: Sequence[float], name: str = "the tensor") -> Tensor:
    """Return the scale of :func:`log_sqrt2`, float32 [], among the quantiles of ``x``, as in
    :func:`search_uniform`.

    Args:
        x: float32 [...], not negative.

    Raises:
        DivergedError: every candidate is 0, or ``x`` is not finite.
    """
    scale = least = torch.tensor(torch.inf, device=x.device)
    for tried in quantiles(x.flatten(), list(percentiles)):
        error = (log_sqrt2(x, tried, bits) - x).square_().mean()
        scale, least = torch.where(error < least, tried, scale), torch.fmin(error, least)
    _check_found(least, name)
    return scale


def log_sqrt2(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the nearest of ``0`` and ``scale * 2^(-k/2)``, ``0 <= k < 2^bits``, on a logarithmic axis.

    Values above ``scale`` become ``scale``; those that would need a larger ``k`` become 0.

    Args:
        x: float32 [...], not negative.
        scale: float32 [], above 0.
    """
    exponent = torch.log2(x / scale).mul_(-2).round_()
    levels = exponent.clamp(0, 2**bits - 1)
    # Whole powers of two are exact; the odd levels carry one factor sqrt(2).
    odd = 1 + (2**0.5 - 1) * (levels % 2)
    value = torch.exp2(-torch.ceil(levels / 2)) * odd * scale
    return value.masked_fill(exponent >= 2**bits, 0.0)


def quantiles(x: Tensor, shares: list[float]) -> Tensor:
    """Return the quantiles [shares, ...] of ``x`` [..., n] along its last axis."""
    if x.shape[-1] <= _EXACT_RANKS:
        return torch.quantile(x, torch.tensor(shares, dtype=x.dtype, device=x.device), dim=-1)
    found = np.percentile(x.cpu().numpy(), [100 * share for share in shares], axis=-1)
    return torch.from_numpy(np.asarray(found)).to(x)


def _check_found(error: Tensor, name: str) -> None:
    if not bool(torch.isfinite(error).all()):
        raise DivergedError(
            f"{name} is constant or not finite, so that it has no scale",
            "Too few bits upstream make activations constant: raise them, or quantize per channel.",
        )
