"""A small decoder-only language model of characters, with the switches of the small-scale proxies (arXiv 2309.14322).

Pre-norm blocks without biases, rotary embeddings, GELU, an MLP of four times the width, untied embeddings; weights
start from normal deviates cut at two deviations, of deviation 1/sqrt(fan-in), embeddings of 1/sqrt(width).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Decoder(nn.Module):
    """Maps tokens [N, T] to logits [N, T, vocabulary]."""

    def __init__(
        self, vocabulary: int, *, width: int, depth: int, heads: int, qk_norm: bool, seed: int
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(vocabulary, width)
            self.blocks = nn.ModuleList(Block(width, heads, qk_norm) for _ in range(depth))
            self.norm = nn.LayerNorm(width, bias=False)
            self.head = nn.Linear(width, vocabulary, bias=False)
            for p in self.parameters():
                if p.ndim >= 2:
                    deviation = 1 / math.sqrt(p.shape[1])
                    nn.init.trunc_normal_(p, std=deviation, a=-2 * deviation, b=2 * deviation)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    @torch.no_grad()
    def largest_attention_logit(self, tokens: Tensor) -> float:
        """Return the largest absolute attention logit of any block on ``tokens``, before the mask."""
        x, largest = self.embedding(tokens), 0.0
        for block in self.blocks:
            assert isinstance(block, Block)
            q, k, _ = block.attention.projections(block.norms[0](x))
            largest = max(largest, float((q @ k.mT).abs().max() / math.sqrt(q.shape[-1])))
            x = block(x)
        return largest


class Block(nn.Module):
    """Causal attention and an MLP, each behind a norm and added to its input [N, T, width]."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)])
        self.attention = Attention(width, heads, qk_norm)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.activation = nn.GELU()
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        y: Tensor = x + self.down(self.activation(self.up(self.norms[1](x))))
        return y


class Attention(nn.Module):
    """Causal self-attention; with ``qk_norm``, queries and keys are normalized per head before they are rotated."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.q_scale, self.k_scale = (
            nn.Parameter(torch.ones(width // heads)) if qk_norm else None for _ in range(2)
        )

    def projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries and keys, and values, each [N, heads, T, width / heads]."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        if self.q_scale is not None and self.k_scale is not None:
            q, k = head_norm(q, self.q_scale), head_norm(k, self.k_scale)
        return rotate(q), rotate(k), v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projections(x)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


def head_norm(x: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Return ``x`` [..., d] normalized over its last dimension and scaled [d], without a bias."""
    return F.layer_norm(x, x.shape[-1:], weight=scale, eps=eps)


def attention_logits(q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Return logits [..., T, T] of normalized queries and keys [..., T, d], before mask and softmax.

    qk-layernorm of arXiv 2309.14322, section 3.1.1, without rotary embeddings.
    """
    return head_norm(q, q_scale, eps) @ head_norm(k, k_scale, eps).mT / math.sqrt(q.shape[-1])


def rotate(x: Tensor) -> Tensor:
    """Return ``x`` [..., T, d] with its halves rotated by angles that grow with the position (RoPE, base 10,000)."""
    half = x.shape[-1] // 2
    frequencies = 10_000 ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def z_loss(logits: Tensor) -> Tensor:
    """Return the mean squared logarithm of the softmax's normalizer over logits [..., V], in float32 at the least.

    It keeps output logits from drifting (arXiv 2309.14322, section 3.1.2); its usual weight is 1e-4.
    """
    precise = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(precise).logsumexp(-1).square().mean()


def token_loss(logits: Tensor, targets: Tensor, z: float = 0.0) -> Tensor:
    """Return the mean cross entropy of logits [N, T, V] for tokens [N, T], plus ``z`` times :func:`z_loss`."""
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    return loss + z * z_loss(logits) if z else loss
