from __future__ import annotations

import pytest
import torch
from torch import nn

from methodbench.context import Context
from methodbench.errors import ParameterError
from methodbench.params import build
from methodbench_optim.adafactor import Adafactor, AdafactorOptimizer, factored
from methodbench_optim.baselines import SGD, SGDM, AdaDelta, AdaGrad, Adam, AdamW, AMSGrad, RMSProp

GRADIENT = torch.tensor([3.0, -0.02, 1e-3], dtype=torch.float64)
START = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    "method", [Adam(lr=0.1), AdamW(lr=0.1, weight_decay=0.0), AMSGrad(lr=0.1), AdaGrad(lr=0.1)]
)
def test_the_first_step_has_length_lr_in_every_coordinate(follow, method):
    start, end = follow(method, START, [GRADIENT])
    torch.testing.assert_close(end, start - 0.1 * GRADIENT.sign(), rtol=1e-5, atol=0)


def test_adadeltas_first_step_is_as_small_as_the_root_of_eps(follow):
    start, end = follow(AdaDelta(rho=0.9, eps=1e-6), START, [torch.full_like(START, 3.0)])
    expected = 3.0 * (1e-6 / (0.1 * 9 + 1e-6)) ** 0.5
    torch.testing.assert_close(start - end, torch.full_like(start, expected))


def test_rmsprops_first_step_is_longer_than_lr_by_the_root_of_its_memory(follow):
    start, end = follow(RMSProp(lr=0.1, alpha=0.99), START, [GRADIENT])
    torch.testing.assert_close(end, start - 0.1 / 0.01**0.5 * GRADIENT.sign(), rtol=1e-3, atol=1e-3)


def test_adagrads_steps_fall_with_the_root_of_time_on_a_constant_slope(follow):
    steps = torch.stack(follow(AdaGrad(lr=0.1), START, [GRADIENT] * 9)).diff(dim=0).abs()
    expected = 0.1 / torch.arange(1, 10, dtype=torch.float64).sqrt().unsqueeze(1).expand(-1, 3)
    torch.testing.assert_close(steps, expected, rtol=1e-6, atol=0)


def test_sgd_moves_by_the_gradient_alone(follow):
    path = follow(SGD(lr=0.1), START, [GRADIENT, 2 * GRADIENT])
    torch.testing.assert_close(path[-1], START - 0.1 * 3 * GRADIENT)


def test_sgdm_on_a_constant_slope_follows_the_geometric_sum(follow):
    path = follow(SGDM(lr=0.1, momentum=0.5), START, [GRADIENT] * 3)
    torch.testing.assert_close(path[-1], START - 0.1 * GRADIENT * (1 + 1.5 + 1.75))


def test_sgdm_on_a_quadratic_follows_the_closed_form():
    """x'' of the recursion: the pair (x, b) is multiplied by one matrix in every step."""
    p, lr, momentum, curvature = nn.Parameter(torch.tensor([1.0], dtype=torch.float64)), 0.1, 0.8, 2.0
    optimizer = SGDM(lr=lr, momentum=momentum).build([{"params": [p], "role": "vector"}], Context())
    for _ in range(15):
        p.grad = curvature * p.detach()
        optimizer.step()
    matrix = torch.tensor([[1 - lr * curvature, -lr * momentum], [curvature, momentum]], dtype=torch.float64)
    x = torch.linalg.matrix_power(matrix, 15) @ torch.tensor([1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(p.detach(), x[:1])


def test_nesterov_looks_one_step_ahead(follow):
    path = follow(SGDM(lr=0.1, momentum=0.5, nesterov=True), START, [GRADIENT] * 2)
    torch.testing.assert_close(path[-1], START - 0.1 * GRADIENT * (1.5 + 1.75))


def test_without_gradient_decoupled_decay_is_a_plain_factor(follow):
    path = follow(AdamW(lr=0.1, weight_decay=0.5), START, [torch.zeros_like(START)] * 2)
    torch.testing.assert_close(path[-1], START * 0.95**2)


@pytest.mark.parametrize("method", [Adam, AMSGrad, AdaGrad])
def test_without_gradient_coupled_decay_is_a_full_first_step(follow, method):
    path = follow(method(lr=0.1, weight_decay=0.5), START, [torch.zeros_like(START)])
    torch.testing.assert_close(path[-1], START - 0.1 * START.sign())


@pytest.mark.parametrize(
    "method", [SGD(), SGDM(), AdaGrad(), RMSProp(), AdaDelta(), Adam(), AMSGrad(), Adafactor()]
)
def test_without_gradient_and_decay_nothing_moves(follow, method):
    assert torch.equal(follow(method, START, [torch.zeros_like(START)] * 3)[-1], START)


def test_amsgrad_never_lets_its_denominator_fall(follow):
    gradients = [10 * GRADIENT, *[0.1 * GRADIENT] * 30]
    plain = torch.stack(follow(Adam(lr=0.1, beta2=0.5), START, gradients)).diff(dim=0).abs()
    capped = torch.stack(follow(AMSGrad(lr=0.1, beta2=0.5), START, gradients)).diff(dim=0).abs()
    assert bool((capped[-1] < 0.1 * plain[-1]).all())


def test_adafactors_factors_are_exact_on_an_outer_product():
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.rand(n, generator=generator, dtype=torch.float64) for n in (5, 3))
    squares = torch.outer(rows, columns)
    torch.testing.assert_close(factored(squares.mean(-1), squares.mean(-2)), squares)


def test_adafactor_remembers_rows_and_columns_of_a_matrix():
    matrix, vector = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(5))
    for p in (matrix, vector):
        p.grad = torch.ones_like(p)
    optimizer = AdafactorOptimizer([matrix, vector])
    optimizer.step()
    assert {name: tuple(t.shape) for name, t in optimizer.state[matrix].items() if name != "step"} == {
        "row": (6,),
        "column": (4,),
    }
    assert tuple(optimizer.state[vector]["exp_avg_sq"].shape) == (5,)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_adafactors_steps_are_relative_to_the_parameter_not_to_the_gradient(follow, scale):
    start, end = follow(Adafactor(lr=0.1), START, [scale * torch.full_like(START, 2.0)])
    expected = 0.1 * START.square().mean().sqrt()
    torch.testing.assert_close((start - end), expected.expand(3), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "method",
    [
        *(SGD(), SGDM(), AdaGrad(), RMSProp(centered=True, momentum=0.5), AdaDelta()),
        *(Adam(), AMSGrad(), AdamW(), Adafactor(), Adafactor(form="torch", eps1=None)),
    ],
)
def test_it_resumes_from_a_state_dict(resumed_equals_uninterrupted, method):
    assert resumed_equals_uninterrupted(method)


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        (SGDM, {"nesterov": True, "momentum": 0.0}, "nesterov needs a momentum"),
        (Adafactor, {"eps1": None}, "eps1 must be a number"),
        (Adafactor, {"form": "torch", "eps1": None, "scale_parameter": False}, "no scale_parameter"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(rule, settings, message):
    with pytest.raises(ParameterError, match=message):
        build(rule, settings, "rule")
