"""LoRC against a trusted re-implementation: the corrected weight and what error is left at every rank."""

from __future__ import annotations

import re

import pytest
import torch

from methodbench.testing.parity import Vectors
from methodbench.torchkit.packed import PackedLinear
from methodbench.torchkit.quantizers import quantize
from methodbench_quant.llm.lorc import Compensated, LowRankLayer, low_rank

pytestmark = pytest.mark.vectors("quant", "lorc")


def test_the_base_weight_is_that_of_the_vectors(vectors: Vectors) -> None:
    ours = quantize(vectors.tensor("W"), vectors.meta["w_bit"], group_size=vectors.meta["group_size"])
    torch.testing.assert_close(ours.dequantize(), vectors.tensor("W_hat"), **vectors.meta["tolerance"])


def test_every_rank_gives_the_references_weight_and_error(vectors: Vectors) -> None:
    weight, base, tolerance = vectors.tensor("W"), vectors.tensor("W_hat"), vectors.meta["tolerance"]
    assert float(torch.linalg.norm(weight - base)) == pytest.approx(
        float(vectors["err_fro_base"]), rel=tolerance["rtol"]
    )
    for rank in vectors.meta["ranks"]:
        left, right = low_rank(weight - base, rank)
        ours = base + left @ right
        torch.testing.assert_close(ours, vectors.tensor(f"W_lorc_rank{rank}"), **tolerance)
        error = float(torch.linalg.norm(weight - ours))
        assert error == pytest.approx(float(vectors[f"err_fro_rank{rank}"]), rel=tolerance["rtol"])


def test_the_error_shrinks_by_the_singular_values_that_are_kept(vectors: Vectors) -> None:
    error = vectors.tensor("W").double() - vectors.tensor("W_hat").double()
    values = torch.linalg.svdvals(error)
    expected = vectors.tensor("singular_values")
    torch.testing.assert_close(values, expected, **vectors.meta["tolerance"])
    for rank in range(len(values) + 1):
        left, right = low_rank(error, rank)
        rest = torch.linalg.norm(error - left @ right)
        torch.testing.assert_close(
            rest, torch.linalg.norm(expected[rank:]).double(), **vectors.meta["tolerance"]
        )


def test_rounded_factors_leave_the_references_error(vectors: Vectors) -> None:
    weight, base, tolerance = vectors.tensor("W"), vectors.tensor("W_hat"), vectors.meta["tolerance"]
    packed = PackedLinear.from_quantized(quantize(weight, vectors.meta["w_bit"]))
    names = [found for name in vectors if (found := re.fullmatch(r"err_fro_int(\d+)_rank(\d+)_own", name))]
    assert {int(found[2]) for found in names} == set(vectors.meta["ranks"])
    for found in names:
        factors = low_rank(weight - base, int(found[2]))
        layer = LowRankLayer.from_quantized(Compensated(packed, *factors, int(found[1])))
        error = float(torch.linalg.norm(weight - (base + layer.product())))
        assert error == pytest.approx(float(vectors[found[0]]), rel=tolerance["rtol"])
