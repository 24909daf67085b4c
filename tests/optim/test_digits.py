from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from methodbench.context import Context
from methodbench.errors import DivergedError
from methodbench.protocols import MethodTask
from methodbench_optim import plugin
from methodbench_optim.baselines import SGD, Adam
from methodbench_optim.diffgrad import DiffGrad
from methodbench_optim.lion import Lion
from methodbench_optim.workloads import digits
from methodbench_optim.workloads.digits import Digits
from methodbench_optim.workloads.loop import param_groups

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_three_parts_are_disjoint_and_complete():
    data = digits.load_digits(0, Context())
    assert (len(data.train), len(data.validation), len(data.test)) == (1078, 359, 360)
    rows = torch.cat([part.images.flatten(1) for part in (data.train, data.validation, data.test)])
    # No picture of the set occurs twice, so disjoint parts have as many distinct rows as pictures.
    assert len(rows.unique(dim=0)) == 1797
    assert (float(rows.min()), float(rows.max())) == (0.0, 1.0)


def test_the_split_and_the_digest_depend_on_the_split_seed_as_they_should():
    one, again, other = (digits.load_digits(seed, Context()) for seed in (0, 0, 1))
    assert torch.equal(one.test.images, again.test.images)
    assert not torch.equal(one.test.labels, other.test.labels)
    assert one.digest == other.digest


@pytest.mark.parametrize("architecture", ["mlp", "cnn"])
def test_adam_learns_the_digits(architecture):
    task = Digits(architecture=architecture, trials=1, steps=200)
    evaluation = task.evaluate(Adam(lr=1e-2), None, Context())
    assert isinstance(task, MethodTask)
    assert evaluation.scores["test-accuracy"].values.mean() > 0.93
    assert evaluation.scores["test-nll"].values.shape == (360,)
    curve = evaluation.series["validation-loss"]
    assert curve[0] == pytest.approx(math.log(10), abs=0.1)
    assert curve[-1] < 0.3


def test_learning_rates_are_centred_on_the_configured_one():
    rates = [method.lr for method in Digits(architecture="mlp").candidates(Lion(lr=1e-4, beta1=0.95))]
    np.testing.assert_allclose(rates, 1e-4 * 10 ** np.array([-1.5, -0.75, 0, 0.75, 1.5]))
    (only,) = Digits(architecture="mlp", trials=1).candidates(Lion(lr=1e-4))
    assert only.lr == 1e-4


def test_trials_keep_the_other_hyperparameters():
    methods = Digits(architecture="mlp").candidates(DiffGrad(beta1=0.8, eps_position="after-correction"))
    assert {(method.beta1, method.eps_position) for method in methods} == {(0.8, "after-correction")}


def test_the_trial_of_lowest_final_validation_loss_is_scored():
    task = Digits(architecture="mlp", trials=3, decades=2, steps=40)
    evaluation = task.evaluate(Adam(), None, Context())
    trials = evaluation.facts["trials"]
    best = min(trials, key=lambda trial: trial["validation_loss"])
    assert evaluation.facts["chosen_lr"] == best["lr"] == pytest.approx(1e-2)
    assert evaluation.series["validation-loss"][-1] == best["validation_loss"]
    assert len(evaluation.series["validation-loss"]) == 5


