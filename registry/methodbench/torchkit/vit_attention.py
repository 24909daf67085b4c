"""Attention of vision transformers with its two matrix products as modules of their own.

timm's attention calls a fused kernel, inside which queries, keys, probabilities and values cannot be read or
replaced. :class:`ExplicitAttention` computes the same function step by step::

    A = softmax(matmul1(q, k^T) * scale + mask),    out = proj(gate(x) * norm(matmul2(A, v)))

:class:`ExplicitWindowAttention` does so for the windows of Swin, where queries are scaled first and logits have a bias
per relative position.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.model import set_submodule

_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
_ARGUMENTS = {"x", "attn_mask", "is_causal"}
_WINDOW_PARTS = {"qkv", "attn_drop", "softmax", "proj", "proj_drop"}
_WINDOW_TENSORS = {"relative_position_bias_table", "relative_position_index"}


class MatMul(nn.Module):
    """``a @ b``: a place for a method to put its own product."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the product of ``a`` [..., n, d] and ``b`` [..., d, m]."""
        return a @ b


class ExplicitAttention(nn.Module):
    """Self-attention whose products are the submodules ``matmul1`` and ``matmul2``.

    It takes over the submodules of the attention that it replaces, under their names; see
    :func:`explicit_attention`.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads = int(attention.num_heads)
        self.scale = float(attention.scale)
        self.width = int(attention.qkv.out_features) // 3
        self.matmul1: nn.Module = MatMul()
        self.matmul2: nn.Module = MatMul()
        self.qkv: nn.Module = attention.qkv
        self.q_norm = _part(attention, "q_norm")
        self.k_norm = _part(attention, "k_norm")
        self.attn_drop = _part(attention, "attn_drop")
        self.norm = _part(attention, "norm")
        self.gate: nn.Module | None = getattr(attention, "gate", None)
        self.proj: nn.Module = attention.proj
        self.proj_drop = _part(attention, "proj_drop")
        self.train(attention.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the attention's output [B, N, out] for tokens ``x`` [B, N, D].

        Args:
            attn_mask: broadcasts to [B, heads, N, N]; bool (True takes part) or a float that is added to the
                logits.
            is_causal: also hide the later tokens from each token.
        """
        batch, tokens, _ = x.shape
        q, k, v = self._heads(self.qkv(x))
        logits = self._logits(q, k)
        probabilities = self.attn_drop(_masked(logits, attn_mask, is_causal).softmax(dim=-1))
        out = self.matmul2(probabilities, v).transpose(1, 2).reshape(batch, tokens, self.width)
        out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def probabilities(self, qkv: Tensor) -> Tensor:
        """Return A [B, heads, N, N] from the output [B, N, 3 D] of the query-key-value layer, without a mask."""
        q, k, _ = self._heads(qkv)
        return self._logits(q, k).softmax(dim=-1)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = qkv.shape
        q, k, v = qkv.reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v

    def _logits(self, q: Tensor, k: Tensor) -> Tensor:
        return self.matmul1(q, k.transpose(-2, -1)) * self.scale


