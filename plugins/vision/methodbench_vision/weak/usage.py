"""USAGE.

Peng et al., USAGE: A Unified Seed Area Generation Paradigm for Weakly Supervised Semantic Segmentation, ICCV 2023
(2303.07806). Maps of convolutional networks cover too little, those of transformers too much. One loss pools the map
of a class to its score under a temperature that sets the extent; another asks the seeds of two views to agree, of
which the second comes from the same network with its habits disturbed.

The paper's code is not to be had and its formulas were not at hand: this is a reading of the abstract and of the
host's code. It follows the stated principle, not the published equations::

    s_k   = sum_i softmax_i(M_k / tau) M_ki         tau -> 0: the maximum; tau -> inf: the mean
    L_gen = soft margin(s, y)                       large tau: wide seeds; small tau: narrow ones
    L_reg = mean |P - P'|                           P = relu(M) / max, background 1 - max_k P
    L     = L_gen + lambda L_reg

The second view is the picture shifted around its edges, since classes that differ by an orientation allow neither
mirror nor scale. Its network damps, in a CNN, the features where the map is high; in a transformer, the class's
attention where it is low.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench_vision.weak.cam_seeds import classification
from methodbench_vision.weak.networks import ClassTokenViT, SmallCNN, fused
from methodbench_vision.weak.training import (
    SEED_EPSILON,
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
class USAGE:
    """Sets the extent of seeds by a temperature, and their reliability by agreement of two views."""

    network: Annotated[Literal["cnn", "vit"], Field(description="what is trained")] = "cnn"
    temperature: Annotated[
        float, Field(gt=0, le=1e9, description="tau: large pools by the mean, small by the maximum")
    ] = 3.0
    consistency: Annotated[float, Field(ge=0, le=100, description="lambda, weight of the agreement")] = 1.0
    warm_up: Annotated[
        float,
        Field(ge=0, le=1, description="share of the epochs without agreement, and with tau of at least 1"),
    ] = 0.3
    deviations: Annotated[
        float,
        Field(ge=-5, le=5, description="standard deviations above a map's mean where the CNN is damped"),
    ] = 1.0
    damping: Annotated[float, Field(ge=0, le=1, description="share that the damped parts lose")] = 0.5
    shift: Annotated[
        int, Field(ge=0, le=1024, description="pixels, rounded down to whole cells of the map")
    ] = 8
    last: Annotated[int, Field(ge=1, le=64, description="last blocks whose attention makes seeds")] = 3
    spread: Annotated[bool, Field(description="spread seeds by the attention between patches")] = False
    epochs: Epochs = 6
    batch_size: BatchSize = 50
    peak_rate: PeakRate = 4e-3
    threshold: Threshold = 0.3

    def fit(self, weak_labels: Mapping[str, Any], ctx: Context) -> Seeds:
        """Train on ``images`` [N, 3, H, W] and ``labels`` [N] or [N, K].

        Raises:
            NotApplicableError: there are no labels.
        """
        images, labels = given(weak_labels, "labels", "USAGE")
        present = one_hot(labels)
        classes, size = present.shape[1], (images.shape[2], images.shape[3])
        tau, weight = self.temperature, self.consistency

        def schedule(epoch: int) -> None:
            nonlocal tau, weight
            early = epoch < self.warm_up * self.epochs
            tau = max(self.temperature, 1.0) if early else self.temperature
            weight = 0.0 if early else self.consistency

        with seeded(ctx):
            net = SmallCNN(classes) if self.network == "cnn" else ClassTokenViT(classes, size)

            def loss_of(batch: Tensor) -> Tensor:
                x, y = images[batch], labels[batch]
                maps, tokens = self._maps(net, x)
                total = classification(pooled(maps, tau), y)
                if tokens is not None:
                    total = total + classification(tokens, y)
                if weight:
                    disturbed = self._disturbed(net, x, maps.detach(), present[batch])
                    total = total + weight * disagreement(maps, disturbed, present[batch])
                return total

            fit(
                net, images, loss_of, epochs=self.epochs, batch_size=self.batch_size,
                peak_rate=self.peak_rate, ctx=ctx, every_epoch=schedule,
            )  # fmt: skip

        def read(x: Tensor) -> tuple[Tensor, Tensor]:
            if isinstance(net, SmallCNN):
                maps = net(x)
                return maps, pooled(maps, self.temperature)
            found = net(x)
            return fused(found, self.last, spread=self.spread), (
                found.tokens + pooled(found.maps, self.temperature)
            ) / 2

        return Seeds(read, self.threshold, labels.ndim == 2)

    def _maps(self, net: SmallCNN | ClassTokenViT, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the maps [B, K, h, w], and the scores of class tokens where there are any."""
        if isinstance(net, SmallCNN):
            return net(x), None
        found = net(x)
        return found.maps, found.tokens

    def _disturbed(self, net: SmallCNN | ClassTokenViT, x: Tensor, maps: Tensor, present: Tensor) -> Tensor:
        """Return the maps of the shifted pictures by the disturbed network, shifted back."""
        cell = x.shape[3] // maps.shape[3]
        cells = self.shift // cell
        moved = x.roll((cells * cell, cells * cell), (2, 3))
        if isinstance(net, SmallCNN):
            high = confident(maps, present, self.deviations).roll((cells, cells), (2, 3))
            found: Tensor = net.classify(net.tail(net.stem(moved) * (1 - self.damping * high)))
        else:
            found = net(moved, self._narrow).maps
        return found.roll((-cells, -cells), (2, 3))

    def _narrow(self, number: int, attention: Tensor, tokens: Tensor) -> tuple[Tensor, None]:
        """Damp where a token's attention lies below its mean, keeping sums of one."""
        low = attention < attention.mean(-1, keepdim=True)
        damped = torch.where(low, attention * (1 - self.damping), attention)
        return damped / damped.sum(-1, keepdim=True), None


def pooled(maps: Tensor, tau: float) -> Tensor:
    """Return s [B, K] of maps [B, K, h, w]: between mean and maximum, falling with ``tau``."""
    flat = maps.flatten(2)
    return ((flat / tau).softmax(2) * flat).sum(2)


def seeds(maps: Tensor) -> Tensor:
    """Return P [B, K, h, w] in [0, 1], maps cut off at zero and divided by their maximum."""
    positive = maps.relu()
    return positive / (positive.amax((2, 3), keepdim=True) + SEED_EPSILON)


def confident(maps: Tensor, present: Tensor, deviations: float) -> Tensor:
    """Return 1 where the seed of a present class exceeds mean + deviations * sd of its own: [B, 1, h, w]."""
    found = seeds(maps)
    bar = found.mean((2, 3), keepdim=True) + deviations * found.std((2, 3), keepdim=True)
    return ((found > bar) & present.bool()[:, :, None, None]).any(1, keepdim=True).to(maps)


def disagreement(maps: Tensor, other: Tensor, present: Tensor) -> Tensor:
    """Return L_reg: the mean difference of two views' seeds over present classes and background.

    Args:
        maps: [B, K, h, w].
        other: the same of the other view.
        present: [B, K].
    """
    first, second = (seeds(one) * present[:, :, None, None] for one in (maps, other))
    classes = (first - second).abs().mean((2, 3)).sum(1)
    back = (first.amax(1) - second.amax(1)).abs().mean((1, 2))
    return ((classes + back) / (present.sum(1) + 1)).mean()
