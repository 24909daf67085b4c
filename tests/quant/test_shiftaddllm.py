"""ShiftAddLLM: scales are sums of powers of two, codes are nearest, error feedback pays off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.binary_coded import PackedBinary, encode_powers, unrotate_sides
from methodbench.torchkit.model import Calibration, LoadedModel, set_weight
from methodbench.torchkit.quantizers import quantize
from methodbench_quant.llm.shiftaddllm import (
    ShiftAddLLM,
    allocate_bits,
    apot,
    fit,
    greedy_start,
    nearest_signs,
    project,
    rescale,
    sensitivity,
    shift_add,
    sign_patterns,
)

Tiny = Callable[[str], LoadedModel]


def compressed(
    model: LoadedModel, data: Calibration, ctx: Context | None = None, **options: object
) -> LoadedModel:
    return build(ShiftAddLLM, {"rounds": 10, **options}, "shiftaddllm").compress(
        model, data, ctx or Context()
    )


def layer_of(seed: int, rows: int = 24, columns: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, correlated inputs, and the inputs' Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    x = torch.randn(256, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return weight, x, x.T @ x / len(x)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), terms=st.integers(1, 4))
def test_rounded_scales_are_few_powers_of_two_and_near(seed: int, terms: int) -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    rounded = apot(x, terms)
    encode_powers(rounded, terms)
    # The nearest power on a logarithmic axis is off by at most sqrt(2) - 1 of the rest.
    assert bool(((rounded - x).abs() <= x.abs() * (2**0.5 - 1 + 1e-6) ** terms).all())
    assert torch.equal(apot(-x, terms), -rounded)
    assert float(apot(torch.zeros(1), terms)) == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.integers(1, 4))
def test_codes_are_the_nearest_sums(seed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w, scale = torch.randn(3, 20, generator=generator), torch.rand(3, bits, generator=generator)
    patterns = sign_patterns(bits, w)
    chosen = (nearest_signs(w, scale, patterns) * scale[:, None]).sum(-1)
    every = scale @ patterns.T
    least = (w[..., None] - every[:, None]).abs().amin(-1)
    torch.testing.assert_close((chosen - w).abs(), least)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 3))
def test_alternation_is_better_than_its_start(seed: int, bits: int) -> None:
    w = torch.randn(4, 200, generator=torch.Generator().manual_seed(seed))
    start, signs = greedy_start(w, bits, torch.tensor(w.shape[1]))
    fitted = fit(w, bits, rounds=20, terms=None)

    def error(values: torch.Tensor) -> float:
        return float((w - values).square().sum())

    ours = (nearest_signs(w, fitted, sign_patterns(bits, w)) * fitted[:, None]).sum(-1)
    assert error(ours) <= error((signs * start[:, None]).sum(-1)) * (1 + 1e-5)


def test_one_bit_is_the_sign_times_the_mean_magnitude() -> None:
    w = torch.randn(3, 50)
    torch.testing.assert_close(fit(w, 1, rounds=20)[:, 0], w.abs().mean(1))


def test_padding_changes_nothing() -> None:
    w = torch.randn(3, 40)
    padded = torch.cat([w, torch.zeros(3, 9)], 1)
    mask = torch.cat([torch.ones(3, 40), torch.zeros(3, 9)], 1)
    torch.testing.assert_close(
        fit(padded, 3, rounds=15, mask=mask), fit(w, 3, rounds=15), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("tile", [None, 8])
def test_weights_coded_in_step_come_out_as_alone(tile: int | None) -> None:
    layers = [layer_of(0, 16), layer_of(1, 24), layer_of(2, 32)]
    blocks = [w.shape[0] if tile is None else w.shape[0] // 8 for w, _, _ in layers]
    options: dict[str, Any] = {"bits": 3, "tile": tile, "rounds": 10}
    both = shift_add([w for w, _, _ in layers], [h for _, _, h in layers], row_blocks=blocks, **options)
    for (weight, _, hessian), block, code in zip(layers, blocks, both, strict=True):
        (alone,) = shift_add([weight], [hessian], row_blocks=[block], **options)
        matching = torch.isclose(code.dequantize(), alone.dequantize(), rtol=1e-4, atol=1e-6).float().mean()
        assert float(matching) > 0.95


@pytest.mark.parametrize("bits", [2, 3])
def test_error_feedback_beats_coding_alone_and_rounding(bits: int) -> None:
    weight, x, hessian = layer_of(3)

    def error(w: torch.Tensor) -> float:
        return float((x @ (w - weight).T).square().mean())

    columns = fit(weight.T.contiguous(), bits, rounds=20)
    plain = (nearest_signs(weight.T, columns, sign_patterns(bits, weight)) * columns[:, None]).sum(-1).T
    (acc,) = shift_add([weight], [hessian], bits=bits, rounds=20)
    (lat,) = shift_add([weight], [hessian], bits=bits, tile=8, row_blocks=[3], rounds=20)
    rounded = error(quantize(weight, bits, convention="gptq").dequantize())
    assert error(acc.dequantize()) < error(plain)
    assert error(acc.dequantize()) < rounded
    assert error(lat.dequantize()) < rounded


def test_every_column_holds_few_values() -> None:
    weight, _, hessian = layer_of(4)
    (code,) = shift_add([weight], [hessian], bits=2, rounds=10)
    assert all(len(column.unique()) <= 4 for column in code.dequantize().T)


def test_preparation_without_coding_is_the_identity() -> None:
    weight, _, hessian = layer_of(5)
    scaled, changed, r = rescale(weight, hessian)
    turned, _ = project(scaled, changed, 3)
    torch.testing.assert_close(unrotate_sides(turned, 3) / r, weight, rtol=1e-4, atol=1e-5)


def test_sensitive_layers_get_more_bits(tiny: Tiny) -> None:
    adapter = tiny("opt").adapter
    scores = {f"layers.0.part{i}": float(i) for i in range(10)}
    bits = allocate_bits(scores, (0.0, 0.8, 0.2), adapter)
    assert sorted(bits.values()) == [2] * 8 + [3] * 2
    assert bits["layers.0.part9"] == bits["layers.0.part8"] == 3
    assert allocate_bits(scores, (1.0, 0.0, 0.0), adapter) == dict.fromkeys(scores, 1)
    # A feed-forward layer counts four times, and takes the bits of its last place.
    wide = allocate_bits({"a.fc1": 1.0, "b.part": 2.0}, (0.5, 0.5, 0.0), adapter)
    assert wide == {"a.fc1": 2, "b.part": 2}
    weight = torch.randn(8, 8)
    assert sensitivity(weight, torch.full((8,), 0.5)) == pytest.approx(
        8 * sensitivity(weight, torch.ones(8)), rel=1e-4
    )


@pytest.mark.parametrize("name", ["llama", "opt", "mixture"])
@pytest.mark.parametrize("mode", ["acc", "lat"])
def test_models_are_stored_in_binary_matrices(
    tiny: Tiny,
    tokens: Calibration,
    error: Callable[[LoadedModel, LoadedModel], float],
    name: str,
    mode: str,
) -> None:
    model = tiny(name)
    three = compressed(model, tokens, bits=3, mode=mode)
    two = compressed(model, tokens, bits=2, mode=mode)
    layers = three.adapter.targets(three.module).values()
    assert all(isinstance(layer, PackedBinary) for layer in layers)
    assert three.storage == "real"
    assert two.accounted_bits is not None
    assert three.accounted_bits is not None
    assert two.accounted_bits < three.accounted_bits
    assert error(three, model) < error(two, model)


def test_mixed_precision_spends_the_shares(tiny: Tiny, tokens: Calibration) -> None:
    mixed = compressed(tiny("llama"), tokens, mix_bits=[0.0, 0.5, 0.5], mode="lat")
    assert mixed.facts["layers_by_bits"] == {"2": 7, "3": 7}


def test_the_result_is_the_same_every_time_and_follows_the_seed(tiny: Tiny, tokens: Calibration) -> None:
    first, second = (compressed(tiny("llama"), tokens).module.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = compressed(tiny("llama"), tokens, Context(seed=1)).module.state_dict()
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_dense_model_is_left_alone(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    compressed(model, tokens)
    assert all(torch.equal(model.module.state_dict()[name], tensor) for name, tensor in before.items())


def test_experts_that_no_token_reaches_are_named(tiny: Tiny) -> None:
    ctx = Context()
    compressed(tiny("mixture"), Calibration(torch.zeros(2, 1, dtype=torch.int64)), ctx)
    assert any("no calibration token reached" in warning for warning in ctx.warnings)


def test_weights_that_are_not_finite_are_an_error(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    layer = model.adapter.blocks(model.module)[0].get_submodule("mlp.up_proj")
    set_weight(layer, torch.full_like(layer.weight, torch.nan))
    with pytest.raises(DivergedError, match="NaN"):
        compressed(model, tokens)


def test_what_cannot_be_cut_into_groups_is_refused(tiny: Tiny, tokens: Calibration) -> None:
    with pytest.raises(NotApplicableError, match="groups of 5 rows"):
        compressed(tiny("llama"), tokens, group_size=5)
    with pytest.raises(NotApplicableError, match="calibration"):
        compressed(tiny("llama"), Calibration.none())
    with pytest.raises(NotApplicableError, match="quantized already"):
        compressed(compressed(tiny("llama"), tokens), tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"rounds": 0}, "rounds"),
        ({"mode": "fast"}, "mode"),
        ({"mode": "lat", "blocksize": 12}, "blocksize"),
        ({"mix_bits": [0.5, 0.2, 0.2]}, "mix_bits"),
    ],
)
def test_hyperparameters_out_of_range_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        build(ShiftAddLLM, options, "shiftaddllm")
