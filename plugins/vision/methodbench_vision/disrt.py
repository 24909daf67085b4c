"""DiSRT: does a network notice that the arrangement of a picture was destroyed?

Li et al., From Local Cues to Global Percepts: Emergent Gestalt Organization in Self-Supervised Vision Models
(2506.00718, 2025). Of three pictures one is whole and two are syntheses of it with the same local texture; a frozen
network names the odd one, by its features f alone. Keeping only the largest activations of a late layer is said to
restore what supervision loses::

    odd = argmin_i of the mean cosine of f_i with the other two          chance: 1/3
    Top-K: y = x where |x| is among the ceil(p n) largest, else 0

The paper synthesizes by matching Gram matrices of VGG and its constants were not at hand. Here patches of the picture
itself are quilted: each is chosen at random among those that fit the ones above and to the left, and their seams are
blended. The whole picture gets the same seams, blended with itself moved by a pixel, so that blur tells nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_vision.cam import check_images, layer_names

Axis = Literal["spatial", "channel"]
Features = Callable[[Tensor], Tensor]


@hyperparameters
class DiSRT:
    """Asks a network for the odd one of a picture and two quilts of it."""

    kept: Annotated[
        float, Field(gt=0, le=1, description="p, share of activations that Top-K keeps; 1 is off")
    ] = 1.0
    axis: Annotated[
        Axis, Field(description="what Top-K ranks: positions of a channel, or channels of a position")
    ] = "spatial"
    layer: Annotated[
        str, Field(description="layer of features and Top-K; by default the one before the pooling")
    ] = ""
    patch: Annotated[int, Field(ge=2, le=256, description="side of a quilted patch in pixels")] = 12
    overlap: Annotated[int, Field(ge=1, le=64, description="pixels over which seams are blended")] = 3
    candidates: Annotated[int, Field(ge=1, le=1000, description="patches that are tried for each place")] = 20

    def measure(
        self, model: LoadedModel, data: Calibration, ctx: Context
    ) -> Mapping[str, np.ndarray | float]:
        """Return ``accuracy`` and, per picture, ``right`` and the ``margin`` of the cosines.

        Raises:
            NotApplicableError: there is no picture, a patch is larger than a picture, or the layer is not run.
            DivergedError: the features are not finite.
        """
        x = data.inputs
        if not len(x):
            raise NotApplicableError("DiSRT needs pictures", "Run it on a task that hands some to a probe.")
        check_images(model, x)
        if self.patch + self.overlap > min(x.shape[2:]):
            raise NotApplicableError(
                f"patches of {self.patch} pixels do not fit pictures of {tuple(x.shape[2:])}",
                "Lower `patch`.",
            )
        triples = triplets(x, self.patch, self.overlap, self.candidates, ctx.seed)
        with torch.inference_mode(), features_of(model, self.layer, self.kept, self.axis, x[:1]) as features:
            found = torch.stack([features(part) for part in triples.unbind(1)], 1)
        if not bool(found.isfinite().all()):
            raise DivergedError(f"{model.name} has features that are not finite")
        margin = oddness(found)
        right = (margin.argmax(1) == 0).double()
        others = margin[:, 1:].amax(1)
        return {
            "accuracy": float(right.mean()),
            "right": right.cpu().numpy(),
            "margin": (margin[:, 0] - others).double().cpu().numpy(),
        }


def oddness(features: Tensor) -> Tensor:
    """Return minus the mean cosine of each of three pictures' features [B, 3, D] with the others: [B, 3]."""
    unit = F.normalize(features.flatten(2).float(), dim=2)
    cosines = unit @ unit.transpose(1, 2)
    own = cosines.diagonal(dim1=1, dim2=2)
    return -(cosines.sum(2) - own) / (features.shape[1] - 1)


def top_k(x: Tensor, share: float, axis: Axis) -> Tensor:
    """Keep the ceil(share * n) entries of largest magnitude, others become 0; share 1 is the identity.

    Args:
        x: maps [B, C, h, w], ranked over positions (spatial) or channels; tokens [B, N, D], likewise.
        share: in (0, 1].
        axis: what is ranked.
    """
    if share == 1:
        return x
    tokens = x.ndim == 3
    flat = x.transpose(1, 2) if tokens else x.flatten(2)
    dim = 2 if axis == "spatial" else 1
    count = math.ceil(share * flat.shape[dim])
    # By index: with a threshold, ties would keep more.
    index = flat.abs().topk(count, dim=dim).indices
    kept = torch.zeros_like(flat).scatter(dim, index, flat.gather(dim, index))
    return kept.transpose(1, 2) if tokens else kept.view_as(x)


