from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methodbench.context import Context
from methodbench_optim.lion import Lion
from methodbench_optim.lion_k import KAPPAS, LionK

seeds = st.integers(0, 2**31)
few = settings(max_examples=20, deadline=None)
SETTINGS = {"p": 1.5, "e": 0.3, "k": 3}
#: Members whose direction does not depend on the length of its argument.
HOMOGENEOUS = ("l1", "lp", "l2", "topk", "group_l2", "spectral")


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient_of(kappa: str, x: torch.Tensor) -> torch.Tensor:
    (found,) = KAPPAS[kappa]([x.clone()], SETTINGS)
    return found


CONVEX = {
    "l1": lambda x: x.abs().sum(),
    "lp": lambda x: x.norm(1.5),
    "l2": lambda x: x.norm(),
    "sq": lambda x: 0.5 * x.square().sum(),
    "relaxed_l1": lambda x: (x.abs() - 0.3).clamp_min(0).sum(),
    "topk": lambda x: x.abs().flatten().topk(3).values.sum(),
    "huber": lambda x: torch.where(x.abs() < 0.3, x.square() / 0.6, x.abs() - 0.15).sum(),
    "sinh": lambda x: (x.square() + 0.09).sqrt().sum(),
    "group_l2": lambda x: x.norm(dim=1).sum(),
    "spectral": lambda x: torch.linalg.svdvals(x).sum(),
}


@few
@given(seed=seeds)
@pytest.mark.parametrize("kappa", list(KAPPAS))
def test_direction_is_a_subgradient_of_its_convex_function(kappa, seed):
    x, y = draw(seed, 4, 3), draw(seed + 1, 4, 3)
    value = CONVEX[kappa]
    below = value(x) + (gradient_of(kappa, x) * (y - x)).sum()
    assert float(value(y)) >= float(below) - 1e-9


