"""Every rule that is written here steps on many tensors as its paper's rule steps on each of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from methodbench.context import Context
from methodbench_optim.adafactor import Adafactor
from methodbench_optim.diffgrad import DiffGrad
from methodbench_optim.lion import Lion
from methodbench_optim.lion_k import LionK
from methodbench_optim.muon import Muon

_SPEC = importlib.util.spec_from_file_location("optim_references", Path(__file__).with_name("references.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
references = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(references)

LR, BETA1, BETA2, DECAY = 0.03, 0.8, 0.95, 0.1
SHAPES = [(4, 3), (7,), (3, 4), (4, 3), (1,), (5, 5)]
METHODS: dict[str, Any] = {
    "lion": Lion(lr=LR, beta1=BETA1, beta2=BETA2, weight_decay=DECAY),
    "diffgrad": DiffGrad(lr=LR, beta1=BETA1, beta2=BETA2, weight_decay=DECAY),
    "lion-k": LionK(lr=LR, beta1=BETA1, beta2=BETA2, weight_decay=DECAY, kappa="l2"),
    "muon": Muon(
        lr=LR,
        momentum=BETA1,
        weight_decay=DECAY,
        arithmetic="float64",
        aux_lr=LR,
        aux_beta1=BETA1,
        aux_beta2=BETA2,
    ),
    "adafactor": Adafactor(lr=LR, weight_decay=DECAY),
}
#: Those that count steps, whose length depends on the count.
COUNTING = ["diffgrad", "muon", "adafactor"]


@pytest.mark.parametrize("chunk", [1, 1 << 30], ids=["one-by-one", "together"])
@pytest.mark.parametrize("name", list(METHODS))
def test_many_tensors_step_as_the_rule_written_out(name: str, chunk: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("methodbench_optim.rule.CPU_CHUNK", chunk)
    draw = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in SHAPES]
    params = [nn.Parameter(start.clone()) for start in starts]
    optimizer = METHODS[name].build([{"params": params, "role": "matrix"}], Context())
    expected, states = list(starts), [{} for _ in starts]
    for step in range(6):
        gradients = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in SHAPES]
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        optimizer.step()
        rule = references.REFERENCES[name]
        expected = [
            rule(p, g, state, LR, BETA1, BETA2, DECAY)
            for p, g, state in zip(expected, gradients, states, strict=True)
        ]
        for p, wanted in zip(params, expected, strict=True):
            torch.testing.assert_close(p.detach(), wanted, rtol=1e-9, atol=1e-10, msg=f"step {step}")


@pytest.mark.parametrize("name", list(METHODS))
def test_groups_have_settings_of_their_own(name: str) -> None:
    start = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    fast, slow = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    groups = [
        {"params": [fast], "role": "matrix", "lr": 0.2, "weight_decay": 0.0},
        {"params": [slow], "role": "matrix", "lr": 0.1, "weight_decay": 0.0},
    ]
    optimizer = METHODS[name].build(groups, Context())
    for p in (fast, slow):
        p.grad = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    optimizer.step()
    torch.testing.assert_close(fast - start, 2 * (slow - start))


@pytest.mark.parametrize("name", list(METHODS))
def test_it_resumes_from_a_state_dict(name: str, resumed_equals_uninterrupted: Any) -> None:
    assert resumed_equals_uninterrupted(METHODS[name])


@pytest.mark.parametrize("name", list(METHODS))
def test_the_closure_runs_with_gradients_and_its_loss_comes_back(name: str) -> None:
    p = nn.Parameter(torch.tensor([[3.0, 1.0], [0.0, -1.0]]))
    optimizer = METHODS[name].build([{"params": [p], "role": "matrix"}], Context())
    before = p.detach().clone()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 11.0
    assert not torch.equal(p.detach(), before)
    torch.testing.assert_close(p.grad, 2 * before)


@pytest.mark.parametrize("name", list(METHODS))
def test_a_gradient_scaler_leaves_the_path_as_it_is_and_skips_what_overflows(name: str) -> None:
    """Mixed precision: the loss is scaled by a power of two, and a step with an infinite gradient is none."""

    def path(scale: float | None, overflow: int | None = None) -> tuple[torch.Tensor, dict[str, Any]]:
        draw = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(4, 3, generator=draw))
        optimizer = METHODS[name].build([{"params": [p], "role": "matrix"}], Context())
        scaler = torch.amp.GradScaler(
            "cpu", init_scale=scale or 1.0, growth_interval=1000, enabled=bool(scale)
        )
        for step in range(5):
            x = torch.randn(3, generator=draw)
            if step == overflow:
                x = x * torch.inf
            elif overflow is None and step == 3:
                continue
            optimizer.zero_grad()
            scaler.scale((p @ x).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        return p.detach(), optimizer.state[p]

    plain, state = path(None)
    scaled, _ = path(2.0**10)
    assert torch.equal(plain, scaled)
    skipped, after = path(2.0**10, overflow=3)
    torch.testing.assert_close(skipped, plain)
    for key, value in state.items():
        torch.testing.assert_close(torch.as_tensor(after[key]), torch.as_tensor(value))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", list(METHODS))
def test_state_has_the_dtype_of_its_parameter_also_after_a_state_dict(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and name in ("diffgrad", "muon", "adafactor"):
        pytest.skip("refused where a parameter has it: eps is zero in float16")
    p = nn.Parameter(torch.ones(4, 3, dtype=dtype))
    optimizer, other = (METHODS[name].build([{"params": [p], "role": "matrix"}], Context()) for _ in range(2))
    p.grad = torch.ones_like(p)
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    for state in (optimizer.state[p], other.state[p]):
        tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
        assert tensors
        assert {value.dtype for value in tensors} == {dtype}


@pytest.mark.parametrize("name", COUNTING)
def test_steps_counted_on_the_device_are_the_steps(name: str) -> None:
    paths = []
    for capturable in (False, True):
        draw = torch.Generator().manual_seed(1)
        params = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]
        group = {"params": params, "role": "matrix", "capturable": capturable}
        optimizer = METHODS[name].build([group], Context())
        for step in range(6):
            for p in params:
                p.grad = torch.randn(p.shape, generator=draw)
            optimizer.step()
            if step == 2:
                state = optimizer.state_dict()
                optimizer = METHODS[name].build([group], Context())
                optimizer.load_state_dict(state)
        counts = [state["step"] for state in optimizer.state.values() if "step" in state]
        assert counts
        assert all(isinstance(count, torch.Tensor) == capturable and int(count) == 6 for count in counts)
        paths.append([p.detach() for p in params])
    for ours, theirs in zip(*paths, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", COUNTING)
def test_a_graph_that_would_repeat_one_step_is_refused_while_it_is_captured(
    name: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("methodbench_optim.rule.capturing", lambda: True)
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="give its groups capturable=True"):
        METHODS[name].build([{"params": [p], "role": "vector"}], Context()).step()
    assert torch.equal(p.detach(), torch.ones(3))
    group = {"params": [p], "role": "vector", "capturable": True}
    METHODS[name].build([group], Context()).step()
    assert not torch.equal(p.detach(), torch.ones(3))
