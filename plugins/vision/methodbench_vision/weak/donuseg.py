"""DoNuSeg.

Wang et al., Dynamic Pseudo Label Optimization in Point-Supervised Nuclei Segmentation, MICCAI 2024 (2406.16427). One
point per nucleus makes first labels that are wrong at the borders. While the network trains, class activation maps
of all blocks of its encoder are compared with these labels, picture by picture, and the best block's map becomes the
label (DCS); a contrastive loss parts the features of nuclei and tissue (CCL); a branch of its own finds the places of
the nuclei, so that touching ones can be told apart.

The code was never released: the structure is the paper's, every constant is a guess::

    M0       Voronoi edges and the farthest cluster: tissue; dilated points and the nearest one: nuclei; rest unknown
    CAM_b    relu(sum_c mean(dy/dA_c) A_c) of block b, y the nuclei's score; C_b = fill(min-max(CAM_b) > theta)
    P        C_b of the block with the largest IoU with M0 on its known pixels; points and Voronoi edges as in M0
    L        CE(semantic, P) + MSE(location, Gaussians at the points) + lambda InfoNCE

Instances are grown from the peaks of the location map within the semantic mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from scipy import ndimage
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import ParameterError
from methodbench.params import hyperparameters
from methodbench_vision.weak.networks import stage
from methodbench_vision.weak.training import BatchSize, Epochs, PeakRate, check_pictures, fit, given, seeded

#: Label of pixels of which nothing is known.
UNKNOWN = 255
#: Pixels per picture and side that the contrastive loss looks at.
_SAMPLES = 64


@hyperparameters
class DoNuSeg:
    """Takes the activation map of whichever block agrees most with the points as the next label."""

    dynamic: Annotated[bool, Field(description="exchange the first labels for the best block's map")] = True
    block: Annotated[
        int, Field(ge=-1, le=3, description="the only block to take maps from; -1 for the best")
    ] = -1
    theta: Annotated[float, Field(gt=0, lt=1, description="level that cuts an activation map")] = 0.45
    warm_up: Annotated[float, Field(ge=0, le=1, description="share of the epochs on the first labels")] = 0.2
    contrast: Annotated[float, Field(ge=0, le=100, description="lambda, weight of the contrastive loss")] = (
        0.1
    )
    heat: Annotated[float, Field(gt=0, le=10, description="temperature of the contrastive loss")] = 0.07
    sigma: Annotated[float, Field(gt=0, le=32, description="pixels of a point's Gaussian")] = 3.0
    radius: Annotated[int, Field(ge=0, le=32, description="pixels around a point that are nucleus")] = 2
    reach: Annotated[
        float, Field(gt=0, le=512, description="pixels beyond which distance does not count")
    ] = 20.0
    peak: Annotated[float, Field(gt=0, lt=1, description="least height of a peak of the location map")] = 0.3
    epochs: Epochs = 40
    batch_size: BatchSize = 8
    peak_rate: PeakRate = 4e-3

    def fit(self, weak_labels: Mapping[str, Any], ctx: Context) -> Instances:
        """Train on ``images`` [N, 3, H, W] and ``points``, per picture [n, 2] (x, y).

        Raises:
            NotApplicableError: there are no points.
            ParameterError: a point lies outside of its picture, or there is none.
        """
        images, points = given(weak_labels, "points", "DoNuSeg")
        size = (images.shape[2], images.shape[3])
        _inside(points, size)
        if not any(len(one) for one in points):
            raise ParameterError(
                "no picture has a point", "Give at least one picture the places of its nuclei."
            )
        first = torch.stack(
            [
                initial_label(image, one, self.radius, self.reach, ctx.seed)
                for image, one in zip(images, points, strict=True)
            ]
        )
        certain = torch.stack([sure(size, one, self.radius) for one in points])
        places = torch.stack([gaussians(size, one, self.sigma) for one in points])
        labels, chosen = first.clone(), torch.full((len(images),), -1)
        with seeded(ctx):
            net = NucleiNet()

            def choose(epoch: int) -> None:
                if self.dynamic and epoch >= self.warm_up * self.epochs:
                    for index in range(len(images)):
                        masks = block_masks(net, images[index : index + 1], self.theta)
                        labels[index], chosen[index] = select(masks, first[index], certain[index], self.block)

            def loss_of(batch: Tensor) -> Tensor:
                found = net(images[batch])
                target = labels[batch]
                known = target != UNKNOWN
                # Pictures without points say nothing, a batch of them neither.
                semantic = F.binary_cross_entropy_with_logits(
                    found.semantic[known], target[known].float(), reduction="sum"
                ) / known.sum().clamp_min(1)
                location = F.mse_loss(found.location.sigmoid(), places[batch])
                total = semantic + location
                if self.contrast:
                    total = total + self.contrast * contrastive(found.features, target, self.heat)
                return total

            fit(
                net, images, loss_of, epochs=self.epochs, batch_size=self.batch_size,
                peak_rate=self.peak_rate, ctx=ctx, every_epoch=choose,
            )  # fmt: skip
        return Instances(net, self.peak, self.sigma, labels == 1, tuple(chosen.tolist()))


class Found(NamedTuple):
    """What the network says about pictures."""

    semantic: Tensor
    """Logits of nuclei [B, H, W]."""
    location: Tensor
    """Logits of the location map [B, H, W]."""
    features: Tensor
    """Unit features of pixels [B, D, h, w]."""


@dataclass(frozen=True, slots=True)
class Instances:
    """A trained network as a predictor of instances.

    Attributes:
        net: in eval mode.
        peak: least height of a peak.
        apart: least distance of two peaks in pixels.
        pseudo: labels that the network was trained on at last, bool [N, H, W], nuclei True.
        chosen: per training picture the block that its label comes from; -1 for the first label.
    """

    net: NucleiNet
    peak: float
    apart: float
    pseudo: Tensor
    chosen: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Return int64 [B, H, W] of images [B, 3, H, W]: 0 for the tissue, 1, 2, ... for nuclei.

        Raises:
            ParameterError: see :func:`methodbench_vision.weak.training.check_pictures`.
        """
        check_pictures(x)
        with torch.inference_mode():
            found = [self.net(part) for part in x.split(32)]
        return torch.stack(
            [
                grown(location.numpy(), (semantic > 0).numpy(), self.peak, self.apart)
                for part in found
                for semantic, location in zip(part.semantic, part.location.sigmoid(), strict=True)
            ]
        )


