"""Further tests of explainers, where the class is known: ROAD, sparseness, infidelity, randomization, attacks.

ROAD (Rong et al., 2202.00449) removes the most and the least relevant pixels and fills the holes from around them,
so that the removal itself is not seen; pytorch-grad-cam's reading::

    MoRF_p = y(without the pixels at or above percentile p) - y,   LeRF_p the same on 1 - map
    ROAD   = mean_p (LeRF_p - MoRF_p) / 2                                        higher is better

Sparseness (Chalasani et al., 1810.06583) is the Gini index of the map. Infidelity (Yeh et al., 1901.09392) compares the
map's mass in removed cells with the fall of the score, at the scale of the map that fits best. Parameter
randomization (Adebayo et al., 1810.03292) draws the layers anew from the logits down: a map that stays as it was
does not explain the model.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from scipy.sparse import coo_array
from scipy.sparse.linalg import splu
from scipy.stats import rankdata
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, Explainer, Oracle, Scores
from methodbench.torchkit.model import LoadedModel
from methodbench.torchkit.seeding import repeatable
from methodbench_vision.tasks.faithfulness import Confidence, class_confidence
from methodbench_vision.tasks.images import denormalized, normalize, procedural_images
from methodbench_vision.tasks.localization import fitted
from methodbench_vision.tasks.maps import on_device, preprocess_of, timed_maps

#: Neighbours of a pixel (rows down, columns right) and their weights.
_NEIGHBOURS = tuple(
    (down, right, 1 / 12 if down and right else 1 / 6)
    for down in (-1, 0, 1)
    for right in (-1, 0, 1)
    if down or right
)


@hyperparameters
class Faithfulness:
    """ROAD, sparseness and infidelity on procedural images, for their true class; the unit is one image."""

    images: Annotated[int, Field(ge=1, le=100_000, description="test images")] = 60
    image_seed: Annotated[int, Field(ge=0, description="seed of the image set")] = 0
    percentiles: Annotated[
        tuple[float, ...], Field(min_length=1, description="percentiles of ROAD, in (0, 100)")
    ] = (10, 20, 30, 40, 50, 60, 70, 80, 90)
    cells: Annotated[int, Field(ge=2, le=64, description="cells per side that infidelity removes")] = 8
    samples: Annotated[int, Field(ge=8, le=10_000, description="random removals of infidelity")] = 100
    seed: Annotated[int, Field(ge=0, description="seed of the removals and of ROAD's noise")] = 0
    noise: Annotated[float, Field(ge=0, le=1, description="standard deviation of ROAD's noise")] = 0.01
    batch_size: Annotated[int, Field(ge=1, le=1024, description="images per forward pass")] = 60

    def evaluate(self, method: Explainer, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Explain every image and perturb it.

        Raises:
            NotApplicableError: the model was not trained on the procedural images.
        """
        model = fitted(model)
        data = procedural_images(self.image_seed, self.images, split="test")
        inputs = normalize(data.images, preprocess_of(model))
        kept = _removals(self.samples, self.cells, self.seed)
        noise = np.random.default_rng(self.seed)
        scores: dict[str, list[Tensor]] = {name: [] for name in ("road", "sparseness", "infidelity")}
        seconds = 0.0
        for part in torch.arange(self.images).split(self.batch_size):
            x = on_device(inputs[part], ctx)
            target = data.labels[part].to(x.device)
            maps, spent = timed_maps(method, model, x, target, data.objects[part].to(x.device))
            seconds += spent
            maps = maps.to(x)
            confidence = class_confidence(model.module, target)
            scores["road"].append(road(confidence, x, maps, self.percentiles, self.noise, noise))
            scores["sparseness"].append(gini(maps))
            scores["infidelity"].append(infidelity(confidence, x, maps, kept.to(x)))
        return Evaluation(
            scores={name: Scores(torch.cat(parts).numpy()) for name, parts in scores.items()},
            facts={
                "images": self.images,
                "percentiles": list(self.percentiles),
                "data_digest": hashlib.sha256(data.images.numpy().tobytes()).hexdigest(),
            },
            throughput=(self.images / seconds, "maps/s"),
        )


