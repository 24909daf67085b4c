"""Top-k thresholding and the counts of nonzero neurons against a reference implementation."""

from __future__ import annotations

import pytest
import torch

from methodbench.testing.parity import Vectors
from methodbench_sparse.lazy_neuron import Largest

pytestmark = pytest.mark.vectors("sparse", "lazy_neuron")


def test_topk_outputs_equal_the_reference(vectors: Vectors) -> None:
    activations = vectors.tensor("z").relu()
    for index, keep in enumerate(vectors["ks"].tolist()):
        mask = Largest(keep)(activations)
        assert torch.equal(activations.masked_fill(~mask, 0), vectors.tensor(f"topk_{index}"))
