"""GPTQ against the authors' code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from methodbench.testing.parity import Vectors
from methodbench.torchkit.compensation import Hessian, add_batch
from methodbench_quant.llm.gptq import gptq

pytestmark = pytest.mark.vectors("quant", "gptq")


def hessian_of(vectors: Vectors) -> Hessian:
    x = vectors.tensor("X", torch.float32)
    hessian = Hessian(torch.zeros(x.shape[-1], x.shape[-1]))
    for sequence in x:
        add_batch(hessian, sequence)
    return hessian


def limits(vectors: Vectors) -> dict[str, float]:
    return {name: vectors.meta["tolerance"][name] for name in ("rtol", "atol")}


def options(vectors: Vectors, variant: dict[str, Any]) -> dict[str, Any]:
    return {
        "bits": variant["bits"],
        "symmetric": variant.get("sym", False),
        "group_size": variant.get("groupsize", -1),
        "percdamp": variant.get("percdamp", vectors.meta["percdamp"]),
        "blocksize": variant.get("blocksize", vectors.meta["blocksize"]),
        "act_order": variant.get("actorder", False),
        "static_groups": variant.get("static_groups", False),
        "mse": variant.get("mse", False),
    }


def test_the_hessian_counts_sequences(vectors: Vectors) -> None:
    hessian = hessian_of(vectors)
    assert hessian.sequences == len(vectors["X"])
    torch.testing.assert_close(hessian.matrix, vectors.tensor("H"), **limits(vectors))


def test_a_batch_of_sequences_counts_like_the_sequences_one_by_one(vectors: Vectors) -> None:
    x = vectors.tensor("X", torch.float32)
    batch = Hessian(torch.zeros(x.shape[-1], x.shape[-1]))
    add_batch(batch, x)
    torch.testing.assert_close(batch.matrix, hessian_of(vectors).matrix, **limits(vectors))


def test_every_variant_gives_the_authors_weights(vectors: Vectors) -> None:
    tolerance = vectors.meta["tolerance"]
    weight, hessian = vectors.tensor("W"), hessian_of(vectors)
    for name, variant in vectors.meta["variants"].items():
        ours = gptq(weight, hessian.matrix, **options(vectors, variant)).dequantize()
        theirs = vectors.tensor(name)
        matching = torch.isclose(ours, theirs, rtol=tolerance["rtol"], atol=tolerance["atol"]).float().mean()
        assert float(matching) >= tolerance["min_match"], (
            f"{name}: {float(matching):.4f} of the entries match"
        )


def test_every_variant_has_the_authors_output_error(vectors: Vectors) -> None:
    weight, hessian, x = vectors.tensor("W"), hessian_of(vectors), vectors.tensor("X", torch.float32)
    for name, variant in vectors.meta["variants"].items():
        ours = gptq(weight, hessian.matrix, **options(vectors, variant)).dequantize()
        error = float((x @ (ours - weight).T).square().mean())
        expected = float(vectors[f"mse_{name}"])
        assert error == pytest.approx(expected, rel=vectors.meta["tolerance"]["mse_rtol"]), name
