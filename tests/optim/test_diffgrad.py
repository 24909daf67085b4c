from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from methodbench.context import Context
from methodbench.errors import ParameterError
from methodbench.params import build
from methodbench_optim.baselines import Adam
from methodbench_optim.diffgrad import DiffGrad, DiffGradOptimizer, friction

seeds = st.integers(0, 2**31)
few = settings(max_examples=25, deadline=None)
same_eps = {"eps_position": "after-correction"}


def gradients(seed: int, steps: int = 8, size: int = 7) -> torch.Tensor:
    return torch.randn(steps, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@few
@given(seed=seeds, scale=st.floats(0.0, 10.0))
def test_friction_lies_between_a_half_and_one(seed, scale):
    before, after = gradients(seed, steps=2) * scale
    (xi,) = friction([before], [after])
    assert bool(((xi >= 0.5) & (xi <= 1)).all())
    # 1 - sigmoid(36) is the last such difference from one that float64 can hold.
    assert bool((xi < 1)[(after - before).abs() < 36].all())


def test_friction_is_a_half_without_change_and_grows_with_change():
    (xi,) = friction([torch.zeros(4)], [torch.tensor([0.0, 1.0, -2.0, 40.0])])
    expected = torch.tensor([0.5, 0.7310586, 0.8807970, 1.0])
    torch.testing.assert_close(xi, expected)


@few
@given(seed=seeds)
def test_a_constant_gradient_halves_adams_steps_from_the_second_on(follow, seed):
    start, slope = torch.zeros(7, dtype=torch.float64), gradients(seed, steps=1)
    repeated = slope.expand(6, -1)
    ours = torch.stack(follow(DiffGrad(lr=0.1, **same_eps), start, repeated)).diff(dim=0)
    adams = torch.stack(follow(Adam(lr=0.1), start, repeated)).diff(dim=0)
    torch.testing.assert_close(ours[1:], 0.5 * adams[1:], rtol=1e-10, atol=0)
    assert bool((ours[0].abs() > 0.5 * adams[0].abs()).all())


@few
@given(seed=seeds)
def test_huge_changes_of_the_gradient_give_adams_steps(follow, seed):
    start = torch.zeros(7, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0] * 3, dtype=torch.float64).unsqueeze(1)
    swinging = 1e4 * signs * (1 + gradients(seed, steps=6).abs())
    ours, adams = follow(DiffGrad(lr=0.1, **same_eps), start, swinging), follow(Adam(lr=0.1), start, swinging)
    torch.testing.assert_close(ours[-1], adams[-1], rtol=1e-12, atol=1e-12)


def test_eps_before_correction_weighs_more_in_the_first_steps(follow):
    start, tiny = torch.zeros(1, dtype=torch.float64), [torch.full((1,), 1e-8, dtype=torch.float64)] * 2
    early = follow(DiffGrad(lr=1.0), start, tiny)[-1]
    late = follow(DiffGrad(lr=1.0, **same_eps), start, tiny)[-1]
    assert early.abs().item() < 0.2 * late.abs().item()


def accumulated_steps(method: DiffGrad, in_place: bool, decay: float = 0.0) -> torch.Tensor:
    """Parameters after each step on the same random gradients, cleared in place or replaced."""
    p = nn.Parameter(torch.ones(7, dtype=torch.float64))
    optimizer = method.build([{"params": [p], "role": "vector"}], None)  # type: ignore[arg-type]
    path = []
    for gradient in gradients(1):
        optimizer.zero_grad(set_to_none=not in_place)
        (p * gradient).sum().backward()
        optimizer.step()
        path.append(p.detach().clone())
    return torch.stack(path)


def test_version_1_with_gradients_cleared_in_place_is_adam_at_half_rate():
    aliased = accumulated_steps(DiffGrad(lr=0.1, previous_grad_alias=True, **same_eps), in_place=True)
    adams = accumulated_steps(Adam(lr=0.1), in_place=True)  # type: ignore[arg-type]
    torch.testing.assert_close(aliased.diff(dim=0), 0.5 * adams.diff(dim=0), rtol=1e-9, atol=0)


def test_version_1_with_fresh_gradients_is_version_2():
    one = accumulated_steps(DiffGrad(lr=0.1, previous_grad_alias=True), in_place=False)
    two = accumulated_steps(DiffGrad(lr=0.1), in_place=False)
    assert torch.equal(one, two)


def test_version_2_does_not_depend_on_how_gradients_are_cleared():
    method = DiffGrad(lr=0.1, weight_decay=0.2)
    assert torch.equal(accumulated_steps(method, in_place=True), accumulated_steps(method, in_place=False))


def test_the_l2_term_enters_the_previous_gradient_but_not_the_gradient():
    p = nn.Parameter(torch.full((3,), 2.0))
    optimizer = DiffGradOptimizer([p], weight_decay=0.5)
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["previous_grad"], torch.full((3,), 2.0))
    assert torch.equal(p.grad, torch.ones(3))


def test_the_stored_momentum_is_free_of_friction():
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = DiffGradOptimizer([p], betas=(0.5, 0.9))
    for _ in range(2):
        p.grad = torch.tensor([1.0, -4.0], dtype=torch.float64)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.75 * p.grad)


def test_each_parameter_counts_its_own_steps():
    early, late = (
        nn.Parameter(torch.zeros(1, dtype=torch.float64)),
        nn.Parameter(torch.zeros(1, dtype=torch.float64)),
    )
    optimizer = DiffGradOptimizer([early, late], lr=0.1)
    early.grad = torch.ones_like(early)
    optimizer.step()
    first = early.item()
    early.grad, late.grad = torch.ones_like(early), torch.ones_like(late)
    optimizer.step()
    assert late.item() == first
    assert (optimizer.state[early]["step"], optimizer.state[late]["step"]) == (2, 1)


def test_it_resumes_from_a_state_dict(resumed_equals_uninterrupted):
    assert resumed_equals_uninterrupted(DiffGrad(lr=0.01, weight_decay=0.1))


def test_a_complex_gradient_is_refused_by_name():
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"diffGrad .* complex"):
        DiffGradOptimizer([p]).step()


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", -1.0), ("beta1", 1.0), ("beta2", 1.0), ("eps", 0.0), ("eps_position", "inside")],
)
def test_values_out_of_range_are_refused_by_field(field, value):
    with pytest.raises(ParameterError, match=field):
        build(DiffGrad, {field: value}, "diffgrad")


@few
@given(seed=seeds)
def test_where_the_gradient_before_is_forced_to_be_the_gradient_every_step_is_half_of_adams(seed):
    ours, adams = (nn.Parameter(torch.zeros(7, dtype=torch.float64)) for _ in range(2))
    half = DiffGrad(lr=0.1, **same_eps).build([{"params": [ours], "role": "vector"}], Context())
    full = Adam(lr=0.1).build([{"params": [adams], "role": "vector"}], Context())
    for gradient in gradients(seed):
        before = ours.detach().clone(), adams.detach().clone()
        half.state[ours]["previous_grad"] = gradient.clone()
        ours.grad, adams.grad = gradient.clone(), gradient.clone()
        half.step()
        full.step()
        torch.testing.assert_close(
            ours.detach() - before[0], 0.5 * (adams.detach() - before[1]), rtol=1e-9, atol=1e-12
        )
