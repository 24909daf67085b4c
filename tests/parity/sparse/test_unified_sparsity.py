"""Unified sparsity against the authors' code: scores, what stays, how neurons are dealt, mixtures, dropped layers."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from methodbench.testing.parity import Vectors, stated_by
from methodbench_sparse.structured import FeedForwardPart
from methodbench_sparse.unified_sparsity import (
    Contribution,
    Mixture,
    deal,
    most_alike,
    similarity,
    width_score,
)

pytestmark = pytest.mark.vectors("sparse", "unified_sparsity")


def layers(vectors: Vectors) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    def linear(name: str) -> nn.Linear:
        weight = vectors.tensor(name)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer

    return linear("gate"), linear("up"), linear("down")


def test_scores_and_kept_neurons_equal_the_reference(vectors: Vectors) -> None:
    rtol = stated_by(vectors.meta["tolerance"], r"outputs rtol ([\d.e-]+)")
    gate, up, down = layers(vectors)
    found = Contribution(down.weight)
    for x in vectors.tensor("calib"):
        found.add(nn.functional.silu(gate(x)) * up(x))
    torch.testing.assert_close(found.total, vectors.tensor("act_sum"), rtol=rtol, atol=rtol)
    score = width_score(found.value, down.weight)
    torch.testing.assert_close(score, vectors.tensor("score"), rtol=rtol, atol=rtol)
    for keep in vectors.meta["hyper"]["keep"]:
        kept = score.topk(int(len(score) * keep)).indices.sort().values
        assert torch.equal(kept, vectors.tensor(f"keep{keep * 100:.0f}").sort().values)


def mixture(vectors: Vectors, run: str) -> Mixture:
    hyper = vectors.meta["hyper"]
    gate, up, down = layers(vectors)
    shared, dealt = deal(vectors.tensor("score"), hyper["num_experts"], float(vectors[f"{run}_ratio"]))
    assert torch.equal(shared, vectors.tensor(f"{run}_shared"))
    assert torch.equal(dealt, vectors.tensor(f"{run}_experts"))

    def part(index: Tensor) -> FeedForwardPart:
        return FeedForwardPart(gate, up, down, nn.SiLU(), index)

    return Mixture(part(shared) if len(shared) else None, [part(index) for index in dealt],
                   gate.weight.shape[1], hyper["top_k"])  # fmt: skip


@pytest.mark.parametrize("run", ["ns", "sh"])
def test_mixtures_equal_the_reference(vectors: Vectors, run: str) -> None:
    rtol = stated_by(vectors.meta["tolerance"], r"outputs rtol ([\d.e-]+)")
    x = vectors.tensor(f"{run}_x")
    found = mixture(vectors, run)

    def close(y: Tensor, name: str) -> None:
        expected = vectors.tensor(f"{run}_{name}")
        torch.testing.assert_close(y, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))

    found.top_k = len(found.experts)
    close(found(x), "y_all_zero_router")
    close(found(x), "y_dense")
    found.top_k = vectors.meta["hyper"]["top_k"]
    found.router.weight = nn.Parameter(vectors.tensor(f"{run}_router"))
    found.gate.weight = nn.Parameter(vectors.tensor(f"{run}_gate_shared"))
    close(found(x), "y")


def test_layers_that_are_dropped_equal_the_reference(vectors: Vectors) -> None:
    rtol = stated_by(vectors.meta["tolerance"], r"outputs rtol ([\d.e-]+)")
    before, middle, after = (vectors.tensor(f"drop_{name}") for name in ("in", "mid", "out"))
    pairs = {"block": (before, after), "attn": (before, middle), "mlp": (middle, after)}
    assert {key.removeprefix("drop_cos_") for key in vectors if re.match("drop_cos_", key)} == set(pairs)
    for name, (x, y) in pairs.items():
        scores = [similarity(*pair) for pair in zip(x, y, strict=True)]
        expected = vectors.tensor(f"drop_cos_{name}")
        torch.testing.assert_close(torch.tensor(scores), expected, rtol=rtol, atol=rtol)
        count = int((1 - vectors.meta["hyper"]["drop_keep"]) * len(scores))
        assert most_alike(scores, count) == sorted(vectors[f"drop_idx_{name}"].tolist())
