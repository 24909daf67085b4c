"""AWQ against the authors' code, on the toy block that the vectors describe."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.testing.parity import Vectors, stated_by
from methodbench.torchkit.adapters import LAYOUTS, Adapter, ScaleGroup
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.packed import PackedLinear
from methodbench.torchkit.sequential import BlockStep
from methodbench_quant.llm.awq import AWQ, ScaleSearch
from methodbench_quant.llm.calls import Recorder
from methodbench_quant.llm.layers import apply_scale

pytestmark = pytest.mark.vectors("quant", "awq")


class Attention(nn.Module):
    """A gate instead of a softmax: ``out(sigmoid(q * k / 8) * v)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, h: Tensor) -> Tensor:
        return self.out_proj(torch.sigmoid(self.q_proj(h) * self.k_proj(h) / 8) * self.v_proj(h))


class Block(nn.Module):
    """The OPT-like block of the vectors' ``meta``."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.self_attn = Attention(width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, wide)
        self.activation_fn = nn.ReLU()
        self.fc2 = nn.Linear(wide, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(self.activation_fn(self.fc1(self.final_layer_norm(x))))


class Stack(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


OPT_LAYOUT = next(layout for layout in LAYOUTS if layout.attention_norm == "self_attn_layer_norm")


def model_of(vectors: Vectors) -> LoadedModel:
    wide, width = vectors["p0.fc1.weight"].shape
    block = Block(width, wide)
    state = {
        name.removeprefix("p0."): vectors.tensor(name, torch.float32) for name in vectors if name[:3] == "p0."
    }
    block.load_state_dict(state)
    adapter = Adapter(kind="causal-lm", stack="layers", layout=OPT_LAYOUT)
    return LoadedModel("toy", "causal-lm", Stack(block).eval(), adapter)


def method_of(vectors: Vectors) -> AWQ:
    meta = vectors.meta
    return AWQ(
        bits=meta["w_bit"],
        group_size=meta["group_size"],
        n_grid=meta["n_grid"],
        search_tokens=0,
        clip_grid=meta["clip_n_grid"],
        max_shrink=meta["max_shrink"],
        clip_tokens=meta["n_sample_token"],
    )


def searched(vectors: Vectors) -> tuple[nn.Module, Recorder, dict[ScaleGroup, ScaleSearch]]:
    model = model_of(vectors)
    block = model.adapter.blocks(model.module)[0]
    recorder = Recorder(model.adapter)
    x = vectors.tensor("x", torch.float32)
    BlockStep(0, "layers.0", block, [x], [{}]).forward(recorder.watch(block))
    recorder.stop()
    return block, recorder, method_of(vectors).search_scales(block, recorder)


def test_every_candidate_has_the_authors_loss(vectors: Vectors) -> None:
    _, _, searches = searched(vectors)
    losses = torch.tensor([search.losses for search in searches.values()], dtype=torch.float64)
    expected, tolerance = vectors.tensor("loss_history"), vectors.meta["tolerance"]
    # One weight that rounds the other way in a channel of large activations moves a loss by a few per cent.
    torch.testing.assert_close(losses, expected, rtol=tolerance["mse_rtol"], atol=0)
    equal = torch.isclose(losses, expected, rtol=tolerance["rtol"])
    assert float(equal.double().mean()) >= tolerance["min_match"]
    assert [search.ratio for search in searches.values()] == pytest.approx(list(vectors["best_ratio"]))


def test_the_scales_are_the_authors(vectors: Vectors) -> None:
    _, _, searches = searched(vectors)
    tolerance = vectors.meta["tolerance"]
    assert len(searches) == sum(name.startswith("scale.") for name in vectors)
    for group, search in searches.items():
        expected = vectors.tensor(f"scale.{group.previous}->{group.linears[0]}")
        torch.testing.assert_close(search.scale, expected, rtol=tolerance["rtol"], atol=tolerance["atol"])


def test_the_clipping_thresholds_are_the_authors(vectors: Vectors) -> None:
    block, recorder, searches = searched(vectors)
    for group, search in searches.items():
        apply_scale(block, group, search.scale)
    found = method_of(vectors).search_clips(block, recorder, searches)
    # Errors of neighbouring thresholds nearly tie; the notes say which share must be equal.
    share = stated_by(vectors.meta["notes"], r">= ([\d.]+) % of clip values")
    expected = {
        name.removeprefix("clip."): vectors.tensor(name) for name in vectors if name.startswith("clip.")
    }
    assert found.keys() == expected.keys()
    for name, threshold in expected.items():
        equal = torch.isclose(found[name].squeeze(-1), threshold, rtol=vectors.meta["tolerance"]["rtol"])
        assert float(equal.float().mean()) >= share, name


def test_scaling_alone_keeps_the_function(vectors: Vectors) -> None:
    block, _, searches = searched(vectors)
    x = vectors.tensor("x", torch.float32)
    with torch.no_grad():
        before = block(x)
        for group, search in searches.items():
            apply_scale(block, group, search.scale)
        tolerance = vectors.meta["tolerance"]
        torch.testing.assert_close(block(x), before, rtol=tolerance["rtol"], atol=tolerance["atol"])


def test_the_compressed_block_holds_the_authors_weights_and_error(vectors: Vectors) -> None:
    model, tolerance = model_of(vectors), vectors.meta["tolerance"]
    x = vectors.tensor("x", torch.float32)
    compressed = method_of(vectors).compress(model, Calibration(x), Context())
    block = compressed.adapter.blocks(compressed.module)[0]
    for name in (name for name in vectors if name.startswith("final.") and name.endswith(".weight")):
        path = name.removeprefix("final.").removesuffix(".weight").replace("ln1", "self_attn_layer_norm")
        layer, expected = block.get_submodule(path), vectors.tensor(name)
        packed = isinstance(layer, PackedLinear)
        weight = layer.dequantize() if packed else layer.weight
        # Packed scales are fp16.
        rtol = max(tolerance["rtol"], torch.finfo(torch.float16).eps) if packed else tolerance["rtol"]
        equal = torch.isclose(weight, expected, rtol=rtol, atol=tolerance["atol"])
        assert float(equal.float().mean()) >= tolerance["min_match"], name
    with torch.no_grad():
        error = float((compressed.module(x) - model.module(x)).square().mean())
    assert error == pytest.approx(float(vectors["mse_awq"]), rel=tolerance["mse_rtol"])
    assert error < float(vectors["mse_rtn"])


def test_without_search_the_error_is_that_of_rounding(vectors: Vectors) -> None:
    model, x = model_of(vectors), vectors.tensor("x", torch.float32)
    plain = AWQ(
        bits=vectors.meta["w_bit"], group_size=vectors.meta["group_size"], auto_scale=False, clip=False
    ).compress(model, Calibration(x), Context())
    with torch.no_grad():
        error = float((plain.module(x) - model.module(x)).square().mean())
    assert error == pytest.approx(float(vectors["mse_rtn"]), rel=vectors.meta["tolerance"]["mse_rtol"])
