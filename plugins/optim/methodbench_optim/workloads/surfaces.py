"""Optimizers on functions whose minimum is known: Rosenbrock, Rastrigin, and quadratics of known condition.

The two-dimensional functions follow the common practice of optimizer collections (kozistr/pytorch_optimizer and
jettify/pytorch-optimizer): Rosenbrock from (-2, 2), Rastrigin from (-2, 3.5), the norm of the gradient clipped to 1
before each step. One start is an anecdote: further ones are drawn evenly from the box that those collections plot.
Such functions show how a rule behaves, not what it is worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.errors import DivergedError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, OptimizerMethod, Scores
from methodbench.torchkit.closures import Closure, Evaluations
from methodbench.torchkit.size import state_bytes

if TYPE_CHECKING:
    from methodbench.context import Context
    from methodbench.torchkit.model import LoadedModel

#: Gaps are read on a logarithmic scale; below this, float64 arithmetic says nothing any more.
FLOOR = 1e-16


@dataclass(frozen=True, slots=True)
class Descent:
    """One function with its start [n] and its minimizer [n], where it is 0; float64."""

    value: Callable[[Tensor], Tensor]
    start: Tensor
    minimizer: Tensor
    clip: float = math.inf
    """Longest gradient that an optimizer gets to see."""


@hyperparameters
class Surface:
    """One function, several starts (of quadratics: several functions), float64. Unit: a start.

    Scores: ``log-gap``, the decimal logarithm of the value at the last iterate, which is 0 at the minimum, of
    quadratics over the value at the start; not below -16, infinite for a start that left the real numbers;
    ``distance``, of the last iterate from the minimizer; ``steps-to-target``, the first step at which the gap is at
    most the target, infinite for a miss. Series: ``gap``, along the first start.
    """

    function: Annotated[Literal["rosenbrock", "rastrigin", "quadratic"], Field(description="which function")]
    starts: Annotated[
        int, Field(ge=1, le=1000, description="starts; the first is the one of the literature")
    ] = 11
    steps: Annotated[int, Field(ge=1, description="optimizer steps")] = 500
    clip: Annotated[
        float, Field(gt=0, description="norm that gradients are clipped to; not those of quadratics")
    ] = 1.0
    target: Annotated[float, Field(gt=0, description="gap to reach")] = 1e-3
    dimension: Annotated[int, Field(ge=2, le=1000, description="variables of a quadratic")] = 32
    condition: Annotated[
        float, Field(ge=1, le=1e12, description="largest over smallest curvature of a quadratic")
    ] = 1e3

    def evaluate(self, method: OptimizerMethod, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Run the optimizer, with its hyperparameters as configured, from every start.

        Raises:
            DivergedError: no start ends at a finite point.
        """
        evaluations = Evaluations()
        descents = self.descents(ctx.seed)
        gaps, distances, bytes_per_parameter = [], [], 0.0
        for descent in descents:
            path, end, held = self.descend(method, descent, ctx, evaluations)
            bytes_per_parameter = held / len(end)
            gaps.append(path)
            distances.append(float((end - descent.minimizer).norm()))
        curves = np.stack(gaps)
        ends = curves[:, -1]
        if not np.isfinite(ends).any():
            raise DivergedError(
                f"all {len(descents)} starts left the real numbers within {self.steps} steps",
                "Lower the learning rate.",
            )
        reached = curves <= self.target
        first = np.where(reached.any(axis=1), reached.argmax(axis=1), np.inf)
        return Evaluation(
            scores={
                "log-gap": Scores(np.log10(np.maximum(ends, FLOOR))),
                "distance": Scores(np.nan_to_num(distances, nan=math.inf)),
                "steps-to-target": Scores(first),
            },
            series={"gap": curves[0]},
            facts={
                "steps": self.steps,
                "target": self.target,
                "condition": self.condition if self.function == "quadratic" else None,
                "diverged_starts": int((~np.isfinite(ends)).sum()),
                "optimizer_state_bytes_per_parameter": bytes_per_parameter,
                "dtype": "float64",
                **evaluations.facts(),
            },
        )

    def descents(self, seed: int) -> list[Descent]:
        """Return the functions with their starts, drawn by ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        if self.function == "quadratic":
            return [quadratic(self.dimension, self.condition, generator) for _ in range(self.starts)]
        plane = PLANES[self.function]
        low, high = (torch.tensor(corner, dtype=torch.float64) for corner in (plane.low, plane.high))
        others = [
            low + (high - low) * torch.rand(2, generator=generator, dtype=torch.float64)
            for _ in range(self.starts - 1)
        ]
        starts = [torch.tensor(plane.start, dtype=torch.float64), *others]
        end = torch.tensor(plane.minimizer, dtype=torch.float64)
        return [Descent(plane.value, start, end, self.clip) for start in starts]

    def descend(
        self, method: OptimizerMethod, descent: Descent, ctx: Context, evaluations: Evaluations
    ) -> tuple[np.ndarray, Tensor, int]:
        """Return the gap before and after each step [steps + 1], the last iterate and the bytes of the state."""
        x = nn.Parameter(descent.start.clone().to(ctx.device))
        optimizer = method.build([{"params": [x], "role": "vector"}], ctx)
        closure = Closure(
            [x], lambda _: Clipped.apply(x, descent.clip), lambda point, _: descent.value(point)
        )
        closure.evaluations = evaluations
        path = np.empty(self.steps + 1)
        with torch.no_grad():
            scale = float(descent.value(x)) if self.function == "quadratic" else 1.0
            path[0] = float(descent.value(x)) / scale
        for step in range(1, self.steps + 1):
            optimizer.step(closure)  # type: ignore[arg-type]  # torch says float, its optimizers take the tensor
            with torch.no_grad():
                path[step] = float(descent.value(x)) / scale
        return np.where(np.isfinite(path), path, np.inf), x.detach().cpu(), state_bytes(optimizer)


class Clipped(torch.autograd.Function):
    """The identity, whose gradient is shortened to a norm where it is longer."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, norm: float) -> Tensor:
        ctx.norm = norm  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = upstream
        share = ctx.norm / gradient.norm()  # type: ignore[attr-defined]
        return (gradient * share if share < 1 else gradient), None


