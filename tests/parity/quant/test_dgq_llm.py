"""DGQ against the authors' code: both searches, percentile smoothing and static activations."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from methodbench.testing.parity import Vectors
from methodbench.torchkit.quantizers import quantize, quantize_static
from methodbench_quant.llm.dgq import DGQ, Grains, on_groups, percentile_scale, search_groups, search_rows

pytestmark = pytest.mark.vectors("quant", "dgq_llm")


def matches(actual: Tensor, vectors: Vectors, name: str) -> None:
    tolerance = vectors.meta["tolerance"]
    expected = vectors.tensor(name).view_as(actual)
    equal = torch.isclose(actual, expected, rtol=tolerance["rtol"], atol=tolerance["atol"])
    assert float(equal.float().mean()) >= tolerance["min_match"], name


def error(vectors: Vectors, weight: Tensor) -> float:
    x = vectors.tensor("X", torch.float32)[-1]
    return float((x @ (weight - vectors.tensor("W")).T).square().mean())


def phase_one(vectors: Vectors) -> tuple[Tensor, Tensor]:
    x = vectors.tensor("X", torch.float32)[-1]
    return search_groups(vectors.tensor("W"), x, vectors.meta["w_bit"], vectors.meta["group_size"])


def phase_two(vectors: Vectors) -> Grains:
    x = vectors.tensor("X", torch.float32)[-1]
    return search_rows(vectors.tensor("W"), x, *phase_one(vectors), vectors.meta["w_bit"])


def test_phase_one_finds_the_authors_scales(vectors: Vectors) -> None:
    scale, zero = phase_one(vectors)
    matches(scale, vectors, "p1_scale")
    matches(zero, vectors, "p1_zero")
    weight = on_groups(vectors.tensor("W"), scale, zero, vectors.meta["w_bit"]).dequantize()
    matches(weight, vectors, "p1_weight")
    tolerance = vectors.meta["tolerance"]["mse_rtol"]
    assert error(vectors, weight) == pytest.approx(float(vectors["mse_p1_weight"]), rel=tolerance)


def test_phase_two_finds_the_authors_grains(vectors: Vectors) -> None:
    grains = phase_two(vectors)
    matches(grains.multiplier, vectors, "p2_int_scale")
    matches(grains.zero, vectors, "p2_zero")
    matches(grains.scale8, vectors, "p2_scale8")
    weight = grains.quantized().dequantize()
    matches(weight, vectors, "p2_weight")
    tolerance = vectors.meta["tolerance"]["mse_rtol"]
    assert error(vectors, weight) == pytest.approx(float(vectors["mse_p2_weight"]), rel=tolerance)


def test_weights_are_8_bit_integers_times_one_scale_per_row(vectors: Vectors) -> None:
    grains = phase_two(vectors)
    assert int(grains.integers().abs().max()) <= 127
    assert float(grains.multiplier.min()) >= 1
    ours, theirs = grains.integers() * grains.scale8[:, None], grains.quantized().dequantize()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["naive_weight", "naive_channel_weight"])
def test_the_naive_weights_are_the_authors_and_worse(vectors: Vectors, name: str) -> None:
    group_size = -1 if "channel" in name else vectors.meta["group_size"]
    ours = quantize(
        vectors.tensor("W"), vectors.meta["w_bit"], group_size=group_size, convention="gptq"
    ).dequantize()
    matches(ours, vectors, name)
    assert error(vectors, phase_two(vectors).quantized().dequantize()) < error(vectors, ours)


def test_percentile_smoothing_is_the_authors(vectors: Vectors) -> None:
    absmax = vectors.tensor("sm_act_absmax")
    scale = percentile_scale(absmax, DGQ().percentile)
    tolerance = {key: vectors.meta["tolerance"][key] for key in ("rtol", "atol")}
    for name, ours in (
        ("sm_ln_w_after", vectors.tensor("sm_ln_w") / scale),
        ("sm_ln_b_after", vectors.tensor("sm_ln_b") / scale),
        ("sm_fc0_w_after", vectors.tensor("sm_fc0_w") * scale),
        ("sm_act_absmax_after", absmax / scale),
    ):
        torch.testing.assert_close(ours, vectors.tensor(name), **tolerance)


def test_static_activations_are_the_authors(vectors: Vectors) -> None:
    x = vectors.tensor("X", torch.float32)
    lowest = x.abs().amax(1).amin(0)
    matches(lowest, vectors, "inp_absmax_min")
    assert float(lowest.max()) == pytest.approx(float(vectors["act_static_absmax"]))
    names = [found for name in vectors if (found := re.fullmatch(r"act_static_a(\d+)", name))]
    assert names
    limits = {key: vectors.meta["tolerance"][key] for key in ("rtol", "atol")}
    for found in names:
        expected = vectors.tensor(found[0])
        ours = torch.stack([quantize_static(sample, lowest.max(), int(found[1])) for sample in x])
        assert any(torch.allclose(sample, expected, **limits) for sample in ours)