def test_all_optimizers_start_from_the_same_network_and_see_the_same_batches():
    ctx = Context(seed=5)
    first, second = (digits.network("cnn", ctx).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = digits.network("cnn", Context(seed=6)).state_dict()
    assert not torch.equal(first["0.weight"], other["0.weight"])
    one, two, three = (torch.stack(digits.batches(100, 16, 9, seed)) for seed in (5, 5, 6))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_initialization_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    digits.network("mlp", Context(seed=9))
    assert torch.equal(torch.rand(3), expected)


def test_an_epoch_shows_every_picture_at_most_once():
    chosen = digits.batches(100, 16, 12, 0)
    assert len(chosen) == 12
    for epoch in (chosen[:6], chosen[6:]):
        assert len(torch.cat(epoch).unique()) == 96


def test_a_batch_larger_than_the_data_is_all_of_it():
    (batch,) = digits.batches(10, 64, 1, 0)
    assert sorted(batch.tolist()) == list(range(10))


def test_the_schedule_warms_up_to_one_and_decays_towards_zero():
    shares = [digits.schedule(step, 100, 0.05) for step in range(1, 101)]
    np.testing.assert_allclose(shares[:5], [0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares[5] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(shares[5:]))
    assert 0 < shares[-1] < 0.001
    assert digits.schedule(1, 100, 0.0) == 1.0


def test_roles_are_head_matrix_and_vector():
    module = digits.network("cnn", Context())
    groups = {group["role"]: group["params"] for group in param_groups(module, module[-1].weight)}
    assert [p.ndim for p in groups["matrix"]] == [4, 4]
    assert [p.ndim for p in groups["vector"]] == [1, 1, 1]
    assert [tuple(p.shape) for p in groups["head"]] == [(10, 64)]


def test_a_repetition_is_the_same_bit_for_bit_and_another_seed_is_not():
    task = Digits(architecture="mlp", trials=2, steps=30)
    one, two, three = (task.evaluate(Lion(lr=1e-3), None, Context(seed=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.scores["test-nll"].values, two.scores["test-nll"].values)
    assert (one.scores["test-nll"].values != three.scores["test-nll"].values).any()


def test_diverged_trials_lose_against_any_other():
    task = Digits(architecture="mlp", trials=2, decades=16 / 2, steps=40, evaluate_every=1)
    evaluation = task.evaluate(SGD(lr=1e5), None, Context())
    high = evaluation.facts["trials"][-1]
    assert high == {"lr": pytest.approx(1e9), "validation_loss": None, "diverged": True}
    assert evaluation.facts["chosen_lr"] == pytest.approx(10.0)


def test_all_trials_diverged_is_an_error_that_names_the_rates():
    task = Digits(architecture="mlp", trials=2, decades=1, steps=40)
    with pytest.raises(DivergedError, match=r"every trial diverged .*e\+"):
        task.evaluate(SGD(lr=1e12), None, Context())


def test_steps_to_target_is_the_first_look_that_reaches_it_and_infinite_for_a_miss():
    def steps(target):
        task = Digits(architecture="mlp", trials=1, steps=60, target_accuracy=target)
        return task.evaluate(Adam(lr=1e-2), None, Context()).scores["steps-to-target"].values.item()

    easy, harder = steps(0.3), steps(0.8)
    assert 0 <= easy < harder <= 60
    assert easy % 10 == 0
    assert steps(1.0) == math.inf


def test_a_best_rate_at_the_edge_of_the_search_is_remarked():
    ctx = Context()
    Digits(architecture="mlp", trials=3, decades=2, steps=20).evaluate(Adam(lr=1e-5), None, ctx)
    assert any("edge of the search" in remark for remark in ctx.warnings)


def test_a_method_without_a_learning_rate_is_run_once():
    class Fixed:
        def build(self, param_groups, ctx):
            return torch.optim.SGD(param_groups, lr=0.1)

    evaluation = Digits(architecture="mlp", steps=20).evaluate(Fixed(), None, Context())
    assert [trial["lr"] for trial in evaluation.facts["trials"]] == [None]


@pytest.mark.slow
@pytest.mark.parametrize("method", [Adam(), DiffGrad()], ids=lambda method: type(method).__name__)
def test_adaptive_defaults_reach_the_target_on_the_cnn(method):
    (entry,) = (task for task in plugin.methodbench_tasks() if task.name == "digits-cnn")
    evaluation = Digits(**entry.options).evaluate(method, None, Context())
    assert evaluation.scores["steps-to-target"].values.item() < math.inf
    assert evaluation.scores["test-accuracy"].values.mean() > 0.96
