"""Explainers on pictures of several classes: does the map of each class lie on the objects of that class?

Every class that a picture shows is explained by itself, and the maps compete for its pixels as seeds of semantic
segmentation do (:mod:`methodbench_vision.tasks.weak`). Who draws the same map for every class leaves ties, which go to
the first one.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, Explainer
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.tasks.images import SHAPES_CLASSES, normalize
from methodbench_vision.tasks.localization import fitted
from methodbench_vision.tasks.maps import on_device, preprocess_of, shown, timed_maps
from methodbench_vision.tasks.scenes import Scenes, scenes
from methodbench_vision.tasks.weak import ThresholdEnd, ThresholdStep, seed_scores


@hyperparameters
class SeveralClasses:
    """One to three objects per picture, each class explained by itself; the unit is one picture."""

    images: Annotated[int, Field(ge=2, le=100_000, description="test pictures")] = 300
    image_seed: Annotated[int, Field(ge=0, description="seed of the picture set")] = 0
    together: Annotated[
        float, Field(ge=0, le=1, description="how often an object's neighbour is of its companion class")
    ] = 0.0
    threshold_step: ThresholdStep = 0.02
    threshold_end: ThresholdEnd = 0.9
    batch_size: Annotated[int, Field(ge=1, le=1024, description="pictures per forward pass")] = 50

    def evaluate(self, method: Explainer, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Explain every class of every picture, cut the maps at every threshold, score the labels.

        Raises:
            NotApplicableError: the model was not trained on the procedural images.
        """
        model = fitted(model)
        data = scenes(self.image_seed, self.images, together=self.together)
        maps, seconds = self.maps(method, model, data, ctx)
        thresholds = np.arange(0, self.threshold_end, self.threshold_step)
        found = seed_scores(maps.numpy(), data.labels.numpy(), data.masks.numpy(), thresholds)
        first = data.labels.int().argmax(1)
        return Evaluation(
            scores=found.scores,
            series={"seed-miou-by-threshold": found.by_threshold},
            pictures=shown(
                data.images, maps[torch.arange(len(maps)), first], [SHAPES_CLASSES[k] for k in first]
            ),
            facts={
                "images": self.images,
                "maps": int(data.labels.sum()),
                "best_threshold": found.threshold,
                "foreground_share": float((data.masks > 0).double().mean()),
                "data_digest": hashlib.sha256(data.images.numpy().tobytes()).hexdigest(),
            },
            throughput=(int(data.labels.sum()) / seconds, "maps/s"),
        )

    def maps(self, method: Explainer, model: LoadedModel, data: Scenes, ctx: Context) -> tuple[Tensor, float]:
        """Return maps float64 [N, K, H, W], zero for classes that a picture does not show, and the seconds it took."""
        x = normalize(data.images, preprocess_of(model))
        maps = torch.zeros(*data.labels.shape, *x.shape[2:], dtype=torch.float64)
        seconds = 0.0
        for label in range(data.labels.shape[1]):
            for part in data.labels[:, label].nonzero()[:, 0].split(self.batch_size):
                shown_to = on_device(x[part], ctx)
                target = torch.full((len(part),), label, device=shown_to.device)
                masks = (data.masks[part] == label + 1).to(shown_to.device)
                found, spent = timed_maps(method, model, shown_to, target, masks)
                maps[part, label] = found.double().cpu()
                seconds += spent
        return maps, seconds
