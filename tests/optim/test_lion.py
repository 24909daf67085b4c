from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from methodbench.context import Context
from methodbench.errors import ParameterError
from methodbench.params import build
from methodbench_optim.lion import Lion, LionOptimizer

seeds = st.integers(0, 2**31)
few = settings(max_examples=25, deadline=None)


def gradients(seed: int, steps: int = 8, size: int = 7) -> torch.Tensor:
    return torch.randn(steps, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@few
@given(seed=seeds, lr=st.sampled_from([2.0**-k for k in range(1, 12)]))
def test_every_coordinate_moves_by_exactly_lr(follow, seed, lr):
    # With a start and a rate that are sums of few powers of two, the steps are exact in float64.
    path = torch.stack(follow(Lion(lr=lr), torch.ones(7, dtype=torch.float64), gradients(seed)))
    assert torch.equal(path.diff(dim=0).abs(), torch.full((8, 7), lr, dtype=torch.float64))


@few
@given(seed=seeds, power=st.integers(-40, 40), decay=st.sampled_from([0.0, 0.1]))
def test_gradients_times_a_power_of_two_leave_the_path_unchanged(follow, seed, power, decay):
    method, start, given_gradients = (
        Lion(lr=0.013, weight_decay=decay),
        torch.ones(7),
        gradients(seed).float(),
    )
    plain = follow(method, start, given_gradients)
    scaled = follow(method, start, given_gradients * 2.0**power)
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))


@few
@given(seed=seeds)
def test_without_momentum_it_is_sign_descent(follow, seed):
    start, given_gradients = torch.ones(7, dtype=torch.float64), gradients(seed)
    path = follow(Lion(lr=0.25, beta1=0.0, beta2=0.0), start, given_gradients)
    assert torch.equal(path[-1], start - 0.25 * given_gradients.sign().sum(0))


@few
@given(seed=seeds, decay=st.floats(0.5, 20.0))
def test_decay_keeps_the_weights_within_its_inverse(follow, seed, decay):
    start = torch.linspace(-1 / decay, 1 / decay, 7, dtype=torch.float64)
    path = torch.stack(follow(Lion(lr=0.04, weight_decay=decay), start, gradients(seed, steps=30)))
    assert float(path.abs().max()) <= (1 + 1e-12) / decay


def test_a_coordinate_without_gradient_stays(follow):
    path = follow(Lion(lr=0.1), torch.ones(3), [torch.tensor([1.0, 0.0, -1.0])])
    assert torch.equal(path[-1], torch.tensor([0.9, 1.0, 1.1]))


def test_the_step_uses_beta1_and_the_memory_beta2():
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = LionOptimizer([p], lr=1.0, betas=(0.5, 0.75))
    for gradient in (1.0, -0.2):
        p.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    # Momentum after step 1 is 0.25; the mix of step 2, 0.5 * 0.25 - 0.5 * 0.2, is positive, its gradient not.
    assert p.item() == -2.0
    assert optimizer.state[p]["momentum"].item() == pytest.approx(0.75 * 0.25 - 0.25 * 0.2)


def test_state_is_one_tensor_like_the_parameter():
    p = nn.Parameter(torch.zeros(3, 4, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer = LionOptimizer([p])
    optimizer.step()
    (state,) = optimizer.state[p].values()
    assert (state.shape, state.dtype) == (p.shape, p.dtype)


def test_parameters_without_gradient_are_left_alone():
    moved, still = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    moved.grad = torch.ones(2)
    optimizer = LionOptimizer([moved, still], lr=0.5, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(still, torch.ones(2))
    assert not torch.equal(moved, torch.ones(2))


def test_gradients_are_left_as_they_are():
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.arange(4.0)
    LionOptimizer([p], weight_decay=0.3).step()
    assert torch.equal(p.grad, torch.arange(4.0))


def test_many_parameters_step_like_one_by_one(monkeypatch):
    starts = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (1, 50, 3, 200, 7, 7)]

    def result(chunk: int) -> list[nn.Parameter]:
        monkeypatch.setattr("methodbench_optim.rule.CPU_CHUNK", chunk)
        params = [nn.Parameter(start.clone()) for start in starts]
        optimizer = LionOptimizer(params, lr=0.1, weight_decay=0.1)
        for sign in (1, -1, 1):
            for p, start in zip(params, starts, strict=True):
                p.grad = sign * start.flip(0)
            optimizer.step()
        return params

    whole, chunked = result(1 << 30), result(100)
    assert all(torch.equal(a, b) for a, b in zip(whole, chunked, strict=True))


def test_a_schedule_scales_step_and_decay():
    p = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = LionOptimizer([p], lr=1.0, weight_decay=0.5)
    optimizer.param_groups[0]["lr"] = 0.25
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.item() == 2.0 * (1 - 0.25 * 0.5) - 0.25


def test_it_resumes_from_a_state_dict(resumed_equals_uninterrupted):
    assert resumed_equals_uninterrupted(Lion(lr=0.01, weight_decay=0.1))


def test_a_sparse_gradient_is_refused_by_name():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([0.0, 1.0, 0.0]).to_sparse()
    with pytest.raises(RuntimeError, match=r"Lion .*\(3,\) is sparse"):
        LionOptimizer([p]).step()


@pytest.mark.parametrize(
    ("field", "value"), [("lr", 0.0), ("beta1", 1.0), ("beta2", -0.1), ("weight_decay", -1.0)]
)
def test_values_out_of_range_are_refused_by_field(field, value):
    with pytest.raises(ParameterError, match=field):
        build(Lion, {field: value}, "lion")


def test_the_closure_runs_with_gradients_and_its_loss_comes_back():
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = Lion(lr=1.0).build([{"params": [p], "role": "vector"}], Context())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert p.item() == 2.0
