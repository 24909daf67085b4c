"""Steps under torch.compile: traced, they do what they do uncompiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from methodbench.context import Context
from methodbench_optim.adafactor import Adafactor
from methodbench_optim.diffgrad import DiffGrad
from methodbench_optim.lion import Lion
from methodbench_optim.lion_k import LionK
from methodbench_optim.muon import Muon


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "method",
    [Lion(weight_decay=0.1), DiffGrad(), LionK(), Muon(), Adafactor()],
    ids=lambda m: type(m).__name__,
)
def test_a_compiled_step_is_the_step(method: Any) -> None:
    torch._dynamo.reset()
    traced = []

    def backend(graph: Any, _: Any) -> Any:
        traced.append(graph)
        return graph.forward

    def path(compiled: bool) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(4, 3, generator=generator)) for _ in range(3)]
        optimizer = method.build([{"params": params, "role": "matrix"}], Context())
        step = torch.compile(optimizer.step, backend=backend) if compiled else optimizer.step
        for _ in range(12):
            for p in params:
                p.grad = torch.randn(4, 3, generator=generator)
            step()
        return [p.detach() for p in params]

    for ours, theirs in zip(path(True), path(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    # One graph makes the state, and one or two more serve all later steps: the count of steps is no constant in them.
    assert 1 <= len(traced) <= 3