@contextmanager
def features_of(model: LoadedModel, layer: str, share: float, axis: Axis, one: Tensor) -> Iterator[Features]:
    """Yield the function from pictures to pooled features [B, D] of a layer behind Top-K; hooks go with it."""
    (name,) = layer_names(model, one, layer)
    held: list[Tensor] = []

    def sparsify(_module: object, _args: object, output: object) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim not in (3, 4):
            raise NotApplicableError(f"layer {name!r} returns no maps and no tokens", "Choose another layer.")
        held.append(top_k(output, share, axis))
        return held[-1]

    handle = model.module.get_submodule(name).register_forward_hook(sparsify)

    def features(x: Tensor) -> Tensor:
        found = []
        for part in x.split(100):
            held.clear()
            model.module(part)
            if not held:
                raise NotApplicableError(
                    f"the model does not run its layer {name!r}", "Choose a layer that it runs."
                )
            last = held[-1]
            found.append(last.mean((2, 3)) if last.ndim == 4 else last.mean(1))
        return torch.cat(found)

    try:
        yield features
    finally:
        handle.remove()


def triplets(x: Tensor, patch: int, overlap: int, candidates: int, seed: int) -> Tensor:
    """Return each picture with the seams of a quilt, and two quilts of it: [B, 3, C, H, W]."""
    rows = []
    for number, image in enumerate(x):
        picture = image.double().cpu().numpy()
        made = [
            quilt(picture, patch, overlap, candidates, np.random.default_rng((seed, number, draw)))
            for draw in (0, 1)
        ]
        rows.append(np.stack([seamed(picture, patch, overlap), *made]))
    return torch.from_numpy(np.stack(rows)).to(x)


def quilt(
    picture: np.ndarray, patch: int, overlap: int, candidates: int, random: np.random.Generator
) -> np.ndarray:
    """Return a synthesis [C, H, W] of a picture [C, H, W] out of its own patches, left to right, row by row."""
    height, width = picture.shape[1:]
    made = np.zeros_like(picture)
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            up, back = min(overlap, top), min(overlap, left)
            tall, wide = min(patch, height - top) + up, min(patch, width - left) + back
            places = [
                (int(random.integers(height - tall + 1)), int(random.integers(width - wide + 1)))
                for _ in range(candidates)
            ]
            pieces = [picture[:, row : row + tall, column : column + wide] for row, column in places]
            there = made[:, top - up : top + tall - up, left - back : left + wide - back]
            misfit = [
                ((piece[:, :up] - there[:, :up]) ** 2).sum()
                + ((piece[:, :, :back] - there[:, :, :back]) ** 2).sum()
                for piece in pieces
            ]
            there[:] = _blended(there, pieces[int(np.argmin(misfit))], up, back)
    return made


def seamed(picture: np.ndarray, patch: int, overlap: int) -> np.ndarray:
    """Return the picture [C, H, W] itself with the seams of a quilt: blended there with itself, moved by a pixel."""
    made = picture.copy()
    moved = np.roll(picture, (1, 1), (1, 2))
    for axis in (1, 2):
        size = picture.shape[axis]
        for start in range(patch, size, patch):
            where = [slice(None)] * 3
            where[axis] = slice(start - overlap, start)
            made[tuple(where)] = (made[tuple(where)] + moved[tuple(where)]) / 2
    return made


def _blended(old: np.ndarray, new: np.ndarray, up: int, back: int) -> np.ndarray:
    """Return ``new`` [C, h, w], faded into ``old`` over its first ``up`` rows and ``back`` columns."""
    weight = np.ones(new.shape[1:])
    weight[:up] *= ((np.arange(up) + 1) / (up + 1))[:, None]
    weight[:, :back] *= (np.arange(back) + 1) / (back + 1)
    return weight * new + (1 - weight) * old
