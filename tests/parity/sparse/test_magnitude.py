"""Magnitude pruning against the reference in the authors' code of Wanda."""

from __future__ import annotations

import pytest
import torch

from methodbench.testing.parity import Vectors
from methodbench_sparse.magnitude import Magnitude
from methodbench_sparse.masks import nm_mask, parse_pattern

pytestmark = pytest.mark.vectors("sparse", "magnitude")


def test_unstructured_weights_equal_the_reference_at_every_sparsity(vectors: Vectors) -> None:
    weight = vectors.tensor("W")
    sparsities = vectors.meta["hyper"]["sparsity"]
    assert sparsities
    for index, sparsity in enumerate(sparsities):
        pruned = weight.masked_fill(Magnitude(sparsity=sparsity).mask(weight), 0)
        assert torch.equal(pruned, vectors.tensor(f"W_u{index}")), f"sparsity {sparsity}"


def test_nm_weights_equal_the_reference_for_every_pattern(vectors: Vectors) -> None:
    weight = vectors.tensor("W")
    patterns = vectors.meta["hyper"]["nm"]
    assert patterns
    for pattern in patterns:
        zeros_group = parse_pattern(pattern)
        assert zeros_group is not None
        pruned = weight.masked_fill(nm_mask(weight.abs(), *zeros_group), 0)
        assert torch.equal(pruned, vectors.tensor(f"W_{pattern.replace(':', 'of')}")), pattern
