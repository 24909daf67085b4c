"""What AdaQuant learns and decides: quantizers with learned ranges, layers fitted alone, bits by an integer program.

Hubara et al., arXiv 2006.10518. With range R, minimum Z and b bits::

    s = R / (2^b - 1);  Z' = -clamp(round(-Z / s), 0, 2^b - 1) s
    Q(x) = s clamp(round((x - Z') / s), 0, 2^b - 1) + Z'
    min over W, bias, (R, Z) of W, (R, Z) of x:  || f(Q(x) Q(W)^T + Q(bias)) - f(x W0^T + bias0) ||^2

with f the ReLU behind the layer, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn
from torch.nn import functional as F

from methodbench.torchkit.activations import StaticQuantizer
from methodbench.torchkit.quantizers import Quantized, UniformGrid, round_ste

#: Limits of a range (the authors' constants).
_LEAST_RANGE, _MOST_RANGE = 1e-6, 1e5

#: Values of a layer's input or output that are in memory at once while its error is measured.
_AT_ONCE = 2**24

#: Least loss increase of a lower precision in the integer program (the authors' constant).
_LEAST_INCREASE = 1e-6


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fitted layer, and its mean squared output error before and after."""

    layer: QuantizedLinear
    before: float
    after: float


class LearnedRange(nn.Module):
    """A uniform quantizer with a learned range and minimum.

    Parameters ``range`` and ``minimum`` broadcast over what is quantized: [1] for a tensor, [out, 1] for the
    channels of a weight. The minimum is a value; the grid that it falls on is found at every call.
    """

    def __init__(self, range: Tensor, minimum: Tensor, bits: int) -> None:
        super().__init__()
        self.range = nn.Parameter(range.clone())
        self.minimum = nn.Parameter(minimum.clone())
        self.bits = bits

    def grid(self) -> UniformGrid:
        """Return scale and integer zero point, differentiable by range and minimum."""
        top = 2**self.bits - 1
        scale = self.range.clamp(_LEAST_RANGE, _MOST_RANGE) / top
        return UniformGrid(scale, round_ste(-self.minimum / scale).clamp(0, top), 0, top)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``Q(x)`` with straight-through gradients (the authors' ``quantize_with_grad``)."""
        grid = self.grid()
        assert grid.zero is not None
        lowest = -grid.zero * grid.scale
        return round_ste(((x - lowest) / grid.scale).clamp(0, grid.high)) * grid.scale + lowest


class QuantizedLinear(nn.Module):
    """A Linear with quantized weight, bias and, below 16 bits, input; everything in it can be learned.

    Args:
        weight: fp32 [rows, n], one grid per row.
        bias: [rows] or None.
        bits: of the weight.
        a_bits: of the input; 16: it stays as it is.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: int, a_bits: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
        self.weight_range = LearnedRange(_spread(low, high), low, bits)
        self.input_range: LearnedRange | None = None
        if a_bits < 16:
            one = torch.ones(1, device=weight.device)
            self.input_range = LearnedRange(one, torch.zeros_like(one), a_bits)

    def measure(self, batches: Sequence[Tensor]) -> None:
        """Set the input range to the mean over samples of their extremes, widened to hold 0.

        Args:
            batches: inputs [samples, ..., in]; batches count equally.
        """
        if self.input_range is None:
            return
        lows = torch.stack([x.flatten(1).amin(1).mean().clamp(max=0) for x in batches])
        highs = torch.stack([x.flatten(1).amax(1).mean().clamp(min=0) for x in batches])
        spread = torch.stack([_spread(low, high) for low, high in zip(lows, highs, strict=True)]).mean()
        with torch.no_grad():
            self.input_range.range.fill_(spread)
            self.input_range.minimum.fill_(lows.mean())

    def quantized_bias(self) -> Tensor | None:
        """Return the bias at the bits of weight and input together, by its extremes; None without one."""
        if self.bias is None:
            return None
        rounded = round_bias(self.bias.detach(), self.bias_bits)
        return self.bias + (rounded - self.bias).detach()

    @property
    def bias_bits(self) -> int:
        """Bits of weight and input together."""
        return self.weight_range.bits + (16 if self.input_range is None else self.input_range.bits)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``Q(x) Q(W)^T + Q(bias)`` for ``x`` [..., in]."""
        if self.input_range is not None:
            x = self.input_range(x)
        return self.apply_to(x, self.weight_range(self.weight), self.quantized_bias())

    def apply_to(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what the layer makes of ``x`` with the given weight [rows, n]."""
        return F.linear(x, weight, bias)

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """Return codes, scales and zero points of the weight."""
        grid = self.weight_range.grid()
        assert grid.zero is not None
        codes = ((self.weight + grid.zero * grid.scale) / grid.scale).clamp(0, grid.high).round()
        return Quantized(
            codes.to(torch.int16), grid.scale.detach(), grid.zero.detach(), 0, self.weight_range.bits
        )

    @torch.no_grad()
    def static_input(self) -> StaticQuantizer | None:
        """Return the quantizer of the inputs with the ranges that were learned; None at 16 bits."""
        if self.input_range is None:
            return None
        grid = self.input_range.grid()
        assert grid.zero is not None
        return StaticQuantizer(UniformGrid(grid.scale.detach(), grid.zero.detach(), grid.low, grid.high))


def round_bias(bias: Tensor, bits: int) -> Tensor:
    """Return ``bias`` [rows] on the grid of ``bits`` between its extremes, widened to hold 0."""
    low, high = bias.amin().clamp(max=0), bias.amax().clamp(min=0)
    top = 2**bits - 1
    scale = _spread(low, high) / top
    return ((bias - low) / scale).round().clamp(0, top) * scale + low


def _spread(low: Tensor, high: Tensor) -> Tensor:
    """Return ``high - low``, and 1 where that is 0."""
    spread = high - low
    return spread.masked_fill(spread == 0, 1.0)


def adaquant(
    layer: QuantizedLinear,
    x: Tensor,
    target: Tensor,
    *,
    iterations: int,
    batch: int,
    lr_w: float = 1e-5,
    lr_b: float = 1e-3,
    lr_qin: float = 1e-1,
    lr_qw: float = 1e-3,
    generator: torch.Generator | None = None,
    behind: Callable[[Tensor], Tensor] = lambda out: out,
) -> Fitted:
    """Fit ``layer`` in place to outputs of the dense layer (the authors' ``adaquant``); the last step counts.

    Args:
        x: [samples, in], or [samples, C, H, W] for a convolution.
        target: outputs [samples, ...] of the dense layer.
        batch: samples per step, drawn anew from a permutation for each.
        behind: the activation through which outputs are compared.
    """
    groups = [
        {"params": [layer.weight], "lr": lr_w},
        {"params": list(layer.weight_range.parameters()), "lr": lr_qw},
    ]
    if layer.bias is not None:
        groups.append({"params": [layer.bias], "lr": lr_b})
    if layer.input_range is not None:
        groups.append({"params": list(layer.input_range.parameters()), "lr": lr_qin})
    optimizer = torch.optim.Adam(groups)
    target = behind(target)

    @torch.no_grad()
    def error() -> float:
        samples = max(1, _AT_ONCE // max(x[0].numel(), target[0].numel()))
        parts = zip(x.split(samples), target.split(samples), strict=True)
        total = sum(float(F.mse_loss(behind(layer(inp)), out, reduction="sum")) for inp, out in parts)
        return total / target.numel()

    before = error()
    for _ in range(iterations):
        chosen = torch.randperm(len(x), generator=generator)[:batch].to(x.device)
        loss = F.mse_loss(behind(layer(x[chosen])), target[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Fitted(layer, before, error())


@dataclass(frozen=True, slots=True)
class Allocation:
    """A precision per unit, the sum of loss increases, and the size as a share of 32 bits."""

    precisions: tuple[int, ...]
    objective: float
    size: float


def allocate(
    increases: np.ndarray, sizes: Sequence[int], precisions: Sequence[int], size: float
) -> Allocation | None:
    """Return the precisions of least summed loss increase within a size (the authors' integer program).

    Increases of less than 1e-6 count as that, except for the highest precision, whose own are 0.

    Args:
        increases: [units, precisions], measured with one unit at that precision and the rest at the highest.
        sizes: weights of each unit.
        precisions: bits, in the order of the columns of ``increases``.
        size: limit of ``sum of weights * bits``, as a share of 32 bits per weight.

    Returns:
        None where even the lowest precision is too large.
    """
    units, choices = increases.shape
    bits = np.asarray(precisions, dtype=np.float64)
    cost = np.where(bits == bits.max(), 0.0, np.maximum(increases, _LEAST_INCREASE))
    weights = np.asarray(sizes, dtype=np.float64)
    one_each = np.kron(np.eye(units), np.ones((1, choices)))
    # Sizes as shares of the whole keep the solver's tolerances meaningful.
    stored = (weights[:, None] * bits[None] / (32 * weights.sum())).reshape(1, -1)
    solved = milp(
        cost.reshape(-1),
        integrality=np.ones(units * choices),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(stored, -np.inf, size)],
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        return None
    chosen = solved.x.reshape(units, choices).argmax(1)
    return Allocation(
        tuple(int(bits[choice]) for choice in chosen),
        float(cost[np.arange(units), chosen].sum()),
        float((weights * bits[chosen]).sum() / (32 * weights.sum())),
    )
