"""Training without any method: the loss of the task, differentiated. The others are held against it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from methodbench.params import hyperparameters

if TYPE_CHECKING:
    from methodbench.context import Context


@hyperparameters
class PlainTraining:
    """Back-propagation of the task's loss, with the optimizer that the task fixes."""

    def wrap(self, model: nn.Module, ctx: Context) -> nn.Module:
        """Return ``model``."""
        return model

    def loss(self, model: nn.Module, outputs: Tensor, targets: Tensor, task_loss: Tensor) -> Tensor:
        """Return the task's loss."""
        return task_loss

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Leave the gradients alone."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """Leave the weights alone."""