class NucleiNet(nn.Module):
    """Four encoder blocks, a decoder with skips, a branch for the mask and one for the places."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 48, 64)
        self.encoder = nn.ModuleList(
            stage(a, b, stride=1 if a == 3 else 2) for a, b in zip((3, *widths[:-1]), widths, strict=True)
        )
        self.decoder = nn.ModuleList(
            stage(deep + skip, skip) for deep, skip in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.semantic = nn.Sequential(stage(widths[0], widths[0]), nn.Conv2d(widths[0], 1, 1))
        self.location = nn.Sequential(stage(widths[0], widths[0]), nn.Conv2d(widths[0], 1, 1))
        self.project = nn.Conv2d(widths[0], 16, 1)

    def forward(self, x: Tensor) -> Found:
        """Map images [B, 3, H, W] to :class:`Found`."""
        return self.decode(self.encode(x))

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the outputs of the encoder's blocks, [B, C, h, w] each, the finest first."""
        outputs = []
        for block in self.encoder:
            x = block(x)
            outputs.append(x)
        return outputs

    def decode(self, outputs: Sequence[Tensor]) -> Found:
        """Return what the branches make of the blocks' outputs."""
        x = outputs[-1]
        for block, skip in zip(self.decoder, outputs[-2::-1], strict=True):
            up = F.interpolate(x, size=(skip.shape[2], skip.shape[3]), mode="bilinear", align_corners=False)
            x = block(torch.cat([up, skip], 1))
        return Found(self.semantic(x)[:, 0], self.location(x)[:, 0], F.normalize(self.project(x), dim=1))


def block_masks(net: NucleiNet, x: Tensor, theta: float) -> Tensor:
    """Return C_b of one picture [1, 3, H, W] for each block: bool [blocks, H, W]."""
    net.eval()
    size = (x.shape[2], x.shape[3])
    with torch.enable_grad():
        outputs = [output.requires_grad_() for output in net.encode(x)]
        score = net.decode(outputs).semantic.sigmoid().sum()
        gradients = torch.autograd.grad(score, outputs)
    masks = []
    for output, gradient in zip(outputs, gradients, strict=True):
        cam = (gradient.mean((2, 3), keepdim=True) * output).sum(1, keepdim=True).relu().detach()
        cam = (cam - cam.min()) / (cam.max() - cam.min() + 1e-7)
        cam = F.interpolate(cam, size=size, mode="bilinear", align_corners=False)[0, 0]
        masks.append(torch.from_numpy(ndimage.binary_fill_holes((cam > theta).numpy())))
    return torch.stack(masks)


def select(masks: Tensor, first: Tensor, certain: Tensor, block: int = -1) -> tuple[Tensor, int]:
    """Return the label of a picture [H, W] and the block that it comes from.

    Args:
        masks: bool [blocks, H, W].
        first: M0 [H, W].
        certain: 1, 0 or :data:`UNKNOWN` [H, W]: what points and Voronoi edges say, which no map overrules.
        block: the only block that is asked; -1 for the one with the largest overlap.
    """
    best = int(agreement(masks, first).argmax()) if block < 0 else block
    label = masks[best].to(first)
    return torch.where(certain != UNKNOWN, certain, label), best


def agreement(masks: Tensor, first: Tensor) -> Tensor:
    """Return alpha, the IoU of masks [blocks, H, W] with the nuclei of M0 [H, W] over its known pixels."""
    known, nucleus = first != UNKNOWN, first == 1
    both = (masks & nucleus).sum((1, 2))
    either = ((masks | nucleus) & known).sum((1, 2))
    return both / either.clamp_min(1)


