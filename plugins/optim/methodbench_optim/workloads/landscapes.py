"""The three one-dimensional non-convex functions of diffGrad's empirical analysis (arXiv 1909.11015).

Each has its global minimum to the left of zero, or at it, and a local one nearby that an optimizer with
momentum can run into. All functions work elementwise on float tensors of any shape. The second comes with two
gradients: the true one, and the one of the authors' notebook, which lost the factor 8 of the chain rule and
made the published trajectories.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Landscape:
    """A function of one variable, its gradients, and where it is lowest."""

    value: Callable[[Tensor], Tensor]
    gradients: dict[str, Callable[[Tensor], Tensor]]
    """By name; ``"true"`` is always there."""
    minimizer: float
    minimum: float


class WithGradient(torch.autograd.Function):
    """A function whose gradient is given beside it, so that a wrong one can be followed as well."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, value: Callable[[Tensor], Tensor], gradient: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return ``value(x)``, elementwise."""
        ctx.save_for_backward(x)
        ctx.gradient = gradient
        return value(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        """Return the upstream gradient times the given one."""
        (x,) = ctx.saved_tensors
        return upstream[0] * ctx.gradient(x), None, None


def f1(x: Tensor) -> Tensor:
    """Two parabolas: (x + 0.3)² up to 0, then (x - 0.2)² + 0.05."""
    return torch.where(x <= 0, (x + 0.3) ** 2, (x - 0.2) ** 2 + 0.05)


def f1_gradient(x: Tensor) -> Tensor:
    """Derivative of :func:`f1`; the left branch's at 0."""
    return torch.where(x <= 0, 2 * x + 0.6, 2 * x - 0.4)


def f2(x: Tensor) -> Tensor:
    """A steep wall up to -0.9, then x³ + x sin 8x + 0.85."""
    return torch.where(x <= -0.9, -40 * x - 35.15, x**3 + x * torch.sin(8 * x) + 0.85)


def f2_gradient(x: Tensor) -> Tensor:
    """Derivative of :func:`f2`."""
    waves = 3 * x**2 + torch.sin(8 * x) + 8 * x * torch.cos(8 * x)
    return torch.where(x <= -0.9, torch.full_like(x, -40.0), waves)


def f2_notebook_gradient(x: Tensor) -> Tensor:
    """What the authors' notebook uses for the derivative of :func:`f2`."""
    waves = 3 * x**2 + torch.sin(8 * x) + x * torch.cos(8 * x)
    return torch.where(x <= -0.9, torch.full_like(x, -40.0), waves)


def f3(x: Tensor) -> Tensor:
    """A sharp valley at 0 with ridges at -0.4 and 0.4 and a parabola outside -0.5 and 0.5."""
    size = x.abs()
    return torch.where(size <= 0.4, 7 / 8 * size, torch.where(size < 0.5, 0.75 - size, x**2))


def f3_gradient(x: Tensor) -> Tensor:
    """Derivative of :func:`f3`; at a kink, that of the branch on the left."""
    branch = torch.bucketize(x, x.new_tensor([-0.5, -0.4, 0.0, 0.4, 0.5]))
    inner = x.new_tensor([0.0, 1.0, -7 / 8, 7 / 8, -1.0, 0.0])[branch]
    return torch.where((branch == 0) | (branch == 5), 2 * x, inner)


LANDSCAPES: dict[str, Landscape] = {
    "f1": Landscape(value=f1, gradients={"true": f1_gradient}, minimizer=-0.3, minimum=0.0),
    "f2": Landscape(
        value=f2,
        gradients={"true": f2_gradient, "notebook": f2_notebook_gradient},
        minimizer=-0.6429185989152617,
        minimum=0.00011977146994468502,
    ),
    "f3": Landscape(value=f3, gradients={"true": f3_gradient}, minimizer=0.0, minimum=0.0),
}
