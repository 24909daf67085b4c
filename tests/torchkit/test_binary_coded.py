"""Binary-coded storage: what is packed comes back exactly, at the bytes that the format needs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from methodbench.errors import NotApplicableError
from methodbench.torchkit.binary_coded import (
    BinaryCoded,
    PackedBinary,
    Rotation,
    decode_powers,
    encode_powers,
    rotations_of,
    unrotate_sides,
)
from methodbench.torchkit.packed import pack_linear, packed_configs, rebuild
from methodbench.torchkit.size import tensor_bytes


def coded(
    rows: int, columns: int, bits: int, row_block: int, column_block: int, seed: int = 0
) -> BinaryCoded:
    """Random signs, and scales that are sums of three powers of two."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.rand(bits, rows, columns, generator=generator) < 0.5
    exponents = torch.randint(
        -9, 0, (rows // row_block, columns // column_block, bits, 3), generator=generator
    )
    exponents = exponents - 3 * torch.arange(3)
    return BinaryCoded(signs, torch.exp2(exponents.float()).sum(-1))


@settings(max_examples=60, deadline=None)
@given(
    exponents=st.lists(st.tuples(st.integers(-20, 10), st.booleans()), min_size=1, max_size=3),
    negative=st.booleans(),
)
def test_sums_of_powers_come_back_exactly(exponents: list[tuple[int, bool]], negative: bool) -> None:
    value = sum((-1.0 if minus else 1.0) * 2.0**e for e, minus in exponents) * (-1 if negative else 1)
    x = torch.tensor([value, 0.0, 1.0])
    if float(x[0]) != value:
        return
    encoded = encode_powers(x, 3)
    assert encoded.dtype == torch.uint8
    assert torch.equal(decode_powers(encoded), x)


def test_what_is_no_sum_of_so_few_powers_is_refused() -> None:
    assert torch.equal(decode_powers(encode_powers(torch.tensor([7.0]), 2)), torch.tensor([7.0]))
    with pytest.raises(ValueError, match="no sum of 2"):
        encode_powers(torch.tensor([0b1010101 / 64]), 2)
    with pytest.raises(ValueError, match="outside"):
        encode_powers(torch.tensor([2.0**-100]), 1)
    with pytest.raises(ValueError, match="finite"):
        encode_powers(torch.tensor([torch.nan]), 1)


@pytest.mark.parametrize(("row_block", "column_block"), [(12, 1), (4, 1), (1, 16), (3, 8)])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_the_matrix_is_the_sum_of_its_parts(bits: int, row_block: int, column_block: int) -> None:
    q = coded(12, 16, bits, row_block, column_block)
    dense = torch.zeros(12, 16)
    for i in range(bits):
        scale = q.scale[..., i].repeat_interleave(row_block, 0).repeat_interleave(column_block, 1)
        dense += torch.where(q.signs[i], 1.0, -1.0) * scale
    torch.testing.assert_close(q.dequantize(), dense)
    layer = PackedBinary.from_quantized(q, terms=3)
    back = layer.coded()
    assert torch.equal(back.signs, q.signs)
    assert torch.equal(back.scale, q.scale)
    assert torch.equal(layer.dequantize(), q.dequantize())


def test_bytes_are_those_of_the_format() -> None:
    layer = PackedBinary.from_quantized(coded(64, 96, 3, 64, 1), terms=3, perm=torch.randperm(96))
    assert tensor_bytes(layer) == 3 * 64 * 96 // 8 + 96 * 3 * 3 + 2 * 96
    plain = PackedBinary.from_quantized(coded(64, 96, 2, 8, 8))
    assert tensor_bytes(plain) == 2 * 64 * 96 // 8 + 8 * 12 * 2 * 2


@pytest.mark.parametrize("rotated", [False, True])
def test_state_dict_and_configuration_rebuild_the_layer_bit_for_bit(rotated: bool, tmp_path: Path) -> None:
    linear = nn.Linear(16, 12)
    model = nn.Sequential(nn.Sequential(linear), nn.ReLU())
    dense = copy.deepcopy(model)
    options = {"column_scale": torch.rand(16) + 0.5, "rotation_seed": 7} if rotated else {"terms": 3}
    model[0][0] = pack_linear(linear, coded(12, 16, 3, 12, 1), perm=torch.randperm(16), **options)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    rebuilt = rebuild(dense, packed_configs(model))
    rebuilt.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = torch.randn(3, 16)
    assert torch.equal(rebuilt(x), model(x))
    assert packed_configs(rebuilt) == packed_configs(model)


@pytest.mark.parametrize("n", [1, 7, 12, 36, 96])
def test_rotations_are_orthogonal_and_undone(n: int) -> None:
    rotation = Rotation.draw(n, 3)
    matrix = rotation.rotate(torch.eye(n)).T
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n), rtol=0, atol=1e-5)
    x = torch.randn(5, n)
    torch.testing.assert_close(rotation.rotate(x), x @ matrix.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rotation.unrotate(rotation.rotate(x)), x, rtol=1e-4, atol=1e-5)
    assert torch.equal(Rotation.draw(n, 3).rotate(x), rotation.rotate(x))


def test_both_sides_are_unrotated() -> None:
    weight = torch.randn(12, 16)
    left, right = rotations_of(weight.shape, 5)
    turned = left.rotate(right.rotate(weight).T).T
    torch.testing.assert_close(unrotate_sides(turned, 5), weight, rtol=1e-4, atol=1e-5)


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(NotApplicableError, match="blocks of 5 x 1"):
        PackedBinary(16, 12, 2, row_block=5, column_block=1)
    with pytest.raises(ValueError, match="do not fit"):
        BinaryCoded(torch.zeros(2, 12, 16, dtype=torch.bool), torch.zeros(5, 1, 2))


def test_half_precision_modules_keep_their_scales() -> None:
    layer = PackedBinary.from_quantized(coded(12, 16, 2, 12, 1), dtype=torch.bfloat16)
    scale = layer.scale.clone()
    layer.double()
    assert torch.equal(layer.scale, scale)
    assert layer.dequantize().dtype == torch.bfloat16
