"""How much of its depth a language model uses: what layers write, who reads it, and when the prediction is settled.

"Do Language Models Use Their Depth Efficiently?", arXiv 2505.13898; authors' code RobertCsordas/llm_effective_depth
(f29a115). With h_l the input of block l, a_l and m_l what its attention and its feed-forward network add, and
``c_l = h_l+1 - h_l``:

- *contributions*: ``||a_l|| / ||h_l||``, ``||m_l|| / ||h_l + a_l||``, ``||c_l|| / ||h_l||``, means over tokens; and
  cosines with what they are added to (negative: erases, positive: amplifies);
- *skip effects*: block s (or one of its parts) adds nothing at positions 1 to t-1, the first stays, since attention
  may rest on it. For positions from t on, what later blocks then write is compared with what they wrote::

      effect(s, l) = max ||c_l - c_l'|| / ||c_l||        output effect(s) = max ||softmax' - softmax||_2

  the maximum over positions, a few t and prompts. Without t all positions are left out and looked at. ``local`` takes
  only the direct contribution of s out of what every later block reads, so that effects do not add up;
- *logit lens*: KL divergence from the final prediction of what ``head(norm(h_l))`` predicts, and the overlap of their
  top k.

The depth score is the centre of mass of output effects over blocks. The authors' erasure of residuals, integrated
gradients and linear maps between models are not part of this probe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.sequential import hidden_of

Part = Literal["layer", "mlp", "attention"]

#: The smallest norm that anything is divided by.
FLOOR = 1e-6
#: Positions t are multiples of it, and end so many tokens before the end.
STEP, TAIL = 8, 4


@hyperparameters
class DepthUse:
    """Measures what layers contribute and what is lost without them; changes nothing."""

    part: Annotated[
        Part, Field(description="what is left out: a whole block, or what one half of it adds")
    ] = "layer"
    local: Annotated[bool, Field(description="take out the direct contribution only; needs part=layer")] = (
        False
    )
    prompts: Annotated[int, Field(ge=1, description="sequences that are looked at")] = 4
    tokens: Annotated[int, Field(ge=STEP + TAIL + 1, description="length that sequences are cut to")] = 128
    positions: Annotated[int, Field(ge=0, description="random t per sequence; 0: all positions at once")] = 4
    protected: Annotated[int, Field(ge=0, description="positions at the start that are never left out")] = 1
    top_k: Annotated[int, Field(ge=1, description="predictions whose overlap is counted")] = 5

    def measure(
        self, model: LoadedModel, data: Calibration, ctx: Context
    ) -> Mapping[str, np.ndarray | float]:
        """Return the depth score and shares of the second half, and everything by layer.

        Scalars: ``depth-score`` in blocks, ``depth-share`` (the score over the number of blocks less one),
        ``second-half-share`` of output effects, and ``settled``, the share of blocks before the logit lens agrees with
        the output in half of its top k. Arrays by layer: ``contribution-attention``, ``-mlp``, ``-layer``;
        ``cosine-attention``, ``-mlp``, ``-layer``, ``-stream``; ``output-effect``; ``lens-kl`` in nats;
        ``lens-overlap``; and ``effect`` [skipped, measured].

        Raises:
            NotApplicableError: no token ids; a model whose blocks do not add an attention and a feed-forward module to
                one stream, or without head.
        """
        if not len(data) or data.inputs.is_floating_point():
            raise NotApplicableError("depth use is measured on sequences of token ids, and there are none")
        if self.local and self.part != "layer":
            raise NotApplicableError("a local effect is that of a whole block: local=true needs part=layer")
        watched = model.clone()
        stack = Stack(watched)
        generator = torch.Generator().manual_seed(ctx.seed)
        shares: list[dict[str, Tensor]] = []
        effects, outputs = [], []
        for ids in data.inputs[: self.prompts, : self.tokens]:
            trace = stack.run(ids[None])
            stack.check(trace)
            shares.append(contributions(trace) | stack.lens(trace, self.top_k))
            cuts = draw_positions(len(ids), self.positions, generator) if self.positions else [None]
            effect, output = stack.skip_effects(
                ids[None], trace, self.part, cuts, self.protected, local=self.local
            )
            effects.append(effect)
            outputs.append(output)
        by_layer = {
            name: torch.stack([share[name] for share in shares]).mean(0).numpy(force=True)
            for name in shares[0]
        }
        output = torch.stack(outputs).amax(0).double()
        score = depth_score(output)
        blocks = len(output)
        agrees = np.flatnonzero(by_layer["lens-overlap"] >= 0.5)
        return {
            "depth-score": score,
            "depth-share": score / max(1, blocks - 1),
            "second-half-share": float(output[blocks // 2 :].sum() / output.sum().clamp(min=FLOOR)),
            "settled": float(agrees[0] if len(agrees) else blocks) / blocks,
            "output-effect": output.numpy(force=True),
            "effect": torch.stack(effects).amax(0).numpy(force=True),
            **by_layer,
        }


@dataclass
class Trace:
    """One forward pass: states that enter blocks, and what parts add, [batch, tokens, channels] float32 each."""

    h: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)
    c: list[Tensor] = field(default_factory=list)
    """What each block adds, ``h_l+1 - h_l``; nothing where it is left out."""
    outputs: list[Any] = field(default_factory=list)
    """What each block returns, in its own form."""
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Skip:
    """What is left out: ``part`` of block ``layer`` where ``mask`` [batch, tokens] is True."""

    layer: int
    part: Part
    mask: Tensor
    original: Trace
    """The untouched pass over the same tokens; blocks before ``layer`` are not run again."""
    local: bool = False
    """Take only the direct contribution of the block from what all later blocks read."""


class Stack:
    """A language model whose blocks are watched, and left out on demand."""

    def __init__(self, model: LoadedModel) -> None:
        adapter, module = model.adapter, model.module
        norm, head = adapter.final_norm(module), adapter.head(module)
        layout = adapter.layout
        if layout is None or norm is None or head is None:
            raise NotApplicableError(
                f"{model.name} has no blocks of known structure, a final norm and a head"
            )
        self.name, self.module, self.norm, self.head = model.name, module, norm, head
        self.blocks = adapter.blocks(module)
        self.attention = [block.get_submodule(layout.attention) for block in self.blocks]
        self.mlp = []
        for block in self.blocks:
            found = [getattr(block, name, None) for name in layout.feed_forward if name]
            modules = [candidate for candidate in found if isinstance(candidate, nn.Module)]
            if not modules:
                raise NotApplicableError(
                    f"the feed-forward networks of {model.name} are no modules of their own"
                )
            self.mlp.append(modules[0])

    @torch.no_grad()
    def run(self, ids: Tensor, skip: Skip | None = None) -> Trace:
        """Return the trace of a pass over ``ids`` [batch, tokens], with ``skip`` left out."""
        trace = Trace()

        def left_out(index: int, part: Part) -> bool:
            return skip is not None and not skip.local and (skip.layer, skip.part) == (index, part)

        def stand_in(index: int, original: Trace) -> Any:
            output = original.outputs[index]
            wide = hidden_of(output).expand(len(ids), -1, -1)
            trace.attention.append(original.attention[index])
            trace.mlp.append(original.mlp[index])
            return lambda *_, **__: _replaced(output, wide)

        def after_part(index: int, part: Part, kept: list[Tensor]) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> Any:
                added = hidden_of(output)
                kept.append(added.float())
                if not left_out(index, part):
                    return output
                assert skip is not None
                return _replaced(output, added.masked_fill(skip.mask[..., None], 0))

            return hook

        def after_block(index: int) -> Any:
            def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
                before = args[0] if args else next(iter(kwargs.values()))
                after = hidden_of(output)
                mask = skip.mask[..., None] if skip is not None else None
                if mask is not None and left_out(index, "layer"):
                    after = torch.where(mask, before, after)
                trace.h.append(before.float())
                trace.c.append(after.float() - before.float())
                if skip is None or mask is None:
                    trace.outputs.append(output)
                    return output
                if skip.local and index >= skip.layer:
                    original = skip.original
                    true = original.h[index] + original.c[index]
                    rest = torch.where(mask, true - original.c[skip.layer], true)
                    after = rest.to(after.dtype)
                return _replaced(output, after)

            return hook

        with ExitStack() as hooks:
            for index, block in enumerate(self.blocks):
                if skip is not None and index < skip.layer:
                    block.forward = stand_in(index, skip.original)
                    hooks.callback(delattr, block, "forward")
                for part, module, kept in (
                    ("attention", self.attention[index], trace.attention),
                    ("mlp", self.mlp[index], trace.mlp),
                ):
                    hooks.callback(module.register_forward_hook(after_part(index, part, kept)).remove)  # type: ignore[arg-type]
                hooks.callback(block.register_forward_hook(after_block(index), with_kwargs=True).remove)
            output = self.module(ids.to(next(self.module.parameters()).device))
        trace.logits = output.logits.float()
        return trace

    def check(self, trace: Trace) -> None:
        """Raise NotApplicableError unless blocks add their two parts to the stream, and nothing else."""
        for h, attention, mlp, c in zip(trace.h, trace.attention, trace.mlp, trace.c, strict=True):
            if not torch.allclose(attention + mlp, c, rtol=0.05, atol=0.02 * float(h.abs().max())):
                raise NotApplicableError(
                    f"the blocks of {self.name} do not add what attention and feed-forward network give to one stream"
                )

    def skip_effects(
        self,
        ids: Tensor,
        trace: Trace,
        part: Part,
        cuts: Sequence[int | None],
        protected: int,
        *,
        local: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return effects [skipped, measured] and output effects [skipped], the maximum over ``cuts``.

        Args:
            ids: [1, tokens].
            trace: of the untouched model on ``ids``.
            part: what is left out.
            cuts: values of t; None leaves out and looks at all positions.
            protected: positions at the start that stay.
            local: see :class:`Skip`.
        """
        count = ids.shape[1]
        place = torch.arange(count, device=trace.logits.device)
        ends = torch.tensor([count if cut is None else cut for cut in cuts], device=place.device)[:, None]
        mask = (place >= protected) & (place < ends)
        looked = place >= torch.tensor([cut or 0 for cut in cuts], device=place.device)[:, None]
        rows = ids.expand(len(cuts), -1)
        probabilities = trace.logits.softmax(-1)
        effects = torch.zeros(len(self.blocks), len(self.blocks))
        outputs = torch.zeros(len(self.blocks))
        for layer in range(len(self.blocks)):
            changed = self.run(rows, Skip(layer, part, mask, trace, local))
            for measured, (old, new) in enumerate(zip(trace.c, changed.c, strict=True)):
                ratio = (old - new).norm(dim=-1) / old.norm(dim=-1).clamp(min=FLOOR)
                effects[layer, measured] = ratio[looked].max()
            distance = (changed.logits.softmax(-1) - probabilities).norm(dim=-1)
            outputs[layer] = distance[looked].max()
        return effects, outputs

    @torch.no_grad()
    def lens(self, trace: Trace, top_k: int) -> dict[str, Tensor]:
        """Return ``lens-kl`` and ``lens-overlap`` [layers] at the inputs of the blocks, means over tokens."""
        final = trace.logits.log_softmax(-1)
        best = final.topk(top_k).indices
        divergences, overlaps = [], []
        dtype = next(self.module.parameters()).dtype
        for h in trace.h:
            early = self.head(self.norm(h.to(dtype))).float().log_softmax(-1)
            divergences.append((early.exp() * (early - final)).sum(-1).mean())
            common = early.topk(top_k).indices[..., :, None] == best[..., None, :]
            overlaps.append(common.any(-1).float().mean())
        return {"lens-kl": torch.stack(divergences), "lens-overlap": torch.stack(overlaps)}


