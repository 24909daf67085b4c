"""Floating-point grids: their levels, their codes, and what holds for every format."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from methodbench.errors import DivergedError, NotApplicableError
from methodbench.torchkit.floats import (
    FloatFormat,
    FloatGrid,
    fake_quantize_float,
    find_float_grid,
    maximum_bias,
    quantize_float,
)

FORMATS = [FloatFormat(e, m) for e in range(1, 6) for m in range(7) if 2 <= FloatFormat(e, 0).bits + m <= 8]
formats = st.sampled_from(FORMATS)


def values(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.exp2(
        torch.randint(-6, 3, shape, generator=generator)
    )


def papers_rounding(x: Tensor, format: FloatFormat, bias: float) -> Tensor:
    """LLM-FP4's equation, in float64."""
    x = x.double()
    m = format.mantissa
    c = (2 - 2.0**-m) * 2.0 ** (2**format.exponent - 1 - bias)
    clipped = x.clamp(-c, c)
    p = torch.floor(torch.log2(clipped.abs()) + bias).clamp(min=1)
    step = torch.exp2(p - m - bias)
    return (clipped / step).round() * step


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("e2m1", [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        ("e3m0", [0, 0.25, 0.5, 1, 2, 4, 8, 16]),
        ("e1m2", [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]),
    ],
)
def test_four_bit_formats_have_their_known_levels(name: str, expected: list[float]) -> None:
    format = FloatFormat.parse(name)
    assert format.name == name
    assert format.bits == 4
    levels = format.levels()
    torch.testing.assert_close(levels / levels[1] * expected[1], torch.tensor(expected).double())
    assert float(levels[-1]) == format.top


def test_eight_bits_cover_the_range_of_hardware_formats() -> None:
    # Hardware spends the last code of E4M3 on NaN: its largest number is the level before.
    levels = FloatFormat(4, 3).levels()
    assert float(levels[-2] / levels[1]) == 448 / 2.0**-9


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), format=formats, bias=st.floats(-3, 12))
def test_snapping_is_the_papers_equation(seed: int, format: FloatFormat, bias: float) -> None:
    x = values(seed, 200).double()
    grid = FloatGrid.from_bias(torch.tensor(bias, dtype=torch.float64), format)
    torch.testing.assert_close(float(grid.bias), bias)
    expected = papers_rounding(x, format, bias)
    ours = grid.snap(x)
    # At a tie of two levels one unit in the last place decides.
    assert float(torch.isclose(ours, expected, rtol=1e-9, atol=0).float().mean()) > 0.98


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), format=formats)
def test_no_level_is_nearer_than_the_one_chosen(seed: int, format: FloatFormat) -> None:
    x = values(seed, 4, 32)
    grid = find_float_grid(x, format)
    snapped = grid.snap(x)
    levels = torch.cat([format.levels(), -format.levels()]).float() * grid.scale[:, :, None]
    nearest = (x[..., None] - levels).abs().amin(-1)
    torch.testing.assert_close((x - snapped).abs(), nearest, rtol=1e-4, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), format=formats)
def test_codes_decode_to_what_snapping_gives_and_fit_the_bits(seed: int, format: FloatFormat) -> None:
    x = values(seed, 4, 32)
    grid = find_float_grid(x, format)
    codes = grid.encode(x)
    assert torch.equal(codes, codes.round())
    assert float(codes.abs().max()) <= format.highest
    assert torch.equal(grid.decode(codes), grid.snap(x))
    assert torch.equal(grid.snap(grid.snap(x)), grid.snap(x))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), format=formats, power=st.integers(-4, 6))
def test_scaling_by_a_power_of_two_scales_the_result_exactly(
    seed: int, format: FloatFormat, power: int
) -> None:
    x = values(seed, 4, 32)
    once = fake_quantize_float(x, format)
    assert torch.equal(fake_quantize_float(x * 2.0**power, format), once * 2.0**power)


def test_the_bias_of_a_maximum_makes_it_the_largest_level() -> None:
    maximum = torch.tensor([0.3, 1.0, 7.0])
    for format in FORMATS:
        grid = FloatGrid.from_bias(maximum_bias(maximum, format), format)
        torch.testing.assert_close(grid.snap(maximum * 2), maximum)


def test_more_mantissa_bits_help_narrow_values_and_more_exponent_bits_wide_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    narrow = torch.rand(4, 256, generator=generator) - 0.5
    wide = torch.exp(3 * torch.randn(4, 256, generator=generator))

    def error(x: Tensor, name: str) -> Tensor:
        return (fake_quantize_float(x, FloatFormat.parse(name)) - x).abs()

    assert float(error(narrow, "e1m2").mean()) < float(error(narrow, "e3m0").mean())
    relative = {name: float((error(wide, name) / wide).mean()) for name in ("e1m2", "e3m0")}
    assert relative["e3m0"] < relative["e1m2"]


def test_gradients_pass_inside_the_range_and_reach_the_scale() -> None:
    scale = torch.tensor([[1.0]], requires_grad=True)
    x = torch.tensor([[0.2, -0.7, 1.4, 9.0, -9.0]], requires_grad=True)
    format = FloatFormat(2, 1)
    grid = FloatGrid(scale, format)
    out = grid.pass_through(x)
    assert torch.equal(out.detach(), FloatGrid(scale.detach(), format).snap(x.detach()))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 1, 1, 0, 0]]
    levels = out.detach() / scale.detach()
    expected = (levels - x.detach())[0, :3].sum() + (1.5 - 1.5)
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad[0, 0], expected)


def test_half_precision_keeps_the_smallest_levels() -> None:
    format = FloatFormat(5, 2)
    x = (format.levels() * 2.0**10).half()
    assert torch.equal(fake_quantize_float(x, format), x)


def test_a_quantized_matrix_counts_its_groups_and_decodes() -> None:
    weight = values(3, 6, 32)
    q = quantize_float(weight, FloatFormat(2, 1), group_size=8)
    assert q.group_size == 8
    assert q.scale.shape == (6, 4)
    grouped = weight.view(6, 4, 8)
    assert torch.equal(q.dequantize(), find_float_grid(grouped, q.format).snap(grouped).flatten(1))


def test_bad_weights_and_widths_are_refused_by_name() -> None:
    with pytest.raises(NotApplicableError, match=r"fc1 has 30 .* group size 16"):
        quantize_float(torch.ones(2, 30), FloatFormat(2, 1), group_size=16, name="fc1")
    with pytest.raises(DivergedError, match="fc1 holds NaN or infinity"):
        quantize_float(torch.full((2, 8), math.nan), FloatFormat(2, 1), name="fc1")


def test_a_silent_row_stays_silent() -> None:
    assert not quantize_float(torch.zeros(2, 8), FloatFormat(3, 0)).dequantize().any()


@pytest.mark.parametrize("name", ["e0m3", "e6m1", "e4m4", "e2", "int4", "m2e1"])
def test_a_name_that_is_no_format_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="format"):
        FloatFormat.parse(name)
