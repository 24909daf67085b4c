"""Multifaceted Feature Visualization.

Nguyen, Yosinski and Clune, Multifaceted Feature Visualization: Uncovering the Different Types of Features Learned
By Each Neuron, ICML 2016 workshop on visualization (1602.03616). A class has several looks. The images of a class
are clustered in the network's own feature space, and activation maximization starts from the mean image of each
cluster, so that one clean picture per facet comes out. Every step, on pixels in [0, 255]::

    x <- clip(x + step g / mean|g|),   g = d logit / dx, zero outside of the margin
    x <- tv_bregman(x, weight)

with a canvas a little larger than the input, cropped at random, that grows between octaves. Features are what enters
the classifier; they are reduced to 50 principal components and to the plane by t-SNE, then grouped by k-means, and
the 15 images nearest to a centroid are averaged. Starting from ``noise`` with the centre-biased schedule is the
authors' second tool, and the comparison here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from scipy.ndimage import zoom
from skimage.restoration import denoise_tv_bregman
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import hyperparameters
from methodbench.torchkit.model import Calibration, LoadedModel, Preprocess
from methodbench_vision.cam import check_images, check_scores


class Octave(NamedTuple):
    """One stretch of the ascent."""

    iterations: int
    zoom: float
    """Factor by which the canvas grows beforehand."""
    window: float
    """Standard deviation of the crop's offset, as a share of the room that it has."""
    margin: int
    """Pixels along the border, of 224, that stay as they are."""
    tv: tuple[float, float]
    """Weight of the total variation denoiser at start and end: smaller smooths more."""
    step: tuple[float, float]
    """Mean change of a pixel value per step at start and end."""


#: From the mean image of a facet.
MEAN_SCHEDULE = (
    Octave(190, 1.0, 0.3, 0, (0.4, 0.4), (1, 2)),
    Octave(150, 1.2, 0.3, 0, (0.01, 2), (1, 1)),
    Octave(20, 1.0, 0.2, 50, (0.1, 2), (2, 2)),
    Octave(10, 1.0, 0.3, 0, (0.4, 2), (2, 2)),
)
#: From noise, with gradients of ever smaller centres.
CENTRE_SCHEDULE = (
    Octave(190, 1.0, 0.3, 0, (0.001, 0.05), (11, 11)),
    Octave(150, 1.2, 0.3, 0, (0.01, 0.08), (6, 6)),
    Octave(150, 1.2, 0.3, 0, (0.01, 2), (1, 1)),
    Octave(30, 1.0, 0.1, 50, (0.1, 2), (3, 3)),
    Octave(10, 1.0, 0.3, 0, (0.01, 2), (6, 3)),
)
#: Side of the canvas over that of the input, and the side that margins are given for.
_CANVAS = 227 / 224
_PUBLISHED_SIDE = 224
_COMPONENTS = 50
_TV_ITERATIONS = 100
_TV_TOLERANCE = 1e-3


