"""The two experiments of the optimizer vectors: given gradients, and full-batch least squares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from methodbench.context import Context
from methodbench.testing.parity import Vectors

Paths = dict[str, np.ndarray]


def _start(vectors: Vectors) -> tuple[nn.Parameter, nn.Parameter]:
    dtype = getattr(torch, vectors.meta["dtype"])
    return nn.Parameter(vectors.tensor("p0_W", dtype)), nn.Parameter(vectors.tensor("p0_b", dtype))


@pytest.fixture
def follow_given_gradients(vectors: Vectors) -> Callable[[Any], Paths]:
    """Return a function that runs a method on the recorded gradients: parameters after each step."""

    def run(method: Any) -> Paths:
        weight, bias = _start(vectors)
        optimizer = method.build([{"params": [weight, bias], "role": "matrix"}], Context())
        path: dict[str, list[np.ndarray]] = {"W": [], "b": []}
        weights, biases = (vectors.tensor(f"grads_{name}", weight.dtype) for name in ("W", "b"))
        for weight.grad, bias.grad in zip(weights, biases, strict=True):
            optimizer.step()
            path["W"].append(weight.detach().numpy().copy())
            path["b"].append(bias.detach().numpy().copy())
        return {name: np.stack(points) for name, points in path.items()}

    return run


@pytest.fixture
def fit_least_squares(vectors: Vectors) -> Callable[[Any], Paths]:
    """Return a function that runs a method on the recorded least squares: parameters and losses."""

    def run(method: Any) -> Paths:
        weight, bias = _start(vectors)
        inputs, targets = (vectors.tensor(name, weight.dtype) for name in ("X", "Y"))
        optimizer = method.build([{"params": [weight, bias], "role": "matrix"}], Context())

        def loss() -> torch.Tensor:
            return 0.5 * (inputs @ weight.T + bias - targets).square().mean()

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        path: dict[str, list[Any]] = {"W": [], "b": [], "loss": []}
        for _ in range(len(vectors["closed_wd0_W"])):
            path["loss"].append(optimizer.step(closure).item())
            path["W"].append(weight.detach().numpy().copy())
            path["b"].append(bias.detach().numpy().copy())
        path["loss"].append(loss().item())
        return {name: np.stack(points) for name, points in path.items()}

    return run


@pytest.fixture
def assert_matches(vectors: Vectors) -> Callable[[Paths, str], None]:
    """Return a function that compares paths with the recorded arrays called ``<prefix>_<name>``."""

    def compare(paths: Paths, prefix: str) -> None:
        for name, path in paths.items():
            expected = vectors[f"{prefix}_{name}"]
            assert path.shape == expected.shape
            np.testing.assert_allclose(
                path, expected, rtol=0, atol=vectors.meta["tolerance"], err_msg=f"{prefix}_{name}"
            )

    return compare
