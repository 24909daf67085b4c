"""Properties of the uniform quantizers that hold for every weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from methodbench.errors import DivergedError, NotApplicableError
from methodbench.torchkit import quantizers
from methodbench.torchkit.activations import ActivationQuantizer
from methodbench.torchkit.quantizers import (
    CONVENTIONS,
    Convention,
    Quantized,
    UniformGrid,
    fake_quantize,
    find_grid,
    find_grid_by_mse,
    finite,
    groups_of,
    on_grid,
    quantize,
    quantize_static,
)

FORMS = [
    (name, symmetric) for name in CONVENTIONS for symmetric in (False, True) if symmetric or name != "absmax"
]
forms = st.sampled_from(FORMS)
widths = st.sampled_from([2, 3, 4, 8])


def weight_of(seed: int, rows: int = 6, columns: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    # One row of either sign alone, one silent row: where conventions differ.
    weight[0].abs_()
    weight[1].abs_().neg_()
    weight[2] = 0
    return weight


def quantized(
    seed: int, form: tuple[Convention, bool], bits: int, group_size: int = -1
) -> tuple[Tensor, Quantized]:
    weight = weight_of(seed)
    return weight, quantize(weight, bits, group_size=group_size, convention=form[0], symmetric=form[1])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), form=forms, bits=widths, group_size=st.sampled_from([-1, 4, 16]))
def test_codes_stay_on_a_grid_of_2_to_the_bits_levels(
    seed: int, form: tuple[Convention, bool], bits: int, group_size: int
) -> None:
    _, q = quantized(seed, form, bits, group_size)
    assert int(q.codes.min()) >= q.low
    assert int(q.codes.max()) <= q.low + 2**bits - 1
    for row in groups_of(q.dequantize(), group_size).flatten(0, 1):
        assert len(row.unique()) <= 2**bits


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), bits=widths)
def test_values_inside_the_range_move_by_half_a_step_at_most(seed: int, bits: int) -> None:
    for form in FORMS:
        weight, q = quantized(seed, form, bits)
        inside = (q.codes > q.low) & (q.codes < q.low + 2**bits - 1)
        error = (q.dequantize() - weight).abs()
        assert bool((error <= q.scale * 0.5 * (1 + 1e-5) + 1e-6)[inside].all()), form


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), form=forms, bits=widths)
def test_one_group_as_wide_as_the_row_equals_per_channel(
    seed: int, form: tuple[Convention, bool], bits: int
) -> None:
    weight, channel = quantized(seed, form, bits)
    _, group = quantized(seed, form, bits, weight.shape[1])
    assert torch.equal(channel.codes, group.codes)
    assert torch.equal(channel.scale, group.scale)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), form=forms, bits=widths, power=st.integers(-3, 6))
def test_scaling_by_a_power_of_two_scales_the_result_exactly(
    seed: int, form: tuple[Convention, bool], bits: int, power: int
) -> None:
    weight = weight_of(seed)[3:]
    options = {"bits": bits, "convention": form[0], "symmetric": form[1]}
    once = quantize(weight, **options).dequantize()
    assert torch.equal(quantize(weight * 2.0**power, **options).dequantize(), once * 2.0**power)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.sampled_from([3, 4, 8]))
def test_absmax_is_idempotent(seed: int, bits: int) -> None:
    x = weight_of(seed)
    once = fake_quantize(x, bits)
    torch.testing.assert_close(fake_quantize(once, bits), once, rtol=1e-6, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), bits=widths, convention=st.sampled_from(["awq_asym", "gptq"]))
def test_zero_stays_zero_where_the_zero_point_is_on_the_grid(
    seed: int, bits: int, convention: Convention
) -> None:
    weight = weight_of(seed)
    weight[:, ::5] = 0
    result = quantize(weight, bits, convention=convention).dequantize()
    assert bool((result[:, ::5] == 0).all())


@pytest.mark.parametrize(("convention", "symmetric"), FORMS)
def test_a_silent_row_stays_silent(convention: Convention, symmetric: bool) -> None:
    q = quantize(torch.zeros(2, 8), 4, convention=convention, symmetric=symmetric)
    assert torch.equal(q.dequantize(), torch.zeros(2, 8))


def test_gptq_clips_a_symmetric_row_without_negative_values_as_the_authors_do() -> None:
    row = torch.linspace(0.1, 1.0, 16)[None]
    q = quantize(row, 4, convention="gptq", symmetric=True)
    # The step is that of [0, 1] on 16 levels, but only 7 of them lie above zero.
    assert float(q.scale) == pytest.approx(1 / 15)
    assert float(q.dequantize().max()) == pytest.approx(7 / 15)


def test_omni_does_not_confine_the_zero_point_to_the_grid() -> None:
    q = quantize(torch.linspace(5.0, 6.0, 16)[None], 4, convention="omni")
    assert q.zero is not None
    assert float(q.zero) < 0
    torch.testing.assert_close(q.dequantize(), torch.linspace(5.0, 6.0, 16)[None], rtol=0, atol=1 / 30 + 1e-5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.sampled_from([2, 3, 4]), symmetric=st.booleans())
def test_the_clip_search_never_increases_its_error(seed: int, bits: int, symmetric: bool) -> None:
    weight = weight_of(seed).unsqueeze(1)
    plain = quantize(weight[:, 0], bits, convention="gptq", symmetric=symmetric).dequantize()
    searched = on_grid(weight, find_grid_by_mse(weight, bits, symmetric=symmetric), bits).dequantize()
    before = (plain - weight[:, 0]).abs().pow(2.4).sum(-1)
    after = (searched - weight[:, 0]).abs().pow(2.4).sum(-1)
    assert bool((after <= before * (1 + 1e-5)).all())
    if bits == 2:
        assert float(after.sum()) < float(before.sum())


def test_more_bits_never_hurt() -> None:
    for form in FORMS:
        errors = []
        for bits in (2, 3, 4, 8):
            weight, q = quantized(0, form, bits, 8)
            # Rows of one sign are clipped by design in some conventions.
            errors.append(float((q.dequantize() - weight)[3:].square().mean()))
        assert errors == sorted(errors, reverse=True), form


def test_a_width_that_groups_do_not_divide_is_refused_by_name() -> None:
    with pytest.raises(NotApplicableError, match=r"blocks\.0\.fc1 has 30 .* group size 16"):
        quantize(torch.ones(2, 30), 4, group_size=16, name="blocks.0.fc1")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("convention", "symmetric"), FORMS)
def test_weights_that_are_not_finite_are_refused(bad: float, convention: Convention, symmetric: bool) -> None:
    weight = torch.ones(2, 8)
    weight[1, 3] = bad
    with pytest.raises(DivergedError, match="fc1 holds NaN or infinity"):
        quantize(weight, 4, convention=convention, symmetric=symmetric, name="fc1")


def test_absmax_has_no_asymmetric_form() -> None:
    with pytest.raises(ValueError, match="symmetric only"):
        quantize(torch.ones(2, 8), 4, convention="absmax")


def test_tokens_are_quantized_independently_of_each_other() -> None:
    x = weight_of(1)
    x[4] *= 1000
    alone = torch.stack([ActivationQuantizer(4)(token[None])[0] for token in x])
    assert torch.equal(ActivationQuantizer(4)(x), alone)
    assert not torch.equal(ActivationQuantizer(4, granularity="tensor")(x), alone)


def test_half_precision_activations_stay_in_half_precision() -> None:
    x = weight_of(2).half()
    result = fake_quantize(x, 8)
    assert result.dtype == torch.float16
    torch.testing.assert_close(result.float(), x.float(), rtol=0, atol=float(x.abs().max()) / 127)


def test_static_quantization_clamps_what_exceeds_the_calibrated_range() -> None:
    x = torch.tensor([-9.0, -1.0, 0.5, 1.0, 9.0])
    torch.testing.assert_close(quantize_static(x, 1.0, 8), torch.tensor([-1.0, -1.0, 64 / 127, 1.0, 1.0]))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), form=forms, bits=widths, group_size=st.sampled_from([-1, 2, 3]))
def test_groups_along_the_output_are_those_of_the_transposed_weight(
    seed: int, form: tuple[Convention, bool], bits: int, group_size: int
) -> None:
    weight = weight_of(seed)
    options = {"bits": bits, "group_size": group_size, "convention": form[0], "symmetric": form[1]}
    ours = quantize(weight, along="output", **options).dequantize()
    assert torch.equal(ours, quantize(weight.T.contiguous(), **options).dequantize().T)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"group_size": 8}, {"along": "tensor"}, {"along": "output"}])
def test_rounding_some_rows_at_a_time_changes_nothing(
    form: tuple[Convention, bool], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weight_of(5, rows=9)
    whole = quantize(weight, 4, convention=form[0], symmetric=form[1], **options)
    monkeypatch.setattr(quantizers, "_ENCODED_AT_ONCE", 70)
    parts = quantize(weight, 4, convention=form[0], symmetric=form[1], **options)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.dequantize(), whole.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    assert finite(torch.empty(0, dtype=dtype))
    for place in (0, 17, 32):
        x = torch.zeros(3, 11, dtype=dtype)
        assert finite(x)
        x.view(-1)[place] = bad
        assert not finite(x)


def test_one_grid_for_the_tensor_is_that_of_its_extremes() -> None:
    weight = weight_of(5)
    q = quantize(weight, 4, along="tensor")
    flat = quantize(weight.reshape(1, -1), 4)
    assert torch.equal(q.dequantize(), flat.dequantize().view_as(weight))
    with pytest.raises(ValueError, match="no group size"):
        quantize(weight, 4, along="tensor", group_size=8)


def test_an_axis_that_groups_do_not_divide_says_which() -> None:
    with pytest.raises(NotApplicableError, match="fc1 has 30 output rows"):
        quantize(torch.ones(30, 4), 4, group_size=16, along="output", name="fc1")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), form=forms, bits=widths)
def test_passing_through_gives_the_snapped_values_and_the_gradient_of_the_identity(
    seed: int, form: tuple[Convention, bool], bits: int
) -> None:
    x = weight_of(seed).requires_grad_()
    grid = find_grid(x.detach(), bits, form[0], symmetric=form[1])
    out = grid.pass_through(x)
    torch.testing.assert_close(out.detach(), grid.snap(x.detach()))
    out.sum().backward()
    steps = x.detach() / grid.scale + (0 if grid.zero is None else grid.zero)
    # Half a step beyond the last code a value still rounds to it.
    inside = (steps.round() >= grid.low) & (steps.round() <= grid.high)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, inside.float())


def test_the_scale_learns_from_rounding_and_from_clamping() -> None:
    scale = torch.tensor([1.0], requires_grad=True)
    x = torch.tensor([0.3, 2.6, 100.0])
    UniformGrid(scale, None, -8, 7).pass_through(x).sum().backward()
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, torch.tensor([(0 - 0.3) + (3 - 2.6) + 7]))


def test_clipping_factors_learn_through_the_grid() -> None:
    weight = weight_of(7)[3:]
    factor = torch.full((3, 1), 0.9, requires_grad=True)
    grid = find_grid(weight, 4, "omni", clip=(factor, factor))
    (grid.pass_through(weight) - weight).square().sum().backward()
    assert factor.grad is not None
    assert bool((factor.grad != 0).all())
