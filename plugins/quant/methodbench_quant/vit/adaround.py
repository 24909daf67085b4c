"""AdaRound, layer by layer (Nagel et al., ICML 2020) or block by block as in BRECQ (Li et al., ICLR 2021).

Each weight may go to the level below or above it. Which one is learned, such that the output of a layer or block
on calibration images stays that of the float model, while a regularizer drives every choice to 0 or 1::

    min over v   mean ||f(x; W_q(v)) - y||^2 + lambda sum (1 - |2 D(v) - 1|^beta)

with ``D`` of :mod:`methodbench.torchkit.learned_rounding` and ``beta`` falling from 20 to 2 after a warm-up without
regularizer. Units come in forward order; their inputs are those of the quantized predecessors. Then activations
get one grid per tensor, whose steps are learned in the same way with rounding taken as the identity.

The authors' code of BRECQ is followed: squared errors are summed over the second dimension (channels of images,
tokens of sequences) and averaged over the rest; the first layer has 8 bits and is not learned, the last has 8 bits.
Batch normalization is folded into convolutions first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from methodbench.context import Context
from methodbench.errors import DivergedError
from methodbench.params import hyperparameters
from methodbench.torchkit.batchnorm import fold_batchnorms
from methodbench.torchkit.learned_rounding import commitment, nearest_offset, rounded, stretched_sigmoid
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.quantizers import Quantized, UniformGrid
from methodbench.torchkit.reconstruction import Fit, fit
from methodbench_quant.vit.sites import Draft, Site, Uniform, calibration_images
from methodbench_quant.vit.units import Unit, captured, units

ScaleMethod = Literal["max", "max_scale", "mse"]

#: Exponent of the distance that scales and steps of activations are fitted with (the authors' constant).
_POWER = 2.4

#: Least scale (the authors' constant).
_LEAST_SCALE = 1e-8

Rate = Annotated[float, Field(gt=0, le=1)]


@hyperparameters
class AdaRound:
    """Learns the rounding of every Linear and convolution; activations have one grid per tensor, or none."""

    w_bits: Annotated[int, Field(ge=2, le=8, description="weight bits; packed at 2, 3, 4 and 8")] = 4
    a_bits: Annotated[
        int, Field(ge=2, le=16, description="activation bits, simulated; 16: activations stay")
    ] = 16
    edge_bits: Annotated[
        int, Field(ge=2, le=8, description="bits of the first layer, its input and the last layer")
    ] = 8
    unit: Annotated[
        Literal["layer", "block"],
        Field(description="what is learned at a time: AdaRound's layer, BRECQ's block"),
    ] = "layer"
    scale: Annotated[ScaleMethod, Field(description="how a weight's grid is found")] = "mse"
    symmetric: Annotated[bool, Field(description="symmetric range of weights; with max and max_scale")] = (
        False
    )
    iterations: Annotated[
        int, Field(ge=0, le=100_000, description="steps per unit for rounding; 0: to nearest")
    ] = 20_000
    a_iterations: Annotated[
        int, Field(ge=0, le=100_000, description="steps per unit for the steps of activations")
    ] = 5000
    lr: Annotated[Rate, Field(description="learning rate of the rounding")] = 1e-3
    a_lr: Annotated[Rate, Field(description="learning rate of the steps of activations")] = 4e-4
    weight: Annotated[float, Field(ge=0, description="lambda, weight of the regularizer")] = 0.01
    b_range: Annotated[
        tuple[float, float], Field(description="beta at the end of the warm-up and of learning")
    ] = (
        20.0,
        2.0,
    )
    warmup: Annotated[float, Field(ge=0, lt=1, description="share of the steps without regularizer")] = 0.2
    batch: Annotated[int, Field(ge=1, description="images per step")] = 32
    inputs: Annotated[
        Literal["quantized", "dense"],
        Field(description="inputs of a unit: behind quantized units, or dense ones"),
    ] = "quantized"
    calibration_images: Annotated[int, Field(ge=1, le=4096, description="images to learn from")] = 1024

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` quantized, its weights packed where their width allows.

        Raises:
            NotApplicableError: no calibration images, or blocks that cannot be called alone.
            DivergedError: a loss, an activation or a weight that is not finite.
        """
        images = calibration_images(model, data, self.calibration_images, ctx)
        dense = fold_batchnorms(model, images[:1])
        draft = Draft(dense, _unused, None, rounded=False)
        order = units(draft.model, draft.layers, self.unit, images[:1])
        layers = [unit.full(layer) for unit in order for layer in unit.layers]
        bits = {**dict.fromkeys(layers, self.w_bits), layers[0]: self.edge_bits, layers[-1]: self.edge_bits}
        generator = torch.Generator().manual_seed(ctx.seed)
        fits: list[Fit] = []
        with ctx.phase("rounding"):
            for unit in order:
                learned = self._learn_rounding(draft, dense, unit, bits, images, generator)
                fits += [learned] if learned is not None and layers[0] != unit.name else []
        facts: dict[str, object] = {}
        if fits:
            facts |= {"loss_first": sum(f.first for f in fits), "loss_last": sum(f.last for f in fits)}
        if self.a_bits < 16:
            with ctx.phase("activations"):
                draft.refit(self._fit_activation(layers[-1]))
                draft.calibrate(images[:64])
                for unit in order if self.a_iterations else []:
                    self._learn_steps(draft, dense, unit, images, generator)
            facts["activations"] = f"{self.a_bits} bits, simulated"
        return draft.finish(facts)

    def _learn_rounding(
        self,
        draft: Draft,
        dense: LoadedModel,
        unit: Unit,
        bits: Mapping[str, int],
        images: Tensor,
        generator: torch.Generator,
    ) -> Fit | None:
        """Round the layers of a unit and put them into ``draft``."""
        module = draft.model.module.get_submodule(unit.name)
        weights, grids = {}, {}
        for layer in unit.layers:
            full = unit.full(layer)
            weight = cast(Tensor, draft.model.module.get_submodule(full).weight).detach().float()
            weights[layer] = weight.flatten(1)
            grids[layer] = find_scale(
                weights[layer], bits[full], self.scale, self.symmetric, f"the weight of {full}"
            )
        first = (
            unit.layers == ("",) and self.edge_bits == bits[unit.name] and unit.full("") == next(iter(bits))
        )
        iterations = 0 if first else self.iterations
        x, target = captured(dense.module, unit.name, images)
        if self.inputs == "quantized" and iterations:
            x, _ = captured(draft.model.module, unit.name, images)

        def forward(rounded_weights: Mapping[str, Tensor], batch: Tensor) -> Tensor:
            given = {
                unit.parameter(layer, "weight"): weight.view_as(
                    cast(Tensor, draft.model.module.get_submodule(unit.full(layer)).weight)
                )
                for layer, weight in rounded_weights.items()
            }
            return cast(Tensor, functional_call(module, given, (batch,)))

        learned = learn_rounding(
            forward,
            weights,
            grids,
            x,
            target,
            iterations=iterations,
            batch=self.batch,
            lr=self.lr,
            weight=self.weight,
            b_range=self.b_range,
            warmup=self.warmup,
            generator=generator,
            name=unit.name,
        )
        for layer, offset in learned.offsets.items():
            draft.put(unit.full(layer), harden(weights[layer], grids[layer], offset))
        return learned.fit

    def _fit_activation(self, last: str) -> Callable[[Tensor, Site], nn.Module]:
        def fit_activation(x: Tensor, site: Site) -> nn.Module:
            bits = self.edge_bits if site.kind == "image" or site.name == last else self.a_bits
            grid = find_scale(x.flatten()[None], bits, "mse", False, str(site))
            return Uniform(grid.scale.squeeze(), cast(Tensor, grid.zero).squeeze(), bits)

        return fit_activation

    def _learn_steps(
        self, draft: Draft, dense: LoadedModel, unit: Unit, images: Tensor, generator: torch.Generator
    ) -> None:
        """Learn the steps of the quantizers in a unit, in place."""
        module = draft.model.module.get_submodule(unit.name)
        quantizers = {n: m for n, m in module.named_modules() if isinstance(m, Uniform)}
        steps = {f"{name}.scale": nn.Parameter(q.scale.clone()) for name, q in quantizers.items()}
        _, target = captured(dense.module, unit.name, images)
        x, _ = captured(draft.model.module, unit.name, images)

        def loss(_: int, __: float) -> Tensor:
            chosen = torch.randperm(len(x), generator=generator)[: self.batch].to(x.device)
            out = functional_call(module, dict(steps), (x[chosen],))
            return (out - target[chosen]).abs().pow(_POWER).sum(1).mean()

        optimizer = torch.optim.Adam(steps.values(), lr=self.a_lr)
        fit(optimizer, loss, 1, steps=self.a_iterations, schedule="cosine", name=unit.name)
        for name, quantizer in quantizers.items():
            quantizer.scale = steps[f"{name}.scale"].detach()


