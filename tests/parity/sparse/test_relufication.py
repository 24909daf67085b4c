"""Relufication against a reference of its definition: one block, all stages, sparsities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from methodbench.testing.parity import Vectors, stated_by
from methodbench.torchkit.adapters import LAYOUTS, Adapter
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.sequential import walk
from methodbench_sparse.relufication import aggregated_sparsity, rectify

pytestmark = pytest.mark.vectors("sparse", "relufication")


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class Attention(nn.Module):
    """Causal attention of all heads, without positions."""

    def __init__(self, vectors: Vectors, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name, key in (("q_proj", "wq"), ("k_proj", "wk"), ("v_proj", "wv"), ("o_proj", "wo")):
            self.add_module(name, linear(vectors.tensor(f"p__{key}")))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(
            torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).triu(1), -math.inf
        )
        return self.o_proj((scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2))


class MLP(nn.Module):
    def __init__(self, vectors: Vectors) -> None:
        super().__init__()
        for name, key in (("gate_proj", "wg"), ("up_proj", "wu"), ("down_proj", "wd")):
            self.add_module(name, linear(vectors.tensor(f"p__{key}")))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, vectors: Vectors) -> None:
        super().__init__()
        epsilon = stated_by(vectors.meta["function"], r"eps ([\d.e-]+)")
        for name, key in (("input_layernorm", "n1"), ("post_attention_layernorm", "n2")):
            norm = nn.RMSNorm(len(vectors[f"p__{key}"]), eps=epsilon)
            norm.weight = nn.Parameter(vectors.tensor(f"p__{key}"), requires_grad=False)
            self.add_module(name, norm)
        self.self_attn = Attention(vectors, vectors.meta["hyper"]["heads"])
        self.mlp = MLP(vectors)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    def __init__(self, vectors: Vectors) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(vectors)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


RUNS = {"stage0": (0, False), "stage1": (1, False), "stage2": (2, False), "shifted1": (1, True)}


@pytest.mark.parametrize("run", RUNS)
def test_every_stage_equals_the_reference(vectors: Vectors, run: str) -> None:
    rtol, atol = (stated_by(vectors.meta["tolerance"], rf"{kind} ([\d.e-]+)") for kind in ("rtol", "atol"))
    stage, shifted = RUNS[run]
    module = Model(vectors).eval()
    model = LoadedModel("toy", "causal-lm", module, Adapter("causal-lm", stack="layers", layout=LAYOUTS[0]))
    rectify(model, stage, vectors.meta["hyper"]["shift"] if shifted else 0.0)  # type: ignore[arg-type]
    seen: dict[str, Tensor] = {}
    (step,) = walk(model, Calibration(vectors.tensor("x")[None]), propagate="dense")
    names = {"down_input": "mlp.down_proj", "qkv_in": "self_attn.q_proj", "up_in": "mlp.up_proj"}
    observers = {name: (lambda x, key=key: seen.update({key: x[0]})) for key, name in names.items()}
    (output,) = step.forward(observers)
    torch.testing.assert_close(output[0], vectors.tensor(f"{run}_out"), rtol=rtol, atol=atol)
    expected = vectors.tensor(f"{run}_down_input")
    torch.testing.assert_close(seen["down_input"], expected, rtol=rtol, atol=atol)
    for key, name in (("down_input", "down"), ("qkv_in", "qkv_in"), ("up_in", "up_in")):
        share = float((seen[key] == 0).double().mean())
        assert share == pytest.approx(float(vectors[f"{run}_sparsity_{name}"]), rel=rtol, abs=atol)
    if f"{run}_aggregated" in vectors:
        found = aggregated_sparsity(seen["down_input"])
        torch.testing.assert_close(found, vectors.tensor(f"{run}_aggregated"), rtol=rtol, atol=atol)
