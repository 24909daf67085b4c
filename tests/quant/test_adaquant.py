"""AdaQuant: fitting pays off on other inputs, the program is exact, biases follow the dense model."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.model import Calibration, LoadedModel, set_weight
from methodbench.torchkit.packed import PackedLinear
from methodbench_quant.learned_ranges import LearnedRange, QuantizedLinear, adaquant, allocate
from methodbench_quant.llm.adaquant import AdaQuant

Tiny = Callable[[str], LoadedModel]


def compressed(
    model: LoadedModel, data: Calibration, ctx: Context | None = None, **options: object
) -> LoadedModel:
    options = {"iterations": 20, "a_bits": 16, **options}
    return build(AdaQuant, options, "adaquant").compress(model, data, ctx or Context())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 8))
def test_values_lie_on_few_levels_and_zero_is_one_of_them(seed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, generator=generator)
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    quantizer = LearnedRange((high - low).view(1), low.view(1), bits)
    rounded = quantizer(x).detach()
    grid = quantizer.grid()
    assert len(rounded.unique()) <= 2**bits
    assert float(quantizer(torch.zeros(1)).detach().abs()) <= 1e-6
    inside = (x > low + float(grid.scale.detach())) & (x < high - float(grid.scale.detach()))
    assert float((rounded - x)[inside].abs().max()) <= float(grid.scale.detach()) / 2 + 1e-6


def test_fitting_lowers_the_error_on_inputs_that_it_has_not_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 32, generator=generator) * 0.1
    mixing = torch.randn(32, 32, generator=generator)
    x, other = (torch.randn(400, 32, generator=generator) @ mixing for _ in range(2))
    layer = QuantizedLinear(weight, None, 4, 4)
    layer.measure([x])

    def error() -> float:
        with torch.no_grad():
            return float(F.mse_loss(layer(other), F.linear(other, weight)))

    before = error()
    fitted = adaquant(layer, x, F.linear(x, weight), iterations=300, batch=50)
    assert fitted.after < fitted.before
    assert error() < 0.9 * before


def test_what_is_packed_is_what_was_fitted() -> None:
    weight = torch.randn(12, 16) * 0.1
    layer = QuantizedLinear(weight, torch.randn(12), 4, 8)
    x = torch.randn(50, 16)
    layer.measure([x])
    adaquant(layer, x, F.linear(x, weight), iterations=10, batch=20, lr_w=1e-3)
    torch.testing.assert_close(layer.quantized().dequantize(), layer.weight_range(layer.weight).detach())
    quantizer = layer.static_input()
    assert quantizer is not None
    assert layer.input_range is not None
    torch.testing.assert_close(quantizer(x), layer.input_range(x).detach(), rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    units=st.integers(1, 6),
    precisions=st.sampled_from([(8, 4), (8, 4, 2), (4, 8), (8, 3, 2)]),
    size=st.floats(0.07, 0.26),
)
def test_the_program_is_as_good_as_trying_everything(
    seed: int, units: int, precisions: tuple[int, ...], size: float
) -> None:
    generator = np.random.default_rng(seed)
    increases = generator.uniform(-0.1, 1, (units, len(precisions)))
    sizes = generator.integers(1, 1000, units).tolist()
    cost = np.where(np.array(precisions) == max(precisions), 0.0, np.maximum(increases, 1e-6))
    found = allocate(increases, sizes, precisions, size)
    least = min(
        (
            sum(cost[unit, choice] for unit, choice in enumerate(choices))
            for choices in itertools.product(range(len(precisions)), repeat=units)
            if sum(n * precisions[c] for n, c in zip(sizes, choices, strict=True)) <= size * 32 * sum(sizes)
        ),
        default=None,
    )
    if least is None:
        assert found is None
    else:
        assert found is not None
        assert found.objective == pytest.approx(least, abs=1e-6)
        assert found.size <= size + 1e-6


def test_enough_room_keeps_the_highest_precision_and_too_little_is_told(
    tiny: Tiny, tokens: Calibration
) -> None:
    increases, sizes = np.array([[0.0, 0.5], [0.0, 0.1]]), [10, 20]
    roomy = allocate(increases, sizes, (8, 4), 8 / 32)
    assert roomy is not None
    assert roomy.precisions == (8, 8)
    assert allocate(increases, sizes, (8, 4), 0.1) is None
    with pytest.raises(ParameterError, match="no choice of precisions"):
        compressed(tiny("llama"), tokens, size=0.05)


@pytest.mark.parametrize("unit", ["layer", "block"])
def test_bits_follow_the_program(tiny: Tiny, tokens: Calibration, unit: str) -> None:
    result = compressed(
        tiny("llama"), tokens, size=0.2, precisions=[8, 4], unit=unit, loss_tokens=48, iterations=0
    )
    layers = result.adapter.targets(result.module)
    widths = {name: layer.bits for name, layer in layers.items()}
    assert set(widths.values()) == {4, 8}
    stored = sum(w * layers[n].in_features * layers[n].out_features for n, w in widths.items())
    whole = sum(layer.in_features * layer.out_features for layer in layers.values())
    assert stored / (32 * whole) <= 0.2
    if unit == "block":
        assert len({widths[name] for name in widths if ".0." in name}) == 1


@pytest.mark.parametrize("name", ["llama", "opt", "mixture"])
@pytest.mark.parametrize("sequential", [False, True])
def test_fitted_models_are_closer_to_dense_than_rounded(
    tiny: Tiny,
    tokens: Calibration,
    error: Callable[[LoadedModel, LoadedModel], float],
    name: str,
    sequential: bool,
) -> None:
    model = tiny(name)
    rounded = compressed(model, tokens, a_bits=4, iterations=0)
    fitted = compressed(model, tokens, a_bits=4, iterations=60, sequential=sequential)
    assert error(fitted, model) < error(rounded, model)
    assert fitted.facts["mse_after"] < fitted.facts["mse_before"]
    assert all(isinstance(m, PackedLinear) for m in fitted.adapter.targets(fitted.module).values())


def test_static_inputs_are_rounded(
    tiny: Tiny, tokens: Calibration, error: Callable[[LoadedModel, LoadedModel], float]
) -> None:
    model = tiny("llama")
    errors = [
        error(compressed(model, tokens, bits=8, a_bits=bits, iterations=0), model) for bits in (4, 8, 16)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_tuned_biases_bring_the_predictions_nearer(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")

    def divergence(result: LoadedModel) -> float:
        with torch.no_grad():
            wanted = model.module(tokens.inputs).logits.log_softmax(-1)
            given = result.module(tokens.inputs).logits.log_softmax(-1)
        return float(F.kl_div(given, wanted, log_target=True, reduction="sum"))

    plain = compressed(model, tokens, bits=3, iterations=0)
    tuned = compressed(model, tokens, bits=3, iterations=0, bias_steps=48, bias_lr=0.01)
    assert divergence(tuned) < divergence(plain)
    assert all(layer.bias is not None for layer in tuned.adapter.targets(tuned.module).values())


def test_the_result_is_the_same_every_time(tiny: Tiny, tokens: Calibration) -> None:
    first, second = (compressed(tiny("llama"), tokens).module.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_dense_model_is_left_alone(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("opt")
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    compressed(model, tokens, size=0.2, loss_tokens=24, bias_steps=2)
    assert all(torch.equal(model.module.state_dict()[name], tensor) for name, tensor in before.items())


def test_bad_input_is_told(tiny: Tiny, tokens: Calibration) -> None:
    with pytest.raises(NotApplicableError, match="calibration"):
        compressed(tiny("llama"), Calibration.none())
    with pytest.raises(NotApplicableError, match="quantized already"):
        compressed(compressed(tiny("llama"), tokens), tokens)
    ctx = Context()
    compressed(tiny("mixture"), Calibration(torch.zeros(2, 1, dtype=torch.int64)), ctx)
    assert any("no calibration token reached" in warning for warning in ctx.warnings)
    model = tiny("llama")
    layer = model.adapter.blocks(model.module)[0].get_submodule("mlp.up_proj")
    set_weight(layer, torch.full_like(layer.weight, torch.nan))
    with pytest.raises(DivergedError, match="NaN"):
        compressed(model, tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits"),
        ({"size": 0.0}, "size"),
        ({"precisions": [8, 8]}, "precisions"),
        ({"batch": 0}, "batch"),
    ],
)
def test_hyperparameters_out_of_range_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        build(AdaQuant, options, "adaquant")
