from __future__ import annotations

import pytest
import torch
from torch import nn

from methodbench.context import Context
from methodbench_optim.muon import Muon, length, newton_schulz


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5)])
@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16", "bfloat16-fused", "bfloat16-per-step"])
def test_newton_schulz_keeps_the_directions_and_evens_out_the_singular_values(shape, arithmetic):
    u, _, vh = torch.linalg.svd(draw(0, *shape), full_matrices=False)
    matrix = u @ torch.diag(torch.linspace(1, 4, len(vh))) @ vh
    found = newton_schulz(matrix.unsqueeze(0), 5, arithmetic)[0].float()
    values = torch.linalg.svdvals(found)
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
    alignment = (u.T @ found @ vh.T).diagonal() / found.norm() * len(values) ** 0.5
    assert float(alignment.min()) > 0.6
    cosine = float((found * (u @ vh)).sum() / found.norm() / (u @ vh).norm())
    assert cosine > 0.98


def test_newton_schulz_of_zeros_is_zeros():
    assert torch.equal(newton_schulz(torch.zeros(1, 3, 4), 5, "float32"), torch.zeros(1, 3, 4))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_update_of_a_matrix_does_not_depend_on_the_gradients_scale(scale):
    p = nn.Parameter(torch.zeros(12, 6))
    optimizer = Muon(lr=1.0, arithmetic="float32").build([{"params": [p], "role": "matrix"}], Context())
    p.grad = scale * draw(1, 12, 6)
    optimizer.step()
    assert float(p.detach().norm()) == pytest.approx(6**0.5 * 2**0.5, rel=0.2)


def test_roles_decide_and_not_shapes_alone():
    shapes = {"matrix": (6, 4), "embedding": (6, 4), "head": (6, 4), "vector": (6, 4)}
    params = {role: nn.Parameter(torch.zeros(shape)) for role, shape in shapes.items()}
    params["bias"] = nn.Parameter(torch.zeros(6))
    groups = [{"params": [p], "role": role if role != "bias" else "matrix"} for role, p in params.items()]
    optimizer = Muon().build(groups, Context())
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    orthogonal = {role for role, p in params.items() if "momentum" in optimizer.state[p]}
    assert orthogonal == {"matrix"}
    for role in ("embedding", "head", "vector", "bias"):
        torch.testing.assert_close(params[role].detach(), torch.full_like(params[role], -3e-4))


def test_kernels_of_convolutions_are_matrices_of_their_outputs():
    kernel = nn.Parameter(torch.zeros(4, 2, 3, 3))
    optimizer = Muon(lr=1.0, arithmetic="float32").build([{"params": [kernel], "role": "matrix"}], Context())
    kernel.grad = draw(2, 4, 2, 3, 3)
    optimizer.step()
    values = torch.linalg.svdvals(kernel.detach().flatten(1))
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


def test_the_transposed_matrix_takes_the_transposed_step():
    ends = []
    for flip in (False, True):
        start, gradient = draw(3, 5, 7), draw(4, 5, 7)
        p = nn.Parameter((start.T if flip else start).contiguous())
        optimizer = Muon(lr=0.1, scale="rms", arithmetic="float64").build(
            [{"params": [p], "role": "matrix"}], Context()
        )
        p.grad = (gradient.T if flip else gradient).contiguous()
        optimizer.step()
        ends.append(p.detach().T if flip else p.detach())
    torch.testing.assert_close(ends[0], ends[1])


def test_scales_are_those_of_the_two_papers():
    assert length(torch.zeros(12, 3), "aspect") == 2.0
    assert length(torch.zeros(3, 12), "aspect") == 1.0
    assert length(torch.zeros(3, 25), "rms") == 1.0
    assert length(torch.zeros(25), "rms") == 1.0


def test_gradients_are_left_as_they_are():
    p = nn.Parameter(torch.zeros(3, 4))
    p.grad = draw(5, 3, 4)
    before = p.grad.clone()
    Muon().build([{"params": [p], "role": "matrix"}], Context()).step()
    assert torch.equal(p.grad, before)
