"""LLM-FP4 against the authors' code: grids, and the three variants on one layer."""

from __future__ import annotations

import re

import pytest
import torch

from methodbench.testing.parity import Vectors
from methodbench.torchkit.floats import FloatFormat, FloatGrid
from methodbench_quant.llm.llm_fp4 import LLMFP4, Searched, Variant

pytestmark = pytest.mark.vectors("quant", "llm_fp4")


def searched(vectors: Vectors, variant: Variant, *, authors_compat: bool = False) -> Searched:
    meta = vectors.meta
    low, high, candidates = meta["search_intervals"]
    method = LLMFP4(
        bits=meta["w_bit"],
        a_bits=meta["a_bit"],
        exponent=meta["start_exponent_bits"],
        variant=variant,
        low=low,
        high=high,
        candidates=candidates,
        rounds=meta["search_round"],
        search_tokens=0,
        authors_compat=authors_compat,
    )
    x = vectors.tensor("X", torch.float32).flatten(0, 1)
    return method.search(vectors.tensor("W"), x, x.abs().amax(0))


def test_grids_are_the_authors(vectors: Vectors) -> None:
    tolerance = vectors.meta["tolerance"]
    found = [match for name in vectors if (match := re.fullmatch(r"grid_E(\d)M(\d)_B(\S+)", name))]
    assert found
    for match in found:
        grid = FloatGrid.from_bias(torch.tensor(float(match[3])), FloatFormat(int(match[1]), int(match[2])))
        equal = torch.isclose(
            grid.snap(vectors.tensor("grid_x")),
            vectors.tensor(match[0]),
            rtol=tolerance["rtol"],
            atol=tolerance["atol"],
        )
        assert float(equal.float().mean()) >= tolerance["min_match"], match[0]


@pytest.mark.parametrize("authors_compat", [False, True], ids=["repaired", "published"])
@pytest.mark.parametrize("variant", ["minmax", "baseline", "fpq"])
def test_formats_biases_and_values_are_the_authors(
    vectors: Vectors, variant: Variant, authors_compat: bool
) -> None:
    ours, tolerance = (
        searched(vectors, variant, authors_compat=authors_compat),
        vectors.meta["tolerance"],
    )
    of_variant = f"{variant}_code" if authors_compat else variant
    w, a = ours.weight.format, ours.activation.format
    assert [w.exponent, w.mantissa, a.exponent, a.mantissa] == vectors[f"{of_variant}_formats"].tolist()
    options = {"rtol": tolerance["rtol"], "atol": tolerance["atol"]}
    weight = ours.weight.snap(vectors.tensor("W"))
    x = vectors.tensor("X", torch.float32)
    for name, value in (("W_q", weight), ("X_q", ours.activation.snap(x[0]))):
        equal = torch.isclose(value, vectors.tensor(f"{of_variant}_{name}"), **options)
        assert float(equal.float().mean()) >= tolerance["min_match"], name
    assert float(ours.rho) == pytest.approx(float(vectors[f"{of_variant}_a_bias"][0]), rel=tolerance["rtol"])
    if ours.channels is not None and not authors_compat:
        torch.testing.assert_close(ours.channels, vectors.tensor("fpq_channel_bias_b"), **options)
        expected = vectors.tensor("fpq_channel_bias_effective")
        torch.testing.assert_close(ours.activation.bias, expected, **options)
    error = float((ours.activation.snap(x) @ weight.T - x @ vectors.tensor("W").T).square().mean())
    assert error == pytest.approx(float(vectors[f"mse_{of_variant}"]), rel=tolerance["mse_rtol"])


def test_each_part_of_the_method_lowers_the_error(vectors: Vectors) -> None:
    errors = [float(vectors[f"mse_{variant}"]) for variant in ("minmax", "baseline", "fpq")]
    assert errors == sorted(errors, reverse=True)
