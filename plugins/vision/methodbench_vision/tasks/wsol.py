"""Weakly supervised localization: does a map, cut at a threshold, cover the object?

The scores are those of Choe et al., Evaluating Weakly Supervised Object Localization Methods Right (CVPR 2020,
2001.07437; code clovaai/wsolevaluation 96f4b88). A map is scaled to [0, 1] and cut at every threshold tau; the
boxes around what is left are compared with the true ones::

    BoxAcc(tau, delta) = share of images in which a box reaches IoU delta
    MaxBoxAcc          = max_tau BoxAcc(tau, 0.5), with the largest contour alone
    MaxBoxAccV2        = mean over delta in 0.3, 0.5, 0.7 of max_tau BoxAcc(tau, delta), with every contour
    PxAP               = sum_k P_k (R_k - R_(k-1)), precision and recall over the pixels of all images

GT-known localization is BoxAcc at one threshold that was chosen beforehand, on images of the training split; top-1
localization also asks that the model ranks the true class first. The
conventions are the code's: eight-bit maps, boxes that reach one pixel beyond their contour, areas counted with both
ends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated

import cv2
import numpy as np
import torch
from pydantic import Field

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, Explainer, Scores
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.tasks.images import SHAPES_CLASSES, ProceduralImages, normalize, procedural_images
from methodbench_vision.tasks.localization import fitted, pointing
from methodbench_vision.tasks.maps import on_device, preprocess_of, shown, timed_maps

#: IoUs that count as found.
DELTAS = (0.3, 0.5, 0.7)
#: Label of pixels that are neither object nor background.
IGNORED = 255


@hyperparameters
class Localization:
    """Maps of procedural images, explained for their true class, against boxes and masks; the unit is one image.

    MaxBoxAcc and its second version choose their thresholds on the images that they score, as their definition
    has it; GT-known localization on the first training images.
    """

    images: Annotated[int, Field(ge=1, le=100_000, description="test images")] = 300
    validation_images: Annotated[
        int, Field(ge=1, le=100_000, description="training images that choose the threshold of GT-known")
    ] = 100
    image_seed: Annotated[int, Field(ge=0, description="seed of the image set")] = 0
    threshold_step: Annotated[
        float, Field(gt=0, le=0.5, description="distance of the thresholds on maps in [0, 1]")
    ] = 0.02
    batch_size: Annotated[int, Field(ge=1, le=1024, description="images per forward pass")] = 50

    def evaluate(self, method: Explainer, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Explain every image and compare boxes and pixels.

        Raises:
            NotApplicableError: the model was not trained on the procedural images.
        """
        model = fitted(model)
        thresholds = np.arange(0, 1, self.threshold_step)
        data = procedural_images(self.image_seed, self.images, split="test")
        maps, seconds = self._maps(method, model, data, ctx)
        single = best_ious(maps, data.boxes[:, None].numpy(), thresholds, multiple=False)
        every = best_ious(maps, data.boxes[:, None].numpy(), thresholds, multiple=True)
        seen = procedural_images(self.image_seed, self.validation_images, split="train")
        known, _ = self._maps(method, model, seen, ctx)
        chosen = int(
            (best_ious(known, seen.boxes[:, None].numpy(), thresholds, multiple=False) >= 0.5)
            .mean(0)
            .argmax()
        )
        found = single[:, chosen] >= 0.5
        right = predicted_right(model, data, self.batch_size, ctx)
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
            },
            series={
                "box-acc-by-threshold": (single >= 0.5).mean(0),
                "box-acc-by-threshold-every-contour": (every >= 0.5).mean(0),
            },
            facts={
                "images": self.images,
                "gt_known_threshold": float(thresholds[chosen]),
                "object_share": float(masks.mean()),
                "data_digest": hashlib.sha256(data.images.numpy().tobytes()).hexdigest(),
            },
            pictures=shown(data.images, maps, [SHAPES_CLASSES[k] for k in data.labels]),
            throughput=(self.images / seconds, "maps/s"),
        )

    def _maps(
        self, method: Explainer, model: LoadedModel, data: ProceduralImages, ctx: Context
    ) -> tuple[np.ndarray, float]:
        """Return the scaled maps, float64 [n, H, W], and the seconds that they took."""
        inputs = normalize(data.images, preprocess_of(model))
        found, seconds = [], 0.0
        for part in torch.arange(len(data)).split(self.batch_size):
            x = on_device(inputs[part], ctx)
            maps, spent = timed_maps(
                method, model, x, data.labels[part].to(x.device), data.objects[part].to(x.device)
            )
            found.append(maps.double().cpu().numpy())
            seconds += spent
        return np.stack([scaled(one) for one in np.concatenate(found)]), seconds