@dataclass(frozen=True, slots=True)
class Learned:
    """What :func:`learn_rounding` returns: ``v`` by layer, and the loss of the first and of the last step."""

    offsets: dict[str, Tensor]
    fit: Fit | None


def learn_rounding(
    forward: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    weights: Mapping[str, Tensor],
    grids: Mapping[str, UniformGrid],
    x: Tensor,
    target: Tensor,
    *,
    iterations: int,
    batch: int,
    lr: float = 1e-3,
    weight: float = 0.01,
    b_range: tuple[float, float] = (20.0, 2.0),
    warmup: float = 0.2,
    generator: torch.Generator | None = None,
    name: str = "the layer",
) -> Learned:
    """Learn which way the weights of a unit are rounded (the authors' ``layer_reconstruction``).

    Args:
        forward: the unit's output, given its weights [rows, n] by layer and a batch of its inputs.
        weights: float32 [rows, n].
        grids: of the weights.
        x: inputs [samples, ...].
        target: outputs [samples, ...] of the float unit.
        iterations: steps; 0 leaves rounding to nearest.
        batch: samples per step, drawn anew for each.
        weight: of the regularizer.
    """
    offsets = {key: nn.Parameter(nearest_offset(weights[key] / grids[key].scale)) for key in weights}
    if not iterations:
        return Learned({key: offset.detach() for key, offset in offsets.items()}, None)

    def loss(_: int, done: float) -> Tensor:
        step = round(done * iterations) + 1
        chosen = torch.randperm(len(x), generator=generator)[:batch].to(x.device)
        relaxed = {key: stretched_sigmoid(offset) for key, offset in offsets.items()}
        soft = {key: on_levels(weights[key], grids[key], d) for key, d in relaxed.items()}
        total = reconstruction_loss(forward(soft, x[chosen]), target[chosen])
        if step >= warmup * iterations:
            beta = temperature(step, iterations, warmup, b_range)
            total = total + weight * torch.stack([commitment(d, beta) for d in relaxed.values()]).sum()
        return total

    def error() -> float:
        with torch.no_grad():
            hard = {key: on_levels(weights[key], grids[key], (v >= 0).float()) for key, v in offsets.items()}
            return float(reconstruction_loss(forward(hard, x), target))

    before = error()
    fit(torch.optim.Adam(offsets.values(), lr=lr), loss, 1, steps=iterations, name=name)
    return Learned({key: offset.detach() for key, offset in offsets.items()}, Fit(before, error()))


