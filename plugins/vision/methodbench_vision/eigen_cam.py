"""Eigen-CAM.

Muhammad and Yeasin, Eigen-CAM: Class Activation Map using Principal Components, IJCNN 2020 (2008.00299). The
feature vectors of all positions are projected on their first principal component: what the last layer
responds to most, for whatever class. No class is asked and no gradient taken, so a wrong label or a changed
head leaves the map as it is. With X [h w, C] the feature vectors of one image::

    X = U S V'          L = ReLU(X v_1)

The authors published no code. Re-implementations centre X first (``centered``, pytorch-grad-cam); the paper
does not (``paper``). ``per_channel`` is EigenCAM-Pytorch, which takes one decomposition per channel map A_c
[h, w] and adds up ``(A_c 1) v_1'``, without a ReLU.

The sign of a singular vector is arbitrary, and the ReLU then keeps either the object or its surroundings.
``raw`` keeps what LAPACK returns, as the re-implementations do, and may differ between machines; ``flip`` and
``corr`` decide.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from methodbench.errors import DivergedError
from methodbench.params import hyperparameters
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.cam import Features, LayerChoice, PrefixTokens, activations, features, saliency

#: The share of the second eigenvalue's vector shrinks by (their ratio) ^ (2 ^ _SQUARINGS): 1e-6 apart is enough.
_SQUARINGS = 24
_TINY = torch.finfo(torch.float64).tiny

Variant = Literal["centered", "paper", "per_channel"]
Sign = Literal["raw", "flip", "corr"]


@hyperparameters
class EigenCAM:
    """First principal component of the feature maps."""

    variant: Annotated[
        Variant,
        Field(
            description="centre positions first, or not (paper), or one decomposition per channel (legacy)"
        ),
    ] = "centered"
    sign: Annotated[
        Sign,
        Field(
            description="what LAPACK returns, the larger extreme positive, or with the mean of the channels"
        ),
    ] = "raw"
    weighting: Annotated[
        Literal["none", "grad", "abs_grad"],
        Field(description="multiply activations by the gradient (EigenGrad-CAM) or its size (Seg-Eigen-CAM)"),
    ] = "none"
    layer: LayerChoice = ""
    prefix_tokens: PrefixTokens = None

    def explain(self, model: LoadedModel, x: Tensor, target: Tensor) -> Tensor:
        """Return maps [B, H, W] in [0, 1] for normalized images ``x`` [B, C, H, W].

        ``target`` [B] matters only where gradients weigh the activations.
        """
        if self.weighting == "none":
            layers = activations(model, x, layer=self.layer, prefix_tokens=self.prefix_tokens)
        else:
            pairs = features(model, x, target, layer=self.layer, prefix_tokens=self.prefix_tokens)
            layers = [weighted(pair, magnitude=self.weighting == "abs_grad") for pair in pairs]
        raw = [first_projection(maps, self.variant, self.sign) for maps in layers]
        return saliency(raw, (x.shape[2], x.shape[3]), rectify=self.variant != "per_channel")


def weighted(pair: Features, *, magnitude: bool = False) -> Tensor:
    """Return G A, or |G| A, elementwise [B, C, h, w]."""
    return (pair.gradient.abs() if magnitude else pair.gradient) * pair.activation


def first_projection(maps: Tensor, variant: Variant = "centered", sign: Sign = "raw") -> Tensor:
    """Project each image's feature vectors on their first principal component.

    Args:
        maps: float32 [B, C, h, w]; NaN counts as 0.
        variant: see the module's docstring.
        sign: ``flip`` negates a map whose minimum is larger in magnitude than its maximum (Seg-Eigen-CAM,
            equation 13), ``corr`` one that falls where the mean over channels rises.

    Returns:
        float32 [B, h, w], signed, not scaled.

    Raises:
        DivergedError: an activation is infinite.
    """
    maps = torch.where(maps.isnan(), 0, maps)
    if not bool(maps.isfinite().all()):
        raise DivergedError("the feature maps hold infinite values, which have no principal component")
    if variant == "per_channel":
        # Singular vectors of the whole stack of [h, w] matrices: rows of V' are [B, C, w].
        direction = torch.linalg.svd(maps, full_matrices=False)[2][..., 0, :]
        projection = torch.einsum("bch,bcw->bhw", maps.sum(-1), direction)
    else:
        x = maps.flatten(2).mT
        if variant == "centered":
            x = x - x.mean(1, keepdim=True)
        direction = _lapack_direction(x) if sign == "raw" else _direction(x)
        projection = (x @ direction[:, :, None]).unflatten(1, maps.shape[2:]).squeeze(-1)
    if sign == "raw":
        return projection
    low, high = projection.amin((1, 2)), projection.amax((1, 2))
    turned = low.abs() > high.abs() if sign == "flip" else _covariance(projection, maps.mean(1)) < 0
    return torch.where(turned[:, None, None], -projection, projection)


def _lapack_direction(x: Tensor) -> Tensor:
    """Return v_1 [B, C] of each X [B, N, C] with the sign that NumPy's LAPACK gives it.

    NumPy and torch may link different libraries, whose signs differ; the re-implementation uses NumPy. It decomposes
    one matrix after the other, on the CPU.
    """
    vectors = np.linalg.svd(x.cpu().numpy(), full_matrices=False)[2][:, 0]
    return torch.from_numpy(vectors).to(x)


def _direction(x: Tensor) -> Tensor:
    """Return v_1 [B, C] of each X [B, N, C], of either sign, from the smaller of its two Gram matrices.

    In double precision, since a Gram matrix squares the condition number.
    """
    x64 = x.double()
    # CUDA's eigh takes one matrix after the other, slower than a CPU; products it takes all at once.
    top = _top_by_squaring if x.is_cuda else _top_by_eigh
    if x.shape[1] < x.shape[2]:
        direction = torch.nn.functional.normalize((x64.mT @ top(x64 @ x64.mT)[:, :, None]).squeeze(-1), dim=1)
    else:
        direction = top(x64.mT @ x64)
    return direction.to(x.dtype)


def _top_by_eigh(gram: Tensor) -> Tensor:
    """Return the eigenvector [B, n] of the largest eigenvalue of each Gram matrix [B, n, n]."""
    return torch.linalg.eigh(gram)[1][:, :, -1]


def _top_by_squaring(gram: Tensor) -> Tensor:
    """Return what :func:`_top_by_eigh` does, up to sign: high powers of a matrix tend to u_1 u_1'.

    A matrix of zeros has the zero vector, onto which everything projects alike.
    """
    power = gram
    for _ in range(_SQUARINGS):
        power = power / power.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp_min(_TINY)
        power = power @ power
    column = power.diagonal(dim1=1, dim2=2).argmax(1)
    top = power[torch.arange(len(power), device=power.device), :, column]
    return torch.nn.functional.normalize(top, dim=1)


def _covariance(a: Tensor, b: Tensor) -> Tensor:
    """Return the covariance of maps [B, h, w] over positions, of the same sign as their correlation."""
    return ((a - a.mean((1, 2), keepdim=True)) * (b - b.mean((1, 2), keepdim=True))).mean((1, 2))
