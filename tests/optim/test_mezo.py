from __future__ import annotations

import pytest
import torch
from torch import nn

from methodbench.context import Context
from methodbench.torchkit.closures import Closure
from methodbench_optim.mezo import (
    MeZO,
    MeZOOptimizer,
    direction_like,
    generator_of,
    perturb_,
    quiet_directions,
    subspace_gradient,
)


def slope_along(gradient: torch.Tensor):
    """A linear loss with this gradient everywhere."""
    p = nn.Parameter(torch.zeros_like(gradient))
    return p, Closure([p], lambda _: p, lambda x, _: (x * gradient).sum())


def test_there_and_back_again_is_the_start_up_to_rounding():
    params = [torch.randn(4, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    start = [p.clone() for p in params]
    for length in (1e-3, -2e-3, 1e-3):
        perturb_(params, 7, length)
    for p, before in zip(params, start, strict=True):
        torch.testing.assert_close(p, before, rtol=0, atol=1e-15)


def test_the_mean_of_slopes_times_directions_is_the_gradient():
    gradient = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, closure = slope_along(gradient)
    total = torch.zeros_like(gradient)
    for seed in range(5000):
        before = p.detach().clone()
        MeZOOptimizer([p], lr=1.0).follow(closure, seed)
        total += before - p.detach()
    assert float(torch.nn.functional.cosine_similarity(total, gradient, dim=0)) > 0.95


def test_a_step_asks_for_two_values_and_no_gradient():
    p, closure = slope_along(torch.ones(4, dtype=torch.float64))
    MeZO(lr=0.1).build([{"params": [p], "role": "vector"}], Context()).step(closure)
    assert closure.evaluations.facts() == {
        "gradient_evaluations": 0,
        "function_evaluations": 2,
        "inner_steps": 0,
    }
    assert p.grad is None


def test_the_step_is_along_the_direction_of_its_seed():
    gradient = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    p, closure = slope_along(gradient)
    _, slope = MeZOOptimizer([p], lr=0.1).follow(closure, 11)
    z = direction_like(torch.zeros(3, dtype=torch.float64), generator_of(11, [p]))
    assert slope == pytest.approx(float(gradient @ z))
    torch.testing.assert_close(p.detach(), -0.1 * slope * z, rtol=1e-6, atol=1e-9)


def test_vectors_do_not_decay_and_matrices_do():
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    closure = Closure([matrix, vector], lambda _: matrix.sum() * 0, lambda x, _: x)
    MeZOOptimizer([matrix, vector], lr=0.1, weight_decay=0.5).step(closure)
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 0.95))
    torch.testing.assert_close(vector.detach(), torch.ones(2))


@pytest.mark.parametrize("settings", [{"lr": 0.01}, {"lr": 0.01, "estimator": "subspace", "history": 3}])
def test_it_goes_on_from_a_state_dict(settings):
    ends = []
    for interrupted in (False, True):
        p = nn.Parameter(torch.ones(6, dtype=torch.float64))
        closure = Closure([p], lambda _, p=p: p, lambda x, _: (x * torch.arange(6)).square().sum())
        groups = [{"params": [p], "role": "embedding"}]
        optimizer = MeZO(**settings).build(groups, Context(seed=4))
        for step in range(8):
            if interrupted and step == 4:
                state = optimizer.state_dict()
                optimizer = MeZO(**settings).build(groups, Context(seed=4))
                optimizer.load_state_dict(state)
            optimizer.step(closure)
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_other_seeds_are_other_paths():
    ends = []
    for seed in (0, 0, 1):
        p, closure = slope_along(torch.ones(4))
        MeZO(lr=0.1).build([{"params": [p], "role": "vector"}], Context(seed=seed)).step(closure)
        ends.append(p.detach())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_removed_directions_are_orthonormal_and_the_gradient_has_no_part_in_them():
    draw = torch.Generator().manual_seed(0)
    past = torch.randn(12, 8, generator=draw, dtype=torch.float64).cumsum(0)
    removed = quiet_directions(past, nu=0.05)
    assert 0 < len(removed) < 8
    torch.testing.assert_close(removed @ removed.T, torch.eye(len(removed), dtype=torch.float64))
    gradient = subspace_gradient([1.0, -0.5], torch.randn(2, 8, generator=draw, dtype=torch.float64), removed)
    torch.testing.assert_close(removed @ gradient, torch.zeros(len(removed), dtype=torch.float64))
    assert len(quiet_directions(past, nu=1e-12)) == 0


def test_the_subspace_estimate_averages_and_shrinks():
    directions = torch.eye(2, 5, dtype=torch.float64)
    found = subspace_gradient([2.0, 4.0], directions, directions.new_zeros(0, 5))
    expected = torch.tensor([2.0, 4.0, 0, 0, 0], dtype=torch.float64) / (2 * ((5 + 1) / 2) ** 0.5)
    torch.testing.assert_close(found, expected)


def test_rounded_weights_are_trained_through_rounding():
    """The loss is that of the rounded weights, which has no gradient to speak of; inputs that hang together make
    the nearest grid point of each weight a bad choice."""
    rounded, trained = [], []
    for seed in range(4):
        draw = torch.Generator().manual_seed(seed)
        inputs = torch.randn(64, 6, generator=draw) + 3 * torch.randn(64, 1, generator=draw)
        p = nn.Parameter(torch.randn(6, generator=draw))
        closure = Closure(
            [p],
            lambda x, p=p: x @ (torch.round(p * 2) / 2),
            nn.functional.mse_loss,
            inputs,
            inputs @ p.detach().clone(),
        )
        rounded.append(float(closure.value()))
        optimizer = MeZO(lr=1e-3, eps=0.3).build([{"params": [p], "role": "vector"}], Context())
        for _ in range(400):
            optimizer.step(closure)
        trained.append(float(closure.value()))
    assert sum(trained) < 0.7 * sum(rounded)


def test_a_plain_function_is_refused_with_what_to_pass():
    p, _ = slope_along(torch.ones(2))
    for settings in ({}, {"estimator": "subspace"}):
        optimizer = MeZO(**settings).build([{"params": [p], "role": "vector"}], Context())
        with pytest.raises(TypeError, match="MeZO evaluates the loss by itself"):
            optimizer.step(lambda: 0.0)
