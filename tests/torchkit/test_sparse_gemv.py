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
    feed_forwards,
    forget,
    mask_inputs,
    mask_neurons,
    measured,
)
from methodbench.torchkit.kernels.native import Native, native
from methodbench.torchkit.model import LoadedModel
from methodbench.torchkit.sparse_gemv import (
    ActiveNeurons,
    Choice,
    GatherLinear,
    RowLinear,
    accelerate,
    choose,
    column_blocks,
    execute,
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
    assert accelerate(fast, 0.5)["execution_layers"] == 14
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
    monkeypatch.setattr(sparse_gemv, "native", lambda: None)
    weights = [torch.randn(1024, 16) for _ in range(3)]
    assert choose(weights, 0.5, rounds=2) == Choice(1024, pytest.approx(1.5))
    costs[1024] = 1.45
    assert choose(weights, 0.5, rounds=2).block == 0, "a gain of 3 % is not worth another layout"


def test_layers_that_gain_nothing_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_gemv, "choose", lambda *_, **__: Choice(0, 0.8))
    model = sparse_model()
    execute(model, "sparse", 0.5)
    assert model.facts["execution_layers"] == 0
    assert set(model.facts["execution_gain"].values()) == {0.8}
    assert model.facts["execution"].startswith("sparse: 0 layers, dense: 14 because at a sparsity of 0.50 ")
    assert "columns 128x256 float32 gains 0.80" in model.facts["execution"]
    assert all(isinstance(layer, SparseInput) for layer in block_linears(model).values())
    assert model.storage == "simulated"


def test_masked_execution_changes_nothing() -> None:
    model = sparse_model()
    execute(model, "masked", 0.5)
    assert "execution" not in model.facts
    assert model.storage == "simulated"


def code() -> Native:
    found = native()
    if found is None:
        pytest.skip("nothing here compiles C++")
    return found


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    width=st.integers(1, 90),
    out=st.integers(1, 150),
    sparsity=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_compiled_products_are_those_of_the_masked_input_and_output(
    seed: int, width: int, out: int, sparsity: float, dtype: torch.dtype
) -> None:
    draw = planted.generator(seed)
    weight = torch.randn(out, width, generator=draw).to(dtype)
    x = torch.randn(width, generator=draw).to(dtype)
    active = torch.rand(width, generator=draw) >= sparsity
    wanted = torch.rand(out, generator=draw) >= sparsity
    scale = float((weight.double().abs() @ x.double().abs()).max())
    limit = scale * (1e-6 if dtype == torch.float32 else 1e-2)
    columns = code().columns(weight.T.contiguous(), x, active)
    assert columns.dtype == dtype
    assert float((columns.double() - weight.double() @ (x * active).double()).abs().max()) <= limit
    rows = code().rows(weight, x, wanted)
    assert float((rows.double() - (weight.double() @ x.double()) * wanted).abs().max()) <= limit
    assert not rows[~wanted].any()


def test_compiled_products_read_nothing_of_what_is_not_active_and_do_not_depend_on_threads() -> None:
    draw = planted.generator(0)
    weight, x = torch.randn(700, 400, generator=draw), torch.randn(400, generator=draw)
    active, wanted = torch.rand(400, generator=draw) > 0.5, torch.rand(700, generator=draw) > 0.5
    table, expected = weight.T.contiguous(), code().columns(weight.T.contiguous(), x, active)
    table[~active] = float("nan")
    holed = weight.clone()
    holed[~wanted] = float("nan")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(code().columns(table, x, active), expected)
            assert torch.equal(code().rows(holed, x, wanted), code().rows(weight, x, wanted))
    finally:
        torch.set_num_threads(threads)


def test_compiled_products_refuse_what_they_cannot_read() -> None:
    table, x, active = torch.randn(4, 6), torch.randn(4), torch.ones(4, dtype=torch.bool)
    for arguments in (
        (table.T, x, active),
        (table.double(), x.double(), active),
        (table, x.bfloat16(), active),
        (table, torch.randn(5), torch.ones(5, dtype=torch.bool)),
        (table, x, active.int()),
    ):
        with pytest.raises(ValueError, match="columns takes contiguous weights and inputs of one dtype"):
            code().columns(*arguments)


