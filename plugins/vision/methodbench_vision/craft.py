"""CRAFT.

Fel et al., CRAFT: Concept Recursive Activation FacTorization for Explainability, CVPR 2023 (2211.10154). Crops of
the images of one class are embedded by the layer before the pooling, and a non-negative factorization of their
activations finds directions that crops share: the concepts. Sobol indices say how much of the class score's
variance each concept causes when concepts are weakened at random, and where a concept lies is its coefficient at
each position. With g the network up to the layer and h the rest::

    A = g(crops) ~ U W,  U, W >= 0                         the concepts are the rows of W
    ST_k = sum (y(M) - y(M with column k redrawn))^2 / (2 q var y),   y(M) = h((U M) W)
    L = sum_k ST_k U_k                                      over the positions of the whole picture

``recursive`` decomposes every concept once more at an earlier, finer layer, as the paper does with concepts that
mix several things: the crops in which it is strongest give sub-concepts, ranked by Sobol indices of their own. The
released code does not recurse, and is the default. One call explains each class by the images it is given of it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from scipy.stats import qmc
from sklearn.decomposition import NMF
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.cam import called, check_images, class_scores, layer_names, min_max, recorded

Design = Literal["halton", "sobol"]

#: Share of a concept's crops, from the strongest down, that a recursion looks at.
_STRONGEST = 0.1


@hyperparameters
class CRAFT:
    """Concepts of a class by factorization, weighed by Sobol indices."""

    concepts: Annotated[int, Field(ge=1, le=500, description="rank of the factorization")] = 20
    patch_size: Annotated[
        int, Field(ge=2, description="side of the crops in pixels; larger than the picture means the picture")
    ] = 64
    designs: Annotated[int, Field(ge=2, le=4096, description="points q of the Sobol design")] = 32
    design: Annotated[
        Design, Field(description="unscrambled Halton points (authors' code), or scrambled Sobol points")
    ] = "halton"
    percentile: Annotated[
        float, Field(ge=0, lt=100, description="coefficients up to this percentile count as absent")
    ] = 90.0
    recursive: Annotated[bool, Field(description="decompose each concept again at an earlier layer")] = False
    layer: Annotated[
        str, Field(description="layer of the concepts; by default the one that feeds the pooling")
    ] = ""
    earlier_layer: Annotated[
        str, Field(description="layer of the sub-concepts; by default the stage before the last")
    ] = ""
    batch_size: Annotated[int, Field(ge=1, le=4096, description="crops per forward pass")] = 64
    seed: Annotated[
        int, Field(ge=0, le=2**31 - 1, description="of the factorization and of Sobol points")
    ] = 0

    def explain(self, model: LoadedModel, x: Tensor, target: Tensor) -> Tensor:
        """Return maps [B, H, W] in [0, 1] of normalized square images ``x`` [B, C, H, H] for classes [B].

        Raises:
            NotApplicableError: the layer's activations are negative somewhere, or too few to factorize.
        """
        check_images(model, x)
        class_scores(model, x, target)  # refuses targets that are no classes
        maps = x.new_zeros((len(x), x.shape[2], x.shape[3]), dtype=torch.float32)
        for label in target.unique().tolist():
            chosen = target == label
            maps[chosen] = self.explain_class(model, x[chosen], label)
        return min_max(maps)

    def explain_class(self, model: LoadedModel, x: Tensor, label: int) -> Tensor:
        """Return maps [n, H, W], not scaled, from concepts of the images ``x`` [n, C, H, H] of one class."""
        names = layer_names(model, x, self.layer)
        part = crops(x, self.patch_size)
        size = (x.shape[2], x.shape[3])
        bank = self.fit(model, part, names[0], size)
        coefficients = self.transform(model, x, bank)
        importance = self.importance(model, x[:1], bank, coefficients, label)
        if not self.recursive:
            return self._relevance(coefficients, importance, x)
        total = x.new_zeros((len(x), x.shape[2], x.shape[3]), dtype=torch.float32)
        earlier = self.earlier_layer or _stage_before(model, names[0])
        for concept in range(len(bank.components)):
            strongest = strongest_crops(bank.coefficients[:, concept])
            sub = self.fit(model, part[strongest], earlier, size)
            inside = self.transform(model, x, sub)
            weights = self.importance(model, x[:1], sub, inside, label)
            total += float(importance[concept]) * self._relevance(inside, weights, x)
        return total

    def fit(self, model: LoadedModel, part: Tensor, layer: str, size: tuple[int, int]) -> ConceptBank:
        """Factorize the activations of crops [N, C, p, p], resized to ``size``, at a layer."""
        embedded = []
        for batch in part.split(self.batch_size):
            large = F.interpolate(batch, size=size, mode="bilinear", align_corners=False)
            embedded.append(embed(model, large, layer).flatten(2).mean(2))
        activations = torch.cat(embedded)
        rank = min(self.concepts, *activations.shape)
        components, coefficients = factorize(activations, rank, self.seed)
        return ConceptBank(layer, components, coefficients)

    def transform(self, model: LoadedModel, x: Tensor, bank: ConceptBank) -> Tensor:
        """Return the concepts' coefficients at every position of whole pictures, [n, h, w, concepts]."""
        maps = torch.cat([embed(model, batch, bank.layer) for batch in x.split(self.batch_size)])
        positions = maps.movedim(1, 3)
        return project(positions.flatten(0, 2), bank.components).unflatten(0, positions.shape[:3])

    def importance(
        self, model: LoadedModel, image: Tensor, bank: ConceptBank, coefficients: Tensor, label: int
    ) -> Tensor:
        """Return the mean over pictures of the concepts' total Sobol indices for a class score, [concepts].

        ``image`` [1, C, H, W] stands in for the input whose activations at the layer are replaced.
        """
        masks = design_masks(coefficients.shape[-1], self.designs, self.design, self.seed).to(coefficients)
        indices = []
        for one in coefficients:
            scores = []
            for batch in masks.split(self.batch_size):
                activations = (one * batch[:, None, None]) @ bank.components
                scores.append(_score_from(model, image, bank.layer, activations.movedim(3, 1), label))
            indices.append(total_indices(torch.cat(scores), self.designs))
        return torch.stack(indices).mean(0)

    def _relevance(self, coefficients: Tensor, importance: Tensor, x: Tensor) -> Tensor:
        maps = concept_maps(coefficients, self.percentile, (x.shape[2], x.shape[3]))
        return torch.einsum("nkhw,k->nhw", maps, importance.to(maps))


