"""Procedural pictures with several objects: classes that come together, and nuclei that touch.

:func:`scenes` draws one to three ellipses of :mod:`methodbench_vision.tasks.images`, whose heads alone tell the class,
and makes classes company of each other: a network that learns from the classes of whole pictures may take a class's
companion for the class. :func:`nuclei` draws stained tissue with many ellipses, and one jittered point for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from methodbench_vision.tasks.images import (
    OCTAVES,
    SHAPES_CLASSES,
    SHAPES_SIZE,
    STRIPE_ANGLES,
    STRIPE_FREQUENCY,
    background,
    object_colour,
    object_surface,
)

NUCLEI_SIZE = 96

_SPLITS = {"train": 0, "test": 1}
#: Streams of random numbers that no other set uses.
_SCENES, _NUCLEI = 101, 102
_TISSUE = np.array([0.88, 0.72, 0.82], dtype=np.float32)
_STAIN = np.array([0.45, 0.28, 0.58], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Scenes:
    """Pictures of one to three objects with their truth; every tensor has the pictures first."""

    images: Tensor
    """float32 [n, 3, 64, 64], RGB in [0, 1]."""
    labels: Tensor
    """bool [n, K]: classes that the picture shows."""
    masks: Tensor
    """int64 [n, 64, 64]: 0 for the background, k + 1 for class k."""
    heads: Tensor
    """bool [n, 64, 64]: the parts whose stripes tell the class."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Nuclei:
    """Pictures of stained nuclei; every tensor has the pictures first."""

    images: Tensor
    """float32 [n, 3, 96, 96], RGB in [0, 1]."""
    instances: Tensor
    """int64 [n, 96, 96]: 0 for the tissue, 1, 2, ... for the nuclei of the picture."""
    points: tuple[Tensor, ...]
    """Per picture float32 [nuclei, 2]: x, y inside of each nucleus, in the order of the instances."""

    def __len__(self) -> int:
        return len(self.points)


def scenes(
    seed: int,
    n: int,
    *,
    split: Literal["train", "test"] = "test",
    together: float = 0.0,
    head_from: float = 0.0,
    texture: float = 1.0,
    difficulty: float = 0.0,
) -> Scenes:
    """Draw ``n`` pictures; picture ``i`` depends on (split, seed, i) alone.

    Args:
        seed: of the set; the same seed gives other pictures in the other split.
        n: number of pictures.
        split: methods learn from ``train``.
        together: how often an object's neighbour is of the companion class (0 with 1, 2 with 3); otherwise it is
            any class. Pictures of a single object never have company.
        head_from: where the head begins along the ellipse's long axis, as a share of it in (-1, 1).
        texture: contrast of the background; 0 leaves it even.
        difficulty: see :func:`methodbench_vision.tasks.images.procedural_images`.
    """
    if n < 1:
        raise ValueError("n must be 1 or more")
    drawn = [_scene(split, seed, index, together, head_from, texture, difficulty) for index in range(n)]
    rendered, masks, heads = zip(*drawn, strict=True)
    truth = torch.from_numpy(np.stack(masks))
    labels = torch.stack([(truth == k + 1).flatten(1).any(1) for k in range(len(SHAPES_CLASSES))], 1)
    return Scenes(torch.from_numpy(np.stack(rendered)), labels, truth, torch.from_numpy(np.stack(heads)))


def _scene(
    split: str,
    seed: int,
    index: int,
    together: float,
    head_from: float,
    texture: float,
    difficulty: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng((_SCENES, _SPLITS[split], seed, index))
    classes = [index % len(SHAPES_CLASSES)]
    for _ in range(int(random.integers(0, 3))):
        companion = classes[0] ^ 1
        chosen = companion if random.random() < together else int(random.integers(len(SHAPES_CLASSES)))
        classes.append(chosen)
    grids = [random.standard_normal((3, side, side), dtype=np.float32) for side in OCTAVES]
    image = background([grids], texture=texture)[0].numpy()
    colour = object_colour(difficulty)
    mask = np.zeros((SHAPES_SIZE, SHAPES_SIZE), dtype=np.int64)
    heads = np.zeros_like(mask, dtype=bool)
    y, x = np.mgrid[:SHAPES_SIZE, :SHAPES_SIZE].astype(np.float64)
    for label in classes:
        for _ in range(50):
            length = random.uniform(10, 14)
            tilt = random.uniform(0, 2 * np.pi)
            centre = random.uniform(length, SHAPES_SIZE - length, 2)
            ellipse, along, across = _ellipse(x - centre[0], y - centre[1], length, 0.6 * length, tilt)
            if not mask[ellipse].any():
                break
        else:
            continue
        head = ellipse & (along > head_from * length)
        angle, phase = STRIPE_ANGLES[label], random.uniform(0, 2 * np.pi)
        stripes = np.sin(STRIPE_FREQUENCY * (x * np.cos(angle) + y * np.sin(angle)) + phase) > 0
        surface = object_surface(head, stripes, along, across, difficulty)
        image = np.where(ellipse, colour[:, None, None] * surface, image)
        mask[ellipse] = label + 1
        heads |= head
    noise = 0.02 * random.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image + noise, 0, 1).astype(np.float32), mask, heads


