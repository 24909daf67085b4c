"""DGQ: dual grained quantization, 4-bit weights for 8-bit arithmetic (Zhang et al., 2023).

The scale of a group of weights is an integer ``k`` times one scale ``S`` per output channel, so that 4-bit codes
expand to 8-bit integers and one integer product per row suffices: ``W_q = S k (q - z)`` with ``|k (q - z)| <= 127``.
Two grid searches on the output error of each row find the scales::

    phase 1, per group:  s, z from the range clipped to r * [min, max];  r = 1.02 - 0.22 (i + 1) / 20
    phase 2, per row:    S = r max|W| / 127,  k = max(round(s / S), 1);   r = 1.02 - 0.82 (i + 1) / 80

Activations get one static scale per layer. Before that the largest 0.5 % of the channels behind a norm (and of the
input of the last feed-forward layer) are scaled down to the largest of the others, and the weights up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.activations import quantize_inputs
from methodbench.torchkit.attention import transform_operands
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.quantizers import Quantized, UniformGrid, groups_of
from methodbench.torchkit.sequential import Observer, walk
from methodbench_quant.llm.calls import ChannelRanges, require_finite_inputs, squared_error
from methodbench_quant.llm.layers import (
    apply_scale,
    check_calibration,
    finished,
    open_copy,
    replace_linear,
    weight_of,
)
from methodbench_quant.llm.settings import ActivationSettings, Bits, GroupSize, check_group_size
from methodbench_quant.llm.smoothquant import static_quantizer


@hyperparameters
class DGQ(ActivationSettings):
    """Quantizes weights in two grains and activations statically, block after block."""

    bits: Bits = 4
    group_size: GroupSize = 128
    a_bits: Annotated[int, Field(ge=2, le=16, description="activation bits; 16 leaves them alone")] = 8
    static: Annotated[
        bool, Field(description="one activation scale per layer from calibration; off for run time")
    ] = True
    smooth: Annotated[bool, Field(description="scale outlier channels down to the others")] = True
    percentile: Annotated[
        float, Field(ge=0, lt=0.5, description="share of channels that count as outliers")
    ] = 0.005
    two_grains: Annotated[bool, Field(description="make group scales integer; off for phase 1 alone")] = True
    quantize_operands: Annotated[
        bool, Field(description="round queries, keys (after the rotary embedding) and values statically")
    ] = False
    operand_bits: Annotated[int, Field(ge=2, le=16, description="their bits")] = 8
    scale_dtype: Annotated[
        Literal["float32", "bfloat16"],
        Field(description="precision in which scales and zero points are kept; the authors use bfloat16"),
    ] = "float32"

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_group_size(self.group_size)
        return self

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` with packed layers and quantized inputs, calibrated on ``data`` (token ids).

        The last calibration sequence alone judges the scales, as in the authors' code.

        Raises:
            NotApplicableError: no calibration inputs; a layer's width is no multiple of ``group_size``;
                ``quantize_operands`` on a model without a place for it.
            DivergedError: weights or calibration activations are not finite.
        """
        model = open_copy(model)
        check_calibration(model, data, ctx)
        for name, layer in model.adapter.targets(model.module).items():
            groups_of(weight_of(layer), self.group_size, name)
        operands: dict[str, list[StaticOperand]] = {}
        if self.quantize_operands:

            def make(name: str) -> dict[Literal["query", "key", "value"], nn.Module]:
                made = [StaticOperand(self.operand_bits) for _ in range(3)]
                operands[name] = made
                return {"query": made[0], "key": made[1], "value": made[2]}

            transform_operands(model, make)
            for operand in [part for parts in operands.values() for part in parts]:
                operand.forget()
        peaks: dict[str, float] = {}
        outliers = 0
        dtype = getattr(torch, self.scale_dtype)
        ranges = ChannelRanges(model.adapter)
        for step in walk(model, data, propagate="compressed", observe=ranges.watch):
            outliers += self._smooth(model, step.block, ranges) if self.smooth else 0
            last: dict[str, Tensor] = {}
            with ctx.phase("statistics"):
                watched = ranges.watch(step.block)
                for operand in [p for name, ps in operands.items() if name.startswith(step.name) for p in ps]:
                    operand.observe()
                step.forward({name: _both(observe, name, last) for name, observe in watched.items()})
                for operand in [p for name, ps in operands.items() if name.startswith(step.name) for p in ps]:
                    operand.fix()
            for name in model.adapter.linears(step.block):
                full_name = f"{step.name}.{name}"
                weight = weight_of(step.block.get_submodule(name))
                # A layer that no token reached is judged by inputs of equal size.
                x = last.get(name, torch.eye(weight.shape[1], device=weight.device))
                require_finite_inputs(x, full_name)
                with ctx.phase("search"):
                    scale, zero = search_groups(weight, x, self.bits, self.group_size)
                    scale, zero = scale.to(dtype).float(), zero.to(dtype).float()
                    grains = None
                    if self.two_grains:
                        grains = search_rows(weight, x, scale, zero, self.bits, dtype=dtype)
                    quantized = grains.quantized() if grains else on_groups(weight, scale, zero, self.bits)
                layer = replace_linear(step.block, name, quantized)
                if self.static and self.a_bits < 16 and name in ranges.lowest:
                    peaks[full_name] = float(ranges.lowest[name].max())
                    layer.input_quantizer = static_quantizer(peaks[full_name], self.a_bits)
        facts = self.quantize_activations(model)
        if peaks:
            quantize_inputs(model, lambda name: static_quantizer(peaks.get(name), self.a_bits))
        if self.quantize_operands:
            facts["attention operands"] = f"{self.operand_bits} bits, simulated"
        return finished(model, {"outlier channels": outliers, **facts})

    def _smooth(self, model: LoadedModel, block: nn.Module, ranges: ChannelRanges) -> int:
        """Scale the outlier channels of ``block``; returns how many there are."""
        found = 0
        for group in model.adapter.scale_groups(block):
            previous = block.get_submodule(group.previous)
            if isinstance(previous, nn.Linear) and model.adapter.role(group.previous) not in (
                "up",
                "gate_up",
            ):
                continue
            if not isinstance(getattr(previous, "weight", None), Tensor):
                continue
            reader = next((name for name in group.linears if name in ranges.highest), None)
            if reader is not None:
                scale = percentile_scale(ranges.of(reader, reader), self.percentile)
                found += int((scale != 1).sum())
                apply_scale(block, group, scale)
        return found


