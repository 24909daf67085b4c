"""What every optimizer and method of training does with settings, parameters, gradients, models and states that it
cannot use."""

from __future__ import annotations

import dataclasses
import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import build, describe
from methodbench.testing import planted
from methodbench.torchkit.closures import Closure
from methodbench_optim.lion_k import KAPPAS, LionK
from methodbench_optim.mezo import MeZO
from methodbench_optim.muon import Muon
from methodbench_optim.plugin import methodbench_methods
from methodbench_optim.sso import SSO

RULES = {method.name: method for method in methodbench_methods() if method.kind == "optimizer"}
TRAINING = {method.name: method for method in methodbench_methods() if method.kind == "training"}
BY_GRADIENT = [name for name, method in RULES.items() if method.needs in ((), ("roles",))]
ELEMENTWISE = [name for name in BY_GRADIENT if name not in ("muon", "adafactor")]
#: Those that are written here and follow ``p.grad``.
OWN = ["lion", "lion-k", "diffgrad", "muon", "adafactor"]
#: Those that evaluate the loss by themselves.
BY_CLOSURE = [name for name in RULES if name not in BY_GRADIENT]


def implementation(name: str) -> Any:
    module, attribute = {**RULES, **TRAINING}[name].impl.split(":")
    return getattr(importlib.import_module(module), attribute)


def numbers(name: str) -> list[str]:
    """The hyperparameters that are real numbers."""
    return [
        row["name"]
        for row in describe(implementation(name))
        if isinstance(row["default"], float) and not isinstance(row["default"], bool)
    ]


def optimizer_of(name: str, *params: nn.Parameter, **group: Any) -> torch.optim.Optimizer:
    built: torch.optim.Optimizer = implementation(name)().build(
        [{"params": list(params), "role": "matrix", **group}], Context()
    )
    return built


def closure_of(params: list[nn.Parameter], values: list[Tensor]) -> Closure:
    """A loss that is linear in the parameters, with these values for gradients."""

    def loss(outputs: Tensor, _: Tensor) -> Tensor:
        return outputs.sum()

    def model(_: Tensor) -> Tensor:
        return torch.stack([(p * v).sum() for p, v in zip(params, values, strict=True)])

    return Closure(params, model, loss, torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "fast"])
@pytest.mark.parametrize("name", list(RULES))
def test_a_rate_that_is_none_is_refused_by_field(name: str, value: Any) -> None:
    field = next(row["name"] for row in describe(implementation(name)) if row["name"] in ("lr", "eta"))
    with pytest.raises(ParameterError, match=rf"{name}: {field} = "):
        build(implementation(name), {field: value}, name)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [*RULES, *TRAINING])
def test_no_hyperparameter_is_infinite_or_not_a_number(name: str, value: float) -> None:
    for field in numbers(name):
        if (name, field, value) == ("atlas", "p", math.inf):
            continue  # The largest coefficient is a norm as well.
        with pytest.raises(ParameterError, match=rf"{name}: {field} = "):
            build(implementation(name), {field: value}, name)


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
@pytest.mark.parametrize("field", ["beta1", "beta2", "momentum", "alpha", "rho"])
def test_a_decay_of_an_average_out_of_range_is_refused_by_field(field: str, value: float) -> None:
    having = [name for name in RULES if field in {row["name"] for row in describe(implementation(name))}]
    assert having
    for name in having:
        with pytest.raises(ParameterError, match=rf"{name}: {field} = "):
            build(implementation(name), {field: value}, name)


@pytest.mark.parametrize("setting", [{"lr": -1.0}, {"lr": math.nan}, {"weight_decay": -0.5}])
@pytest.mark.parametrize("name", BY_GRADIENT)
def test_a_setting_of_one_group_is_checked_as_well(name: str, setting: dict[str, float]) -> None:
    (field,) = setting
    with pytest.raises(ParameterError, match=rf"(?i){field} = .* is not a finite number"):
        optimizer_of(name, nn.Parameter(torch.ones(2)), **setting)


