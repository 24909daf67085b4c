"""I&S-ViT: inclusive quantization of attention and stable optimization of blocks (Zhong et al., arXiv 2311.10126).

Attention probabilities are quantized on a uniform grid of ``log2(A + eta)``; a small shift ``eta``, searched, keeps the
whole range on the grid (shift-uniform-log2, SULQ)::

    k = clamp(round((log2(A + eta) - low) / d), 0, 2^b),    A_q = 2^round(k d + low) - eta,    d = (high - low) / 2^b

Every other activation and every weight has a uniform grid as in RepQ-ViT. Blocks are then learned against the float
model in three stages (SOS): (1) outputs of LayerNorms on a grid per channel, weights in floating point; (2) scales of
channels folded into LayerNorm and weight, as in RepQ-ViT; (3) weights through their quantizer, rounding taken as the
identity. All weights and biases of a block are learned; scales and zero points stay where the search put them. With
``iterations=0`` it is RepQ-ViT with another quantizer of attention.

The authors' code (zysxmu/IaS-ViT, 9300cea) is followed where it differs from the equations: the search of ``eta``
divides by ``2^b - 1`` and the quantizer by ``2^b``, which has one level more; the input of the patch embedding stays as
it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from methodbench.context import Context
from methodbench.errors import DivergedError
from methodbench.params import hyperparameters
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.quantizers import Quantized, UniformGrid, round_ste
from methodbench.torchkit.reconstruction import Fit, fit
from methodbench_quant.vit.repq_vit import (
    Shared,
    encoded,
    fold_channels,
    require_foldable,
    search_uniform,
)
from methodbench_quant.vit.sites import Draft, Site, Uniform, calibration_images
from methodbench_quant.vit.units import Unit, captured, units

#: Shifts that are tried, in order (the authors' list).
SHIFTS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)

#: Images that scales are found on (the authors' number).
_FIRST = 64


@hyperparameters
class ISViT:
    """Quantizes weights and activations of a vision transformer, and learns its weights block by block."""

    w_bits: Annotated[int, Field(ge=2, le=8, description="weight bits; packed at 2, 3, 4 and 8")] = 4
    a_bits: Annotated[int, Field(ge=2, le=8, description="activation bits, simulated")] = 4
    iterations: Annotated[
        int, Field(ge=0, le=100_000, description="steps per block and stage; 0: nothing is learned")
    ] = 1000
    lr: Annotated[float, Field(gt=0, le=1, description="of Adam, falling to 0 along half a cosine")] = 4e-5
    batch: Annotated[int, Field(ge=1, description="images per step")] = 64
    percentiles: Annotated[
        tuple[float, ...], Field(min_length=1, description="upper ends of the ranges tried for activations")
    ] = (0.999, 0.9999, 0.99999)
    w_percentiles: Annotated[
        tuple[float, ...], Field(min_length=1, description="upper ends of the ranges tried for weights")
    ] = (0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999)
    calibration_images: Annotated[int, Field(ge=1, le=4096, description="images to learn from")] = 1024

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` quantized, its weights packed where their width allows.

        Raises:
            NotApplicableError: no calibration images, or not a pre-norm vision transformer.
            DivergedError: an activation or a weight for which no finite scale exists, or a loss that is not finite.
        """
        images = calibration_images(model, data, self.calibration_images, ctx)
        draft = Draft(model, self._quantize_weight, self._fit_activation, rounded=False)
        require_foldable(draft)
        with ctx.phase("calibration"):
            draft.calibrate(images[:_FIRST])
        stages = Stages(self.iterations, self.lr, self.batch, self.w_bits, self._grid)
        facts = stages.learn(draft, model, images, ctx)
        return draft.finish({"activations": f"{self.a_bits} bits, simulated", **facts})

    def _grid(self, weight: Tensor, name: str) -> UniformGrid:
        return search_uniform(weight, self.w_bits, self.w_percentiles, f"a row of the weight of {name}")

    def _quantize_weight(self, weight: Tensor, name: str) -> Quantized:
        return encoded(weight, self._grid(weight, name), self.w_bits)

    def _fit_activation(self, x: Tensor, site: Site) -> nn.Module:
        name = str(site)
        if site.kind == "image":
            return nn.Identity()
        if site.kind == "softmax":
            return ShiftUniformLog2.searched(x, self.a_bits, name)
        grouped = x.flatten(0, -2).T if site.kind == "normed" else x.flatten()
        grid = search_uniform(grouped, self.a_bits, self.percentiles, name)
        return Uniform(grid.scale.squeeze(-1), cast(Tensor, grid.zero).squeeze(-1), self.a_bits)


