"""EAQuant: post-training quantization of mixtures of experts, with their experts and router in mind.

Fu et al., 2025 (arXiv 2506.13329), on the base of DuQuant (Lin et al., NeurIPS 2024, 2406.01721). (1) The norm
before router and experts is smoothed by one vector that suits all experts. (2) The router's clipping is the one
that keeps the distribution over the experts it ranks first. (3) Every expert is calibrated on a like number of
tokens. Inputs are rotated in blocks and permuted so that no channel stands out, and quantized per token::

    s_e = max|x|^alpha / max|W|^(1-alpha);  s = max_e s_e  (or a mean over experts);  norm / s, readers * s
    t* = argmin_t  mean over tokens of KL( softmax(z)_I || softmax(z(t))_I ),  I = the k first experts by z
    tokens of an expert: the first  k / E * tokens * ratio  that the router sends to it

``extreme = "row"`` picks the channel that a rotation spreads by the row index of the extreme entry, as the
authors' code does; ``column`` is DuQuant's own rule. Of the strategies that merge scales, ``all`` leaves the
weights' scores out, as the code does; ``all-weights`` takes them in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.activations import ActivationQuantizer
from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.attention import transform_operands
from methodbench.torchkit.model import Calibration, LoadedModel, set_submodule, set_weight
from methodbench.torchkit.quantizers import Quantized, UniformGrid, require_finite
from methodbench.torchkit.sequential import BlockStep, walk
from methodbench_quant.llm.calls import require_finite_inputs
from methodbench_quant.llm.layers import check_calibration, finished, open_copy, replace_linear, weight_of

Merge = Literal["max", "sum1", "sum2_0", "sum2_1", "sum2_2", "sum2_3", "sum3", "all", "all-weights"]
Criterion = Literal["weight", "output", "router", "output-router"]

#: Smallest magnitude of activations, weights and scales, and the largest scale (DuQuant's constants).
_LEAST, _MOST = 1e-5, 1e4

#: Clipping ratios that are tried.
CLIP_RATIOS = tuple(0.35 + 0.0065 * i for i in range(101))

#: Share of the extremes of a token that its grid spans.
_ACTIVATION_CLIP = 0.9

#: Bits from which on a quantizer leaves values alone.
_FLOAT_BITS = 16


@hyperparameters
class EAQuant:
    """Quantizes attention, router and experts of every block; embeddings, norms and head stay as they are."""

    bits: Annotated[int, Field(ge=2, le=8, description="weight bits")] = 4
    a_bits: Annotated[
        int, Field(ge=2, le=16, description="bits of the layers' inputs, per token; 16 leaves them alone")
    ] = 4
    kv_bits: Annotated[
        int, Field(ge=2, le=16, description="bits of queries, keys and values per token and head; 16: off")
    ] = 4
    router_bits: Annotated[int, Field(ge=2, le=8, description="bits of the router's weight")] = 8
    router_a_bits: Annotated[int, Field(ge=2, le=16, description="bits of the router's input")] = 8
    smooth: Annotated[bool, Field(description="move scales from activations into weights first")] = True
    alpha: Annotated[float, Field(ge=0, le=1, description="share of the activations in a scale")] = 0.6
    merge: Annotated[
        Merge,
        Field(
            description="how the experts' scales become one; sum1 by tokens, sum2 by weights, sum3 by router"
        ),
    ] = "max"
    merge_router: Annotated[bool, Field(description="the merged scale is no less than the router's own")] = (
        False
    )
    outlier_ratio: Annotated[
        float, Field(gt=0.5, lt=1, description="quantile that bounds ordinary channels before the last layer")
    ] = 0.65
    outlier_rate: Annotated[
        float, Field(ge=0, le=1, description="power of the factor of outlier channels")
    ] = 0.7
    criterion: Annotated[
        Literal["weight", "output"], Field(description="error that picks the clipping of a row")
    ] = "weight"
    router_criterion: Annotated[
        Criterion,
        Field(description="error that picks the router's clipping; router is the KL of its first experts"),
    ] = "router"
    router_share: Annotated[
        float, Field(ge=0, le=1, description="share of the other experts that the KL looks at as well")
    ] = 0.0
    balance: Annotated[
        float,
        Field(ge=0, description="tokens of an expert, as a multiple of its fair share; 0: mean input only"),
    ] = 2.0
    block_size: Annotated[int, Field(ge=2, description="channels that are rotated together")] = 128
    rotation_steps: Annotated[int, Field(ge=0, le=4096, description="greedy rotations at most; 0: none")] = (
        256
    )
    permutations: Annotated[int, Field(ge=0, le=8, description="rounds of rotation and permutation")] = 1
    extreme: Annotated[
        Literal["row", "column"], Field(description="index of the extreme entry that a rotation spreads")
    ] = "row"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.block_size & 1:
            raise ValueError("block_size must be even")
        return self

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` with packed layers and quantized activations, calibrated on ``data``.

        Raises:
            NotApplicableError: no mixture of experts, no calibration inputs, a width that is no multiple of
                ``block_size``.
            DivergedError: weights or calibration activations are not finite.
        """
        model = open_copy(model)
        adapter = model.adapter
        if not any(routers(adapter, block) for block in adapter.blocks(model.module)):
            raise NotApplicableError(
                f"{model.name} has no router of experts", "EAQuant is for mixtures of experts."
            )
        self._check_widths(model)
        check_calibration(model, data, ctx)
        generator = torch.Generator().manual_seed(ctx.seed)
        report = _Report()
        for step in walk(model, data, propagate="dense", batch_size=1):
            block = Block.of(adapter, step.block)
            with ctx.phase("smoothing"):
                if self.smooth:
                    self._smooth(step, block)
            with ctx.phase("attention and router"):
                mean = BlockStep(
                    step.index,
                    step.name,
                    step.block,
                    [torch.cat(step.inputs).mean(0, keepdim=True)],
                    step.kwargs[:1],
                )
                seen = record(mean, [*block.attention, *block.router_names, *block.feed_forward])
                self._attention(step.block, block, seen, generator, step.name)
                for name in block.router_names:
                    self._router(step.block, name, seen[name], generator)
            with ctx.phase("experts"):
                self._experts(step, block, seen, generator, report)
        if self.kv_bits < _FLOAT_BITS:
            transform_operands(
                model, lambda _: {"query": self._operand(), "key": self._operand(), "value": self._operand()}
            )
        report.tell(ctx)
        facts = {
            "activations": f"{self.a_bits} bits per token, simulated",
            "queries, keys and values": f"{self.kv_bits} bits, simulated",
            "router": f"{self.router_bits} bit weights, {self.router_a_bits} bit inputs, simulated",
            "expert_tokens_least": report.least,
        }
        return finished(model, facts)

    def _check_widths(self, model: LoadedModel) -> None:
        if not self.rotation_steps and not self.permutations:
            return
        for name, layer in model.adapter.targets(model.module).items():
            width = weight_of(layer).shape[1]
            if width % self.block_size:
                raise NotApplicableError(
                    f"{name} has {width} inputs, which is no multiple of block_size {self.block_size}",
                    "Choose a block_size that divides every layer's width.",
                )

    def _smooth(self, step: BlockStep, block: Block) -> None:
        """Move scales from the norms' and value layers' outputs into their readers; the function stays."""
        module = step.block
        seen = record(step, [*block.attention, *block.router_names, *block.feed_forward], parts=True)
        peaks = {name: absmax(values) for name, values in seen.items()}

        def scale_of(names: Sequence[str]) -> Tensor:
            name = next(name for name in names if name in peaks)
            return base_scale(peaks[name], [weight_of(module.get_submodule(n)) for n in names], self.alpha)

        readers = [name for name in block.attention if block.roles[name] in ("q", "k", "v")]
        if block.attention_norm and readers:
            move_scale(module, block.attention_norm, readers, scale_of(readers))
        values = [name for name in block.attention if block.roles[name] == "v"]
        outputs = [name for name in block.attention if block.roles[name] == "o"]
        if len(values) == len(outputs) == 1:
            value, output = (
                weight_of(module.get_submodule(values[0])),
                weight_of(module.get_submodule(outputs[0])),
            )
            if value.shape[0] == output.shape[1]:
                move_scale(module, values[0], outputs, scale_of(outputs))

        (router,) = block.router_names
        logits = [F.linear(x, weight_of(module.get_submodule(router))) for x in seen[router]]
        shares = torch.stack([z.softmax(-1).flatten(0, -2).mean(0) for z in logits]).mean(0)
        counts = [sum(x.flatten(0, -2).shape[0] for x in seen.get(e.first[0], [])) for e in block.experts]
        reached = [i for i, e in enumerate(block.experts) if e.first[0] in peaks]
        router_scale = scale_of([router])
        merged = merge_scales(
            torch.stack([scale_of(block.experts[i].first) for i in reached]),
            self.merge,
            router_scale=router_scale if self.merge_router else None,
            counts=torch.tensor([float(counts[i]) for i in reached]),
            weight_scores=torch.tensor(
                [
                    weight_score([weight_of(module.get_submodule(n)) for n in block.experts[i].first])
                    for i in reached
                ]
            ),
            router_shares=shares[reached],
        )
        for shared in block.shared:
            merged = torch.maximum(merged, scale_of(shared.first))
        if block.feed_forward_norm:
            first = [name for unit in block.units for name in unit.first]
            move_scale(module, block.feed_forward_norm, [router, *first], merged)
        for unit in block.units:
            if unit.last in seen:
                high, low = running_extremes(seen[unit.last])
                factor = outlier_factor(high, low, self.outlier_ratio, self.outlier_rate)
                move_scale(module, unit.up, [unit.last], factor)

    def _attention(
        self,
        module: nn.Module,
        block: Block,
        seen: Mapping[str, Tensor],
        generator: torch.Generator,
        where: str,
    ) -> None:
        readers = [name for name in block.attention if block.roles[name] in ("q", "k", "v", "qkv")]
        others = [name for name in block.attention if name not in readers]
        for names in ([readers] if readers else []) + [[name] for name in others]:
            x = seen[names[0]].flatten(0, -2)
            transform = self._transform(x, generator)
            for name in names:
                self._replace(module, name, x, transform, f"{where}.{name}")

    def _router(self, module: nn.Module, name: str, x: Tensor, generator: torch.Generator) -> None:
        """Quantize the router's weight by the criterion of its own, and its input."""
        router = cast(Any, module.get_submodule(name))
        x = x.flatten(0, -2)
        transform = self._transform(x, generator)
        quantizer = self._quantizer(self.router_a_bits)
        entering = transform(x) if quantizer is None else quantizer(transform(x))
        weight = transform(weight_of(router))
        found = search_clip(
            weight,
            self.router_bits,
            self.router_criterion,
            x=entering,
            first=first_experts(int(router.top_k), weight.shape[0], self.router_share),
        )
        changed = cast(Any, router)
        set_weight(changed, found.weight)
        set_submodule(
            module, name, QuantizedRouter(changed, nn.Sequential(*filter(None, (transform, quantizer))))
        )

    def _experts(
        self,
        step: BlockStep,
        block: Block,
        mean: Mapping[str, Tensor],
        generator: torch.Generator,
        report: _Report,
    ) -> None:
        """Quantize experts, each on tokens of its own, and shared experts on the mean input."""
        tokens = step.inputs[0].shape[1]
        router = cast(Any, step.block.get_submodule(block.router_names[0]))
        wanted = int(router.top_k / len(block.experts) * tokens * self.balance)
        gathered: dict[str, list[Tensor]] = {}
        if self.balance:
            gathered = gather_tokens(step, [unit.first[0] for unit in block.experts], wanted)
        fallback = mean[block.router_names[0]].flatten(0, -2)[:tokens]
        for unit in block.units:
            name = unit.first[0]
            x = torch.cat(gathered[name])[:wanted] if gathered.get(name) else mean.get(name)
            if x is None or not x.numel():
                report.unseen.append(f"{step.name}.{name}")
                x = fallback
            x = x.flatten(0, -2)
            if unit in block.experts:
                report.least = len(x) if report.least is None else min(report.least, len(x))
            parent = cast(Any, step.block.get_submodule(name.rpartition(".")[0]))
            with torch.no_grad():
                inner = _before_last(parent, step.block, unit, x)
            transform = self._transform(x, generator)
            for first in unit.first:
                self._replace(step.block, first, x, transform, f"{step.name}.{first}")
            self._replace(
                step.block, unit.last, inner, self._transform(inner, generator), f"{step.name}.{unit.last}"
            )

    def _replace(self, module: nn.Module, name: str, x: Tensor, transform: Transform, full: str) -> None:
        weight = weight_of(module.get_submodule(name))
        require_finite(weight, full)
        require_finite_inputs(x, full)
        quantizer = self._quantizer(self.a_bits)
        turned = transform(x)
        entering = turned if quantizer is None else quantizer(turned)
        found = search_clip(transform(weight), self.bits, self.criterion, x=entering)
        packed = replace_linear(module, name, found.quantized)
        packed.input_quantizer = nn.Sequential(*filter(None, (transform, quantizer)))

    def _transform(self, x: Tensor, generator: torch.Generator) -> Transform:
        return find_transform(
            x,
            block_size=self.block_size,
            steps=self.rotation_steps,
            permutations=self.permutations,
            extreme=self.extreme,
            generator=generator,
        )

    def _quantizer(self, bits: int) -> ActivationQuantizer | None:
        if bits >= _FLOAT_BITS:
            return None
        return ActivationQuantizer(bits, convention="omni", symmetric=False, clip=_ACTIVATION_CLIP)

    def _operand(self) -> ActivationQuantizer:
        return ActivationQuantizer(self.kv_bits, convention="omni", symmetric=False)


