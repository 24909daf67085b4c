"""Every rule that is written here steps on many tensors as its paper's rule steps on each of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from methodbench.context import Context
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
}


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
