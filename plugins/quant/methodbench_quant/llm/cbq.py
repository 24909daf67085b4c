"""CBQ: cross-block quantization for large language models (Ding et al., ICLR 2025).

Windows of consecutive blocks that overlap are learned together, so that errors which build up between blocks are seen.
In each window the step of every weight grid, the step of every activation grid and the rounding itself are learned;
the rounding matrix is a product of low rank (LoRA-Rounding). Before, outliers are found by statistics (CFP): those
of weights are cut off, channels of activations with outliers are scaled down::

    W_q = s clamp(floor(W / s) + D, -2^(b-1), 2^(b-1) - 1),  D = clamp(1.2 sigmoid(V_0 + A_1 A_2) - 0.1, 0, 1)
    E(h, g) = mean (h - g)^2 + mean over tokens KL(softmax h || softmax g)
    L = E(T(X), T_q(X_q)) + E(T(X_q), T_q(X_q)) + gamma mean(1 - |2 D - 1|^beta)

``T`` is the dense window, ``T_q`` the quantized one, ``X`` and ``X_q`` their inputs. There is no code of the
authors: learning rates, number of passes, rank, the weight ``gamma`` (of a mean here, where AdaRound has a sum) and
``V_0``, with which learning starts from rounding to nearest, are this implementation's. Channels are scaled where a
norm or a layer before them takes the inverse exactly.

With ``V_0`` a soft rounding starts as the dense weight itself, and only thousands of steps push it to 0 or 1; a
product of low rank cannot do so weight by weight. ``decided`` learns with ``round(D)`` in place of ``D`` and passes
gradients straight through, so that the loss is that of the weights which are kept, however few the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.activations import quantize_inputs
from methodbench.torchkit.learned_rounding import commitment, nearest_offset, rounded, stretched_sigmoid
from methodbench.torchkit.model import Calibration, LoadedModel, set_weight
from methodbench.torchkit.quantizers import Quantized, groups_of, round_ste
from methodbench.torchkit.reconstruction import Window, fit, windows
from methodbench.torchkit.sequential import Observer, walk
from methodbench_quant.llm.awq import apply_scale
from methodbench_quant.llm.layers import (
    check_calibration,
    finished,
    in_dtype,
    open_copy,
    replace_linear,
    single_precision,
    weight_of,
)
from methodbench_quant.llm.settings import check_group_size

#: Exponent of the rounding regularizer, from the first to the last step.
_BETA = (20.0, 2.0)

_FIRST_SPREAD = 0.1

Rate = Annotated[float, Field(gt=0)]


@hyperparameters
class CBQ:
    """Learns rounding and steps over windows of blocks; embeddings and head stay as they are."""

    bits: Annotated[int, Field(ge=2, le=8, description="weight bits")] = 4
    group_size: Annotated[
        int, Field(ge=-1, description="input columns that share a scale; -1 for one per output channel")
    ] = -1
    symmetric: Annotated[bool, Field(description="weight grids without zero point")] = True
    a_bits: Annotated[
        int, Field(ge=2, le=16, description="bits of inputs, per token; 16 leaves them alone")
    ] = 16
    cfp: Annotated[
        Literal["both", "weights", "activations", "none"],
        Field(description="where outliers are treated first"),
    ] = "both"
    coarse: Annotated[
        float, Field(ge=0, description="interquartile ranges above which values are suspects")
    ] = 1.5
    fine: Annotated[float, Field(ge=0, description="weight of the spread of what is kept")] = 1.0
    window: Annotated[int, Field(ge=1, description="blocks that are learned together")] = 2
    overlap: Annotated[int, Field(ge=0, description="blocks that consecutive windows share")] = 1
    rank: Annotated[int, Field(ge=1, description="rank of the rounding matrix")] = 5
    use_kl: Annotated[bool, Field(description="divergence of softmaxed hidden states in the loss")] = True
    homologous: Annotated[bool, Field(description="also follow the dense window on the quantized stream")] = (
        True
    )
    regularization: Annotated[float, Field(ge=0, description="weight of the rounding regularizer")] = 0.01
    decided: Annotated[
        bool,
        Field(description="learn with decided roundings, gradients straight through; else with soft ones"),
    ] = False
    epochs: Annotated[int, Field(ge=0, description="passes over the calibration set per window")] = 3
    batch_size: Annotated[int, Field(ge=1, description="sequences per step")] = 1
    rounding_lr: Annotated[Rate, Field(description="learning rate of the low-rank factors")] = 1e-2
    step_lr: Annotated[Rate, Field(description="learning rate of steps, relative to their size")] = 1e-3

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_group_size(self.group_size)
        if self.overlap >= self.window:
            raise ValueError("overlap must be smaller than window: windows would not move on")
        return self

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` with packed layers, learned on ``data`` (token ids).

        Raises:
            NotApplicableError: no calibration inputs; a layer's width is no multiple of ``group_size``.
            DivergedError: weights or losses are not finite.
        """
        model, dtype = single_precision(model)
        teacher, result = open_copy(model), open_copy(model)
        check_calibration(result, data, ctx)
        for name, layer in result.adapter.targets(result.module).items():
            groups_of(weight_of(layer), self.group_size, name)
        with ctx.phase("outliers"):
            facts: dict[str, Any] = self.treat_outliers(result, teacher, data)
        student = result.clone()
        if self.a_bits < 16:
            quantize_inputs(student, lambda _: StepQuantizer(self.a_bits))
        generator = torch.Generator().manual_seed(ctx.seed)
        learned: dict[str, BlockRounding] = {}
        losses: dict[str, list[float]] = {}
        for window in windows(
            teacher, student, data, size=self.window, overlap=self.overlap, batch_size=self.batch_size
        ):
            for name, block in zip(window.names, window.student_blocks, strict=True):
                if name not in learned:
                    learned[name] = self.start(student, block, generator)
            found = [learned[name] for name in window.names]
            with ctx.phase("learn"):
                losses[window.names[0]] = self.learn(window, found)
            frozen = len(found) if window.last else self.window - self.overlap
            for name, block, rounding in list(zip(window.names, window.student_blocks, found, strict=True))[
                :frozen
            ]:
                for linear, codes in rounding.harden().items():
                    packed = replace_linear(result.module, f"{name}.{linear}", codes)
                    set_weight(block.get_submodule(linear), packed.dequantize())
                for key, value in rounding.factors.items():
                    block.get_parameter(key).data = value.detach().clone()
        if self.a_bits < 16:
            steps = {
                f"{name}.{key.removesuffix('.input_quantizer.factor')}": value.item()
                for name, rounding in learned.items()
                for key, value in rounding.factors.items()
            }
            quantize_inputs(result, lambda name: StepQuantizer(self.a_bits, steps[name]))
            facts["activations"] = f"{self.a_bits} bits, simulated"
        return in_dtype(finished(result, {"losses": losses, **facts}), dtype)

    def treat_outliers(self, model: LoadedModel, dense: LoadedModel, data: Calibration) -> dict[str, Any]:
        """Scale activation channels and cut weights of ``model`` in place (CFP); returns how many of each."""
        scaled = cut = 0
        if self.cfp in ("both", "activations"):
            for name, maxima in input_maxima(dense, data).items():
                block = model.module.get_submodule(name)
                for group in model.adapter.scale_groups(block):
                    if group.linears[-1] in maxima:
                        largest = maxima[group.linears[-1]]
                        scale = channel_scale(largest, split_outliers(largest, self.coarse, self.fine))
                        scaled += int((scale > 1).sum())
                        apply_scale(block, group, scale)
        if self.cfp in ("both", "weights"):
            for layer in model.adapter.targets(model.module).values():
                weight = weight_of(layer)
                limit = split_outliers(weight.abs().flatten(), self.coarse, self.fine).limit
                cut += int((weight.abs() > limit).sum())
                set_weight(layer, weight.clamp(-limit, limit))
        return {"scaled channels": scaled, "cut weights": cut}

    def start(self, student: LoadedModel, block: nn.Module, generator: torch.Generator) -> BlockRounding:
        """Return what is learned of a block, at its first values: rounding to nearest."""
        layers = {
            name: LayerRounding.first(
                groups_of(weight_of(layer), self.group_size, name),
                self.bits,
                self.symmetric,
                self.rank,
                generator,
            )
            for name, layer in student.adapter.linears(block).items()
        }
        factors = {
            name: parameter.detach().clone()
            for name, parameter in block.named_parameters()
            if name.endswith("input_quantizer.factor")
        }
        return BlockRounding(layers, factors)

    def learn(self, window: Window, learned: list[BlockRounding]) -> list[float]:
        """Minimize the loss of a window; returns its mean in the first and the last pass."""
        if not self.epochs:
            return []
        low_rank = [
            t for block in learned for layer in block.layers.values() for t in (layer.left, layer.right)
        ]
        steps = [layer.ratio for block in learned for layer in block.layers.values()]
        steps += [factor for block in learned for factor in block.factors.values()]
        for tensor in (*low_rank, *steps):
            tensor.requires_grad_(True)
        count = sum(layer.base.numel() for block in learned for layer in block.layers.values())

        def loss(batch: int, done: float) -> Tensor:
            roundings = [block.roundings() for block in learned]
            parameters = [
                block.parameters({name: decide(d) for name, d in found.items()} if self.decided else found)
                for block, found in zip(learned, roundings, strict=True)
            ]
            y = window.student(batch, parameters)
            total = reconstruction_error(window.dense_targets[batch], y, self.use_kl)
            if self.homologous:
                total = total + reconstruction_error(window.targets[batch], y, self.use_kl)
            beta = _BETA[0] + (_BETA[1] - _BETA[0]) * done
            undecided = sum(commitment(d, beta) for block in roundings for d in block.values())
            return total + self.regularization * undecided / count

        optimizer = torch.optim.Adam(
            [{"params": low_rank, "lr": self.rounding_lr}, {"params": steps, "lr": self.step_lr}]
        )
        found = fit(
            optimizer,
            loss,
            len(window),
            steps=self.epochs * len(window),
            schedule="cosine",
            name=window.names[0],
        )
        return [found.first, found.last]