def contributions(trace: Trace) -> dict[str, Tensor]:
    """Return relative contributions and cosines of all layers [layers], means over tokens."""
    found: dict[str, list[Tensor]] = {}
    for h, attention, mlp, c in zip(trace.h, trace.attention, trace.mlp, trace.c, strict=True):
        middle = h + attention
        for name, part, base in (("attention", attention, h), ("mlp", mlp, middle), ("layer", c, h)):
            ratio = part.norm(dim=-1) / base.norm(dim=-1).clamp(min=FLOOR)
            found.setdefault(f"contribution-{name}", []).append(ratio.mean())
            found.setdefault(f"cosine-{name}", []).append(torch.cosine_similarity(part, base, dim=-1).mean())
        found.setdefault("cosine-stream", []).append(torch.cosine_similarity(h + c, h, dim=-1).mean())
    return {name: torch.stack(values) for name, values in found.items()}


def depth_score(effects: Tensor) -> float:
    """Return ``sum_l l e_l / sum_l e_l`` of effects [layers]; 0 where there are none."""
    total = float(effects.sum())
    return float((torch.arange(len(effects)) * effects).sum()) / total if total else 0.0


def draw_positions(tokens: int, count: int, generator: torch.Generator) -> list[int | None]:
    """Return up to ``count`` different t among 8, 16, ... below ``tokens - 4``, ascending."""
    choices = torch.arange(STEP, max(STEP + 1, tokens - TAIL), STEP)
    drawn = choices[torch.randperm(len(choices), generator=generator)[:count]]
    return sorted(drawn.tolist())


def _replaced(output: Any, hidden: Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
