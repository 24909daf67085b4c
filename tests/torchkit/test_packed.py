"""Packed layers: exact codes, real bytes, and the same function as their dense weight."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from methodbench.errors import MethodbenchError, NotApplicableError
from methodbench.torchkit.activations import ActivationQuantizer
from methodbench.torchkit.floats import FloatFormat, quantize_float
from methodbench.torchkit.packed import (
    WIDTHS,
    PackedFloat,
    PackedLinear,
    dense_linear,
    materialized,
    pack,
    pack_linear,
    packed_configs,
    packed_length,
    rebuild,
    unpack,
)
from methodbench.torchkit.quantizers import (
    CONVENTIONS,
    Convention,
    fake_quantize,
    quantize,
)
from methodbench.torchkit.size import tensor_bytes

FORMS = [
    (name, symmetric) for name in CONVENTIONS for symmetric in (False, True) if symmetric or name != "absmax"
]


def linear(seed: int = 0, inputs: int = 64, outputs: int = 12, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias).eval()


def packed(
    layer: nn.Linear, bits: int = 4, group_size: int = 16, form: tuple[Convention, bool] = FORMS[0]
) -> PackedLinear:
    q = quantize(layer.weight.detach(), bits, group_size=group_size, convention=form[0], symmetric=form[1])
    return pack_linear(layer, q)


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(WIDTHS), count=st.integers(1, 200), seed=st.integers(0, 10**6))
def test_packing_is_exact_at_every_length(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    stored = pack(codes, bits)
    assert stored.dtype == torch.uint8
    assert stored.numel() == packed_length(count, bits)
    assert torch.equal(unpack(stored, bits, count), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_wastes_less_than_one_word(bits: int) -> None:
    # Codes of 5, 6 and 7 bits are two packings.
    words = {3: 3, 5: 2, 6: 2, 7: 4}.get(bits, 1)
    for count in range(1, 50):
        assert 0 <= packed_length(count, bits) - count * bits / 8 < words


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(WIDTHS),
    low=st.integers(-128, 0),
    count=st.integers(1, 50),
    seed=st.integers(0, 10**6),
)
def test_the_lowest_code_is_stored_as_zero(bits: int, low: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    shifted = (codes + low).to(torch.int16)
    assert torch.equal(pack(shifted, bits, low=low), pack(codes, bits))
    assert torch.equal(shifted, (codes + low).to(torch.int16))


@pytest.mark.parametrize("codes", [[-1], [4]])
def test_codes_beyond_the_width_are_refused(codes: list[int]) -> None:
    with pytest.raises(ValueError, match="between 0 and 3"):
        pack(torch.tensor(codes), 2)


def test_a_width_that_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="9 bits"):
        pack(torch.tensor([1]), 9)


@pytest.mark.parametrize("bits", WIDTHS[1:])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group_size", [-1, 16])
def test_codes_and_zero_points_survive_packing(
    bits: int, form: tuple[Convention, bool], group_size: int
) -> None:
    weight = linear().weight.detach().clone()
    weight[0] += 3
    q = quantize(weight, bits, group_size=group_size, convention=form[0], symmetric=form[1])
    layer = PackedLinear.from_quantized(q)
    assert torch.equal(layer.integers(), q.codes)
    zeros = layer.zero_points()
    assert (zeros is None) == (q.zero is None)
    if zeros is not None and q.zero is not None:
        assert torch.equal(zeros.float(), q.zero)
    torch.testing.assert_close(layer.dequantize(), q.dequantize(), rtol=2.0**-10, atol=1e-6)


def test_the_layer_computes_with_its_dequantized_weight() -> None:
    source = linear()
    layer, x = packed(source), torch.randn(2, 5, 64)
    expected = nn.functional.linear(x, layer.dequantize(), source.bias)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.weight, layer.dequantize())


def test_four_bits_in_groups_of_128_take_what_arithmetic_says() -> None:
    layer = packed(linear(inputs=1024, outputs=256, bias=False), 4, 128)
    least = 256 * 1024 * 4 / 8 + 256 * 8 * (16 + 4) / 8
    assert least <= tensor_bytes(layer) <= 1.02 * least


@pytest.mark.parametrize("bits", WIDTHS[1:])
def test_a_symmetric_format_stores_no_zero_points(bits: int) -> None:
    layer = packed(linear(bias=False), bits, 16, ("gptq", True))
    assert tensor_bytes(layer) == packed_length(12 * 64, bits) + 12 * 4 * 2


def test_scales_that_half_precision_would_lose_are_kept_in_single() -> None:
    tiny, huge, plain = linear(), linear(), linear()
    with torch.no_grad():
        tiny.weight.mul_(1e-6)
        huge.weight.mul_(1e8)
    for source, dtype in ((tiny, torch.float32), (huge, torch.float32), (plain, torch.float16)):
        layer = pack_linear(source, quantize(source.weight.detach(), 8, convention="gptq"))
        assert layer.scale.dtype == dtype
        weight = source.weight.detach()
        torch.testing.assert_close(layer.dequantize(), weight, rtol=0, atol=float(weight.abs().max()) / 100)


def test_permuted_columns_come_back_in_the_order_of_the_inputs() -> None:
    source = linear()
    perm = torch.randperm(64)
    q = quantize(source.weight.detach()[:, perm], 8, group_size=16)
    layer = PackedLinear.from_quantized(q, perm=perm)
    torch.testing.assert_close(layer.dequantize(), source.weight.detach(), rtol=0, atol=2e-3)
    assert layer.perm is not None
    assert layer.perm.dtype == torch.int16


@pytest.mark.parametrize("form", FORMS)
def test_state_dict_and_configuration_rebuild_the_layer_bit_for_bit(
    form: tuple[Convention, bool], tmp_path: Path
) -> None:
    perm = torch.randperm(64)
    source = linear()
    q = quantize(source.weight.detach() + 2, 3, group_size=16, convention=form[0], symmetric=form[1])
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 12)), nn.ReLU())
    dense = copy.deepcopy(model)
    model[0][0] = pack_linear(source, q, perm=perm)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    rebuilt = rebuild(dense, dict(packed_configs(model)))
    rebuilt.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = torch.randn(3, 64)
    assert torch.equal(rebuilt(x), model(x))
    assert packed_configs(rebuilt) == packed_configs(model)


def test_rebuilding_names_a_layer_that_is_not_there() -> None:
    with pytest.raises(MethodbenchError, match=r"no layer block\.fc1"):
        rebuild(nn.Sequential(), {"block.fc1": packed(linear()).config})


def test_converting_the_module_keeps_the_scales() -> None:
    layer = packed(linear())
    scale = layer.scale.clone()
    layer.double()
    assert torch.equal(layer.scale, scale)
    assert layer(torch.randn(2, 64, dtype=torch.float64)).dtype == torch.float64


def test_a_half_precision_layer_gives_half_precision_weights() -> None:
    layer = packed(linear().to(torch.bfloat16), 4)
    assert layer.dequantize().dtype == torch.bfloat16
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_materialized_computes_the_same_and_leaves_no_trace() -> None:
    model = nn.Sequential(packed(linear()), nn.Linear(12, 3), packed(linear(1, 3 * 16, 5)))
    x = torch.randn(4, 64)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    size = tensor_bytes(model)
    before = model[0](x)
    with materialized(model) as inner:
        assert inner is model
        assert model[0].materialized
        assert torch.equal(model[0](x), before)
        assert tensor_bytes(model) == size
        with materialized(model):
            pass
        assert model[0].materialized
    assert not model[0].materialized
    assert not model[2].materialized
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_materialized_ends_when_the_evaluation_fails() -> None:
    layer = packed(linear())
    with pytest.raises(RuntimeError, match="stop"), materialized(layer):
        raise RuntimeError("stop")
    assert not layer.materialized


def test_the_input_quantizer_rounds_the_input() -> None:
    source = linear()
    q = quantize(source.weight.detach(), 8)
    layer = pack_linear(source, q, input_quantizer=ActivationQuantizer(4))
    x = torch.randn(3, 64)
    expected = nn.functional.linear(fake_quantize(x, 4), layer.dequantize(), source.bias)
    assert torch.equal(layer(x), expected)
    with materialized(layer):
        assert torch.equal(layer(x), expected)


def test_packing_leaves_the_source_alone() -> None:
    source = linear()
    before: Tensor = source.weight.detach().clone()
    layer = packed(source)
    assert torch.equal(source.weight, before)
    assert not layer.training


def test_a_packed_layer_is_refused_as_a_source() -> None:
    with pytest.raises(
        NotApplicableError, match=r"layer blocks\.0\.q is quantized already \(4 bits, groups of \d+\)"
    ):
        dense_linear(packed(linear()), "blocks.0.q")


def test_another_kind_of_layer_is_refused_as_a_source() -> None:
    with pytest.raises(NotApplicableError, match="layer conv is a Conv2d"):
        dense_linear(nn.Conv2d(1, 1, 1), "conv")


@pytest.mark.parametrize("name", ["e2m1", "e3m0", "e1m2", "e4m3", "e5m2", "e3m2"])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_floating_point_codes_survive_packing_and_a_state_dict(
    name: str, group_size: int, tmp_path: Path
) -> None:
    source = linear()
    q = quantize_float(source.weight.detach(), FloatFormat.parse(name), group_size=group_size)
    layer = pack_linear(source, q)
    assert isinstance(layer, PackedFloat)
    assert torch.equal(layer.integers(), q.codes)
    torch.testing.assert_close(layer.dequantize(), q.dequantize(), rtol=2.0**-10, atol=0)
    groups = 1 if group_size == -1 else 4
    assert tensor_bytes(layer) == 12 * 64 * q.format.bits // 8 + 12 * groups * 2 + 12 * 4
    model = nn.Sequential(layer)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    rebuilt = rebuild(nn.Sequential(nn.Linear(64, 12)), packed_configs(model))
    rebuilt.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = torch.randn(3, 64)
    assert torch.equal(rebuilt(x), model(x))
    with materialized(rebuilt):
        assert torch.equal(rebuilt(x), model(x))
    assert layer.half().scale.dtype == torch.float16


def test_groups_along_the_output_are_stored_transposed(tmp_path: Path) -> None:
    source = linear()
    q = quantize(source.weight.detach(), 3, group_size=6, along="output")
    assert q.scale.shape == (64, 2)
    layer = pack_linear(source, q)
    torch.testing.assert_close(layer.dequantize(), q.dequantize(), rtol=2.0**-10, atol=1e-6)
    rebuilt = rebuild(nn.Sequential(nn.Linear(64, 12)), packed_configs(nn.Sequential(layer)))
    rebuilt.load_state_dict(nn.Sequential(layer).state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(rebuilt(x), layer(x))


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_scale_for_the_whole_weight_is_stored_once(symmetric: bool) -> None:
    source = linear(bias=False)
    q = quantize(source.weight.detach(), 8, along="tensor", symmetric=symmetric)
    layer = pack_linear(source, q)
    assert isinstance(layer, PackedLinear)
    assert torch.equal(layer.integers(), q.codes)
    assert tensor_bytes(layer) == 12 * 64 + 2 + (0 if symmetric else 1)
    torch.testing.assert_close(layer.dequantize(), q.dequantize(), rtol=2.0**-10, atol=1e-6)
    rebuilt = rebuild(nn.Sequential(nn.Linear(64, 12)), packed_configs(nn.Sequential(layer)))
    rebuilt.load_state_dict(nn.Sequential(layer).state_dict())
    assert torch.equal(rebuilt[0].weight, layer.weight)


def test_a_format_that_is_not_known_is_named() -> None:
    with pytest.raises(MethodbenchError, match="layer 0 is stored as morse; known formats: integer, float"):
        rebuild(nn.Sequential(nn.Linear(2, 2)), {"0": {"format": "morse"}})


def test_conversion_and_back_leaves_scales_as_they_were() -> None:
    layer = packed(linear())
    before, weight = layer.scale.clone(), layer.dequantize()
    layer.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(layer.scale, before)
    assert torch.equal(layer.dequantize(), weight)
