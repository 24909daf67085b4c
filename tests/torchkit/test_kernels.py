"""Kernels against unpacking and multiplying: on a GPU, and on a CPU in Triton's interpreter."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from methodbench.torchkit.activation_sparsity import Site, SparseInput, Threshold, uncounted
from methodbench.torchkit.compressed import MaskedGroups
from methodbench.torchkit.kernels import has_triton
from methodbench.torchkit.packed import (
    PackedLinear,
    decoding,
    materialized,
    pack_linear,
    packed_layers,
)
from methodbench.torchkit.power_map import PackedPower
from methodbench.torchkit.quantizers import quantize
from methodbench.torchkit.sparse_gemv import KernelLinear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device() -> str:
    if INTERPRETED:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or Triton's interpreter (TRITON_INTERPRET=1)")
    return "cuda"


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.slow
@pytest.mark.skipif(
    INTERPRETED or torch.cuda.is_available(), reason="the kernels are tested here as they are"
)
@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_kernels_agree_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


# The interpreter is slow: there, one case of each width stands for all.
@pytest.mark.parametrize("symmetric", [False] if INTERPRETED else [False, True])
@pytest.mark.parametrize(
    ("columns", "group"), [(96, 48)] if INTERPRETED else [(96, 32), (96, -1), (256, 128), (96, 48)]
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_triton_packed_product_is_that_of_the_unpacked_weight(
    device, generator, bits, columns, group, symmetric
):
    from methodbench.torchkit.kernels.packed_gemv import Shape, fits, packed_gemv

    weight = torch.randn(40, columns, generator=generator)
    quantized = quantize(weight, bits, group_size=group, symmetric=symmetric)
    perm = torch.randperm(columns, generator=generator) if group in (32, 48) else None
    bias = torch.randn(40, generator=generator) if group != -1 else None
    layer = PackedLinear.from_quantized(quantized, bias=bias, perm=perm).to(device)
    assert fits(layer)
    x = torch.randn(1, 1, columns, generator=generator).to(device)
    expected = F.linear(
        x.double(), layer.dequantize().double(), None if bias is None else layer.bias.double()
    )
    for shape in (Shape(4, 2, 1), Shape(2, 1, 1, True)):
        y = packed_gemv(layer, x, shape)
        assert y.shape == (1, 1, 40)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


def test_triton_packed_product_takes_zero_points_off_the_grid(device, generator):
    from methodbench.torchkit.kernels.packed_gemv import SHAPES, packed_gemv

    weight = torch.rand(16, 64, generator=generator) + 3
    layer = PackedLinear.from_quantized(quantize(weight, 4, group_size=32, convention="omni")).to(device)
    assert layer.zero_storage == "int16"
    x = torch.randn(1, 64, generator=generator).to(device)
    torch.testing.assert_close(packed_gemv(layer, x, SHAPES[0]), layer(x), rtol=1e-4, atol=1e-3)


def test_triton_packed_product_takes_one_row_only(device):
    from methodbench.torchkit.kernels.packed_gemv import SHAPES, packed_gemv

    layer = PackedLinear.from_quantized(quantize(torch.ones(8, 32), 4)).to(device)
    with pytest.raises(ValueError, match="one row at a time, and x has 2"):
        packed_gemv(layer, torch.ones(2, 32, device=device), SHAPES[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["scalar", "scaled", "wide scale", "channels"])
@pytest.mark.parametrize("parts", [1, 4] if INTERPRETED else [1, 4, 8])
def test_triton_sparse_product_is_that_of_the_masked_input(device, generator, parts, kind, dtype):
    from methodbench.torchkit.kernels.sparse_gemv import Shape, SparseGEMV

    weight, bias = torch.randn(100, 150, generator=generator), torch.randn(100, generator=generator)
    x = torch.randn(1, 1, 150, generator=generator)
    x[..., ::3] = 0
    weight, bias, x = weight.to(device, dtype), bias.to(device, dtype), x.to(device, dtype)
    scale = torch.rand(150, generator=generator).to(device)
    # A score that equals the threshold in the precision that torch compares in.
    scores = (x.flatten() * scale.to(dtype)).abs() if kind == "scaled" else x.flatten().abs()
    threshold = scores[scores > 0.2].min().float()
    rule = {
        "scalar": Threshold(threshold),
        "scaled": Threshold(threshold, scale.to(dtype)),
        "wide scale": Threshold(threshold, scale),
        "channels": Threshold(threshold * (1 + scale)),
    }[kind].to(device)
    mask = rule(x)
    assert 0 < int(mask.sum()) < 100
    product = SparseGEMV(
        weight.T.contiguous(), Shape(32, 64, parts, 4), bias, threshold=rule.threshold, scale=rule.scale
    )
    expected = F.linear(x.masked_fill(~mask, 0).double(), weight.double(), bias.double())
    tolerance = 1e-4 if dtype is torch.float32 else 5e-3
    for _ in range(2):
        torch.testing.assert_close(product(x).double(), expected, rtol=tolerance, atol=tolerance)
    # The mask is torch's to the last element: an input more or less would show.
    one = SparseGEMV(torch.eye(150, dtype=dtype, device=device), Shape(32, 64, parts, 4),
                     threshold=rule.threshold, scale=rule.scale)  # fmt: skip
    assert torch.equal(one(x), x.masked_fill(~mask, 0))


@pytest.mark.parametrize("threshold", [0.0, 100.0])
def test_triton_sparse_product_at_the_ends(device, generator, threshold):
    from methodbench.torchkit.kernels.sparse_gemv import SHAPES, SparseGEMV

    weight = torch.randn(100, 150, generator=generator).to(device)
    x = torch.randn(1, 150, generator=generator).to(device)
    y = SparseGEMV(weight.T.contiguous(), SHAPES[0], threshold=torch.tensor(threshold))(x)
    torch.testing.assert_close(y, F.linear(x, weight) * (threshold == 0), rtol=1e-4, atol=1e-4)


def test_triton_sparse_product_never_reads_the_weight_of_a_zero(device, generator):
    from methodbench.torchkit.kernels.sparse_gemv import SHAPES, SparseGEMV

    transposed = torch.randn(64, 48, generator=generator)
    x = torch.randn(1, 64, generator=generator)
    x[:, 1::2] = 0
    expected = x @ transposed
    transposed[1::2] = float("nan")
    y = SparseGEMV(transposed.to(device), SHAPES[0])(x.to(device))
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_triton_product_of_weights_pruned_2_of_4(device, generator, dtype, biased):
    from methodbench.torchkit.kernels.nm_gemv import NMGEMV, Shape

    outputs, inputs = 20, 104
    weight = torch.randn(outputs, inputs, generator=generator)
    cut = torch.rand(outputs, inputs // 4, 4, generator=generator).argsort(-1) < 2
    cut[0, :3] = True  # Groups with fewer values than they have room for.
    linear = nn.Linear(inputs, outputs, bias=biased).requires_grad_(False)
    linear.weight.data = weight.masked_fill(cut.view_as(weight), 0)
    linear.to(dtype)
    layer = pack_linear(linear, MaskedGroups(linear.weight.detach(), 2, 4)).to(device)
    x = torch.randn(1, 1, inputs, generator=generator).to(device, dtype)
    bias = None if layer.bias is None else layer.bias.double()
    expected = F.linear(x.double(), layer.dequantize().double(), bias)
    for shape in (Shape(1, 32, 1), Shape(2, 64, 2), Shape(4, 16, 1)):
        y = NMGEMV(layer, shape)(x)
        assert y.dtype == dtype
        error = (y.double() - expected).norm() / expected.norm()
        assert float(error) < 4 * torch.finfo(dtype).eps


def test_triton_product_of_pruned_weights_says_what_it_takes(device):
    from methodbench.torchkit.kernels.nm_gemv import NMGEMV, SHAPES, fits

    eye = torch.eye(8, device=device)
    with pytest.raises(ValueError, match="one row at a time, and x has 2"):
        NMGEMV(pack_linear(linear_of(eye), MaskedGroups(eye, 2, 4)), SHAPES[0])(eye[:2])
    wide = pack_linear(linear_of(eye), MaskedGroups(eye, 4, 8))
    odd = pack_linear(linear_of(eye[:6]), MaskedGroups(eye[:6], 2, 4))
    assert not fits(wide)
    assert not fits(odd)
    with pytest.raises(ValueError, match="2:4 weights whose outputs four divides"):
        NMGEMV(wide, SHAPES[0])


def linear_of(weight):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
    linear.weight.data = weight
    return linear


def test_triton_layer_masks_by_its_rule_and_follows_its_weight(device, generator):
    from methodbench.torchkit.kernels.sparse_gemv import SHAPES

    linear = nn.Linear(64, 48)
    linear.requires_grad_(False)
    sparse = SparseInput(linear, Threshold(0.8), Site("input", "all", {"layer": 1.0})).to(device)
    layer = KernelLinear(sparse, SHAPES[0])
    token = torch.randn(1, 1, 64, generator=generator).to(device)
    masked = torch.where(token.abs() > 0.8, token, 0)
    torch.testing.assert_close(
        layer(token), F.linear(masked, sparse.weight, sparse.bias), rtol=1e-4, atol=1e-4
    )
    assert layer.site.sparsity == pytest.approx(float((token.abs() <= 0.8).float().mean()))
    with uncounted(layer):
        again = layer(token)
    torch.testing.assert_close(again, layer(token), rtol=0, atol=0)
    assert layer.site.tokens == 2, "uncounted tokens leave no trace"
    several = torch.randn(1, 3, 64, generator=generator).to(device)
    torch.testing.assert_close(
        layer(several), F.linear(torch.where(several.abs() > 0.8, several, 0), sparse.weight, sparse.bias)
    )
    other = copy.deepcopy(layer)
    other.weight.data.mul_(2)
    torch.testing.assert_close(
        other(token), F.linear(masked, 2 * sparse.weight, sparse.bias), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        layer(token), F.linear(masked, sparse.weight, sparse.bias), rtol=1e-4, atol=1e-4
    )


@pytest.mark.skipif(INTERPRETED, reason="measures, which an interpreter is no subject for")
@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 64), (4, -1), (8, -1), (8, 64)])
def test_decoding_multiplies_single_tokens_by_kernels(where, generator, bits, group):
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    linears = [nn.Linear(256, 256, dtype=torch.bfloat16) for _ in range(3)]
    perm = torch.randperm(256, generator=generator)
    module = nn.Sequential(
        *[
            pack_linear(linear, quantize(linear.weight.detach().float(), bits, group_size=group), perm=perm)
            for linear in linears
        ]
    ).to(where)
    token = torch.randn(1, 1, 256, generator=generator).bfloat16().to(where)
    several = torch.randn(2, 5, 256, generator=generator).bfloat16().to(where)
    with torch.no_grad(), materialized(module):
        expected, batch = module(token).float(), module(several)
    with torch.no_grad(), decoding(module) as kernels:
        assert set(kernels) <= set(packed_layers(module))
        y = module(token).float()
        # A kernel is for one token: what has more rows is multiplied as ever.
        assert torch.equal(module(several), batch)
    assert float((y - expected).norm() / expected.norm()) < 2e-2
    assert all(layer.kernel is None for layer in packed_layers(module).values())


def test_every_fitting_product_of_torch_agrees(generator):
    from methodbench.torchkit.kernels.packed import Int4Product, Int8Product

    for bits, group, kind in (
        (2, 32, Int4Product),
        (3, 64, Int4Product),
        (4, -1, Int4Product),
        (8, -1, Int8Product),
    ):
        for symmetric in (False, True):
            linear = nn.Linear(128, 64, dtype=torch.bfloat16)
            quantized = quantize(linear.weight.detach().float(), bits, group_size=group, symmetric=symmetric)
            layer = pack_linear(linear, quantized, perm=torch.randperm(128, generator=generator))
            assert isinstance(layer, PackedLinear)
            assert kind.fits(layer)
            x = torch.randn(1, 128, generator=generator).bfloat16()
            expected = F.linear(x.float(), layer.dequantize().float(), linear.bias.float())
            error = (kind(layer)(x).float() - expected).norm() / expected.norm()
            assert float(error) < 1e-2, (kind.name, bits, symmetric, float(error))


def test_formats_with_a_decoding_of_their_own_get_no_integer_kernel():
    from methodbench.torchkit.kernels.packed import choose

    assert choose({"layer": PackedPower(64, 64, 4, 32, dtype="bfloat16")}) == {}
