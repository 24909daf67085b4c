"""Multinomial logistic regression on features with heavy tails and unequal scales: convex, and badly conditioned.

A teacher with Gaussian weights labels every sample by a draw from its own softmax, so the best loss is not zero.
Features are Student t deviates with three degrees of freedom, scaled by a power of their rank.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from methodbench.errors import DivergedError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, OptimizerMethod, Scores
from methodbench_optim.workloads.loop import Problem, batches, schedule, train

if TYPE_CHECKING:
    from methodbench.context import Context
    from methodbench.torchkit.model import LoadedModel


@hyperparameters
class Logistic:
    """Fit one linear layer. Unit: a test sample.

    Scores: ``test-nll`` in nats and ``test-accuracy`` per sample; ``validation-loss``, at the end;
    ``steps-to-target``, the first evaluated step whose validation loss is at most ``target_share`` of the way from
    the teacher's own to that of guessing, infinite for a miss. Series: ``validation-loss``.
    """

    features: Annotated[int, Field(ge=2, le=10_000, description="inputs of the layer")] = 64
    classes: Annotated[int, Field(ge=2, le=1000, description="outputs of the layer")] = 10
    samples: Annotated[int, Field(ge=100, description="samples, of which 60 % are trained on")] = 5000
    power: Annotated[float, Field(ge=0, le=5, description="feature k has scale k to minus this")] = 1.0
    steps: Annotated[int, Field(ge=1, description="optimizer steps")] = 500
    batch_size: Annotated[int, Field(ge=1, description="samples of one step")] = 64
    warmup: Annotated[float, Field(ge=0, lt=1, description="share of the steps with a rising rate")] = 0.05
    evaluate_every: Annotated[int, Field(ge=1, description="steps between two looks")] = 10
    target_share: Annotated[
        float, Field(gt=0, lt=1, description="loss to reach, from the teacher's (0) to that of guessing (1)")
    ] = 0.3
    data_seed: Annotated[int, Field(ge=0, le=2**32 - 1, description="seed of teacher and samples")] = 0

    def evaluate(self, method: OptimizerMethod, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Train once, with the hyperparameters as configured.

        Raises:
            DivergedError: the validation loss ends up not finite.
        """
        data = self.draw(ctx)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ctx.seed)
            module = nn.Linear(self.features, self.classes).to(ctx.device, getattr(torch, ctx.dtype))
        order = batches(len(data.train[1]), self.batch_size, self.steps, ctx.seed)

        def batch(step: int) -> tuple[Tensor, Tensor]:
            x, y = data.train
            return x[order[step - 1]], y[order[step - 1]]

        @torch.no_grad()
        def look(module: nn.Module) -> tuple[float, float]:
            x, y = data.validation
            logits = module(x)
            return float(F.cross_entropy(logits, y)), float((logits.argmax(-1) == y).double().mean())

        problem = Problem(module, F.cross_entropy, batch, look, head=module.weight)
        with ctx.phase("train"):
            course = train(
                method,
                problem,
                ctx,
                steps=self.steps,
                evaluate_every=self.evaluate_every,
                share=functools.partial(schedule, steps=self.steps, warmup=self.warmup),
            )
        if math.isinf(course.final_loss):
            raise DivergedError(f"the loss is not finite after {course.steps} steps", "Lower lr.")
        x, y = data.test
        with torch.no_grad():
            logits = module(x).double()
        target = data.best_loss + self.target_share * (math.log(self.classes) - data.best_loss)
        reached = course.first(lambda seen: seen.loss <= target)
        return Evaluation(
            scores={
                "test-nll": Scores(F.cross_entropy(logits, y, reduction="none").cpu().numpy()),
                "test-accuracy": Scores((logits.argmax(-1) == y).cpu().numpy()),
                "validation-loss": Scores(np.array([course.final_loss])),
                "steps-to-target": Scores(np.array([reached.step if reached else math.inf])),
            },
            series={"validation-loss": np.array(course.losses)},
            facts={
                "teachers_validation_loss": data.best_loss,
                "target_loss": target,
                "seconds_to_target": reached.seconds if reached else None,
                **course.facts(),
            },
        )

    def draw(self, ctx: Context) -> Samples:
        """Draw teacher and samples by ``data_seed``: they are the same for every seed of the cell."""
        random = np.random.default_rng(self.data_seed)
        scales = np.arange(1, self.features + 1) ** -self.power
        x = random.standard_t(3, (self.samples, self.features)) * scales
        # Every feature moves the logits equally, however small it is: that is what makes the problem hard.
        logits = (
            (x / scales) @ random.standard_normal((self.features, self.classes)) / math.sqrt(self.features)
        )
        logits *= 3
        # The largest of logits plus Gumbel noise is a draw from their softmax.
        y = (logits + random.gumbel(size=logits.shape)).argmax(1)
        dtype = getattr(torch, ctx.dtype)
        inputs, labels = torch.from_numpy(x).to(ctx.device, dtype), torch.from_numpy(y).to(ctx.device)
        cuts = [self.samples * 3 // 5, self.samples * 4 // 5]
        train_part, validation, test = zip(inputs.tensor_split(cuts), labels.tensor_split(cuts), strict=True)
        held = slice(*cuts)
        best = F.cross_entropy(torch.from_numpy(logits[held]), torch.from_numpy(y[held]))
        return Samples(train_part, validation, test, float(best))


@dataclass(slots=True)
class Samples:
    """Features [N, features] and classes [N] of three parts, and the teacher's own loss on the second."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    best_loss: float
