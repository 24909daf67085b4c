"""The four quantizer conventions against the code of the papers that use them."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from methodbench.testing.parity import Vectors
from methodbench.torchkit.packed import PackedLinear
from methodbench.torchkit.quantizers import (
    fake_quantize,
    find_grid_by_mse,
    on_grid,
    quantize,
    quantize_static,
)

pytestmark = pytest.mark.vectors("quant", "rtn")


def close(actual: Tensor, vectors: Vectors, name: str) -> None:
    tolerance = vectors.meta["tolerance"]
    torch.testing.assert_close(actual, vectors.tensor(name, actual.dtype), **tolerance)


def named(vectors: Vectors, pattern: str) -> list[re.Match[str]]:
    """Every output whose name follows ``pattern``; the numbers of bits are part of the names."""
    found = [match for name in vectors if (match := re.fullmatch(pattern, name))]
    assert found, f"no output of the vectors is called {pattern}"
    return found


def test_awq_asym_gives_the_authors_values_scales_and_zeros(vectors: Vectors) -> None:
    weight = vectors.tensor("W")
    for match in named(vectors, r"awq_w(\d+)_(group|channel)"):
        group_size = vectors.meta["group_size"] if match[2] == "group" else -1
        quantized = quantize(weight, int(match[1]), group_size=group_size, convention="awq_asym")
        close(quantized.dequantize(), vectors, match[0])
        if f"{match[0]}_scale" in vectors:
            assert quantized.zero is not None
            close(quantized.scale, vectors, f"{match[0]}_scale")
            close(quantized.zero, vectors, f"{match[0]}_zero")


def test_gptq_gives_the_authors_values_scales_and_zeros(vectors: Vectors) -> None:
    weight = vectors.tensor("W")
    for match in named(vectors, r"gptq_w(\d+)_(asym|sym)(_mse)?"):
        bits, symmetric = int(match[1]), match[2] == "sym"
        if match[3]:
            grid = find_grid_by_mse(weight.unsqueeze(1), bits, symmetric=symmetric)
            quantized = on_grid(weight.unsqueeze(1), grid, bits)
        else:
            quantized = quantize(weight, bits, convention="gptq", symmetric=symmetric)
        close(quantized.dequantize(), vectors, match[0])
        close(quantized.scale, vectors, f"{match[0]}_scale")
        # A symmetric grid has its zero point at code 0; the authors count codes from 0 up.
        zero = torch.full_like(quantized.scale, -quantized.low) if quantized.zero is None else quantized.zero
        close(zero, vectors, f"{match[0]}_zero")


def test_absmax_gives_the_authors_weights_and_activations(vectors: Vectors) -> None:
    weight, x = vectors.tensor("W"), vectors.tensor("X")
    for match in named(vectors, r"absmax_w(\d+)_channel"):
        quantized = quantize(weight, int(match[1]), convention="absmax", symmetric=True)
        close(quantized.dequantize(), vectors, match[0])
    for match in named(vectors, r"absmax_w(\d+)_tensor"):
        close(fake_quantize(weight, int(match[1]), granularity="tensor"), vectors, match[0])
    for match in named(vectors, r"absmax_a(\d+)_token"):
        close(fake_quantize(x, int(match[1]), granularity="token"), vectors, match[0])
    for match in named(vectors, r"absmax_a(\d+)_tensor"):
        close(fake_quantize(x, int(match[1]), granularity="tensor"), vectors, match[0])


def test_omni_gives_the_authors_weights_and_activations(vectors: Vectors) -> None:
    weight, x = vectors.tensor("W"), vectors.tensor("X")
    for match in named(vectors, r"omni_w(\d+)_channel"):
        close(quantize(weight, int(match[1]), convention="omni").dequantize(), vectors, match[0])
    for match in named(vectors, r"omni_w(\d+)_sym"):
        quantized = quantize(weight, int(match[1]), convention="omni", symmetric=True)
        close(quantized.dequantize(), vectors, match[0])
    for match in named(vectors, r"omni_w(\d+)_group_lwc(\d+)"):
        factor = float(torch.sigmoid(torch.tensor(float(match[2]))))
        quantized = quantize(
            weight,
            int(match[1]),
            group_size=vectors.meta["group_size"],
            convention="omni",
            clip=(factor, factor),
        )
        close(quantized.dequantize(), vectors, match[0])
    for match in named(vectors, r"omni_a(\d+)_token"):
        close(fake_quantize(x, int(match[1]), convention="omni", symmetric=False), vectors, match[0])


def test_static_activation_quantization_is_the_authors(vectors: Vectors) -> None:
    absmax = vectors.tensor("static_absmax")
    for match in named(vectors, r"static_a(\d+)_clip\d+"):
        close(quantize_static(vectors.tensor("X"), absmax, int(match[1])), vectors, match[0])


def test_packing_keeps_the_authors_values_to_the_precision_of_the_scales(vectors: Vectors) -> None:
    weight = vectors.tensor("W")
    for match in named(vectors, r"awq_w(\d+)_group"):
        quantized = quantize(weight, int(match[1]), group_size=vectors.meta["group_size"])
        packed = PackedLinear.from_quantized(quantized)
        torch.testing.assert_close(
            packed.dequantize(),
            vectors.tensor(match[0]),
            rtol=torch.finfo(torch.float16).eps,
            atol=vectors.meta["tolerance"]["atol"],
        )
