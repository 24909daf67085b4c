"""TrAct: Making First-layer Pre-Activations Trainable (Petersen, Borgelt and Ermon, NeurIPS 2024, arXiv 2410.23970).

A gradient step on the weights of the first layer moves its pre-activations in proportion to the inputs: bright,
contrasty images move them far, dark ones hardly. TrAct gives the weights the gradient for which the step comes near to
one on the pre-activations themselves: the ordinary gradient times the regularized inverse of the inputs' second
moment. Forward pass and all other gradients are unchanged, and so is the optimizer.

    dW = dᵀ X (Xᵀ X / b + λ I)⁻¹        X: inputs [b, n], or the b patches under a kernel; d: upstream gradient [b, o]

For b < n the same comes from the smaller side, with A = X Xᵀ / b:

    dW = dᵀ (I - A / λ (A / λ + I)⁻¹) X / λ
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters

if TYPE_CHECKING:
    from methodbench.context import Context


@hyperparameters
class TrAct:
    """Second-order gradient of the first layer alone (paper, equation 5)."""

    lam: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="regularizer λ of the second moment")
    ] = 0.1

    def wrap(self, model: nn.Module, ctx: Context) -> nn.Module:
        """Return ``model`` with its first Linear or Conv2d replaced; parameters stay the same objects.

        Raises:
            NotApplicableError: there is no such layer, or it is dilated, grouped or padded by other than zeros.
        """
        for name, layer in model.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                replaced = TrActLayer(layer, self.lam)
                if not name:
                    return replaced
                model.set_submodule(name, replaced)
                return model
        raise NotApplicableError("the model has neither a Linear nor a Conv2d")

    def loss(self, model: nn.Module, outputs: Tensor, targets: Tensor, task_loss: Tensor) -> Tensor:
        """Return the task's loss."""
        return task_loss

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Leave the gradients alone."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """Leave the weights alone."""


class TrActLayer(nn.Module):
    """A Linear or Conv2d with the other gradient; it holds the layer's own weight and bias."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, lam: float) -> None:
        super().__init__()
        self.weight, self.bias, self.lam = layer.weight, layer.bias, lam
        self.geometry: dict[str, Any] | None = None
        if isinstance(layer, nn.Conv2d):
            plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
            if layer.groups != 1 or set(layer.dilation) != {1} or not plain:
                raise NotApplicableError(
                    "TrAct takes convolutions without groups and dilation, padded by zeros"
                )
            self.geometry = {"stride": layer.stride, "padding": layer.padding}

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer returns."""
        function = _Linear if self.geometry is None else _Convolution
        y: Tensor = function.apply(x, self.weight, self.bias, self.lam, self.geometry)
        return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lam: float, geometry: None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.lam, ctx.has_bias = lam, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, d = x.reshape(-1, x.shape[-1]), upstream[0].reshape(-1, len(weight))
        return (
            upstream[0] @ weight,
            preconditioned(rows, d, ctx.lam),
            d.sum(0) if ctx.has_bias else None,
            None,
            None,
        )


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lam: float,
        geometry: dict[str, Any],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.lam, ctx.geometry, ctx.has_bias = lam, geometry, bias is not None
        return F.conv2d(x, weight, bias, **geometry)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (d,) = upstream
        dx = conv2d_input(x.shape, weight, d, **ctx.geometry) if ctx.needs_input_grad[0] else None
        patches = F.unfold(x, weight.shape[2:], **ctx.geometry)
        rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
        dw = preconditioned(rows, d.flatten(2).transpose(1, 2).reshape(-1, len(weight)), ctx.lam)
        return dx, dw.view_as(weight), d.sum((0, 2, 3)) if ctx.has_bias else None, None, None


def preconditioned(rows: Tensor, upstream: Tensor, lam: float) -> Tensor:
    """Return the gradient [o, n] of the weights for inputs [b, n] and upstream gradients [b, o] (paper, equation 5).

    The inverse is taken on the smaller side, in float32 at the least. The mean over the batch sits in ``upstream``;
    the second moment alone is divided by b.
    """
    precise = torch.promote_types(rows.dtype, torch.float32)
    x, d = rows.to(precise), upstream.to(precise)
    count, features = x.shape
    if count >= features:
        moment = x.T @ x / count + lam * torch.eye(features, dtype=precise, device=x.device)
        found = d.T @ x @ torch.linalg.inv(moment)
    else:
        eye = torch.eye(count, dtype=precise, device=x.device)
        gram = x @ x.T / count / lam
        found = d.T @ (eye - gram @ torch.linalg.inv(gram + eye)) @ x / lam
    return found.to(rows.dtype)