@dataclass(frozen=True, slots=True)
class Grains:
    """A weight in two grains: ``scale8[o] * multiplier[o, G] * (codes - zero[o, G])``.

    Attributes:
        codes: int16 [rows, columns], 0 to ``2^bits - 1``.
        multiplier: [rows, groups], integers of 1 or more.
        zero: [rows, groups], integers.
        scale8: fp32 [rows].
    """

    codes: Tensor
    multiplier: Tensor
    zero: Tensor
    scale8: Tensor
    bits: int

    def quantized(self) -> Quantized:
        """Return the weight with the two factors of its scales multiplied."""
        return Quantized(self.codes, self.multiplier * self.scale8[:, None], self.zero, 0, self.bits)

    def integers(self) -> Tensor:
        """Return ``k (q - z)``, int16 [rows, columns], within 8 bits."""
        steps = self.codes.unflatten(1, (self.zero.shape[1], -1)) - self.zero.unsqueeze(-1)
        return (steps * self.multiplier.unsqueeze(-1)).flatten(1).to(torch.int16)


def percentile_scale(absmax: Tensor, percentile: float) -> Tensor:
    """Return the scale [n] that lowers the largest channels to the ``int(percentile * n + 1.5)``-th largest."""
    rank = int(percentile * len(absmax) + 1.5)
    base = absmax.sort().values[-rank]
    if float(base) < 1e-4:
        return torch.ones_like(absmax)
    return torch.where(absmax > base, absmax / base, 1.0)


def search_groups(
    weight: Tensor, x: Tensor, bits: int, group_size: int, steps: int = 20
) -> tuple[Tensor, Tensor]:
    """Return scale and zero point [rows, groups] of every group (phase 1).

    Args:
        weight: fp32 [rows, columns].
        x: fp32 [tokens, columns], the inputs that judge them.
    """
    grouped = groups_of(weight, group_size)
    low, high = torch.aminmax(grouped, dim=-1, keepdim=True)
    error = squared_error(x.unflatten(1, grouped.shape[1:]).transpose(0, 1))
    top = 2**bits - 1
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    least = torch.full_like(low, torch.inf)
    clipped = grouped
    for i in range(steps):
        r = 1.02 - 0.22 * (i + 1) / steps
        clipped = torch.minimum(torch.maximum(clipped, low * r), high * r)
        tried = ((high - low) * r / top).clamp(min=1e-5)
        offset = torch.round(-low * r / tried)
        delta = (UniformGrid(tried, offset, 0, top).snap(clipped) - grouped).transpose(0, 1)
        found = error(delta).T.unsqueeze(-1)
        better = found < least
        least = torch.where(better, found, least)
        scale, zero = torch.where(better, tried, scale), torch.where(better, offset, zero)
    return scale.squeeze(-1), zero.squeeze(-1)


