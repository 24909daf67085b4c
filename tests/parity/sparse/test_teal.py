"""TEAL against the authors' code: thresholds, masked outputs, and the greedy search on a toy block."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.testing.parity import Vectors, stated_by
from methodbench.torchkit.activation_sparsity import SparseInput, Threshold, mask_inputs
from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_sparse.greedy import greedy_rows, nearest_row, output_error
from methodbench_sparse.teal import TEAL, Histogram

pytestmark = pytest.mark.vectors("sparse", "teal")


def limit(vectors: Vectors, pattern: str) -> float:
    """A number out of the sentence in which the vectors state their tolerances."""
    return stated_by(vectors.meta["tolerance"], pattern + r" ?([\d.]+(?:e-\d+)?)")


def histogram(vectors: Vectors, values: Tensor, bins: int | None = None) -> Histogram:
    hyper = vectors.meta["hyper"]
    return Histogram.of(values, bins or hyper["num_bins"], hyper["outlier_threshold"])


def test_thresholds_equal_the_reference_at_every_sparsity(vectors: Vectors) -> None:
    found = histogram(vectors, vectors.tensor("acts"))
    got = [found.threshold(share) for share in vectors["ps"].tolist()]
    assert got == pytest.approx(vectors["thresholds"].tolist(), rel=limit(vectors, "thresholds rtol"))


def test_a_coarse_histogram_equals_the_reference(vectors: Vectors) -> None:
    expected = vectors.tensor("hist200_counts")
    found = histogram(vectors, vectors.tensor("acts"), len(expected))
    assert torch.equal(found.counts, expected)
    torch.testing.assert_close(
        found.centers, vectors.tensor("hist200_centers"), rtol=limit(vectors, "thresholds rtol"), atol=0
    )


@pytest.mark.parametrize(
    ("array", "inputs", "positions"),
    [
        ("y_seq_prefill", "x_seq", "last-half"),
        ("y_seq_noprefill", "x_seq", "decode"),
        ("y_tok", "x_seq", "last-half"),
    ],
)
def test_masked_inputs_equal_the_reference(vectors: Vectors, array: str, inputs: str, positions: str) -> None:
    expected, x = vectors.tensor(array), vectors.tensor(inputs)
    x = x[:, : expected.shape[1]]
    threshold = histogram(vectors, vectors.tensor("acts")).threshold(vectors.meta["hyper"]["mask_sparsity"])
    identity = nn.Linear(x.shape[-1], x.shape[-1], bias=False)
    identity.weight = nn.Parameter(torch.eye(x.shape[-1]), requires_grad=False)
    model = LoadedModel("toy", "causal-lm", nn.Sequential(nn.Sequential(identity)), ADAPTER)
    mask_inputs(model, {"0.0": Threshold(threshold)}, positions)
    clear = (x.abs() - threshold).abs() > limit(vectors, "within") * threshold
    assert clear.float().mean() > 0.99
    assert torch.equal(model.module(x)[clear], expected[clear])


class ToyBlock(nn.Module):
    """``meta["toy"]``: single-head causal attention and a gated network behind norms without gain."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(f"{name}_proj", layer)

    def forward(self, x: Tensor) -> Tensor:
        h = norm(x)
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        logits = (q @ k.transpose(1, 2)) / q.shape[-1] ** 0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = x + self.o_proj(logits.masked_fill(future, -torch.inf).softmax(-1) @ v)
        h = norm(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(h)) * self.up_proj(h))


ADAPTER = Adapter(kind="causal-lm", stages=("0",))
NAMES = ("q", "k", "v", "o", "gate", "up", "down")


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def toy(vectors: Vectors) -> LoadedModel:
    block = ToyBlock({name: vectors.tensor(f"greedy_W_{name}") for name in NAMES})
    return LoadedModel("toy", "causal-lm", nn.Sequential(block).eval(), ADAPTER)


def test_the_greedy_search_takes_the_steps_of_the_reference(vectors: Vectors) -> None:
    hyper, rows, x = vectors.meta["hyper"]["greedy"], vectors["greedy_rows"], vectors.tensor("greedy_x")
    model = toy(vectors)
    histograms = TEAL(bins=vectors.meta["hyper"]["num_bins"])._histograms(model, Calibration(x), Context())
    sparse = model.clone()
    mask_inputs(sparse, {name: Threshold(0.0) for name in histograms}, "last-half")
    sizes = {name: model.module.get_submodule(name).weight.numel() for name in histograms}
    weights = {name: size / min(sizes.values()) for name, size in sizes.items()}

    def run(levels: Mapping[str, float]) -> list[Tensor]:
        for name, level in levels.items():
            layer = sparse.module.get_submodule(name)
            assert isinstance(layer, SparseInput)
            layer.rule.register_buffer("threshold", torch.as_tensor(histograms[name].threshold(level)))
        with torch.no_grad():
            return [sparse.module(x)]

    with torch.no_grad():
        dense = [model.module(x)]
    got = greedy_rows(run, dense, weights, hyper["target"], hyper["base_step"], hyper["last_fraction"])
    assert len(got) == len(rows)
    for row, expected in zip(got, rows, strict=True):
        assert row.effective == pytest.approx(expected[0])
        assert row.error == pytest.approx(expected[1], rel=limit(vectors, "errors rtol"))
        assert list(row.levels.values()) == pytest.approx(expected[3:].tolist())
    for expected in rows[:: len(rows) // 4]:
        uniform = run(dict.fromkeys(weights, float(expected[0])))
        assert output_error(uniform, dense, hyper["last_fraction"]) == pytest.approx(
            expected[2], rel=limit(vectors, "errors rtol")
        )
    assert nearest_row(got, hyper["target"]) in [row.levels for row in got]
