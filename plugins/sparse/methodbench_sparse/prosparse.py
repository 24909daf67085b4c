"""ProSparse: a ReLU model whose activations are pushed to zero by a penalty that rises along sine waves.

"ProSparse: Introducing and Enhancing Intrinsic Activation Sparsity within Large Language Models", COLING 2025, arXiv
2402.13516; schedule and penalty as in the same first author's thunlp/BlockFFN (6905545), training code is not public.

1. Every activation function becomes a ReLU.
2. ``loss + lambda(t) sum_layers ||x_1||_1``, with x_1 what the down projection reads (behind the product with the
   linear branch, where there is one). In stage i, from step T_i-1 to T_i::

       lambda(t) = l_i-1 + (l_i - l_i-1) / 2 (sin(-pi/2 + pi (t - T_i-1) / (T_i - T_i-1)) + 1)

   so that it is flat at both ends. In the code the norm is a sum over all tokens of the batch, times 1e-8; ``mean``
   takes the mean over entries instead, and wants other lambdas.
3. After the last stage values below a threshold T are zero as well (FATReLU), without further training; what is at
   least T passes unchanged.

``ends`` are those of the 7B recipe, scaled so that the last stage ends with ``steps``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.model import set_submodule
from methodbench.torchkit.nonlinearities import ShiftedReLU, nonlinearities

if TYPE_CHECKING:
    from methodbench.context import Context

#: What a sum over a batch is multiplied with in the authors' code.
SUM_SCALE = 1e-8


@hyperparameters
class ProSparse:
    """Progressive L1 regularization of a model with ReLUs, then a threshold."""

    lambdas: Annotated[
        tuple[Annotated[float, Field(ge=0)], ...],
        Field(
            min_length=1,
            description="factors at the ends of the stages, never falling; the first holds in the first",
        ),
    ] = (0.0, 5e-3, 5e-2, 5e-2, 2e-1, 2e-1)
    ends: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...],
        Field(min_length=1, description="where the stages end, in proportion to the last"),
    ] = (5000, 6000, 10000, 12000, 16000, 16500)
    steps: Annotated[int, Field(ge=1, le=10_000_000, description="step at which the last stage ends")] = 200
    reduction: Annotated[
        Literal["sum_scaled", "mean"],
        Field(description="sum over the batch times 1e-8, or mean over entries"),
    ] = "sum_scaled"
    threshold: Annotated[float, Field(ge=0, le=100, description="T of FATReLU, after the last stage")] = 0.01

    @model_validator(mode="after")
    def _stages_agree(self) -> Self:
        if len(self.lambdas) != len(self.ends):
            raise ValueError(
                f"{len(self.lambdas)} lambdas and {len(self.ends)} ends: one of each for every stage"
            )
        if list(self.lambdas) != sorted(self.lambdas):
            raise ValueError("lambdas must not fall")
        if any(later <= earlier for earlier, later in zip(self.ends, self.ends[1:], strict=False)):
            raise ValueError("ends must rise")
        return self

    def wrap(self, model: nn.Module, ctx: Context) -> nn.Module:
        """Return ``model`` with ReLUs, and an eye on what its down projections read.

        Raises:
            NotApplicableError: no activation function is a module.
        """
        return Rectified(model)

    def loss(self, model: nn.Module, outputs: Tensor, targets: Tensor, task_loss: Tensor) -> Tensor:
        """Return the task's loss plus the penalty at the present step."""
        assert isinstance(model, Rectified)
        factor = self.factor(model.step)
        return task_loss + factor * penalty(model.hidden, self.reduction) if factor else task_loss

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Leave the gradients alone."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """Count the step; behind the last one, raise the threshold."""
        assert isinstance(model, Rectified)
        model.step = step + 1
        if model.step >= self.steps:
            model.raise_threshold(self.threshold)

    def factor(self, step: int) -> float:
        """Return lambda at ``step`` (from 0)."""
        scale = self.steps / self.ends[-1]
        start, last = 0.0, self.lambdas[0]
        for value, end in zip(self.lambdas, self.ends, strict=True):
            if step < end * scale:
                return sine(step - start, end * scale - start, last, value)
            start, last = end * scale, value
        return last


class Rectified(nn.Module):
    """A model with ReLUs that keeps what its second feed-forward layers read in the last training pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.step = 0
        self.hidden: list[Tensor] = []
        found = nonlinearities(model)
        if not found:
            raise NotApplicableError("the model has no activation function that is a module of its own")
        self._names = list(found)
        for name in self._names:
            set_submodule(model, name, ShiftedReLU())
        for name in self._names:
            reader = reader_of(model, name)
            if reader is None:
                model.get_submodule(name).register_forward_hook(lambda _, __, output: self._keep(output))
            else:
                reader.register_forward_pre_hook(lambda _, args: self._keep(args[0]))

    def _keep(self, hidden: Tensor) -> None:
        if self.training and torch.is_grad_enabled():
            self.hidden.append(hidden)

    def raise_threshold(self, threshold: float) -> None:
        """Let values below ``threshold`` be zero."""
        for name in self._names:
            part = self.model.get_submodule(name)
            assert isinstance(part, ShiftedReLU)
            part.threshold = threshold

    def forward(self, x: Any) -> Tensor:
        """Return the model's outputs."""
        self.hidden = []
        outputs: Tensor = self.model(x)
        return outputs


def reader_of(model: nn.Module, activation: str) -> nn.Module | None:
    """Return the down projection beside the activation function of that name; None where it stands in a chain.

    In a gated network the hidden state is a product, which only the down projection sees.
    """
    holder = model.get_submodule(activation.rpartition(".")[0])
    found = getattr(holder, "down_proj", None)
    return found if isinstance(found, nn.Module) else None


def sine(step: float, length: float, start: float, end: float) -> float:
    """Return lambda ``step`` steps into a stage of ``length`` from ``start`` to ``end``; at the end it stays."""
    if step >= length:
        return end
    return start + (end - start) / 2 * (math.sin(-math.pi / 2 + math.pi * step / length) + 1)


def penalty(hidden: Sequence[Tensor], reduction: Literal["sum_scaled", "mean"]) -> Tensor:
    """Return the L1 norm over all layers' hidden states, a scalar: ``1e-8`` times the sum, or the sum of means."""
    if reduction == "mean":
        return torch.stack([x.abs().mean() for x in hidden]).sum()
    return SUM_SCALE * torch.stack([x.abs().sum() for x in hidden]).sum()
