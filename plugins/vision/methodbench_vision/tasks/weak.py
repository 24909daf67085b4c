"""Methods that learn masks from weak labels, on pictures whose masks are known to the task alone.

``WeakLocalization`` gives one class per picture and scores the map of the true class as
:mod:`methodbench_vision.tasks.wsol` scores explainers. ``SeedSegmentation`` gives the set of classes and scores the
seeds as IRN (Ahn et al., CVPR 2019) and MCTformer (Xu et al., CVPR 2022) do::

    label(t) = argmax of a plane of constant t and the maps of the classes that are present
    IoU_k    = TP_k / (GT_k + Pred_k - TP_k) over the pixels of all pictures,     mIoU = mean over K + 1 classes
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import MethodbenchError, NotApplicableError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, Scores, Segmenter
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.models.shapes_cnn import PREPROCESS
from methodbench_vision.tasks.images import normalize, procedural_images
from methodbench_vision.tasks.localization import pointing
from methodbench_vision.tasks.wsol import (
    DELTAS,
    best_ious,
    hits,
    pixel_average_precision,
    pooled_iou,
    scaled,
)
from methodbench_vision.weak.training import Seeds

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
    threshold_step: Annotated[
        float, Field(gt=0, le=0.5, description="distance of the thresholds on maps in [0, 1]")
    ] = 0.02

    def evaluate(self, method: Segmenter, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Train the method and score its maps of the true class.

        Raises:
            NotApplicableError: the method learns from other labels, or hands back no maps.
        """
        seen = procedural_images(self.image_seed, self.train_images, split="train")
        data = procedural_images(self.image_seed, self.images, split="test")
        x = normalize(seen.images, PREPROCESS)
        with ctx.phase("fit"):
            predictor = seeds_of(method.fit({"images": x, "labels": seen.labels}, ctx))
        thresholds = np.arange(0, 1, self.threshold_step)
        maps, scores = _of_class(predictor, normalize(data.images, PREPROCESS), data.labels)
        known, _ = _of_class(predictor, x[: self.validation_images], seen.labels[: self.validation_images])
        boxes = data.boxes[:, None].numpy()
        single = best_ious(maps, boxes, thresholds, multiple=False)
        every = best_ious(maps, boxes, thresholds, multiple=True)
        chosen_boxes = seen.boxes[: self.validation_images, None].numpy()
        chosen = int((best_ious(known, chosen_boxes, thresholds, multiple=False) >= 0.5).mean(0).argmax())
        found = single[:, chosen] >= 0.5
        right = (scores.argmax(1) == data.labels).numpy()
        masks = data.objects.numpy()
        return Evaluation(
            scores={
                "max-box-acc-v2": Scores(np.mean([hits(every, delta) for delta in DELTAS], axis=0)),
                "max-box-acc": Scores(hits(single, 0.5)),
                "gt-known-loc": Scores(found.astype(np.float64)),
                "top1-loc": Scores((found & right).astype(np.float64)),
                "pxap": Scores(np.array([pixel_average_precision(maps, masks)])),
                "piou": Scores(np.array([pooled_iou(maps, masks, thresholds)])),
                "pointing-object": Scores(pointing(torch.from_numpy(maps), data.objects).numpy()),
                "accuracy": Scores(right.astype(np.float64)),
            },
            series={"box-acc-by-threshold": (single >= 0.5).mean(0)},
            facts={
                "images": self.images,
                "train_images": self.train_images,
                "gt_known_threshold": float(thresholds[chosen]),
                "object_share": float(masks.mean()),
                "data_digest": hashlib.sha256(data.images.numpy().tobytes()).hexdigest(),
            },
        )


def seeds_of(predictor: object) -> Seeds:
    """Return what a method's ``fit`` handed back, if it has maps and not only masks.

    Raises:
        NotApplicableError: it has none.
    """
    if not isinstance(predictor, Seeds):
        raise NotApplicableError(
            f"the predictor, {type(predictor).__name__}, gives masks and no map per class",
            "This task cuts maps at every threshold: return a methodbench_vision.weak.training.Seeds.",
        )
    return predictor


def _of_class(predictor: Seeds, x: Tensor, labels: Tensor) -> tuple[np.ndarray, Tensor]:
    """Return the maps of the classes ``labels`` [N], float64 [N, H, W] in [0, 1], and all scores [N, K]."""
    maps, scores = _checked(predictor, x)
    chosen = maps[torch.arange(len(x)), labels].double().numpy()
    return np.stack([scaled(one) for one in chosen]), scores


def _checked(predictor: Seeds, x: Tensor) -> tuple[Tensor, Tensor]:
    maps, scores = predictor.maps(x)
    if maps.ndim != 4 or maps.shape[2:] != x.shape[2:] or not bool(maps.isfinite().all()):
        raise MethodbenchError(
            f"maps are {tuple(maps.shape)}, not finite [N, K, H, W] as large as the picture"
        )
    return maps, scores
