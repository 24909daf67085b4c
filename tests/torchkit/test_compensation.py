"""What second-order methods share: the factor of the inverse, made in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from methodbench.errors import DivergedError
from methodbench.torchkit import compensation
from methodbench.torchkit.compensation import inverse_factor


def hessian_of(seed: int, width: int) -> Tensor:
    x = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / len(x)


@pytest.mark.parametrize("width", [1, 2, 7, 64, 129])
def test_the_factor_solves_its_equation_and_leaves_the_hessian_alone(width: int) -> None:
    hessian = hessian_of(width, width)
    before = hessian.clone()
    upper, damping = inverse_factor(hessian, 0.01)
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(width)
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(width, dtype=torch.float64))
    assert torch.equal(upper, upper.triu())
    assert torch.equal(hessian, before)


def test_dead_inputs_count_as_one() -> None:
    hessian = hessian_of(3, 16)
    dead = torch.zeros(16, dtype=torch.bool)
    dead[[0, 5, 15]] = True
    hessian[dead] = hessian[:, dead] = 0
    filled = hessian + torch.diag(dead.double())
    expected, damping = inverse_factor(filled, 0.01)
    upper, also = inverse_factor(hessian, 0.01, dead=dead)
    assert also == damping
    assert torch.equal(upper, expected)


@pytest.mark.parametrize("count", [0, 1, 2, 9, 10, 4096])
@pytest.mark.parametrize("step", [1, 3, 5, 8192])
def test_reversing_in_place_is_flipping(count: int, step: int) -> None:
    values = torch.arange(count)
    compensation._reverse(values, step)
    assert torch.equal(values, torch.arange(count).flip(0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_hessian_that_is_not_finite_names_the_layer(bad: float) -> None:
    hessian = hessian_of(4, 8)
    hessian[2, 3] = bad
    with pytest.raises(DivergedError, match="the query"):
        inverse_factor(hessian, 0.01, "the query")
