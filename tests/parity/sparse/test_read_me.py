"""Read-ME against the authors' code: masks of domains, routed outputs, and the router's loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from methodbench.testing.parity import Vectors, stated_by
from methodbench_sparse.read_me import RoutedFeedForward, Router, Routes, router_loss, split
from methodbench_sparse.structured import FeedForwardPart

pytestmark = pytest.mark.vectors("sparse", "read_me")


def masks(vectors: Vectors) -> tuple[list[Tensor], list[Tensor]]:
    usage = list(vectors.tensor("act_domains").transpose(0, 1))
    rate = vectors.meta["hyper"]["remain_rate"]
    return split(usage, [int(rate * values.shape[1]) for values in usage])


def test_masks_equal_the_reference(vectors: Vectors) -> None:
    shared, experts = masks(vectors)
    assert torch.equal(torch.stack(shared), vectors.tensor("residual", torch.bool))
    assert torch.equal(torch.stack(experts), vectors.tensor("experts", torch.bool))
    assert experts[0].shape[0] == vectors.meta["hyper"]["N_cluster"]


@pytest.mark.parametrize("run", ["routed", "cluster0", "dense"])
def test_routed_outputs_equal_the_reference(vectors: Vectors, run: str) -> None:
    rtol = stated_by(vectors.meta["tolerance"], r"outputs rtol ([\d.e-]+)")

    def linear(name: str) -> nn.Linear:
        weight = vectors.tensor(name)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer

    gate, up, down = (linear(name) for name in ("gate", "up", "down"))

    def part(mask: Tensor) -> nn.Module:
        return FeedForwardPart(gate, up, down, nn.SiLU(), mask.nonzero().flatten())

    shared, experts = (found[0] for found in masks(vectors))
    routes = Routes(Router(torch.ones(2, 8), 8, 1, 1, len(experts), torch.Generator()))
    routed = RoutedFeedForward(part(shared), [part(mask) for mask in experts], routes)
    x, ids = vectors.tensor("x"), vectors.tensor("cluster_id")
    routes.chosen = (ids if run == "routed" else torch.zeros_like(ids)).flatten()
    found = part(torch.ones_like(shared))(x) if run == "dense" else routed(x)
    expected = vectors.tensor(f"y_{run}")
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def test_the_loss_of_the_router_equals_the_reference(vectors: Vectors) -> None:
    rtol = stated_by(vectors.meta["tolerance"], r"loss rtol ([\d.e-]+)")
    experts = masks(vectors)[1][0]
    loss, right = router_loss(vectors.tensor("router_pred"), vectors.tensor("router_feat"), experts)
    assert float(loss) == pytest.approx(float(vectors["router_loss"]), rel=rtol)
    assert float(right) == pytest.approx(float(vectors["router_acc"]), rel=rtol)
