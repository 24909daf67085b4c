"""Sparse execution of methods that zero activations: the results of masks, in products that read less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from methodbench.context import Context
from methodbench.testing import planted
from methodbench.torchkit import sparse_gemv
from methodbench.torchkit.activation_sparsity import SparseInput, forget, measured
from methodbench.torchkit.kernels.native import native
from methodbench.torchkit.sparse_gemv import Choice, GatherLinear, RowLinear
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
