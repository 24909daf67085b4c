"""SGD on the scaled hinge loss of a perceptron against a reference implementation in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from methodbench.context import Context
from methodbench.testing.parity import Vectors
from methodbench_optim.baselines import SGD
from methodbench_optim.workloads.noise import Perceptron, descend, hinge_loss

pytestmark = pytest.mark.vectors("optim", "sgd_noise_regimes")


def test_weights_and_losses_follow_the_recorded_batches(vectors: Vectors) -> None:
    given = vectors.meta["hyperparameters"]
    x, y, start = vectors.tensor("X"), vectors.tensor("y"), vectors.tensor("w0")
    rate = given["T"] * given["h"] * given["B"]
    assert rate == pytest.approx(given["dt"])
    order = iter(vectors.tensor("batch_idx"))
    assert vectors["batch_idx"].shape[1] == given["B"]
    module = Perceptron(start)
    before = module(x).detach()
    steps = descend(SGD(lr=rate), module, x, y, given["alpha"], order, Context())
    next(steps)
    weights, losses = [], []
    for _ in steps:
        weights.append(module.weight.detach().clone().numpy())
        with torch.no_grad():
            losses.append(hinge_loss(module(x) - before, y, given["alpha"]).item())
    tolerance = vectors.meta["tolerance"]
    np.testing.assert_allclose(weights, vectors["w_traj"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(losses, vectors["train_loss"], rtol=0, atol=tolerance)
