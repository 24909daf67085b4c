"""Optimizers on the one-dimensional non-convex functions of diffGrad's empirical analysis (arXiv 1909.11015).

The paper starts every optimizer at x0 = -1 and looks at 300 iterates, of which the first is the start. One
start is an anecdote, so the same number of steps is taken from an even grid between x0 and its mirror image,
each start with an optimizer of its own: rules that use the norm of all gradients, or search along a line, see
one function at a time. The method runs with its hyperparameters as configured; nothing is tuned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from methodbench.errors import DivergedError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, OptimizerMethod, Scores
from methodbench.torchkit.closures import Closure, Evaluations
from methodbench_optim.workloads.landscapes import LANDSCAPES, Landscape, WithGradient

if TYPE_CHECKING:
    from methodbench.context import Context
    from methodbench.torchkit.model import LoadedModel


@hyperparameters
class NonConvex:
    """One function, a grid of starts, float64. Unit: a start; the first one is the paper's.

    Scores: ``final-gap``, the value at the last iterate above the global minimum; ``global-share``, 1 for a
    start that ends at the global minimizer; ``start-gap``, the gap of the paper's start alone. A start whose
    last iterate is not finite has an infinite gap. Series: ``trajectory``, the iterates from the paper's
    start.
    """

    function: Annotated[Literal["f1", "f2", "f3"], Field(description="which function")]
    gradient: Annotated[
        Literal["true", "notebook"],
        Field(description="the derivative, or what the authors' notebook uses (f2)"),
    ] = "true"
    start: Annotated[
        float, Field(allow_inf_nan=False, description="the paper's start x0, an end of the grid")
    ] = -1.0
    starts: Annotated[int, Field(ge=1, le=10_000, description="starts, evenly from x0 to -x0")] = 21
    iterates: Annotated[int, Field(ge=2, description="iterates, the start included")] = 300
    tolerance: Annotated[
        float, Field(gt=0, description="distance from the global minimizer that counts as there")
    ] = 0.05

    @model_validator(mode="after")
    def _gradient_exists(self) -> NonConvex:
        known = LANDSCAPES[self.function].gradients
        if self.gradient not in known:
            raise ValueError(
                f"function {self.function} has no {self.gradient} gradient, only {', '.join(known)}"
            )
        return self

    def evaluate(self, method: OptimizerMethod, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Run the optimizer from every start.

        Raises:
            DivergedError: no start ends at a finite point.
        """
        landscape = LANDSCAPES[self.function]
        evaluations = Evaluations()
        paths = torch.stack([self.descend(method, start, ctx, evaluations) for start in self.grid()])
        ends = paths[:, -1]
        finite = ends.isfinite()
        if not finite.any():
            raise DivergedError(
                f"all {self.starts} starts left the real numbers within {self.iterates} iterates",
                "Lower the learning rate.",
            )
        heights = landscape.value(ends) - landscape.minimum
        gap = torch.where(heights.isfinite(), heights.clamp_min(0.0), torch.inf).numpy()
        arrived = ((ends - landscape.minimizer).abs() <= self.tolerance).numpy()
        return Evaluation(
            scores={
                "final-gap": Scores(gap),
                "global-share": Scores(arrived),
                "start-gap": Scores(gap[:1]),
            },
            series={"trajectory": paths[0].numpy()},
            facts={
                "gradient": self.gradient,
                "start": self.start,
                "starts": self.starts,
                "iterates": self.iterates,
                "global_minimizer": landscape.minimizer,
                "global_minimum": landscape.minimum,
                "diverged_starts": int((~finite).sum()),
                "dtype": "float64",
                **evaluations.facts(),
            },
        )

    def grid(self) -> list[float]:
        """Return the starts, the paper's first."""
        return [float(x) for x in np.linspace(self.start, -self.start, self.starts)]

    def descend(
        self, method: OptimizerMethod, start: float, ctx: Context, evaluations: Evaluations
    ) -> Tensor:
        """Return the iterates of ``method`` from ``start``, itself included: float64 [iterates]."""
        landscape: Landscape = LANDSCAPES[self.function]
        gradient = landscape.gradients[self.gradient]
        x = nn.Parameter(torch.tensor([start], dtype=torch.float64, device=ctx.device))
        optimizer = method.build([{"params": [x], "role": "vector"}], ctx)
        closure = Closure(
            [x],
            lambda _: x,
            lambda point, _: WithGradient.apply(point, landscape.value, gradient).sum(),
            evaluations=evaluations,
        )
        path = torch.empty(self.iterates, dtype=torch.float64, device=ctx.device)
        path[0] = start
        for index in range(1, self.iterates):
            optimizer.step(closure)  # type: ignore[arg-type]  # torch says float, its optimizers take the tensor
            path[index] = x.detach()[0]
        return path.cpu()