def nuclei(
    seed: int,
    n: int,
    *,
    split: Literal["train", "test"] = "test",
    jitter: float = 1.5,
    stain: float = 0.65,
    texture: float = 1.0,
) -> Nuclei:
    """Draw ``n`` pictures of 15 to 40 nuclei; picture ``i`` depends on (split, seed, i) alone.

    Nuclei overlap by less than a fifth of the smaller one; the later one lies on top.

    Args:
        seed: of the set; the same seed gives other pictures in the other split.
        n: number of pictures.
        split: methods learn from ``train``.
        jitter: standard deviation in pixels of the points around the centres; a point stays inside its nucleus.
        stain: spread of the nuclei's colour between tissue (1) and full stain (0): the larger, the more
            nuclei look like tissue.
        texture: contrast of the tissue's fibres; 0 leaves it even.
    """
    if n < 1:
        raise ValueError("n must be 1 or more")
    drawn = [_tissue(split, seed, index, jitter, stain, texture) for index in range(n)]
    images, instances, points = zip(*drawn, strict=True)
    return Nuclei(
        torch.from_numpy(np.stack(images)),
        torch.from_numpy(np.stack(instances)),
        tuple(torch.from_numpy(one) for one in points),
    )


def _tissue(
    split: str, seed: int, index: int, jitter: float, stain: float, texture: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng((_NUCLEI, _SPLITS[split], seed, index))
    size = (NUCLEI_SIZE, NUCLEI_SIZE)
    grids = [random.standard_normal((1, side, side), dtype=np.float32) for side in OCTAVES]
    fibres = background([grids], size)[0, 0].numpy() - 0.42
    image = _TISSUE[:, None, None] + 1.6 * texture * fibres
    instances = np.zeros(size, dtype=np.int64)
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float64)
    areas: list[int] = []
    for _ in range(int(random.integers(15, 41))):
        for _ in range(30):
            length = random.uniform(5, 9)
            width = length * random.uniform(0.55, 0.95)
            centre = random.uniform(3, NUCLEI_SIZE - 3, 2)
            tilt = random.uniform(0, np.pi)
            inside, along, across = _ellipse(x - centre[0], y - centre[1], length, width, tilt)
            lost = np.bincount(instances[inside], minlength=len(areas) + 1)[1:]
            small = np.minimum(areas, inside.sum()) if areas else np.zeros(0)
            left = np.bincount(instances.ravel(), minlength=len(areas) + 1)[1:] - lost
            if inside.sum() > 40 and (lost < 0.2 * small).all() and (left > 0.7 * np.array(areas)).all():
                break
        else:
            continue
        areas.append(int(inside.sum()))
        instances[inside] = len(areas)
        share = random.uniform(0, stain)
        colour = share * _TISSUE + (1 - share) * _STAIN
        rim = 1 - 0.12 * ((along / length) ** 2 + (across / width) ** 2)
        grain = 1 + 0.08 * random.standard_normal(size)
        image = np.where(inside, colour[:, None, None] * (rim * grain), image)
    image = image + 0.02 * random.standard_normal((3, *size))
    points = []
    for number in range(1, len(areas) + 1):
        rows, columns = np.nonzero(instances == number)
        wished = np.array([columns.mean(), rows.mean()]) + jitter * random.standard_normal(2)
        near = ((columns - wished[0]) ** 2 + (rows - wished[1]) ** 2).argmin()
        points.append((columns[near], rows[near]))
    return (
        np.clip(image, 0, 1).astype(np.float32),
        instances,
        np.array(points, dtype=np.float32).reshape(-1, 2),
    )


def _ellipse(
    dx: np.ndarray, dy: np.ndarray, length: float, width: float, tilt: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which pixels lie inside, and each one's place along the two axes."""
    along = dx * np.cos(tilt) + dy * np.sin(tilt)
    across = dy * np.cos(tilt) - dx * np.sin(tilt)
    return (along / length) ** 2 + (across / width) ** 2 <= 1, along, across
