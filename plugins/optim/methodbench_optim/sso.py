"""SSO: Target-based Surrogates for Stochastic Optimization.

Lavington, Vaswani, Babanezhad, Schmidt and Le Roux, ICML 2023, arXiv 2302.02607.

Where the loss is dear and the model cheap, the gradient of the loss with respect to the model's outputs (the target
space) is asked for once per batch. A quadratic surrogate around these outputs then takes many cheap steps of the
parameters, each with a line search, and none of them needs the loss. With batch (X, y), outputs F = f_θ(X) and
D = ∂ℓ(F, y) / ∂F:

    s(w) = mean over all entries of [ D f_w(X) / η_t + (f_w(X) - F)² ]
    m times: g = ∇s(w), w ← w - α g, with α the first of α0, 0.9 α0, 0.81 α0, ... that s(w - α g) <= s(w) - α c ‖g‖²

The surrogate's minimum among all outputs is F - D / (2 η_t). η_t is η, η √t, or η T^(t/T). ``target_search`` finds η by
a line search over the loss in the space of the outputs, of which η is an inverse step (SLS in the authors' code).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from methodbench.params import hyperparameters
from methodbench.torchkit.closures import Closure, as_closure
from methodbench.tuning import Between, Space
from methodbench_optim.rule import ready, real

if TYPE_CHECKING:
    from methodbench.context import Context

#: Bounds of the authors' code: of a line search, of its step, of the gradient that ends the inner steps, and of η.
SEARCHES, SMALLEST_STEP, SMALLEST_GRADIENT, SMALLEST_ETA, LARGEST_ETA = 100, 1e-6, 1e-6, 1e-4, 1e4


@hyperparameters
class SSO:
    """One gradient in the space of the outputs, then line-searched steps on its surrogate (paper, algorithm 1)."""

    #: The paper's grid.
    SPACE: ClassVar[Space] = {"eta": Between(1e-3, 1e3)}

    eta: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="inverse of the step in the space of the outputs")
    ] = 1e3
    inner_steps: Annotated[
        int, Field(ge=1, le=10_000, description="steps on the surrogate of a batch, m")
    ] = 10
    eta_schedule: Annotated[
        Literal["constant", "stochastic", "exponential"], Field(description="η, η √t, or η T^(t/T) at step t")
    ] = "constant"
    total_steps: Annotated[int, Field(ge=1, description="T of the exponential schedule")] = 100
    target_search: Annotated[
        bool, Field(description="find η by a line search over the loss of the outputs")
    ] = False
    c: Annotated[
        float,
        Field(gt=0, lt=1, description="share of the decrease that a line search asks for"),
    ] = 0.5
    shrink: Annotated[
        float,
        Field(gt=0, lt=1, description="factor of a step that a line search refuses"),
    ] = 0.9
    expand: Annotated[
        float,
        Field(ge=1, allow_inf_nan=False, description="growth of the step between line searches of an epoch"),
    ] = 1.8
    batches_per_epoch: Annotated[int, Field(ge=1, description="root of the growth of inner steps")] = 1
    initial_step: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="step of the first line search of a batch")
    ] = 10.0

    @model_validator(mode="after")
    def _one_way_to_eta(self) -> SSO:
        if self.target_search and self.eta_schedule != "constant":
            raise ValueError("target_search finds eta: eta_schedule must be constant")
        return self

    def build(self, param_groups: Iterable[dict[str, Any]], ctx: Context) -> SSOOptimizer:
        """Return the optimizer; all roles of parameters are treated alike."""
        return real(ready(SSOOptimizer(param_groups, self), "sso"), "sso")


class SSOOptimizer(torch.optim.Optimizer):
    """SSO as a :class:`torch.optim.Optimizer`; ``step`` asks for a :class:`~methodbench.torchkit.closures.Closure`.

    A batch whose surrogate has no finite gradient moves nothing. What is carried from batch to batch stands in the
    first group: ``step`` (int) and ``eta``, which a search changes.
    """

    def __init__(self, params: Iterable[Any], settings: SSO) -> None:
        self.settings = settings
        super().__init__(params, {"step": 0, "eta": settings.eta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor:  # type: ignore[override]
        """Take the inner steps of one batch; return its loss before them.

        Raises:
            TypeError: ``closure`` does not carry the parts of the loss.
        """
        closure = as_closure(closure, "SSO")
        memory, settings = self.param_groups[0], self.settings
        memory["step"] += 1
        loss, outputs, gradient = closure.at_outputs()
        if settings.target_search:
            memory["eta"] = searched_eta(closure, loss, outputs, gradient, memory["eta"], settings)
        eta = scheduled_eta(memory["eta"], memory["step"], settings)

        def surrogate(moved: Tensor) -> Tensor:
            return (gradient * moved / eta + (moved - outputs).square()).mean()

        step = settings.initial_step
        for _ in range(settings.inner_steps):
            value, slopes = closure.surrogate(surrogate)
            norm = torch.stack(torch._foreach_norm(slopes)).norm()
            if not norm > SMALLEST_GRADIENT:
                break
            step = descend(closure, surrogate, value, slopes, norm, step, settings)
        return loss


def scheduled_eta(eta: float, step: int, settings: SSO) -> float:
    """Return η_t for the batch ``step``, from 1."""
    if settings.eta_schedule == "stochastic":
        return eta * step**0.5
    if settings.eta_schedule == "exponential":
        return float(eta * settings.total_steps ** (step / settings.total_steps))
    return eta


def searched_eta(
    closure: Closure, loss: Tensor, outputs: Tensor, gradient: Tensor, eta: float, settings: SSO
) -> float:
    """Return the smallest of eta / expand, and this over 0.9, 0.81, ..., that decreases the loss enough.

    Args:
        outputs: F, of any shape, with its ``loss`` and the loss's ``gradient`` D.
        eta: of the batch before.
    """
    proposed, squared = eta / settings.expand, gradient.square().sum()
    for _ in range(SEARCHES):
        if not closure.value_at(outputs - gradient / proposed) > loss - settings.c / proposed * squared:
            break
        proposed /= settings.shrink
    return min(max(proposed, SMALLEST_ETA), LARGEST_ETA)


def descend(
    closure: Closure,
    surrogate: Callable[[Tensor], Tensor],
    value: Tensor,
    slopes: list[Tensor],
    norm: Tensor,
    step: float,
    settings: SSO,
) -> float:
    """Move the parameters along ``slopes`` by the step that a line search ends with, and return this step.

    Args:
        value: of the surrogate where the parameters are.
        slopes: its gradient there, and ``norm``, the norm of all.
        step: of the line search before; the first one tried is longer.
    """
    step *= settings.expand ** (1 / settings.batches_per_epoch)
    starts = [p.detach().clone() for p in closure.params]

    def move(length: float) -> None:
        torch._foreach_copy_(closure.params, torch._foreach_sub(starts, torch._foreach_mul(slopes, length)))

    for _ in range(SEARCHES):
        move(step)
        if closure.surrogate_value(surrogate) <= value - step * settings.c * norm.square():
            break
        step *= settings.shrink
        if step < SMALLEST_STEP:
            break
    move(step)
    return step
