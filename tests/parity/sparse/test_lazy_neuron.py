"""Top-k thresholding and the counts of nonzero neurons against a reference implementation."""

from __future__ import annotations

import pytest
import torch

from methodbench.testing.parity import Vectors
from methodbench_sparse.lazy_neuron import Largest
from methodbench_sparse.nonzero_neurons import nonzeros

pytestmark = pytest.mark.vectors("sparse", "lazy_neuron")


def test_topk_outputs_equal_the_reference(vectors: Vectors) -> None:
    activations = vectors.tensor("z").relu()
    for index, keep in enumerate(vectors["ks"].tolist()):
        mask = Largest(keep)(activations)
        assert torch.equal(activations.masked_fill(~mask, 0), vectors.tensor(f"topk_{index}"))


def test_shares_of_nonzero_neurons_equal_the_reference(vectors: Vectors) -> None:
    activations, kept = vectors.tensor("z").relu(), vectors.tensor("pad_mask").bool()
    counts = nonzeros(activations, tokens=kept)
    assert float(counts.double().mean()) == pytest.approx(float(vectors["nonzero_share"]))
    torch.testing.assert_close(counts.double().mean(0), vectors.tensor("unit_freq"))
    per_token = nonzeros(activations).sum(-1).view_as(kept)
    assert torch.equal(per_token[kept], vectors.tensor("tok_count")[kept])
