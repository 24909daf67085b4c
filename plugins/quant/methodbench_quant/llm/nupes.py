"""NUPES and PowerQuant: non-uniform quantization by a power map.

Yvinec et al., "PowerQuant: Automorphism Search for Non-Uniform Quantization", ICLR 2023 (2301.09858), and
"NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search", TPAMI 2025 (2308.05600). Weights are
rounded after ``x -> sign(x)|x|^a``, a map that turns products into products, so that integer multiplication
keeps its meaning; ``a < 1`` makes steps fine near zero. PowerQuant picks the exponent without data; NUPES also
moves the weights over the whole quantized range by gradients, and the exponent with them. Per output channel::

    s = max |W|^a / (2^(b-1) - 1);  Q_a(W) = sign(W) (|round(|W|^a / s)| s)^(1/a)
    a* = argmin_a  sum_l || W_l - Q_a(W_l) ||_p                                     (data-free)
    min over V, a of || x (W - sign(h(V)) (|h(V)| s)^(1/a))^T ||^2,  V_0 = sign(W) |W|^a / s   (data-driven)

The paper's data-driven part is not fully specified in what could be read: step sizes, annealing and the
optimizer of ``mode = data_driven`` are our reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import minimize
from torch import Tensor

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.compensation import observe_hessians
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.power_map import PowerGrid, PowerQuantized, find_power_grid, on_power_grid
from methodbench.torchkit.quantizers import Quantized, require_finite
from methodbench.torchkit.sequential import walk
from methodbench_quant.llm.calls import require_finite_inputs
from methodbench_quant.llm.layers import finished, open_copy, replace_linear, weight_of

#: Exponents that the searches look at, and the step of the grid search.
LEAST_EXPONENT = 0.1
_GRID = np.linspace(0.2, 1.0, 401)

#: Least exponent while it is learned, and the least magnitude whose logarithm enters its gradient.
_LEAST_LEARNED = 0.2
_LEAST_MAGNITUDE = 1e-6

#: Sharpness of the soft rounding at the first and at the last iteration.
_SOFT, _HARD = 1.0, 20.0


@hyperparameters
class NUPES:
    """Rounds the weights of every Linear in the blocks on a power grid; the rest stays as it is."""

    bits: Annotated[Literal[2, 3, 4, 8], Field(description="weight bits")] = 4
    exponent: Annotated[float | None, Field(gt=0, le=1, description="the power a; none searches it")] = None
    scope: Annotated[
        Literal["global", "layer"], Field(description="one exponent for the model, or one per layer")
    ] = "global"
    norm: Annotated[Literal[1, 2], Field(description="norm p of the weight error that is searched")] = 2
    search: Annotated[
        Literal["nelder-mead", "grid"], Field(description="grid looks at 401 exponents from 0.2 to 1")
    ] = "nelder-mead"
    start: Annotated[float, Field(gt=0, le=1, description="first exponent of nelder-mead")] = 0.5
    mode: Annotated[
        Literal["data_free", "data_driven"],
        Field(description="weights alone, or fitted to calibration inputs"),
    ] = "data_free"
    rounding: Annotated[
        Literal["soft", "straight-through"], Field(description="how gradients pass the rounding")
    ] = "soft"
    iterations: Annotated[int, Field(ge=1, le=100_000, description="gradient steps per layer")] = 2000
    lr_v: Annotated[float, Field(gt=0, le=1, description="learning rate of the weights, in steps")] = 1e-3
    lr_a: Annotated[float, Field(ge=0, le=1, description="learning rate of the exponent")] = 1e-4

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` with packed layers; ``data`` is looked at in data-driven mode only.

        Raises:
            NotApplicableError: data-driven without calibration inputs.
            DivergedError: weights or calibration activations are not finite.
        """
        model = open_copy(model)
        layers = model.adapter.targets(model.module)
        with ctx.phase("search"):
            exponents = self._exponents({name: weight_of(layer) for name, layer in layers.items()})
        if self.mode == "data_free":
            for name, layer in layers.items():
                weight = weight_of(layer)
                grid = find_power_grid(weight, self.bits, exponents[name])
                replace_linear(model.module, name, on_power_grid(weight, grid, name))
        else:
            exponents |= self._learn(model, data, exponents, ctx)
        found = sorted(exponents.values())
        return finished(
            model, {"exponent": found[len(found) // 2], "exponent_min": found[0], "exponent_max": found[-1]}
        )

    def _exponents(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the exponent of every layer."""
        for name, weight in weights.items():
            require_finite(weight, name)
        if self.exponent is not None:
            return dict.fromkeys(weights, self.exponent)
        search = search_grid if self.search == "grid" else lambda loss: search_simplex(loss, self.start)
        if self.scope == "layer":
            return {name: search(self._loss([weight])) for name, weight in weights.items()}
        return dict.fromkeys(weights, search(self._loss(list(weights.values()))))

    def _loss(self, weights: Sequence[Tensor]) -> Callable[[float], float]:
        return lambda exponent: error_norm(weights, self.bits, exponent, self.norm)

    def _learn(
        self, model: LoadedModel, data: Calibration, exponents: Mapping[str, float], ctx: Context
    ) -> dict[str, float]:
        """Fit and replace every layer, block by block on the dense model's inputs; return the exponents."""
        learned: dict[str, float] = {}
        for step in walk(model, data, propagate="compressed"):
            for names, hessian in observe_hessians(step, model.adapter.linears(step.block)):
                for name in names:
                    weight, full = weight_of(step.block.get_submodule(name)), f"{step.name}.{name}"
                    with ctx.phase("learning"):
                        fitted = learn(
                            weight,
                            hessian.matrix,
                            find_power_grid(weight, self.bits, exponents[full]),
                            iterations=self.iterations,
                            lr_v=self.lr_v,
                            lr_a=self.lr_a,
                            soft=self.rounding == "soft",
                            name=full,
                        )
                    learned[full] = fitted.quantized.exponent
                    replace_linear(step.block, name, fitted.quantized)
        return learned


def error_norm(weights: Sequence[Tensor], bits: int, exponent: float, norm: int = 2) -> float:
    """Return ``eps(a)``: the sum over weights [out, in] of the norm (not squared) of their rounding error."""
    total = 0.0
    for weight in weights:
        grid = find_power_grid(weight, bits, exponent)
        total += float((grid.snap(weight) - weight).norm(p=norm))
    return total


def search_simplex(loss: Callable[[float], float], start: float) -> float:
    """Return the exponent in [0.1, 1] that Nelder and Mead's search with scipy's defaults ends at."""

    def bounded(point: np.ndarray) -> float:
        return loss(float(point[0])) if LEAST_EXPONENT < point[0] <= 1 else math.inf

    return float(minimize(bounded, x0=[start], method="Nelder-Mead").x[0])


def search_grid(loss: Callable[[float], float]) -> float:
    """Return the best of 401 exponents from 0.2 to 1: safe where ``loss`` is ragged (8 bits), and slow."""
    return float(min(_GRID, key=lambda exponent: loss(float(exponent))))


class _Power(torch.autograd.Function):
    """``u^(1/a)`` for ``u >= 0``, with the derivative by ``a`` kept finite near ``u = 0``."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, u: Tensor, a: Tensor) -> Tensor:
        result = u.pow(1 / a)
        ctx.save_for_backward(u, a, result)
        return result

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        u, a, result = ctx.saved_tensors  # type: ignore[attr-defined]
        by_u = torch.where(u > 0, result / (a * u.clamp(min=torch.finfo(u.dtype).tiny)), 0.0)
        by_a = torch.where(u > 0, -result * u.clamp(min=_LEAST_MAGNITUDE).log() / a**2, 0.0)
        return grad * by_u, (grad * by_a).sum()


def soft_round(v: Tensor, sharpness: float) -> Tensor:
    """Return ``floor(v) + 1/2 + tanh(t (v - floor(v) - 1/2)) / (2 tanh(t / 2))``: rounding as t grows."""
    floor = v.detach().floor()
    return floor + 0.5 + torch.tanh(sharpness * (v - floor - 0.5)) / (2 * math.tanh(sharpness / 2))


@dataclass(frozen=True, slots=True)
class Learned:
    """A fitted weight, and the loss before and after (mean squared output error up to a constant)."""

    quantized: PowerQuantized
    before: float
    after: float


def learn(
    weight: Tensor,
    hessian: Tensor,
    grid: PowerGrid,
    *,
    iterations: int,
    lr_v: float,
    lr_a: float,
    soft: bool = True,
    name: str = "the weight",
) -> Learned:
    """Fit codes and exponent of one Linear to its calibration inputs (our reading of NUPES).

    The output error of a Linear is a quadratic form of its weight error with the inputs' Gram matrix, so that
    a step over the whole calibration set costs no pass over it. The scales stay those of ``grid``. The
    result is never worse than the start on the calibration inputs: the better of the two is returned.

    Args:
        weight: fp32 [out, in].
        hessian: fp32 [in, in], of any positive factor.
        grid: where to start from (scale [out, 1]).

    Raises:
        DivergedError: ``hessian`` is not finite; names ``name``.
    """
    require_finite_inputs(hessian, name)
    top = 2 ** (grid.bits - 1) - 1
    gram = hessian / hessian.diagonal().mean().clamp(min=torch.finfo(hessian.dtype).tiny)
    v = (weight.abs().pow(grid.exponent).copysign(weight) / grid.scale).requires_grad_()
    a = torch.tensor(grid.exponent, requires_grad=lr_a > 0)
    groups = [{"params": [v], "lr": lr_v}] + ([{"params": [a], "lr": lr_a}] if lr_a > 0 else [])
    optimizer = torch.optim.Adam(groups)
    # Steps that shrink let the codes settle; their size is ours, like the rest of this function.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)

    def loss_of(codes: Tensor, exponent: Tensor) -> Tensor:
        restored = codes.sign() * _Power.apply(codes.abs() * grid.scale, exponent)
        error = restored - weight
        return ((error @ gram) * error).sum()

    with torch.no_grad():
        start = v.round().clamp(-top, top)
        before = float(loss_of(start, a))
    for i in range(iterations):
        sharpness = _SOFT * (_HARD / _SOFT) ** (i / max(1, iterations - 1))
        rounded = soft_round(v, sharpness) if soft else v + (v.round() - v).detach()
        exponent = a.clamp(_LEAST_LEARNED, 1.0)
        optimizer.zero_grad()
        loss_of(rounded.clamp(-top, top), exponent).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        codes, exponent = v.round().clamp(-top, top), a.clamp(_LEAST_LEARNED, 1.0)
        after = float(loss_of(codes, exponent))
        if not after < before:
            codes, exponent, after = start, torch.tensor(grid.exponent), before
    mapped = Quantized(codes.to(torch.int16), grid.scale, None, -top - 1, grid.bits)
    return Learned(PowerQuantized(mapped, float(exponent)), before, after)
