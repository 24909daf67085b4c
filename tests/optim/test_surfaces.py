from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from methodbench.context import Context
from methodbench.errors import DivergedError
from methodbench.torchkit.closures import Evaluations
from methodbench_optim.baselines import SGD, SGDM, Adam
from methodbench_optim.sso import SSO
from methodbench_optim.workloads.surfaces import PLANES, Surface, quadratic


@pytest.mark.parametrize(("name", "at_start"), [("rosenbrock", 409.0), ("rastrigin", 36.25)])
def test_functions_of_the_plane_have_their_known_values(name, at_start):
    plane = PLANES[name]
    lowest, first = (torch.tensor(x, dtype=torch.float64) for x in (plane.minimizer, plane.start))
    assert float(plane.value(lowest)) == pytest.approx(0, abs=1e-12)
    assert float(plane.value(first)) == pytest.approx(at_start)


@pytest.mark.parametrize("condition", [1.0, 50.0, 1e4])
def test_a_quadratic_has_the_condition_number_that_it_states(condition):
    given = quadratic(8, condition, torch.Generator().manual_seed(3))
    hessian = torch.autograd.functional.hessian(given.value, given.start)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert float(eigenvalues[-1] / eigenvalues[0]) == pytest.approx(condition, rel=1e-8)
    assert float(given.value(given.minimizer)) == 0


def test_gradient_descent_on_a_quadratic_meets_its_rate_of_convergence():
    condition = 10.0
    task = Surface(function="quadratic", condition=condition, starts=3, steps=60)
    evaluation = task.evaluate(SGD(lr=2 / (1 + 1 / condition)), None, Context())
    bound = 2 * 60 * math.log10((condition - 1) / (condition + 1))
    # The bound holds for the distance; a gap is at most the condition number away from its square.
    assert (evaluation.scores["log-gap"].values <= bound + math.log10(condition)).all()
    assert (evaluation.scores["steps-to-target"].values < 60).all()


def test_starts_are_those_of_the_seed_and_the_first_is_that_of_the_literature():
    task = Surface(function="rosenbrock", starts=4)
    one, same, other = (task.descents(seed) for seed in (0, 0, 1))
    assert all(torch.equal(a.start, b.start) for a, b in zip(one, same, strict=True))
    assert torch.equal(one[0].start, other[0].start)
    assert not torch.equal(one[1].start, other[1].start)
    plane = PLANES["rosenbrock"]
    for descent in one[1:]:
        assert all(a <= x <= b for a, x, b in zip(plane.low, descent.start.tolist(), plane.high, strict=True))


def test_no_step_sees_a_gradient_longer_than_the_clip():
    task = Surface(function="rosenbrock", starts=1, steps=1, clip=0.5)
    before = torch.tensor(PLANES["rosenbrock"].start, dtype=torch.float64)
    (descent,) = task.descents(0)
    _, end, _ = task.descend(SGD(lr=1.0), descent, Context(), Evaluations())
    assert float((end - before).norm()) == pytest.approx(0.5)


def test_misses_are_infinite_and_so_is_a_start_that_left_the_real_numbers():
    task = Surface(function="quadratic", starts=2, steps=20)
    evaluation = task.evaluate(SGD(lr=1e-9), None, Context())
    assert np.isinf(evaluation.scores["steps-to-target"].values).all()
    with pytest.raises(DivergedError, match="all 2 starts"):
        Surface(function="quadratic", starts=2, steps=2000).evaluate(SGD(lr=1e9), None, Context())


@pytest.mark.parametrize("method", [Adam(lr=0.05), SSO(eta=5.0)], ids=["gradient", "closure"])
def test_optimizers_of_either_shape_descend(method):
    task = Surface(function="quadratic", condition=10.0, starts=2, steps=40)
    evaluation = task.evaluate(method, None, Context())
    assert (evaluation.scores["log-gap"].values < -0.5).all()
    assert evaluation.facts["gradient_evaluations"] >= 2 * 40


def test_momentum_is_kept_once_per_parameter():
    task = Surface(function="quadratic", starts=1, steps=3)
    assert task.evaluate(SGDM(), None, Context()).facts["optimizer_state_bytes_per_parameter"] == 8.0
