"""What a workload hands to ``optimizer.step``: the loss of one batch, the parts it is made of, and what was asked.

Optimizers come in four shapes. Most call the closure and then use ``p.grad``. Some search along a line and call it
more than once. Forward-only ones call :meth:`Closure.value` and never differentiate. Some work in the space of the
model's outputs: they ask for the gradient there and evaluate the model by themselves. A comparison by steps favours
the last and penalizes the third, so what each of them asked for is counted apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(slots=True)
class Evaluations:
    """How often an optimizer asked for what."""

    gradients: int = 0
    """Gradients of the loss, at the parameters or at the outputs."""
    functions: int = 0
    """Values of the loss, or of a surrogate of it, without a gradient."""
    inner_steps: int = 0
    """Gradients of a surrogate, which costs a pass through the model but none through the loss."""

    def facts(self) -> dict[str, int]:
        """Return the counts under the names that every workload gives them in its facts."""
        return {
            "gradient_evaluations": self.gradients,
            "function_evaluations": self.functions,
            "inner_steps": self.inner_steps,
        }


class Closure:
    """The loss of one batch as a function of the parameters.

    Calling it clears the gradients, computes the loss, calls ``backward`` and returns the loss. Gradients are
    cleared in place, the default when older methods were published: some results hinge on it.

    Args:
        params: what is optimized.
        model: maps ``inputs`` to outputs; any callable.
        loss: maps outputs and ``targets`` to a scalar.
        inputs: of the batch.
        targets: of the batch.
        evaluations: where to count; a count of its own by default.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        model: Callable[[Any], Tensor],
        loss: Callable[[Tensor, Any], Tensor],
        inputs: Any = None,
        targets: Any = None,
        evaluations: Evaluations | None = None,
    ) -> None:
        self.params = list(params)
        self.model = model
        self.loss = loss
        self.inputs = inputs
        self.targets = targets
        self.evaluations = Evaluations() if evaluations is None else evaluations

    def __call__(self) -> Tensor:
        """Return the loss, a scalar, with fresh gradients in the parameters."""
        for p in self.params:
            if p.grad is not None:
                p.grad.detach_().zero_()
        with torch.enable_grad():
            loss = self.loss(self.model(self.inputs), self.targets)
            loss.backward()
        self.evaluations.gradients += 1
        return loss.detach()

    @torch.no_grad()
    def value(self) -> Tensor:
        """Return the loss, a scalar, and leave the gradients alone."""
        self.evaluations.functions += 1
        return self.loss(self.model(self.inputs), self.targets)

    def at_outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, the outputs, and the loss's gradient with respect to these: detached, of their shape."""
        with torch.no_grad():
            # A model that is the identity of a parameter returns the parameter: what is kept must not move with it.
            outputs = self.model(self.inputs).clone()
        leaf = outputs.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.loss(leaf, self.targets)
            (gradient,) = torch.autograd.grad(loss, leaf)
        self.evaluations.gradients += 1
        return loss.detach(), outputs.detach(), gradient

    @torch.no_grad()
    def value_at(self, outputs: Tensor) -> Tensor:
        """Return the loss of other outputs for the targets of the batch."""
        self.evaluations.functions += 1
        return self.loss(outputs, self.targets)

    def surrogate(self, of: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return a function of the outputs at the parameters, and its gradient at these: an inner step."""
        with torch.enable_grad():
            value = of(self.model(self.inputs))
            gradients = torch.autograd.grad(value, self.params, materialize_grads=True)
        self.evaluations.inner_steps += 1
        return value.detach(), list(gradients)

    @torch.no_grad()
    def surrogate_value(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """Return a function of the outputs at the parameters, without its gradient."""
        self.evaluations.functions += 1
        return of(self.model(self.inputs))


def as_closure(closure: Any, owner: str) -> Closure:
    """Return ``closure``, or say what an optimizer that is no plain rule asks for.

    Raises:
        TypeError: the closure does not carry the parts of the loss.
    """
    if not isinstance(closure, Closure):
        raise TypeError(
            f"{owner} evaluates the loss by itself: call step with a methodbench.torchkit.closures.Closure,"
            f" not with {type(closure).__name__}"
        )
    return closure


class TrainingClosure(Closure):
    """The loss of one batch as a training method has it, whose gradients the method sees before the optimizer does.

    Parameters that the loss does not reach have no gradient, so that no optimizer moves them.

    Args:
        method: a :class:`methodbench.protocols.TrainingMethod`.
        model: what ``method.wrap`` returned, in training mode.
        step: number of the step, from 0.
        loss: maps outputs and targets to the task's loss, a scalar.
        inputs: of the batch.
        targets: of the batch.
        evaluations: where to count; a count of its own by default.
    """

    def __init__(
        self,
        method: Any,
        model: nn.Module,
        step: int,
        loss: Callable[[Tensor, Any], Tensor],
        inputs: Any = None,
        targets: Any = None,
        evaluations: Evaluations | None = None,
    ) -> None:
        def of_method(outputs: Tensor, targets: Any) -> Tensor:
            found: Tensor = method.loss(model, outputs, targets, loss(outputs, targets))
            return found

        trained = [p for p in model.parameters() if p.requires_grad]
        super().__init__(trained, model, of_method, inputs, targets, evaluations)
        self.method, self.module, self.step = method, model, step

    def __call__(self) -> Tensor:
        """Return the loss, a scalar, with fresh gradients that the method has seen."""
        for p in self.params:
            p.grad = None
        loss = super().__call__()
        self.method.after_backward(self.module, self.step)
        return loss


def training_step(optimizer: torch.optim.Optimizer, closure: TrainingClosure) -> Tensor:
    """Take one step of the training loop that all training methods share, hooks included, and return the loss."""
    loss: Tensor = optimizer.step(closure)  # type: ignore[arg-type, assignment]  # torch says float
    closure.method.after_step(closure.module, closure.step)
    return loss
