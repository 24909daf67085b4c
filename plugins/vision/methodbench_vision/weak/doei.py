"""DOEI.

Zhu et al., DOEI: Dual Optimization of Embedding Information for Attention-Enhanced Class Activation Maps (2502.15885,
2025). In a transformer with one token per class, classes that come together share their attention. Without any
parameter, the forward pass amplifies what is confidently one class's and suppresses the rest: patches (PPDO) and the
class tokens' attention to them (CPDO), where confidence is spread between patches alike in colour, embedding and
attention (HFA).

No code was published, and the exact equations were not at hand: this is a reading of the abstract and of a public
summary. In each of the last n blocks, with a the class-to-patch attention of the present classes::

    w    = l1 exp(-|rgb_i - rgb_j|^2 / s) + l2 relu(cos(x_i, x_j)) + l3 A_ij          each of the three row-normalized
    c    = min-max(w min-max(a))
    PPDO   x_i  *= 1 + g where max_k c_ki > hi, 1 - g where it is < lo
    CPDO   a_ki *= 1 + g where k wins and c_ki > hi, 1 - g where another wins or c_ki < lo; rows sum to 1 again
    g      grows linearly to g_max over the n blocks

The host is MCTformer's (Xu et al., CVPR 2022): scores from class tokens and from the patches' maps, each with a soft
margin loss, and seeds fused from both. ``gain=0`` is the host, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench_vision.weak.cam_seeds import classification
from methodbench_vision.weak.networks import Adjust, Attended, ClassTokenViT, fused, scaled
from methodbench_vision.weak.training import (
    BatchSize,
    Epochs,
    PeakRate,
    Seeds,
    Threshold,
    fit,
    given,
    one_hot,
    seeded,
)


@hyperparameters
class DOEI:
    """Amplifies confident tokens and suppresses the others, for patches and for class tokens."""

    blocks: Annotated[int, Field(ge=1, le=64, description="n, last blocks that are changed")] = 3
    high: Annotated[float, Field(ge=0, le=1, description="confidence above which tokens are amplified")] = 0.7
    low: Annotated[float, Field(ge=0, le=1, description="confidence below which tokens are suppressed")] = 0.3
    gain: Annotated[float, Field(ge=0, lt=1, description="g_max of the last block; 0 is the host alone")] = (
        0.2
    )
    colour: Annotated[float, Field(ge=0, le=1, description="l1, weight of equal colours")] = 1 / 3
    embedding: Annotated[float, Field(ge=0, le=1, description="l2, weight of similar embeddings")] = 1 / 3
    attention: Annotated[float, Field(ge=0, le=1, description="l3, weight of attention between patches")] = (
        1 / 3
    )
    colour_scale: Annotated[
        float,
        Field(gt=0, le=100, description="s, squared distance of normalized colours that counts as alike"),
    ] = 1.0
    last: Annotated[int, Field(ge=1, le=64, description="last blocks whose attention makes seeds")] = 3
    spread: Annotated[bool, Field(description="spread seeds by the attention between patches")] = False
    epochs: Epochs = 10
    batch_size: BatchSize = 50
    peak_rate: PeakRate = 2e-3
    threshold: Threshold = 0.3

    def fit(self, weak_labels: Mapping[str, Any], ctx: Context) -> Seeds:
        """Train on ``images`` [N, 3, H, W] and ``labels`` [N] or [N, K].

        Raises:
            NotApplicableError: there are no labels.
        """
        images, labels = given(weak_labels, "labels", "DOEI")
        present = one_hot(labels).bool()
        with seeded(ctx):
            net = ClassTokenViT(present.shape[1], (images.shape[2], images.shape[3]))

            def loss_of(batch: Tensor) -> Tensor:
                found = net(images[batch], self.adjustment(net, images[batch], present[batch]))
                target = labels[batch]
                return classification(found.tokens, target) + classification(found.maps.mean((2, 3)), target)

            fit(
                net, images, loss_of,
                epochs=self.epochs, batch_size=self.batch_size, peak_rate=self.peak_rate, ctx=ctx,
            )  # fmt: skip

        several = labels.ndim == 2

        def read(x: Tensor) -> tuple[Tensor, Tensor]:
            found = net(x)
            if self.gain:
                # Of a new picture the classes are those that the unchanged pass sees.
                score = scores(found)
                seen = F.one_hot(score.argmax(1), score.shape[1]).bool() | ((score > 0) & several)
                found = net(x, self.adjustment(net, x, seen))
            return fused(found, self.last, spread=self.spread), scores(found)

        return Seeds(read, self.threshold, several)

    def adjustment(self, net: ClassTokenViT, x: Tensor, present: Tensor) -> Adjust | None:
        """Return what changes the attention for images ``x`` that show the classes ``present``, bool [B, K]."""
        if not self.gain:
            return None
        rgb = F.adaptive_avg_pool2d(x, net.grid).flatten(2).transpose(1, 2)
        first = max(0, len(net.blocks) - self.blocks)

        def adjust(number: int, attention: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
            if number < first:
                return attention, None
            gain = self.gain * (number - first + 1) / (len(net.blocks) - first)
            classes = present.shape[1]
            mean = attention.detach().mean(1)
            affinity = self.affinity(rgb, tokens.detach()[:, classes:], mean[:, classes:, classes:])
            c = confidence(mean[:, :classes, classes:], affinity, present)
            return class_wise(attention, c, gain, self.high, self.low), patch_wise(
                c, gain, self.high, self.low
            )

        return adjust

    def affinity(self, rgb: Tensor, x: Tensor, attention: Tensor) -> Tensor:
        """Return w [B, N, N], whose rows sum to 1 (HFA).

        Args:
            rgb: colours of the patches [B, N, 3].
            x: their embeddings [B, N, D].
            attention: between them [B, N, N].
        """
        unit = F.normalize(x, dim=2)
        parts = (
            (self.colour, (-torch.cdist(rgb, rgb).square() / self.colour_scale).exp()),
            (self.embedding, (unit @ unit.transpose(1, 2)).clamp_min(0)),
            (self.attention, attention),
        )
        weight = max(self.colour + self.embedding + self.attention, 1e-12)
        return torch.stack([share / weight * rows(part) for share, part in parts]).sum(0)


def scores(found: Attended) -> Tensor:
    """Return the scores of classes [B, K], the mean of class tokens and patches."""
    return (found.tokens + found.maps.mean((2, 3))) / 2


def rows(affinity: Tensor) -> Tensor:
    """Scale the rows of [B, N, N] to a sum of 1."""
    return affinity / affinity.sum(-1, keepdim=True).clamp_min(1e-12)


def confidence(looked: Tensor, affinity: Tensor, present: Tensor) -> Tensor:
    """Return c [B, K, N] in [0, 1], zero for classes that are not present.

    Args:
        looked: class-to-patch attention [B, K, N].
        affinity: w [B, N, N].
        present: bool [B, K].
    """
    return scaled(scaled(looked) @ affinity.transpose(1, 2)) * present[:, :, None]


def patch_wise(c: Tensor, gain: float, high: float, low: float) -> Tensor:
    """Return the factors [B, K + N, 1] of the tokens; those of class tokens are 1 (PPDO)."""
    p = c.amax(1)
    factor = 1 + gain * ((p > high).to(c) - (p < low).to(c))
    return torch.cat([factor.new_ones(c.shape[:2]), factor], 1)[:, :, None]


def class_wise(attention: Tensor, c: Tensor, gain: float, high: float, low: float) -> Tensor:
    """Return the attention [B, heads, K + N, K + N] with changed class rows, whose sums stay 1 (CPDO)."""
    classes = c.shape[1]
    best = c.amax(1, keepdim=True)
    wins = c == best
    factor = 1 + gain * ((wins & (c > high)).to(c) - (~wins | (c < low)).to(c))
    looked = attention[:, :, :classes]
    looked = torch.cat([looked[..., :classes], looked[..., classes:] * factor[:, None]], -1)
    return torch.cat([looked / looked.sum(-1, keepdim=True), attention[:, :, classes:]], 2)