@pytest.mark.parametrize("groups", [[], [{"params": [], "role": "matrix"}]], ids=["no-group", "empty-group"])
@pytest.mark.parametrize("name", list(RULES))
def test_no_parameters_are_refused(name: str, groups: list[dict[str, Any]]) -> None:
    with pytest.raises((ParameterError, ValueError), match=r"no parameter|empty parameter list"):
        implementation(name)().build(groups, Context())


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_parameters_without_a_gradient_stay_as_they_are(name: str) -> None:
    moved, still = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    moved.grad = torch.eye(2)
    optimizer = optimizer_of(name, moved, still, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(still, torch.ones(2, 2))
    assert not torch.equal(moved, torch.ones(2, 2))
    optimizer.zero_grad()
    optimizer.step()


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_gradient_that_is_not_finite_spoils_its_own_coordinate_alone(name: str, value: float) -> None:
    given = torch.tensor([1.0, value, -1.0])
    finite = torch.tensor([1.0, 1.0, -1.0])
    paths = []
    for gradient in (given, finite):
        p = nn.Parameter(torch.ones(3))
        optimizer = optimizer_of(name, p)
        for _ in range(3):
            p.grad = gradient.clone()
            optimizer.step()
        paths.append(p.detach())
    assert torch.equal(paths[0][[0, 2]], paths[1][[0, 2]])
    assert bool(paths[0][[0, 2]].isfinite().all())


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_a_gradient_that_is_not_finite_spoils_its_own_tensor_alone(name: str, value: float) -> None:
    paths = []
    for first in (value, 1.0):
        spoilt, other = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
        optimizer = optimizer_of(name, spoilt, other)
        for _ in range(3):
            spoilt.grad, other.grad = torch.ones(3, 2), torch.arange(6.0).view(3, 2)
            spoilt.grad[0, 0] = first
            optimizer.step()
        paths.append(other.detach())
    assert torch.equal(*paths)
    assert bool(paths[0].isfinite().all())


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("kappa", list(KAPPAS))
def test_every_direction_of_lion_k_takes_a_gradient_that_is_not_finite(kappa: str, value: float) -> None:
    spoilt, other = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    optimizer = LionK(kappa=kappa).build([{"params": [spoilt, other], "role": "matrix"}], Context())
    spoilt.grad, other.grad = torch.ones(3, 2), torch.ones(3, 2)
    spoilt.grad[0, 0] = value
    optimizer.step()
    assert bool(other.isfinite().all())


def test_what_searches_by_itself_stays_or_says_so_where_the_loss_is_not_finite() -> None:
    p = nn.Parameter(torch.ones(3))
    group = [{"params": [p], "role": "vector"}]
    closure = closure_of([p], [torch.full((3,), math.inf)])
    SSO().build(group, Context()).step(closure)
    assert torch.equal(p.detach(), torch.ones(3))
    for settings in ({}, {"estimator": "subspace", "history": 2}):
        optimizer = MeZO(**settings).build(group, Context())
        for _ in range(3):
            optimizer.step(closure)
        assert bool(p.isnan().all())
        with torch.no_grad():
            p.fill_(1.0)


def test_sign_rules_take_an_infinite_gradient_for_a_step_of_lr() -> None:
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([math.inf, -math.inf])
    optimizer_of("lion", p).step()
    torch.testing.assert_close(p.detach(), torch.tensor([-1e-4, 1e-4]))


@pytest.mark.parametrize("name", BY_CLOSURE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_searches_by_itself_takes_half_precision(name: str, dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.ones(4, 4, dtype=dtype))
    closure = Closure(
        [p], lambda x: x @ p.T, lambda y, _: y.float().square().mean(), torch.eye(4, dtype=dtype)
    )
    optimizer = optimizer_of(name, p)
    for _ in range(3):
        optimizer.step(closure)
    assert p.dtype == dtype
    assert bool(p.isfinite().all())


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_float16_parameters_keep_their_dtype_or_are_refused_with_the_reason(name: str) -> None:
    p = nn.Parameter(torch.ones(4, 4, dtype=torch.float16))
    fields = {row["name"]: row["default"] for row in describe(implementation(name))}
    eps = [fields[key] for key in ("eps", "eps1") if fields.get(key)]
    if any(float(torch.tensor(value, dtype=torch.float16)) == 0 for value in eps):
        with pytest.raises(ParameterError, match="is zero in float16"):
            optimizer_of(name, p)
        return
    optimizer = optimizer_of(name, p)
    p.grad = torch.eye(4, dtype=torch.float16)
    optimizer.step()
    assert p.dtype == torch.float16
    assert bool(p.isfinite().all())


@pytest.mark.parametrize("name", list(RULES))
def test_the_state_of_another_rule_is_refused(name: str) -> None:
    p = nn.Parameter(torch.ones(2, 2))
    other = next(candidate for candidate in ("adam", "lion") if candidate != name)
    state = optimizer_of(other, p).state_dict()
    with pytest.raises(ParameterError, match=f"{name}: the state dict is that of {other}"):
        optimizer_of(name, p).load_state_dict(state)
    unnamed = torch.optim.SGD([p], lr=0.1).state_dict()
    with pytest.raises(ParameterError, match="that of an unnamed rule"):
        optimizer_of(name, p).load_state_dict(unnamed)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_gradients_that_are_sparse_or_complex_are_refused(name: str, kind: str) -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64 if kind == "complex" else torch.float32))
    p.grad = torch.ones_like(p) if kind == "complex" else torch.ones(3).to_sparse()
    before = nn.Parameter(torch.ones(2, 2))
    before.grad = torch.ones(2, 2)
    optimizer = optimizer_of(name, before)
    optimizer.add_param_group({"params": [p], "role": "vector"})
    with pytest.raises(RuntimeError, match=rf"dense real gradients, and one of shape \(3,\) is {kind}"):
        optimizer.step()
    # Nothing has moved: a step is taken by all or by none.
    assert torch.equal(before.detach(), torch.ones(2, 2))


