"""GBLM-Pruner: Wanda's score with a first-order term.

Das, Sun, Ma, Shen, "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models", arXiv 2311.04902;
authors' code VILA-Lab/GBLM-Pruner (9e8aea2).

A weight matters as much as its magnitude times the norm of its input, and times the gradient that the loss of the
*dense* model has at it, gathered over calibration samples n with next-token losses L_n::

    G_ij = sqrt(sum_n (alpha dL_n/dW_ij)^2)     or     sum_n |alpha dL_n/dW_ij|
    S_ij = |W_ij| ||X_j||_2 + |W_ij| G_ij

Rows lose their lowest scores, and blocks are pruned one after the other, as in Wanda. Gradients are summed over
samples where norms are a mean over them, so that alpha weighs the two for the authors' 128 samples. The paper does not
say which norm of gradients made its tables. The code keeps G in half precision, and so does ``gradient_dtype`` by
default; the model stays in eval mode, where the code switches to training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.model import Calibration, LoadedModel, set_weight
from methodbench.torchkit.text_tuning import text_loss
from methodbench_sparse.wanda import RowSettings, lowest, prune_blocks, wanda_score

Norm = Literal["l2", "l1"]

#: Keeps the inverted score finite, as in the authors' code.
EPSILON = 1e-8


@hyperparameters
class GBLMPruner(RowSettings):
    """Zeroes the weights of lowest magnitude times input norm plus gradient, row by row."""

    norm: Annotated[Norm, Field(description="how gradients are gathered over samples")] = "l2"
    scale: Annotated[
        float, Field(ge=0, le=1e6, description="alpha, the weight of the gradients; 0 is Wanda")
    ] = 100.0
    inverse: Annotated[
        bool, Field(description="divide the activation term by the gradients instead of adding")
    ] = False
    gradient_dtype: Annotated[
        Literal["float16", "float32"], Field(description="precision of the gathered gradients")
    ] = "float16"

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the pruned model; see :class:`methodbench.protocols.Compressor`.

        Raises:
            NotApplicableError: no calibration text, a model without logits, or a Linear whose inputs do not divide
                into the pattern's groups.
            DivergedError: a gradient is not finite.
        """
        if not len(data) or data.inputs.is_floating_point():
            raise NotApplicableError(
                "gblm-pruner needs the loss of calibration text, and the task gives none"
            )
        pruned = model.clone()
        dtype = getattr(torch, self.gradient_dtype)
        with ctx.phase("gradients"):
            samples = (lambda ids=ids: text_loss(pruned, ids) for ids in data.inputs)
            gradients = gather(pruned.adapter.targets(pruned.module), samples, self.norm, self.scale, dtype)

        def mask(weight: Tensor, scaler: Tensor, name: str) -> Tensor:
            scores = gblm_score(weight, scaler, gradients[name], inverse=self.inverse)
            return lowest(scores, self.sparsity, self.pattern, self.use_variant, name)

        return self.stored(prune_blocks(pruned, data, ctx, mask))


def gather(
    linears: Mapping[str, nn.Module],
    losses: Iterable[Callable[[], Tensor]],
    norm: Norm,
    scale: float,
    dtype: torch.dtype = torch.float16,
) -> dict[str, Tensor]:
    """Return G [out, in] of every Linear, in ``dtype``; one backward pass per loss.

    Args:
        linears: of a cloned model; their weights become parameters of their own.
        losses: make the scalar loss of each sample.
        norm: ``l2``: the root of the sum of squares, summed in float32; ``l1``: the sum of magnitudes in ``dtype``.
        scale: alpha.
        dtype: what is kept.

    Raises:
        DivergedError: a gradient is not finite.
    """
    for linear in linears.values():
        set_weight(linear, linear.get_parameter("weight"))
        linear.get_parameter("weight").requires_grad_(True)
    kept = {
        name: torch.zeros_like(linear.get_parameter("weight"), dtype=torch.float32 if norm == "l2" else dtype)
        for name, linear in linears.items()
    }
    weights = [linear.get_parameter("weight") for linear in linears.values()]
    for loss in losses:
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(), weights, materialize_grads=True)
        for name, gradient in zip(linears, gradients, strict=True):
            if not bool(gradient.isfinite().all()):
                raise DivergedError(f"the gradient of {name} is not finite")
            scaled = gradient.float() * scale
            kept[name] += scaled.square() if norm == "l2" else scaled.abs().to(dtype)
    for weight in weights:
        weight.requires_grad_(False)
    return {
        name: (total.sqrt() if norm == "l2" else total).to(dtype).flatten(1) for name, total in kept.items()
    }


def gblm_score(weight: Tensor, scaler: Tensor, gradient: Tensor, *, inverse: bool = False) -> Tensor:
    """Return S, float32 [out, in]; without gradients it is Wanda's score.

    Args:
        weight: [out, in].
        scaler: [in], see :class:`methodbench_sparse.wanda.InputScale`.
        gradient: G [out, in].
        inverse: the code's other form, ``|W| ||X|| / (G + 1e-8)``.
    """
    first = wanda_score(weight, scaler)
    if inverse:
        return first / (gradient.abs().float() + EPSILON)
    return first + weight.abs().float() * gradient.abs().float()
