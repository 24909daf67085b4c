"""diffGrad against the trajectories of the authors' notebook; test_rules.py holds it against their code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from methodbench.context import Context
from methodbench.testing.parity import Vectors
from methodbench_optim.diffgrad import DiffGrad
from methodbench_optim.workloads.landscapes import LANDSCAPES
from methodbench_optim.workloads.nonconvex import NonConvex

pytestmark = pytest.mark.vectors("optim", "diffgrad")


def notebook_task(vectors: Vectors, function: str) -> NonConvex:
    given = vectors.meta["hyperparameters"]["synthetic"]
    gradient = "notebook" if "notebook" in LANDSCAPES[function].gradients else "true"
    return NonConvex(
        function=function, gradient=gradient, start=given["x0"], starts=1, iterates=given["nb_iters"]
    )


@pytest.mark.parametrize("function", list(LANDSCAPES))
def test_eps_after_correction_follows_the_notebook_trajectory(vectors: Vectors, function: str) -> None:
    given = vectors.meta["hyperparameters"]["synthetic"]
    method = DiffGrad(
        lr=given["lr"],
        beta1=given["beta1"],
        beta2=given["beta2"],
        eps=given["eps"],
        eps_position="after-correction",
    )
    path = notebook_task(vectors, function).evaluate(method, None, Context()).series["trajectory"]
    expected = vectors[f"synthetic_{function.upper()}_diffgrad_x"]
    np.testing.assert_allclose(path, expected, rtol=0, atol=vectors.meta["tolerance"])


@pytest.mark.parametrize("function", list(LANDSCAPES))
def test_landscapes_give_the_notebook_trajectory_of_adam(vectors: Vectors, function: str) -> None:
    """The notebook's Adam takes the root of v̂ + ε, which no optimizer here does: its rule is written out."""
    given = vectors.meta["hyperparameters"]["synthetic"]
    beta1, beta2 = given["beta1"], given["beta2"]
    task = notebook_task(vectors, function)
    gradient = LANDSCAPES[function].gradients[task.gradient]
    x, first, second, path = given["x0"], 0.0, 0.0, [given["x0"]]
    for step in range(1, given["nb_iters"]):
        slope = float(gradient(torch.tensor(x, dtype=torch.float64)))
        first = beta1 * first + (1 - beta1) * slope
        second = beta2 * second + (1 - beta2) * slope**2
        corrected = second / (1 - beta2**step)
        x -= given["lr"] * first / (1 - beta1**step) / (corrected + given["eps"]) ** 0.5
        path.append(x)
    expected = vectors[f"synthetic_{function.upper()}_adam_x"]
    np.testing.assert_allclose(path, expected, rtol=0, atol=vectors.meta["tolerance"])
