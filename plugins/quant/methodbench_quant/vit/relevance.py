"""Layer-wise relevance propagation through vision transformers: what each layer contributes to the predicted class.

The relevance of the predicted class's logit is 1 and goes back through every operation, which shares what its output
has among its inputs, so that the sum stays what it is (the rules of Chefer, Gur and Wolf, CVPR 2021)::

    Linear     S = R / (x+ W+^T + x- W-^T),   R_x = x+ (S W+) + x- (S W-)
    y = a + b  S = R / y,   R_a = a S,   R_b = b S,   scaled to shares |sum R_a| : |sum R_b| of the sum
    y = P Q    S = R / y,   R_P = P (S Q^T),   R_Q = Q (P^T S),   scaled in the same way
    pooling    R_x = x dy/dx S;   norms, activations, softmax and scalings pass relevance unchanged

``x+`` and ``x-`` are the positive and negative parts; biases take no share.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from methodbench.errors import DivergedError, NotApplicableError
from methodbench.torchkit.adapters import Layout
from methodbench.torchkit.model import LoadedModel
from methodbench.torchkit.vit_attention import ExplicitAttention, use_explicit_attention

_BATCH = 32


@dataclass(slots=True)
class Relevances:
    """What :func:`relevance` returns, for ``B`` images.

    Attributes:
        layers: by the dotted name of a Linear, the sum of absolute relevance at its input, float32 [B].
        boundaries: sums of relevance at the input of every block, last block first, float32 [blocks, B].
    """

    layers: dict[str, Tensor] = field(default_factory=dict)
    boundaries: list[Tensor] = field(default_factory=list)


def relevance(model: LoadedModel, images: Tensor) -> Relevances:
    """Propagate the relevance of the model's own prediction for each image.

    Args:
        model: a vision transformer of pre-norm blocks with plain attention and two Linears in the MLP; left alone.
        images: [B, C, H, W].

    Raises:
        NotApplicableError: blocks or a head of another kind.
        DivergedError: logits that are not finite.
    """
    work = model.clone()
    layout = work.adapter.layout
    if layout is None or work.adapter.merging_norms:
        raise NotApplicableError(f"relevance needs a transformer of equal blocks, which {model.name} is not")
    attentions = use_explicit_attention(work.module, work.adapter)
    parts = [_propagate(work, layout, attentions, batch) for batch in images.split(_BATCH)]
    found = Relevances()
    for name in parts[0].layers:
        found.layers[name] = torch.cat([part.layers[name] for part in parts])
    found.boundaries = [torch.cat(sums) for sums in zip(*(part.boundaries for part in parts), strict=True)]
    return found


def _propagate(
    model: LoadedModel, layout: Layout, attentions: dict[str, ExplicitAttention], images: Tensor
) -> Relevances:
    adapter, module = model.adapter, model.module
    seen: dict[str, _Call] = {}
    names = adapter.block_names(module)
    head_name = _head(model)
    followed = {*names, head_name, *(f"{name}.{norm}" for name in names for norm in _norms(model, name))}
    followed |= {f"{name}.{part}" for name in attentions for part in ("qkv", "matmul1", "matmul2", "proj")}
    mlps = {name: _mlp(model, name, layout) for name in names}
    followed |= {layer for pair in mlps.values() for layer in pair}
    last = adapter.final_norm(module) or module.get_submodule(names[-1])
    tail = _Tail()
    with ExitStack() as hooks, torch.enable_grad():
        for name in followed:
            handle = module.get_submodule(name).register_forward_hook(_remember(seen, name))
            hooks.callback(handle.remove)
        hooks.callback(last.register_forward_hook(tail.leave_tokens).remove)
        for norm in (m for m in module.modules() if isinstance(m, nn.LayerNorm)):
            hooks.callback(norm.register_forward_pre_hook(tail.enter).remove)
        hooks.callback(module.get_submodule(head_name).register_forward_pre_hook(tail.enter).remove)
        logits = cast(Tensor, module(images)).detach()
    if not bool(torch.isfinite(logits).all()):
        raise DivergedError(f"the logits of {model.name} are not finite")
    if not torch.equal(seen[head_name].output, logits):
        raise NotApplicableError(f"the logits of {model.name} are not what its head alone returns")
    result = Relevances()

    def through(name: str, above: Tensor) -> Tensor:
        below = through_linear(cast(nn.Linear, module.get_submodule(name)), seen[name].inputs[0], above)
        result.layers[name] = below.abs().flatten(1).sum(1)
        return below

    at_logits = torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    above = tail.unpooled(through(head_name, at_logits))
    for name in reversed(names):
        attention_name = f"{name}.{layout.attention}"
        first, second = _norms(model, name)
        block_in, middle = seen[f"{name}.{first}"].inputs[0], seen[f"{name}.{second}"].inputs[0]
        kept, branch = through_sum(middle, seen[name].output - middle, above)
        fc1, fc2 = mlps[name]
        above = kept + through(fc1, through(fc2, branch))
        kept, branch = through_sum(block_in, middle - block_in, above)
        logits_call, values_call = seen[f"{attention_name}.matmul1"], seen[f"{attention_name}.matmul2"]
        heads = _into_heads(through(f"{attention_name}.proj", branch), values_call.output)
        at_attention, at_values = values_call.through_product(heads)
        at_queries, at_keys = logits_call.through_product(at_attention)
        stacked = torch.stack([at_queries, at_keys.transpose(-2, -1), at_values]).permute(1, 3, 0, 2, 4)
        above = kept + through(f"{attention_name}.qkv", stacked.flatten(2))
        result.boundaries.append(above.flatten(1).sum(1))
    return result


@dataclass(frozen=True, slots=True)
class _Call:
    inputs: tuple[Tensor, ...]
    output: Tensor

    def through_product(self, above: Tensor) -> tuple[Tensor, Tensor]:
        """Return the relevances of both factors, where the call was a matrix product."""
        return through_product(self.inputs[0], self.inputs[1], self.output, above)


def _remember(seen: dict[str, _Call], name: str) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen[name] = _Call(tuple(arg.detach() for arg in args if isinstance(arg, Tensor)), output.detach())

    return hook


class _Tail:
    """What lies between the tokens behind the last block, normalized, and the head: pooling, and perhaps a norm.

    Pooling is linear; so its rule needs its Jacobian alone, which autograd has, whatever kind it is.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | None = None
        self.pooled: Tensor | None = None

    def leave_tokens(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        """Forward hook of the last module that returns tokens [B, N, D]."""
        self.tokens = output.detach().requires_grad_()
        return self.tokens

    def enter(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of whatever may read the pooled tokens [B, D]; the first that does says what they are."""
        if self.tokens is not None and self.pooled is None:
            self.pooled = args[0]

    def unpooled(self, above: Tensor) -> Tensor:
        """Return the relevance [B, N, D] of the tokens from that of the head's input [B, D]."""
        if self.tokens is None or self.pooled is None or self.pooled.shape != above.shape:
            raise NotApplicableError("the head reads something else than pooled tokens of the last block")
        share = stable_ratio(above, self.pooled.detach())
        (gradient,) = torch.autograd.grad(self.pooled, self.tokens, share)
        return self.tokens.detach() * gradient


def stable_ratio(a: Tensor, d: Tensor) -> Tensor:
    """Return ``a / (d + 1e-9 sign(d))``, with 0 taken as positive."""
    return a / (d + torch.where(d < 0, -1e-9, 1e-9))


def through_linear(linear: nn.Linear, x: Tensor, above: Tensor) -> Tensor:
    """Return the relevance of ``x`` [..., in] from that of the output [..., out]."""
    weight = linear.weight.detach()
    positive, negative = weight.clamp(min=0), weight.clamp(max=0)
    up, down = x.clamp(min=0), x.clamp(max=0)
    share = stable_ratio(above, up @ positive.T + down @ negative.T)
    return up * (share @ positive) + down * (share @ negative)


def through_sum(a: Tensor, b: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """Return the relevances of both terms [B, ...] of a sum."""
    share = stable_ratio(above, a + b)
    return _balanced(a * share, b * share, above)


def through_product(p: Tensor, q: Tensor, y: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """Return the relevances of both factors of ``y = p @ q``, [B, ..., n, d] and [B, ..., d, m]."""
    share = stable_ratio(above, y)
    return _balanced(p * (share @ q.transpose(-2, -1)), q * (p.transpose(-2, -1) @ share), above)


def _balanced(a: Tensor, b: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """Scale two relevances, image by image, so that they sum to that of ``above``."""
    total_a, total_b = a.flatten(1).sum(1), b.flatten(1).sum(1)
    size_a, size_b = total_a.abs(), total_b.abs()
    share = above.flatten(1).sum(1) / (size_a + size_b).clamp(min=1e-30)

    def scaled(relevance: Tensor, total: Tensor, size: Tensor) -> Tensor:
        factor = size * share * stable_ratio(torch.ones_like(total), total)
        return relevance * factor.view(-1, *[1] * (relevance.ndim - 1))

    return scaled(a, total_a, size_a), scaled(b, total_b, size_b)


def _into_heads(x: Tensor, like: Tensor) -> Tensor:
    """Return ``x`` [B, N, D] as [B, heads, N, d]."""
    return x.unflatten(2, (like.shape[1], -1)).transpose(1, 2)


def _head(model: LoadedModel) -> str:
    head = model.adapter.head(model.module)
    if not isinstance(head, nn.Linear):
        raise NotApplicableError(f"{model.name} has no Linear as its head, so that no class has relevance")
    return next(name for name, module in model.module.named_modules() if module is head)


def _norms(model: LoadedModel, block_name: str) -> tuple[str, str]:
    """Return the names within a block of the norms in front of its attention and of its MLP."""
    block = model.module.get_submodule(block_name)
    groups = model.adapter.scale_groups(block)
    norms = [
        group.previous for group in groups if isinstance(block.get_submodule(group.previous), nn.LayerNorm)
    ]
    if len(norms) != 2:
        raise NotApplicableError(f"{block_name} of {model.name} is no pre-norm block with two LayerNorms")
    return norms[0], norms[1]


def _mlp(model: LoadedModel, block_name: str, layout: Layout) -> tuple[str, str]:
    """Return the full names of the two Linears of a block's MLP."""
    block = model.module.get_submodule(block_name)
    inside = [name for name in model.adapter.linears(block) if not name.startswith(f"{layout.attention}.")]
    if len(inside) != 2:
        raise NotApplicableError(f"the MLP of {block_name} of {model.name} has not two Linears")
    return f"{block_name}.{inside[0]}", f"{block_name}.{inside[1]}"
