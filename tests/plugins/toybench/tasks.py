"""Implementations of the toy tasks."""

from __future__ import annotations

import os
import signal
from typing import Annotated

import numpy as np
from pydantic import Field

from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, Scores


@hyperparameters
class Value:
    """Scores a probe by what it returns, once per unit, with seeded noise."""

    units: Annotated[int, Field(ge=1, description="how many units")] = 4

    def evaluate(self, method, model, ctx):
        value = method.measure(model, None, ctx)["value"]
        noise = np.random.default_rng(ctx.seed).normal(scale=0.01, size=self.units)
        print("the task says hello")
        return Evaluation(
            scores={"value": Scores(value + noise), "square": Scores((value + noise) ** 2)},
            series={"curve": np.linspace(0, value, 5)},
            facts={"units": self.units},
        )


def _weights(model):
    return model.module[0][0].weight.detach().numpy()


@hyperparameters
class Norm:
    """The norm of the weights."""

    def calibration(self, model, ctx):
        import torch

        from methodbench.torchkit.model import Calibration

        return Calibration(torch.zeros(2, 3, dtype=torch.int64), source="two rows of zeros")

    def evaluate(self, model, ctx):
        return Evaluation(
            scores={"norm": Scores(np.array([np.linalg.norm(_weights(model))]))}, throughput=(5.0, "norms/s")
        )


@hyperparameters
class Mean(Norm):
    """The mean of each row of the weights."""

    def evaluate(self, model, ctx):
        return Evaluation(scores={"mean": Scores(_weights(model).mean(axis=1))})


@hyperparameters
class Crash(Norm):
    """Ends the worker."""

    def evaluate(self, model, ctx):
        print("about to die")
        os.kill(os.getpid(), signal.SIGKILL)
