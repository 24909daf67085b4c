"""NUPES: the operator's invariants, the searches, and what learning adds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.model import Calibration, LoadedModel, set_weight
from methodbench.torchkit.packed import pack_linear, packed_configs, rebuild
from methodbench.torchkit.power_map import PackedPower, find_power_grid, on_power_grid, power_map
from methodbench.torchkit.quantizers import quantize
from methodbench_quant.llm.nupes import NUPES, error_norm, learn, search_grid, search_simplex, soft_round
from methodbench_quant.llm.rtn import RTN

Tiny = Callable[[str], LoadedModel]


def compressed(
    model: LoadedModel, data: Calibration | None = None, ctx: Context | None = None, **options: object
) -> LoadedModel:
    return build(NUPES, options, "nupes").compress(model, data or Calibration.none(), ctx or Context())


def student(seed: int, rows: int = 8, columns: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    chi = torch.randn(3, rows, columns, generator=generator, dtype=torch.float64).square().mean(0)
    return normal / chi.sqrt()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 8), exponent=st.floats(0.2, 1))
def test_levels_keep_what_the_operator_promises(seed: int, bits: int, exponent: float) -> None:
    weight = student(seed)
    grid = find_power_grid(weight, bits, exponent)
    rounded = grid.snap(weight)
    assert all(len(row.unique()) <= 2**bits - 1 for row in rounded)
    largest = weight.abs().amax(1)
    torch.testing.assert_close(rounded.abs().amax(1), largest, rtol=1e-6, atol=0)
    assert bool((rounded * weight >= 0).all())
    order = weight.argsort(1)
    assert bool((rounded.gather(1, order).diff(dim=1) >= -1e-12).all())
    doubled = find_power_grid(weight * 3, bits, exponent).snap(weight * 3)
    torch.testing.assert_close(doubled, rounded * 3, rtol=1e-6, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), exponent=st.floats(0.2, 1))
def test_products_of_mapped_numbers_are_mapped_products(seed: int, exponent: float) -> None:
    a, b = student(seed, 1)[0], student(seed + 1, 1)[0]
    product = power_map(power_map(a, exponent) * power_map(b, exponent), 1 / exponent)
    torch.testing.assert_close(product, a * b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_exponent_one_is_symmetric_rounding_bit_for_bit(bits: int) -> None:
    weight = torch.randn(6, 32)
    ours = on_power_grid(weight, find_power_grid(weight, bits, 1.0)).mapped
    nearest = quantize(weight, bits, convention="absmax", symmetric=True)
    assert torch.equal(ours.codes, nearest.codes)
    assert torch.equal(ours.scale, nearest.scale)


def test_a_silent_channel_stays_zero() -> None:
    weight = torch.randn(3, 16)
    weight[1] = 0
    assert bool((find_power_grid(weight, 4, 0.5).snap(weight)[1] == 0).all())


@pytest.mark.parametrize("bits", [3, 4])
def test_bell_shaped_weights_want_an_exponent_below_one(bits: int) -> None:
    weights = [student(0, 16, 256), student(1, 16, 256)]
    best = search_simplex(lambda a: error_norm(weights, bits, a), 0.5)
    assert best < 0.9
    assert error_norm(weights, bits, best) < 0.8 * error_norm(weights, bits, 1.0)


def test_uniform_weights_want_an_exponent_near_one() -> None:
    weights = [torch.rand(16, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1]
    assert search_grid(lambda a: error_norm(weights, 4, a)) > 0.9


def test_soft_rounding_hardens() -> None:
    v = torch.linspace(-3, 3, 301)
    away = (v - v.floor() - 0.5).abs() > 0.2
    assert float((soft_round(v, 40.0) - v.round())[away].abs().max()) < 1e-3
    # With little sharpness it is nearly the identity.
    assert float((soft_round(v, 0.1) - v).abs().max()) < 1e-3


@pytest.mark.parametrize("soft", [True, False])
def test_learning_lowers_the_error_on_other_inputs(soft: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 24, generator=generator) * 0.1
    mixing = torch.randn(24, 24, generator=generator)
    x, other = (torch.randn(512, 24, generator=generator) @ mixing for _ in range(2))
    grid = find_power_grid(weight, 3, 0.7)
    fitted = learn(weight, x.T @ x, grid, iterations=400, lr_v=1e-3, lr_a=1e-3, soft=soft)

    def error(w: torch.Tensor) -> float:
        return float((other @ (w - weight).T).square().mean())

    assert fitted.after < fitted.before
    assert error(fitted.quantized.dequantize()) < 0.9 * error(grid.snap(weight))


def test_the_gradient_of_the_exponent_is_finite_at_zero() -> None:
    weight = torch.zeros(2, 4)
    weight[0] = torch.tensor([1.0, -0.5, 0.0, 0.2])
    fitted = learn(weight, torch.eye(4), find_power_grid(weight, 3, 0.5), iterations=20, lr_v=0.01, lr_a=0.01)
    assert bool(torch.isfinite(fitted.quantized.dequantize()).all())


@pytest.mark.parametrize("name", ["llama", "opt", "mixture"])
def test_models_are_packed_and_the_exponent_is_told(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    result = compressed(model, bits=4)
    assert all(isinstance(layer, PackedPower) for layer in result.adapter.targets(result.module).values())
    assert 0.1 < result.facts["exponent"] < 1
    assert result.facts["exponent_min"] == result.facts["exponent_max"]
    layered = compressed(model, bits=4, scope="layer")
    assert layered.facts["exponent_min"] < layered.facts["exponent_max"]
    plain = RTN(bits=4, convention="absmax", symmetric=True).compress(model, Calibration.none(), Context())
    assert result.accounted_bits == plain.accounted_bits


def test_data_driven_is_closer_to_dense_than_data_free(
    tiny: Tiny, tokens: Calibration, error: Callable[[LoadedModel, LoadedModel], float]
) -> None:
    model = tiny("llama")
    free = compressed(model, bits=3, exponent=0.7)
    driven = compressed(
        model, tokens, bits=3, exponent=0.7, mode="data_driven", iterations=200, lr_v=2e-3, lr_a=1e-3
    )
    assert error(driven, model) < error(free, model)


def test_state_dict_and_configuration_rebuild_the_layer_bit_for_bit() -> None:
    linear = nn.Linear(32, 12)
    weight = linear.weight.detach()
    model = nn.Sequential(pack_linear(linear, on_power_grid(weight, find_power_grid(weight, 4, 0.6))))
    rebuilt = rebuild(nn.Sequential(nn.Linear(32, 12)), packed_configs(model))
    rebuilt.load_state_dict(model.state_dict())
    x = torch.randn(3, 32)
    assert torch.equal(rebuilt(x), model(x))
    assert packed_configs(rebuilt) == packed_configs(model)


def test_what_is_not_finite_or_missing_is_an_error(tiny: Tiny) -> None:
    with pytest.raises(NotApplicableError, match="calibration"):
        compressed(tiny("llama"), mode="data_driven", exponent=0.5)
    with pytest.raises(NotApplicableError, match="quantized already"):
        compressed(compressed(tiny("llama"), exponent=0.5), exponent=0.5)
    model = tiny("llama")
    layer = model.adapter.blocks(model.module)[0].get_submodule("mlp.up_proj")
    set_weight(layer, torch.full_like(layer.weight, torch.nan))
    with pytest.raises(DivergedError, match="NaN"):
        compressed(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bits": 5}, "bits"), ({"exponent": 0.0}, "exponent"), ({"norm": 3}, "norm"), ({"lr_v": 0.0}, "lr_v")],
)
def test_hyperparameters_out_of_range_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        build(NUPES, options, "nupes")
