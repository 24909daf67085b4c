"""BAS.

Wu et al., Background Activation Suppression for Weakly Supervised Object Localization, CVPR 2022 (2112.00580), and
its extension to segmentation, IJCV 2023 (2309.12943). A head on a middle feature map F draws a foreground map per
class. Cross-entropy is content long before that map covers the object; the *activation* of the class on what is
left of F behind the map keeps falling until the object is covered::

    M = sigmoid(conv(F))    z = classify(tail(F))    S_k = mean z_k           F_bg = sg(F) (1 - M_y)
    L_bas  = relu(S_bg) / (relu(sg(S_y)) + 1e-8)     S_bg: the same score of F_bg, through copies of tail and classifier
    L_area = mean M_y       L_frg = CE(mean(z pool(M_y)), y)
    L      = CE(S, y) + alpha L_frg + L_bas + beta L_area

L_bas is 0 where the background scores higher than the picture (segmentation: 1). The copies are made at every step
and take no update, so that the loss reaches M alone. The code of the extension (bd1bfa8) is followed; the rule of the
earlier code (54c395e) is ``rule="cvpr"``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

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
    seed_maps,
    seeded,
)

Rule = Literal["extension", "cvpr"]


@hyperparameters
class BAS:
    """Suppresses the activation of what the foreground map leaves over."""

    alpha: Annotated[float, Field(ge=0, le=100, description="weight of the foreground guidance")] = 0.5
    beta: Annotated[float, Field(ge=0, le=100, description="weight of the map's area")] = 1.5
    top_k: Annotated[
        int,
        Field(
            ge=1, le=1000, description="predicted classes whose maps are averaged, with one class per picture"
        ),
    ] = 1
    rule: Annotated[Rule, Field(description="which of the authors' codes the suppression follows")] = (
        "extension"
    )
    epochs: Epochs = 6
    batch_size: BatchSize = 50
    peak_rate: PeakRate = 4e-3
    threshold: Threshold = 0.3

    def fit(self, weak_labels: Mapping[str, Any], ctx: Context) -> Seeds:
        """Train on ``images`` [N, 3, H, W] and ``labels`` [N] (localization) or [N, K] (segmentation).

        Raises:
            NotApplicableError: there are no labels.
        """
        images, labels = given(weak_labels, "labels", "BAS")
        several = labels.ndim == 2
        classes = one_hot(labels).shape[1]
        with seeded(ctx):
            net = SmallCNN(classes)
            parts = Parts(net.stem, net.tail, net.classify, nn.Conv2d(48, classes, 3, padding=1))

            def loss_of(batch: Tensor) -> Tensor:
                x, y = images[batch], labels[batch]
                if several:
                    chosen = torch.multinomial(y.float().clamp_min(1e-12), 1)[:, 0]
                    step = suppress(parts, parts.stem(x), chosen, rule=self.rule, above=1.0, detached=True)
                    classified = against_negatives(step.score, y)
                else:
                    chosen = y
                    step = suppress(parts, parts.stem(x), chosen, rule=self.rule)
                    classified = F.cross_entropy(step.score, y)
                return loss(step, chosen, classified, self.alpha, self.beta)

            fit(
                nn.ModuleList(parts), images, loss_of,
                epochs=self.epochs, batch_size=self.batch_size, peak_rate=self.peak_rate, ctx=ctx,
            )  # fmt: skip

        def read(x: Tensor) -> tuple[Tensor, Tensor]:
            features = parts.stem(x)
            maps = parts.classify(parts.tail(features))
            scores, drawn = maps.mean((2, 3)), parts.localize(features).sigmoid()
            if several:
                size = (drawn.shape[2], drawn.shape[3])
                return seed_maps(drawn, size) + seed_maps(maps, size), scores
            found = foreground(drawn, scores, self.top_k)
            return min_max(found)[:, None].expand_as(drawn), scores

        return Seeds(read, self.threshold, several)


class Parts(NamedTuple):
    """A classifier that is cut at a middle feature map F, and the head that draws on F."""

    stem: nn.Module
    tail: nn.Module
    classify: nn.Module
    """From the tail's output to one map per class."""
    localize: nn.Module
    """From F to the logits of the foreground maps [B, K, h, w]."""


