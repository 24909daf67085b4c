"""DEFT: fine-tuning of few parameters that also thins out the activations of the frozen network.

"From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in Transformers", arXiv 2402.01911;
authors' code IBM/DEFT (193cdef).

With A_l [B, ...] what the activation function of layer l gives, the loss gets a smooth count of what is not zero::

    D_bl = mean over everything but b of A_l^2 / (A_l^2 + eps)        loss + weight * mean(D)

It never exceeds the exact density and tends to it for small eps. Its gradient is largest at ``|A| = sqrt(eps / 3)``.
Padding counts. Only low-rank updates of the Linears and the last Linear (the head) are trained; ``rank=0`` trains all.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.low_rank import LowRankUpdate
from methodbench.torchkit.model import set_submodule
from methodbench.torchkit.nonlinearities import nonlinearities

if TYPE_CHECKING:
    from collections.abc import Sequence

    from methodbench.context import Context


@hyperparameters
class DEFT:
    """Adds the density of activations to the loss."""

    weight: Annotated[
        float, Field(ge=0, le=1e4, description="of the density in the loss; 0 leaves it out")
    ] = 1.0
    eps: Annotated[float, Field(gt=0, le=1, description="width of the smooth zero, beside A squared")] = 1e-7
    rank: Annotated[
        int, Field(ge=0, le=1024, description="of the updates that are trained; 0 trains all")
    ] = 8

    def wrap(self, model: nn.Module, ctx: Context) -> nn.Module:
        """Return a copy of ``model`` with updates to train, and an eye on its activation functions.

        Raises:
            NotApplicableError: no activation function is a module, or there is no Linear to update.
        """
        watched = Watched(copy.deepcopy(model) if self.rank else model)
        if self.rank:
            add_updates(watched.model, self.rank, ctx.seed)
        return watched

    def loss(self, model: nn.Module, outputs: Tensor, targets: Tensor, task_loss: Tensor) -> Tensor:
        """Return the task's loss plus the weighted density."""
        assert isinstance(model, Watched)
        if not self.weight:
            return task_loss
        return task_loss + self.weight * density_terms(model.activations, self.eps).mean()

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Leave the gradients alone."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """Leave the weights alone."""


class Watched(nn.Module):
    """A model that keeps what its activation functions gave in the last training pass, [batch, ...] each."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.activations: list[Tensor] = []
        found = nonlinearities(model)
        if not found:
            raise NotApplicableError("the model has no activation function that is a module of its own")
        for part in found.values():
            part.register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: Any, output: Tensor) -> None:
        if self.training and torch.is_grad_enabled():
            self.activations.append(output)

    def forward(self, x: Any) -> Tensor:
        """Return the model's outputs."""
        self.activations = []
        outputs: Tensor = self.model(x)
        return outputs


def add_updates(model: nn.Module, rank: int, seed: int) -> None:
    """Freeze ``model``, in place, but for its last Linear, and put low-rank updates around the other Linears."""
    linears = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    if not linears:
        raise NotApplicableError("the model has no Linear to update")
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    *inner, head = linears
    for name in inner:
        linear = linears[name]
        set_submodule(model, name, LowRankUpdate(linear, min(rank, *linear.weight.shape), generator))
    linears[head].requires_grad_(True)


def density_terms(activations: Sequence[Tensor], eps: float) -> Tensor:
    """Return D [batch, layers], float32, of activations [batch, ...] of every layer (section 3.2)."""
    squares = [activation.float().square() for activation in activations]
    return torch.stack([(square / (square + eps)).flatten(1).mean(1) for square in squares], dim=1)


def exact_density(activations: Sequence[Tensor]) -> Tensor:
    """Return the share of entries that are not zero, float64 [batch, layers]; the number that is reported."""
    return torch.stack([(activation != 0).flatten(1).double().mean(1) for activation in activations], dim=1)