@dataclass(frozen=True, slots=True)
class ConceptBank:
    """Concepts of one layer."""

    layer: str
    components: Tensor
    """W, float32 [concepts, channels], not negative."""
    coefficients: Tensor
    """U of the crops that they were found in, float32 [crops, concepts]."""


def crops(x: Tensor, side: int) -> Tensor:
    """Return square crops at steps of 0.8 sides, image by image and row by row: [n * P, C, side, side]."""
    side = min(side, x.shape[2], x.shape[3])
    step = max(1, int(0.8 * side))
    columns = F.unfold(x.float(), side, stride=step)
    return columns.mT.reshape(-1, x.shape[1], side, side).to(x.dtype)


def embed(model: LoadedModel, x: Tensor, layer: str) -> Tensor:
    """Return g(x), a layer's activations [N, C, h, w].

    Raises:
        NotApplicableError: some are negative, so that no non-negative factors give them.
    """
    with recorded(model.module, [layer], gradients=False) as held:
        model.module(x)
    maps = called(held, layer).float()
    if maps.ndim != 4:
        raise NotApplicableError(
            f"layer {layer!r} returns tokens; CRAFT reads maps of a convolutional network"
        )
    if float(maps.min()) < 0:
        raise NotApplicableError(
            f"layer {layer!r} of {model.name} has negative activations, which no concepts add up to",
            "Choose a layer behind a ReLU with the parameter `layer`.",
        )
    return maps


