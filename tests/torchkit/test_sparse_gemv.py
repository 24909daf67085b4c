"""Products that read active columns alone: what they compute, when they are taken, and what they count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from methodbench.testing import planted
from methodbench.torchkit import sparse_gemv
from methodbench.torchkit.activation_sparsity import (
    SparseInput,
    Threshold,
    TopK,
    block_linears,
    forget,
    mask_inputs,
    measured,
)
from methodbench.torchkit.model import LoadedModel
from methodbench.torchkit.sparse_gemv import (
    Choice,
    GatherLinear,
    accelerate,
    choose,
    column_blocks,
    gather_gemv,
)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    width=st.integers(1, 60),
    block=st.integers(1, 24),
    count=st.integers(1, 5),
    sparsity=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_product_is_that_of_the_masked_input(
    seed: int, width: int, block: int, count: int, sparsity: float, dtype: torch.dtype
) -> None:
    draw = planted.generator(seed)
    weight = torch.randn(block * count, width, generator=draw).to(dtype)
    x = torch.randn(width, generator=draw).to(dtype)
    active = torch.rand(width, generator=draw) >= sparsity
    got = gather_gemv(column_blocks(weight, block), x, active)
    expected = weight.double() @ (x * active).double()
    scale = float((weight.double().abs() @ x.double().abs()).max())
    assert got.dtype == dtype
    assert float((got.double() - expected).abs().max()) <= scale * (1e-6 if dtype == torch.float32 else 2e-2)


def test_no_active_input_gives_zero_and_blocks_must_divide() -> None:
    blocks = column_blocks(torch.randn(8, 5), 4)
    assert blocks.shape == (2, 5, 4)
    assert torch.equal(gather_gemv(blocks, torch.randn(5), torch.zeros(5, dtype=torch.bool)), torch.zeros(8))
    with pytest.raises(ValueError, match="blocks of 3 do not divide 8 outputs"):
        column_blocks(torch.randn(8, 5), 3)


def sparse_model(keep: int = 40) -> LoadedModel:
    model = planted.build("llama")
    mask_inputs(model, {name: TopK(keep) for name in block_linears(model)}, "all")
    return model


def gathered(monkeypatch: pytest.MonkeyPatch, model: LoadedModel, block: int = 32) -> LoadedModel:
    monkeypatch.setattr(sparse_gemv, "choose", lambda *_, **__: Choice(block, 2.0))
    fast = model.clone()
    assert accelerate(fast, 0.5)["gather_layers"] == 14
    return fast


def test_a_model_that_gathers_decodes_and_counts_what_the_sparse_one_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = sparse_model(), planted.inputs("llama", 3, 2).inputs
    fast = gathered(monkeypatch, model)
    for tokens in (ids, ids[:, :1], ids[:1, :1]):
        forget(model)
        forget(fast)
        expected, got = planted.output(model.module, tokens), planted.output(fast.module, tokens)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert measured(fast) == measured(model)


def test_a_single_token_alone_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = gathered(monkeypatch, sparse_model())
    layer = fast.module.model.layers[0].mlp.down_proj
    assert isinstance(layer, GatherLinear)
    calls: list[int] = []
    monkeypatch.setattr(
        sparse_gemv, "gather_gemv", lambda b, x, a: calls.append(int(a.sum())) or x.new_zeros(128)
    )
    layer(torch.randn(1, 1, 256))
    layer(torch.randn(2, 1, 256))
    layer(torch.randn(1, 5, 256))
    assert calls == [40]


def test_biases_stay_and_the_weight_is_kept_once() -> None:
    linear = torch.nn.Linear(16, 32)
    adapter = planted.linear_bed(torch.eye(4)).model.adapter
    model = LoadedModel("one", "causal-lm", torch.nn.Sequential(torch.nn.Sequential(linear)), adapter)
    mask_inputs(model, {"0.0": Threshold(0.5)}, "all")
    sparse = model.module[0][0]
    assert isinstance(sparse, SparseInput)
    layer = GatherLinear(sparse, 8)
    torch.testing.assert_close(layer.weight, linear.weight)
    x = torch.randn(1, 1, 16)
    torch.testing.assert_close(layer(x), sparse(x))
    assert (layer.in_features, layer.out_features) == (16, 32)


def test_what_cannot_gain_stays_dense() -> None:
    weights = [torch.randn(64, 32) for _ in range(2)]
    assert choose(weights, 0.0).block == 0
    assert choose([weight.double() for weight in weights], 0.5).block == 0


def test_the_choice_is_what_was_measured_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr(sparse_gemv.time, "perf_counter", lambda: clock["now"])
    costs = {512: 2.0, 1024: 1.0}

    def gather(blocks: Tensor, x: Tensor, active: Tensor) -> Tensor:
        clock["now"] += costs[blocks.shape[-1]]
        return x

    def dense(x: Tensor, weight: Tensor) -> Tensor:
        clock["now"] += 1.5
        return x

    monkeypatch.setattr(sparse_gemv, "gather_gemv", gather)
    monkeypatch.setattr(sparse_gemv.F, "linear", dense)
    weights = [torch.randn(1024, 16) for _ in range(3)]
    assert choose(weights, 0.5, rounds=2) == Choice(1024, pytest.approx(1.5))
    costs[1024] = 1.45
    assert choose(weights, 0.5, rounds=2).block == 0, "a gain of 3 % is not worth another layout"


def test_layers_that_gain_nothing_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_gemv, "choose", lambda *_, **__: Choice(0, 0.8))
    model = sparse_model()
    facts = accelerate(model, 0.5)
    assert facts["gather_layers"] == 0
    assert set(facts["gather_gain"].values()) == {0.8}
    assert all(isinstance(layer, SparseInput) for layer in block_linears(model).values())
