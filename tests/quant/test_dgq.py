"""DGQ on tiny models: integers fit 8 bits, smoothing keeps the function, searches pay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methodbench.context import Context
from methodbench.errors import ParameterError
from methodbench.params import build
from methodbench.torchkit.activations import StaticQuantizer
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_quant.llm.dgq import DGQ, StaticOperand, percentile_scale, search_groups, search_rows

Tiny = Callable[[str], LoadedModel]
Error = Callable[[LoadedModel, LoadedModel], float]


def compressed(model: LoadedModel, data: Calibration, **options: object) -> LoadedModel:
    return build(DGQ, {"group_size": 16, **options}, "dgq-llm").compress(model, data, Context())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), outlier=st.sampled_from([1.0, 50.0]))
def test_integers_fit_8_bits_for_every_weight(seed: int, outlier: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(8, 32, generator=generator), torch.randn(40, 32, generator=generator)
    weight[0].abs_()
    weight[:, 3] *= outlier
    grains = search_rows(weight, x, *search_groups(weight, x, 4, 8), 4)
    assert int(grains.integers().abs().max()) <= 127
    assert 0 <= int(grains.codes.min()) <= int(grains.codes.max()) <= 15
    assert torch.equal(grains.multiplier, grains.multiplier.round())
    assert float(grains.multiplier.min()) >= 1


def test_smoothing_lowers_the_largest_channels_to_the_next() -> None:
    absmax = torch.linspace(1, 2, 400)
    absmax[7], absmax[300] = 90.0, 70.0
    scale = percentile_scale(absmax, 0.005)
    assert (scale != 1).nonzero().flatten().tolist() == [7, 300] or float((absmax / scale).max()) <= 90
    assert float((absmax / scale).max()) == float(absmax.sort().values[-int(0.005 * 400 + 1.5)])
    assert torch.equal(percentile_scale(torch.zeros(8), 0.1), torch.ones(8))


@pytest.mark.parametrize("name", ["llama", "opt", "mixture"])
def test_searches_beat_plain_rounding_of_weights(
    tiny: Tiny, tokens: Calibration, error: Error, name: str
) -> None:
    model = tiny(name)
    coarse = error(compressed(model, tokens, bits=3, a_bits=16), model)
    assert error(compressed(model, tokens, a_bits=16), model) < coarse


def test_every_layer_has_a_static_scale(tiny: Tiny, tokens: Calibration) -> None:
    result = compressed(tiny("llama"), tokens)
    for layer in result.adapter.targets(result.module).values():
        assert isinstance(layer.input_quantizer, StaticQuantizer)
        assert layer.input_quantizer.scale.numel() == 1


def test_attention_operands_are_rounded_on_demand(tiny: Tiny, tokens: Calibration, error: Error) -> None:
    model = tiny("llama")
    fine = compressed(model, tokens, quantize_operands=True)
    operands = [part for part in fine.module.modules() if isinstance(part, StaticOperand)]
    assert len(operands) == 6
    assert {part.mode for part in operands} == {"round"}
    coarse = compressed(model, tokens, quantize_operands=True, operand_bits=2)
    assert error(fine, model) < error(coarse, model)


@pytest.mark.parametrize("options", [{"percentile": 0.6}, {"bits": 1}, {"scale_dtype": "float16"}])
def test_hyperparameters_out_of_range_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ParameterError, match=next(iter(options))):
        build(DGQ, options, "dgq-llm")
