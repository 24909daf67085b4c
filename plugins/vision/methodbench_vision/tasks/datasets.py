"""Labelled image sets: what a classifier is scored on, and the images apart from those for calibration.

The ImageNet sample has one picture per class in class order; its last hundred are kept for calibration.
EfficientNet-Lite0 is right on 87 % of the others, against some 75 % on ImageNet's validation set: compare
accuracies on this sample with one another, not with published ones.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image

from methodbench.errors import SourceError
from methodbench.sources import fetch

#: Digits that tasks score; the others train and calibrate.
DIGITS_HELD_OUT = 500
#: Pictures of the ImageNet sample that are kept for calibration.
IMAGENET_CALIBRATION = 100

DIGITS_CLASSES = tuple(str(digit) for digit in range(10))
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Pictures with their classes; pictures are decoded one at a time, when they are asked for."""

    encoded: Sequence[bytes] | np.ndarray
    """Image files, or uint8 [images, height, width, 3]."""
    labels: np.ndarray
    """int64 [images]."""
    digest: str = ""
    """Digest of the file that they come from, or the version of the package."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return picture ``index``: RGB, uint8 [height, width, 3]."""
        item = self.encoded[index]
        if isinstance(item, np.ndarray):
            return item
        with Image.open(io.BytesIO(item)) as picture:
            return np.asarray(picture.convert("RGB"))


@dataclass(frozen=True, slots=True)
class ImageSet:
    """A labelled image set in two parts that share no image."""

    classes: Callable[[], tuple[str, ...]]
    evaluation: Callable[[], LabelledImages]
    calibration: Callable[[], LabelledImages]


@cache
def digits() -> tuple[LabelledImages, LabelledImages]:
    """Return the 8 x 8 digits of scikit-learn: 1,297 to train on and 500 held out.

    The 1,797 images are split by one fixed permutation; their 17 grey levels become RGB bytes.
    """
    import sklearn
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    pictures = np.repeat(grey[..., None], 3, axis=-1)
    labels = bunch.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    train, held_out = order[:-DIGITS_HELD_OUT], order[-DIGITS_HELD_OUT:]
    digest = f"scikit-learn {sklearn.__version__}"
    return (
        LabelledImages(pictures[train], labels[train], digest),
        LabelledImages(pictures[held_out], labels[held_out], digest),
    )


def read_parquet(source: str, rows: slice = slice(None)) -> LabelledImages:
    """Read the columns ``image`` (encoded files) and ``label`` (class index) of a parquet file.

    Raises:
        SourceError: the file is absent, damaged, or lacks a column.
    """
    found = fetch(source)
    assert found.path is not None, "file: sources have a path"
    frame = _read_frame(found.path)[rows]
    labels = frame["label"].to_numpy().astype(np.int64)
    return LabelledImages(frame["image"].to_list(), labels, found.digest)


def _read_frame(path: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(path, columns=["image", "label"])
    except (pl.exceptions.PolarsError, OSError) as error:
        raise SourceError(
            f"{path} cannot be read as images with labels: {error}",
            "It must be a parquet file with the columns 'image' (encoded files) and 'label' (class index).",
        ) from error


@cache
def imagenet_classes() -> tuple[str, ...]:
    """Return the names of ImageNet's 1,000 classes in WordNet-id order, the order of the models' outputs."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))


_CIFAR10 = "file:{data}/cifar10"
_IMAGENET_SAMPLES = "file:{data}/imagenet_samples/val1000.parquet"


def imagenet_samples() -> LabelledImages:
    """Return all 1,000 pictures of the ImageNet sample, one per class, in class order.

    Raises:
        SourceError: the file is absent or damaged.
    """
    return read_parquet(_IMAGENET_SAMPLES)


#: Image sets by name.
IMAGE_SETS: Mapping[str, ImageSet] = {
    "digits": ImageSet(
        classes=lambda: DIGITS_CLASSES,
        evaluation=lambda: digits()[1],
        calibration=lambda: digits()[0],
    ),
    "cifar10": ImageSet(
        classes=lambda: CIFAR10_CLASSES,
        evaluation=lambda: read_parquet(f"{_CIFAR10}/test.parquet"),
        calibration=lambda: read_parquet(f"{_CIFAR10}/train.parquet"),
    ),
    "imagenet-samples": ImageSet(
        classes=imagenet_classes,
        evaluation=lambda: read_parquet(_IMAGENET_SAMPLES, slice(None, -IMAGENET_CALIBRATION)),
        calibration=lambda: read_parquet(_IMAGENET_SAMPLES, slice(-IMAGENET_CALIBRATION, None)),
    ),
}
