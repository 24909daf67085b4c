"""Accuracy of image classifiers on labelled image sets."""

from __future__ import annotations

import time
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, Scores
from methodbench.torchkit.model import Calibration, LoadedModel, Preprocess
from methodbench.torchkit.packed import materialized
from methodbench_vision.tasks.datasets import IMAGE_SETS, ImageSet
from methodbench_vision.tasks.images import to_inputs


@hyperparameters
class ImageAccuracy:
    """Share of images whose highest logit is the true class; the unit is one image.

    Images are scored in the order of the set, each resized and cropped as the model asks for. A row of logits
    that is not finite counts as wrong, with an infinite loss.
    """

    data: Annotated[
        Literal["digits", "cifar10", "imagenet-samples"], Field(description="which labelled images to score")
    ] = "digits"
    images: Annotated[
        int, Field(ge=0, description="how many images to score, from the first one on; 0 for all")
    ] = 0
    calibration_images: Annotated[
        int, Field(ge=1, le=4096, description="how many images a method may look at beforehand")
    ] = 32
    batch_size: Annotated[int, Field(ge=1, le=1024, description="images per forward pass")] = 16

    def calibration(self, model: LoadedModel, ctx: Context) -> Calibration:
        """Return training-side images [calibration_images, 3, height, width], drawn by ``ctx.seed``.

        Raises:
            NotApplicableError: the model's classes are not the data's, or there are fewer images than asked
                for.
        """
        image_set, preprocess = self._fit(model)
        images = image_set.calibration()
        if self.calibration_images > len(images):
            raise NotApplicableError(
                f"{self.data} has {len(images)} images for calibration, not {self.calibration_images}",
                f"Set calibration_images to {len(images)} or less.",
            )
        chosen = np.random.default_rng(ctx.seed).permutation(len(images))[: self.calibration_images]
        inputs = to_inputs([images[int(index)] for index in chosen], preprocess)
        source = f"{self.data}: {self.calibration_images} images apart from the scored ones, seed {ctx.seed}"
        return Calibration(_on_device(inputs, ctx), source)

    def evaluate(self, model: LoadedModel, ctx: Context) -> Evaluation:
        """Score the model.

        Raises:
            NotApplicableError: the model's classes are not the data's.
            SourceError: the data is absent or damaged.
        """
        image_set, preprocess = self._fit(model)
        images = image_set.evaluation()
        count = min(self.images or len(images), len(images))
        correct, losses, seconds = [], [], 0.0
        with materialized(model.module), torch.inference_mode():
            for start in range(0, count, self.batch_size):
                batch = range(start, min(start + self.batch_size, count))
                inputs = _on_device(to_inputs([images[index] for index in batch], preprocess), ctx)
                began = time.perf_counter()
                logits = model.module(inputs).float().cpu()
                seconds += time.perf_counter() - began
                hits, nll = score(logits, torch.from_numpy(images.labels[batch.start : batch.stop]))
                correct.append(hits)
                losses.append(nll)
        return Evaluation(
            scores={
                "accuracy": Scores(torch.cat(correct).double().numpy()),
                "nll": Scores(torch.cat(losses).double().numpy()),
            },
            facts={
                "images": count,
                "classes": len(model.classes),
                "input_size": list(preprocess.size),
                "crop": preprocess.crop,
                "interpolation": preprocess.interpolation,
                "data_digest": images.digest,
            },
            throughput=(count / seconds, "images/s"),
        )

    def _fit(self, model: LoadedModel) -> tuple[ImageSet, Preprocess]:
        image_set = IMAGE_SETS[self.data]
        if model.classes != image_set.classes():
            raise NotApplicableError(
                f"{model.name} tells {len(model.classes)} classes apart that are not those of {self.data}",
                f"Use a model that was trained on the classes of {self.data}.",
            )
        if model.preprocess is None:
            raise NotApplicableError(
                f"{model.name} does not say how pictures become its inputs",
                "Its loader must set `preprocess`.",
            )
        return image_set, model.preprocess


def score(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Score float logits [images, classes] against int64 labels [images].

    Returns:
        Whether the highest logit is the label's (bool [images]) and the negative log-likelihood in nats
        (float [images]); False and infinity where a logit is not finite.
    """
    finite = logits.isfinite().all(dim=1)
    nll = F.cross_entropy(logits, labels, reduction="none")
    return (logits.argmax(dim=1) == labels) & finite, nll.where(finite, torch.inf)


def _on_device(inputs: Tensor, ctx: Context) -> Tensor:
    return inputs.to(ctx.device, getattr(torch, ctx.dtype))
