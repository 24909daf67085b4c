"""CATS against the authors' code: histogram, thresholds, and outputs of a masked network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from methodbench.testing.parity import Vectors, stated_by
from methodbench.torchkit.activation_sparsity import (
    Threshold,
    feed_forwards,
    mask_neurons,
    measured,
)
from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.model import LoadedModel
from methodbench_sparse.cats import bin_edges, gate_counts, threshold

pytestmark = pytest.mark.vectors("sparse", "cats")


def limit(vectors: Vectors, pattern: str) -> float:
    """A number out of the sentence in which the vectors state their tolerances."""
    return stated_by(vectors.meta["tolerance"], pattern + r" ?([\d.]+(?:e-\d+)?)")


class MLP(nn.Module):
    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(f"{name}_proj", layer)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.fixture
def model(vectors: Vectors) -> LoadedModel:
    mlp = MLP({name: vectors.tensor(name) for name in ("gate", "up", "down")})
    return LoadedModel(
        "toy", "causal-lm", nn.Sequential(mlp).eval(), Adapter(kind="causal-lm", stages=("0",))
    )


def counts_of(model: LoadedModel, vectors: Vectors) -> Tensor:
    mlp = model.module[0]
    return gate_counts(mlp.act_fn(mlp.gate_proj(vectors.tensor("calib"))))


def test_the_histogram_equals_the_reference(model: LoadedModel, vectors: Vectors) -> None:
    torch.testing.assert_close(bin_edges(), vectors.tensor("bins"))
    expected = vectors.tensor("hist_counts", torch.int64)
    got = counts_of(model, vectors)
    assert int(got.sum()) == int(expected.sum())
    assert (got - expected).abs().max() <= limit(vectors, r"counts exact up to \+-")


def test_thresholds_equal_the_reference(model: LoadedModel, vectors: Vectors) -> None:
    counts = counts_of(model, vectors)
    got = [threshold(counts, share) for share in vectors["ss"].tolist()]
    # Bin edges are float32.
    assert got == pytest.approx(vectors["thresholds"].tolist(), abs=torch.finfo(torch.float32).eps)


def test_masked_outputs_and_shares_equal_the_reference(model: LoadedModel, vectors: Vectors) -> None:
    for index, t in enumerate(vectors["thresholds"].tolist()):
        sparse = model.clone()
        mask_neurons(sparse, [(network, Threshold(t)) for network in feed_forwards(sparse)], "all")
        with torch.no_grad():
            got = sparse.module(vectors.tensor("x")[None])[0]
        theirs, rtol = vectors.tensor(f"y_{index}"), limit(vectors, "outputs rtol")
        torch.testing.assert_close(got, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))
        realized = float(vectors[f"realized_{index}"])
        assert measured(sparse)["sparsity_neurons"] == pytest.approx(realized)
