"""Integer arithmetic gives what the simulation gives, layer by layer and from images to logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.testing import planted
from methodbench.torchkit.model import LoadedModel
from methodbench.torchkit.packed import PackedLinear
from methodbench.torchkit.quantizers import Quantized
from methodbench_quant.vit.adaround import AdaRound
from methodbench_quant.vit.integers import (
    IntegerConv2d,
    IntegerInput,
    IntegerLinear,
    IntegerMatMul,
    NoIntegerForm,
    check_range,
    use_integers,
)
from methodbench_quant.vit.minmax import MinMaxViT
from methodbench_quant.vit.repq_vit import RepQViT
from methodbench_quant.vit.sites import QuantizedMatMul, Uniform

IMAGES = planted.inputs("vit", 12, 1)


def compared(quantized: LoadedModel, images: Tensor) -> tuple[float, dict[str, str], LoadedModel]:
    """Return the largest difference of logits relative to the largest logit, what stayed, and the exact model."""
    exact, left = use_integers(quantized)
    with torch.no_grad():
        simulated, found = quantized.module(images), exact.module(images)
    return float((found - simulated).abs().max() / simulated.abs().max()), left, exact


def parts(model: LoadedModel, kind: type) -> int:
    return sum(isinstance(part, kind) for part in model.module.modules())


def test_a_vision_transformer_of_one_grid_per_tensor_is_integer_throughout() -> None:
    quantized = MinMaxViT(w_bits=8, a_bits=8).compress(planted.build("vit"), IMAGES, Context())
    difference, left, exact = compared(quantized, IMAGES.inputs)
    assert left == {}
    blocks = len(exact.adapter.blocks(exact.module))
    assert parts(exact, IntegerMatMul) == 2 * blocks
    assert parts(exact, IntegerConv2d) == 1
    # A float sum that lies on a rounding boundary may fall on its other side, and what follows with it.
    assert difference < 0.02


@pytest.mark.parametrize("round_zero", [True, False])
def test_folded_scales_are_integer_where_the_shared_zero_point_is(round_zero: bool) -> None:
    method = RepQViT(w_bits=8, a_bits=8, softmax="uniform", round_zero=round_zero)
    quantized = method.compress(planted.build("vit"), IMAGES, Context())
    difference, left, _ = compared(quantized, IMAGES.inputs)
    if round_zero:
        assert left == {}
    else:
        assert left
        assert all("no integer" in reason for reason in left.values())
    assert difference < 0.02


def test_powers_of_the_root_of_two_stay_in_floating_point_and_are_named() -> None:
    quantized = RepQViT(w_bits=4, a_bits=4, round_zero=True).compress(planted.build("vit"), IMAGES, Context())
    _, left, exact = compared(quantized, IMAGES.inputs)
    blocks = len(exact.adapter.blocks(exact.module))
    assert len(left) == blocks
    assert all("not on a uniform grid (LogSqrt2)" in reason for reason in left.values())


def test_a_convolutional_network_is_integer_throughout() -> None:
    images = planted.inputs("cnn", 8, 1)
    method = AdaRound(w_bits=4, a_bits=8, iterations=2, a_iterations=0)
    quantized = method.compress(planted.build("cnn", outliers=False), images, Context())
    difference, left, exact = compared(quantized, images.inputs)
    assert left == {}
    assert parts(exact, IntegerConv2d) > 1
    assert difference < 0.02


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_layer_agrees_to_the_rounding_of_float_sums(bits: int) -> None:
    draw = planted.generator(0)
    codes = torch.randint(2**bits, (20, 48), generator=draw).to(torch.int16)
    scale, zero = (
        torch.rand(20, 1, generator=draw) + 0.1,
        torch.randint(2**bits, (20, 1), generator=draw).float(),
    )
    layer = PackedLinear.from_quantized(
        Quantized(codes, scale, zero, 0, bits), bias=torch.randn(20, generator=draw)
    )
    layer.scale = scale
    layer.input_quantizer = Uniform(torch.tensor(0.037), torch.tensor(100.0), 8)
    x = torch.randn(3, 5, 48, generator=draw) * 2
    exact = IntegerLinear(layer)
    torch.testing.assert_close(exact(x), layer(x), rtol=1e-5, atol=1e-4)
    assert exact.weight.dtype == torch.int32
    # In double precision the simulated sum is exact too.
    steps = exact.input(x).double() @ exact.weight.double().T
    assert torch.equal(steps, (exact.input(x) @ exact.weight.T).double())


def test_padding_is_zero_whatever_the_zero_point() -> None:
    images = planted.inputs("cnn", 4, 2)
    quantized = AdaRound(w_bits=8, a_bits=8, iterations=0, a_iterations=0).compress(
        planted.build("cnn", outliers=False), images, Context()
    )
    difference, _, _ = compared(quantized, images.inputs + 3)
    assert difference < 0.02


def test_what_has_no_integer_form_says_why() -> None:
    def refused(quantizer: Any) -> str:
        with pytest.raises(NoIntegerForm) as caught:
            IntegerInput(quantizer, "its input")
        return str(caught.value)

    assert "not on a uniform grid" in refused(nn.Identity())
    assert "grid per channel" in refused(Uniform(torch.ones(4), torch.zeros(4), 8))
    assert "no integer (0.500)" in refused(Uniform(torch.tensor(1.0), torch.tensor(0.5), 8))
    with pytest.raises(NoIntegerForm, match="32 bits do not hold"):
        check_range(torch.full((1, 2**16), 127, dtype=torch.int32), 255 * 2)
    check_range(torch.full((1, 1000), 127, dtype=torch.int32), 255)


def test_products_that_could_overflow_are_an_error() -> None:
    wide = Uniform(torch.tensor(1.0), torch.tensor(-30000.0), 8)
    product = IntegerMatMul(QuantizedMatMul(wide, wide))
    with pytest.raises(OverflowError, match="do not fit 32 bits"):
        product(torch.ones(1, 1, 8), torch.ones(1, 8, 1))