def factorize(activations: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return W [rank, C] and U [N, rank] with A [N, C] ~ U W, by scikit-learn's coordinate descent.

    ``seed`` decides the randomized decomposition that the factorization starts from.
    """
    reducer = NMF(n_components=rank, random_state=np.random.RandomState(seed))
    with warnings.catch_warnings():
        # Its 200 iterations are the method's, whether or not they reach the tolerance.
        warnings.simplefilter("ignore", ConvergenceWarning)
        coefficients = reducer.fit_transform(activations.cpu().numpy())
    found = reducer.components_.astype(np.float32), coefficients.astype(np.float32)
    return torch.from_numpy(found[0]).to(activations), torch.from_numpy(found[1]).to(activations)


def project(activations: Tensor, components: Tensor) -> Tensor:
    """Return the non-negative U [N, rank] that brings U W closest to A [N, C], W being fixed."""
    reducer = NMF(n_components=len(components))
    reducer.components_ = components.cpu().numpy()
    reducer._n_components, reducer.n_components_ = len(components), len(components)
    reducer._beta_loss, reducer.n_features_in_ = 2, components.shape[1]
    return torch.from_numpy(reducer.transform(activations.cpu().numpy()).astype(np.float32)).to(activations)


def design_masks(concepts: int, points: int, design: Design = "halton", seed: int = 0) -> Tensor:
    """Return the masks at which the score is asked, float32 [(concepts + 2) q, concepts] in [0, 1).

    q points in twice as many dimensions give two matrices A and B; then, for each concept, A with that column
    taken from B.
    """
    if design == "halton":
        drawn = qmc.Halton(2 * concepts, scramble=False).random(points)
    else:
        drawn = qmc.Sobol(2 * concepts, scramble=True, seed=seed).random(points)
    a, b = drawn[:, :concepts], drawn[:, concepts:]
    mixed = np.repeat(a[None], concepts, axis=0)
    for index in range(concepts):
        mixed[index, :, index] = b[:, index]
    return torch.from_numpy(np.concatenate([a, b, *mixed]).astype(np.float32))


def total_indices(scores: Tensor, points: int) -> Tensor:
    """Return Jansen's estimate of the total Sobol indices, float64 [concepts]; zero for a constant score.

    Args:
        scores: [(concepts + 2) q], the score at each of :func:`design_masks`.
        points: q.
    """
    scores = scores.double()
    first, mixed = scores[:points], scores[2 * points :].view(-1, points)
    variance = first.var(unbiased=True)
    indices = (first - mixed).square().sum(1) / (2 * points * variance)
    return torch.where(variance > 0, indices, 0)


def concept_maps(coefficients: Tensor, percentile: float, size: tuple[int, int]) -> Tensor:
    """Return each concept's map over pictures, [n, concepts, *size], zero up to the concept's percentile.

    Args:
        coefficients: [n, h, w, concepts]; a percentile is taken over all positions of all pictures.
    """
    flat = coefficients.flatten(0, 2)
    floor = torch.quantile(flat.double(), percentile / 100, dim=0).to(flat)
    maps = torch.where(coefficients > floor, coefficients, 0).movedim(3, 1)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def strongest_crops(coefficients: Tensor) -> Tensor:
    """Return the indices of the tenth of the crops in which a concept [N] is strongest, two at least."""
    count = max(2, round(_STRONGEST * len(coefficients)))
    return coefficients.topk(min(count, len(coefficients))).indices


def _score_from(model: LoadedModel, image: Tensor, layer: str, activations: Tensor, label: int) -> Tensor:
    """Return h(activations)[label] [N], by replacing what the layer returns for one image."""

    def replace(_module: nn.Module, _args: object, out: Tensor) -> Tensor:
        return activations.to(out.dtype)

    handle = model.module.get_submodule(layer).register_forward_hook(replace)
    try:
        with torch.inference_mode():
            return model.module(image)[:, label].double()
    finally:
        handle.remove()


def _stage_before(model: LoadedModel, layer: str) -> str:
    """Return the stage that ends before the one that holds ``layer``."""
    stages = model.adapter.block_names(model.module)
    at = next((i for i, name in enumerate(stages) if f"{layer}.".startswith(f"{name}.")), len(stages))
    if at == 0 or model.adapter.kind != "cnn":
        raise NotApplicableError(
            f"{model.name} has no stage before layer {layer!r}", "Name one with the parameter earlier_layer."
        )
    return stages[at - 1]