@hyperparameters
class MultifacetedViz:
    """Activation maximization from the mean images of a class's facets."""

    facets: Annotated[int, Field(ge=1, le=1000, description="clusters k of a class's images")] = 10
    nearest: Annotated[int, Field(ge=1, description="images averaged per facet")] = 15
    start: Annotated[Literal["mean", "noise"], Field(description="what the ascent starts from")] = "mean"
    unit: Annotated[
        int | None, Field(ge=0, description="class to visualize; by default the most frequent prediction")
    ] = None
    effort: Annotated[float, Field(gt=0, le=10, description="share of the published iterations")] = 1.0
    seed: Annotated[int, Field(ge=0, le=2**31 - 1, description="of clusters, offsets and noise")] = 0

    def measure(
        self, model: LoadedModel, data: Calibration, ctx: Context
    ) -> Mapping[str, np.ndarray | float]:
        """Visualize one class by the images of ``data`` that the model takes for it.

        Returns:
            ``activation`` (logit of the pictures made, mean over facets) and ``start-activation``, their
            ``confidence``, mean absolute ``total-variation`` per pixel, ``colour-spread`` (standard deviation
            over facets of the mean colour); pixel values count from 0 to 255.

        Raises:
            NotApplicableError: no image is taken for the class.
            ParameterError: the images have another size than the model takes.
            DivergedError: the logits are not finite.
        """
        check_images(model, data.inputs)
        preprocess = model.preprocess or Preprocess(
            (data.inputs.shape[2], data.inputs.shape[3]), (0.5,) * 3, (0.25,) * 3
        )
        if tuple(data.inputs.shape[2:]) != tuple(preprocess.size):
            raise ParameterError(
                f"the images have {tuple(data.inputs.shape[2:])} pixels, {model.name} takes {tuple(preprocess.size)}",
                "Resize the images first.",
            )
        features, logits = penultimate(model, data.inputs)
        check_scores(model, logits)
        predicted = logits.argmax(1)
        unit = int(predicted.mode().values) if self.unit is None else self.unit
        chosen = (predicted == unit).nonzero()[:, 0]
        if not len(chosen):
            raise NotApplicableError(
                f"{model.name} takes none of the {len(data)} images for class {unit}", "Give it more images."
            )
        clusters = facets(features[chosen].double().cpu().numpy(), self.facets, self.seed)
        pixels = to_pixels(data.inputs[chosen].double(), preprocess)
        means = mean_images(pixels, features[chosen].double().cpu().numpy(), clusters, self.nearest)
        schedule = MEAN_SCHEDULE if self.start == "mean" else CENTRE_SCHEDULE
        start = means
        if self.start == "noise":
            start = np.random.RandomState(self.seed).normal(175, 8, means.shape)
        ascent = Ascent(model, preprocess, unit, np.random.RandomState(self.seed))
        made = ascent.run(start, scaled_schedule(schedule, self.effort))
        begun, ended = ascent.logits(start), ascent.logits(made)
        return {
            "activation": float(ended[:, unit].mean()),
            "start-activation": float(begun[:, unit].mean()),
            "confidence": float(ended.softmax(1)[:, unit].mean()),
            "total-variation": float(np.mean([total_variation(picture) for picture in made])),
            "colour-spread": float(made.mean((2, 3)).std(0).mean()),
            "facet-sizes": np.bincount(clusters).astype(np.float64),
        }


class Ascent:
    """Activation maximization of one class for several pictures at once."""

    def __init__(
        self, model: LoadedModel, preprocess: Preprocess, unit: int, random: np.random.RandomState
    ) -> None:
        self.model = model
        self.unit = unit
        self.random = random
        parameter = next(model.module.parameters())
        self.like = parameter.detach()
        self.mean = np.array(preprocess.mean)[:, None, None]
        self.std = np.array(preprocess.std)[:, None, None]
        self.size = preprocess.size

    def run(self, pictures: np.ndarray, schedule: Sequence[Octave]) -> np.ndarray:
        """Return the pictures [K, 3, H, W] after the ascent, float64 in [0, 255], at the input's size."""
        canvas = _resized(pictures, _CANVAS)
        height, width = self.size
        for octave in schedule:
            canvas = _resized(canvas, octave.zoom)
            margin = round(octave.margin * min(self.size) / _PUBLISHED_SIDE)
            for iteration in range(octave.iterations):
                step, tv = step_and_weight(octave, iteration)
                left = crop_offset(self.random, canvas.shape[3], width, octave.window)
                top = crop_offset(self.random, canvas.shape[2], height, octave.window)
                window = (..., slice(top, top + height), slice(left, left + width))
                crop = canvas[window]
                gradients = self.gradients(crop)
                canvas[window] = np.stack(
                    [
                        denoised(ascended(one, gradient, step, margin, (0.0, 255.0)), tv)
                        for one, gradient in zip(crop, gradients, strict=True)
                    ]
                )
        top, left = (canvas.shape[2] - height) // 2, (canvas.shape[3] - width) // 2
        return canvas[..., top : top + height, left : left + width]

    def gradients(self, pixels: np.ndarray) -> np.ndarray:
        """Return d logit / dx [K, 3, H, W] at pictures of the input's size."""
        x = self._inputs(pixels).requires_grad_()
        with torch.enable_grad():
            score = self.model.module(x)[:, self.unit].sum()
        (gradient,) = torch.autograd.grad(score, x)
        return gradient.double().cpu().numpy() / self.std

    def logits(self, pixels: np.ndarray) -> Tensor:
        """Return logits [K, classes] of pictures [K, 3, H, W] of the input's size."""
        with torch.inference_mode():
            return self.model.module(self._inputs(pixels)).double().cpu()

    def _inputs(self, pixels: np.ndarray) -> Tensor:
        return torch.from_numpy((pixels / 255 - self.mean) / self.std).to(self.like)


