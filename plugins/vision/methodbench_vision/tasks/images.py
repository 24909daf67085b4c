"""Pictures for explainers, and the way from pictures to a model's inputs.

Procedural images have exact truth: every picture shows one rotated ellipse whose body looks the same in all
classes; only the stripes on its head, one end of the ellipse, tell the class. A faithful map must sit on the
head, a localizing one on the object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from methodbench.torchkit.model import Preprocess

#: Orientations of the head's stripes, one per class.
SHAPES_CLASSES = ("vertical", "horizontal", "rising", "falling")
SHAPES_SIZE = 64

STRIPE_ANGLES = np.deg2rad([0.0, 90.0, 45.0, -45.0])
STRIPE_FREQUENCY = 1.8
OCTAVES = (4, 8, 16, 32)
BODY = np.array([0.62, 0.48, 0.36], dtype=np.float32)
#: Mean brightness of the background.
_MEAN = 0.42
_RAIL_ROWS = slice(50, 56)
_SPLITS = {"train": 0, "test": 1}


#: Settings of tasks on procedural pictures; see :func:`procedural_images`.
Texture = Annotated[float, Field(ge=0, le=4, description="contrast of the background; 0 leaves it even")]
Difficulty = Annotated[
    float,
    Field(ge=0, le=1, description="share of the contrast that objects and their stripes lose; 1 leaves none"),
]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that ships with an installed package."""

    name: str
    rgb: np.ndarray
    """uint8 [height, width, 3]."""


@dataclass(frozen=True, slots=True)
class ProceduralImages:
    """Procedural pictures with their truth; every tensor has the images first."""

    images: Tensor
    """float32 [n, 3, 64, 64], RGB in [0, 1]."""
    labels: Tensor
    """int64 [n], index into :data:`SHAPES_CLASSES`."""
    objects: Tensor
    """bool [n, 64, 64]: the whole ellipse."""
    heads: Tensor
    """bool [n, 64, 64]: the part of the ellipse whose stripes tell the class."""
    contexts: Tensor
    """bool [n, 64, 64]: the visible part of the rail, all False where there is none."""
    boxes: Tensor
    """int64 [n, 4]: x0, y0, x1, y1 of the object, all inclusive."""
    points: Tensor
    """float32 [n, 2]: x, y of the object's centroid."""

    def __len__(self) -> int:
        return len(self.labels)


def procedural_images(
    seed: int,
    n: int,
    *,
    split: Literal["train", "test"] = "test",
    rail_probability: float = 0.0,
    head_from: float = 0.45,
    texture: float = 1.0,
    difficulty: float = 0.0,
) -> ProceduralImages:
    """Draw ``n`` procedural images of 64 x 64 pixels; the classes take turns.

    Image ``i`` depends on (split, seed, i) alone, so that fewer images are the first of more.

    Args:
        seed: of the image set; the same seed gives other images in the other split.
        n: number of images.
        split: networks are trained on ``train`` and explained on ``test``.
        rail_probability: how often class 0 stands over a bright rail; each other class does so with a share
            of ``(1 - rail_probability) / 3``. Zero means never, in any class.
        head_from: where the head begins along the ellipse's long axis, as a share of it in (-1, 1).
        texture: contrast of the background; 0 leaves it even.
        difficulty: share in [0, 1] by which the object takes on the background's mean colour and the stripes of its
            head lose their contrast; at 1 nothing tells the classes apart. Truth and places stay as they are.
    """
    drawn = [_draw(split, seed, index, rail_probability, head_from, difficulty) for index in range(n)]
    if not drawn:
        raise ValueError("n must be 1 or more")
    objects = np.stack([image.object for image in drawn])
    return ProceduralImages(
        images=_render(drawn, texture, difficulty),
        labels=torch.arange(n) % len(SHAPES_CLASSES),
        objects=torch.from_numpy(objects),
        heads=torch.from_numpy(np.stack([image.head for image in drawn])),
        contexts=torch.from_numpy(np.stack([image.context for image in drawn])),
        boxes=torch.from_numpy(np.stack([_box(mask) for mask in objects])),
        points=torch.from_numpy(np.stack([_centroid(mask) for mask in objects])),
    )