@dataclass(slots=True)
class _Report:
    """What a reader of the result should know about the calibration."""

    unseen: list[str] = field(default_factory=list)
    least: int | None = None

    def tell(self, ctx: Context) -> None:
        if self.unseen:
            ctx.warn(
                f"no calibration token reached {len(self.unseen)} experts (first: {self.unseen[0]}): they are "
                "calibrated on the router's inputs"
            )


@dataclass(frozen=True, slots=True)
class Unit:
    """One feed-forward network, by names relative to the block: an expert, or a shared one."""

    first: tuple[str, ...]
    """Gate and up."""
    up: str
    last: str


@dataclass(frozen=True, slots=True)
class Block:
    """The parts of a block with a mixture of experts, by names relative to it."""

    roles: Mapping[str, str]
    attention: tuple[str, ...]
    attention_norm: str
    feed_forward_norm: str
    router_names: tuple[str, ...]
    experts: tuple[Unit, ...]
    shared: tuple[Unit, ...]

    @property
    def units(self) -> tuple[Unit, ...]:
        """Experts and shared experts."""
        return self.experts + self.shared

    @property
    def feed_forward(self) -> list[str]:
        """Layers of all feed-forward networks."""
        return [name for unit in self.units for name in (*unit.first, unit.last)]

    @classmethod
    def of(cls, adapter: Adapter, block: nn.Module) -> Block:
        """Return the parts of ``block``.

        Raises:
            NotApplicableError: it has no single router with experts of gate, up and down.
        """
        layers = adapter.linears(block)
        roles = {name: adapter.role(name) for name in layers}
        attention = tuple(name for name, role in roles.items() if role in ("q", "k", "v", "qkv", "o"))
        found = routers(adapter, block)
        units: dict[str, dict[str, str]] = {}
        for name, role in roles.items():
            if role in ("gate", "up", "down"):
                units.setdefault(name.rpartition(".")[0], {})[role] = name
        whole = all(unit.keys() == {"gate", "up", "down"} for unit in units.values())
        if len(found) != 1 or not whole or len(attention) + 3 * len(units) != len(layers):
            raise NotApplicableError(
                "a block is not one router with experts of gate, up and down layers",
                "EAQuant takes mixtures in the manner of Mixtral and OLMoE.",
            )
        groups = adapter.scale_groups(block)
        reads_attention = {group.previous for group in groups if set(group.linears) & set(attention)}
        norms = {group.previous for group in groups if found[0] in group.linears}
        parts = [Unit((unit["gate"], unit["up"]), unit["up"], unit["down"]) for unit in units.values()]
        return cls(
            roles=roles,
            attention=attention,
            attention_norm=next(iter(reads_attention - set(layers)), ""),
            feed_forward_norm=next(iter(norms), ""),
            router_names=tuple(found),
            experts=tuple(unit for unit in parts if ".experts." in f".{unit.up}"),
            shared=tuple(unit for unit in parts if ".experts." not in f".{unit.up}"),
        )