def penultimate(model: LoadedModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what enters the classifier [B, D], and the logits [B, K].

    Raises:
        NotApplicableError: the model has no classifier of known name.
    """
    head = model.adapter.head(model.module)
    if head is None:
        raise NotApplicableError(f"{model.name} has no classifier whose inputs could be clustered")
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        with torch.inference_mode():
            logits = torch.cat([model.module(part) for part in x.split(64)])
    finally:
        handle.remove()
    return torch.cat(seen).flatten(1), logits


def facets(features: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Group features [n, D] of one class: principal components, t-SNE, k-means. Returns int [n].

    Features that are all alike are one group.
    """
    if not np.ptp(features, axis=0).any():
        return np.zeros(len(features), dtype=np.int64)
    count = min(count, len(features))
    reduced = PCA(min(_COMPONENTS, *features.shape), random_state=seed).fit_transform(features)
    if len(features) > 3:
        perplexity = min(30.0, (len(features) - 1) / 3)
        reduced = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
    return KMeans(count, n_init=10, random_state=seed).fit_predict(reduced)


def mean_images(pixels: np.ndarray, features: np.ndarray, clusters: np.ndarray, nearest: int) -> np.ndarray:
    """Return per facet the mean of the images [n, 3, H, W] whose features are nearest to its centroid."""
    means = []
    for facet in range(clusters.max() + 1):
        members = np.flatnonzero(clusters == facet)
        distance = np.linalg.norm(features[members] - features[members].mean(0), axis=1)
        means.append(pixels[members[distance.argsort(kind="stable")[:nearest]]].mean(0))
    return np.stack(means)


def to_pixels(x: Tensor, preprocess: Preprocess) -> np.ndarray:
    """Return normalized inputs [n, 3, H, W] as pixel values in [0, 255]."""
    mean, std = (x.new_tensor(value)[:, None, None] for value in (preprocess.mean, preprocess.std))
    return ((x * std + mean) * 255).clamp(0, 255).cpu().numpy()


def scaled_schedule(schedule: Sequence[Octave], effort: float) -> list[Octave]:
    """Return the schedule with ``effort`` times the iterations, two per octave at least.

    A single iteration would have a denoiser's weight of 0, by which it divides.
    """
    return [octave._replace(iterations=max(2, round(effort * octave.iterations))) for octave in schedule]


def step_and_weight(octave: Octave, iteration: int) -> tuple[float, float]:
    """Return the step and the denoiser's weight at an iteration, as the published loop has them."""
    share = iteration / octave.iterations
    step = octave.step[0] + (octave.step[1] - octave.step[0]) * share
    weight = octave.tv[0] - (octave.tv[0] - octave.tv[1] * iteration) / octave.iterations
    return step, weight


def crop_offset(random: np.random.RandomState, canvas: int, side: int, window: float) -> int:
    """Draw where a crop of ``side`` begins on a canvas: normal around the middle, 0 where there is no room."""
    room = canvas - side
    if room <= 0:
        return 0
    return int(np.clip(random.normal(room / 2, room * window), 0, room))


def ascended(
    x: np.ndarray,
    gradient: np.ndarray,
    step: float,
    margin: int,
    bounds: tuple[np.ndarray | float, np.ndarray | float],
) -> np.ndarray:
    """Return x after one step of mean size ``step`` along the gradient, clipped to ``bounds`` (low, high).

    A gradient that is zero everywhere moves nothing.

    Args:
        x: float64 [3, H, W].
        gradient: float64 [3, H, W].
        step: mean absolute change.
        margin: pixels along the border that stay as they are.
        bounds: lowest and highest values, broadcast to ``x``.
    """
    if margin > 0:
        inside = np.zeros_like(gradient)
        inside[:, margin:-margin, margin:-margin] = gradient[:, margin:-margin, margin:-margin]
        gradient = inside
    size = np.abs(gradient).mean()
    moved = x + step / size * gradient if size > 0 else x
    return np.clip(moved, bounds[0], bounds[1])


def denoised(x: np.ndarray, weight: float) -> np.ndarray:
    """Return pixels [3, H, W] after split Bregman total variation denoising; small weights smooth more."""
    picture = denoise_tv_bregman(
        np.moveaxis(x, 0, 2), weight=weight, max_num_iter=_TV_ITERATIONS, eps=_TV_TOLERANCE, channel_axis=-1
    )
    return np.moveaxis(picture, 2, 0)


def total_variation(picture: np.ndarray) -> float:
    """Return the mean absolute difference of neighbouring pixels of [3, H, W]."""
    return float(np.abs(np.diff(picture, axis=1)).mean() + np.abs(np.diff(picture, axis=2)).mean())


def _resized(pictures: np.ndarray, factor: float) -> np.ndarray:
    return pictures.copy() if factor == 1 else zoom(pictures, (1, 1, factor, factor), order=3)