def reconstruction_loss(out: Tensor, target: Tensor) -> Tensor:
    """Return the squared error summed over the second dimension, averaged over the others (``lp_loss``)."""
    return (out - target).square().sum(1).mean()


def temperature(step: int, iterations: int, warmup: float, b_range: tuple[float, float]) -> float:
    """Return beta at a step, counted from 1 (``LinearTempDecay``)."""
    start = warmup * iterations
    if step < start:
        return b_range[0]
    done = (step - start) / (iterations - start)
    return b_range[1] + (b_range[0] - b_range[1]) * max(0.0, 1 - done)


def on_levels(weight: Tensor, grid: UniformGrid, d: Tensor) -> Tensor:
    """Return ``s (clamp(floor(W / s) + D + z) - z)`` for ``weight`` and ``d`` [rows, n]; differentiable in ``d``."""
    return rounded(weight / grid.scale, d, grid.zero, (grid.high + 1).bit_length() - 1) * grid.scale


def harden(weight: Tensor, grid: UniformGrid, offset: Tensor) -> Quantized:
    """Return ``weight`` [rows, n] with every rounding decided, upwards where ``offset`` is not negative."""
    zero = cast(Tensor, grid.zero)
    codes = ((weight / grid.scale).floor() + (offset >= 0) + zero).clamp(0, grid.high)
    return Quantized(codes.to(torch.int16), grid.scale, zero, 0, (grid.high + 1).bit_length() - 1)