@pytest.mark.parametrize("name", BY_CLOSURE)
def test_what_searches_by_itself_refuses_complex_parameters(name: str) -> None:
    with pytest.raises(
        ParameterError, match=rf"{name} moves real parameters, and one of shape \(3,\) is complex"
    ):
        optimizer_of(name, nn.Parameter(torch.ones(3, dtype=torch.complex64)))


@pytest.mark.parametrize("name", list(RULES))
def test_a_loss_that_is_not_finite_comes_back_as_it_is(name: str) -> None:
    params = [nn.Parameter(torch.ones(2, 2))]
    optimizer = optimizer_of(name, *params)
    loss = optimizer.step(closure_of(params, [torch.full((2, 2), math.inf)]))
    assert not math.isfinite(float(torch.as_tensor(loss)))


# Methods of training.


@pytest.mark.parametrize("name", ["tract", "gere", "noprop"])
def test_a_model_without_the_layer_that_a_method_reads_is_refused(name: str) -> None:
    ctx = planted.supplied(0, Context())
    with pytest.raises(NotApplicableError, match=r"no(r|\b).* (Linear|Conv2d)"):
        implementation(name)().wrap(nn.Sequential(nn.ReLU(), nn.Flatten()), ctx)


def test_task_vectors_of_another_model_are_refused_with_the_parameter() -> None:
    ctx = planted.supplied(0, Context())
    with pytest.raises(
        NotApplicableError, match="task vector 0 has nothing of the shape of the model's weight"
    ):
        implementation("atlas")().wrap(nn.Linear(2, 2), ctx)
    with pytest.raises(NotApplicableError, match="no parameters"):
        implementation("atlas")().wrap(nn.ReLU(), ctx)


def test_an_empty_set_of_general_samples_is_none() -> None:
    inputs, targets = planted.supplied(0, Context()).supplies["replay"]
    ctx = dataclasses.replace(Context(), supplies={"replay": (inputs[:0], targets[:0])})
    with pytest.raises(NotApplicableError, match="no general samples"):
        implementation("gere")().wrap(planted.student(0), ctx)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", list(TRAINING))
def test_methods_of_training_take_half_precision(name: str, dtype: torch.dtype) -> None:
    given, supplies = planted.lessons(0), planted.supplied(0, Context()).supplies
    inputs, targets = supplies["replay"]
    halved = {
        "replay": (inputs.to(dtype), targets),
        "task-vectors": [
            {key: v.to(dtype) for key, v in vector.items()} for vector in supplies["task-vectors"]
        ],
    }
    method = implementation(name)()
    model = method.wrap(planted.student(0).to(dtype), dataclasses.replace(Context(), supplies=halved)).train()
    x, y = given.x[:32].to(dtype), given.y[:32]
    outputs = model(x)
    method.loss(model, outputs, y, nn.functional.cross_entropy(outputs, y)).backward()
    method.after_backward(model, 0)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(g.dtype == dtype and bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("name", list(TRAINING))
def test_inputs_that_are_not_finite_are_not_hidden_in_the_loss(name: str, value: float) -> None:
    """The loop ends a training whose loss is not finite: a method that replaces it by a number would train on."""
    given = planted.lessons(0)
    method = implementation(name)()
    model = method.wrap(planted.student(0), planted.supplied(0, Context())).train()
    x = given.x[:32].clone()
    x[0] = value
    outputs = model(x)
    loss = method.loss(model, outputs, given.y[:32], nn.functional.cross_entropy(outputs, given.y[:32]))
    assert not math.isfinite(float(loss.detach()))


def test_roles_that_muon_does_not_know_are_matrices_or_vectors_by_shape() -> None:
    matrix, vector = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))
    optimizer = Muon().build([{"params": [matrix, vector]}], Context())
    assert [group["update"] for group in optimizer.param_groups] == ["orthogonal", "adamw"]