@hyperparameters
class Randomization:
    """How alike maps stay while the model's layers are drawn anew from the logits down; the unit is one image."""

    images: Annotated[int, Field(ge=1, le=100_000, description="test images")] = 60
    image_seed: Annotated[int, Field(ge=0, description="seed of the image set")] = 0
    seed: Annotated[int, Field(ge=0, description="seed of the drawn layers")] = 0

    def evaluate(self, method: Explainer, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Explain every image with the model and with each randomized one.

        Raises:
            NotApplicableError: the model was not trained on the procedural images, or the method looks at the
                truth instead of the model.
        """
        model = fitted(model)
        if isinstance(method, Oracle):
            raise NotApplicableError("an oracle does not look at the model, so randomizing it says nothing")
        data = procedural_images(self.image_seed, self.images, split="test")
        x = on_device(normalize(data.images, preprocess_of(model)), ctx)
        target = data.labels.to(x.device)
        before, seconds = timed_maps(method, model, x, target)
        alike = []
        for randomized in cascade(model, self.seed):
            after, spent = timed_maps(method, randomized, x, target)
            seconds += spent
            alike.append(rank_correlation(before, after))
        table = np.stack(alike, axis=1)
        return Evaluation(
            scores={
                "map-similarity": Scores(table.mean(1)),
                "map-similarity-head": Scores(table[:, 0]),
                "map-similarity-all": Scores(table[:, -1]),
            },
            series={"map-similarity": table.mean(0)},
            facts={
                "images": self.images,
                "layers": table.shape[1],
                "data_digest": hashlib.sha256(data.images.numpy().tobytes()).hexdigest(),
            },
            throughput=(self.images * (table.shape[1] + 1) / seconds, "maps/s"),
        )


@hyperparameters
class Robustness:
    """How alike maps stay under an attack by the sign of the gradient (Goodfellow et al., 1412.6572); per image.

    Each picture, whole and attacked, is explained for the class that the model ranks first on it, as one would who does
    not know of the attack.
    """

    images: Annotated[int, Field(ge=1, le=100_000, description="test images")] = 300
    image_seed: Annotated[int, Field(ge=0, description="seed of the image set")] = 0
    epsilon: Annotated[
        float, Field(gt=0, le=1, description="largest change of a pixel, of values in [0, 1]")
    ] = 4 / 255
    batch_size: Annotated[int, Field(ge=1, le=1024, description="images per forward pass")] = 50

    def evaluate(self, method: Explainer, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Explain every image before and after the attack.

        Raises:
            NotApplicableError: the model was not trained on the procedural images, or the method looks at the
                truth instead of the model.
        """
        model = fitted(model)
        if isinstance(method, Oracle):
            raise NotApplicableError("an oracle does not look at the picture, so attacking it says nothing")
        data = procedural_images(self.image_seed, self.images, split="test")
        alike: list[Tensor] = []
        ranks: list[np.ndarray] = []
        flipped, seconds = 0, 0.0
        for part in torch.arange(self.images).split(self.batch_size):
            labels = data.labels[part].to(ctx.device)
            x = on_device(normalize(data.images[part], preprocess_of(model)), ctx)
            attacked = attack(model, x, labels, self.epsilon)
            maps = []
            answers = []
            for images in (x, attacked):
                with torch.no_grad():
                    answers.append(model.module(images).argmax(1))
                found, spent = timed_maps(method, model, images, answers[-1])
                maps.append(found)
                seconds += spent
            alike.append(soft_iou(*maps))
            ranks.append(rank_correlation(*maps))
            flipped += int((answers[0] != answers[1]).sum())
        return Evaluation(
            scores={
                "map-iou": Scores(torch.cat(alike).numpy()),
                "map-correlation": Scores(np.concatenate(ranks)),
            },
            facts={
                "images": self.images,
                "epsilon": self.epsilon,
                "answers_changed": flipped / self.images,
                "data_digest": hashlib.sha256(data.images.numpy().tobytes()).hexdigest(),
            },
            throughput=(2 * self.images / seconds, "maps/s"),
        )


def attack(model: LoadedModel, x: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """Return images one step up the sign of the loss's gradient, pixels staying in [0, 1].

    Args:
        model: says how it normalizes.
        x: normalized images [B, C, H, W].
        labels: true classes [B].
        epsilon: length of the step in pixel values.
    """
    preprocess = preprocess_of(model)
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model.module(at), labels, reduction="sum"), at)
    pixels = denormalized(x, preprocess) + epsilon * gradient.sign()
    return normalize(pixels.clamp(0, 1), preprocess)