def on_groups(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Quantized:
    """Return ``weight`` on the grids of phase 1, scale and zero point [rows, groups]."""
    grouped = weight.unflatten(1, (scale.shape[1], -1))
    grid = UniformGrid(scale.unsqueeze(-1), zero.unsqueeze(-1), 0, 2**bits - 1)
    return Quantized(grid.encode(grouped).to(torch.int16).flatten(1), scale, zero, 0, bits)


def search_rows(
    weight: Tensor,
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    steps: int = 80,
    dtype: torch.dtype = torch.float32,
) -> Grains:
    """Return the weight in two grains (phase 2).

    Args:
        weight: fp32 [rows, columns].
        x: fp32 [tokens, columns].
        scale: [rows, groups] of phase 1; and ``zero``.
        dtype: precision in which the best scale of a row is kept.
    """
    error = squared_error(x[None])
    absmax = weight.abs().amax(1).clamp(min=1e-5)
    best = absmax / 127
    least = torch.full_like(absmax, torch.inf)
    for i in range(steps):
        tried = absmax * (1.02 - 0.82 * (i + 1) / steps) / 127
        value = _grains(weight, tried, scale, zero, bits).quantized().dequantize()
        found = error((value - weight)[None])[0]
        better = found < least
        least, best = torch.where(better, found, least), torch.where(better, tried, best)
    return _grains(weight, best.to(dtype).float(), scale, zero, bits)


def _grains(weight: Tensor, scale8: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Grains:
    limit = 127 * scale8[:, None]
    clipped = torch.minimum(torch.maximum(weight, -limit), limit).unflatten(1, (scale.shape[1], -1))
    multiplier = torch.round(scale / scale8[:, None]).clamp(min=1)
    room = torch.floor(127 / multiplier)
    low = (zero - room).clamp(min=0).unsqueeze(-1)
    high = (zero + room).clamp(max=2**bits - 1).unsqueeze(-1)
    step = (multiplier * scale8[:, None]).unsqueeze(-1)
    codes = torch.minimum(torch.maximum(torch.round(clipped / step) + zero.unsqueeze(-1), low), high)
    return Grains(codes.to(torch.int16).flatten(1), multiplier, zero, scale8, bits)


class StaticOperand(nn.Module):
    """Rounds one operand of attention with a single scale that calibration fixes.

    The scale spans the largest channel, each channel being the least over sequences of its largest magnitude.
    """

    scale: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.mode: Literal["pass", "observe", "round"] = "pass"
        self.register_buffer("scale", torch.tensor(1.0))
        self._lowest: Tensor | None = None

    def forget(self) -> None:
        """Pass everything through until told otherwise."""
        self.mode, self._lowest = "pass", None

    def observe(self) -> None:
        """Collect the magnitudes of what passes."""
        self.mode = "observe"

    def fix(self) -> None:
        """Round what passes from here on."""
        assert self._lowest is not None
        self.scale = 2 * self._lowest.max().clamp(min=1e-5) / (2**self.bits - 1)
        self.mode, self._lowest = "round", None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` [batch, heads, tokens, head size], rounded once :meth:`fix` was called."""
        if self.mode == "observe":
            low = x.float().abs().amax(2).amin(0)
            self._lowest = low if self._lowest is None else torch.minimum(low, self._lowest)
        if self.mode != "round":
            return x
        middle = torch.full_like(self.scale, 2 ** (self.bits - 1))
        return UniformGrid(self.scale, middle, 0, 2**self.bits - 1).snap(x.float()).to(x.dtype)


def _both(observe: Observer, name: str, last: dict[str, Tensor]) -> Observer:
    def observer(x: Tensor) -> None:
        observe(x)
        if x.numel():
            last[name] = x.detach().float().reshape(-1, *x.shape[-2:])[-1]

    return observer
