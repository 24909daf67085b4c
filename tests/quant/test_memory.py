"""Dense weights go as soon as their layers are packed."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from methodbench.context import Context
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.packed import PackedLayer
from methodbench_quant.llm.awq import AWQ
from methodbench_quant.llm.gptq import GPTQ
from methodbench_quant.llm.rtn import RTN
from methodbench_quant.llm.smoothquant import SmoothQuant

Tiny = Callable[[str], LoadedModel]


@pytest.mark.parametrize(
    "method", [RTN(), GPTQ(bits=4), AWQ(group_size=8), SmoothQuant()], ids=lambda m: type(m).__name__
)
def test_a_packed_layer_is_all_that_is_left_of_a_dense_one(
    method: Any, tiny: Tiny, tokens: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(type(method).__module__)
    replace: Callable[..., PackedLayer] = module.replace_linear
    replaced: list[weakref.ref[nn.Module]] = []

    def watched(block: nn.Module, name: str, quantized: Any, **options: Any) -> PackedLayer:
        # A variable of the loop may hold the layer before, no list of layers any other.
        assert all(layer() is None for layer in replaced[:-1])
        replaced.append(weakref.ref(block.get_submodule(name)))
        return replace(block, name, quantized, **options)

    monkeypatch.setattr(module, "replace_linear", watched)
    model = tiny("llama")
    method.compress(model, tokens, Context())
    assert len(replaced) == len(model.adapter.targets(model.module))
