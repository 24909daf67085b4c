"""Unified sparsity: layers that are left out, smaller networks, and mixtures out of dense ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.testing import planted
from methodbench.torchkit.model import Calibration, LoadedModel, next_token_loss
from methodbench.torchkit.size import tensor_bytes
from methodbench_sparse.structured import gated_networks
from methodbench_sparse.unified_sparsity import (
    Mixture,
    UnifiedSparsity,
    deal,
    depth_scores,
    importances,
    most_alike,
    width_score,
)


def sparse(model: LoadedModel, data: Calibration, **hyper: Any) -> LoadedModel:
    return UnifiedSparsity(**hyper).compress(model, data, Context(seed=4))


@pytest.fixture
def deep() -> LoadedModel:
    """Four blocks, of which the third adds next to nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from methodbench.torchkit.adapters import detect

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.3,
        use_cache=False,
    )
    module = LlamaForCausalLM(config).eval().requires_grad_(False)
    quiet: Any = module.model.layers[2]
    quiet.self_attn.o_proj.weight.mul_(1e-4)
    quiet.mlp.down_proj.weight.mul_(1e-4)
    return LoadedModel("deep", "causal-lm", module, detect(module))


@pytest.mark.parametrize("mode", ["depth", "width"])
def test_nothing_asked_changes_nothing(
    llama: LoadedModel, data: Calibration, tokens: torch.Tensor, mode: str
) -> None:
    same = sparse(llama, data, mode=mode, sparsity=0.0)
    assert torch.equal(same.module(tokens).logits, llama.module(tokens).logits)


@pytest.mark.parametrize("drop", ["block", "attention", "mlp"])
def test_the_layer_that_changes_least_is_left_out(
    deep: LoadedModel, data: Calibration, tokens: torch.Tensor, drop: str
) -> None:
    scores = depth_scores(deep, data, drop, "stream")  # type: ignore[arg-type]
    assert scores[2] == pytest.approx(1.0, abs=1e-3)
    shorter = sparse(deep, data, mode="depth", drop=drop, output="stream", sparsity=0.25)
    assert shorter.facts["layers_left_out"] == [2]
    torch.testing.assert_close(shorter.module(tokens).logits, deep.module(tokens).logits, rtol=0, atol=0.02)
    assert tensor_bytes(shorter.module) < tensor_bytes(deep.module)
    # As coded, a feed-forward output that has no direction of the stream's is not alike.
    assert depth_scores(deep, data, "mlp", "raw")[2] < 0.9


def test_text_can_be_continued_without_a_layer(
    deep: LoadedModel, data: Calibration, tokens: torch.Tensor
) -> None:
    for drop in ("block", "attention", "mlp"):
        module: Any = sparse(deep, data, mode="depth", drop=drop, output="stream", sparsity=0.25).module
        given = module.generate(
            tokens[:1, :8], max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0
        )
        again = module.generate(
            tokens[:1, :8], max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0
        )
        assert torch.equal(given, again), drop


def test_the_smaller_network_holds_the_neurons_of_highest_score(
    llama: LoadedModel, data: Calibration
) -> None:
    pruned = sparse(llama, data, sparsity=0.25)
    assert pruned.facts["neurons_left"] == [48, 48]
    assert tensor_bytes(pruned.module) < tensor_bytes(llama.module)
    networks = gated_networks(llama)
    for network, amount in zip(networks, importances(llama, data, networks), strict=True):
        down = llama.module.get_submodule(network.down).get_parameter("weight")
        best = width_score(amount, down).topk(48).indices.sort().values
        small = pruned.module.get_submodule(network.down).get_parameter("weight")
        assert torch.equal(small, down[:, best])


@given(seed=st.integers(0, 99), experts=st.sampled_from([2, 4, 8]), shared=st.sampled_from([0.0, 0.25, 0.5]))
def test_every_neuron_is_dealt_once_and_experts_weigh_about_the_same(
    seed: int, experts: int, shared: float
) -> None:
    importance = torch.rand(64, generator=planted.generator(seed))
    always, dealt = deal(importance, experts, shared)
    assert sorted([*always.tolist(), *dealt.flatten().tolist()]) == list(range(64))
    assert len(always) == int(64 * shared)
    if len(always):
        assert importance[always].min() >= importance[dealt].max()
    weights = importance[dealt].sum(1)
    assert float(weights.max() - weights.min()) <= float(importance.max())


def test_neurons_that_do_not_divide_are_refused() -> None:
    with pytest.raises(NotApplicableError, match="64 neurons do not divide among 7 experts"):
        deal(torch.rand(64), 7, 0.0)


def test_with_all_experts_the_mixture_is_the_dense_model(
    deep: LoadedModel, data: Calibration, tokens: torch.Tensor
) -> None:
    dense = deep.module(tokens).logits
    for shared in (0.0, 0.5):
        mixed = sparse(deep, data, mode="experts", experts=8, top_k=8, shared=shared)
        torch.testing.assert_close(mixed.module(tokens).logits, dense, rtol=1e-3, atol=1e-3)
        mixtures = [part for part in mixed.module.modules() if isinstance(part, Mixture)]
        assert len(mixtures) == 2, "the first and the last block stay dense"
    half = sparse(deep, data, mode="experts", experts=8, top_k=4)
    assert not torch.allclose(half.module(tokens).logits, dense, atol=1e-2)


def test_routers_learn_and_nothing_else_does(deep: LoadedModel, data: Calibration) -> None:
    hyper: dict[str, Any] = {"mode": "experts", "experts": 8, "top_k": 4, "shared": 0.25}
    untrained = sparse(deep, data, **hyper)
    trained = sparse(deep, data, **hyper, steps=60, lr=0.02, tokens=40)
    assert next_token_loss(trained, data.inputs) < next_token_loss(untrained, data.inputs)
    before, after = untrained.module.state_dict(), trained.module.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith(("router.weight", "mlp.gate.weight")) for name in changed)
    assert not any(parameter.requires_grad for parameter in trained.module.parameters())


def test_ties_are_broken_by_order() -> None:
    assert most_alike([0.5, 0.9, 0.9, 0.1], 2) == [1, 2]
    assert most_alike([0.9, 0.9, 0.9], 1) == [0]
    assert most_alike([0.1], 0) == []


def test_hostile_input_is_refused(llama: LoadedModel, data: Calibration) -> None:
    with pytest.raises(NotApplicableError, match="no calibration data"):
        sparse(llama, Calibration.none())
    with pytest.raises(NotApplicableError, match="gate, up and down"):
        sparse(planted.build("opt"), planted.inputs("opt", 2, 1))
    biased = llama.clone()
    down: Any = biased.module.get_submodule(gated_networks(biased)[1].down)
    down.bias = nn.Parameter(torch.zeros(32))
    with pytest.raises(NotApplicableError, match="has a bias"):
        Mixture.out_of(biased.module, gated_networks(biased)[1], *reversed(deal(torch.rand(64), 2, 0.0)), 1)
    for hyper, where in (
        ({"sparsity": 1.0}, "sparsity"),
        ({"experts": 4, "top_k": 5}, "more than the 4 experts"),
    ):
        with pytest.raises(ParameterError, match=where):
            build(UnifiedSparsity, hyper, "unified-sparsity")
