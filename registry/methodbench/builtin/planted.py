"""Models and tasks with planted truth: a first comparison for a method of any kind, in seconds and without data.

The problems are those of :mod:`methodbench.testing.planted`; a score here says that a method does what its kind is
for, not how it ranks on real work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, Scores
from methodbench.testing import planted
from methodbench.torchkit.model import Calibration, LoadedModel

Count = Annotated[int, Field(ge=1, le=10_000, description="how many units are scored")]


@hyperparameters
class PlantedModel:
    """Builds a planted model from its seed."""

    structure: Annotated[
        Literal["llama", "opt", "mixture", "vit", "cnn"], Field(description="which structure it has")
    ] = "cnn"
    seed: Annotated[int, Field(ge=0, description="of weights and outlier channels")] = 0

    def prepare(self, source: Path | None, target: Path, ctx: Context) -> None:
        state = planted.build(self.structure, self.seed).module.state_dict()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, target / "model.safetensors")

    def load(self, folder: Path, ctx: Context) -> LoadedModel:
        model = planted.build(self.structure, self.seed)
        model.module.load_state_dict(load_file(folder / "model.safetensors"))
        return model


def _planted(model: LoadedModel) -> dict[str, Any]:
    made = model.facts.get("planted")
    if made is None:
        raise NotApplicableError(
            f"{model.name} is no planted model: nothing is known about its right answers"
        )
    return dict(made)


@hyperparameters
class PlantedOutliers:
    """Distance of a compressed model's outputs from the dense ones', per input. Unit: a sequence or an image."""

    units: Count = 32

    def calibration(self, model: LoadedModel, ctx: Context) -> Calibration:
        return planted.inputs(_planted(model)["structure"], 32, 1)

    def evaluate(self, model: LoadedModel, ctx: Context) -> Evaluation:
        """Raises DivergedError where outputs are not finite."""
        made = _planted(model)
        x = planted.inputs(made["structure"], self.units, 2).inputs
        dense = planted.build(made["structure"], made["seed"])
        errors = planted.relative_errors(planted.output(model.module, x), planted.output(dense.module, x))
        if not bool(errors.isfinite().all()):
            raise DivergedError("the compressed model's outputs are not finite")
        return Evaluation(scores={"relative-error": Scores(errors.numpy())})


@hyperparameters
class PlantedEvidence:
    """Share of a map's mass, and its peak, on the patch that the class was planted with. Unit: an image."""

    units: Count = 64

    def evaluate(self, method: Any, model: LoadedModel, ctx: Context) -> Evaluation:
        _planted(model)
        images = planted.evidence_images(self.units, ctx.seed + 3)
        maps = method.explain(model, images.images, images.labels)
        return Evaluation(
            scores={
                "evidence-mass": Scores(planted.evidence_mass(maps, images.masks).nan_to_num(0.0).numpy()),
                "pointing": Scores(planted.points_at(maps, images.masks).numpy()),
            }
        )


@hyperparameters
class PlantedQuadratic:
    """Gap to the known minimum after a number of steps, in orders of magnitude. Unit: a quadratic."""

    condition: Annotated[float, Field(ge=1, description="largest curvature over the smallest")] = 100.0
    steps: Annotated[int, Field(ge=1, description="steps from a random start")] = 200
    units: Count = 8

    def evaluate(self, method: Any, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Raises DivergedError where a gap is not finite."""
        paths = []
        for unit in range(self.units):
            problem = planted.quadratic(1000 * ctx.seed + unit, self.condition)
            paths.append(planted.descend(problem, lambda groups: method.build(groups, ctx), self.steps))
        gaps = torch.stack(paths) / torch.stack(paths)[:, :1]
        if not bool(gaps.isfinite().all()):
            raise DivergedError("an iterate left the real numbers", "Lower the learning rate.")
        logs = gaps.clamp_min(1e-300).log10().numpy()
        return Evaluation(scores={"log10-gap": Scores(logs[:, -1])}, series={"log10-gap": logs.mean(0)})


@hyperparameters
class PlantedTeacher:
    """Whether a student that is trained under the method learns what its teacher knows. Unit: a test sample."""

    steps: Annotated[int, Field(ge=1, description="steps of SGD on batches of 32")] = 120

    def evaluate(self, method: Any, model: LoadedModel | None, ctx: Context) -> Evaluation:
        losses, right = planted.teach(method, ctx.seed, self.steps, ctx)
        return Evaluation(
            scores={"accuracy": Scores(right.numpy())}, series={"loss": losses.double().numpy()}
        )


@hyperparameters
class PlantedMasks:
    """Overlap of predicted masks with the planted patches. Unit: an image."""

    images: Annotated[int, Field(ge=1, description="images with classes and without masks to learn from")] = (
        64
    )
    units: Count = 32

    def evaluate(self, method: Any, model: LoadedModel | None, ctx: Context) -> Evaluation:
        seen = planted.evidence_images(self.images, ctx.seed + 1)
        fresh = planted.evidence_images(self.units, ctx.seed + 2)
        predictor = method.fit(planted.weak_labels(seen), ctx)
        truth = fresh.masks * (fresh.labels + 1)[:, None, None]
        overlap = planted.intersection_over_union(predictor(fresh.images), truth)
        return Evaluation(scores={"iou": Scores(overlap.numpy())})


@hyperparameters
class PlantedContrast:
    """How far a probe's scalars move when outlier channels are planted and the function stays. Unit: a scalar."""

    def evaluate(self, method: Any, model: LoadedModel, ctx: Context) -> Evaluation:
        made = _planted(model)
        data = planted.inputs(made["structure"], 16, 1)
        plain = planted.build(made["structure"], made["seed"], outliers=False)
        before, after = (method.measure(m, data, ctx) for m in (plain, model))
        scalars = [name for name, value in before.items() if np.ndim(value) == 0]
        if not scalars:
            raise NotApplicableError("the probe measures no scalar")
        moved = [abs(float(after[n]) - float(before[n])) / (abs(float(before[n])) or 1.0) for n in scalars]
        facts = {name: {"plain": float(before[name]), "outliers": float(after[name])} for name in scalars}
        return Evaluation(scores={"contrast": Scores(np.asarray(moved))}, facts=facts)