def routers(adapter: Adapter, block: nn.Module) -> list[str]:
    """Return the names of the routers in ``block``: modules of that role with a weight and a ``top_k``."""
    return [
        name
        for name, module in block.named_modules()
        if name
        and adapter.role(name) == "router"
        and isinstance(getattr(module, "weight", None), Tensor)
        and hasattr(module, "top_k")
    ]


def record(step: BlockStep, names: Iterable[str], *, parts: bool = False) -> dict[str, Any]:
    """Return the inputs of some submodules over all of a step's batches, fp32, by name.

    Args:
        parts: a list with one tensor per batch instead of all of them joined along the first axis.
    """
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda x: seen.setdefault(name, []).append(x.float())

    step.forward({name: keep(name) for name in names})
    return dict(seen) if parts else {name: torch.cat(values) for name, values in seen.items()}


def gather_tokens(step: BlockStep, names: Sequence[str], wanted: int) -> dict[str, list[Tensor]]:
    """Return the tokens that the router sends to each expert, sequence by sequence, until it has enough."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[[Tensor], None]:
        def take(x: Tensor) -> None:
            # Checked before a sequence's tokens are added, as in the authors' code.
            if sum(map(len, found[name])) < wanted:
                found[name].append(x.float().flatten(0, -2))

        return take

    step.forward({name: keep(name) for name in names})
    return found


def _before_last(parent: Any, block: nn.Module, unit: Unit, x: Tensor) -> Tensor:
    """Return what enters the last layer of a feed-forward network for inputs [tokens, in]."""
    gate, up = (block.get_submodule(name) for name in unit.first)
    dtype = weight_of(up).dtype
    return cast(
        Tensor, parent.act_fn(F.linear(x.to(dtype), weight_of(gate))) * F.linear(x.to(dtype), weight_of(up))
    )


class QuantizedRouter(nn.Module):
    """A router whose weight lies on a grid, in the basis that its input is turned to."""

    def __init__(self, router: nn.Module, input_quantizer: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.input_quantizer = input_quantizer
        self.top_k = cast(Any, router).top_k

    @property
    def weight(self) -> Tensor:
        """The weight [experts, in] in the turned basis."""
        return cast(Tensor, self.router.weight)

    def forward(self, hidden_states: Tensor) -> Any:
        """Return what the router does, for a quantized ``hidden_states`` [..., in]."""
        return self.router(self.input_quantizer(hidden_states))


# Smoothing


def absmax(parts: Sequence[Tensor]) -> Tensor:
    """Return the largest magnitude of every channel over tensors [..., channels]."""
    return torch.stack([x.abs().flatten(0, -2).amax(0) for x in parts if x.numel()]).amax(0)


def base_scale(peaks: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """Return SmoothQuant's scale [in] of layers that read one input.

    Args:
        peaks: largest magnitude of each input channel [in].
        weights: [out, in] of every reader.
        alpha: share of the activations.
    """
    weight = torch.cat(list(weights)).abs().amax(0).clamp(min=_LEAST)
    return (peaks.clamp(min=_LEAST).pow(alpha) / weight.pow(1 - alpha)).clamp(min=_LEAST)


def weight_score(weights: Sequence[Tensor]) -> float:
    """Return the largest ratio of a column's maximum to its mean magnitude over some weights [out, in]."""
    return max(float((w.abs().amax(0) / w.abs().mean(0)).max()) for w in weights)