def initial_label(image: Tensor, points: Tensor, radius: int, reach: float, seed: int) -> Tensor:
    """Return M0, int64 [H, W]: 1 for nuclei, 0 for tissue, :data:`UNKNOWN` between.

    Args:
        image: [3, H, W].
        points: [n, 2] (x, y).
        radius: of the discs around points.
        reach: distance from which on all pixels are equally far.
        seed: of the clustering.
    """
    size = (image.shape[1], image.shape[2])
    certain = sure(size, points, radius)
    if not len(points):
        return certain
    distance = _distance(size, points).clip(max=reach) / reach
    colours = image.double().numpy().reshape(len(image), -1)
    colours = (colours - colours.mean(1, keepdims=True)) / np.maximum(colours.std(1, keepdims=True), 1e-6)
    # Four standard deviations of a colour count as much as the whole reach.
    features = np.concatenate([distance.reshape(1, -1), colours / 4]).T
    _, cluster = kmeans2(features, 3, minit="++", seed=seed, missing="warn")
    cluster = cluster.reshape(size)
    discs = certain.numpy() == 1
    shares = [(discs & (cluster == k)).sum() / max(1, (cluster == k).sum()) for k in range(3)]
    label = np.full(size, UNKNOWN, dtype=np.int64)
    label[cluster == int(np.argmax(shares))] = 1
    label[cluster == int(np.argmin(shares))] = 0
    return torch.where(certain != UNKNOWN, certain, torch.from_numpy(label))


def sure(size: tuple[int, int], points: Tensor, radius: int) -> Tensor:
    """Return what points alone say, int64 [H, W]: discs are 1, edges of their Voronoi cells 0, the rest unknown."""
    label = np.full(size, UNKNOWN, dtype=np.int64)
    if len(points):
        _, nearest = _nearest(size, points)
        edge = np.zeros(size, dtype=bool)
        edge[:-1] |= nearest[:-1] != nearest[1:]
        edge[:, :-1] |= nearest[:, :-1] != nearest[:, 1:]
        label[edge] = 0
        label[_distance(size, points) <= radius] = 1
    return torch.from_numpy(label)


def gaussians(size: tuple[int, int], points: Tensor, sigma: float) -> Tensor:
    """Return the location map float32 [H, W]: the nearest point's Gaussian, 1 at the point."""
    if not len(points):
        return torch.zeros(size)
    return torch.from_numpy(np.exp(-(_distance(size, points) ** 2) / (2 * sigma**2)).astype(np.float32))


def contrastive(features: Tensor, label: Tensor, heat: float) -> Tensor:
    """Return the InfoNCE of nuclei's pixels: near each other, far from those of the tissue.

    Args:
        features: unit vectors [B, D, H, W].
        label: [B, H, W].
        heat: temperature.
    """
    flat = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
    sides = []
    for value in (1, 0):
        index = (label.flatten() == value).nonzero()[:, 0]
        sides.append(flat[index[torch.randperm(len(index))[:_SAMPLES]]])
    nuclei, tissue = sides
    if len(nuclei) < 2 or not len(tissue):
        return features.new_zeros(())
    own = nuclei @ nuclei.T / heat
    itself = torch.eye(len(nuclei), dtype=torch.bool)
    other = (nuclei @ tissue.T / heat).logsumexp(1, keepdim=True)
    # Each of the other nuclei pixels in turn is the one that an anchor must recognize among the tissue's.
    return F.softplus(other - own)[~itself].mean()


def grown(location: np.ndarray, mask: np.ndarray, peak: float, apart: float) -> Tensor:
    """Return instances int64 [H, W], grown from the peaks of ``location`` [H, W] within ``mask``."""
    from skimage.feature import peak_local_max
    from skimage.segmentation import watershed

    peaks = peak_local_max(
        location,
        min_distance=max(1, round(apart)),
        threshold_abs=peak,
        labels=mask.astype(int),
        exclude_border=False,
    )
    markers = np.zeros(location.shape, dtype=np.int64)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    found: np.ndarray = watershed(-location, markers, mask=mask)
    return torch.from_numpy(found.astype(np.int64))


def _nearest(size: tuple[int, int], points: Tensor) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float64)
    place = points.double().numpy()
    squared = (x[None] - place[:, 0, None, None]) ** 2 + (y[None] - place[:, 1, None, None]) ** 2
    return np.sqrt(squared.min(0)), squared.argmin(0)


def _distance(size: tuple[int, int], points: Tensor) -> np.ndarray:
    return _nearest(size, points)[0]


def _inside(points: Sequence[Tensor], size: tuple[int, int]) -> None:
    for number, one in enumerate(points):
        if one.ndim != 2 or one.shape[1] != 2:
            raise ParameterError(f"points of picture {number} are {list(one.shape)}, not [n, 2] as x, y")
        if len(one) and bool(((one < 0) | (one > one.new_tensor([size[1] - 1, size[0] - 1]))).any()):
            raise ParameterError(
                f"a point of picture {number} lies outside of its {size[1]} x {size[0]} pixels"
            )
