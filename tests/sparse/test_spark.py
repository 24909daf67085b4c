"""Spark and top-k neurons: counts, the limit of the Gaussian, predictors, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.testing import planted
from methodbench.torchkit.activation_sparsity import forget, measured
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_sparse.lazy_neuron import LazyNeuron
from methodbench_sparse.spark import Spark, spark_attention, statistical_topk


def logits(model: LoadedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module(tokens).logits


def counted(model: LoadedModel, tokens: Tensor) -> dict[str, Any]:
    forget(model)
    logits(model, tokens)
    return measured(model)


def sparsify(method: Any, model: LoadedModel) -> LoadedModel:
    return method.compress(model, Calibration.none(), Context())


def test_about_k_of_a_gaussian_stay_and_fewer_of_heavier_tails() -> None:
    draw = planted.generator(0)
    x = torch.randn(64, 4096, generator=draw)
    kept = (statistical_topk(x, 0.92) > 0).sum(-1).float()
    assert float(kept.mean()) == pytest.approx(0.08 * 4096, rel=0.02)
    assert float(kept.std()) < 25
    heavy = torch.distributions.StudentT(3.0)
    torch.manual_seed(0)
    assert float((statistical_topk(heavy.sample((64, 4096)), 0.92) > 0).sum(-1).float().mean()) < 250


def test_what_stays_is_the_top_in_order_and_shifted() -> None:
    x = torch.randn(4, 256, generator=planted.generator(1))
    got = statistical_topk(x, 0.9)
    for row, kept in zip(x, got, strict=True):
        count = int((kept > 0).sum())
        assert set(kept.nonzero().flatten().tolist()) == set(row.topk(count).indices.tolist())
        shift = (row - kept)[kept > 0]
        torch.testing.assert_close(shift, shift[0].expand_as(shift))
    assert statistical_topk(x, 0.0) is x


def test_attention_keeps_all_keys_where_few_are_visible_and_about_k_later() -> None:
    draw = planted.generator(2)
    q, k, v = (torch.randn(300, 64, generator=draw) for _ in range(3))
    _, kept = spark_attention(q, k, v, r=32, keep=16)
    counts = kept.sum(-1)
    assert torch.equal(counts[:16], torch.arange(1, 17))
    assert float(counts[100:].float().mean()) == pytest.approx(16, abs=3)
    assert not kept.triu(1).any()


@pytest.mark.parametrize("method", [Spark(sparsity=0), LazyNeuron(k=0, sparsity=0), LazyNeuron(k=64)])
def test_keeping_all_is_bit_identical_to_the_dense_model(
    llama: LoadedModel, tokens: Tensor, method: Any
) -> None:
    assert torch.equal(logits(sparsify(method, llama), tokens), logits(llama, tokens))


def test_neurons_are_kept_exactly_or_about_by_the_quantile(llama: LoadedModel, tokens: Tensor) -> None:
    exact = counted(sparsify(LazyNeuron(k=16), llama), tokens)
    assert exact["sparsity_neurons"] == pytest.approx(0.75)
    assert counted(sparsify(LazyNeuron(k=0, sparsity=0.25, counted="model"), llama), tokens)[
        "sparsity_model"
    ] == pytest.approx(0.25, abs=0.01)
    about = counted(sparsify(Spark(sparsity=0.8, shift=False), llama), tokens)
    assert about["sparsity_neurons"] == pytest.approx(0.8, abs=0.05)


def test_a_predictor_spares_a_part_of_the_gate_as_well(llama: LoadedModel, tokens: Tensor) -> None:
    full = counted(sparsify(Spark(sparsity=0.8, shift=False), llama), tokens)
    half = counted(sparsify(Spark(sparsity=0.8, predictor=0.5), llama), tokens)
    assert half["sparsity_neurons"] == pytest.approx(0.8, abs=0.06)
    ratio = half["sparsity_model"] / half["sparsity_neurons"]
    assert ratio == pytest.approx(1.25 * full["sparsity_model"] / full["sparsity_neurons"])


def test_a_predictor_chooses_better_the_more_it_sees(llama: LoadedModel, tokens: Tensor) -> None:
    dense = logits(llama, tokens)
    errors = [
        float((logits(sparsify(Spark(sparsity=0.5, shift=False, predictor=p), llama), tokens) - dense).norm())
        for p in (0.1, 0.5, 1.0)
    ]
    assert errors == sorted(errors, reverse=True)


def test_what_they_lack_is_said(llama: LoadedModel) -> None:
    with pytest.raises(NotApplicableError, match="gated networks"):
        sparsify(Spark(), planted.build("opt"))
    with pytest.raises(NotApplicableError, match="out of reach"):
        sparsify(LazyNeuron(k=0, sparsity=0.65, counted="model"), llama)


@pytest.mark.parametrize(
    ("cls", "passed"),
    [
        (Spark, {"sparsity": 1}),
        (Spark, {"predictor": 0}),
        (LazyNeuron, {"k": -1}),
        (LazyNeuron, {"sparsity": 1}),
    ],
)
def test_invalid_hyperparameters_are_refused_by_name(cls: type, passed: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(passed))):
        build(cls, passed, "it")