def test_a_bfloat16_sum_is_rounded_to_nearest_even_and_keeps_what_is_not_finite() -> None:
    table = torch.tensor([[1.0, 1.0, float("inf"), float("nan")], [2**-8, 3 * 2**-8, 0, 0]]).bfloat16()
    got = code().columns(table, torch.ones(2).bfloat16(), torch.ones(2, dtype=torch.bool))
    expected = table.float().sum(0).bfloat16()
    assert torch.equal(got[:3], expected[:3])
    assert got[3].isnan()


def neuron_model() -> LoadedModel:
    model = planted.build("llama")
    mask_neurons(model, ((network, TopK(60)) for network in feed_forwards(model)), "all")
    return model


@pytest.mark.parametrize("streamed", [False, True])
def test_masked_neurons_spare_rows_and_columns(monkeypatch: pytest.MonkeyPatch, streamed: bool) -> None:
    code()

    def chosen(weights: list[Tensor], *_: object, by: str = "columns", **__: object) -> Choice:
        return Choice(weights[0].shape[0], 2.0, streamed or by == "rows")

    monkeypatch.setattr(sparse_gemv, "choose", chosen)
    model, ids = neuron_model(), planted.inputs("llama", 3, 2).inputs
    fast = model.clone()
    execute(fast, "sparse", 0.5)
    assert fast.facts["execution"] == "sparse: 4 layers, dense: 0"
    assert fast.storage == "real"
    block = fast.module.model.layers[0].mlp
    assert (type(block.up_proj), type(block.down_proj)) == (RowLinear, GatherLinear)
    for ready in (fast, fast.clone()):
        for tokens in (ids, ids[:, :1], ids[:1, :1]):
            forget(model)
            forget(ready)
            expected, got = planted.output(model.module, tokens), planted.output(ready.module, tokens)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            assert measured(ready) == measured(model)


def test_a_projection_that_runs_before_its_activation_function_stays_dense() -> None:
    code()
    linear, neurons = torch.nn.Linear(8, 6), ActiveNeurons()
    layer, x = RowLinear(linear, neurons), torch.randn(1, 1, 8)
    torch.testing.assert_close(layer(x), linear(x))
    mask = torch.tensor([True, False] * 3)
    neurons.put(mask)
    torch.testing.assert_close(layer(x), linear(x) * mask)
    torch.testing.assert_close(layer(x), linear(x), msg="a mask serves one token")
    neurons.put(mask)
    batch = torch.randn(2, 1, 8)
    torch.testing.assert_close(layer(batch), linear(batch))
    torch.testing.assert_close(layer(x), linear(x), msg="a batch ends what the mask was for")


def test_without_a_compiler_columns_are_gathered_and_rows_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_gemv, "native", lambda: None)
    weights = [torch.randn(64, 32) for _ in range(2)]
    assert not choose(weights, 0.9).streamed
    assert choose(weights, 0.9, by="rows") == Choice(0, 1.0)
    model = neuron_model()
    linear = model.module.model.layers[0].mlp.up_proj
    with pytest.raises(ValueError, match="nothing here compiles it"):
        GatherLinear(linear, 256, streamed=True)


def test_a_rule_that_keeps_everything_of_a_constant_activation_gives_the_dense_product() -> None:
    linear = torch.nn.Linear(16, 32)
    adapter = planted.linear_bed(torch.eye(4)).model.adapter
    model = LoadedModel("one", "causal-lm", torch.nn.Sequential(torch.nn.Sequential(linear)), adapter)
    mask_inputs(model, {"0.0": Threshold(0.0)}, "all")
    code()
    layer, x = GatherLinear(model.module[0][0], 32, streamed=True), torch.full((1, 1, 16), 0.7)
    torch.testing.assert_close(layer(x), linear(x))
    zeros = torch.zeros(1, 1, 16)
    torch.testing.assert_close(layer(zeros), linear(zeros))