def merge_scales(
    scales: Tensor,
    strategy: Merge,
    *,
    counts: Tensor,
    weight_scores: Tensor,
    router_shares: Tensor,
    router_scale: Tensor | None = None,
) -> Tensor:
    """Return one scale [in] for all experts (the authors' ``merge_scale``).

    Args:
        scales: of each expert, [experts, in].
        counts: tokens of each expert; their sum is tokens times experts per token.
        weight_scores: :func:`weight_score` of each expert.
        router_shares: mean probability of each expert.
        router_scale: the result is no less than this, where given.
    """

    def mean(ratios: Tensor) -> Tensor:
        return (scales * ratios.to(scales)[:, None]).sum(0)

    by_tokens = counts / counts.sum()
    by_weights = {
        "sum2_0": weight_scores.sqrt().softmax(0),
        "sum2_1": weight_scores.softmax(0),
        "sum2_2": weight_scores.sqrt() / weight_scores.sqrt().sum(),
        "sum2_3": weight_scores / weight_scores.sum(),
    }
    if strategy == "max":
        merged = scales.amax(0)
    elif strategy == "sum1":
        merged = mean(by_tokens)
    elif strategy == "sum3":
        merged = mean(router_shares)
    elif strategy in by_weights:
        merged = mean(by_weights[strategy])
    else:
        parts = [scales.amax(0), mean(by_tokens), mean(router_shares)]
        if strategy == "all-weights":
            parts.append(mean(by_weights["sum2_1"]))
        merged = torch.stack(parts).amax(0)
    return merged if router_scale is None else torch.maximum(merged, router_scale)


