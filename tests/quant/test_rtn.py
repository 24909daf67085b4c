"""RTN on tiny models: what is packed, what stays, and how much it costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.model import Calibration, LoadedModel, set_weight
from methodbench.torchkit.packed import PackedLinear, materialized
from methodbench.torchkit.quantizers import fake_quantize, quantize
from methodbench.torchkit.size import bits_per_weight
from methodbench_quant.llm.rtn import RTN

Tiny = Callable[[str], LoadedModel]


def compressed(model: LoadedModel, **options: object) -> LoadedModel:
    return build(RTN, options, "rtn").compress(model, Calibration.none(), Context())


@pytest.mark.parametrize("name", ["llama", "opt", "mixture"])
def test_every_layer_of_the_blocks_is_packed_and_nothing_else(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    result = compressed(model, bits=4, group_size=16)
    targets = result.adapter.targets(result.module)
    packed = {n for n, m in result.module.named_modules() if isinstance(m, PackedLinear)}
    assert packed == set(targets)
    assert not any(result.adapter.role(n) == "router" for n in packed)
    assert result.storage == "real"
    assert result.facts["layers"] == len(packed)


def test_weights_are_those_of_the_quantizer(tiny: Tiny) -> None:
    model = tiny("llama")
    result = compressed(model, bits=3, group_size=16, convention="gptq")
    dense = model.adapter.targets(model.module)
    for name, layer in result.adapter.targets(result.module).items():
        q = quantize(dense[name].weight, 3, group_size=16, convention="gptq")
        assert isinstance(layer, PackedLinear)
        assert torch.equal(layer.integers(), q.codes), name


def test_the_dense_model_is_left_alone(tiny: Tiny) -> None:
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    compressed(model, bits=2)
    after = model.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.storage == "dense"


def test_embeddings_stay_tied_to_the_head_and_exact(tiny: Tiny) -> None:
    model = tiny("llama")
    result = compressed(model, bits=2)
    embedding = result.adapter.embedding(result.module)
    head = result.adapter.head(result.module)
    assert embedding is not None
    assert head is not None
    assert head.weight is embedding.weight
    assert embedding.weight is model.adapter.embedding(model.module).weight


def test_bits_per_weight_count_scales_and_zero_points(tiny: Tiny) -> None:
    result = compressed(tiny("llama"), bits=4, group_size=16)
    assert result.accounted_bits == pytest.approx(4 + (16 + 4) / 16, rel=0.01)
    assert result.accounted_bits == bits_per_weight(result)
    symmetric = compressed(tiny("llama"), bits=4, group_size=16, convention="gptq", symmetric=True)
    assert symmetric.accounted_bits == pytest.approx(4 + 16 / 16, rel=0.01)


@pytest.mark.parametrize("name", ["llama", "opt", "mixture"])
def test_more_bits_and_smaller_groups_come_closer_to_the_dense_model(
    tiny: Tiny, error: Callable[[LoadedModel, LoadedModel], float], name: str
) -> None:
    model = tiny(name)
    by_bits = [error(compressed(model, bits=bits), model) for bits in (2, 3, 4, 8)]
    assert by_bits == sorted(by_bits, reverse=True)
    grouped = [error(compressed(model, bits=4, group_size=size), model) for size in (-1, 8)]
    assert grouped[1] < grouped[0]


def test_activation_bits_round_the_input_of_every_layer(tiny: Tiny) -> None:
    model = tiny("llama")
    result = compressed(model, bits=8, convention="absmax", symmetric=True, a_bits=8)
    layer = next(iter(result.adapter.targets(result.module).values()))
    assert isinstance(layer, PackedLinear)
    x = torch.randn(2, 3, 32)
    expected = torch.nn.functional.linear(fake_quantize(x, 8), layer.dequantize())
    assert torch.equal(layer(x), expected)
    assert "simulated" in result.facts["activations"]
    assert result.storage == "real"


def test_asymmetric_activations_differ_from_symmetric_ones(
    tiny: Tiny, error: Callable[[LoadedModel, LoadedModel], float]
) -> None:
    model = tiny("opt")
    plain = compressed(model, bits=8)
    errors = {
        convention: error(compressed(model, bits=8, a_bits=4, a_convention=convention), model)
        for convention in ("absmax", "omni")
    }
    assert min(errors.values()) > error(plain, model)
    assert errors["omni"] < errors["absmax"]


def test_a_materialized_evaluation_gives_the_same_logits(tiny: Tiny, tokens: Calibration) -> None:
    result = compressed(tiny("llama"), bits=3, group_size=8, a_bits=8)
    with torch.no_grad():
        lazily = result.module(tokens.inputs).logits
        with materialized(result.module):
            assert torch.equal(result.module(tokens.inputs).logits, lazily)


def test_a_state_dict_restores_the_compressed_model(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    result, other = compressed(model, bits=3, group_size=8), compressed(model, bits=3, group_size=8)
    for tensor in other.module.state_dict().values():
        if tensor.dtype == torch.uint8:
            tensor.zero_()
    other.module.load_state_dict(result.module.state_dict())
    with torch.no_grad():
        assert torch.equal(other.module(tokens.inputs).logits, result.module(tokens.inputs).logits)


def test_half_precision_models_stay_in_half_precision(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    model.module.to(torch.bfloat16)
    result = compressed(model, bits=4, group_size=16)
    with torch.no_grad():
        assert result.module(tokens.inputs).logits.dtype == torch.bfloat16


def test_a_quantized_model_is_not_quantized_again(tiny: Tiny) -> None:
    with pytest.raises(NotApplicableError, match="quantized already"):
        compressed(compressed(tiny("llama")))


def test_a_group_that_does_not_divide_a_width_names_the_layer(tiny: Tiny) -> None:
    with pytest.raises(NotApplicableError, match=r"layers\.0\.\S+ has 32 input columns.* group size 24"):
        compressed(tiny("llama"), group_size=24)


def test_a_weight_that_is_not_finite_names_the_layer(tiny: Tiny) -> None:
    model = tiny("llama")
    name, layer = list(model.adapter.targets(model.module).items())[3]
    set_weight(layer, torch.full_like(layer.weight, torch.nan))
    with pytest.raises(DivergedError, match=f"{name} holds NaN"):
        compressed(model)


def test_a_silent_input_channel_stays_silent(tiny: Tiny) -> None:
    model = tiny("llama")
    name, layer = next(iter(model.adapter.targets(model.module).items()))
    weight = layer.weight.clone()
    weight[:, 5] = 0
    set_weight(layer, weight)
    result = compressed(model, bits=2, group_size=8).module.get_submodule(name)
    assert isinstance(result, PackedLinear)
    assert not result.dequantize()[:, 5].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits"),
        ({"bits": 1}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": -2}, "group_size"),
        ({"a_bits": 1}, "a_bits"),
        ({"convention": "absmax"}, "symmetric"),
        ({"convention": "nearest"}, "convention"),
    ],
)
def test_hyperparameters_out_of_range_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        build(RTN, options, "rtn")
