"""AdaDim on tiny models: it picks the dimension that costs less, and without the choice it is its base."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_quant.llm.adadim import AdaDim
from methodbench_quant.llm.calls import Recorder
from methodbench_quant.llm.gptq import GPTQ
from methodbench_quant.llm.rtn import RTN

Tiny = Callable[[str], LoadedModel]


def compressed(model: LoadedModel, data: Calibration, **options: object) -> LoadedModel:
    return build(AdaDim, {"group_size": 16, **options}, "adadim").compress(model, data, Context())


def losses_of(weight: torch.Tensor, x: torch.Tensor) -> dict[str, float]:
    block = nn.Module()
    block.fc = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    block.fc.weight = nn.Parameter(weight, False)
    recorder = Recorder(Adapter(kind="causal-lm"))
    recorder.inputs = {"fc": [x]}
    return dict(AdaDim(bits=3, group_size=16).losses(block, "fc", recorder))


def test_outlier_channels_favour_groups_within_them_and_scaled_rows_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    x = torch.randn(200, 64, generator=generator)
    outliers = x.clone()
    outliers[:, ::16] *= 30
    hot = weight.clone()
    hot[:, 1::16] *= 4
    found = losses_of(hot, outliers)
    assert found["ic"] < found["oc"]
    rows = weight * (1 + 3 * (torch.arange(64) % 2))[:, None]
    found = losses_of(rows, x)
    assert found["oc"] < found["ic"]


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_without_the_choice_it_is_the_base_bit_for_bit(tiny: Tiny, tokens: Calibration, name: str) -> None:
    model = tiny(name)
    ids = tokens.inputs[:2]
    ours = compressed(model, tokens, adaptive=False)
    rtn = RTN(bits=3, group_size=16).compress(model, Calibration.none(), Context())
    assert torch.equal(ours.module(ids).logits, rtn.module(ids).logits)
    ours = compressed(model, tokens, adaptive=False, base="gptq")
    options = {"bits": 3, "group_size": 16, "act_order": True, "static_groups": True}
    gptq = build(GPTQ, options, "gptq").compress(model, tokens, Context())
    torch.testing.assert_close(ours.module(ids).logits, gptq.module(ids).logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("base", ["rtn", "gptq"])
@pytest.mark.parametrize("name", ["llama", "opt", "mixture"])
def test_both_dimensions_are_used_and_packed(tiny: Tiny, tokens: Calibration, name: str, base: str) -> None:
    model = tiny(name)
    result = compressed(model, tokens, base=base)
    dims = result.facts["dims"]
    assert set(dims) == set(result.adapter.targets(result.module))
    assert set(dims.values()) == {"oc", "ic"}
    for layer_name, dim in dims.items():
        assert result.module.get_submodule(layer_name).transposed == (dim == "ic")
    assert result.storage == "real"
    again = compressed(model, tokens, base=base)
    assert again.facts["dims"] == dims


def test_a_height_that_groups_do_not_divide_is_refused_when_both_are_tried(
    tiny: Tiny, tokens: Calibration
) -> None:
    model = tiny("llama")
    with pytest.raises(NotApplicableError, match=r"k_proj has 16 output rows.* group size 32"):
        compressed(model, tokens, group_size=32)
    compressed(model, tokens, group_size=32, adaptive=False)


@pytest.mark.parametrize("options", [{"bits": 9}, {"group_size": 0}, {"base": "awq"}, {"percdamp": 0}])
def test_hyperparameters_out_of_range_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ParameterError, match=next(iter(options))):
        build(AdaDim, options, "adadim")
