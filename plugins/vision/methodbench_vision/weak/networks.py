"""Small networks of methods that learn from weak labels, trained from scratch in a minute."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from methodbench.errors import ParameterError


class SmallCNN(nn.Module):
    """Four times convolution, batch norm and ReLU, of which the last is the tail; a map per class.

    Maps have a quarter of the picture's side. The score of a class is the mean of its map: a network that ends in
    global average pooling and one Linear, with the Linear before the pooling.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(stage(3, 24, stride=2), stage(24, 48), stage(48, 48, stride=2))
        self.tail = stage(48, 72)
        self.classify = nn.Conv2d(72, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to the maps of classes [B, K, H / 4, W / 4]."""
        maps: Tensor = self.classify(self.tail(self.stem(x)))
        return maps


def stage(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """Return a 3 x 3 convolution with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class Attended(NamedTuple):
    """What a transformer with a token per class comes to."""

    tokens: Tensor
    """Scores of classes from their tokens [B, K]."""
    maps: Tensor
    """Maps of classes from the patches [B, K, h, w]."""
    attention: tuple[Tensor, ...]
    """Per block, the mean over heads [B, K + N, K + N]; class tokens come first."""


#: Changes the attention [B, heads, K + N, K + N] of block 0, 1, ... given the tokens behind the norm [B, K + N, D];
#: returns it with a factor [B, K + N, 1] for the values of each token, or None for no factor.
Adjust = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor | None]]


class ClassTokenViT(nn.Module):
    """A vision transformer with one token per class, as in MCTformer; a patch has 8 x 8 pixels.

    Three strided convolutions make the patches, since a transformer of this size learns no edges from two thousand
    pictures. The score of a class token is its mean; a 3 x 3 convolution turns the patches into a map per class.
    """

    PATCH = 8

    #: Height and width that it is bound to.
    size: tuple[int, int]

    def __init__(
        self, classes: int, size: tuple[int, int], width: int = 64, depth: int = 3, heads: int = 4
    ) -> None:
        super().__init__()
        if size[0] % self.PATCH or size[1] % self.PATCH:
            raise ParameterError(
                f"pictures of {size[0]} x {size[1]} pixels do not divide into patches of {self.PATCH} x {self.PATCH}",
                "Crop or resize the pictures.",
            )
        self.size = size
        self.grid = (size[0] // self.PATCH, size[1] // self.PATCH)
        self.embed = nn.Sequential(
            stage(3, 24, stride=2), stage(24, 48, stride=2), nn.Conv2d(48, width, 3, stride=2, padding=1)
        )
        self.class_tokens = nn.Parameter(0.02 * torch.randn(1, classes, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.grid[0] * self.grid[1], width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Conv2d(width, classes, 3, padding=1)

    def forward(self, x: Tensor, adjust: Adjust | None = None) -> Attended:
        """Map images [B, 3, H, W] to scores, maps and attention, the attention changed by ``adjust``.

        Raises:
            ParameterError: the images have another size than those that it was made for.
        """
        if tuple(x.shape[2:]) != self.size:
            raise ParameterError(
                f"pictures have {x.shape[2]} x {x.shape[3]} pixels, the network takes {self.size[0]} x {self.size[1]}"
            )
        classes = self.class_tokens.shape[1]
        patches = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        tokens = torch.cat([self.class_tokens.expand(len(x), -1, -1), patches], 1)
        attention = []
        for number, block in enumerate(self.blocks):
            tokens, looked = block(tokens, number, adjust)
            attention.append(looked)
        tokens = self.norm(tokens)
        maps = self.classify(tokens[:, classes:].transpose(1, 2).unflatten(2, self.grid))
        return Attended(tokens[:, :classes].mean(2), maps, tuple(attention))


class Block(nn.Module):
    """Self-attention whose probabilities can be changed, and two linear layers, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor, number: int, adjust: Adjust | None) -> tuple[Tensor, Tensor]:
        """Return the tokens [B, T, D] behind the block and the head-mean of its attention [B, T, T]."""
        h = self.norm1(tokens)
        q, k = (part(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k))
        attention = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
        if adjust is not None:
            attention, factor = adjust(number, attention, h)
            # Behind the norm: a factor on the whole token before it would be divided out again.
            h = h if factor is None else h * factor
        v = self.v(h).unflatten(2, (self.heads, -1)).transpose(1, 2)
        tokens = tokens + self.proj((attention @ v).transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm2(tokens)), attention.mean(1)


def fused(found: Attended, last: int, *, spread: bool = False) -> Tensor:
    """Return MCTformer's seeds [B, K, h, w]: the root of class-to-patch attention times map, both scaled to [0, 1].

    Args:
        found: of a forward pass.
        last: blocks, from the last one on, whose class-to-patch attention is averaged.
        spread: multiply by the attention between patches, summed over blocks, as the host does. In a network this
            small, whose patches do not attend to their like, that blurs the seeds beyond use.
    """
    classes = found.maps.shape[1]
    looked = torch.stack(found.attention[-last:]).mean(0)[:, :classes, classes:]
    seeds = (scaled(looked) * scaled(found.maps.flatten(2))).sqrt()
    if spread:
        seeds = seeds @ torch.stack(found.attention).sum(0)[:, classes:, classes:].transpose(1, 2)
    return scaled(seeds).unflatten(2, (found.maps.shape[2], found.maps.shape[3]))


def scaled(values: Tensor) -> Tensor:
    """Scale the last dimension to [0, 1]; what is constant becomes zero."""
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    return (values - low) / (high - low).clamp_min(1e-12)