def find_scale(
    x: Tensor, bits: int, method: ScaleMethod, symmetric: bool = False, name: str = "the tensor"
) -> UniformGrid:
    """Return the grid of every row of ``x`` (the authors' ``UniformAffineQuantizer.init_quantization_scale``).

    Args:
        x: float32 [rows, n].
        method: ``max``: extremes, widened to hold 0; ``max_scale``: these times ``(b + 2) / 8``; ``mse``: extremes
            times 1 - 0.01 i, i = 0 ... 79, of the least mean ``|x - Q(x)|^2.4``.
        symmetric: widen the range to the larger magnitude on either side; not with ``mse``.
        name: for the error message.

    Raises:
        DivergedError: ``x`` is not finite.
    """
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise DivergedError(f"{name} holds NaN or infinity, so that it has no scale")
    if method == "mse":
        return _least_distance(x, low, high, bits)
    factor = (bits + 2) / 8 if method == "max_scale" else 1.0
    low, high = low.clamp(max=0) * factor, high.clamp(min=0) * factor
    if symmetric:
        high = torch.maximum(-low, high)
        low = torch.where(low < 0, -high, 0.0)
    # In double precision, as the authors': a symmetric range has its zero point half-way between two codes.
    grid = _grid(low.double(), high.double(), bits)
    return UniformGrid(grid.scale.float(), cast(Tensor, grid.zero).float(), 0, grid.high)


def _least_distance(x: Tensor, low: Tensor, high: Tensor, bits: int) -> UniformGrid:
    best = _grid(low, high, bits)
    scale, zero = best.scale, cast(Tensor, best.zero)
    least = torch.full_like(scale, torch.inf)
    for i in range(80):
        grid = _grid(low * (1 - 0.01 * i), high * (1 - 0.01 * i), bits)
        distance = (grid.snap(x) - x).abs_().pow_(_POWER).mean(-1, keepdim=True)
        better = distance < least
        least = torch.where(better, distance, least)
        scale, zero = (
            torch.where(better, grid.scale, scale),
            torch.where(better, cast(Tensor, grid.zero), zero),
        )
    return UniformGrid(scale, zero, 0, best.high)


def _grid(low: Tensor, high: Tensor, bits: int) -> UniformGrid:
    scale = ((high - low) / (2**bits - 1)).clamp(min=_LEAST_SCALE)
    return UniformGrid(scale, (-low / scale).round(), 0, 2**bits - 1)


def _unused(weight: Tensor, name: str) -> Quantized:
    raise AssertionError(f"{name} is put as it was learned")