@dataclass(slots=True)
class _Drawing:
    """One image before it is rendered."""

    object: np.ndarray
    head: np.ndarray
    context: np.ndarray
    grids: list[np.ndarray]
    """Background noise, float32 [3, side, side] per octave."""
    surface: np.ndarray
    """Brightness of the object, float32 [64, 64]."""
    noise: np.ndarray
    """float32 [3, 64, 64]."""


def _draw(
    split: str, seed: int, index: int, rail_probability: float, head_from: float, difficulty: float
) -> _Drawing:
    random = np.random.default_rng((_SPLITS[split], seed, index))
    label = index % len(SHAPES_CLASSES)
    y, x = np.mgrid[:SHAPES_SIZE, :SHAPES_SIZE].astype(np.float64)
    length = random.uniform(12, 20)
    centre_x, centre_y = random.uniform(18, 46), random.uniform(18, 44)
    tilt = random.uniform(0, 2 * np.pi)
    dx, dy = x - centre_x, y - centre_y
    along = dx * np.cos(tilt) + dy * np.sin(tilt)
    across = dy * np.cos(tilt) - dx * np.sin(tilt)
    ellipse = (along / length) ** 2 + (across / (0.6 * length)) ** 2 <= 1
    head = ellipse & (along > head_from * length)

    share = rail_probability if label == 0 else (1 - rail_probability) / (len(SHAPES_CLASSES) - 1)
    has_rail = random.random() < share and rail_probability > 0
    context = np.zeros_like(ellipse)
    context[_RAIL_ROWS] = has_rail

    angle = STRIPE_ANGLES[label]
    phase = random.uniform(0, 2 * np.pi)
    stripes = np.sin(STRIPE_FREQUENCY * (x * np.cos(angle) + y * np.sin(angle)) + phase) > 0
    surface = object_surface(head, stripes, along, across, difficulty)
    return _Drawing(
        object=ellipse,
        head=head,
        context=context & ~ellipse,
        grids=[random.standard_normal((3, side, side), dtype=np.float32) for side in OCTAVES],
        surface=surface,
        noise=0.02 * random.standard_normal((3, SHAPES_SIZE, SHAPES_SIZE), dtype=np.float32),
    )


def object_surface(
    head: np.ndarray, stripes: np.ndarray, along: np.ndarray, across: np.ndarray, difficulty: float
) -> np.ndarray:
    """Return the brightness of an object's pixels, float32 [H, W]: stripes on its head, weak ripples elsewhere.

    Args:
        head: bool [H, W].
        stripes: bool [H, W]: where a stripe is bright.
        along: place along the long axis, in pixels [H, W].
        across: place along the short axis.
        difficulty: share of the stripes' contrast that is lost.
    """
    contrast = 0.4 * (1 - difficulty)
    ripples = 0.06 * np.sin(0.9 * along) * np.sin(0.9 * across)
    return np.where(head, np.where(stripes, 1 + contrast, 1 - contrast), 1.0 + ripples).astype(np.float32)


def object_colour(difficulty: float) -> np.ndarray:
    """Return the colour of objects, float32 [3]; see ``difficulty`` of :func:`procedural_images`."""
    return ((1 - difficulty) * BODY + difficulty * _MEAN).astype(np.float32)


def _render(drawn: Sequence[_Drawing], texture: float, difficulty: float) -> Tensor:
    """Return float32 [n, 3, 64, 64] in [0, 1]: background, rail, object, noise, in this order."""
    size = (SHAPES_SIZE, SHAPES_SIZE)
    images = background([image.grids for image in drawn], texture=texture)

    rows = torch.zeros(size, dtype=torch.bool)
    rows[_RAIL_ROWS.start : _RAIL_ROWS.start + 2] = True
    rows[_RAIL_ROWS.stop - 2 : _RAIL_ROWS.stop] = True
    rail = torch.from_numpy(np.stack([image.context for image in drawn])) & rows
    images = torch.where(rail[:, None], torch.tensor(0.9), images)

    surface = torch.from_numpy(np.stack([image.surface for image in drawn]))
    objects = torch.from_numpy(np.stack([image.object for image in drawn]))
    body = torch.from_numpy(object_colour(difficulty))[None, :, None, None] * surface[:, None]
    images = torch.where(objects[:, None], body, images)
    return (images + torch.from_numpy(np.stack([image.noise for image in drawn]))).clamp(0, 1)


