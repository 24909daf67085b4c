"""SGD noise in distinct regimes of deep learning (Sclocchi, Geiger & Wyart, ICML 2023, arXiv 2301.13703).

A predictor F(w, x) = f(w, x) - f(w0, x) of labels ±1 is trained on the hinge loss of scale α until it is exactly zero:

    loss = mean over the batch of  (1/α) max(0, 1 - α y F(w, x))

Large α is the lazy regime, small α that of feature learning. Batches of B distinct points are drawn anew for every
step; the noise of SGD acts like a temperature T = rate / (h B), with h the width of a mean-field network and 1 for
the perceptron. Noise matters above a critical temperature, through the stopping: weights grow longer before all
points fit. A temperature at which the training does not end is masked, not averaged.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.errors import DivergedError, NotApplicableError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, OptimizerMethod, Scores
from methodbench.torchkit.closures import Closure, Evaluations
from methodbench_optim.workloads.loop import param_groups

if TYPE_CHECKING:
    from methodbench.context import Context
    from methodbench.torchkit.model import LoadedModel


@hyperparameters
class NoiseRegimes:
    """Train to zero hinge loss at every temperature, in float64. Unit: a temperature.

    Scores: ``test-error``, the share of test points on the wrong side (NaN where the training did not end);
    ``converged-share``, 1 for a temperature whose training ended. Series, one point per temperature:
    ``weight-change``, ‖w - w0‖ / ‖w0‖; ``training-time``, steps times rate; ``steps``. NaN where it did not end.
    """

    network: Annotated[Literal["perceptron", "mlp"], Field(description="w·x/√d, or a mean-field network")] = (
        "perceptron"
    )
    temperatures: Annotated[
        tuple[float, ...], Field(min_length=1, description="rate over batch size and width")
    ] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    alpha: Annotated[float, Field(gt=0, description="scale of the output: lazy where it is large")] = 1.0
    batch_size: Annotated[int, Field(ge=1, description="distinct points of one step")] = 4
    points: Annotated[int, Field(ge=2, description="training points P")] = 64
    test_points: Annotated[int, Field(ge=1, description="test points")] = 2000
    dimension: Annotated[int, Field(ge=1, description="of the inputs")] = 32
    chi: Annotated[
        float,
        Field(gt=-1, description="density of the informative coordinate near 0: its absolute value to chi"),
    ] = 0.0
    width: Annotated[int, Field(ge=1, description="neurons of a hidden layer of the mlp")] = 64
    depth: Annotated[int, Field(ge=1, le=10, description="hidden layers of the mlp")] = 2
    max_steps: Annotated[int, Field(ge=1, description="steps after which a training has not ended")] = 8_000

    def evaluate(self, method: OptimizerMethod, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Train at every temperature from one initialization, on the same batches.

        Raises:
            NotApplicableError: the method has no learning rate, hence no temperature.
            DivergedError: no training ends.
        """
        if not hasattr(method, "lr"):
            raise NotApplicableError("the method has no learning rate, hence no temperature")
        random = np.random.default_rng(ctx.seed)
        x, y = depleted_sign(self.points, self.dimension, self.chi, random)
        test_x, test_y = depleted_sign(self.test_points, self.dimension, self.chi, random)
        errors, changes, times, steps = [], [], [], []
        evaluations = Evaluations()
        with ctx.phase("train"):
            for temperature in self.temperatures:
                rate = temperature * self.mean_field_rate * self.batch_size
                module = self.build(ctx.seed)
                start = torch.cat([p.detach().flatten() for p in module.parameters()])
                with torch.no_grad():
                    before = module(test_x)
                took = None
                tuned = dataclasses.replace(method, lr=rate)  # type: ignore[type-var]
                order = fresh_batches(self.points, self.batch_size, ctx.seed)
                for step, done in enumerate(
                    descend(tuned, module, x, y, self.alpha, order, ctx, evaluations)
                ):
                    if done:
                        took = step
                        break
                    if step >= self.max_steps:
                        break
                ended = took is not None
                end = torch.cat([p.detach().flatten() for p in module.parameters()])
                with torch.no_grad():
                    wrong = ((module(test_x) - before) * test_y <= 0).double().mean()
                errors.append(float(wrong) if ended else math.nan)
                changes.append(float((end - start).norm() / start.norm()) if ended else math.nan)
                steps.append(float(took) if took is not None else math.nan)
                times.append(steps[-1] * rate)
        ended_at = [not math.isnan(error) for error in errors]
        if not any(ended_at):
            raise DivergedError(
                f"no training ended within {self.max_steps} steps",
                "Raise max_steps, or lower the temperatures.",
            )
        return Evaluation(
            scores={"test-error": Scores(np.array(errors)), "converged-share": Scores(np.array(ended_at))},
            series={
                "weight-change": np.array(changes),
                "training-time": np.array(times),
                "steps": np.array(steps),
            },
            facts={
                "temperatures": list(self.temperatures),
                "critical_temperature": critical_temperature(self.temperatures, changes),
                "weight_change_exponent": exponent(self.temperatures, changes),
                "training_time_exponent": exponent(self.temperatures, times),
                "mean_training_time": float(np.nanmean(times)),
                "alpha": self.alpha,
                "points": self.points,
                "dtype": "float64",
                **evaluations.facts(),
            },
        )

    @property
    def mean_field_rate(self) -> int:
        """h: the gradient of a mean-field network is smaller by its width."""
        return self.width if self.network == "mlp" else 1

    def build(self, seed: int) -> nn.Module:
        """Return the network at w0, normal deviates drawn by ``seed``, float64."""
        generator = torch.Generator().manual_seed(seed)
        if self.network == "perceptron":
            return Perceptron(torch.randn(self.dimension, generator=generator, dtype=torch.float64))
        sizes = [self.dimension, *[self.width] * self.depth, 1]
        weights = [
            torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
            for inputs, outputs in itertools.pairwise(sizes)
        ]
        return MeanField(weights)


