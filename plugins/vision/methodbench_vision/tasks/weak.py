"""Methods that learn masks from weak labels, on pictures whose masks are known to the task alone.

``WeakLocalization`` gives one class per picture and scores the map of the true class as
:mod:`methodbench_vision.tasks.wsol` scores explainers. ``SeedSegmentation`` gives the set of classes and scores the
seeds as IRN (Ahn et al., CVPR 2019) and MCTformer (Xu et al., CVPR 2022) do::

    label(t) = argmax of a plane of constant t and the maps of the classes that are present
    IoU_k    = TP_k / (GT_k + Pred_k - TP_k) over the pixels of all pictures,     mIoU = mean over K + 1 classes

Both take controls too, which learn nothing: explainers that look at no model, and the oracle. What asks whether the
classes were told right has no score for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import MethodbenchError, NotApplicableError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, Explainer, Scores, Segmenter
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.models.shapes_cnn import PREPROCESS
from methodbench_vision.tasks.images import (
    SHAPES_CLASSES,
    Difficulty,
    Texture,
    normalize,
    procedural_images,
)
from methodbench_vision.tasks.localization import pointing
from methodbench_vision.tasks.maps import control_maps, shown
from methodbench_vision.tasks.scenes import scenes
from methodbench_vision.tasks.wsol import (
    DELTAS,
    IGNORED,
    best_ious,
    hits,
    pixel_average_precision,
    pooled_iou,
    scaled,
)
from methodbench_vision.weak.training import Seeds, labelled

#: Distance and end of the background scores that maps are cut at.
ThresholdStep = Annotated[float, Field(gt=0, le=0.3, description="distance of background scores")]
ThresholdEnd = Annotated[float, Field(gt=0, le=1, description="background scores end before it")]
_Images = Annotated[int, Field(ge=2, le=100_000, description="test pictures")]
_Train = Annotated[int, Field(ge=4, le=100_000, description="pictures to learn from")]
_Seed = Annotated[int, Field(ge=0, description="seed of the picture set")]


@hyperparameters
class WeakLocalization:
    """One class per picture to learn from; boxes and pixels of the test pictures. The unit is one picture.

    MaxBoxAcc and its second version choose their thresholds on the pictures that they score, as their definition has
    it; GT-known and top-1 localization on training pictures.
    """

    images: _Images = 300
    train_images: _Train = 2000
    validation_images: Annotated[
        int, Field(ge=1, le=100_000, description="training pictures that choose the threshold of GT-known")
    ] = 100
    image_seed: _Seed = 0
    texture: Texture = 1.0
    difficulty: Difficulty = 0.0
    threshold_step: Annotated[
        float, Field(gt=0, le=0.5, description="distance of the thresholds on maps in [0, 1]")
    ] = 0.02

    def evaluate(self, method: Segmenter | Explainer, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Train the method and score its maps of the true class.

        Raises:
            NotApplicableError: the method learns from other labels, hands back no maps, or explains a model.
        """
        drawn = {"texture": self.texture, "difficulty": self.difficulty}
        seen = procedural_images(self.image_seed, self.train_images, split="train", **drawn)
        data = procedural_images(self.image_seed, self.images, split="test", **drawn)
        x = normalize(seen.images, PREPROCESS)
        predictor = learned(method, {"images": x, "labels": seen.labels}, ctx)
        thresholds = np.arange(0, 1, self.threshold_step)
        maps, classes = _of_class(predictor, normalize(data.images, PREPROCESS), data.labels, data.objects)
        some = slice(self.validation_images)
        known, _ = _of_class(predictor, x[some], seen.labels[some], seen.objects[some])
        boxes = data.boxes[:, None].numpy()
        single = best_ious(maps, boxes, thresholds, multiple=False)
        every = best_ious(maps, boxes, thresholds, multiple=True)
        chosen_boxes = seen.boxes[some, None].numpy()
        chosen = int((best_ious(known, chosen_boxes, thresholds, multiple=False) >= 0.5).mean(0).argmax())
        found = single[:, chosen] >= 0.5
        masks = data.objects.numpy()
        scores = {
            "max-box-acc-v2": Scores(np.mean([hits(every, delta) for delta in DELTAS], axis=0)),
            "max-box-acc": Scores(hits(single, 0.5)),
            "gt-known-loc": Scores(found.astype(np.float64)),
            "pxap": Scores(np.array([pixel_average_precision(maps, masks)])),
            "piou": Scores(np.array([pooled_iou(maps, masks, thresholds)])),
            "pointing-object": Scores(pointing(torch.from_numpy(maps), data.objects).numpy()),
        }
        if classes is not None:
            right = (classes.argmax(1) == data.labels).numpy()
            scores["top1-loc"] = Scores((found & right).astype(np.float64))
            scores["accuracy"] = Scores(right.astype(np.float64))
        return Evaluation(
            scores=scores,
            series={"box-acc-by-threshold": (single >= 0.5).mean(0)},
            pictures=shown(data.images, maps, [SHAPES_CLASSES[k] for k in data.labels]),
            facts={
                "images": self.images,
                "train_images": self.train_images,
                "gt_known_threshold": float(thresholds[chosen]),
                "object_share": float(masks.mean()),
                "data_digest": hashlib.sha256(data.images.numpy().tobytes()).hexdigest(),
            },
        )


