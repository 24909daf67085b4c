from __future__ import annotations

import numpy as np
import pytest
import torch

from methodbench.context import Context
from methodbench.errors import DivergedError, ParameterError
from methodbench.params import build
from methodbench.protocols import MethodTask
from methodbench_optim.baselines import SGD, Adam
from methodbench_optim.diffgrad import DiffGrad
from methodbench_optim.lion import Lion
from methodbench_optim.workloads.nonconvex import NonConvex

PAPER = {"lr": 0.1, "beta1": 0.95, "beta2": 0.999}


def end_from_the_papers_start(method, function, gradient="true"):
    task = NonConvex(function=function, gradient=gradient, starts=1)
    return task.evaluate(method, None, Context()).series["trajectory"][-1]


@pytest.mark.parametrize(
    ("function", "gradient", "diffgrads_end", "adams_end"),
    [
        ("f1", "true", -0.3001, 0.2001),
        ("f2", "true", -0.643, 0.0001),
        ("f2", "notebook", -0.812, 0.0002),
        ("f3", "true", 0.0136, 0.0005),
    ],
)
def test_ends_from_the_papers_start_are_the_known_ones(function, gradient, diffgrads_end, adams_end):
    assert end_from_the_papers_start(DiffGrad(**PAPER), function, gradient) == pytest.approx(
        diffgrads_end, abs=5e-4
    )
    assert end_from_the_papers_start(Adam(**PAPER), function, gradient) == pytest.approx(adams_end, abs=5e-4)


@pytest.mark.parametrize("function", ["f1", "f2"])
def test_diffgrad_reaches_the_global_minimum_where_adam_does_not(function):
    task = NonConvex(function=function, starts=1)
    ours = task.evaluate(DiffGrad(**PAPER), None, Context()).scores
    adams = task.evaluate(Adam(**PAPER), None, Context()).scores
    assert ours["global-share"].values.item() == 1
    assert adams["global-share"].values.item() == 0
    assert ours["start-gap"].values.item() < 1e-4 < adams["start-gap"].values.item()


def test_the_separation_on_f1_vanishes_from_another_start_at_a_lower_rate():
    task = NonConvex(function="f1", start=-1.3, starts=1)
    for method in (DiffGrad(lr=0.05), Adam(lr=0.05)):
        assert task.evaluate(method, None, Context()).series["trajectory"][-1] == pytest.approx(
            -0.3, abs=0.01
        )


def test_scores_have_one_unit_per_start_and_the_papers_start_comes_first():
    task = NonConvex(function="f1", starts=5, iterates=50)
    evaluation = task.evaluate(SGD(lr=0.1), None, Context())
    assert isinstance(task, MethodTask)
    assert evaluation.scores["final-gap"].values.shape == (5,)
    assert evaluation.scores["start-gap"].values[0] == evaluation.scores["final-gap"].values[0]
    trajectory = evaluation.series["trajectory"]
    assert (len(trajectory), trajectory[0]) == (50, -1.0)
    np.testing.assert_allclose(task.grid(), [-1, -0.5, 0, 0.5, 1])


def test_a_start_at_the_global_minimum_with_no_slope_stays_there():
    task = NonConvex(function="f1", start=-0.3, starts=1, iterates=20)
    scores = task.evaluate(SGD(lr=0.1), None, Context()).scores
    assert scores["final-gap"].values.item() == pytest.approx(0, abs=1e-20)
    assert scores["global-share"].values.item() == 1


def test_starts_do_not_influence_one_another():
    whole = NonConvex(function="f2", starts=5, iterates=40).evaluate(Lion(lr=0.01), None, Context())
    alone = NonConvex(function="f2", start=0.5, starts=1, iterates=40).evaluate(
        Lion(lr=0.01), None, Context()
    )
    assert whole.scores["final-gap"].values[3] == alone.scores["final-gap"].values[0]


def test_a_diverged_start_has_an_infinite_gap_and_the_others_keep_theirs():
    # At this rate the parabola around -0.3 throws every start away from it, but -0.3 itself has no slope.
    task = NonConvex(function="f1", start=-0.3, starts=2, iterates=200)
    evaluation = task.evaluate(SGD(lr=100.0), None, Context())
    assert np.isinf(evaluation.scores["final-gap"].values).tolist() == [False, True]
    assert evaluation.facts["diverged_starts"] == 1


def test_all_starts_diverged_is_an_error_of_its_own():
    task = NonConvex(function="f1", starts=3, iterates=200)
    with pytest.raises(DivergedError, match="all 3 starts"):
        task.evaluate(SGD(lr=100.0), None, Context())


def test_a_repetition_gives_the_same_numbers_bit_for_bit():
    task = NonConvex(function="f3", starts=3, iterates=60)
    first, second = (task.evaluate(DiffGrad(**PAPER), None, Context(seed=seed)) for seed in (0, 1))
    for name, scores in first.scores.items():
        np.testing.assert_array_equal(scores.values, second.scores[name].values)


def test_the_notebook_gradient_exists_for_f2_only():
    with pytest.raises(ParameterError, match="f1 has no notebook gradient"):
        build(NonConvex, {"function": "f1", "gradient": "notebook"}, "nonconvex-f1")


def test_a_method_that_calls_the_closure_more_than_once_sees_gradients_where_it_stands():
    class Extragradient(torch.optim.Optimizer):
        """Steps with the gradient of a look-ahead point: needs a second call of the closure."""

        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        def step(self, closure):
            loss = closure()
            (p,) = self.param_groups[0]["params"]
            with torch.no_grad():
                base = p.clone()
                p.sub_(0.1 * p.grad)
                closure()
                p.copy_(base - 0.1 * p.grad)
            return loss

    class Method:
        def build(self, param_groups, ctx):
            return Extragradient(param_groups)

    path = (
        NonConvex(function="f1", starts=1, iterates=2)
        .evaluate(Method(), None, Context())
        .series["trajectory"]
    )
    look_ahead = -1 - 0.1 * (2 * -1 + 0.6)
    assert path[1] == pytest.approx(-1 - 0.1 * (2 * look_ahead + 0.6))
