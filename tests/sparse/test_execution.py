"""Sparse execution of methods that zero activations: the results of masks, in products that read less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from methodbench.context import Context
from methodbench.testing import planted
from methodbench.torchkit import sparse_gemv
from methodbench.torchkit.activation_sparsity import SparseInput, forget, measured, sites
from methodbench.torchkit.kernels.native import native
from methodbench.torchkit.sparse_gemv import Choice, GatherLinear, KernelLinear, RowLinear
from methodbench_quant.decode import paired_rates
from methodbench_sparse.cats import CATS
from methodbench_sparse.chess import CHESS
from methodbench_sparse.lazy_neuron import LazyNeuron
from methodbench_sparse.teal import TEAL
from methodbench_sparse.wina import WINA

METHODS: list[tuple[type[Any], dict[str, Any]]] = [
    (TEAL, {}),
    (TEAL, {"mask_by": "topk"}),
    (WINA, {"transform": False}),
    (WINA, {"mask_by": "threshold"}),
    (CATS, {}),
    (CHESS, {"accumulate": 1}),
    (LazyNeuron, {"k": 0}),
]


def compressed(kind: type[Any], settings: dict[str, Any], **more: Any) -> Any:
    model = planted.build("llama")
    data = planted.inputs("llama", 3, 4)
    return model, kind(**settings, **more).compress(model, data, Context())


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("kind", "settings"), METHODS)
def test_sparse_products_decode_what_masks_do(
    monkeypatch: pytest.MonkeyPatch, kind: type[Any], settings: dict[str, Any], streamed: bool
) -> None:
    if native() is None:
        pytest.skip("nothing here compiles C++")

    def chosen(weights: list[Tensor], *_: object, by: str = "columns", **__: object) -> Choice:
        return Choice(weights[0].shape[0], 2.0, streamed or by == "rows")

    monkeypatch.setattr(sparse_gemv, "choose", chosen)
    _, masked = compressed(kind, settings)
    _, sparse = compressed(kind, settings, execution="sparse")
    assert masked.storage == "simulated"
    assert sparse.storage == "real"
    assert sparse.facts["execution"].startswith(
        f"sparse: {sparse.facts['execution_layers']} layers, dense: 0"
    )
    assert any(isinstance(m, (GatherLinear, RowLinear)) for m in sparse.module.modules())
    ids = planted.inputs("llama", 5, 3).inputs
    for tokens in (ids, ids[:, :1], ids[:1, :1]):
        forget(masked)
        forget(sparse)
        expected = planted.output(masked.module, tokens)
        torch.testing.assert_close(planted.output(sparse.module, tokens), expected, rtol=1e-3, atol=1e-3)
        assert measured(sparse)["sparsity_model"] == pytest.approx(
            measured(masked)["sparsity_model"], abs=5e-3
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("kind", "settings"), METHODS)
def test_graphs_on_a_gpu_decode_what_masks_do(
    monkeypatch: pytest.MonkeyPatch, kind: type[Any], settings: dict[str, Any]
) -> None:
    from methodbench.torchkit.kernels.sparse_gemv import SHAPES

    monkeypatch.setattr(sparse_gemv, "choose_launch", lambda *_: (SHAPES[0], 2.0))
    model, data = planted.build("llama"), planted.inputs("llama", 3, 4)
    model.module.cuda()
    ctx = Context(device="cuda")
    masked = kind(**settings).compress(model, data, ctx)
    sparse = kind(**settings, execution="sparse").compress(model, data, ctx)
    kernels = [m for m in sparse.module.modules() if isinstance(m, KernelLinear)]
    assert len(kernels) == sparse.facts["execution_layers"] > 0
    assert sparse.storage == "real"
    ids = data.inputs.cuda()
    for tokens in (ids, ids[:, :1], ids[:1, :1]):
        expected = planted.output(masked.module, tokens)
        torch.testing.assert_close(planted.output(sparse.module, tokens), expected, rtol=1e-3, atol=1e-3)
    forget(sparse)
    forget(masked)
    _, (ours, theirs) = paired_rates(sparse.module, masked.module, ids[:1, :8], 8, 3)
    assert ours == theirs
    counted = {name: site.tokens for name, site in sites(sparse.module).items()}
    assert counted == {name: site.tokens for name, site in sites(masked.module).items()}
    assert set(counted.values()) == {16}
    assert measured(sparse)["sparsity_model"] == pytest.approx(measured(masked)["sparsity_model"], abs=5e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_launch_is_chosen_by_measurement_where_it_gains() -> None:
    weights = [torch.randn(4096, 4096, device="cuda", dtype=torch.float16) for _ in range(8)]
    launch, gain = sparse_gemv.choose_launch(weights, 0.65)
    assert launch is not None
    assert gain > sparse_gemv.WORTHWHILE
    assert sparse_gemv.choose_launch(weights, 0.0) == (None, 1.0)
    small = [torch.randn(64, 64, device="cuda", dtype=torch.float16) for _ in range(8)]
    launch, gain = sparse_gemv.choose_launch(small, 0.5)
    assert (launch is None) == (gain < sparse_gemv.WORTHWHILE)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [pair for pair in METHODS if pair[1].get("mask_by") != "threshold" or pair[0] is TEAL],
)
def test_a_sparsity_of_0_is_the_dense_model_bit_for_bit(kind: type[Any], settings: dict[str, Any]) -> None:
    model, sparse = compressed(kind, settings, sparsity=0.0, execution="sparse")
    ids = planted.inputs("llama", 5, 2).inputs
    if not settings.get("transform", kind is not WINA):
        assert sparse.facts["execution_layers"] == 0
    for tokens in (ids, ids[:1, :1]):
        assert torch.equal(planted.output(sparse.module, tokens), planted.output(model.module, tokens))


def test_constant_activations_are_not_masked_and_decode_as_the_dense_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sparse_gemv, "choose", lambda weights, *_, **__: Choice(weights[0].shape[0], 2.0))
    model, data = planted.build("llama"), planted.inputs("llama", 3, 4)
    first = model.module.model.layers[0].input_layernorm
    first.weight = torch.nn.Parameter(torch.zeros_like(first.weight), requires_grad=False)
    ctx = Context()
    sparse = TEAL(sparsity=0.5, execution="sparse", positions="all").compress(model, data, ctx)
    assert any("constant" in warning for warning in ctx.warnings)
    layer = sparse.module.model.layers[0].self_attn.q_proj
    x = torch.full((1, 1, layer.in_features), 0.3)
    torch.testing.assert_close(layer(x), model.module.model.layers[0].self_attn.q_proj(x))
    assert torch.isfinite(planted.output(sparse.module, data.inputs[:1, :1])).all()


def test_the_default_masks_dense_products() -> None:
    _, masked = compressed(TEAL, {})
    assert "execution" not in masked.facts
    assert any(isinstance(module, SparseInput) for module in masked.module.modules())