def predicted_right(model: LoadedModel, data: ProceduralImages, batch_size: int, ctx: Context) -> np.ndarray:
    """Return for which images the model ranks the true class first, bool [n]."""
    inputs = normalize(data.images, preprocess_of(model))
    with torch.no_grad():
        best = [model.module(on_device(part, ctx)).argmax(1).cpu() for part in inputs.split(batch_size)]
    return (torch.cat(best) == data.labels).numpy()


def scaled(one: np.ndarray) -> np.ndarray:
    """Scale a map [H, W] to [0, 1]; one that is constant or holds NaN becomes zero."""
    if np.isnan(one).any() or one.min() == one.max():
        return np.zeros_like(one)
    moved = one - one.min()
    return moved / moved.max()


def boxes(one: np.ndarray, threshold: float, *, multiple: bool) -> np.ndarray:
    """Return the boxes around what lies above a threshold, int64 [boxes, 4] as x0, y0, x1, y1.

    Args:
        one: map [H, W] in [0, 1].
        threshold: share of the map's maximum.
        multiple: every contour, instead of the one with the largest area.

    Returns:
        One box of zeros where nothing lies above the threshold.
    """
    height, width = one.shape
    grey = (one * 255).astype(np.uint8)
    binary = (grey > int(threshold * grey.max())).astype(np.uint8) * 255
    contours = list(cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0])
    if not contours:
        return np.zeros((1, 4), dtype=np.int64)
    if not multiple:
        contours = [max(contours, key=cv2.contourArea)]
    found = []
    for contour in contours:
        x, y, w, h = cv2.boundingRect(contour)
        found.append((x, y, min(x + w, width - 1), min(y + h, height - 1)))
    return np.array(found, dtype=np.int64)


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the IoU of boxes [n, 4] with boxes [m, 4], [n, m]; both ends of a box belong to it."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inside = np.prod(np.maximum(high - low + 1, 0), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2] + 1, axis=1) for boxes in (a, b)]
    return inside / (areas[0][:, None] + areas[1][None] - inside)


def best_ious(maps: np.ndarray, truth: np.ndarray, thresholds: np.ndarray, *, multiple: bool) -> np.ndarray:
    """Return the highest IoU of any box with any true one, float64 [n, thresholds].

    Args:
        maps: [n, H, W] in [0, 1].
        truth: int [n, boxes, 4].
        thresholds: shares of each map's maximum.
        multiple: see :func:`boxes`.
    """
    return np.array(
        [
            [iou(boxes(one, tau, multiple=multiple), true).max() for tau in thresholds]
            for one, true in zip(maps, truth, strict=True)
        ]
    )


def hits(best: np.ndarray, delta: float) -> np.ndarray:
    """Return which images are found at the threshold that finds most, float64 [n].

    Args:
        best: highest IoUs [n, thresholds].
        delta: IoU that counts as found.
    """
    found = best >= delta
    return found[:, found.mean(0).argmax()].astype(np.float64)


def pixel_average_precision(maps: np.ndarray, labels: np.ndarray) -> float:
    """Return PxAP in percent, over the pixels of all maps at 1,000 thresholds.

    Args:
        maps: [n, H, W] in [0, 1].
        labels: 1 for the object, 0 for the background, :data:`IGNORED` for neither; [n, H, W].
    """
    edges = np.append(np.arange(0, 1, 0.001), [1.0, 2.0, 3.0])
    positive, negative = (np.histogram(maps[labels == value], bins=edges)[0] for value in (1, 0))
    true, false = positive[::-1].cumsum(), negative[::-1].cumsum()
    found = true + false
    precision = np.divide(true, found, out=np.zeros(len(found)), where=found > 0)
    recall = true / max(1, positive.sum())
    return float(100 * (precision[1:] * np.diff(recall)).sum())


def pooled_iou(maps: np.ndarray, labels: np.ndarray, thresholds: Sequence[float] | np.ndarray) -> float:
    """Return the highest IoU of pixels at or above a threshold with the masks, over all images together."""
    known, truth = labels != IGNORED, labels == 1
    shares = []
    for threshold in thresholds:
        predicted = (maps >= threshold) & known
        shares.append((predicted & truth).sum() / max(1, (predicted | (truth & known)).sum()))
    return float(max(shares))
