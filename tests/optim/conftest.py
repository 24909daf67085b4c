"""Drivers that the tests of several optimizers share."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methodbench.context import Context

Follow = Callable[[Any, Tensor, Sequence[Tensor]], list[Tensor]]


@pytest.fixture(scope="session")
def follow() -> Follow:
    """Return a function that runs a method from ``start`` on given gradients: the start, then each step."""

    def run(method: Any, start: Tensor, gradients: Sequence[Tensor]) -> list[Tensor]:
        p = nn.Parameter(start.clone())
        optimizer = method.build([{"params": [p], "role": "vector"}], Context())
        path = [start.clone()]
        for gradient in gradients:
            p.grad = gradient.clone()
            optimizer.step()
            path.append(p.detach().clone())
        return path

    return run


@pytest.fixture(scope="session")
def resumed_equals_uninterrupted() -> Callable[[Any], bool]:
    """Return a function that says whether a method goes on bit for bit from a saved state dict."""

    def run(method: Any) -> bool:
        generator = torch.Generator().manual_seed(3)
        gradients = torch.randn(6, 5, generator=generator, dtype=torch.float64)
        p = nn.Parameter(torch.ones(5, dtype=torch.float64))
        optimizer = method.build([{"params": [p], "role": "vector"}], Context())
        for gradient in gradients[:3]:
            p.grad = gradient.clone()
            optimizer.step()
        q = nn.Parameter(p.detach().clone())
        other = method.build([{"params": [q], "role": "vector"}], Context())
        saved = io.BytesIO()
        torch.save(optimizer.state_dict(), saved)
        saved.seek(0)
        other.load_state_dict(torch.load(saved, weights_only=True))
        for gradient in gradients[3:]:
            p.grad, q.grad = gradient.clone(), gradient.clone()
            optimizer.step()
            other.step()
        return torch.equal(p, q)

    return run
