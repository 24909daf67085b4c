"""SmoothQuant on tiny models: smoothing keeps the function and levels the channels it moves between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methodbench.context import Context
from methodbench.errors import ParameterError
from methodbench.params import build
from methodbench.torchkit.activations import ActivationQuantizer, StaticQuantizer
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.outliers import inject_outliers
from methodbench_quant.llm.calls import ChannelRanges
from methodbench_quant.llm.smoothquant import SmoothQuant, norm_groups, smoothing_scale

Tiny = Callable[[str], LoadedModel]


def compressed(model: LoadedModel, data: Calibration, **options: object) -> LoadedModel:
    return build(SmoothQuant, options, "smoothquant").compress(model, data, Context())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_alpha_shares_the_range_between_activations_and_weights(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    absmax = torch.rand(16, generator=generator) * 50 + 0.1
    weights = [torch.randn(8, 16, generator=generator) for _ in range(3)]
    columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    ones = torch.ones(16)
    torch.testing.assert_close(columns * smoothing_scale(absmax, weights, 0.0), ones)
    torch.testing.assert_close(absmax / smoothing_scale(absmax, weights, 1.0), ones)
    half = smoothing_scale(absmax, weights, 0.5)
    torch.testing.assert_close(absmax / half, columns * half)


@pytest.mark.parametrize("name", ["llama", "opt", "mixture"])
def test_with_16_bits_for_activations_only_weights_are_rounded(
    tiny: Tiny, tokens: Calibration, error: Callable[[LoadedModel, LoadedModel], float], name: str
) -> None:
    model = tiny(name)
    result = compressed(model, tokens, a_bits=16)
    assert error(result, model) < 0.1 * error(compressed(model, tokens, bits=4, a_bits=16), model)
    assert "activations" not in result.facts
    if name != "mixture":
        assert result.facts["smoothed"] == 4


def test_outputs_and_down_projections_are_quantized_but_not_smoothed(tiny: Tiny) -> None:
    model = tiny("llama")
    for block in model.adapter.blocks(model.module):
        groups = norm_groups(model, block)
        assert len(groups) == 2
        readers = {name for group in groups for name in group.linears}
        roles = {model.adapter.role(name) for name in readers}
        assert roles == {"q", "k", "v", "gate", "up"}


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_smoothing_helps_where_activations_have_outliers(
    tiny: Tiny, tokens: Calibration, error: Callable[[LoadedModel, LoadedModel], float], name: str
) -> None:
    model = inject_outliers(tiny(name), factor=64.0, channels=2)
    options = {"a_granularity": "tensor", "per": "tensor"}
    smooth = error(compressed(model, tokens, **options), model)
    plain = error(compressed(model, tokens, **options, smooth=False), model)
    assert smooth < 0.5 * plain


def test_static_scales_come_from_calibration(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    result = compressed(model, tokens, static=True)
    ranges = ChannelRanges(model.adapter)
    block = model.adapter.blocks(model.module)[0]
    hooks = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, x, observe=observe: observe(x[0]))
        for name, observe in ranges.watch(block).items()
    ]
    with torch.no_grad():
        model.module(tokens.inputs)
    for hook in hooks:
        hook.remove()
    down = result.adapter.blocks(result.module)[0].get_submodule("mlp.down_proj")
    assert isinstance(down.input_quantizer, StaticQuantizer)
    expected = ranges.highest["mlp.down_proj"].max() / 127
    torch.testing.assert_close(down.input_quantizer.scale, expected)


def test_outputs_of_query_key_and_value_are_rounded_on_demand(tiny: Tiny, tokens: Calibration) -> None:
    result = compressed(tiny("llama"), tokens, quantize_qkv=True)
    for name, layer in result.adapter.targets(result.module).items():
        wanted = result.adapter.role(name) in ("q", "k", "v")
        assert isinstance(layer.output_quantizer, ActivationQuantizer) == wanted
        if wanted:
            y = layer(torch.randn(2, 5, layer.in_features))
            assert all(len(token.unique()) <= 255 for token in y.flatten(0, 1))
            torch.testing.assert_close(layer.output_quantizer(y), y)


def test_four_bits_for_both_is_a_setting(
    tiny: Tiny, tokens: Calibration, error: Callable[[LoadedModel, LoadedModel], float]
) -> None:
    model = tiny("llama")
    errors = [error(compressed(model, tokens, bits=b, a_bits=b), model) for b in (4, 6, 8)]
    assert errors == sorted(errors, reverse=True)


def test_few_calibration_tokens_are_remarked(tiny: Tiny) -> None:
    ctx = Context()
    SmoothQuant().compress(tiny("llama"), Calibration(torch.arange(20)[None]), ctx)
    assert any("calibration is short" in warning for warning in ctx.warnings)


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"alpha": -0.1}, {"bits": 1}, {"per": "token"}])
def test_hyperparameters_out_of_range_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ParameterError, match=next(iter(options))):
        build(SmoothQuant, options, "smoothquant")