class ExplicitWindowAttention(ExplicitAttention):
    """Self-attention within windows, as Swin has it; see :func:`explicit_attention`."""

    relative_position_index: Tensor

    def __init__(self, attention: Any) -> None:
        super().__init__(attention)
        self.relative_position_bias_table = attention.relative_position_bias_table
        self.register_buffer("relative_position_index", attention.relative_position_index, persistent=False)

    def forward(  # type: ignore[override]
        self, x: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return the attention's output [windows * B, N, out] for tokens ``x`` [windows * B, N, D].

        Args:
            mask: [windows, N, N], added to the logits.
        """
        windows, tokens, _ = x.shape
        q, k, v = self._heads(self.qkv(x))
        logits = self.matmul1(q * self.scale, k.transpose(-2, -1)) + self._bias(tokens)
        if mask is not None:
            logits = (logits.unflatten(0, (-1, len(mask))) + mask.unsqueeze(1)).flatten(0, 1)
        probabilities = self.attn_drop(logits.softmax(dim=-1))
        out = self.matmul2(probabilities, v).transpose(1, 2).reshape(windows, tokens, self.width)
        return self.proj_drop(self.proj(out))

    def _bias(self, tokens: int) -> Tensor:
        """Return [heads, N, N]."""
        rows = self.relative_position_bias_table[self.relative_position_index.flatten()]
        return rows.view(tokens, tokens, -1).permute(2, 0, 1)


def explicit_attention(attention: nn.Module, name: str = "the attention") -> ExplicitAttention:
    """Return the explicit form of timm's ``Attention`` or ``WindowAttention``; it shares the submodules.

    Raises:
        NotApplicableError: another kind of attention: rotary embeddings, separate query and key layers, or
            anything else that changes the function.
    """
    parts = {part for part, _ in attention.named_children()}
    arguments = set(inspect.signature(attention.forward).parameters)
    own = {
        name
        for part in (attention.named_parameters(recurse=False), attention.named_buffers(recurse=False))
        for name, _ in part
    }
    explicit: ExplicitAttention | None = None
    if {"qkv", "proj"} <= parts <= _PARTS and arguments <= _ARGUMENTS and not own:
        explicit = ExplicitAttention(attention)
    elif {"qkv", "proj"} <= parts <= _WINDOW_PARTS and arguments == {"x", "mask"} and own == _WINDOW_TENSORS:
        explicit = ExplicitWindowAttention(attention)
    if explicit is not None and _agree(attention, explicit):
        return explicit
    raise NotApplicableError(
        f"{name} ({type(attention).__name__}) is not plain self-attention with one query-key-value layer",
        "Attention as in ViT, DeiT, DINOv2 and Swin is supported.",
    )


def use_explicit_attention(module: nn.Module, adapter: Adapter) -> dict[str, ExplicitAttention]:
    """Replace the attention of every block of ``module``, in place.

    Returns:
        The replacements by full dotted name, in order of the blocks.

    Raises:
        NotApplicableError: the blocks have no attention, or one of another kind.
    """
    if adapter.layout is None:
        raise NotApplicableError(f"the blocks of {type(module).__name__} have no attention")
    replaced = {}
    for block_name in adapter.block_names(module):
        name = f"{block_name}.{adapter.layout.attention}"
        replaced[name] = explicit_attention(module.get_submodule(name), name)
        set_submodule(module, name, replaced[name])
    return replaced


@contextmanager
def recorded_attention(module: nn.Module, adapter: Adapter) -> Iterator[dict[str, Tensor]]:
    """Keep the attention probabilities of forward passes inside the ``with`` block, block by block.

    They are computed beside the model's own attention, which may be a fused kernel, from what its
    query-key-value layer returns; the model stays as it is.

    Yields:
        [B, heads, N, N] of the last pass by the attention's dotted name, in order of the blocks.

    Raises:
        NotApplicableError: the blocks have no attention, or one of another kind.
    """
    if adapter.layout is None:
        raise NotApplicableError(f"the blocks of {type(module).__name__} have no attention")
    held: dict[str, Tensor] = {}

    def keep(name: str, attention: ExplicitAttention, qkv: Tensor) -> None:
        held[name] = attention.probabilities(qkv)

    names = [f"{block}.{adapter.layout.attention}" for block in adapter.block_names(module)]
    explicit = [explicit_attention(module.get_submodule(name), name) for name in names]
    if any(isinstance(attention, ExplicitWindowAttention) for attention in explicit):
        raise NotApplicableError(f"{type(module).__name__} attends within windows, not from token to token")
    handles = [
        attention.qkv.register_forward_hook(
            lambda _module, _args, qkv, name=name, attention=attention: keep(name, attention, qkv)
        )
        for name, attention in zip(names, explicit, strict=True)
    ]
    try:
        yield held
    finally:
        for handle in handles:
            handle.remove()


def _part(attention: nn.Module, name: str) -> nn.Module:
    """Return a submodule, or the identity where this version or configuration of the attention lacks it."""
    part: nn.Module | None = getattr(attention, name, None)
    return nn.Identity() if part is None else part


def _masked(logits: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    if is_causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(later, -torch.inf)
    return logits


def _agree(attention: nn.Module, explicit: ExplicitAttention) -> bool:
    """Whether both give the same on one probe: equal names do not make an equal function."""
    weight = explicit.qkv.get_parameter("weight")
    tokens = int(getattr(attention, "window_area", 3))
    probe = torch.linspace(-2, 2, tokens * weight.shape[1], dtype=torch.float64).sin()
    probe = probe.view(1, tokens, -1).to(weight)
    coarse = torch.finfo(weight.dtype).eps ** 0.5
    with torch.no_grad():
        expected, actual = attention(probe), explicit(probe)
    atol = coarse * float(expected.abs().max())
    return torch.allclose(actual, expected, rtol=coarse, atol=atol, equal_nan=True)
