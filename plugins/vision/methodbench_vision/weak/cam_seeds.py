"""The base of weakly supervised methods: a classifier, and the class activation maps that come with it.

Every method here must beat it on the same network, the same steps and the same seed::

    M = classify(features)        s_k = mean_ij M_kij        L = cross-entropy (several classes: soft margin)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench_vision.weak.networks import SmallCNN
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
class CamSeeds:
    """Class activation maps of a plain classifier."""

    epochs: Epochs = 6
    batch_size: BatchSize = 50
    peak_rate: PeakRate = 4e-3
    threshold: Threshold = 0.3

    def fit(self, weak_labels: Mapping[str, Any], ctx: Context) -> Seeds:
        """Train on ``images`` [N, 3, H, W] and ``labels`` [N] or [N, K].

        Raises:
            NotApplicableError: there are no labels.
        """
        images, labels = given(weak_labels, "labels", "CamSeeds")
        several = labels.ndim == 2
        with seeded(ctx):
            net = SmallCNN(one_hot(labels).shape[1])
            fit(
                net, images,
                lambda batch: classification(net(images[batch]).mean((2, 3)), labels[batch]),
                epochs=self.epochs, batch_size=self.batch_size, peak_rate=self.peak_rate, ctx=ctx,
            )  # fmt: skip

        def read(x: Tensor) -> tuple[Tensor, Tensor]:
            maps = net(x)
            return maps, maps.mean((2, 3))

        return Seeds(read, self.threshold, several)


def classification(score: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of scores [B, K] with labels [B], the soft margin loss with labels [B, K]."""
    if labels.ndim == 1:
        return F.cross_entropy(score, labels)
    return F.multilabel_soft_margin_loss(score, labels.to(score))
