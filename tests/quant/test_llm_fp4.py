"""LLM-FP4 on tiny models: its variants in the order of the paper, and offsets that fit their bits."""

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
from methodbench.torchkit.floats import FloatFormat, FloatGrid
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.packed import PackedFloat
from methodbench_quant.llm.llm_fp4 import LLMFP4, effective_bias

Tiny = Callable[[str], LoadedModel]
Error = Callable[[LoadedModel, LoadedModel], float]


def compressed(model: LoadedModel, data: Calibration, **options: object) -> LoadedModel:
    options = {"candidates": 25, "head_and_embedding": False, **options}
    return build(LLMFP4, options, "llm-fp4").compress(model, data, Context())


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_search_beats_the_extremes(tiny: Tiny, tokens: Calibration, error: Error, name: str) -> None:
    model = tiny(name)
    found = {
        variant: error(compressed(model, tokens, variant=variant), model) for variant in ("minmax", "fpq")
    }
    assert found["fpq"] < found["minmax"]


def test_layers_are_packed_in_four_bits_with_channel_biases(tiny: Tiny, tokens: Calibration) -> None:
    result = compressed(tiny("mixture"), tokens, rounds=1)
    for name, layer in result.adapter.targets(result.module).items():
        assert isinstance(layer, PackedFloat), name
        assert layer.number.bits == 4
        assert isinstance(layer.input_quantizer, StaticQuantizer)
        assert layer.input_quantizer.scale.shape == (layer.in_features,)
    assert result.storage == "real"
    # A scale of 16 or 32 bits for every row of 32 or 64 codes.
    assert result.accounted_bits is not None
    assert 4 + 16 / 64 <= result.accounted_bits <= 4 + 32 / 24


def test_more_bits_come_closer(tiny: Tiny, tokens: Calibration, error: Error) -> None:
    model = tiny("llama")
    errors = [error(compressed(model, tokens, rounds=1, bits=b, a_bits=b), model) for b in (3, 4, 6)]
    assert errors == sorted(errors, reverse=True)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), exponent=st.integers(1, 3), rho=st.floats(-4, 4))
def test_offsets_are_integers_that_fit_the_exponent(seed: int, exponent: int, rho: float) -> None:
    channels = 5 * torch.randn(40, generator=torch.Generator().manual_seed(seed))
    anchor = torch.tensor(rho)
    offsets = effective_bias(channels, anchor, anchor, exponent) - anchor
    torch.testing.assert_close(offsets, offsets.round(), rtol=0, atol=1e-5)
    assert float(offsets.min()) >= -1e-5
    assert float(offsets.max()) <= 2**exponent - 1 + 1e-5


def test_channels_of_equal_range_have_no_offsets() -> None:
    rho = torch.tensor(1.3)
    assert torch.equal(effective_bias(torch.full((8,), 1.3), rho, rho, 2), rho.expand(8))


def test_head_and_embedding_are_quantized_and_part_ways(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    result = compressed(model, tokens, rounds=1, head_and_embedding=True)
    embedding, head = result.adapter.embedding(result.module), result.adapter.head(result.module)
    assert embedding is not None
    assert isinstance(head, PackedFloat)
    assert isinstance(head.input_quantizer, StaticQuantizer)
    values = embedding.weight.abs().unique()
    assert len(values) <= 8
    dense = model.adapter.embedding(model.module)
    assert dense is not None
    assert float(values[-1]) == pytest.approx(float(dense.weight.abs().max()), rel=1e-5)
    # One grid for each row of the head, where the embedding has one in all.
    assert len(head.dequantize().abs().unique()) > 8
    assert result.facts["embedding"] == "e2m1, simulated"


def test_the_published_slip_adds_a_level_and_its_storage_a_bit(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    repaired, published = (
        compressed(model, tokens, rounds=1, variant="minmax", authors_compat=slip) for slip in (False, True)
    )
    for name, layer in published.adapter.targets(published.module).items():
        before = repaired.adapter.targets(repaired.module)[name]
        assert isinstance(layer, PackedFloat)
        assert isinstance(before, PackedFloat)
        assert (before.number.name, layer.number.name) == ("e2m1", "e3m1")
        row = layer.dequantize()[0].abs()
        # Both take the largest weight for their top level: 1.5 in units of a power of two, or 2.
        dense = model.module.get_submodule(name).weight[0].abs()
        assert float(row.max()) == pytest.approx(float(dense.max()), rel=2e-3)
        assert len(row.unique()) <= 9


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    exponent=st.integers(1, 3),
    mantissa=st.integers(0, 3),
    bias=st.floats(-6, 6),
)
def test_widened_storage_keeps_every_level(seed: int, exponent: int, mantissa: int, bias: float) -> None:
    form = FloatFormat(exponent, mantissa)
    grid = FloatGrid.from_bias(torch.tensor(bias), form, extra_level=True)
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * grid.scale * 2
    snapped, wide = grid.snap(x), grid.widened()
    torch.testing.assert_close(grid.decode(grid.encode(x)), snapped, rtol=1e-6, atol=0)
    torch.testing.assert_close(wide.decode(wide.encode(snapped)), snapped, rtol=1e-6, atol=0)
    assert float(snapped.abs().max()) <= grid.top * float(grid.scale) * (1 + 1e-6)


@pytest.mark.parametrize("options", [{"bits": 8}, {"rounds": 0}, {"variant": "int"}])
def test_hyperparameters_out_of_range_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ParameterError, match=next(iter(options))):
        build(LLMFP4, options, "llm-fp4")