class Split(NamedTuple):
    """Where CFP parts values from outliers."""

    threshold: float
    """Above it values are suspects: ``Q3 + l1 (Q3 - Q1)``."""
    limit: float
    """Largest value that is kept; infinite where nothing is suspect."""
    smallest: float
    """Smallest outlier; infinite where nothing is suspect."""
    merit: float
    """``(smallest - limit)^2 - l2 var(kept suspects)``, the largest there is."""


def split_outliers(values: Tensor, coarse: float = 1.5, fine: float = 1.0) -> Split:
    """Find the outliers among magnitudes: coarse by quartiles, fine by the widest gap above compact values.

    Args:
        values: [n], not negative.
        coarse: ``l1``.
        fine: ``l2``.
    """
    ordered = values.flatten().double().sort().values
    n = len(ordered)
    q1, q3 = float(ordered[n // 4]), float(ordered[3 * n // 4])
    threshold = q3 + coarse * (q3 - q1)
    first = int(torch.searchsorted(ordered, threshold, right=True))
    suspects = ordered[first:]
    if not len(suspects):
        return Split(threshold, float("inf"), float("inf"), float("nan"))
    kept = torch.cat([ordered[first - 1 : first], suspects[:-1]]) if first else suspects
    # Variance of suspects[:i] for every i at once; one value or none has no spread.
    count = torch.arange(len(suspects), dtype=torch.float64, device=suspects.device).clamp(min=1)
    centred = suspects - suspects.mean()
    zero = suspects.new_zeros(1)
    mean = torch.cat([zero, centred.cumsum(0)[:-1]]) / count
    square = torch.cat([zero, centred.square().cumsum(0)[:-1]]) / count
    merit = (suspects - kept).square() - fine * (square - mean.square()).clamp(min=0)
    best = int(merit.argmax())
    return Split(threshold, float(kept[best]), float(suspects[best]), float(merit[best]))


def channel_scale(largest: Tensor, split: Split) -> Tensor:
    """Return ``sqrt(largest / limit)`` for the channels beyond the limit and 1 for the others, [channels]."""
    outlier = largest >= split.smallest
    return torch.where(outlier, (largest / split.limit).sqrt(), torch.ones_like(largest))


def input_maxima(model: LoadedModel, data: Calibration) -> dict[str, dict[str, Tensor]]:
    """Return the largest magnitude of every input channel, by block and layer."""
    found: dict[str, dict[str, Tensor]] = {}
    current: dict[str, Tensor] = {}

    def watch(block: nn.Module) -> Mapping[str, Observer]:
        current.clear()

        def observer(name: str) -> Observer:
            def observe(x: Tensor) -> None:
                largest = x.float().abs().flatten(0, -2).amax(0)
                current[name] = torch.maximum(largest, current.get(name, largest))

            return observe

        return {name: observer(name) for name in model.adapter.linears(block)}

    for step in walk(model, data, propagate="dense", observe=watch):
        found[step.name] = dict(current)
    return found


def decide(d: Tensor) -> Tensor:
    """Return ``round(d)``, with the gradient of ``d``."""
    return d + (d.round() - d).detach()


def reconstruction_error(target: Tensor, y: Tensor, use_kl: bool = True) -> Tensor:
    """Return ``E``: squared error, a mean over entries, and divergence along the last axis, a mean over tokens."""
    error = (target - y).square().mean()
    if use_kl:
        log_p, log_q = target.log_softmax(-1), y.log_softmax(-1)
        error = error + (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return error


@dataclass(slots=True)
class LayerRounding:
    """What is learned of one layer: its step relative to the first one, and the low-rank rounding."""

    base: Tensor
    """The weight [out, groups, group size]."""
    step: Tensor
    """The first step [out, groups, 1]."""
    zero: Tensor | None
    """Zero points [out, groups, 1], or None for a symmetric grid."""
    offset: Tensor
    """``V_0`` [out, in]."""
    left: Tensor
    """``A_1`` [out, rank]."""
    right: Tensor
    """``A_2`` [rank, in]."""
    ratio: Tensor
    """Learned step over the first one, [out, groups, 1]."""
    bits: int

    @classmethod
    def first(
        cls, grouped: Tensor, bits: int, symmetric: bool, rank: int, generator: torch.Generator
    ) -> LayerRounding:
        """Return the start: step from the extremes, rounding to nearest."""
        low, high = torch.aminmax(grouped, dim=-1, keepdim=True)
        zero = None
        if symmetric:
            step = torch.maximum(-low, high).clamp(min=1e-8) / (2 ** (bits - 1) - 1)
        else:
            low, high = low.clamp(max=0), high.clamp(min=0)
            step = (high - low).clamp(min=1e-8) / (2**bits - 1)
            zero = (-low / step).round()
        rows, columns = len(grouped), grouped[0].numel()
        left = _FIRST_SPREAD * torch.randn(rows, rank, generator=generator)
        offset = nearest_offset((grouped / step).flatten(1))
        right = torch.zeros(rank, columns)
        return cls(grouped, step, zero, offset, left.to(step), right.to(step), torch.ones_like(step), bits)

    def rounding(self) -> Tensor:
        """Return ``D`` [out, in]."""
        return stretched_sigmoid(self.offset + self.left @ self.right)

    def codes(self, d: Tensor) -> Tensor:
        """Return codes less the zero point [out, groups, group size] for a rounding ``d`` [out, in]."""
        return rounded(self.base / (self.step * self.ratio), d.view_as(self.base), self.zero, self.bits)

    def weight(self, d: Tensor) -> Tensor:
        """Return the quantized weight [out, in]."""
        return (self.codes(d) * self.step * self.ratio).flatten(1)

    @torch.no_grad()
    def harden(self) -> Quantized:
        """Return the weight with every rounding decided."""
        codes = self.codes(self.rounding().round())
        codes = codes if self.zero is None else codes + self.zero
        low = -(2 ** (self.bits - 1)) if self.zero is None else 0
        zero = None if self.zero is None else self.zero.squeeze(-1)
        scale = (self.step * self.ratio).squeeze(-1)
        return Quantized(codes.to(torch.int16).flatten(1), scale, zero, low, self.bits)


@dataclass(slots=True)
class BlockRounding:
    """What is learned of one block."""

    layers: dict[str, LayerRounding]
    factors: dict[str, Tensor]
    """Steps of activation grids relative to the extremes of each token, by name of the parameter."""

    def roundings(self) -> dict[str, Tensor]:
        """Return ``D`` of every layer."""
        return {name: layer.rounding() for name, layer in self.layers.items()}

    def parameters(self, roundings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the block computes with."""
        weights = {f"{name}.weight": layer.weight(roundings[name]) for name, layer in self.layers.items()}
        return weights | self.factors

    def harden(self) -> dict[str, Quantized]:
        """Return every layer with its rounding decided."""
        return {name: layer.harden() for name, layer in self.layers.items()}


class StepQuantizer(nn.Module):
    """Rounds each token symmetrically with the step ``factor max|x| / (2^(b-1) - 1)``; the factor is learned."""

    factor: Tensor

    def __init__(self, bits: int, factor: float = 1.0) -> None:
        super().__init__()
        self.bits = bits
        self.factor = nn.Parameter(torch.tensor(factor), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the levels of ``x`` [..., features]; differentiable in ``x`` and the factor."""
        top = 2 ** (self.bits - 1) - 1
        step = self.factor * x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / top
        return round_ste(x / step).clamp(-top - 1, top) * step

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