@few
@given(seed=seeds, scale=st.floats(0.01, 100))
@pytest.mark.parametrize("kappa", HOMOGENEOUS)
def test_directions_of_norms_do_not_depend_on_length(kappa, seed, scale):
    x = draw(seed, 4, 3)
    torch.testing.assert_close(gradient_of(kappa, scale * x), gradient_of(kappa, x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kappa", list(KAPPAS))
@pytest.mark.parametrize("shape", [(4, 3), (5,)])
def test_there_is_no_direction_at_zero(kappa, shape):
    zeros = torch.zeros(shape)
    assert torch.equal(gradient_of(kappa, zeros), zeros)


@few
@given(seed=seeds)
def test_l1_is_lion_bit_for_bit(follow, seed):
    gradients, start = draw(seed, 8, 7), draw(seed + 1, 7)
    ours = follow(LionK(lr=0.01, weight_decay=0.3), start, gradients)
    lions = follow(Lion(lr=0.01, weight_decay=0.3), start, gradients)
    assert all(torch.equal(a, b) for a, b in zip(ours, lions, strict=True))


def test_spectral_gives_an_orthogonal_matrix_and_a_kernel_its_shape():
    polar = gradient_of("spectral", draw(0, 3, 5))
    torch.testing.assert_close(polar @ polar.T, torch.eye(3, dtype=torch.float64))
    assert gradient_of("spectral", draw(1, 4, 2, 3, 3)).shape == (4, 2, 3, 3)


def test_ties_of_topk_go_to_the_lower_index():
    assert gradient_of("topk", torch.tensor([1.0, -1.0, 1.0, 1.0, 0.5])).tolist() == [
        1.0,
        -1.0,
        1.0,
        0.0,
        0.0,
    ]


def minimized(kappa, target, decay, lr=0.005, steps=3000, **more):
    """Where the iterates of ‖x - target‖² / 2 end."""
    p = torch.nn.Parameter(torch.full_like(target, 3.0))
    method = LionK(lr=lr, weight_decay=decay, kappa=kappa, **more)
    optimizer = method.build([{"params": [p], "role": "vector"}], Context())
    path = []
    for _ in range(steps):
        p.grad = p.detach() - target
        optimizer.step()
        path.append(p.detach().clone())
    return torch.stack(path)


def test_from_outside_the_box_the_excess_shrinks_in_every_step_and_ends_inside():
    decay, lr = 0.8, 0.005
    path = minimized("l1", torch.tensor([0.3, -0.4, 5.0], dtype=torch.float64), decay, lr=lr)
    excess = (path.abs().amax(1) - 1 / decay).clamp_min(0)
    assert bool((excess[1:] <= (1 - lr * decay) * excess[:-1] + 1e-12).all())
    # The optimum inside is found to the length of a step; the one outside ends at the bound.
    torch.testing.assert_close(
        path[-1], torch.tensor([0.3, -0.4, 1.25], dtype=torch.float64), rtol=0, atol=0.02
    )


def test_sq_ends_where_gradient_and_decay_cancel():
    target = torch.tensor([2.0, -1.0], dtype=torch.float64)
    end = minimized("sq", target, decay=1.0, lr=0.05)[-1]
    torch.testing.assert_close(end, target / 2)


def test_relaxed_l1_moves_fewer_coordinates_towards_a_sparse_solution_than_l1():
    target = torch.tensor([2.0, 0.1, -0.1, 0.05], dtype=torch.float64)
    sparse = minimized("relaxed_l1", target, decay=0.3, e=0.2)[-1]
    dense = minimized("l1", target, decay=0.3)[-1]
    torch.testing.assert_close(dense, target, rtol=0, atol=0.02)
    assert float(sparse[1:].abs().max()) < 0.5 * float(dense[1:].abs().max())


#: The norm that decay holds at most at its inverse, of every member whose K* is finite on a bounded set alone.
DUAL_NORMS = {
    **dict.fromkeys(("l1", "relaxed_l1", "topk", "huber", "sinh"), lambda x: x.abs().max()),
    "lp": lambda x: x.norm(3.0),  # 1 / 1.5 + 1 / 3 = 1
    "l2": lambda x: x.norm(),
    "group_l2": lambda x: x.norm(dim=1).max(),
    "spectral": lambda x: torch.linalg.svdvals(x)[0],
}


@few
@given(seed=seeds, decay=st.floats(0.5, 20.0))
@pytest.mark.parametrize("kappa", list(DUAL_NORMS))
def test_decay_bounds_the_dual_norm_of_the_weights_by_its_inverse(follow, kappa, seed, decay):
    norm = DUAL_NORMS[kappa]
    start = draw(seed, 4, 3)
    start = start / norm(start) / decay
    method = LionK(lr=0.04, weight_decay=decay, kappa=kappa, p=1.5, e=0.3, k=3)
    path = follow(method, start, draw(seed + 1, 20, 4, 3))
    assert max(float(norm(point)) for point in path) <= (1 + 1e-9) / decay


@pytest.mark.parametrize("kappa", list(DUAL_NORMS))
def test_an_optimum_within_the_bound_is_found_to_the_length_of_a_step(kappa):
    target = torch.tensor([[0.1, -0.2], [0.15, 0.05]], dtype=torch.float64)
    method = LionK(lr=0.002, weight_decay=1.0, kappa=kappa, e=1e-3, k=3)
    p = torch.nn.Parameter(torch.full_like(target, 0.4))
    optimizer = method.build([{"params": [p], "role": "matrix"}], Context())
    for _ in range(3000):
        p.grad = p.detach() - target
        optimizer.step()
    torch.testing.assert_close(p.detach(), target, rtol=0, atol=0.02)


def test_topk_leaves_more_coordinates_near_zero_than_l1_where_its_bound_is_tight():
    # The sum of sizes is held at k / decay = 1, which l1 does not bound.
    target = torch.tensor([2.0, 0.2, -0.2, 0.1], dtype=torch.float64)
    sparse = minimized("topk", target, decay=1.0, k=1)[-1]
    dense = minimized("l1", target, decay=1.0)[-1]
    assert float(sparse.abs().sum()) <= 1.05
    assert float(sparse[1:].abs().max()) < 0.05
    torch.testing.assert_close(dense[1:], target[1:], rtol=0, atol=0.02)


@few
@given(seed=seeds)
def test_with_the_square_and_one_beta_it_is_the_heavy_ball(follow, seed):
    gradients, start = draw(seed, 8, 7), draw(seed + 1, 7)
    ours = follow(LionK(lr=0.1, beta1=0.8, beta2=0.8, kappa="sq"), start, gradients)
    momentum, x = torch.zeros(7, dtype=torch.float64), start.clone()
    for gradient in gradients:
        momentum = 0.8 * momentum + 0.2 * gradient
        x = x - 0.1 * momentum
    torch.testing.assert_close(ours[-1], x)
