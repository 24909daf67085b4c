from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methodbench_optim.workloads.landscapes import LANDSCAPES, f1, f2, f3

KINKS = (-0.9, -0.5, -0.4, 0.0, 0.4, 0.5)
away_from_kinks = st.floats(-2, 2).filter(lambda x: min(abs(x - kink) for kink in KINKS) > 1e-6)


@pytest.mark.parametrize("name", list(LANDSCAPES))
@settings(max_examples=50, deadline=None)
@given(x=away_from_kinks)
def test_the_true_gradient_is_the_derivative(name, x):
    landscape = LANDSCAPES[name]
    point = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(landscape.value(point).sum(), point)
    torch.testing.assert_close(landscape.gradients["true"](point.detach()), derivative)


@pytest.mark.parametrize("name", list(LANDSCAPES))
def test_the_stated_minimum_is_the_lowest_point(name):
    landscape = LANDSCAPES[name]
    grid = torch.linspace(-3, 3, 600_001, dtype=torch.float64)
    values = landscape.value(grid)
    lowest = int(values.argmin())
    assert float(grid[lowest]) == pytest.approx(landscape.minimizer, abs=1e-5)
    at_minimizer = float(landscape.value(torch.tensor(landscape.minimizer, dtype=torch.float64)))
    assert at_minimizer == pytest.approx(landscape.minimum, abs=1e-15)
    assert float(values.min()) >= landscape.minimum - 1e-15


def test_values_are_those_of_the_formulas():
    x = torch.tensor([-1.0, -0.45, -0.2, 0.2, 0.45, 1.0], dtype=torch.float64)
    expected_f1 = [0.49, 0.0225, 0.01, 0.05, 0.1125, 0.69]
    expected_f3 = [1.0, 0.3, 0.175, 0.175, 0.3, 1.0]
    torch.testing.assert_close(f1(x), torch.tensor(expected_f1, dtype=torch.float64))
    torch.testing.assert_close(f3(x), torch.tensor(expected_f3, dtype=torch.float64))
    assert f2(x)[0].item() == pytest.approx(4.85)
    assert f2(torch.zeros(1)).item() == pytest.approx(0.85)


def test_the_notebook_gradient_lacks_the_factor_of_the_inner_derivative():
    x = torch.linspace(-0.89, 1, 50, dtype=torch.float64)
    gradients = LANDSCAPES["f2"].gradients
    torch.testing.assert_close(gradients["true"](x) - gradients["notebook"](x), 7 * x * torch.cos(8 * x))