def soft_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return sum min(a, b) / sum max(a, b) of maps [B, H, W] in [0, 1], float64 [B]; 1 where both are zero."""
    first, second = a.double().cpu(), b.double().cpu()
    either = torch.maximum(first, second).sum((1, 2))
    both = torch.minimum(first, second).sum((1, 2))
    return torch.where(either > 0, both / either.clamp_min(torch.finfo(torch.float64).tiny), 1.0)


def imputed(image: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Fill missing pixels so that each is the weighted mean of its eight neighbours, [C, H, W].

    Neighbours in the same row or column weigh twice as much as those on the diagonal; those outside of the
    picture do not count.

    Args:
        image: float [C, H, W].
        missing: bool [H, W].
    """
    filled = image.astype(np.float64)
    rows, columns = np.nonzero(missing)
    if not len(rows) or missing.all():
        return filled
    height, width = missing.shape
    number = np.full(missing.shape, -1)
    number[rows, columns] = np.arange(len(rows))
    diagonal = np.zeros(len(rows))
    known = np.zeros((len(rows), len(image)))
    entries, places = [], []
    for down, right, weight in _NEIGHBOURS:
        near, beside = rows + down, columns + right
        inside = (near >= 0) & (near < height) & (beside >= 0) & (beside < width)
        index = np.flatnonzero(inside)
        near, beside = near[inside], beside[inside]
        diagonal[index] += weight
        other = number[near, beside]
        gap = other >= 0
        places.append(np.stack([index[gap], other[gap]]))
        entries.append(np.full(int(gap.sum()), -weight))
        known[index[~gap]] += weight * filled[:, near[~gap], beside[~gap]].T
    places.append(np.stack([np.arange(len(rows))] * 2))
    entries.append(diagonal)
    system = coo_array((np.concatenate(entries), tuple(np.concatenate(places, axis=1)))).tocsc()
    # Symmetric and dominated by its diagonal: it needs no pivots, and an order of its own keeps the factor sparser.
    factor = splu(system, "MMD_AT_PLUS_A", diag_pivot_thresh=0, options={"SymmetricMode": True})
    filled[:, rows, columns] = factor.solve(known).T
    return filled


def removal_change(
    score: Confidence, x: Tensor, maps: Tensor, percentile: float, noise: float, random: np.random.Generator
) -> Tensor:
    """Return the change of the score [B] when pixels at or above a percentile of their map are imputed.

    Args:
        score: from images to scores [B].
        x: images [B, C, H, W].
        maps: [B, H, W]; taken in single precision.
        percentile: in (0, 100); 80 removes the top fifth.
        noise: standard deviation of what is added to imputed pixels.
        random: draws the noise.
    """
    changed = []
    # In single precision, as the reference: a percentile that falls on a pixel must equal it.
    for image, one in zip(x.double().cpu().numpy(), maps.float().cpu().numpy(), strict=True):
        missing = one >= np.percentile(one, percentile)
        filled = imputed(image, missing)
        filled[:, missing] += noise * random.standard_normal((len(image), int(missing.sum())))
        changed.append(filled)
    return score(torch.from_numpy(np.stack(changed)).to(x)) - score(x)


