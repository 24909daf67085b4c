"""Faithfulness of saliency maps: does the model's confidence follow the pixels that the map ranks first?

Deletion (Petsiuk et al., RISE, BMVC 2018, 1806.07421) takes pixels away from the highest on, insertion shows
them on an empty picture. The variant is xplique's: whole pixels ordered by the map, ten steps, a baseline of
0 in the model's input space (the mean colour), softmax probability, area as the mean of adjacent averages.
Average drop, average gain and increase in confidence compare the picture with its product with the map
(Chattopadhay et al., Grad-CAM++, 1710.11063; Zhang et al., Opti-CAM, 2301.07002).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, Explainer, Scores
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.tasks.folding import folded
from methodbench_vision.tasks.images import denormalized, sample_pictures, to_inputs
from methodbench_vision.tasks.maps import on_device, preprocess_of, shown, timed_maps

#: Confidence [B] of images [B, C, H, W] in their classes.
Confidence = Callable[[Tensor], Tensor]


#: Pictures of one forward pass of perturbation curves: as many as a processor's caches like, or as fill a GPU.
_PICTURES, _PICTURES_OF_A_GPU = 32, 1024


@hyperparameters
class InsertionDeletion:
    """Insertion and deletion on square crops of photographs; the unit is one crop.

    The first crop of a picture is its largest centred square; the others are drawn once for all methods. Each
    is explained for the class that the model itself ranks first.
    """

    crops: Annotated[int, Field(ge=1, le=64, description="crops of each picture")] = 3
    smallest_crop: Annotated[
        float, Field(gt=0, le=1, description="side of a crop, as a share of the shorter side")
    ] = 0.5
    crop_seed: Annotated[int, Field(ge=0, description="seed of the crops")] = 0
    steps: Annotated[int, Field(ge=1, le=1000, description="steps from the whole picture to none")] = 10
    smallest_input: Annotated[
        int,
        Field(ge=1, description="models with smaller inputs are left out: photographs are not what they see"),
    ] = 96
    batch_size: Annotated[int, Field(ge=1, le=1024, description="crops per forward pass")] = 8

    def evaluate(self, method: Explainer, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Explain every crop, then perturb it in the map's order.

        Raises:
            NotApplicableError: the model takes no photographs.
        """
        if model is None:
            raise NotApplicableError("insertion and deletion need a model", "Name one in the suite.")
        preprocess = preprocess_of(model)
        if min(preprocess.size) < self.smallest_input:
            raise NotApplicableError(
                f"{model.name} sees {min(preprocess.size)} pixels a side, too few for photographs",
                f"Use a model of {self.smallest_input} pixels or more, trained on photographs.",
            )
        pictures = [picture.rgb for picture in sample_pictures()]
        crops = square_crops(pictures, self.crops, self.smallest_crop, self.crop_seed)
        x = to_inputs(crops, dataclasses.replace(preprocess, crop=1.0))
        scorer = folded(model.module, on_device(x[:1], ctx))
        done = [
            perturbed(method, model, scorer, on_device(part, ctx), self.steps)
            for part in x.split(self.batch_size)
        ]
        maps = torch.cat([batch.maps for batch in done]).float().cpu()
        insertion = torch.cat([batch.insertion for batch in done])
        deletion = torch.cat([batch.deletion for batch in done])
        whole = insertion[:, -1]
        change = confidence_change(whole, torch.cat([batch.masked for batch in done]))
        return Evaluation(
            scores={
                "insertion-auc": Scores(area(insertion).numpy()),
                "deletion-auc": Scores(area(deletion).numpy()),
                "average-drop": Scores(change.drop.numpy()),
                "average-gain": Scores(change.gain.numpy()),
                "increase": Scores(change.increase.numpy()),
            },
            series={"insertion": insertion.mean(0).numpy(), "deletion": deletion.mean(0).numpy()},
            facts={
                "pictures": len(pictures),
                "crops": len(crops),
                "input_size": list(preprocess.size),
                "mean_confidence": float(whole.mean()),
                "baseline": "0 in the model's input space",
                "data_digest": hashlib.sha256(b"".join(crop.tobytes() for crop in crops)).hexdigest(),
            },
            # The first crop of each picture is the picture itself.
            pictures=shown(
                denormalized(x, preprocess)[:: self.crops],
                maps[:: self.crops],
                [picture.name for picture in sample_pictures()],
            ),
            throughput=(len(crops) / sum(batch.seconds for batch in done), "maps/s"),
        )


class Perturbed(NamedTuple):
    """What a batch of pictures came to when it was perturbed in the order of its maps."""

    maps: Tensor
    """[B, H, W]."""
    insertion: Tensor
    """float64 [B, steps + 1]."""
    deletion: Tensor
    """float64 [B, steps + 1]."""
    masked: Tensor
    """Confidence in the pictures multiplied by their maps, float64 [B]."""
    target: Tensor
    """int64 [B]: the classes that were explained."""
    seconds: float
    """What explaining took."""


