"""CFSP: allocation over blocks, ranking of neurons, and layers that are smaller in fact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.activation_sparsity import feed_forwards
from methodbench.torchkit.model import Calibration, LoadedModel, next_token_loss
from methodbench.torchkit.size import tensor_bytes
from methodbench_sparse.cfsp import (
    CFSP,
    change,
    keep_ratios,
    kept,
    neuron_scores,
    statistics,
)
from methodbench_sparse.structured import gated_networks


def prune(model: LoadedModel, data: Calibration, **hyper: Any) -> LoadedModel:
    return CFSP(**{"multiple": 1, **hyper}).compress(model, data, Context(seed=3))


@given(
    importances=st.lists(st.floats(0, 1e5), min_size=1, max_size=12),
    sparsity=st.floats(0.01, 0.95),
    sharpness=st.floats(0, 1e3),
)
def test_blocks_keep_what_is_asked_on_average_and_never_more_than_all(
    importances: list[float], sparsity: float, sharpness: float
) -> None:
    found = torch.tensor(importances, dtype=torch.float64)
    keep = keep_ratios(found, sparsity, sharpness)
    assert float(keep.mean()) == pytest.approx(1 - sparsity)
    assert float(keep.max()) <= 1 + 1e-9
    # Who does more keeps no less.
    order = found.argsort()
    assert bool((keep[order].diff() >= -1e-9).all())


def test_without_sharpness_all_blocks_keep_the_same() -> None:
    keep = keep_ratios(torch.tensor([1.0, 50.0, 9e4]), 0.3, 0.0)
    torch.testing.assert_close(keep, torch.full((3,), 0.7, dtype=torch.float64))


def test_a_block_that_turns_the_stream_further_is_more_important() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    y = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert change(x, y, "angular").tolist() == pytest.approx([0.0, 0.5, 1.0])
    assert change(x, y, "cosine").tolist() == pytest.approx([0.0, 1.0, 2.0])
    assert change(x, y, "mse").tolist() == pytest.approx([0.5, 1.0, 2.0])
    assert change(x, y, "mae").tolist() == pytest.approx([0.5, 1.0, 1.0])
    assert change(x, y, "constant").tolist() == [0, 0, 0]
    # A state of zeros has no direction: between no change and all of it.
    assert float(change(torch.zeros(1, 2), y[:1], "cosine")) == 0.5


@pytest.mark.parametrize("outer", [1.0, 2.0])
def test_in_the_authors_score_weights_cancel_and_in_the_papers_they_do_not(outer: float) -> None:
    torch.manual_seed(0)
    gate, up, down = torch.randn(40, 8), torch.randn(40, 8), torch.randn(8, 40)
    norm = torch.rand(40) + 0.1
    for score in ("three_w_one_wa", "three_w_one_a", "one_wa"):
        scores = neuron_scores(gate, up, down, norm, score, 1.0, outer)  # type: ignore[arg-type]
        terms = 1 if score == "one_wa" else 3
        torch.testing.assert_close(scores, terms / 8 * norm**outer)
    paper = neuron_scores(gate, up, down, norm, "paper")
    assert not torch.equal(paper.argsort(), norm.argsort())
    # Written out: sum_j |W_ji| A_i / (sum_i |W_ji| sum_i A_i).
    expected = [
        sum(float(down[j, i].abs() * norm[i] / (down[j].abs().sum() * norm.sum())) for j in range(8))
        for i in range(40)
    ]
    assert paper.tolist() == pytest.approx(expected, rel=1e-4)


def test_the_smaller_layers_give_what_masked_neurons_give(
    llama: LoadedModel, data: Calibration, tokens: torch.Tensor
) -> None:
    pruned = prune(llama, data, sparsity=0.4)
    norms, _ = statistics(llama, data, gated_networks(llama), "angular")
    masked = llama.clone()
    for network, norm, left in zip(feed_forwards(masked), norms, pruned.facts["neurons_left"], strict=True):
        keep = norm >= norm.sort(descending=True).values[left - 1]
        down = masked.module.get_submodule(network.down)
        down.weight = nn.Parameter(down.get_parameter("weight") * keep, requires_grad=False)
    small, full = pruned.module(tokens).logits, masked.module(tokens).logits
    torch.testing.assert_close(small, full, rtol=1e-4, atol=1e-4)
    assert tensor_bytes(pruned.module) < tensor_bytes(llama.module)
    assert pruned.storage == "real"
    share = 1 - sum(pruned.facts["neurons_left"]) / sum(network.neurons for network in feed_forwards(llama))
    assert pruned.facts["neurons_cut_share"] == pytest.approx(share)
    # One neuron more than the share stays in each block.
    assert share == pytest.approx(0.4, abs=2 / 64)


def test_nothing_asked_changes_nothing(llama: LoadedModel, data: Calibration, tokens: torch.Tensor) -> None:
    assert torch.equal(prune(llama, data, sparsity=0.0).module(tokens).logits, llama.module(tokens).logits)


def test_widths_are_multiples_and_never_nothing(llama: LoadedModel, data: Calibration) -> None:
    assert all(left % 16 == 0 for left in prune(llama, data, sparsity=0.4, multiple=16).facts["neurons_left"])
    assert prune(llama, data, sparsity=0.99, multiple=16).facts["neurons_left"] == [16, 16]
    scores = torch.arange(10.0)
    assert int(kept(scores, 0.5, 1).sum()) == 6
    assert int(kept(scores, 1.0, 1).sum()) == 10
    assert int(kept(torch.ones(10), 0.5, 1).sum()) == 10, "equal neurons stay together"


def test_the_constant_follows_the_tokens_there_are(llama: LoadedModel, data: Calibration) -> None:
    as_coded = prune(llama, data, sparsity=0.4, per_budget=False, sharpness=1.0).facts["neurons_left"]
    scaled = prune(llama, data, sparsity=0.4, sharpness=1e3).facts["neurons_left"]
    # 240 tokens cannot move a sigmoid that was made for 131,072.
    assert as_coded[0] == as_coded[1]
    assert scaled[0] != scaled[1]


def test_recovery_lowers_the_loss_on_its_text_and_leaves_no_updates(
    llama: LoadedModel, data: Calibration
) -> None:
    pruned = prune(llama, data, sparsity=0.5)
    recovered = prune(llama, data, sparsity=0.5, recovery_steps=60, recovery_lr=1e-2, recovery_rank=4)
    assert next_token_loss(recovered, data.inputs) < next_token_loss(pruned, data.inputs) - 0.1
    assert recovered.facts["neurons_left"] == pruned.facts["neurons_left"]
    assert recovered.module.state_dict().keys() == pruned.module.state_dict().keys()
    assert not any(parameter.requires_grad for parameter in recovered.module.parameters())
    again = prune(llama, data, sparsity=0.5, recovery_steps=60, recovery_lr=1e-2, recovery_rank=4)
    for name, tensor in recovered.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name]), name


def test_hostile_input_is_refused(llama: LoadedModel, data: Calibration) -> None:
    with pytest.raises(NotApplicableError, match="no calibration data"):
        prune(llama, Calibration.none())
    broken = llama.clone()
    layer = broken.module.get_submodule(feed_forwards(broken)[0].up)
    layer.weight = nn.Parameter(layer.get_parameter("weight") * torch.nan, requires_grad=False)
    with pytest.raises(DivergedError, match="not finite"):
        prune(broken, data)
    for hyper in ({"sparsity": 1.0}, {"sparsity": -0.1}, {"score": "two_w"}, {"multiple": 0}):
        with pytest.raises(ParameterError, match=next(iter(hyper))):
            build(CFSP, hyper, "cfsp")


def test_a_model_without_gates_is_not_applicable(data: Calibration) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    from methodbench.torchkit.adapters import detect

    config = OPTConfig(vocab_size=96, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4)
    module = OPTForCausalLM(config).eval()
    with pytest.raises(NotApplicableError, match="gate, up and down"):
        prune(LoadedModel("opt", "causal-lm", module, detect(module)), data)
