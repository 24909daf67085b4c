"""Agile-Quant: activation-guided quantization for faster inference of language models on the edge.

Shen et al., AAAI 2024 (arXiv 2312.05693). Weights are quantized by GPTQ, activations by static quantizers that
calibration fixes. Tokens that pay little attention to the first token are the least important: a share of them
is removed layer by layer, and with them their outliers; a further share runs at fewer activation bits. With
attention probabilities ``P`` (quantized) of a layer and ``T`` tokens that are left::

    score_t = sum over heads h of P[h, t, 0]
    removed = the int(T rho_rm) least scores;  low = the next int(T rho_lo), and what was low before

Removed tokens leave after the attention's residual; the layers behind see shorter sequences with positions
counted anew. A removed token is predicted from the state that it left with, so that tasks find a prediction
for every token, where the authors leave its label out; :func:`kept_positions` tells which were kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.logarithmic import Log2Grid
from methodbench.torchkit.model import Calibration, LoadedModel, set_submodule
from methodbench.torchkit.quantizers import UniformGrid
from methodbench_quant.llm.gptq import GPTQ
from methodbench_quant.llm.layers import finished, open_copy

#: Least scale of an activation grid (the authors' constant, fp32's epsilon).
_LEAST_SCALE = float(torch.finfo(torch.float32).eps)

#: Bits from which on a quantizer leaves values alone.
_FLOAT_BITS = 16


@hyperparameters
class AgileQuant:
    """Quantizes weights and activations of the blocks and thins out tokens; embeddings and head stay."""

    bits: Annotated[Literal[2, 3, 4, 8, 16], Field(description="weight bits; 16 leaves weights alone")] = 4
    group_size: Annotated[
        int, Field(ge=-1, description="input columns that share a weight scale; -1 for one per channel")
    ] = 128
    act_order: Annotated[bool, Field(description="GPTQ's column order by the Hessian's diagonal")] = True
    true_sequential: Annotated[bool, Field(description="GPTQ quantizes a block's layers one by one")] = True
    a_bits: Annotated[int, Field(ge=2, le=16, description="activation bits; 16 leaves them alone")] = 8
    low_bits: Annotated[int, Field(ge=2, le=16, description="activation bits of less important tokens")] = 4
    softmax_bits: Annotated[int, Field(ge=2, le=16, description="bits of attention probabilities")] = 4
    softmax_grid: Annotated[
        Literal["uniform", "log2"], Field(description="grid of attention probabilities")
    ] = "uniform"
    granularity: Annotated[
        Literal["channel", "layer"],
        Field(description="what shares an activation grid: a feature (or a head), or a whole tensor"),
    ] = "channel"
    remove: Annotated[
        float, Field(ge=0, lt=1, description="share of the tokens that are removed by the last layer")
    ] = 0.0
    low: Annotated[float, Field(ge=0, le=1, description="share of a layer's tokens that run at low_bits")] = (
        0.0
    )
    first: Annotated[
        float, Field(ge=0, lt=1, description="share of the depth before the first layer that thins out")
    ] = 0.5
    importance: Annotated[
        Literal["start", "received"],
        Field(description="attention paid to the first token (start), or received from later ones"),
    ] = "start"
    inherit: Annotated[bool, Field(description="a token at low bits stays there in later layers")] = True
    calibration_sequences: Annotated[
        int, Field(ge=1, description="sequences that fix the activation grids")
    ] = 10

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.group_size == 0:
            raise ValueError("group_size is the number of columns that share a scale, or -1; it cannot be 0")
        if self.remove + self.low > 1:
            raise ValueError("remove and low are shares of the same tokens: together at most 1")
        return self

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` with packed layers and blocks that quantize activations and thin out tokens.

        Raises:
            NotApplicableError: no calibration inputs, or blocks that are not built like Llama's.
            DivergedError: weights or calibration activations are not finite.
        """
        if not len(data):
            raise NotApplicableError("calibration of activation grids needs inputs, and there are none")
        dense = model
        model = open_copy(model)
        if self.bits < _FLOAT_BITS:
            gptq = GPTQ(
                bits=cast(Any, self.bits),
                group_size=self.group_size,
                act_order=self.act_order,
                static_groups=self.act_order and self.group_size != -1,
                true_sequential=self.true_sequential,
            )
            model = gptq.compress(dense, data, ctx)
        blocks = self._wrap(model)
        with ctx.phase("activations"), torch.no_grad():
            quantizers = [m for block in blocks for m in block.modules() if isinstance(m, ActivationRange)]
            for ids in data.inputs[: self.calibration_sequences]:
                model.module(ids[None].to(model.device), use_cache=False)
            for quantizer in quantizers:
                quantizer.freeze()
        facts = {
            "activations": f"{self.a_bits} bits, static, simulated",
            "tokens_removed": self.remove,
            "tokens_low": self.low,
        }
        if self.bits < _FLOAT_BITS:
            return finished(model, facts)
        model.facts.update(facts)
        model.storage = "simulated"
        return model

    def _wrap(self, model: LoadedModel) -> list[AgileBlock]:
        """Replace every block, in place, by one that quantizes and thins out; return them."""
        names = model.adapter.block_names(model.module)
        first = min(len(names) - 1, round(self.first * len(names)))
        share = 1 - (1 - self.remove) ** (1 / (len(names) - first))
        flow = TokenFlow()
        blocks = []
        for index, name in enumerate(names):
            thins = index >= first
            block = AgileBlock(
                model.module.get_submodule(name),
                model.adapter,
                self,
                flow,
                Thinning(share if thins else 0.0, self.low if thins else 0.0, self.importance, self.inherit),
                place="first" if index == 0 else "last" if index == len(names) - 1 else "middle",
            )
            block.check(model.module.get_submodule(name), name)
            blocks.append(block)
        for name, block in zip(names, blocks, strict=True):
            set_submodule(model.module, name, block)
        if hasattr(model.module, "config"):
            # Sequences that shrink layer by layer have no cache; without one, generation reads the prefix anew.
            cast(Any, model.module).config.use_cache = False
        return blocks