class Perceptron(nn.Module):
    """f(w, x) = w·x/√d for inputs [N, d]."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight / math.sqrt(x.shape[-1])


class MeanField(nn.Module):
    """Hidden layers √2 relu(W a/√fan-in), of unit second moment on normal inputs; output W a/fan-in."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(weight) for weight in weights)

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.weights
        for weight in hidden:
            x = math.sqrt(2) * torch.relu(x @ weight.T / math.sqrt(weight.shape[1]))
        return (x @ last.T / last.shape[1]).squeeze(-1)


def descend(
    method: OptimizerMethod,
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    alpha: float,
    order: Iterator[Tensor],
    ctx: Context,
    evaluations: Evaluations | None = None,
) -> Iterator[bool]:
    """Yield, before the first and after every step, whether the loss of all points is exactly zero.

    Args:
        module: the network at w0; it is trained in place.
        x: training points [P, d]; ``y`` their labels ±1 [P].
        order: indices of each step's batch.
    """
    with torch.no_grad():
        start = module(x).detach()
    optimizer = method.build(param_groups(module, None), ctx)
    params = list(module.parameters())

    def shifted(batch: Tensor) -> Tensor:
        shown: Tensor = module(x[batch]) - start[batch]
        return shown

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return hinge_loss(outputs, labels, alpha)

    everything = torch.arange(len(y))
    for batch in order:
        with torch.no_grad():
            yield bool((alpha * y * shifted(everything) >= 1).all())
        closure = Closure(params, shifted, loss, batch, y[batch], evaluations)
        optimizer.step(closure)  # type: ignore[arg-type]  # torch says float, its optimizers take the tensor
    with torch.no_grad():
        yield bool((alpha * y * shifted(everything) >= 1).all())


def hinge_loss(outputs: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """Return the mean of max(0, 1 - α y F) / α, a scalar: its gradient is zero once every margin is 1/α."""
    return torch.relu(1 - alpha * labels * outputs).mean() / alpha


def fresh_batches(points: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield ``size`` distinct indices for every step, drawn anew each time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(points, generator=generator)[:size]


def depleted_sign(
    count: int, dimension: int, chi: float, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Return normal inputs [count, dimension] and the sign of their first coordinate ±1 [count], float64.

    The density of that coordinate is its absolute value to ``chi`` times a Gaussian: few points near the boundary
    where ``chi`` is large.
    """
    x = random.standard_normal((count, dimension))
    size = np.sqrt(2 * random.gamma((chi + 1) / 2, size=count))
    sign = random.choice([-1.0, 1.0], size=count)
    x[:, 0] = sign * size
    return torch.from_numpy(x), torch.from_numpy(sign)


def critical_temperature(temperatures: Sequence[float], changes: Sequence[float]) -> float | None:
    """Return the first temperature whose weight change is twice that of the lowest; None where there is none."""
    order = np.argsort(temperatures)
    known = [(temperatures[i], changes[i]) for i in order if not math.isnan(changes[i])]
    return next((t for t, change in known if change >= 2 * known[0][1]), None)


def exponent(temperatures: Sequence[float], values: Sequence[float]) -> float | None:
    """Return the slope of log value over log temperature where noise acts: the upper half of the known ones."""
    known = sorted((t, v) for t, v in zip(temperatures, values, strict=True) if v > 0)
    upper = np.log(known[len(known) // 2 :])
    if len(upper) < 2:
        return None
    return float(np.polyfit(upper[:, 0], upper[:, 1], 1)[0])
