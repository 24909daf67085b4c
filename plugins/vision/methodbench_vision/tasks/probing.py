"""Probes of image classifiers: numbers about a model as it is, on images of which it sees some."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from methodbench.context import Context
from methodbench.entries import Metric
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, Probe, Scores
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_vision.tasks.datasets import IMAGE_SETS
from methodbench_vision.tasks.images import SHAPES_CLASSES, normalize, procedural_images, to_inputs
from methodbench_vision.tasks.maps import on_device, preprocess_of


@hyperparameters
class ImageProbing:
    """Hands held-out images to a probe.

    Scalars become metrics, arrays with one value per image metrics whose units are the images, other arrays curves;
    of a table the first row.
    """

    data: Annotated[Literal["shapes", "digits", "cifar10"], Field(description="which images")] = "shapes"
    images: Annotated[int, Field(ge=2, le=100_000, description="images that the probe may use")] = 60

    def evaluate(self, method: Probe, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Run the probe; its first number is repeated as ``score``.

        Raises:
            NotApplicableError: no model, one of other classes, or a probe that measures no number.
        """
        if model is None:
            raise NotApplicableError("a probe needs a model", "Name one in the suite.")
        classes = SHAPES_CLASSES if self.data == "shapes" else IMAGE_SETS[self.data].classes()
        if model.classes != classes:
            raise NotApplicableError(
                f"{model.name} tells other classes apart than those of {self.data}",
                f"Use a model that was trained on {self.data}.",
            )
        preprocess = preprocess_of(model)
        if self.data == "shapes":
            x = normalize(procedural_images(0, self.images, split="test").images, preprocess)
        else:
            held_out = IMAGE_SETS[self.data].evaluation()
            x = to_inputs([held_out[index] for index in range(min(self.images, len(held_out)))], preprocess)
        source = f"{self.data}: the first {len(x)} held-out images"
        with torch.enable_grad():
            measured = method.measure(model, Calibration(on_device(x, ctx), source), ctx)
        values = {name: np.asarray(value, dtype=np.float64) for name, value in measured.items()}
        scores = {
            name: Scores(
                value, Metric(name=name, direction="higher", aggregate="mean" if value.ndim else "single")
            )
            for name, value in values.items()
            if value.ndim == 0 or value.shape == (len(x),)
        }
        if not scores:
            raise NotApplicableError("the probe measured no number")
        first = next(iter(scores))
        return Evaluation(
            scores={"score": Scores(scores[first].values), **scores},
            series={
                name: value if value.ndim == 1 else value[0]
                for name, value in values.items()
                if name not in scores and value.ndim in (1, 2)
            },
            facts={"images": len(x), "data": self.data, "score": first},
        )
