"""LLM-FP4: 4-bit floating-point quantized transformers (Liu et al., EMNLP 2023).

Weights and activations become numbers of a few exponent and mantissa bits whose exponent bias is real
(:mod:`methodbench.torchkit.floats`). The split of the bits and the bias are searched together, by the error of the
layer's output on calibration inputs. With ``B(m)`` the bias whose largest level is ``m``, the candidates of a bias
are ``f_i B(max)``, ``f_i = 0.01 + i (1.2 - 0.01) / 100``. The full method gives each input channel ``j`` of an
activation an integer offset on top of the tensor's bias ``rho``, which hardware folds into the weights::

    b_j = B(max |x_j|),  B_j = clamp(round(b_j), round(rho), round(rho) + 2^E - 1) - round(rho) + rho

Every layer sees full-precision inputs; weights and activations are searched in turns, for a few rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.activations import StaticQuantizer, quantize_inputs
from methodbench.torchkit.floats import FloatFormat, FloatGrid, FloatQuantized, maximum_bias
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.quantizers import require_finite
from methodbench.torchkit.sequential import walk
from methodbench_quant.llm.calls import Recorder, count, require_finite_inputs, subset
from methodbench_quant.llm.layers import (
    check_calibration,
    finished,
    open_copy,
    replace_linear,
    weight_of,
)

Variant = Literal["minmax", "baseline", "fpq"]


@hyperparameters
class LLMFP4:
    """Quantizes the weights and inputs of every Linear in the blocks to floating point of few bits."""

    bits: Annotated[int, Field(ge=3, le=6, description="bits of weights")] = 4
    a_bits: Annotated[int, Field(ge=3, le=6, description="bits of activations")] = 4
    exponent: Annotated[int, Field(ge=1, le=5, description="exponent bits that the search starts from")] = 2
    variant: Annotated[
        Literal["minmax", "baseline", "fpq"],
        Field(
            description="no search; search with one activation bias per layer; and with offsets per channel"
        ),
    ] = "fpq"
    low: Annotated[float, Field(ge=0, description="smallest factor on a bias")] = 0.01
    high: Annotated[float, Field(gt=0, description="end of the factors on a bias")] = 1.2
    candidates: Annotated[int, Field(ge=1, le=1000, description="factors tried")] = 100
    rounds: Annotated[int, Field(ge=1, le=10, description="turns of weights and activations")] = 3
    search_tokens: Annotated[
        int, Field(ge=0, description="calibration tokens that judge a layer; 0 for all, as the authors do")
    ] = 256

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.exponent > min(self.bits, self.a_bits) - 1:
            raise ValueError("exponent leaves no bit for the sign: it must be smaller than bits and a_bits")
        return self

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` with packed layers and quantized inputs, calibrated on ``data`` (token ids).

        Raises:
            NotApplicableError: no calibration inputs; a layer is quantized already.
            DivergedError: weights or calibration activations are not finite.
        """
        model = open_copy(model)
        check_calibration(model, data, ctx)
        formats: dict[str, str] = {}
        grids: dict[str, FloatGrid] = {}
        recorder = Recorder(model.adapter, lambda _: set())
        for step in walk(model, data, propagate="dense", observe=recorder.watch):
            for name, layer in model.adapter.linears(step.block).items():
                full_name = f"{step.name}.{name}"
                weight = weight_of(layer)
                require_finite(weight, full_name)
                parts = recorder.inputs.get(name) or [torch.eye(weight.shape[1], device=weight.device)]
                absmax = torch.stack([part.float().flatten(0, -2).abs().amax(0) for part in parts]).amax(0)
                require_finite_inputs(absmax, full_name)
                x = torch.cat([p.float().flatten(0, -2) for p in subset(parts, count, self.search_tokens)])
                x = x[: self.search_tokens or None]
                with ctx.phase("search"):
                    found = self.search(weight, x, absmax)
                formats[full_name] = f"{found.weight.format.name} {found.activation.format.name}"
                grids[full_name] = found.activation
                replace_linear(step.block, name, found.quantized(weight))
        quantize_inputs(model, lambda name: StaticQuantizer(grids[name]))
        return finished(model, {"formats": formats, "activations": f"{self.a_bits} bits, simulated"})

    def search(self, weight: Tensor, x: Tensor, absmax: Tensor) -> Searched:
        """Return the grids of one layer.

        Args:
            weight: fp32 [out, in].
            x: fp32 [tokens, in], the inputs that judge candidates.
            absmax: fp32 [in], the largest magnitudes of all calibration inputs.
        """
        return _Search(self, weight, x, absmax).run()


@dataclass(frozen=True, slots=True)
class Searched:
    """Grids of one layer: ``weight`` with scales [out, 1], ``activation`` with [1] or [in]."""

    weight: FloatGrid
    activation: FloatGrid
    rho: Tensor
    channels: Tensor | None
    """``b_j`` [in] of the activation's format, before offsets become integers; None without offsets."""

    def quantized(self, weight: Tensor) -> FloatQuantized:
        """Return ``weight`` [out, in] as codes."""
        codes = self.weight.encode(weight).to(torch.int16)
        return FloatQuantized(codes, self.weight.scale, self.weight.format)