def road(
    score: Confidence,
    x: Tensor,
    maps: Tensor,
    percentiles: tuple[float, ...],
    noise: float,
    random: np.random.Generator,
) -> Tensor:
    """Return (LeRF - MoRF) / 2, averaged over percentiles, float64 [B]; see :func:`removal_change`."""
    parts = [
        removal_change(score, x, 1 - maps, percentile, noise, random)
        - removal_change(score, x, maps, percentile, noise, random)
        for percentile in percentiles
    ]
    return torch.stack(parts).mean(0) / 2


def gini(maps: Tensor) -> Tensor:
    """Return the Gini index of each map [B, H, W], float64 [B]: 0 for a constant map, near 1 for one pixel."""
    flat = (maps.double().flatten(1) + 1e-7).sort(dim=1).values.cpu()
    count = flat.shape[1]
    ranks = 2 * torch.arange(1, count + 1, dtype=torch.float64) - count - 1
    return (flat * ranks).sum(1) / (count * flat.sum(1))


def infidelity(score: Confidence, x: Tensor, maps: Tensor, kept: Tensor) -> Tensor:
    """Return the mean squared distance of map mass removed and score lost, float64 [B]; lower is better.

    The map of each image is scaled by the factor that fits best, so that a constant factor does not matter.

    Args:
        score: from images to scores [B].
        x: images [B, C, H, W]; what is removed becomes 0.
        maps: [B, H, W].
        kept: 1 where pixels stay, [samples, 1, cells, cells].
    """
    size = (x.shape[2], x.shape[3])
    before = score(x)
    masses, losses = [], []
    for cells in kept:
        mask = F.interpolate(cells[None], size=size)
        masses.append((maps * (1 - mask[:, 0])).sum((1, 2)).double().cpu())
        losses.append(before - score(x * mask))
    mass, loss = torch.stack(masses), torch.stack(losses)
    scale = (mass * loss).sum(0) / mass.square().sum(0).clamp_min(torch.finfo(torch.float64).tiny)
    return (scale * mass - loss).square().mean(0)


def cascade(model: LoadedModel, seed: int) -> list[LoadedModel]:
    """Return copies of the model whose last one, two, ... layers with weights are drawn anew."""
    layers = [
        name
        for name, layer in model.module.named_modules()
        if callable(getattr(layer, "reset_parameters", None)) and list(layer.parameters(recurse=False))
    ]
    copies = []
    for count in range(1, len(layers) + 1):
        copy = model.clone()
        with repeatable(seed):
            for name in layers[::-1][:count]:
                _redraw(copy.module.get_submodule(name))
        copies.append(copy)
    return copies


def rank_correlation(a: Tensor, b: Tensor) -> np.ndarray:
    """Return Spearman's correlation of maps [B, H, W], float64 [B]; 0 where one of the two is constant."""
    first, second = (rankdata(maps.flatten(1).double().cpu().numpy(), axis=1) for maps in (a, b))
    first, second = (ranks - ranks.mean(1, keepdims=True) for ranks in (first, second))
    scale = np.sqrt((first**2).sum(1) * (second**2).sum(1))
    product = (first * second).sum(1)
    return np.divide(product, scale, out=np.zeros(len(product)), where=scale > 0)


def _redraw(layer: Any) -> None:
    """Give a layer parameters of its own, drawn as torch initializes them; the shared ones stay."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        setattr(layer, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
    for name, buffer in list(layer.named_buffers(recurse=False)):
        setattr(layer, name, buffer.clone())
    layer.reset_parameters()


def _removals(samples: int, cells: int, seed: int) -> Tensor:
    drawn = np.random.default_rng(seed).random((samples, 1, cells, cells)) < 0.5
    return torch.from_numpy(drawn.astype(np.float32))