class ActivationRange(nn.Module):
    """A static quantizer: watches extremes until it is frozen, and rounds from then on (the authors' QAct).

    Signed grids are symmetric with ``scale = max|x| / ((2^b - 1) / 2)``, so that the largest values are
    clipped by half a step; unsigned grids have a zero point.

    Args:
        bits: 16 and more leave values alone.
        axis: the axis with grids of its own, features (-1) or heads (1); None for one grid.
        signed: codes from ``-2^(b-1)``, or from 0.
    """

    low: Tensor
    high: Tensor

    def __init__(self, bits: int, axis: int | None, *, signed: bool = True) -> None:
        super().__init__()
        self.bits = bits
        self.axis = axis
        self.signed = signed
        self.frozen = False
        self.register_buffer("low", torch.empty(0))
        self.register_buffer("high", torch.empty(0))

    def freeze(self) -> None:
        """Round from here on."""
        self.frozen = True

    def grid(self) -> UniformGrid:
        """Return the grid of the extremes seen, broadcasting over the values."""
        codes = 2**self.bits - 1
        if self.signed:
            bottom = -(2 ** (self.bits - 1))
            scale = (torch.maximum(-self.low, self.high) / (codes / 2)).clamp(min=_LEAST_SCALE)
            return UniformGrid(scale, None, bottom, bottom + codes)
        scale = ((self.high - self.low) / codes).clamp(min=_LEAST_SCALE)
        return UniformGrid(scale, (-(self.low / scale).round()).clamp(0, codes), 0, codes)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` as it is while watching, and rounded once frozen."""
        if self.bits >= _FLOAT_BITS:
            return x
        if self.frozen:
            return self.grid().snap(x).to(x.dtype) if self.low.numel() else x
        kept = {} if self.axis is None else {self.axis % x.ndim}
        axes = tuple(axis for axis in range(x.ndim) if axis not in kept)
        low, high = x.detach().float().amin(axes, keepdim=True), x.detach().float().amax(axes, keepdim=True)
        self.low = low if not self.low.numel() else torch.minimum(self.low, low)
        self.high = high if not self.high.numel() else torch.maximum(self.high, high)
        return x


class Log2Probabilities(nn.Module):
    """Rounds probabilities to powers of two, below the last of which they are zero; needs no calibration."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """Return ``2^round(log2 x)``, or 0 from ``2^-(2^bits)`` on down."""
        return (
            x
            if self.bits >= _FLOAT_BITS
            else Log2Grid(torch.ones_like(x[..., :1]), self.bits, "extra").snap(x)
        )


class TwinRange(nn.Module):
    """Two quantizers: one for tokens, one of fewer bits for the less important of them."""

    def __init__(self, bits: int, low_bits: int, axis: int | None) -> None:
        super().__init__()
        self.main = ActivationRange(bits, axis)
        self.low = ActivationRange(low_bits, axis)

    def forward(self, x: Tensor, low: Tensor | None) -> Tensor:
        """Return ``x`` [B, T, features], rounded; ``low`` is bool [B, T], or None for no such token."""
        main, reduced = self.main(x), self.low(x)
        return main if low is None else torch.where(low[..., None], reduced, main)


@dataclass(frozen=True, slots=True)
class Thinning:
    """What a layer does with its tokens."""

    remove: float
    low: float
    importance: Literal["start", "received"]
    inherit: bool


@dataclass(frozen=True, slots=True)
class Selection:
    """Tokens that a layer removes, and tokens that it keeps at low bits: disjoint, bool [B, T]."""

    removed: Tensor
    low: Tensor


@dataclass(slots=True)
class TokenFlow:
    """What the blocks of one forward pass tell each other."""

    positions: Tensor | None = None
    """int64 [B, T']: the input positions of the tokens that are left."""
    low: Tensor | None = None
    """bool [B, T']: tokens at low bits."""
    left: Tensor | None = None
    """[B, T, hidden]: the states with which tokens left, at their positions."""


class AgileAttention(nn.Module):
    """Causal attention with rotary positions that quantizes queries, keys, values and probabilities."""

    def __init__(self, attention: Any, roles: dict[str, str], method: AgileQuant) -> None:
        super().__init__()
        for role in ("q", "k", "v", "o"):
            setattr(self, roles[role], getattr(attention, roles[role]))
        self.roles = {role: roles[role] for role in ("q", "k", "v", "o")}
        self.head_dim = int(attention.head_dim)
        self.scaling = float(attention.scaling)
        heads = 1 if method.granularity == "channel" else None
        self.query_range = ActivationRange(method.a_bits, heads)
        self.key_range = ActivationRange(method.a_bits, heads)
        self.value_range = ActivationRange(method.a_bits, heads)
        self.probability_range = (
            Log2Probabilities(method.softmax_bits)
            if method.softmax_grid == "log2"
            else ActivationRange(method.softmax_bits, heads)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return the heads' outputs before the last projection [B, T, heads * size], and probabilities
        [B, heads, T, T]."""
        q, k, v = (
            getattr(self, self.roles[role])(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for role in ("q", "k", "v")
        )
        q, k, v = self.query_range(q), self.key_range(k), self.value_range(v)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.mT * self.scaling).masked_fill(future, -torch.inf)
        probabilities = self.probability_range(scores.float().softmax(-1)).to(q.dtype)
        return (probabilities @ v).transpose(1, 2).flatten(2), probabilities

    def project(self, x: Tensor) -> Tensor:
        """Return the last projection of ``x`` [B, T, heads * size]."""
        return cast(Tensor, getattr(self, self.roles["o"])(x))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x`` [B, heads, T, size] after the rotary embedding (cos and sin [B, T, size])."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos[:, None] + turned * sin[:, None]


class AgileBlock(nn.Module):
    """A pre-norm decoder block with quantized activations that removes tokens between its two halves.

    The layers keep the names that they have in ``block``.
    """

    def __init__(
        self,
        block: nn.Module,
        adapter: Adapter,
        method: AgileQuant,
        flow: TokenFlow,
        thinning: Thinning,
        place: Literal["first", "middle", "last"],
    ) -> None:
        super().__init__()
        roles = {adapter.role(name): name for name in adapter.linears(block)}
        layout = adapter.layout
        parts = ("q", "k", "v", "o", "gate", "up", "down")
        if layout is None or sorted(roles) != sorted(parts) or len(adapter.linears(block)) != len(parts):
            raise NotApplicableError(
                "a block is not built from query, key, value, output, gate, up and down layers",
                "Agile-Quant thins out the tokens of decoders in the manner of Llama.",
            )
        attention = block.get_submodule(layout.attention)
        feed_forward, _, _ = roles["down"].rpartition(".")
        norms = [layout.attention_norm, *layout.feed_forward_norms]
        found = [name for name in norms if name and hasattr(block, name)]
        usable = all(hasattr(attention, name) for name in ("head_dim", "scaling"))
        if not usable or len(found) != 2 or not hasattr(block.get_submodule(feed_forward), "act_fn"):
            raise NotApplicableError(
                "a block has no two norms around Llama's attention and feed-forward network"
            )
        inner = {role: roles[role].rpartition(".")[2] for role in parts}
        self.norms = tuple(found)
        self.names = (layout.attention, feed_forward)
        self.inner = inner
        for name in found:
            setattr(self, name, getattr(block, name))
        setattr(self, layout.attention, AgileAttention(attention, inner, method))
        setattr(self, feed_forward, block.get_submodule(feed_forward))
        features = -1 if method.granularity == "channel" else None
        self.input_range = ActivationRange(method.a_bits, features)
        self.output_range = TwinRange(method.a_bits, method.low_bits, features)
        self.hidden_range = TwinRange(method.a_bits, method.low_bits, features)
        self.product_range = TwinRange(method.a_bits, method.low_bits, features)
        self.flow = flow
        self.thinning = thinning
        self.place = place

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None, **_: Any
    ) -> Tensor:
        """Map [B, T', hidden] to the states of the tokens that are left; the last block returns all T."""
        assert position_embeddings is not None
        x, flow = hidden_states, self.flow
        batch, count = x.shape[:2]
        if self.place == "first" or flow.positions is None:
            flow.positions = torch.arange(count, device=x.device).expand(batch, -1)
            flow.low, flow.left = None, None
        attention = cast(AgileAttention, getattr(self, self.names[0]))
        cos, sin = (part[:, :count] for part in position_embeddings)
        mixed, probabilities = attention(self.input_range(getattr(self, self.norms[0])(x)), cos, sin)
        chosen = self._select(probabilities)
        low = None if chosen is None else chosen.low
        x = x + attention.project(self.output_range(mixed, low))
        if chosen is not None:
            x, low = self._remove(x, chosen)
        flow.low = low
        x = x + self._feed_forward(self.hidden_range(getattr(self, self.norms[1])(x), low), low)
        if self.place == "last" and flow.left is not None:
            x = flow.left.scatter(1, flow.positions[..., None].expand_as(x), x)
        return x

    def _feed_forward(self, x: Tensor, low: Tensor | None) -> Tensor:
        network = cast(Any, getattr(self, self.names[1]))
        gate, up, down = (getattr(network, self.inner[role]) for role in ("gate", "up", "down"))
        return cast(Tensor, down(self.product_range(network.act_fn(gate(x)) * up(x), low)))

    def _select(self, probabilities: Tensor) -> Selection | None:
        wanted, count = self.thinning, probabilities.shape[-1]
        if count == 1 or (not wanted.remove and not wanted.low and self.flow.low is None):
            return None
        scores = token_scores(probabilities, wanted.importance)
        return select(scores, wanted.remove, wanted.low, self.flow.low if wanted.inherit else None)

    def _remove(self, x: Tensor, chosen: Selection) -> tuple[Tensor, Tensor]:
        """Return states and low set of the tokens that stay, and note where the others left."""
        flow = self.flow
        assert flow.positions is not None
        if flow.left is None:
            flow.left = x
        else:
            flow.left = flow.left.scatter(1, flow.positions[..., None].expand_as(x), x)
        # Every sequence of a batch keeps the same number of tokens.
        stay = torch.nonzero(~chosen.removed)[:, 1].view(len(x), -1)
        flow.positions = flow.positions.gather(1, stay)
        return x.gather(1, stay[..., None].expand(-1, -1, x.shape[-1])), chosen.low.gather(1, stay)

    @torch.no_grad()
    def check(self, block: nn.Module, name: str) -> None:
        """Check that this block, without rounding and thinning, computes what ``block`` does.

        Raises:
            NotApplicableError: it does not: the model's attention has parts that this one lacks.
        """
        norm = getattr(block, self.norms[0]).weight
        attention = cast(AgileAttention, getattr(self, self.names[0]))
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 5, norm.shape[0], generator=generator).to(norm)
        angle = torch.arange(5.0)[:, None] * torch.linspace(1, 0.1, attention.head_dim // 2).repeat(2)
        places = (angle.cos()[None].to(norm), angle.sin()[None].to(norm))
        ours = [m for m in self.modules() if isinstance(m, ActivationRange | Log2Probabilities)]
        bits = [m.bits for m in ours]
        thinning, self.thinning = self.thinning, Thinning(0.0, 0.0, "start", False)
        place, self.place = self.place, "first"
        for module in ours:
            module.bits = _FLOAT_BITS
        mask = torch.full((5, 5), torch.finfo(x.dtype).min).triu(1).to(x)[None, None]
        try:
            theirs = cast(Any, block)(x, attention_mask=mask, position_embeddings=places)
            theirs = theirs[0] if isinstance(theirs, tuple) else theirs
            tolerance = 1e-4 if x.dtype == torch.float32 else 5e-2
            same = torch.allclose(self(x, position_embeddings=places), theirs, rtol=tolerance, atol=tolerance)
        finally:
            self.thinning, self.place = thinning, place
            for module, width in zip(ours, bits, strict=True):
                module.bits = width
        if not same:
            raise NotApplicableError(f"{name} does not compute what a block of Llama does")


def token_scores(probabilities: Tensor, importance: Literal["start", "received"] = "start") -> Tensor:
    """Return the importance of tokens, [B, T].

    ``start``: attention that a token pays to the first one, summed over heads. ``received``: attention that a
    token receives, summed over heads and queries, per query that can see it.

    Args:
        probabilities: [B, heads, T, T], queries along the third axis.
    """
    if importance == "start":
        return probabilities[..., 0].sum(1)
    count = probabilities.shape[-1]
    seen_by = count - torch.arange(count, device=probabilities.device)
    return probabilities.tril().sum((1, 2)) / seen_by


def select(scores: Tensor, remove: float, low: float, before: Tensor | None = None) -> Selection:
    """Return the tokens to remove and those to run at low bits.

    Args:
        scores: [B, T]; less is less important, the earlier of equal ones counts as less.
        remove: share of the T tokens that is removed, rounded down.
        low: share that runs at low bits, rounded down; the least important that are not removed.
        before: bool [B, T]: tokens that were at low bits already and stay there.
    """
    count = scores.shape[1]
    rank = scores.argsort(dim=1, stable=True).argsort(dim=1)
    number = int(count * remove)
    removed = rank < number
    reduced = rank < min(count, int(count * low) + number)
    if before is not None:
        reduced = reduced | before
    return Selection(removed, reduced & ~removed)


def kept_positions(model: LoadedModel) -> Tensor:
    """Return the positions that were left after the last forward pass, int64 [B, T'].

    The authors score these alone.
    """
    flow = cast(AgileBlock, model.adapter.blocks(model.module)[-1]).flow
    assert flow.positions is not None, "the model has not been run"
    return flow.positions
