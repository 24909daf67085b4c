from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methodbench.context import Context
from methodbench.errors import ParameterError
from methodbench.params import build
from methodbench.torchkit.closures import Closure
from methodbench_optim.sso import SSO, scheduled_eta


def problem(seed: int = 0, outputs: int = 3):
    """A linear model with cross entropy on 20 random samples."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(20, 5, generator=draw, dtype=torch.float64)
    targets = torch.randint(outputs, (20,), generator=draw)
    weight = nn.Parameter(torch.zeros(outputs, 5, dtype=torch.float64))
    return weight, Closure([weight], lambda x: x @ weight.T, F.cross_entropy, inputs, targets)


def optimizer_of(weight, **settings):
    return SSO(**settings).build([{"params": [weight], "role": "head"}], Context())


def test_the_first_inner_step_goes_along_the_gradient():
    weight, closure = problem()
    closure()
    gradient = weight.grad.clone()
    optimizer_of(weight, inner_steps=1, eta=10.0).step(closure)
    cosine = F.cosine_similarity(weight.detach().flatten(), -gradient.flatten(), dim=0)
    assert float(cosine) == pytest.approx(1.0, abs=1e-9)


def test_many_inner_steps_reach_the_surrogates_minimum_among_the_models_outputs():
    weight, closure = problem()
    _, outputs, gradient = closure.at_outputs()
    wanted = outputs - gradient / (2 * 0.05)
    optimizer_of(weight, inner_steps=2000, eta=0.05).step(closure)
    best = torch.linalg.lstsq(closure.inputs, wanted).solution.T
    torch.testing.assert_close(weight.detach(), best, rtol=0, atol=1e-5)


def test_the_surrogate_falls_with_every_inner_step():
    values = []
    for steps in range(1, 8):
        weight, closure = problem()
        _, outputs, gradient = closure.at_outputs()
        optimizer_of(weight, inner_steps=steps, eta=0.5).step(closure)
        moved = closure.inputs @ weight.detach().T
        values.append(float((gradient * moved / 0.5 + (moved - outputs).square()).mean()))
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] < 0


def test_at_equal_outer_gradients_ten_inner_steps_beat_one():
    ends = {}
    for steps in (1, 10):
        weight, closure = problem()
        optimizer = optimizer_of(weight, inner_steps=steps, eta=0.3)
        for _ in range(15):
            optimizer.step(closure)
        ends[steps] = float(closure.value())
        assert closure.evaluations.gradients == 15
        assert closure.evaluations.inner_steps == 15 * steps
        assert closure.evaluations.functions > 15 * steps
    assert ends[10] < ends[1]


def test_a_step_well_below_the_inverse_curvature_never_raises_the_full_batch_loss():
    weight, closure = problem()
    optimizer = optimizer_of(weight, eta=1.0, inner_steps=5)
    losses = [float(optimizer.step(closure)) for _ in range(20)]
    assert losses == sorted(losses, reverse=True)


def test_the_search_at_the_outputs_finds_a_step_that_decreases_the_loss():
    weight, closure = problem()
    optimizer = optimizer_of(weight, target_search=True, eta=1e-3, inner_steps=20)
    before = float(optimizer.step(closure))
    assert float(closure.value()) < before
    assert optimizer.param_groups[0]["eta"] != 1e-3


def test_schedules_are_those_of_the_paper():
    assert scheduled_eta(2.0, 9, SSO(eta_schedule="stochastic")) == 6.0
    assert scheduled_eta(2.0, 50, SSO(eta_schedule="exponential", total_steps=100)) == pytest.approx(20.0)
    assert scheduled_eta(2.0, 9, SSO()) == 2.0
    with pytest.raises(ParameterError, match="eta_schedule must be constant"):
        build(SSO, {"target_search": True, "eta_schedule": "stochastic"}, "sso")


def test_it_goes_on_from_a_state_dict():
    ends = []
    for interrupted in (False, True):
        weight, closure = problem()
        optimizer = optimizer_of(weight, target_search=True, eta=10.0)
        for step in range(6):
            if interrupted and step == 3:
                state = optimizer.state_dict()
                optimizer = optimizer_of(weight, target_search=True, eta=10.0)
                optimizer.load_state_dict(state)
            optimizer.step(closure)
        ends.append(weight.detach())
    assert torch.equal(*ends)


def test_a_closure_without_parts_is_refused_with_what_to_pass():
    weight, closure = problem()
    with pytest.raises(TypeError, match=r"SSO evaluates the loss by itself.*not with function"):
        optimizer_of(weight).step(lambda: closure())