@dataclass(frozen=True, slots=True)
class Stages:
    """The three stages of learning (SOS): grids per channel, folding, weights through their quantizer.

    Attributes:
        iterations: steps per block and stage; 0 leaves only folding and rounding.
        lr: of Adam.
        batch: images per step.
        bits: of weights.
        grid: the grid of every row of a weight [rows, n], given the layer's name.
        shared: what :func:`~methodbench_quant.vit.repq_vit.fold_channels` takes.
    """

    iterations: int
    lr: float
    batch: int
    bits: int
    grid: Callable[[Tensor, str], UniformGrid]
    shared: Shared = "mean"

    def learn(self, draft: Draft, dense: LoadedModel, images: Tensor, ctx: Context) -> dict[str, float]:
        """Go through the stages, in place, and return the losses at their beginnings and ends.

        Args:
            draft: calibrated with weights in floating point.
            images: [B, C, H, W] to learn from.

        Raises:
            DivergedError: a weight without a finite scale, or a loss that is not finite.
        """
        generator = torch.Generator().manual_seed(ctx.seed)
        order = units(draft.model, draft.layers, "block", images[:1])
        with ctx.phase("per channel"):
            first = [self._learn(draft, dense, unit, images, generator, None) for unit in order]
        with ctx.phase("reparameterization"):
            fold_channels(draft, draft.model, draft.set_float, shared=self.shared)
        weights = {name: _weight(draft, name) for name in draft.layers}
        grids = {name: self.grid(weight, name) for name, weight in weights.items()}
        floats = {name: weight.clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            draft.put(name, encoded(weight, grids[name], self.bits))
        with ctx.phase("per tensor"):
            rounding = Rounding(floats, grids, self.bits)
            last = [self._learn(draft, dense, unit, images, generator, rounding) for unit in order]
        facts: dict[str, float] = {}
        for stage, fits in (("per_channel", first), ("per_tensor", last)):
            known = [found for found in fits if found is not None]
            if known:
                facts[f"loss_{stage}_first"] = sum(found.first for found in known)
                facts[f"loss_{stage}_last"] = sum(found.last for found in known)
        return facts

    def _learn(
        self,
        draft: Draft,
        dense: LoadedModel,
        unit: Unit,
        images: Tensor,
        generator: torch.Generator,
        rounding: Rounding | None,
    ) -> Fit | None:
        """Learn weights and biases of a unit, in place: floating point on dense inputs, or rounded ones on its own."""
        if not self.iterations:
            return None
        x, target = captured(dense.module, unit.name, images)
        if rounding is not None:
            x, _ = captured(draft.model.module, unit.name, images)
        module = draft.model.module.get_submodule(unit.name)
        layers = {layer: draft.model.module.get_submodule(unit.full(layer)) for layer in unit.layers}
        weights = {
            layer: rounding.floats[unit.full(layer)] if rounding else _weight(draft, unit.full(layer))
            for layer in layers
        }
        biases = {
            key: layer.get_parameter("bias").detach()
            for key, layer in layers.items()
            if layer.bias is not None
        }

        def forward(learned: Mapping[str, Tensor], shifts: Mapping[str, Tensor], batch: Tensor) -> Tensor:
            given = {unit.parameter(layer, "bias"): bias for layer, bias in shifts.items()}
            for layer, weight in learned.items():
                # A clamped code passes no gradient, one on the bounds neither, as from torch's clamp.
                whole = (
                    rounding.grids[unit.full(layer)].pass_through(weight, bounds=False)
                    if rounding
                    else weight
                )
                given[unit.parameter(layer, "weight")] = whole.view_as(cast(Tensor, layers[layer].weight))
            return cast(Tensor, functional_call(module, given, (batch,)))

        learned = learn_weights(
            forward,
            weights,
            biases,
            x,
            target,
            iterations=self.iterations,
            batch=self.batch,
            lr=self.lr,
            generator=generator,
            name=unit.name,
        )
        for layer, weight in learned.weights.items():
            name, bias = unit.full(layer), learned.biases.get(layer)
            if rounding:
                draft.put(name, encoded(weight, rounding.grids[name], rounding.bits), bias)
                continue
            draft.set_float(name, weight, bias)
        return learned.fit


class ShiftUniformLog2(nn.Module):
    """SULQ with a fixed shift and range; gradients pass both roundings (section 3.2).

    Buffers: ``shift`` (eta), ``low`` and ``high`` of ``log2(A + eta)``, float32 [] each.
    """

    shift: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, shift: Tensor, low: Tensor, high: Tensor, bits: int) -> None:
        super().__init__()
        for name, value in (("shift", shift), ("low", low), ("high", high)):
            self.register_buffer(name, value)
        self.bits = bits

    @classmethod
    def searched(cls, x: Tensor, bits: int, name: str = "the tensor") -> ShiftUniformLog2:
        """Return the quantizer whose shift has the least squared error on ``x``, the first among equals.

        Raises:
            DivergedError: ``x`` is constant or not finite.
        """
        scores, lows, highs = shift_scores(x, bits)
        if not bool(scores.isfinite().any()):
            raise DivergedError(f"{name} is constant or not finite, so that it has no range")
        best = int(scores.nan_to_num(nan=torch.inf).argmin())
        shift = torch.tensor(SHIFTS[best], device=x.device)
        return cls(shift, lows[best], highs[best], bits)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` [...] on the levels, in its dtype; values may lie a little below 0."""
        levels = 2**self.bits
        step = (self.high - self.low) / levels
        exponent = torch.log(x.float() + self.shift) / torch.log(torch.tensor(2.0))
        code = round_ste((exponent - self.low) / step).clamp(0, levels)
        return (torch.exp2(round_ste(code * step + self.low)) - self.shift).to(x.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def shift_scores(x: Tensor, bits: int, shifts: Sequence[float] = SHIFTS) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean squared error of every shift, and the range of ``log2(x + shift)``: float32 [shifts] each."""
    levels = 2**bits
    scores, lows, highs = [], [], []
    for shift in shifts:
        exponent = torch.log2(x.float() + shift)
        low, high = exponent.aminmax()
        step = (high - low) / (levels - 1)
        code = ((exponent - low) / step).round().clamp(0, levels - 1)
        scores.append((torch.exp2((code * step + low).round()) - shift - x).square().mean())
        lows.append(low)
        highs.append(high)
    return torch.stack(scores), torch.stack(lows), torch.stack(highs)


@dataclass(frozen=True, slots=True)
class Rounding:
    """What the third stage learns through: floating-point weights [rows, n] and fixed grids by layer."""

    floats: Mapping[str, Tensor]
    grids: Mapping[str, UniformGrid]
    bits: int


@dataclass(frozen=True, slots=True)
class Learned:
    """What :func:`learn_weights` returns."""

    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    fit: Fit


def learn_weights(
    forward: Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Tensor], Tensor],
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    x: Tensor,
    target: Tensor,
    *,
    iterations: int,
    batch: int,
    lr: float,
    generator: torch.Generator,
    name: str = "the block",
) -> Learned:
    """Learn the weights and biases of a unit (the authors' ``layer_reconstruction``).

    Args:
        forward: the unit's output, given its weights and biases by layer, and a batch of its inputs.
        weights: float32.
        biases: float32.
        x: inputs [samples, ...].
        target: outputs [samples, ...] of the float unit.
        iterations: steps, at least 1.
        batch: samples per step; all of them where there are no more.

    Raises:
        DivergedError: a loss is not finite.
    """
    learned = {key: nn.Parameter(weight.clone()) for key, weight in weights.items()}
    shifts = {key: nn.Parameter(bias.clone()) for key, bias in biases.items()}
    waiting: list[Tensor] = []

    def loss(_: int, __: float) -> Tensor:
        if not waiting:
            waiting.extend(torch.randperm(len(x), generator=generator).split(batch))
        chosen = waiting.pop(0).to(x.device)
        return squared_distance(forward(learned, shifts, x[chosen]), target[chosen])

    def error() -> float:
        with torch.no_grad():
            return float(squared_distance(forward(learned, shifts, x), target))

    before = error()
    fit(
        torch.optim.Adam([*learned.values(), *shifts.values()], lr=lr),
        loss,
        1,
        steps=iterations,
        schedule="cosine",
        name=name,
    )
    return Learned(
        {key: weight.detach() for key, weight in learned.items()},
        {key: bias.detach() for key, bias in shifts.items()},
        Fit(before, error()),
    )


def squared_distance(out: Tensor, target: Tensor) -> Tensor:
    """Return the squared error summed over the second dimension (tokens), averaged over the others."""
    return (out - target).square().sum(1).mean()


def _weight(draft: Draft, name: str) -> Tensor:
    weight = cast(Tensor, draft.model.module.get_submodule(name).weight)
    return weight.detach().float().flatten(1)