def rosenbrock(x: Tensor) -> Tensor:
    """(1 - x)² + 100 (y - x²)²: a curved valley, 0 at (1, 1)."""
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def rastrigin(x: Tensor) -> Tensor:
    """20 + x² - 10 cos 2πx + y² - 10 cos 2πy: a bowl full of dents, 0 at the origin."""
    return 20 + (x**2 - 10 * torch.cos(2 * torch.pi * x)).sum()


@dataclass(frozen=True, slots=True)
class Plane:
    """A function of two variables, the start of the literature, its minimizer, and the box of further starts."""

    value: Callable[[Tensor], Tensor]
    start: tuple[float, float]
    minimizer: tuple[float, float]
    low: tuple[float, float]
    high: tuple[float, float]


PLANES = {
    "rosenbrock": Plane(rosenbrock, (-2.0, 2.0), (1.0, 1.0), low=(-2.0, -1.0), high=(2.0, 3.0)),
    "rastrigin": Plane(rastrigin, (-2.0, 3.5), (0.0, 0.0), low=(-3.6, -3.6), high=(3.6, 3.6)),
}


def quadratic(dimension: int, condition: float, generator: torch.Generator) -> Descent:
    """Return half the squared distance from a random point, in a random basis of curvatures from 1/condition to 1.

    Curvatures are even in the logarithm; the start is a normal deviate away from the minimizer in every direction.
    """
    curvatures = torch.logspace(-math.log10(condition), 0, dimension, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator, dtype=torch.float64))
    minimizer, away = torch.randn(2, dimension, generator=generator, dtype=torch.float64)

    def value(x: Tensor) -> Tensor:
        return 0.5 * (curvatures * ((x - minimizer) @ basis) ** 2).sum()

    return Descent(value, minimizer + away, minimizer)
