"""LoRC on tiny models: it repairs what the base method lost, by as much as its rank allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.packed import PackedLinear, materialized, packed_configs, rebuild
from methodbench.torchkit.size import bits_per_weight
from methodbench_quant.llm.gptq import GPTQ
from methodbench_quant.llm.lorc import LoRC, LowRankLayer, low_rank
from methodbench_quant.llm.rtn import RTN

Tiny = Callable[[str], LoadedModel]
Error = Callable[[LoadedModel, LoadedModel], float]


def compressed(model: LoadedModel, data: Calibration | None = None, **options: object) -> LoadedModel:
    method = build(LoRC, {"group_size": -1, **options}, "lorc")
    return method.compress(model, data or Calibration.none(), Context())


def test_rank_zero_is_the_base_method_bit_for_bit(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    ids = tokens.inputs[:2]
    for base, method in (("rtn", RTN(bits=3)), ("gptq", GPTQ(bits=3))):
        ours = compressed(model, tokens, bits=3, rank=0, base=base)
        theirs = method.compress(model, tokens, Context())
        assert torch.equal(ours.module(ids).logits, theirs.module(ids).logits)
        assert ours.accounted_bits == theirs.accounted_bits


def test_full_rank_gives_the_weight_back(tiny: Tiny, error: Error) -> None:
    model = tiny("llama")
    full = compressed(model, bits=2, rank=64)
    for name, layer in full.adapter.targets(full.module).items():
        dense = model.module.get_submodule(name).weight
        # The factors are fp16.
        torch.testing.assert_close(layer.weight, dense, rtol=0, atol=2e-3 * float(dense.abs().max()))
    assert error(full, model) < 1e-4 * error(compressed(model, bits=2, rank=0), model)


@pytest.mark.parametrize("base", ["rtn", "gptq"])
@pytest.mark.parametrize("name", ["llama", "opt", "mixture"])
def test_more_rank_leaves_less_error(tiny: Tiny, tokens: Calibration, name: str, base: str) -> None:
    model = tiny(name)
    facts = [compressed(model, tokens, bits=2, rank=m, base=base).facts for m in (0, 2, 8)]
    after = [fact["error_after"] for fact in facts]
    assert after[0] == facts[0]["error_before"] > after[1] > after[2]


def test_the_gain_grows_as_bits_fall(tiny: Tiny, error: Error) -> None:
    model = tiny("llama")
    gains = [
        error(compressed(model, bits=b, rank=0), model) - error(compressed(model, bits=b, rank=8), model)
        for b in (4, 3, 2)
    ]
    assert 0 < gains[0] < gains[1] < gains[2]


def test_factors_of_8_bits_take_half_and_cost_little(tiny: Tiny, error: Error) -> None:
    model = tiny("llama")
    none, half, eight = (
        compressed(model, bits=2, **options)
        for options in ({"rank": 0}, {"rank": 4}, {"rank": 4, "factor_bits": 8})
    )
    sizes = [bits_per_weight(result) for result in (none, eight, half)]
    assert sizes == sorted(sizes)
    layer = next(iter(half.adapter.targets(half.module).values()))
    assert isinstance(layer, LowRankLayer)
    count = layer.in_features * layer.out_features
    factors = 16 * 4 * (layer.in_features + layer.out_features)
    first = next(iter(none.adapter.targets(none.module).values()))
    assert isinstance(first, PackedLinear)
    stored = 8 * sum(b.numel() * b.element_size() for b in first.buffers())
    ours = 8 * sum(b.numel() * b.element_size() for b in layer.buffers())
    assert ours == stored + factors
    assert count == first.in_features * first.out_features
    assert error(eight, model) == pytest.approx(error(half, model), rel=0.1)


@pytest.mark.parametrize("factor_bits", [8, 16])
def test_a_state_dict_and_configurations_rebuild_it(
    tiny: Tiny, tokens: Calibration, factor_bits: int, tmp_path: Path
) -> None:
    model = tiny("opt")
    result = compressed(model, bits=3, rank=2, factor_bits=factor_bits)
    save_file(
        {k: v for k, v in result.module.state_dict().items() if "lm_head" not in k},
        tmp_path / "model.safetensors",
    )
    other = rebuild(model.clone().module, packed_configs(result.module))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    with torch.no_grad():
        expected = result.module(tokens.inputs).logits
        assert torch.equal(other(tokens.inputs).logits, expected)
        with materialized(other):
            assert torch.equal(other(tokens.inputs).logits, expected)


def test_activations_are_rounded_once_for_both_branches(tiny: Tiny) -> None:
    result = compressed(tiny("llama"), rank=2, a_bits=8, a_group_size=16)
    layer = next(iter(result.adapter.targets(result.module).values()))
    assert isinstance(layer, LowRankLayer)
    x = torch.randn(3, 32)
    quantizer = layer.input_quantizer
    assert quantizer is not None
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(quantizer(x), layer.weight))


def test_the_factors_share_the_singular_values_evenly() -> None:
    error = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    left, right = low_rank(error, 3)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))
    assert low_rank(error, 99)[0].shape == (12, 12)


def test_a_model_that_is_quantized_already_is_refused(tiny: Tiny) -> None:
    with pytest.raises(NotApplicableError, match="quantized already"):
        compressed(compressed(tiny("llama"), rank=2))


@pytest.mark.parametrize("options", [{"rank": -1}, {"factor_bits": 4}, {"base": "none"}, {"group_size": 0}])
def test_hyperparameters_out_of_range_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ParameterError, match=next(iter(options))):
        build(LoRC, options, "lorc")
