"""DEFT and ProSparse: penalties, what is trained, and that activations thin out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.testing import planted
from methodbench.torchkit.nonlinearities import ShiftedReLU
from methodbench_sparse.deft import DEFT, Watched, density_terms, exact_density
from methodbench_sparse.prosparse import ProSparse, Rectified, penalty, reader_of, sine


def network(activation: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    act = nn.ReLU() if activation is None else activation
    return nn.Sequential(nn.Linear(16, 32), act, nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))


def taught(method: Any, model: nn.Module, steps: int = 60) -> tuple[nn.Module, list[Tensor]]:
    """Train ``model`` under ``method`` by SGD on planted lessons; return it with the losses of the task."""
    lessons = planted.lessons(0)
    module = method.wrap(model, Context(seed=0)).train()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        outputs = module(lessons.x)
        task = nn.functional.cross_entropy(outputs, lessons.y)
        optimizer.zero_grad()
        method.loss(module, outputs, lessons.y, task).backward()
        method.after_backward(module, step)
        optimizer.step()
        method.after_step(module, step)
        losses.append(task.detach())
    return module, losses


def zeros(module: nn.Module) -> float:
    """Share of zeros behind the activation functions of the trained network."""
    model: Any = module.model
    shares: list[Tensor] = []
    for part in (model[1], model[3]):
        part.register_forward_hook(lambda _, __, y: shares.append((y == 0).double().mean()))
    module.eval()(planted.lessons(0).test_x)
    return float(torch.stack(shares).mean())


# DEFT


@settings(max_examples=30)
@given(seed=st.integers(0, 99), eps=st.sampled_from([1e-7, 1e-4, 1e-2]))
def test_the_smooth_density_is_between_nothing_and_the_exact_one(seed: int, eps: float) -> None:
    draw = planted.generator(seed)
    layers = [torch.relu(torch.randn(3, 5, 12, generator=draw)) for _ in range(4)]
    smooth, exact = density_terms(layers, eps), exact_density(layers)
    assert smooth.shape == exact.shape == (3, 4)
    assert bool((smooth >= 0).all())
    assert bool((smooth <= exact + 1e-6).all())
    larger = density_terms([2 * layer for layer in layers], eps)
    assert bool((larger >= smooth - 1e-7).all())
    shuffled = density_terms([layer[:, torch.randperm(5)][..., torch.randperm(12)] for layer in layers], eps)
    torch.testing.assert_close(shuffled, smooth)
    torch.testing.assert_close(density_terms(layers, 1e-20).double(), exact, rtol=1e-5, atol=1e-5)


def test_no_activation_costs_nothing_and_pulls_nowhere() -> None:
    nothing = torch.zeros(2, 3, requires_grad=True)
    loss = density_terms([nothing], 1e-7).mean()
    loss.backward()
    assert loss.item() == 0
    assert nothing.grad is not None
    assert not nothing.grad.any()


def test_without_weight_training_is_plain_bit_for_bit() -> None:
    _, plain = taught(DEFT(weight=0.0, rank=0), network())
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for expected in plain:
        loss = nn.functional.cross_entropy(model(planted.lessons(0).x), planted.lessons(0).y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.equal(loss.detach(), expected)


def test_only_updates_and_the_head_are_trained_and_activations_thin_out() -> None:
    before = {name: parameter.clone() for name, parameter in network().named_parameters()}
    thin, thin_losses = taught(DEFT(weight=1.0, eps=1e-2, rank=4), network(), 200)
    plain, losses = taught(DEFT(weight=0.0, rank=4), network(), 200)
    model: Any = thin.model
    assert torch.equal(model[0].linear.weight, before["0.weight"])
    assert torch.equal(model[2].linear.bias, before["2.bias"])
    assert not torch.equal(model[4].weight, before["4.weight"])
    assert zeros(thin) > zeros(plain) + 0.1
    assert float(thin_losses[-1]) < 0.5 * float(losses[0])


def test_activations_are_kept_in_training_alone() -> None:
    model = DEFT().wrap(network(), Context())
    assert isinstance(model, Watched)
    x = planted.lessons(0).x
    model.train()(x)
    model(x)
    assert len(model.activations) == 2, "those of the last pass"
    with torch.no_grad():
        model(x)
    assert not model.activations
    model.eval()(x)
    assert not model.activations


# ProSparse


def test_factors_are_continuous_never_fall_and_meet_the_ends() -> None:
    method = ProSparse(steps=1650)
    factors = [method.factor(step) for step in range(1700)]
    assert factors == sorted(factors)
    assert max(b - a for a, b in itertools.pairwise(factors)) < 2e-3
    for value, end in zip(method.lambdas, method.ends, strict=True):
        assert method.factor(end // 10) == pytest.approx(value)
    assert set(factors[:500]) == {0.0}
    assert set(factors[1650:]) == {0.2}
    # Flat at both ends of a stage, steepest in the middle.
    assert sine(1, 1000, 0, 1) < 1e-4
    assert 1 - sine(999, 1000, 0, 1) < 1e-4
    assert sine(500, 1000, 0, 1) == pytest.approx(0.5)
    constant = ProSparse(lambdas=(0.3,), ends=(1,), steps=10)
    assert {constant.factor(step) for step in range(20)} == {0.3}


def test_without_a_penalty_it_is_training_of_a_relu_network() -> None:
    _, ours = taught(ProSparse(lambdas=(0.0,), ends=(1,), threshold=0.0), network(nn.SiLU()))
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for expected in ours:
        loss = nn.functional.cross_entropy(model(planted.lessons(0).x), planted.lessons(0).y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.equal(loss.detach(), expected)


def test_a_penalty_thins_out_and_a_threshold_more() -> None:
    plain, _ = taught(ProSparse(lambdas=(0.0,), ends=(1,), threshold=0.0), network(), 150)
    recipe: dict[str, Any] = {
        "lambdas": (0.0, 0.3, 0.3),
        "ends": (1, 2, 3),
        "reduction": "mean",
        "steps": 150,
    }
    pushed, losses = taught(ProSparse(**recipe, threshold=0.0), network(), 150)
    cut, _ = taught(ProSparse(**recipe, threshold=0.05), network(), 150)
    assert zeros(plain) < zeros(pushed) <= zeros(cut)
    assert float(losses[-1]) < 0.5 * float(losses[0])


def test_the_threshold_comes_with_the_last_step() -> None:
    method = ProSparse(steps=3, threshold=0.5)
    model = method.wrap(network(), Context())
    assert isinstance(model, Rectified)
    part: Any = model.model.get_submodule("1")
    for step in range(3):
        assert part.threshold == 0
        method.after_step(model, step)
    assert part.threshold == 0.5


def test_gated_networks_are_watched_behind_the_product() -> None:
    module = planted.build("llama", outliers=False).module
    (name, *_) = [name for name, part in module.named_modules() if name.endswith("act_fn")]
    assert reader_of(module, name) is module.get_submodule(name.replace("act_fn", "down_proj"))
    assert reader_of(network(), "1") is None
    wrapped = Rectified(module)
    assert all(isinstance(part, ShiftedReLU) for n, part in module.named_modules() if n.endswith("act_fn"))
    wrapped.train()(planted.inputs("llama", 2, 1).inputs)
    down = module.get_submodule(name.replace("act_fn", "down_proj"))
    assert {hidden.shape[-1] for hidden in wrapped.hidden} == {down.get_parameter("weight").shape[1]}


def test_reductions_differ_by_what_they_divide_by() -> None:
    hidden = [torch.full((2, 5), -3.0), torch.full((2, 10), 1.0)]
    assert float(penalty(hidden, "sum_scaled")) == pytest.approx(1e-8 * (30 + 20))
    assert float(penalty(hidden, "mean")) == pytest.approx(3 + 1)


def test_hostile_input_is_refused() -> None:
    bare = nn.Sequential(nn.Linear(4, 4))
    for method in (DEFT(), ProSparse()):
        with pytest.raises(NotApplicableError, match="no activation function"):
            method.wrap(bare, Context())
    with pytest.raises(NotApplicableError, match="no Linear"):
        DEFT().wrap(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()), Context())
    for cls, hyper, where in (
        (DEFT, {"eps": 0.0}, "eps"),
        (DEFT, {"weight": -1.0}, "weight"),
        (ProSparse, {"lambdas": (0.2, 0.1), "ends": (1, 2)}, "must not fall"),
        (ProSparse, {"lambdas": (0.1, 0.2), "ends": (2, 2)}, "must rise"),
        (ProSparse, {"lambdas": (0.1,), "ends": (1, 2)}, "one of each"),
    ):
        with pytest.raises(ParameterError, match=where):
            build(cls, hyper, "method")