def learned(method: Segmenter | Explainer, weak_labels: Mapping[str, Any], ctx: Context) -> Seeds | Explainer:
    """Return what a method learns from weak labels; a control, which learns nothing, as it is.

    Raises:
        NotApplicableError: it learns from other labels, or masks alone and no map per class.
    """
    if isinstance(method, Explainer):
        return method
    with ctx.phase("fit"):
        predictor = method.fit(weak_labels, ctx)
    if not isinstance(predictor, Seeds):
        raise NotApplicableError(
            f"the predictor, {type(predictor).__name__}, gives masks and no map per class",
            "This task cuts maps at every threshold: return a methodbench_vision.weak.training.Seeds.",
        )
    return predictor


def _of_class(
    predictor: Seeds | Explainer, x: Tensor, labels: Tensor, objects: Tensor
) -> tuple[np.ndarray, Tensor | None]:
    """Return the maps of the classes ``labels`` [N], float64 [N, H, W] in [0, 1], and all scores [N, K]."""
    masks = objects[:, None].expand(-1, len(SHAPES_CLASSES), -1, -1)
    maps, scores = _checked(predictor, x, masks)
    chosen = maps[torch.arange(len(x)), labels].double().numpy()
    return np.stack([scaled(one) for one in chosen]), scores


def _checked(predictor: Seeds | Explainer, x: Tensor, masks: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the maps [N, K, H, W] of all classes and their scores [N, K], which a control does not have.

    Args:
        predictor: what :func:`learned` returns.
        x: normalized images [N, 3, H, W].
        masks: what an oracle is told, bool [N, K, H, W].
    """
    maps, scores = (
        predictor.maps(x) if isinstance(predictor, Seeds) else (control_maps(predictor, x, masks), None)
    )
    if maps.ndim != 4 or maps.shape[2:] != x.shape[2:] or not bool(maps.isfinite().all()):
        raise MethodbenchError(
            f"maps are {tuple(maps.shape)}, not finite [N, K, H, W] as large as the picture"
        )
    return maps, scores


@hyperparameters
class SeedSegmentation:
    """Sets of classes to learn from; seeds of test pictures whose set of classes is known. The unit is one picture.

    The threshold is the best one on the pictures that are scored, as IRN and MCTformer have it for the seeds of their
    training pictures; ``image-miou`` is the mean over pictures, and over the classes that truth or seed have, at that
    threshold. ``seed-area`` is the share of a picture that seeds cover at the method's own, fixed threshold: how far
    they reach, which is neither good nor bad.
    """

    images: _Images = 300
    train_images: _Train = 2000
    image_seed: _Seed = 0
    together: Annotated[
        float, Field(ge=0, le=1, description="how often an object's neighbour is of its companion class")
    ] = 0.8
    head_from: Annotated[
        float,
        Field(gt=-1, lt=1, description="where the part that tells the class begins along the long axis"),
    ] = 0.0
    texture: Texture = 1.0
    difficulty: Difficulty = 0.0
    threshold_step: ThresholdStep = 0.02
    threshold_end: ThresholdEnd = 0.9

    def evaluate(self, method: Segmenter | Explainer, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Train the method, cut its maps at every threshold, score the labels.

        Raises:
            NotApplicableError: the method learns from other labels, hands back no maps, or explains a model.
        """
        drawn = {
            "together": self.together,
            "head_from": self.head_from,
            "texture": self.texture,
            "difficulty": self.difficulty,
        }
        seen = scenes(self.image_seed, self.train_images, split="train", **drawn)
        data = scenes(self.image_seed, self.images, split="test", **drawn)
        weak = {"images": normalize(seen.images, PREPROCESS), "labels": seen.labels}
        predictor = learned(method, weak, ctx)
        masks = data.masks[:, None] == torch.arange(1, data.labels.shape[1] + 1)[:, None, None]
        maps, classes = _checked(predictor, normalize(data.images, PREPROCESS), masks)
        thresholds = np.arange(0, self.threshold_end, self.threshold_step)
        found = seed_scores(maps.double().numpy(), data.labels.numpy(), data.masks.numpy(), thresholds)
        scores = found.scores
        # A picture of several classes is shown with the map of its first one.
        first = data.labels.int().argmax(1)
        if isinstance(predictor, Seeds) and classes is not None:
            scores["classification"] = Scores(((classes > 0) == data.labels).double().mean(1).numpy())
            covered = labelled(maps, data.labels, predictor.threshold) > 0
            scores["seed-area"] = Scores(covered.double().mean((1, 2)).numpy())
        return Evaluation(
            scores=scores,
            series={"seed-miou-by-threshold": found.by_threshold},
            pictures=shown(
                data.images, maps[torch.arange(len(maps)), first], [SHAPES_CLASSES[k] for k in first]
            ),
            facts={
                "images": self.images,
                "train_images": self.train_images,
                "best_threshold": found.threshold,
                "foreground_share": float((data.masks > 0).double().mean()),
                "data_digest": hashlib.sha256(data.images.numpy().tobytes()).hexdigest(),
            },
        )


class SeedScores(NamedTuple):
    """What seeds are worth at the threshold that is best for them."""

    scores: dict[str, Scores]
    by_threshold: np.ndarray
    """mIoU at every threshold, float64 [n]."""
    threshold: float
    """The best one."""


def seed_scores(
    maps: np.ndarray, present: np.ndarray, truth: np.ndarray, thresholds: np.ndarray
) -> SeedScores:
    """Cut maps at every threshold, and score the labels of the best.

    Args:
        maps: float64 [N, K, H, W] in [0, 1].
        present: bool [N, K], which classes a picture shows.
        truth: int64 [N, H, W], 0 for the background and k + 1 for class k.
        thresholds: background scores [n].
    """
    tables = confusions(maps, present, truth, thresholds)
    pooled = miou(tables.sum(1))
    best = int(pooled.argmax())
    hit, wanted, drawn = _parts(tables[best].sum(0))
    union = (wanted + drawn - hit)[1:].sum()
    scores = {
        "seed-miou": Scores(pooled[best : best + 1]),
        "image-miou": Scores(np.array([miou(table[None])[0] for table in tables[best]])),
        "wrong-class": Scores(np.array([_wrong_class(table) for table in tables[best]])),
        "over-activation": Scores(((drawn - hit)[1:].sum() / union)[None]),
        "under-activation": Scores(((wanted - hit)[1:].sum() / union)[None]),
    }
    return SeedScores(scores, pooled, float(thresholds[best]))


def confusions(
    maps: np.ndarray, present: np.ndarray, truth: np.ndarray, thresholds: np.ndarray
) -> np.ndarray:
    """Return the confusion tables int64 [thresholds, n, K + 1, K + 1], truth by prediction.

    Args:
        maps: [n, K, H, W] in [0, 1]; of the classes that are not present nothing is drawn.
        present: bool [n, K].
        truth: 0 for the background, k + 1 for class k, :data:`methodbench_vision.tasks.wsol.IGNORED` for neither.
        thresholds: scores of the background, which wins ties.
    """
    held = np.where(present[:, :, None, None].astype(bool), maps, -1.0)
    best, value = held.argmax(1) + 1, held.max(1)
    count = maps.shape[1] + 1
    known = truth != IGNORED
    tables = np.zeros((len(thresholds), len(maps), count, count), dtype=np.int64)
    for row, threshold in enumerate(thresholds):
        predicted = np.where(value > threshold, best, 0)
        for index in range(len(maps)):
            pairs = count * truth[index][known[index]] + predicted[index][known[index]]
            tables[row, index] = np.bincount(pairs, minlength=count**2).reshape(count, count)
    return tables


def miou(tables: np.ndarray) -> np.ndarray:
    """Return the mean IoU [n] of confusion tables [n, K + 1, K + 1]; classes in neither truth nor seed are left out."""
    hit, wanted, drawn = _parts(tables)
    union = wanted + drawn - hit
    shares = np.divide(hit, union, out=np.full(hit.shape, np.nan), where=union > 0)
    return np.nanmean(shares, axis=-1)


def _parts(tables: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return true positives, pixels of the truth and pixels of the prediction, per class."""
    hit = np.diagonal(tables, axis1=-2, axis2=-1).astype(np.float64)
    return hit, tables.sum(-1).astype(np.float64), tables.sum(-2).astype(np.float64)


def _wrong_class(table: np.ndarray) -> float:
    """Return the share of the objects' pixels that are labelled as another class; NaN without objects."""
    objects = table[1:].sum()
    wrong = table[1:, 1:].sum() - np.diagonal(table)[1:].sum()
    return float(wrong / objects) if objects else float("nan")