def move_scale(block: nn.Module, previous: str, readers: Sequence[str], scale: Tensor) -> None:
    """Divide the output of ``previous`` (a norm or a Linear) by ``scale``, and multiply the readers' columns."""
    source = block.get_submodule(previous)
    weight = weight_of(source)
    set_weight(source, weight / (scale if weight.ndim == 1 else scale[:, None]))
    if isinstance(getattr(source, "bias", None), Tensor):
        set_weight(source, cast(Tensor, source.bias).detach().float() / scale, "bias")
    for name in readers:
        reader = block.get_submodule(name)
        set_weight(reader, weight_of(reader) * scale)


def running_extremes(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return running means, over sequences, of every channel's maximum and minimum (0.9 old, 0.1 new)."""
    high, low = (torch.empty(0), torch.empty(0))
    for x in parts:
        if not x.numel():
            continue
        new_high, new_low = x.flatten(0, -2).amax(0), x.flatten(0, -2).amin(0)
        high = new_high if not high.numel() else 0.9 * high + 0.1 * new_high
        low = new_low if not low.numel() else 0.9 * low + 0.1 * new_low
    return high, low


def outlier_factor(high: Tensor, low: Tensor, ratio: float, rate: float) -> Tensor:
    """Return the factors of outlier channels, 1 elsewhere [channels] (the authors' ``calcu_outlier_mask``).

    Args:
        high: largest value of each channel; ``low`` likewise the smallest.
        ratio: quantile from which the spread of ordinary channels is taken.
        rate: power of the ratio between an outlier channel and the largest ordinary one.
    """
    factor = torch.ones_like(high)
    for values in (high, -low):
        q1, q3 = (torch.quantile(values, q) for q in (1 - ratio, ratio))
        threshold = q3 + 1.5 * (q3 - q1)
        beyond = values[values > threshold]
        if len(beyond) > 1:
            threshold = _largest_gap(beyond.sort(descending=True).values, upper=values is high)
        outlying = values > threshold
        ordinary = values[~outlying]
        if not bool(outlying.any()) or not ordinary.numel() or float(ordinary.max()) == 0:
            continue
        grown = (values / ordinary.max()).pow(rate)
        factor = torch.maximum(factor, torch.where(outlying & torch.isfinite(grown), grown, 1.0))
    return factor


def _largest_gap(values: Tensor, *, upper: bool) -> Tensor:
    """Return the value after the widest gap of ``values``, which fall, judged against the spread of the part
    that stays."""
    scores = []
    for i in range(len(values) - 1):
        rest = values[i + 1 :]
        scores.append(values[i] - rest[0] - (rest.var() if len(rest) > 1 else 0.0))
    return values[int(torch.stack(scores).argmax()) + 1]


# Clipping


@dataclass(frozen=True, slots=True)
class Clipped:
    """The best clipping of a weight: ratio and score of each row [out, 1], and the rounded weight."""

    quantized: Quantized
    ratio: Tensor
    score: Tensor

    @property
    def weight(self) -> Tensor:
        """The rounded weight [out, in]."""
        return self.quantized.dequantize()


def weight_grid(weight: Tensor, bits: int, ratio: float) -> UniformGrid:
    """Return the asymmetric grid of every row whose extremes are multiplied by ``ratio``; the zero point lies
    on the grid."""
    low, high = (extreme * ratio for extreme in torch.aminmax(weight, dim=1, keepdim=True))
    top = 2**bits - 1
    scale = ((high - low) / top).clamp(_LEAST, _MOST)
    zero = (-low / scale).clamp(-_MOST, _MOST).round().clamp(0, top)
    return UniformGrid(scale, zero, 0, top)


def first_experts(top_k: int, experts: int, share: float) -> int:
    """Return how many experts the KL looks at: ``top_k``, and a share of the others."""
    return top_k + int(share * (experts - top_k))


def router_divergence(teacher: Tensor, student: Tensor, first: int) -> Tensor:
    """Return the KL of two routings on the teacher's ``first`` experts, a mean over tokens.

    Args:
        teacher: logits [tokens, experts]; ``student`` likewise.
    """
    chosen = teacher.topk(first, dim=-1).indices
    wanted = teacher.softmax(-1).gather(-1, chosen)
    given = student.log_softmax(-1).gather(-1, chosen)
    return (wanted * (wanted.log() - given)).sum() / len(teacher)


def search_clip(
    weight: Tensor, bits: int, criterion: Criterion, *, x: Tensor | None = None, first: int = 0
) -> Clipped:
    """Return the best of :data:`CLIP_RATIOS` for every row, or for the whole matrix where the router decides.

    Args:
        weight: fp32 [out, in].
        criterion: ``weight`` for the squared error of a row, ``output`` for that of its outputs, ``router`` for
            :func:`router_divergence`, ``output-router`` for the sum of both.
        x: inputs [tokens, in]; not needed for ``weight``.
        first: experts that the divergence looks at.

    Raises:
        ValueError: a criterion that needs inputs has none.
    """
    if criterion != "weight" and x is None:
        raise ValueError(f"the criterion {criterion} needs inputs")
    dense = None if x is None else x @ weight.T
    best = torch.full((len(weight), 1), torch.inf, device=weight.device)
    scale, zero, chosen = torch.ones_like(best), torch.zeros_like(best), torch.ones_like(best)
    for ratio in CLIP_RATIOS:
        grid = weight_grid(weight, bits, ratio)
        assert grid.zero is not None
        rounded = grid.snap(weight)
        score = torch.zeros_like(best)
        if criterion == "weight":
            score = (rounded - weight).square().sum(1, keepdim=True)
        else:
            assert x is not None
            assert dense is not None
            given = x @ rounded.T
            if "output" in criterion:
                score = score + (given - dense).square().sum(0)[:, None]
            if "router" in criterion:
                score = score + router_divergence(dense, given, first)
        better = score < best
        best = torch.where(better, score, best)
        scale, zero = torch.where(better, grid.scale, scale), torch.where(better, grid.zero, zero)
        chosen = chosen.masked_fill(better, ratio)
    final = UniformGrid(scale, zero, 0, 2**bits - 1)
    codes = final.encode(weight).to(torch.int16)
    return Clipped(Quantized(codes, scale, zero, 0, bits), chosen, best)


# DuQuant's transform


class Transform(nn.Module):
    """Rotations of blocks of channels with permutations between them: ``x -> x T`` with an orthogonal ``T``.

    The same function turns activations [..., channels] and the rows of weights [out, channels].
    """

    def __init__(self, rotations: Sequence[Tensor], permutations: Sequence[Tensor]) -> None:
        super().__init__()
        self.count = len(rotations)
        for i, rotation in enumerate(rotations):
            self.register_buffer(f"rotation{i}", rotation)
        for i, permutation in enumerate(permutations):
            self.register_buffer(f"permutation{i}", permutation.to(torch.int32))
        self.permutations = len(permutations)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x T`` in the dtype of ``x``."""
        for i in range(max(self.count, self.permutations)):
            if i < self.count:
                rotation = cast(Tensor, getattr(self, f"rotation{i}")).to(x.dtype)
                x = (x.unflatten(-1, (-1, len(rotation))) @ rotation).flatten(-2)
            if i < self.permutations:
                x = x[..., cast(Tensor, getattr(self, f"permutation{i}")).long()]
        return x


def find_transform(
    x: Tensor,
    *,
    block_size: int,
    steps: int,
    permutations: int,
    extreme: Literal["row", "column"],
    generator: torch.Generator,
) -> Transform:
    """Return the transform that evens out the channels of ``x`` [tokens, channels] (DuQuant, section 3)."""
    rotations, orders = [], []
    for i in range(permutations + 1):
        if steps:
            rotation = greedy_rotation(x.reshape(-1, block_size), steps, extreme, generator)
            rotations.append(rotation)
            x = (x.unflatten(-1, (-1, block_size)) @ rotation).flatten(-2)
        if i < permutations:
            orders.append(zigzag(x, block_size))
            x = x[:, orders[-1]]
    return Transform(rotations, orders)


def spreading_rotation(n: int, generator: torch.Generator) -> Tensor:
    """Return an orthogonal matrix [n, n] that spreads coordinate 0 evenly and turns the others at random."""
    rotation = torch.eye(n, dtype=torch.float64)
    for i in range(n - 1):
        c, s = (1 / (i + 2)) ** 0.5, ((i + 1) / (i + 2)) ** 0.5
        given = torch.eye(n, dtype=torch.float64)
        given[i, i] = given[i + 1, i + 1] = c
        given[i, i + 1], given[i + 1, i] = -s, s
        rotation = given @ rotation
    swap = torch.arange(n)
    swap[0], swap[-1] = n - 1, 0
    rotation = rotation[swap][:, swap]
    turn = torch.eye(n, dtype=torch.float64)
    turn[1:, 1:] = torch.linalg.qr(torch.randn(n - 1, n - 1, dtype=torch.float64, generator=generator)).Q
    return rotation @ turn


def greedy_rotation(
    x: Tensor, steps: int, extreme: Literal["row", "column"], generator: torch.Generator
) -> Tensor:
    """Return the product of up to ``steps`` rotations, each spreading an extreme entry of ``x`` [rows, n]; fp32.

    The product ends where the spread between the largest and the smallest entry was least.
    """
    n = x.shape[1]
    base = spreading_rotation(n, generator).to(x.device)
    total, best = torch.eye(n, dtype=torch.float64, device=x.device), None
    least = torch.inf
    turned = x.double()
    for _ in range(steps + 1):
        flat = turned.flatten()
        top, bottom = int(flat.argmax()), int(flat.argmin())
        spread = float(flat[top] - flat[bottom])
        if spread < least:
            least, best = spread, total
        at = top if abs(float(flat[top])) > abs(float(flat[bottom])) else bottom
        index = (at // n) % n if extreme == "row" else at % n
        swap = torch.arange(n, device=x.device)
        swap[0], swap[index] = index, 0
        rotation = base[swap][:, swap]
        turned, total = turned @ rotation, total @ rotation
    return (total if best is None else best).float()


def zigzag(x: Tensor, block_size: int) -> Tensor:
    """Return the order of channels that deals the largest of ``x`` [tokens, channels] to all blocks in turn.

    Channels in descending order of their largest magnitude go to blocks 0, 1, ..., B-1, B-1, ..., 0 and on.
    """
    blocks = x.shape[1] // block_size
    order = x.abs().amax(0).argsort(descending=True)
    dealt: list[list[int]] = [[] for _ in range(blocks)]
    for start in range(0, len(order), blocks):
        row = order[start : start + blocks].tolist()
        for block, channel in zip(
            range(blocks) if (start // blocks) % 2 == 0 else reversed(range(blocks)), row, strict=True
        ):
            dealt[block].append(channel)
    return torch.tensor([channel for part in dealt for channel in part], device=x.device)