def background(
    grids: Sequence[Sequence[np.ndarray]], size: tuple[int, int] = (64, 64), texture: float = 1.0
) -> Tensor:
    """Return noise of several octaves around a mean grey, float32 [n, C, *size].

    Args:
        grids: per image, one grid float32 [C, side, side] for each of :data:`OCTAVES`.
        size: height and width.
        texture: contrast; 0 leaves the mean grey alone.
    """
    noise = torch.zeros(len(grids), len(grids[0][0]), *size)
    for octave, side in enumerate(OCTAVES):
        grid = torch.from_numpy(np.stack([image[octave] for image in grids]))
        noise += F.interpolate(grid, size, mode="bicubic", align_corners=False) / side**0.5
    return _MEAN + 0.12 * texture * noise


def _box(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], dtype=np.int64)


def _centroid(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean(), rows.mean()], dtype=np.float32)


def sample_pictures() -> list[Picture]:
    """Return photographs that ship inside scikit-image and scikit-learn; nothing is fetched."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    photographs = {
        "astronaut": skimage.data.astronaut(),
        "camera": skimage.data.camera(),
        "cat": skimage.data.chelsea(),
        "coffee": skimage.data.coffee(),
        "motorcycle": skimage.data.stereo_motorcycle()[0],
        "rocket": skimage.data.rocket(),
    }
    bunch = load_sample_images()
    for path, picture in zip(bunch.filenames, bunch.images, strict=True):
        photographs[Path(path).stem] = picture
    return [Picture(name, _rgb(picture)) for name, picture in photographs.items()]


def _rgb(picture: np.ndarray) -> np.ndarray:
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, axis=-1)
    return np.ascontiguousarray(picture[..., :3])


def to_inputs(pictures: Sequence[np.ndarray], preprocess: Preprocess) -> Tensor:
    """Turn pictures into a model's inputs.

    The shorter side is resized to ``size / crop`` and the centre is cut out, unless the picture has the right
    size and nothing is to be cropped.

    Args:
        pictures: RGB, uint8 [height, width, 3], of any sizes.
        preprocess: the model's.

    Returns:
        Normalized inputs, float32 [pictures, 3, *size].
    """
    resized = np.stack([_resize(picture, preprocess) for picture in pictures])
    return normalize(torch.from_numpy(resized).permute(0, 3, 1, 2).float().div_(255), preprocess)


def normalize(images: Tensor, preprocess: Preprocess) -> Tensor:
    """Normalize images that have the model's size: RGB in [0, 1], float [images, 3, height, width]."""
    mean = torch.tensor(preprocess.mean, dtype=images.dtype, device=images.device)[:, None, None]
    std = torch.tensor(preprocess.std, dtype=images.dtype, device=images.device)[:, None, None]
    return (images - mean) / std


def denormalized(inputs: Tensor, preprocess: Preprocess) -> Tensor:
    """Undo :func:`normalize`: inputs [images, 3, height, width] become RGB in [0, 1]."""
    mean = torch.tensor(preprocess.mean, dtype=inputs.dtype, device=inputs.device)[:, None, None]
    std = torch.tensor(preprocess.std, dtype=inputs.dtype, device=inputs.device)[:, None, None]
    return (inputs * std + mean).clamp(0, 1)


def _resize(picture: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    height, width = preprocess.size
    if picture.shape[:2] == (height, width) and preprocess.crop == 1.0:
        return picture
    ratio = max(height / picture.shape[0], width / picture.shape[1]) / preprocess.crop
    rows, columns = round(picture.shape[0] * ratio), round(picture.shape[1] * ratio)
    rows, columns = max(rows, height), max(columns, width)
    filter_ = Image.Resampling[preprocess.interpolation.upper()]
    resized = np.asarray(Image.fromarray(picture).resize((columns, rows), filter_))
    top, left = (rows - height) // 2, (columns - width) // 2
    return resized[top : top + height, left : left + width]