class Step(NamedTuple):
    """What the losses of one batch are made of."""

    score: Tensor
    """Logits [B, K]."""
    guided: Tensor
    """Logits of the foreground [B, K]."""
    bas: Tensor
    """[B]."""
    area: Tensor
    """[B]."""
    foreground: Tensor
    """M_y [B, 1, h, w]."""
    activation: Tensor
    """S_y [B]."""
    background: Tensor
    """S_bg [B]."""


def suppress(
    parts: Parts,
    features: Tensor,
    label: Tensor,
    *,
    rule: Rule = "extension",
    above: float = 0.0,
    detached: bool = False,
) -> Step:
    """Take one forward pass and one on the background (section 3.2).

    Args:
        parts: the network.
        features: F = stem(x) [B, C, h, w].
        label: class whose map is drawn, int64 [B].
        rule: ``extension`` cuts both activations off at zero; ``cvpr`` does not.
        above: L_bas where the background scores higher than the picture: 0 for localization, 1 for segmentation.
        detached: keep the gradient of the foreground guidance from the classifier, as segmentation does.
    """
    maps = parts.classify(parts.tail(features))
    score = maps.mean((2, 3))
    drawn = parts.localize(features).sigmoid()
    index = label[:, None]
    chosen = drawn[torch.arange(len(drawn), device=drawn.device), label][:, None]

    frozen = [copy.deepcopy(part).requires_grad_(False) for part in (parts.tail, parts.classify)]
    behind = frozen[1](frozen[0](features.detach() * (1 - chosen))).mean((2, 3)).gather(1, index)[:, 0]
    whole = score.gather(1, index)[:, 0]
    if rule == "extension":
        ratio = behind.relu() / (whole.detach().relu() + 1e-8)
        over = behind > whole
    else:
        ratio = behind / (whole.detach() + 1e-8)
        over = behind >= whole
    ratio = torch.where(over, above, ratio)

    pooled = F.adaptive_avg_pool2d(chosen, (maps.shape[2], maps.shape[3]))
    guided = ((maps.detach() if detached else maps) * pooled).mean((2, 3))
    return Step(score, guided, ratio, chosen.mean((1, 2, 3)), chosen, whole, behind)


def loss(step: Step, label: Tensor, classified: Tensor, alpha: float, beta: float) -> Tensor:
    """Return L, a scalar; ``classified`` is the loss of classification."""
    guidance = F.cross_entropy(step.guided, label)
    return classified + alpha * guidance + step.bas.mean() + beta * step.area.mean()


def against_negatives(score: Tensor, present: Tensor) -> Tensor:
    """Return the sum over present classes of CE([its logit, all absent classes' logits], first), per picture.

    Args:
        score: logits [B, K].
        present: bool [B, K].
    """
    absent = score.masked_fill(present.bool(), -torch.inf).logsumexp(1, keepdim=True)
    return (F.softplus(absent - score) * present).sum() / len(score)


def foreground(drawn: Tensor, score: Tensor, top_k: int) -> Tensor:
    """Return the mean [B, h, w] of the foreground maps [B, K, h, w] of the classes with the highest scores [B, K]."""
    best = score.topk(min(top_k, score.shape[1]), dim=1).indices
    return drawn.gather(1, best[:, :, None, None].expand(-1, -1, *drawn.shape[2:])).mean(1)


def min_max(maps: Tensor) -> Tensor:
    """Scale each map [B, h, w] to [0, 1], its range lengthened by 1e-5."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low + 1e-5)


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps [B, h, w], scaled to [0, 1] and resized to ``size``."""
    return F.interpolate(min_max(maps)[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def largest_box(one: np.ndarray, threshold: float) -> np.ndarray:
    """Return the box x0, y0, x1, y1 (ends exclusive) of the largest 8-connected part above ``threshold``.

    Where nothing of the map [H, W] lies above it, the whole picture.
    """
    from skimage.measure import label

    parts = label(one > threshold)
    counts = np.bincount(parts.ravel())[1:]
    if not len(counts):
        return np.array([0, 0, one.shape[1], one.shape[0]], dtype=np.int64)
    rows, columns = np.nonzero(parts == counts.argmax() + 1)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=np.int64)
