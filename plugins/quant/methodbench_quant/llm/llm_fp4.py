"""LLM-FP4: 4-bit floating-point quantized transformers (Liu et al., EMNLP 2023).

Weights and activations become numbers of a few exponent and mantissa bits whose exponent bias is real
(:mod:`methodbench.torchkit.floats`). The split of the bits and the bias are searched together, by the error of the
layer's output on calibration inputs. With ``B(m)`` the bias whose largest level is ``m``, the candidates of a bias
are ``f_i B(max)``, ``f_i = 0.01 + i (1.2 - 0.01) / 100``. The full method gives each input channel ``j`` of an
activation an integer offset on top of the tensor's bias ``rho``, which hardware folds into the weights::

    b_j = B(max |x_j|),  B_j = clamp(round(b_j), round(rho), round(rho) + 2^E - 1) - round(rho) + rho

Every layer sees full-precision inputs; weights and activations are searched in turns, for a few rounds.

In the published code ``2 ** -M`` of an integer ``M`` is 0 wherever a grid is used and not searched: ranges of the
first turn follow from ``2`` in place of ``2 - 2^-M``, and grids get one level above the format's largest, which its
bits cannot hold. ``authors_compat`` repeats that slip, and weights then take one bit more; by default it is repaired.
Head and embedding are quantized as well, the embedding to one grid in all, without a search; presets leave both
alone, as the methods do that they are compared with.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.activations import StaticQuantizer, quantize_inputs
from methodbench.torchkit.floats import FloatFormat, FloatGrid, FloatQuantized, maximum_bias
from methodbench.torchkit.model import Calibration, LoadedModel, set_weight
from methodbench.torchkit.packed import PackedLayer
from methodbench.torchkit.quantizers import require_finite
from methodbench.torchkit.sequential import batches_of, walk
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
    """Quantizes weights and inputs of all Linears, and the embedding, to floating point of few bits."""

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
    head_and_embedding: Annotated[
        bool,
        Field(description="quantize head and embedding too, as paper and code do; off: the blocks alone"),
    ] = True
    authors_compat: Annotated[
        bool, Field(description="the slip of the published code: one level above those that the bits hold")
    ] = False

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
        facts: dict[str, Any] = {"activations": f"{self.a_bits} bits, simulated"}

        def replace(owner: nn.Module, name: str, full_name: str, parts: list[Tensor]) -> FloatGrid:
            weight = weight_of(owner.get_submodule(name))
            require_finite(weight, full_name)
            absmax = torch.stack([part.float().flatten(0, -2).abs().amax(0) for part in parts]).amax(0)
            require_finite_inputs(absmax, full_name)
            x = torch.cat([p.float().flatten(0, -2) for p in subset(parts, count, self.search_tokens)])
            with ctx.phase("search"):
                found = self.search(weight, x[: self.search_tokens or None], absmax)
            formats[full_name] = f"{found.weight.format.name} {found.activation.format.name}"
            replace_linear(owner, name, found.quantized(weight))
            return found.activation

        ends = self.head_and_embedding and len(data) > 0
        head_inputs = inputs_of_head(model, data) if ends else []
        recorder = Recorder(model.adapter, lambda _: set())
        for step in walk(model, data, propagate="dense", observe=recorder.watch):
            for name in list(model.adapter.linears(step.block)):
                weight, full_name = weight_of(step.block.get_submodule(name)), f"{step.name}.{name}"
                inputs = recorder.inputs.get(name) or [torch.eye(weight.shape[1], device=weight.device)]
                grids[full_name] = replace(step.block, name, full_name, inputs)
        quantize_inputs(model, lambda name: StaticQuantizer(grids[name]))
        if head_inputs:
            name = model.adapter.head_name
            grid = replace(model.module, name, name, head_inputs)
            packed = model.module.get_submodule(name)
            assert isinstance(packed, PackedLayer)
            packed.input_quantizer = StaticQuantizer(grid)
        embedding = model.adapter.embedding(model.module)
        if ends and embedding is not None:
            facts["embedding"] = self._round_embedding(model, embedding)
        if self.authors_compat:
            facts["levels"] = "one above the format's where it has mantissa bits, stored at one bit more"
        return finished(model, {"formats": formats, **facts})

    def _round_embedding(self, model: LoadedModel, embedding: nn.Module) -> str:
        """Round the embedding to one grid in all, and say how."""
        weight = weight_of(embedding)
        require_finite(weight, model.adapter.embedding_name)
        format = FloatFormat(self.exponent, self.bits - 1 - self.exponent)
        bias = first_bias(weight.abs().amax(), format, self.authors_compat)
        grid = FloatGrid.from_bias(bias, format, extra_level=self.authors_compat)
        set_weight(embedding, grid.snap(weight))
        return f"{format.name}, simulated"

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
        grid = self.weight
        if grid.extra_level and grid.format.mantissa:
            weight, grid = grid.snap(weight), grid.widened()
        return FloatQuantized(grid.encode(weight).to(torch.int16), grid.scale, grid.format)


def effective_bias(channels: Tensor, rho: Tensor, anchor: Tensor, exponent: int) -> Tensor:
    """Return ``B_j`` [in] for the real biases ``channels`` [in] and the tensor's bias ``rho`` [].

    ``anchor`` is the bias whose rounding is the zero of the offsets: ``rho``, or the one before it.
    """
    zero = torch.round(anchor)
    return torch.clamp(torch.round(channels), zero, zero + 2**exponent - 1) - zero + rho


def first_bias(maximum: Tensor, format: FloatFormat, slip: bool) -> Tensor:
    """Return the bias before any search: of ``maximum``, which the published slip takes for the level ``2``."""
    extra = math.log2(2 / format.top) if slip and format.mantissa else 0.0
    return maximum_bias(maximum, format) + extra


class _Reached(Exception):
    """Leaves a forward pass before the head computes."""


def inputs_of_head(model: LoadedModel, data: Calibration) -> list[Tensor]:
    """Return what enters the head of ``model`` on ``data``, [B, T, hidden] a batch; empty without a head."""
    head = model.adapter.head(model.module)
    if head is None:
        return []
    found: list[Tensor] = []

    def reached(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise _Reached

    hook = head.register_forward_pre_hook(reached)
    try:
        for batch in batches_of(data.inputs, None):
            with torch.no_grad(), suppress(_Reached):
                model.module(batch.to(model.device), use_cache=False)
    finally:
        hook.remove()
    return found


class _Search:
    """The alternating search on one layer."""

    def __init__(self, method: LLMFP4, weight: Tensor, x: Tensor, absmax: Tensor) -> None:
        self.method, self.weight, self.x = method, weight, x
        self.slip = method.authors_compat
        self.target = x @ weight.T
        self.per_channel = method.variant == "fpq"
        steps = torch.arange(method.candidates, dtype=torch.float32, device=weight.device)
        self.factors = method.low + steps * ((method.high - method.low) / method.candidates)
        self.w_formats, self.a_formats = _formats(method.bits), _formats(method.a_bits)
        peak = weight.abs().amax(1, keepdim=True)
        self.w_start = {f: maximum_bias(peak, f) for f in self.w_formats}
        self.a_channels = {f: maximum_bias(absmax, f) for f in self.a_formats}
        self.a_start = {f: channels.amin() for f, channels in self.a_channels.items()}
        self.w_format = FloatFormat(method.exponent, method.bits - 1 - method.exponent)
        self.a_format = FloatFormat(method.exponent, method.a_bits - 1 - method.exponent)
        self.w_bias = first_bias(peak, self.w_format, self.slip)
        self.channels = first_bias(absmax, self.a_format, self.slip)
        self.rho = self.anchor = self.channels.amin()

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
            FloatGrid.from_bias(self.w_bias, self.w_format, extra_level=self.slip),
            FloatGrid.from_bias(
                self._bias(self.channels, self.a_format, self.rho, self.rho),
                self.a_format,
                extra_level=self.slip,
            ),
            self.rho,
            self.channels if self.per_channel else None,
        )

    def _bias(self, channels: Tensor, format: FloatFormat, rho: Tensor, anchor: Tensor) -> Tensor:
        if not self.per_channel:
            return rho.reshape(1)
        return effective_bias(channels, rho, anchor, format.exponent)

    def _inputs(self) -> Tensor:
        """The inputs at the current setting."""
        bias = self._bias(self.channels, self.a_format, self.rho, self.anchor)
        return FloatGrid.from_bias(bias, self.a_format, extra_level=self.slip).snap(self.x)

    def _weights(self) -> Tensor:
        return FloatGrid.from_bias(self.w_bias, self.w_format, extra_level=self.slip).snap(self.weight)

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
            x = FloatGrid.from_bias(self._bias(self.a_channels[format], format, rho, rho), format).snap(
                self.x
            )
            error = float(self._error(x, weight).mean())
            if error < least:
                best, least = rho, error
        return best

    def _choose_activation_format(self, rhos: dict[FloatFormat, Tensor]) -> None:
        weight = self._weights()
        errors = {}
        for f, rho in rhos.items():
            x = FloatGrid.from_bias(self._bias(self.a_channels[f], f, rho, rho), f).snap(self.x)
            errors[f] = float(self._error(x, weight).mean())
        self.a_format = min(errors, key=errors.__getitem__)
        self.rho = self.anchor = rhos[self.a_format]
        self.channels = self.a_channels[self.a_format]


def _formats(bits: int) -> list[FloatFormat]:
    """Every split of ``bits``, in ascending order of the mantissa."""
    return [FloatFormat(bits - 1 - m, m) for m in range(bits - 1)]
