"""The fused steps against the foreach rules: on a GPU, and on a CPU in Triton's interpreter."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from methodbench.torchkit.kernels import has_triton
from methodbench_optim import fused
from methodbench_optim.diffgrad import DiffGradOptimizer
from methodbench_optim.lion import LionOptimizer

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter is slow: there, few tensors and one step stand for all.
SHAPES = ((5,), (3, 1000)) if INTERPRETED else ((5,), (2048,), (3, 1000), (1,), (4097,))
STEPS = 2 if INTERPRETED else 4


@pytest.fixture
def device() -> str:
    if INTERPRETED:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or Triton's interpreter (TRITON_INTERPRET=1)")
    return "cuda"


@pytest.mark.slow
@pytest.mark.skipif(
    INTERPRETED or torch.cuda.is_available(), reason="the kernels are tested here as they are"
)
@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_fused_steps_agree_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (LionOptimizer, {"lr": 1e-2}),
        (LionOptimizer, {"lr": 1e-2, "betas": (0.3, 0.4), "weight_decay": 0.1}),
        (DiffGradOptimizer, {"lr": 1e-2}),
        (DiffGradOptimizer, {"lr": 1e-2, "weight_decay": 0.1, "eps_position": "after-correction"}),
    ],
)
def test_triton_steps_are_those_of_the_foreach_rule(device, monkeypatch, rule, options):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]
    others = copy.deepcopy(params)
    used = []
    layout_of = fused.layout_of
    monkeypatch.setattr(fused, "layout_of", lambda *lists: used.append(layout_of(*lists)) or used[-1])
    ours, foreach = rule(params, **options), rule(others, **options)
    for _ in range(STEPS):
        for p, other in zip(params, others, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(device)
            other.grad = p.grad.clone()
        ours.step()
        with monkeypatch.context() as patch:
            patch.setattr(fused, "layout_of", lambda *lists: None)
            foreach.step()
    assert None not in used
    assert len(used) == STEPS
    for p, other in zip(params, others, strict=True):
        torch.testing.assert_close(p, other, rtol=1e-6, atol=1e-6)
        for name, value in foreach.state[other].items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(ours.state[p][name], value, rtol=1e-6, atol=1e-6)
            else:
                assert ours.state[p][name] == value


def test_triton_is_left_where_tensors_do_not_allow_it(device):
    plain = torch.zeros(64, device=device)
    assert fused.layout_of([plain], [plain]) is not None
    assert fused.layout_of([plain.double()], [plain]) is None
    assert fused.layout_of([torch.zeros(8, 8, device=device).T], [plain]) is None
    assert fused.layout_of([plain[1:33]], [plain[:32]]) is None


def test_a_cpu_takes_the_foreach_rule():
    if INTERPRETED:
        pytest.skip("the interpreter stands in for a GPU")
    plain = torch.zeros(64)
    assert fused.layout_of([plain], [plain]) is None
