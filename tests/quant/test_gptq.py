"""GPTQ: error feedback helps, and its degenerate cases are plain rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.compensation import Hessian, add_batch, inverse_factor
from methodbench.torchkit.model import Calibration, LoadedModel, set_weight
from methodbench.torchkit.packed import PackedLinear
from methodbench.torchkit.quantizers import quantize
from methodbench_quant.llm.gptq import GPTQ, gptq
from methodbench_quant.llm.rtn import RTN

Tiny = Callable[[str], LoadedModel]


def layer(seed: int, rows: int = 12, columns: int = 48, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs, one of which is always zero."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) @ mixing
    x[:, 7] = 0
    hessian = Hessian(torch.zeros(columns, columns))
    add_batch(hessian, x)
    return torch.randn(rows, columns, generator=generator), hessian.matrix


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    delta = rounded - weight
    return float(((delta @ hessian) * delta).sum())


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([2, 3, 4]),
    group_size=st.sampled_from([-1, 16]),
    act_order=st.booleans(),
)
def test_feedback_beats_rounding_by_a_fifth_on_correlated_inputs(
    seed: int, bits: int, group_size: int, act_order: bool
) -> None:
    weight, hessian = layer(seed)
    nearest = quantize(weight, bits, group_size=group_size, convention="gptq").dequantize()
    ours = gptq(weight, hessian, bits=bits, group_size=group_size, act_order=act_order).dequantize()
    assert output_error(weight, ours, hessian) < 0.8 * output_error(weight, nearest, hessian)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.sampled_from([2, 3, 4, 8]), group_size=st.sampled_from([-1, 16]))
def test_white_inputs_make_it_rounding_bit_for_bit(seed: int, bits: int, group_size: int) -> None:
    weight, _ = layer(seed)
    rounded = gptq(weight, 3.0 * torch.eye(weight.shape[1]), bits=bits, group_size=group_size)
    nearest = quantize(weight, bits, group_size=group_size, convention="gptq")
    assert torch.equal(rounded.quantized.codes, nearest.codes)
    assert torch.equal(rounded.quantized.scale, nearest.scale)


@pytest.mark.parametrize("blocksize", [1, 5, 32, 48, 1000])
def test_the_block_size_changes_nothing_but_rounding(blocksize: int) -> None:
    weight, hessian = layer(3)
    reference = gptq(weight, hessian, bits=4, blocksize=48)
    other = gptq(weight, hessian, bits=4, blocksize=blocksize)
    assert other.loss == pytest.approx(reference.loss, rel=0.02)
    assert float((other.quantized.codes != reference.quantized.codes).float().mean()) < 0.02


def test_the_factor_of_the_hessian_does_not_matter() -> None:
    weight, hessian = layer(4)
    once = gptq(weight, hessian, bits=3).quantized.codes
    assert torch.equal(gptq(weight, 16 * hessian, bits=3).quantized.codes, once)


def test_columns_without_input_become_zero() -> None:
    weight, hessian = layer(5)
    for act_order in (False, True):
        rounded = gptq(weight, hessian, bits=3, act_order=act_order).dequantize()
        assert not rounded[:, 7].any()


def test_no_input_at_all_gives_plain_rounding() -> None:
    weight, _ = layer(6)
    rounded = gptq(weight, torch.zeros(48, 48), bits=3, group_size=16)
    assert torch.equal(rounded.quantized.codes, quantize(weight, 3, group_size=16, convention="gptq").codes)


def test_the_reported_loss_is_the_output_error() -> None:
    weight, hessian = layer(7)
    rounded = gptq(weight, hessian, bits=3, percdamp=1e-6)
    # The sum of the errors that single roundings add is the error of the whole, but for dead columns.
    assert rounded.loss == pytest.approx(output_error(weight, rounded.dequantize(), hessian) / 2, rel=0.05)


def test_the_factor_is_the_cholesky_factor_of_the_inverse() -> None:
    _, hessian = layer(8)
    hessian[7, 7] = 1
    upper, damping = inverse_factor(hessian, 0.01)
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(48)).double()
    expected = torch.linalg.cholesky(torch.linalg.inv(damped)).mT
    assert damping == 0.01
    torch.testing.assert_close(upper.double(), expected, rtol=1e-3, atol=1e-5)


def test_an_indefinite_hessian_gets_more_damping() -> None:
    weight, _ = layer(9)
    hessian = torch.eye(48)
    hessian[0, 1] = hessian[1, 0] = 1.05
    rounded = gptq(weight, hessian, bits=4)
    assert rounded.damping == pytest.approx(0.1)
    assert bool(torch.isfinite(rounded.dequantize()).all())


def test_a_hessian_beyond_damping_is_an_error() -> None:
    hessian = torch.eye(48)
    hessian[0, 1] = hessian[1, 0] = 5
    with pytest.raises(DivergedError, match=r"fc1 is not positive definite"):
        gptq(layer(0)[0], hessian, bits=4, name="fc1")


def test_calibration_that_is_not_finite_is_an_error() -> None:
    weight, hessian = layer(1)
    hessian[3, 3] = torch.nan
    with pytest.raises(DivergedError, match="activations that enter fc1 hold NaN"):
        gptq(weight, hessian, bits=4, name="fc1")
    weight[0, 0] = torch.inf
    with pytest.raises(DivergedError, match="fc1 holds NaN or infinity"):
        gptq(weight, layer(1)[1], bits=4, name="fc1")


def test_ordered_columns_need_a_permutation_only_with_groups_of_their_own() -> None:
    weight, hessian = layer(2)
    options = {"bits": 3, "act_order": True}
    assert gptq(weight, hessian, **options).perm is None
    assert gptq(weight, hessian, group_size=16, static_groups=True, **options).perm is None
    assert gptq(weight, hessian, group_size=16, **options).perm is not None


def compressed(
    model: LoadedModel, data: Calibration, ctx: Context | None = None, **options: object
) -> LoadedModel:
    return build(GPTQ, options, "gptq").compress(model, data, ctx or Context())


@pytest.mark.parametrize("name", ["llama", "opt", "mixture"])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_models_come_out_closer_to_dense_than_rounded(
    tiny: Tiny,
    tokens: Calibration,
    error: Callable[[LoadedModel, LoadedModel], float],
    name: str,
    group_size: int,
) -> None:
    model = tiny(name)
    nearest = RTN(bits=3, group_size=group_size, convention="gptq").compress(model, tokens, Context())
    ours = compressed(model, tokens, bits=3, group_size=group_size)
    assert error(ours, model) < error(nearest, model)
    assert ours.storage == "real"
    assert ours.accounted_bits == nearest.accounted_bits
    assert all(isinstance(m, PackedLinear) for m in ours.adapter.targets(ours.module).values())


@pytest.mark.parametrize(
    "options",
    [
        {"act_order": True},
        {"act_order": True, "group_size": 16},
        {"act_order": True, "group_size": 16, "static_groups": True},
        {"true_sequential": True},
        {"symmetric": True, "group_size": 16},
        {"mse": True},
    ],
)
def test_every_option_beats_rounding(
    tiny: Tiny,
    tokens: Calibration,
    error: Callable[[LoadedModel, LoadedModel], float],
    options: dict[str, object],
) -> None:
    model = tiny("llama")
    nearest = RTN(bits=3, convention="gptq").compress(model, tokens, Context())
    assert error(compressed(model, tokens, bits=3, **options), model) < error(nearest, model)


def test_layers_that_share_an_input_come_out_as_if_alone(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    result = compressed(model, tokens, bits=3)
    block = model.adapter.blocks(model.module)[0]
    query = block.get_submodule("self_attn.q_proj")
    hessian = Hessian(torch.zeros(32, 32))
    hook = query.register_forward_pre_hook(lambda _, args: add_batch(hessian, args[0]))
    with torch.no_grad():
        model.module(tokens.inputs)
    hook.remove()
    name = next(name for name in model.adapter.targets(model.module) if name.endswith("q_proj"))
    packed = result.module.get_submodule(name)
    alone = gptq(query.weight.detach(), hessian.matrix, bits=3)
    assert isinstance(packed, PackedLinear)
    assert float((packed.integers() == alone.quantized.codes).float().mean()) > 0.98


def test_the_result_is_the_same_every_time(tiny: Tiny, tokens: Calibration) -> None:
    first, second = (compressed(tiny("mixture"), tokens, bits=3).module.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_dense_model_is_left_alone(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("opt")
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    compressed(model, tokens, bits=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())


def test_short_calibration_is_warned_about(tiny: Tiny, tokens: Calibration) -> None:
    ctx = Context()
    compressed(tiny("llama"), Calibration(tokens.inputs[:2]), ctx)
    assert "worst: 48 tokens for 64 inputs" in ctx.warnings[0]
    ctx = Context()
    compressed(tiny("llama"), tokens, ctx)
    assert not ctx.warnings


def test_experts_that_no_token_reaches_are_rounded_and_named(tiny: Tiny) -> None:
    model, ctx = tiny("mixture"), Context()
    result = compressed(model, Calibration(torch.zeros(2, 1, dtype=torch.int64)), ctx, bits=4)
    assert any("no calibration token reached" in warning and "experts" in warning for warning in ctx.warnings)
    assert all(isinstance(m, PackedLinear) for m in result.adapter.targets(result.module).values())


def test_no_calibration_is_refused(tiny: Tiny) -> None:
    with pytest.raises(NotApplicableError, match="calibration"):
        compressed(tiny("llama"), Calibration.none())


def test_a_quantized_model_is_not_quantized_again(tiny: Tiny, tokens: Calibration) -> None:
    with pytest.raises(NotApplicableError, match="quantized already"):
        compressed(compressed(tiny("llama"), tokens), tokens)


def test_a_group_that_does_not_divide_a_width_is_refused_before_any_work(tiny: Tiny) -> None:
    with pytest.raises(NotApplicableError, match=r"layers\.0\.\S+ has 32 input columns"):
        compressed(tiny("llama"), Calibration.none(), group_size=24)


def test_activations_that_are_not_finite_name_the_layer(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    norm = model.adapter.blocks(model.module)[1].get_submodule("input_layernorm")
    set_weight(norm, torch.full_like(norm.weight, torch.nan))
    with pytest.raises(DivergedError, match=r"layers\.1\.self_attn\.q_proj hold NaN"):
        compressed(model, tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"percdamp": 0}, "percdamp"),
        ({"blocksize": 0}, "blocksize"),
        ({"static_groups": True}, "static_groups needs a group_size"),
    ],
)
def test_hyperparameters_out_of_range_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        build(GPTQ, options, "gptq")
