from __future__ import annotations

import pytest
import torch

from methodbench.errors import ParameterError
from methodbench.params import build
from methodbench_optim.baselines import SGD, Adam, AdamW

GRADIENT = torch.tensor([3.0, -0.02, 1e-3], dtype=torch.float64)
START = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    "method", [Adam(lr=0.1), AdamW(lr=0.1, weight_decay=0.0), Adam(lr=0.1, amsgrad=True)]
)
def test_the_first_step_has_length_lr_in_every_coordinate(follow, method):
    start, end = follow(method, START, [GRADIENT])
    torch.testing.assert_close(end, start - 0.1 * GRADIENT.sign(), rtol=1e-5, atol=0)


def test_sgd_on_a_constant_slope_follows_the_geometric_sum(follow):
    path = follow(SGD(lr=0.1, momentum=0.5), START, [GRADIENT] * 3)
    torch.testing.assert_close(path[-1], START - 0.1 * GRADIENT * (1 + 1.5 + 1.75))


def test_nesterov_looks_one_step_ahead(follow):
    path = follow(SGD(lr=0.1, momentum=0.5, nesterov=True), START, [GRADIENT] * 2)
    torch.testing.assert_close(path[-1], START - 0.1 * GRADIENT * (1.5 + 1.75))


def test_without_gradient_decoupled_decay_is_a_plain_factor(follow):
    path = follow(AdamW(lr=0.1, weight_decay=0.5), START, [torch.zeros_like(START)] * 2)
    torch.testing.assert_close(path[-1], START * 0.95**2)


def test_without_gradient_coupled_decay_is_a_full_step_of_adam(follow):
    path = follow(Adam(lr=0.1, weight_decay=0.5), START, [torch.zeros_like(START)])
    torch.testing.assert_close(path[-1], START - 0.1 * START.sign())


def test_amsgrad_never_lets_its_denominator_fall(follow):
    gradients = [10 * GRADIENT, *[0.1 * GRADIENT] * 30]
    plain = torch.stack(follow(Adam(lr=0.1, beta2=0.5), START, gradients)).diff(dim=0).abs()
    capped = torch.stack(follow(Adam(lr=0.1, beta2=0.5, amsgrad=True), START, gradients)).diff(dim=0).abs()
    assert bool((capped[-1] < 0.1 * plain[-1]).all())


@pytest.mark.parametrize("method", [SGD(), Adam(amsgrad=True), AdamW()])
def test_it_resumes_from_a_state_dict(resumed_equals_uninterrupted, method):
    assert resumed_equals_uninterrupted(method)


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ParameterError, match="nesterov needs a momentum"):
        build(SGD, {"nesterov": True, "momentum": 0.0}, "sgd")
