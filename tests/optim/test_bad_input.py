"""What every optimizer does with settings, parameters, gradients and states that it cannot use."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import ParameterError
from methodbench.params import build, describe
from methodbench.torchkit.closures import Closure
from methodbench_optim.plugin import methodbench_methods

RULES = {method.name: method for method in methodbench_methods() if method.kind == "optimizer"}
BY_GRADIENT = [name for name, method in RULES.items() if not method.needs]
ELEMENTWISE = [name for name in BY_GRADIENT if name not in ("muon", "adafactor")]
OWN = [name for name in ELEMENTWISE if name in ("lion", "lion-k", "diffgrad")]


def implementation(name: str) -> Any:
    module, attribute = RULES[name].impl.split(":")
    return getattr(importlib.import_module(module), attribute)


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


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
@pytest.mark.parametrize("field", ["beta1", "beta2", "momentum", "alpha", "rho"])
def test_a_decay_of_an_average_out_of_range_is_refused_by_field(field: str, value: float) -> None:
    having = [name for name in RULES if field in {row["name"] for row in describe(implementation(name))}]
    assert having
    for name in having:
        with pytest.raises(ParameterError, match=rf"{name}: {field} = "):
            build(implementation(name), {field: value}, name)


@pytest.mark.parametrize("setting", [{"lr": -1.0}, {"lr": math.nan}, {"weight_decay": -0.5}])
@pytest.mark.parametrize("name", ELEMENTWISE)
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


def test_sign_rules_take_an_infinite_gradient_for_a_step_of_lr() -> None:
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([math.inf, -math.inf])
    optimizer_of("lion", p).step()
    torch.testing.assert_close(p.detach(), torch.tensor([-1e-4, 1e-4]))


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
    with pytest.raises(RuntimeError, match=rf"dense real gradients, and one of shape \(3,\) is {kind}"):
        optimizer_of(name, p).step()


@pytest.mark.parametrize("name", list(RULES))
def test_a_loss_that_is_not_finite_comes_back_as_it_is(name: str) -> None:
    params = [nn.Parameter(torch.ones(2, 2))]
    optimizer = optimizer_of(name, *params)
    loss = optimizer.step(closure_of(params, [torch.full((2, 2), math.inf)]))
    assert not math.isfinite(float(torch.as_tensor(loss)))
