"""Localization scores of saliency maps on images whose masks are known exactly.

Pointing game (Zhang et al., 1608.00507) without a margin; relevance mass and rank accuracy (Arras et al.,
CLEVR-XAI, 2003.07258). The rules are Quantus': any pixel that attains the maximum counts.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, Explainer, Scores
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.tasks.images import (
    SHAPES_CLASSES,
    SHAPES_SIZE,
    Difficulty,
    Texture,
    normalize,
    procedural_images,
)
from methodbench_vision.tasks.maps import on_device, preprocess_of, shown, timed_maps

#: What a loader writes into ``facts["data"]`` of a model that was trained on the procedural images.
TRAINING_DATA = "procedural-shapes"


@hyperparameters
class PointingGame:
    """Maps of procedural images, explained for their true class; the unit is one image.

    All classes look alike but for the stripes on the head, one end of the object: a map that points at the
    object localizes, one that points at the head shows what tells the classes apart.
    """

    images: Annotated[int, Field(ge=1, le=100_000, description="test images")] = 300
    image_seed: Annotated[int, Field(ge=0, description="seed of the image set")] = 0
    texture: Texture = 1.0
    difficulty: Difficulty = 0.0
    batch_size: Annotated[int, Field(ge=1, le=1024, description="images per forward pass")] = 50

    def evaluate(self, method: Explainer, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Explain every image and compare the maps with the masks.

        Raises:
            NotApplicableError: the model was not trained on the procedural images.
        """
        model = fitted(model)
        preprocess = preprocess_of(model)
        data = procedural_images(
            self.image_seed,
            self.images,
            split="test",
            texture=self.texture,
            difficulty=self.difficulty,
        )
        inputs = normalize(data.images, preprocess)
        maps, correct, seconds = [], 0, 0.0
        for start in range(0, self.images, self.batch_size):
            x = on_device(inputs[start : start + self.batch_size], ctx)
            target = data.labels[start : start + self.batch_size].to(x.device)
            with torch.no_grad():
                correct += int((model.module(x).argmax(1) == target).sum())
            objects = data.objects[start : start + self.batch_size].to(x.device)
            batch, spent = timed_maps(method, model, x, target, objects)
            maps.append(batch.double().cpu())
            seconds += spent
        saliency = torch.cat(maps)
        return Evaluation(
            scores={
                "pointing-object": Scores(pointing(saliency, data.objects).numpy()),
                "pointing-head": Scores(pointing(saliency, data.heads).numpy()),
                "relevance-mass": Scores(relevance_mass(saliency, data.objects).numpy()),
                "relevance-rank": Scores(relevance_rank(saliency, data.objects).numpy()),
            },
            facts={
                "images": self.images,
                "accuracy": correct / self.images,
                "object_share": float(data.objects.double().mean()),
                "head_share": float(data.heads.double().mean()),
                "data_digest": hashlib.sha256(data.images.numpy().tobytes()).hexdigest(),
            },
            pictures=shown(data.images, saliency, [SHAPES_CLASSES[k] for k in data.labels]),
            throughput=(self.images / seconds, "maps/s"),
        )


def fitted(model: LoadedModel | None) -> LoadedModel:
    """Return the model if it was trained on the procedural images and takes them as they are.

    Raises:
        NotApplicableError: it was not, or there is none.
    """
    if model is None or model.facts.get("data") != TRAINING_DATA:
        raise NotApplicableError(
            f"{model.name if model else 'no model'} was not trained on the procedural images",
            f"Use a model whose loader sets facts['data'] to {TRAINING_DATA!r}.",
        )
    size = tuple(preprocess_of(model).size)
    if size != (SHAPES_SIZE, SHAPES_SIZE):
        raise NotApplicableError(
            f"{model.name} takes {size} pixels; the masks have {SHAPES_SIZE} x {SHAPES_SIZE}",
            "Use a model that takes the procedural images as they are.",
        )
    return model


def pointing(maps: Tensor, masks: Tensor) -> Tensor:
    """Return 1 where a pixel that attains the map's maximum lies in the mask, else 0; NaN for an empty mask.

    A constant map points nowhere: 0.

    Args:
        maps: float64 [B, H, W].
        masks: bool [B, H, W].

    Returns:
        float64 [B].
    """
    peak = maps.amax((1, 2), keepdim=True)
    hit = ((maps == peak) & masks & (maps.amin((1, 2), keepdim=True) < peak)).any(2).any(1)
    return _unless_empty(hit.to(maps.dtype), masks)


def relevance_mass(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the share of the map's sum that lies in the mask, float64 [B].

    Takes non-negative maps float64 [B, H, W] and masks bool [B, H, W]. A zero map scores 0, an
    empty mask NaN.
    """
    inside, total = (maps * masks).sum((1, 2)), maps.sum((1, 2))
    return _unless_empty(torch.where(total > 0, inside / total, 0), masks)


def relevance_rank(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the share of the map's K highest pixels that lie in the mask of K pixels; NaN if K is 0.

    Of pixels that tie for the last places, each counts with its chance of getting one, so that large areas of
    equal value (maps cut off at zero) favour no corner of the image.

    Args:
        maps: float64 [B, H, W].
        masks: bool [B, H, W].

    Returns:
        float64 [B].
    """
    flat, inside = maps.flatten(1), masks.flatten(1)
    count = inside.sum(1, keepdim=True)
    last = flat.sort(dim=1, descending=True).values.gather(1, (count - 1).clamp_min(0))
    above, tied = flat > last, flat == last
    places = (count - above.sum(1, keepdim=True)) / tied.sum(1, keepdim=True)
    found = (above & inside).sum(1, keepdim=True) + places * (tied & inside).sum(1, keepdim=True)
    return _unless_empty((found / count).squeeze(1).to(maps.dtype), masks)


def _unless_empty(scores: Tensor, masks: Tensor) -> Tensor:
    return torch.where(masks.flatten(1).any(1), scores, torch.nan)
