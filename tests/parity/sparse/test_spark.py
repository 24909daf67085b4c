"""Spark against transformers' Gemma 3n operator and a reference of the paper's equations."""

from __future__ import annotations

import pytest
import torch

from methodbench.testing.parity import Vectors, stated_by
from methodbench_sparse.spark import gaussian_threshold, spark_attention, spark_ffn, statistical_topk

pytestmark = pytest.mark.vectors("sparse", "spark")


def limit(vectors: Vectors, pattern: str) -> float:
    """A number out of the sentence in which the vectors state their tolerances."""
    return stated_by(vectors.meta["tolerance"], pattern + r" ?([\d.]+(?:e-\d+)?)")


def close(vectors: Vectors) -> dict[str, float]:
    return {"rtol": limit(vectors, "rtol"), "atol": limit(vectors, "atol")}


def test_the_operator_equals_gemma3n_at_every_sparsity(vectors: Vectors) -> None:
    for index, sparsity in enumerate(vectors.meta["hyper"]["sparsities"]):
        got = statistical_topk(vectors.tensor("x"), sparsity, unbiased=False)
        torch.testing.assert_close(got, vectors.tensor(f"gemma3n_{index}"), **close(vectors))


def test_the_operator_with_the_deviation_of_a_sample_equals_the_reference(vectors: Vectors) -> None:
    x = vectors.tensor("x")
    sparsity = 1 - vectors.meta["hyper"]["k"] / x.shape[-1]
    theta = gaussian_threshold(x, sparsity, unbiased=True)
    torch.testing.assert_close(theta, vectors.tensor("own_theta"), **close(vectors))
    torch.testing.assert_close(
        statistical_topk(x, sparsity), vectors.tensor("own_stat_topk"), **close(vectors)
    )


def test_the_feed_forward_network_equals_the_reference(vectors: Vectors) -> None:
    parts = (vectors.tensor(f"ffn_{name}") for name in ("q", "K1", "K2", "V"))
    y, gate = spark_ffn(*parts, vectors.meta["hyper"]["ffn"]["k"])
    torch.testing.assert_close(gate, vectors.tensor("own_ffn_gate"), **close(vectors))
    torch.testing.assert_close(y, vectors.tensor("own_ffn_y"), **close(vectors))


def test_attention_equals_the_reference(vectors: Vectors) -> None:
    hyper = vectors.meta["hyper"]["attn"]
    parts = (vectors.tensor(f"attn_{name}") for name in ("q", "k", "v"))
    y, kept = spark_attention(*parts, hyper["r"], hyper["k"])
    assert torch.equal(kept, vectors.tensor("own_attn_keep").bool())
    torch.testing.assert_close(y, vectors.tensor("own_attn_y"), **close(vectors))