def perturbed(method: Explainer, model: LoadedModel, scorer: nn.Module, x: Tensor, steps: int) -> Perturbed:
    """Explain images [B, C, H, W] for the class that the model itself ranks first, and perturb them.

    Args:
        method: what explains.
        model: what is explained.
        scorer: the same function, for scoring; see :func:`folded`.
        x: normalized images [B, C, H, W].
        steps: see :func:`perturbation_curve`.
    """
    with torch.no_grad():
        target = model.module(x).argmax(1)
    maps, seconds = timed_maps(method, model, x, target)
    maps = maps.to(x)
    confidence = class_confidence(scorer, target)
    curves = perturbation_curves(confidence, x, maps, steps)
    return Perturbed(maps, *curves, confidence(x * maps[:, None]), target, seconds)


class ConfidenceChange(NamedTuple):
    """What is left of the confidence p when the picture is multiplied by its map, p': each float64 [B]."""

    drop: Tensor
    """relu(p - p') / p; 0 is best."""
    gain: Tensor
    """relu(p' - p) / (1 - p); 1 is best."""
    increase: Tensor
    """1 where p' > p."""


def class_confidence(module: Callable[[Tensor], Tensor], target: Tensor) -> Confidence:
    """Return the function from images to the softmax probability of their classes ``target`` [B], float64.

    It takes one image per class, or several rounds of them, one round after the other.
    """

    def confidence(x: Tensor) -> Tensor:
        with torch.inference_mode():
            probabilities = module(x).double().softmax(1)
        classes = target.repeat(len(x) // len(target))
        return probabilities.gather(1, classes[:, None])[:, 0].cpu().clone()

    return confidence


def perturbation_curves(confidence: Confidence, x: Tensor, maps: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the curves of insertion and of deletion, each float64 [B, steps + 1]; see :func:`perturbation_curve`.

    The whole picture and the empty one, at which both curves end, are scored once.
    """
    empty, whole = confidence(torch.zeros_like(x))[None], confidence(x)[None]
    shown = _between(confidence, x, maps, steps, insertion=True)
    hidden = _between(confidence, x, maps, steps, insertion=False)
    return torch.cat([empty, *shown, whole]).T, torch.cat([whole, *hidden, empty]).T


def perturbation_curve(
    confidence: Confidence, x: Tensor, maps: Tensor, steps: int, *, insertion: bool
) -> Tensor:
    """Return the confidence while pixels come (or go) in descending order of the map: float64 [B, steps + 1].

    Args:
        confidence: scores perturbed images, one or several rounds of ``x``; see :func:`class_confidence`.
        x: normalized images [B, C, H, W]; missing pixels are 0 in every channel.
        maps: [B, H, W]; equal values are taken row by row.
        steps: the counts of pixels are ``steps + 1`` points from none to all, rounded down.
        insertion: start from an empty picture instead of the whole one.
    """
    ends = [confidence(torch.zeros_like(x))[None], confidence(x)[None]]
    first, last = ends if insertion else ends[::-1]
    return torch.cat([first, *_between(confidence, x, maps, steps, insertion=insertion), last]).T


def _between(
    confidence: Confidence, x: Tensor, maps: Tensor, steps: int, *, insertion: bool
) -> Iterator[Tensor]:
    """Confidences [some steps, B] of pictures with some of their pixels, neither none nor all, in order."""
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1).view_as(maps)
    counts = torch.from_numpy(np.linspace(0, maps[0].numel(), steps + 1).astype(int)[1:-1]).to(x.device)
    # Several steps in one pass, where there are few images: small batches leave the processor waiting.
    at_once = max(1, (_PICTURES_OF_A_GPU if x.is_cuda else _PICTURES) // len(x))
    for start in range(0, len(counts), at_once):
        some = counts[start : start + at_once, None, None, None]
        seen = rank < some if insertion else rank >= some
        yield confidence(torch.where(seen[:, :, None], x, 0).flatten(0, 1)).view(len(some), len(x))


def area(curve: Tensor) -> Tensor:
    """Return the area under each curve [B, points] over [0, 1], the mean of adjacent averages: [B]."""
    return ((curve[:, 1:] + curve[:, :-1]) / 2).mean(1)


def confidence_change(before: Tensor, after: Tensor) -> ConfidenceChange:
    """Compare confidences [B] in (0, 1) of whole pictures with those of pictures multiplied by their maps."""
    tiny = torch.finfo(before.dtype).tiny
    return ConfidenceChange(
        drop=(before - after).clamp_min(0) / before.clamp_min(tiny),
        gain=(after - before).clamp_min(0) / (1 - before).clamp_min(torch.finfo(before.dtype).eps),
        increase=(after > before).to(before.dtype),
    )


def square_crops(pictures: Sequence[np.ndarray], count: int, smallest: float, seed: int) -> list[np.ndarray]:
    """Return ``count`` square crops of each picture, uint8 [side, side, 3], picture by picture.

    The first is the largest centred square; the side of the others is uniform between ``smallest`` and 1
    times the shorter side, their place uniform. Crop ``i`` of picture ``j`` depends on (seed, j, i) alone.
    """
    crops = []
    for number, picture in enumerate(pictures):
        height, width = picture.shape[:2]
        for index in range(count):
            side, top, left = min(height, width), 0.5, 0.5
            if index:
                share, top, left = np.random.default_rng((seed, number, index)).random(3)
                side = round(side * (smallest + (1 - smallest) * share))
            row, column = round((height - side) * top), round((width - side) * left)
            crops.append(picture[row : row + side, column : column + side])
    return crops
