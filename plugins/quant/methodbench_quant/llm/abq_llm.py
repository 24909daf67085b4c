"""ABQ-LLM: arbitrary-bit quantized inference acceleration for large language models (Zeng et al., AAAI 2025).

Block after block, scales that move between layers, clipping factors of every weight grid, and a rank-one
compensation of ``down`` in the outer blocks are learned, so that the quantized block gives what the full-precision
one gives. With ``X`` the dense and ``X_q`` the quantized stream, ``f`` the dense and ``q`` the quantized block,
``P`` the attention probabilities averaged over heads, ``KL`` a mean over all entries after one more softmax::

    L = KL(P_q || P_f) + KL(P_f || P_q) + sum over t in {f(X), f(X_q)} of MSE(t, q(X_q)) - log cos(q(X_q), t)

Weights and activations use ``s = (mx - mn) / (2^b - 1)``, ``z = round(-mn / s)``, with the weights' extremes times
learned ``sigmoid(u)``. At one and two bits the authors' code divides by ``2^b`` instead ("bit balance"): two bits
have five levels, which the paper writes W2*; ``bit_balance=false`` is plain two-bit rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.activations import quantize_inputs
from methodbench.torchkit.attention import Operand, transform_operands
from methodbench.torchkit.model import Calibration, LoadedModel, set_weight
from methodbench.torchkit.quantizers import Factor, Quantized, UniformGrid, extremes, groups_of, on_grid
from methodbench.torchkit.reconstruction import Window, fit, windows
from methodbench.torchkit.sequential import BlockStep, Observer
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

#: Magnitude below which a learned scale is not used.
_LEAST_SCALE = 1e-2

#: Start of the clipping factors before the sigmoid: 0.982 of the range.
_FACTOR = 4.0

Rate = Annotated[float, Field(gt=0)]


@hyperparameters
class ABQLLM:
    """Learns transformations, clipping and compensation block by block, then rounds to nearest."""

    bits: Annotated[int, Field(ge=1, le=7, description="weight bits")] = 4
    group_size: Annotated[
        int, Field(ge=-1, description="input columns that share a scale; -1 for one per output channel")
    ] = -1
    a_bits: Annotated[
        int, Field(ge=1, le=16, description="bits of inputs, queries, keys and values per token; 16: off")
    ] = 16
    bit_balance: Annotated[bool, Field(description="one more level at one and two bits")] = True
    let: Annotated[bool, Field(description="learn scales between layers")] = True
    lwc: Annotated[bool, Field(description="learn the clipping of weight grids")] = True
    compensation: Annotated[bool, Field(description="learn a rank-one term of down in outer blocks")] = True
    tie_rotary: Annotated[
        bool,
        Field(description="one key scale per rotary pair: an exact transformation, unlike the authors'"),
    ] = False
    loss: Annotated[
        Literal["distribution", "mse"], Field(description="the paper's loss, or mean squared error alone")
    ] = "distribution"
    alpha: Annotated[float, Field(ge=0, le=1, description="weight of activations in the first scales")] = 0.5
    epochs: Annotated[int, Field(ge=0, description="passes over the calibration set per block")] = 20
    batch_size: Annotated[int, Field(ge=1, description="sequences per step")] = 1
    let_lr: Annotated[Rate, Field(description="learning rate of scales and shifts")] = 5e-3
    lwc_lr: Annotated[Rate, Field(description="learning rate of clipping factors")] = 1e-2
    compensation_lr: Annotated[Rate, Field(description="learning rate of the compensation")] = 1e-2

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_group_size(self.group_size)
        return self

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` with packed layers, learned on ``data`` (token ids).

        Raises:
            NotApplicableError: no calibration inputs; blocks without separate query, key and value layers; a
                layer's width is no multiple of ``group_size``.
            DivergedError: weights or losses are not finite.
        """
        model, dtype = single_precision(model)
        result, teacher, student = open_copy(model), open_copy(model), open_copy(model)
        check_calibration(result, data, ctx)
        for name, layer in result.adapter.targets(result.module).items():
            groups_of(weight_of(layer), self.group_size, name)
        transform_operands(teacher, lambda _: {})
        if self.a_bits < 16:
            quantize_inputs(student, lambda _: self._quantizer())
        transform_operands(student, lambda _: self._operand_quantizers())
        count = len(model.adapter.block_names(model.module))
        losses: dict[str, list[float]] = {}
        for window in windows(teacher, student, data, batch_size=self.batch_size):
            with ctx.phase("observe"):
                seen = observe(teacher, window)
            outer = window.start <= 2 or window.start >= count - 4
            learned = self.start(student, window, seen, compensated=self.compensation and outer)
            with ctx.phase("learn"):
                losses[window.names[0]] = self.learn(student, window, learned, seen.maps)
            with torch.no_grad():
                self._finish(result, student, window, learned)
        facts: dict[str, Any] = {"losses": losses}
        if self._extra_level:
            facts["levels"] = 2**self.bits + 1
        if self.a_bits < 16:
            quantize_inputs(result, lambda _: self._quantizer())
            transform_operands(result, lambda _: self._operand_quantizers())
            facts["activations"] = f"{self.a_bits} bits, simulated"
        return in_dtype(finished(result, facts), dtype)

    def start(self, student: LoadedModel, window: Window, seen: Seen, *, compensated: bool) -> Learned:
        """Return what is learned of one block, at its first values."""
        block = window.student_blocks[0]
        parts = parts_of(student, window.names[0])
        weights = {name: weight_of(layer) for name, layer in student.adapter.linears(block).items()}
        learned = Learned(parts, self.group_size)
        if self.let:
            learned.scales = first_scales(parts, weights, seen.absmax, self.alpha)
            if self.tie_rotary and parts.gate:
                learned.rotary_pairs = True
                learned.scales["qk"] = learned.scales["qk"][: parts.head_dim // 2 * parts.kv_heads]
            if not parts.gate and self.a_bits < 16:
                for key, name in (("attention", parts.q), ("mlp", parts.up)):
                    learned.shifts[key] = (seen.low[name] + seen.high[name]) / 2
        if self.lwc:
            for name, weight in weights.items():
                shape = groups_of(weight, self.group_size, name).shape[:2]
                factor = weight.new_full((*shape, 1), _FACTOR)
                learned.clips[name] = (factor, factor.clone())
        if compensated:
            out, wide = weights[parts.down].shape
            learned.compensation = (
                weights[parts.down].new_zeros(out, 1),
                torch.ones(1, wide).to(weights[parts.down]),
            )
        return learned

    def learn(
        self, student: LoadedModel, window: Window, learned: Learned, maps: list[Tensor]
    ) -> list[float]:
        """Minimize the loss of one block over ``learned``; returns its mean in the first and the last epoch."""
        rates = (
            (self.let_lr, [*learned.scales.values(), *learned.shifts.values()]),
            (self.compensation_lr, list(learned.compensation)),
            (self.lwc_lr, [factor for pair in learned.clips.values() for factor in pair]),
        )
        groups = [{"params": tensors, "lr": rate} for rate, tensors in rates if tensors]
        if not groups or not self.epochs:
            return []
        for group in groups:
            for tensor in group["params"]:  # type: ignore[attr-defined]
                tensor.requires_grad_(True)
        dense = {key: value.detach() for key, value in window.student_blocks[0].state_dict().items()}
        with ExitStack() as stack:
            tap = stack.enter_context(Tap(student, window.names[0]))

            def loss(batch: int, _: float) -> Tensor:
                y = window.student(batch, [self.quantized(dense, learned)])
                if self.loss == "mse":
                    return F.mse_loss(y, window.dense_targets[batch])
                return distribution_loss(
                    y,
                    window.dense_targets[batch],
                    window.targets[batch],
                    tap.attention_map(window.kwargs[0][batch]),
                    maps[batch],
                )

            optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
            steps = self.epochs * len(window)
            found = fit(optimizer, loss, len(window), steps=steps, name=window.names[0])
        return [found.first, found.last]

    def quantized(self, dense: Mapping[str, Tensor], learned: Learned) -> dict[str, Tensor]:
        """Return a block's parameters, transformed, compensated and rounded; differentiable in ``learned``."""
        found = learned.apply(dense)
        for name in learned.parts.linears:
            grouped, grid = self._grid(found[f"{name}.weight"], name, learned)
            found[f"{name}.weight"] = grid.pass_through(grouped, bounds=False).flatten(1)
        return found

    def _grid(self, weight: Tensor, name: str, learned: Learned) -> tuple[Tensor, UniformGrid]:
        grouped = groups_of(weight, self.group_size, name)
        clip: tuple[Factor, Factor] = (1.0, 1.0)
        if name in learned.clips:
            low, high = learned.clips[name]
            clip = (torch.sigmoid(low), torch.sigmoid(high))
        return grouped, balanced_grid(grouped, self.bits, balance=self.bit_balance, clip=clip)

    def _finish(self, result: LoadedModel, student: LoadedModel, window: Window, learned: Learned) -> None:
        """Put the packed layers into ``result`` and their weights into ``student``, whose stream goes on."""
        name, block = window.names[0], window.student_blocks[0]
        target = result.module.get_submodule(name)
        found = learned.apply(dict(block.state_dict()))
        for key, value in found.items():
            owner, _, leaf = key.rpartition(".")
            if owner in learned.parts.linears and leaf == "weight":
                grouped, grid = self._grid(value, owner, learned)
                codes = on_grid(grouped, grid, self.bits + self._extra_level, f"{name}.{owner}")
                value = self._pack(target, owner, codes, found.get(f"{owner}.bias"))
            elif isinstance(getattr(target.get_submodule(owner), leaf, None), nn.Parameter):
                _set(target.get_submodule(owner), leaf, value)
            if isinstance(getattr(block.get_submodule(owner), leaf, None), nn.Parameter) or leaf == "bias":
                _set(block.get_submodule(owner), leaf, value)

    @staticmethod
    def _pack(target: nn.Module, name: str, codes: Quantized, bias: Tensor | None) -> Tensor:
        if bias is not None:
            _set(target.get_submodule(name), "bias", bias)
        return replace_linear(target, name, codes).dequantize()

    @property
    def _extra_level(self) -> int:
        return int(self.bit_balance and self.bits <= 2)

    def _quantizer(self) -> BalancedQuantizer:
        return BalancedQuantizer(self.a_bits, balance=self.bit_balance)

    def _operand_quantizers(self) -> dict[Operand, nn.Module]:
        if self.a_bits == 16:
            return {}
        return {"query": self._quantizer(), "key": self._quantizer(), "value": self._quantizer()}


@dataclass(frozen=True, slots=True)
class Parts:
    """Names of a block's layers and norms, relative to it."""

    attention_norm: str
    mlp_norm: str
    q: str
    k: str
    v: str
    o: str
    gate: str
    """Empty where the feed-forward network is not gated."""
    up: str
    down: str
    head_dim: int
    heads: int
    kv_heads: int

    @property
    def linears(self) -> tuple[str, ...]:
        names = (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)
        return tuple(name for name in names if name)


def parts_of(model: LoadedModel, block_name: str) -> Parts:
    """Return the parts of one block.

    Raises:
        NotApplicableError: it is not one attention with separate layers and one feed-forward network.
    """
    adapter, block = model.adapter, model.module.get_submodule(block_name)
    names = {adapter.role(name): name for name in adapter.linears(block)}
    layout = adapter.layout
    plain = set(names) in ({"q", "k", "v", "o", "gate", "up", "down"}, {"q", "k", "v", "o", "fc1", "fc2"})
    norms = [] if layout is None else [layout.attention_norm, *layout.feed_forward_norms]
    norms = [name for name in norms if isinstance(getattr(block, name, None), nn.Module)]
    size = None if layout is None else getattr(getattr(block, layout.attention, None), "head_dim", None)
    if not plain or len(names) != len(adapter.linears(block)) or len(norms) != 2 or not isinstance(size, int):
        raise NotApplicableError(
            f"{block_name} of {model.name} is not one attention and one feed-forward network, each behind a norm",
            "ABQ-LLM transforms blocks like those of Llama and OPT.",
        )

    def heads(role: str) -> int:
        return int(block.get_submodule(names[role]).out_features) // size  # type: ignore[arg-type]

    return Parts(
        attention_norm=norms[0],
        mlp_norm=norms[1],
        q=names["q"],
        k=names["k"],
        v=names["v"],
        o=names["o"],
        gate=names.get("gate", ""),
        up=names.get("up", names.get("fc1", "")),
        down=names.get("down", names.get("fc2", "")),
        head_dim=size,
        heads=heads("q"),
        kv_heads=heads("k"),
    )


class Learned:
    """What is learned of one block: scales, shifts, clipping factors (before the sigmoid), compensation."""

    def __init__(self, parts: Parts, group_size: int) -> None:
        self.parts = parts
        self.group_size = group_size
        self.scales: dict[str, Tensor] = {}
        self.shifts: dict[str, Tensor] = {}
        self.clips: dict[str, tuple[Tensor, Tensor]] = {}
        """Factors [out, groups, 1] of minimum and maximum by layer."""
        self.compensation: tuple[Tensor, ...] = ()
        """``a`` [out, 1] and ``b`` [1, in] of ``W_down + a b``."""
        self.rotary_pairs = False

    def apply(self, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a block's parameters transformed and compensated, not rounded."""
        found, p = dict(dense), self.parts
        if self.scales:
            s = {key: truncate(scale) for key, scale in self.scales.items()}
            readers = (p.q, p.k, p.v)
            scale_norm(found, p.attention_norm, readers, s["attention"], self.shifts.get("attention"))
            mlp = tuple(name for name in (p.gate, p.up) if name)
            scale_norm(found, p.mlp_norm, mlp, s["mlp"], self.shifts.get("mlp"))
            scale_pair(found, p.v, p.o, s["vo"], self._repeat(s["vo"]))
            key_scale = self._pairs(s["qk"]) if self.rotary_pairs else s["qk"]
            scale_keys(found, p.q, p.k, key_scale, self._repeat(key_scale))
            if "updown" in s:
                scale_pair(found, p.up, p.down, s["updown"], s["updown"])
        if self.compensation:
            a, b = self.compensation
            found[f"{p.down}.weight"] = found[f"{p.down}.weight"] + a @ b
        return found

    def _repeat(self, scale: Tensor) -> Tensor:
        """Repeat what belongs to the channels of a key-value head for each query head that reads it."""
        p = self.parts
        heads = scale.view(p.kv_heads, 1, p.head_dim).expand(-1, p.heads // p.kv_heads, -1)
        return heads.reshape(-1)

    def _pairs(self, scale: Tensor) -> Tensor:
        halves = scale.view(self.parts.kv_heads, -1)
        return torch.cat([halves, halves], 1).flatten()


def first_scales(
    parts: Parts, weights: Mapping[str, Tensor], absmax: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """Return ``max(a^alpha / w^(1 - alpha), 1e-5)`` of each place: ``a`` the inputs' and ``w`` the columns' absmax.

    Keys and queries start at 1; shared key-value heads take the largest of their query heads' channels.
    """
    readers = {"attention": (parts.q, parts.k, parts.v), "mlp": tuple(filter(None, (parts.gate, parts.up)))}
    found = {}
    for key, names, first in (
        ("attention", readers["attention"], parts.q),
        ("mlp", readers["mlp"], parts.up),
        ("vo", (parts.o,), parts.o),
        ("updown", (parts.down,), parts.down),
    ):
        if key == "updown" and not parts.gate:
            continue
        columns = torch.stack([weights[name].abs().amax(0) for name in names]).amax(0).clamp(min=1e-5)
        activations = absmax[first].clamp(min=1e-5)
        if key == "vo":
            shape = (parts.kv_heads, parts.heads // parts.kv_heads, parts.head_dim)
            columns, activations = (t.view(shape).amax(1).flatten() for t in (columns, activations))
        found[key] = (activations.pow(alpha) / columns.pow(1 - alpha)).clamp(min=1e-5)
    found["qk"] = torch.ones_like(weights[parts.k][:, 0])
    return found


def truncate(scale: Tensor, least: float = _LEAST_SCALE) -> Tensor:
    """Return ``scale`` with magnitudes of at least ``least``, sign kept; gradients pass."""
    moved = torch.where(scale.abs() < least, torch.sign(scale) * least, scale)
    return scale + (moved - scale).detach()


def scale_norm(
    p: dict[str, Tensor], norm: str, readers: tuple[str, ...], scale: Tensor, shift: Tensor | None
) -> None:
    """Divide a norm's output by ``scale`` and multiply the columns of its readers, in ``p``; shift it where asked.

    ``bias_norm <- (bias_norm - shift) / scale``, ``bias <- bias + W shift`` with the weight before scaling.
    """
    p[f"{norm}.weight"] = p[f"{norm}.weight"] / scale
    if f"{norm}.bias" in p:
        bias = p[f"{norm}.bias"] if shift is None else p[f"{norm}.bias"] - shift
        p[f"{norm}.bias"] = bias / scale
    for name in readers:
        weight = p[f"{name}.weight"]
        if shift is not None:
            moved = weight @ shift
            p[f"{name}.bias"] = p[f"{name}.bias"] + moved if f"{name}.bias" in p else moved
        p[f"{name}.weight"] = weight * scale


def scale_pair(p: dict[str, Tensor], first: str, second: str, scale: Tensor, columns: Tensor) -> None:
    """Divide the rows of ``first`` by ``scale`` and multiply the columns of ``second``, in ``p``."""
    _scale_rows(p, first, 1 / scale)
    p[f"{second}.weight"] = p[f"{second}.weight"] * columns


def scale_keys(p: dict[str, Tensor], query: str, key: str, scale: Tensor, queries: Tensor) -> None:
    """Multiply the rows of the keys by ``scale`` and divide those of the queries, in ``p``."""
    _scale_rows(p, key, scale)
    _scale_rows(p, query, 1 / queries)


def _scale_rows(p: dict[str, Tensor], name: str, scale: Tensor) -> None:
    p[f"{name}.weight"] = p[f"{name}.weight"] * scale[:, None]
    if f"{name}.bias" in p:
        p[f"{name}.bias"] = p[f"{name}.bias"] * scale


def balanced_grid(
    x: Tensor, bits: int, *, balance: bool = True, clip: tuple[Factor, Factor] = (1.0, 1.0)
) -> UniformGrid:
    """Return the asymmetric grid of every group (the last axis), differentiable in ``x`` and ``clip``.

    ``s = (mx - mn) / top`` in [1e-5, 1e4], ``z = round(-mn / s)`` without gradient and not limited to the grid; codes
    from 0 to ``top``, which is ``2^bits - 1``, or with ``balance`` ``2^bits`` at one and two bits.
    """
    top = 2**bits if balance and bits <= 2 else 2**bits - 1
    low, high = extremes(x)
    low, high = low * clip[0], high * clip[1]
    scale = ((high - low) / top).clamp(1e-5, 1e4)
    return UniformGrid(scale, (-low / scale).clamp(-1e4, 1e4).round(), 0, top)


class BalancedQuantizer(nn.Module):
    """Rounds each token to its :func:`balanced_grid`; gradients pass rounding."""

    def __init__(self, bits: int, *, balance: bool) -> None:
        super().__init__()
        self.bits = bits
        self.balance = balance

    def forward(self, x: Tensor) -> Tensor:
        """Return the levels of ``x`` [..., features] in its dtype."""
        return balanced_grid(x, self.bits, balance=self.balance).pass_through(x, bounds=False)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, balance={self.balance}"


def distribution_loss(y: Tensor, dense: Tensor, on_inputs: Tensor, p: Tensor, p_dense: Tensor) -> Tensor:
    """Return the paper's loss.

    Args:
        y: output of the quantized block, [B, T, hidden].
        dense: of the dense block on the dense stream.
        on_inputs: of the dense block on the quantized stream.
        p: attention probabilities of the quantized block averaged over heads, [B, T, T].
        p_dense: of the dense block.
    """
    total = mean_kl(p, p_dense).abs() + mean_kl(p_dense, p).abs()
    for target in (dense, on_inputs):
        total = total + F.mse_loss(target, y) - torch.log(F.cosine_similarity(y, target, dim=-1).mean().abs())
    return total


def mean_kl(p: Tensor, q: Tensor) -> Tensor:
    """Return the mean over all entries of ``p' (log p' - log q')`` with ``p' = softmax(p)`` along the last axis."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).mean()


class Tap:
    """Keeps the queries and keys that entered one attention last; a context manager."""

    def __init__(self, model: LoadedModel, block_name: str) -> None:
        assert model.adapter.layout is not None
        self.attention = model.module.get_submodule(f"{block_name}.{model.adapter.layout.attention}")
        self.operands: tuple[Tensor, Tensor] | None = None

    def __enter__(self) -> Self:
        transforms = self.attention.get_submodule("operand_transforms")
        assert isinstance(transforms, nn.ModuleList)
        self.handle = transforms[-1].register_forward_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
        self.operands = None

    def _keep(self, _: nn.Module, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        self.operands = output[:2]

    def attention_map(self, kwargs: Mapping[str, Any]) -> Tensor:
        """Return the attention probabilities of the last call averaged over heads, [B, T, T].

        Args:
            kwargs: of the block; an ``attention_mask`` (boolean or added) replaces the causal one.
        """
        assert self.operands is not None
        query, key = self.operands
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query @ key.mT * float(getattr(self.attention, "scaling", query.shape[-1] ** -0.5))
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1).mean(1)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a pass of the dense block over its inputs shows."""

    low: dict[str, Tensor]
    """Smallest value of every input channel, by layer."""
    high: dict[str, Tensor]
    """Largest value."""
    maps: list[Tensor]
    """Attention probabilities averaged over heads, [B, T, T] per batch."""

    @property
    def absmax(self) -> dict[str, Tensor]:
        """Largest magnitude of every input channel, by layer."""
        return {name: torch.maximum(-low, self.high[name]) for name, low in self.low.items()}


def observe(teacher: LoadedModel, window: Window) -> Seen:
    """Run the dense block on the dense stream and return what it shows."""
    parts = parts_of(teacher, window.names[0])
    seen = Seen({}, {}, [])

    def observer(name: str) -> Observer:
        def see(x: Tensor) -> None:
            low, high = torch.aminmax(x.float().flatten(0, -2), dim=0)
            seen.low[name] = torch.minimum(low, seen.low.get(name, low))
            seen.high[name] = torch.maximum(high, seen.high.get(name, high))

        return see

    observers: dict[str, Callable[[Tensor], None]] = {
        name: observer(name) for name in (parts.q, parts.o, parts.up, parts.down)
    }
    with Tap(teacher, window.names[0]) as tap:
        for x, kwargs in zip(window.dense_inputs, window.kwargs[0], strict=True):
            BlockStep(window.start, window.names[0], window.teacher_blocks[0], [x], [kwargs]).forward(
                observers
            )
            seen.maps.append(tap.attention_map(kwargs))
    return seen


def _set(owner: nn.Module, name: str, value: Tensor) -> None:
    if getattr(owner, name, None) is None:
        like = owner.get_parameter("weight")
        setattr(owner, name, nn.Parameter(value.detach().to(like), requires_grad=False))
    else:
        set_weight(owner, value, name)
