"""AdaDim against the authors' code: quantizers along both dimensions, decisions, and GPTQ with either."""

from __future__ import annotations

import re
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methodbench.testing.parity import Vectors
from methodbench.torchkit.adapters import LAYOUTS, Adapter
from methodbench.torchkit.compensation import Hessian, add_batch
from methodbench.torchkit.model import set_weight
from methodbench.torchkit.quantizers import quantize
from methodbench_quant.llm.adadim import AdaDim, inspected_modules
from methodbench_quant.llm.calls import Call, Recorder

pytestmark = pytest.mark.vectors("quant", "adadim")

LAYOUT = next(layout for layout in LAYOUTS if layout.attention_norm == "input_layernorm")


class Attention(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        y: Tensor = self.o_proj(torch.sigmoid(self.q_proj(h) * self.k_proj(h) / 8) * self.v_proj(h))
        return y


class FeedForward(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))
        return y


def block_of(vectors: Vectors) -> nn.Module:
    block = nn.Module()
    block.self_attn, block.mlp = Attention(), FeedForward()
    for name in vectors:
        if name.startswith("p0."):
            path = name.removeprefix("p0.").removesuffix(".weight")
            weight = vectors.tensor(name, torch.float32)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            set_weight(linear, weight)
            parent, _, leaf = path.rpartition(".")
            block.get_submodule(parent).add_module(leaf, linear)
    return block


def recorded(vectors: Vectors, block: nn.Module) -> Recorder:
    adapter = Adapter(kind="causal-lm", layout=LAYOUT)
    recorder = Recorder(adapter, lambda block: inspected_modules(adapter, block))
    hooks = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, x, observe=observe: observe(x[0]))
        for name, observe in recorder.watch(block).items()
    ]
    with torch.no_grad():
        for module, name in (("self_attn", "x_attn"), ("mlp", "x_mlp")):
            block.get_submodule(module)(vectors.tensor(name, torch.float32))
    recorder.stop()
    for hook in hooks:
        hook.remove()
    assert all(isinstance(call, Call) for calls in recorder.calls.values() for call in calls)
    return recorder


def method_of(vectors: Vectors, base: Literal["rtn", "gptq"] = "rtn") -> AdaDim:
    notes = vectors.meta["notes"]
    damp, size = re.search(r"percdamp ([\d.]+)", notes), re.search(r"blocksize (\d+)", notes)
    assert damp is not None
    assert size is not None
    return AdaDim(
        bits=vectors.meta["w_bit"],
        group_size=vectors.meta["group_size"],
        base=base,
        search_tokens=0,
        percdamp=float(damp[1].rstrip(".")),
        blocksize=int(size[1]),
    )


def matches(actual: Tensor, vectors: Vectors, name: str) -> None:
    tolerance = vectors.meta["tolerance"]
    equal = torch.isclose(actual, vectors.tensor(name), rtol=tolerance["rtol"], atol=tolerance["atol"])
    assert float(equal.float().mean()) >= tolerance["min_match"], name


@pytest.mark.parametrize(("along", "prefix"), [("input", "perOC"), ("output", "perIC")])
def test_groups_along_either_dimension_are_the_authors(
    vectors: Vectors, along: Literal["input", "output"], prefix: str
) -> None:
    weight = vectors.tensor("p0.self_attn.k_proj.weight", torch.float32)
    ours = quantize(weight, vectors.meta["w_bit"], group_size=vectors.meta["group_size"], along=along)
    matches(ours.dequantize(), vectors, f"{prefix}_k_proj")


def test_decisions_and_weights_are_the_authors(vectors: Vectors) -> None:
    block, method = block_of(vectors), method_of(vectors)
    recorder = recorded(vectors, block)
    names = [str(name) for name in vectors["rtnada_names"]]
    assert list(recorder.adapter.linears(block)) == names
    for name, expected in zip(names, vectors["rtnada_dims"], strict=True):
        dim = method.choose(block, name, recorder)
        assert dim == str(expected), name
        rounded = method.round(block, name, recorder, dim, name).dequantize()
        if f"rtnada.{name}" in vectors:
            matches(rounded, vectors, f"rtnada.{name}")
        set_weight(block.get_submodule(name), rounded)


@pytest.mark.parametrize("dim", ["oc", "ic"])
def test_gptq_along_either_dimension_is_the_authors(vectors: Vectors, dim: Literal["oc", "ic"]) -> None:
    weight = vectors.tensor("p0.self_attn.k_proj.weight", torch.float32)
    x = vectors.tensor("x_attn", torch.float32).flatten(0, 1)
    chunks = re.search(r"as (\d+) equal token chunks", vectors.meta["notes"])
    assert chunks is not None
    hessian = Hessian(torch.zeros(x.shape[1], x.shape[1]))
    for chunk in x.chunk(int(chunks[1])):
        add_batch(hessian, chunk)
    ours = method_of(vectors, "gptq").gptq(weight, hessian.matrix, dim).dequantize()
    matches(ours, vectors, f"gptqada_{dim}_k_proj")
    error = float((x @ (ours - weight).T).square().mean())
    assert error == pytest.approx(
        float(vectors[f"mse_gptqada_{dim}"]), rel=vectors.meta["tolerance"]["mse_rtol"]
    )