def effective_bias(channels: Tensor, rho: Tensor, anchor: Tensor, exponent: int) -> Tensor:
    """Return ``B_j`` [in] for the real biases ``channels`` [in] and the tensor's bias ``rho`` [].

    ``anchor`` is the bias whose rounding is the zero of the offsets: ``rho``, or the one before it.
    """
    zero = torch.round(anchor)
    return torch.clamp(torch.round(channels), zero, zero + 2**exponent - 1) - zero + rho


class _Search:
    """The alternating search on one layer."""

    def __init__(self, method: LLMFP4, weight: Tensor, x: Tensor, absmax: Tensor) -> None:
        self.method, self.weight, self.x = method, weight, x
        self.target = x @ weight.T
        self.per_channel = method.variant == "fpq"
        steps = torch.arange(method.candidates, dtype=torch.float32, device=weight.device)
        self.factors = method.low + steps * ((method.high - method.low) / method.candidates)
        self.w_formats, self.a_formats = _formats(method.bits), _formats(method.a_bits)
        peak = weight.abs().amax(1, keepdim=True)
        self.w_start = {f: maximum_bias(peak, f) for f in self.w_formats}
        self.channels = {f: maximum_bias(absmax, f) for f in self.a_formats}
        self.a_start = {f: channel.amin() for f, channel in self.channels.items()}
        self.w_format = FloatFormat(method.exponent, method.bits - 1 - method.exponent)
        self.a_format = FloatFormat(method.exponent, method.a_bits - 1 - method.exponent)
        self.w_bias, self.rho = self.w_start[self.w_format], self.a_start[self.a_format]
        self.anchor = self.rho

    def run(self) -> Searched:
        for turn in range(self.method.rounds if self.method.variant != "minmax" else 0):
            weights = {f: self._weight_biases(f) for f in self.w_formats}
            if turn:
                self.w_bias = weights[self.w_format]
            if not self.per_channel:
                self._choose_weight_format(weights)
            rhos = {f: self._activation_bias(f) for f in self.a_formats}
            if self.per_channel:
                if turn:
                    self.rho = rhos[self.a_format]
                self._choose_weight_format(weights)
            self._choose_activation_format(rhos)
        return Searched(
            FloatGrid.from_bias(self.w_bias, self.w_format),
            FloatGrid.from_bias(self._bias(self.a_format, self.rho, self.rho), self.a_format),
            self.rho,
            self.channels[self.a_format] if self.per_channel else None,
        )

    def _bias(self, format: FloatFormat, rho: Tensor, anchor: Tensor) -> Tensor:
        if not self.per_channel:
            return rho.reshape(1)
        return effective_bias(self.channels[format], rho, anchor, format.exponent)

    def _inputs(self) -> Tensor:
        """The inputs at the current setting."""
        bias = self._bias(self.a_format, self.rho, self.anchor)
        return FloatGrid.from_bias(bias, self.a_format).snap(self.x)

    def _weights(self) -> Tensor:
        return FloatGrid.from_bias(self.w_bias, self.w_format).snap(self.weight)

    def _error(self, x: Tensor, weight: Tensor) -> Tensor:
        """Mean squared error of every output channel, [out]."""
        return (x @ weight.T - self.target).square_().mean(0)

    def _weight_biases(self, format: FloatFormat) -> Tensor:
        """Best bias of every output channel, [out, 1]."""
        x = self._inputs()
        best = self.w_start[format]
        least = torch.full_like(self.weight[:, 0], torch.inf)
        for factor in self.factors:
            tried = factor * self.w_start[format]
            error = self._error(x, FloatGrid.from_bias(tried, format).snap(self.weight))
            better = error < least
            least, best = (
                torch.where(better, error, least),
                torch.where(better[:, None], tried, best),
            )
        return best

    def _choose_weight_format(self, biases: dict[FloatFormat, Tensor]) -> None:
        x = self._inputs()
        errors = {
            f: float(self._error(x, FloatGrid.from_bias(bias, f).snap(self.weight)).mean())
            for f, bias in biases.items()
        }
        self.w_format = min(errors, key=errors.__getitem__)
        self.w_bias = biases[self.w_format]

    def _activation_bias(self, format: FloatFormat) -> Tensor:
        weight = self._weights()
        best, least = self.a_start[format], float("inf")
        for factor in self.factors:
            rho = factor * self.a_start[format]
            x = FloatGrid.from_bias(self._bias(format, rho, rho), format).snap(self.x)
            error = float(self._error(x, weight).mean())
            if error < least:
                best, least = rho, error
        return best

    def _choose_activation_format(self, rhos: dict[FloatFormat, Tensor]) -> None:
        weight = self._weights()
        errors = {}
        for f, rho in rhos.items():
            x = FloatGrid.from_bias(self._bias(f, rho, rho), f).snap(self.x)
            errors[f] = float(self._error(x, weight).mean())
        self.a_format = min(errors, key=errors.__getitem__)
        self.rho = self.anchor = rhos[self.a_format]


def _formats(bits: int) -> list[FloatFormat]:
    """Every split of ``bits``, in ascending order of the mantissa."""
    return [FloatFormat(bits - 1 - m, m) for m in range(bits - 1)]
