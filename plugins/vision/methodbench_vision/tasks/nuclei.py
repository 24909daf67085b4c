"""Instances of nuclei learned from one point each, on procedural tissue whose instances are known to the pixel.

Dice is that of all nuclei against the tissue. AJI (Kumar et al., IEEE TMI 2017) gives every true nucleus the predicted
one of largest IoU, and adds what is left over to the union. PQ (Kirillov et al., CVPR 2019) counts pairs of IoU > 0.5::

    AJI = sum_i |G_i and P_j(i)| / (sum_i |G_i or P_j(i)| + sum of unused |P_j|)
    PQ  = sum IoU / (TP + FP / 2 + FN / 2)
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from scipy.ndimage import label
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import MethodbenchError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, Explainer, Scores, Segmenter
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.models.shapes_cnn import PREPROCESS
from methodbench_vision.tasks.images import Texture, normalize
from methodbench_vision.tasks.maps import control_maps, shown
from methodbench_vision.tasks.scenes import nuclei


@hyperparameters
class NucleiInstances:
    """Points to learn from, instances to predict; the unit is one test picture."""

    images: Annotated[int, Field(ge=1, le=10_000, description="test pictures")] = 30
    train_images: Annotated[int, Field(ge=2, le=10_000, description="pictures with points")] = 30
    image_seed: Annotated[int, Field(ge=0, description="seed of the picture set")] = 0
    jitter: Annotated[float, Field(ge=0, le=10, description="spread of points around centres, in pixels")] = (
        1.5
    )
    stain: Annotated[
        float, Field(ge=0, le=1, description="spread of the nuclei's colour towards that of the tissue")
    ] = 0.65
    texture: Texture = 1.0

    def evaluate(self, method: Segmenter | Explainer, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Train the method and compare its instances with the true ones.

        Of a control, which learns nothing, they are the connected regions of its map: of an oracle, what a perfect
        mask is worth that does not part nuclei that touch.

        Raises:
            NotApplicableError: the method learns from other labels, or explains a model.
            MethodbenchError: what it predicts are no masks as large as the pictures.
        """
        drawn = {"jitter": self.jitter, "stain": self.stain, "texture": self.texture}
        seen = nuclei(self.image_seed, self.train_images, split="train", **drawn)
        data = nuclei(self.image_seed, self.images, split="test", **drawn)
        x = normalize(data.images, PREPROCESS)
        predictor: object = None
        if isinstance(method, Explainer):
            found = regions(control_maps(method, x, data.instances[:, None] > 0)[:, 0])
        else:
            with ctx.phase("fit"):
                weak = {"images": normalize(seen.images, PREPROCESS), "points": list(seen.points)}
                predictor = learned = method.fit(weak, ctx)
            found = learned(x)
        if found.shape != data.instances.shape or found.is_floating_point():
            raise MethodbenchError(
                f"predicted instances are {found.dtype} {list(found.shape)}, not integers {list(data.instances.shape)}"
            )
        pairs = list(zip(data.instances.numpy(), found.numpy(), strict=True))
        scores = {
            "aji": Scores(np.array([aji(truth, one) for truth, one in pairs])),
            "dice": Scores(np.array([dice(truth, one) for truth, one in pairs])),
            "pq": Scores(np.array([panoptic_quality(truth, one) for truth, one in pairs])),
        }
        pseudo = getattr(predictor, "pseudo", None)
        if isinstance(pseudo, Tensor):
            truth = seen.instances > 0
            either = (pseudo | truth).flatten(1).sum(1)
            scores["pseudo-iou"] = Scores(((pseudo & truth).flatten(1).sum(1) / either.clamp_min(1)).numpy())
        chosen = getattr(predictor, "chosen", ())
        return Evaluation(
            scores=scores,
            pictures=shown(data.images, (found > 0).double(), ["nuclei"] * len(found)),
            facts={
                "images": self.images,
                "train_images": self.train_images,
                "nuclei": int(torch.stack([one.max() for one in data.instances]).sum()),
                "chosen_blocks": {str(block): chosen.count(block) for block in sorted(set(chosen))},
                "data_digest": hashlib.sha256(data.images.numpy().tobytes()).hexdigest(),
            },
        )


def regions(maps: Tensor) -> Tensor:
    """Return the connected regions of maps [N, H, W] at 0.5 and above, int64 [N, H, W], numbered from 1 in each."""
    return torch.from_numpy(np.stack([label(one)[0] for one in (maps >= 0.5).numpy()]).astype(np.int64))


def dice(truth: np.ndarray, found: np.ndarray) -> float:
    """Return 2 |G and P| / (|G| + |P|) of all instances together; 1 where both are empty."""
    total = (truth > 0).sum() + (found > 0).sum()
    return float(2 * ((truth > 0) & (found > 0)).sum() / total) if total else 1.0


def aji(truth: np.ndarray, found: np.ndarray) -> float:
    """Return the aggregated Jaccard index of instances int [H, W], 0 for none; 1 where both are empty."""
    both, sizes, drawn = _overlaps(truth, found)
    if not len(sizes):
        return float(not len(drawn))
    if not len(drawn):
        return 0.0
    union = sizes[:, None] + drawn[None] - both
    best = (both / union).argmax(1)
    rows = np.arange(len(sizes))
    met = both[rows, best] > 0
    inside = both[rows, best].sum()
    together = np.where(met, union[rows, best], sizes).sum()
    unused = np.setdiff1d(np.arange(len(drawn)), best[met])
    return float(inside / (together + drawn[unused].sum()))


def panoptic_quality(truth: np.ndarray, found: np.ndarray) -> float:
    """Return PQ of instances int [H, W], 0 for none; 1 where both are empty."""
    both, sizes, drawn = _overlaps(truth, found)
    if not len(sizes) and not len(drawn):
        return 1.0
    shares = both / (sizes[:, None] + drawn[None] - both) if both.size else np.zeros((0, 0))
    matched = shares[shares > 0.5]
    return float(matched.sum() / ((len(sizes) + len(drawn)) / 2))


def _overlaps(truth: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return common pixels [true, predicted] and the sizes of both, whatever their numbers are."""
    names, first = np.unique(truth, return_inverse=True)
    others, second = np.unique(found, return_inverse=True)
    table = np.zeros((len(names), len(others)), dtype=np.int64)
    np.add.at(table, (first.ravel(), second.ravel()), 1)
    sizes, drawn = table.sum(1)[names > 0], table.sum(0)[others > 0]
    return table[names > 0][:, others > 0], sizes, drawn
