"""Faithfulness of saliency maps on labelled pictures that a model was trained for: CIFAR-10, a sample of ImageNet.

Nothing says where the object is, so that maps are judged by the model alone: insertion, deletion and changes of
confidence as in :mod:`methodbench_vision.tasks.faithfulness`, ROAD and sparseness as in
:mod:`methodbench_vision.tasks.perturbation`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, Explainer, Oracle, Scores
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.tasks.datasets import IMAGE_SETS, LabelledImages, imagenet_samples
from methodbench_vision.tasks.faithfulness import (
    Perturbed,
    area,
    class_confidence,
    confidence_change,
    perturbed,
)
from methodbench_vision.tasks.folding import folded
from methodbench_vision.tasks.images import denormalized, to_inputs
from methodbench_vision.tasks.maps import on_device, preprocess_of, shown
from methodbench_vision.tasks.perturbation import gini, road

#: Explainers look at no picture beforehand, so that none is set apart for them.
_PICTURES: Mapping[str, Callable[[], LabelledImages]] = {
    "cifar10": IMAGE_SETS["cifar10"].evaluation,
    "imagenet-samples": imagenet_samples,
}


@hyperparameters
class PictureFaithfulness:
    """Perturbs labelled pictures in the order of their maps; the unit is one picture.

    Each is explained for the class that the model itself ranks first.
    """

    data: Annotated[Literal["cifar10", "imagenet-samples"], Field(description="which pictures")] = "cifar10"
    images: Annotated[
        int, Field(ge=1, le=100_000, description="pictures, spread over the set where it has more")
    ] = 1000
    road_images: Annotated[
        int, Field(ge=0, description="pictures that ROAD scores; it solves 18 linear systems for each")
    ] = 1000
    steps: Annotated[int, Field(ge=1, le=1000, description="steps from the whole picture to none")] = 10
    percentiles: Annotated[
        tuple[float, ...], Field(min_length=1, description="percentiles of ROAD, in (0, 100)")
    ] = (10, 20, 30, 40, 50, 60, 70, 80, 90)
    noise: Annotated[float, Field(ge=0, le=1, description="standard deviation of ROAD's noise")] = 0.01
    seed: Annotated[int, Field(ge=0, description="seed of ROAD's noise")] = 0
    batch_size: Annotated[int, Field(ge=1, le=1024, description="pictures per forward pass")] = 32

    def evaluate(self, method: Explainer, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Explain every picture, then perturb it.

        Raises:
            NotApplicableError: the model's classes are not the data's, or the method needs true masks.
            SourceError: the data is absent or damaged.
        """
        if model is None or model.classes != IMAGE_SETS[self.data].classes():
            raise NotApplicableError(
                f"{model.name if model else 'no model'} does not tell the classes of {self.data} apart",
                f"Use a model that was trained on {self.data}.",
            )
        if isinstance(method, Oracle):
            raise NotApplicableError(f"nothing says where the objects of {self.data} are", "Leave it out.")
        preprocess = preprocess_of(model)
        pictures = _PICTURES[self.data]()
        # Spread over the set: one that is sorted by class would else give the first classes alone.
        count = min(self.images, len(pictures))
        chosen = np.linspace(0, len(pictures), count, endpoint=False).astype(int)
        # ROAD's pictures are spread likewise.
        asked = min(self.road_images, count)
        scored = set(np.linspace(0, count, asked, endpoint=False).astype(int).tolist())
        noise = np.random.default_rng(self.seed)
        scorer: nn.Module | None = None
        done: list[Perturbed] = []
        roads = torch.full((count,), torch.nan, dtype=torch.float64)
        digest, first, correct = hashlib.sha256(), torch.empty(0), 0
        for start in range(0, count, self.batch_size):
            index = chosen[start : start + self.batch_size]
            inputs = to_inputs([pictures[int(one)] for one in index], preprocess)
            digest.update(inputs.numpy().tobytes())
            x = on_device(inputs, ctx)
            if scorer is None:
                scorer, first = folded(model.module, x[:1]), inputs
            batch = perturbed(method, model, scorer, x, self.steps)
            some = [place for place in range(len(index)) if start + place in scored]
            if some:
                score = class_confidence(scorer, batch.target[some])
                scores = road(score, x[some], batch.maps[some], self.percentiles, self.noise, noise)
                roads[[start + place for place in some]] = scores
            correct += int((batch.target.cpu().numpy() == pictures.labels[index]).sum())
            done.append(batch)
        insertion = torch.cat([batch.insertion for batch in done])
        deletion = torch.cat([batch.deletion for batch in done])
        whole = insertion[:, -1]
        change = confidence_change(whole, torch.cat([batch.masked for batch in done]))
        found = {
            "insertion-auc": area(insertion),
            "deletion-auc": area(deletion),
            "average-drop": change.drop,
            "average-gain": change.gain,
            "increase": change.increase,
            "sparseness": torch.cat([gini(batch.maps) for batch in done]),
            "road": roads,
        }
        return Evaluation(
            scores={name: Scores(values.numpy()) for name, values in found.items()},
            series={"insertion": insertion.mean(0).numpy(), "deletion": deletion.mean(0).numpy()},
            facts={
                "images": count,
                "road_images": len(scored),
                "accuracy": correct / count,
                "mean_confidence": float(whole.mean()),
                "input_size": list(preprocess.size),
                "baseline": "0 in the model's input space",
                "data_digest": pictures.digest,
                "inputs_digest": digest.hexdigest(),
            },
            pictures=shown(
                denormalized(first, preprocess),
                done[0].maps.float().cpu(),
                [model.classes[label] for label in pictures.labels[chosen[: len(first)]]],
            ),
            throughput=(count / sum(batch.seconds for batch in done), "maps/s"),
        )
