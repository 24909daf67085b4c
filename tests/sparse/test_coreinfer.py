"""CoreInfer: prompts stay dense, later tokens use the prompt's neurons, and what it refuses."""

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
from methodbench_sparse.coreinfer import CoreInfer, CoreInput, core_set, token_counts, token_counts_each


def logits(model: LoadedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module(tokens).logits


def sparsify(model: LoadedModel, data: Calibration | None = None, **hyper: Any) -> LoadedModel:
    whole = {"first_block": 0, "end_block": 1, "token_share": 0.5}
    return CoreInfer(**{**whole, **hyper}).compress(model, data or Calibration.none(), Context())


def similar(model: LoadedModel, data: Calibration, **hyper: Any) -> LoadedModel:
    return sparsify(model, data, guided="similarity", sentence_share=0.5, cluster_block=0.9, **hyper)


def chosen(model: LoadedModel) -> list[Tensor]:
    return [module.core.chosen for module in model.module.modules() if isinstance(module, CoreInput)]


@pytest.mark.parametrize("structure", ["llama", "opt"])
def test_the_prompt_is_dense_and_what_follows_is_not(structure: str) -> None:
    model, tokens = planted.build(structure), planted.inputs(structure, 3, 2).inputs
    sparse = sparsify(model, sparsity=0.6)
    dense, got = logits(model, tokens), logits(sparse, tokens)
    assert torch.equal(got[:, :12], dense[:, :12])
    assert not torch.allclose(got[:, 12:], dense[:, 12:], atol=1e-3)
    facts = measured(sparse)
    assert facts["sparsity_neurons"] == pytest.approx(0.6, abs=0.05)
    assert facts["sparsity_touched_tokens"] == 0.5
    assert facts["positions"] == "last-half"


def test_decoding_token_by_token_is_what_the_second_half_at_once_is(
    llama: LoadedModel, tokens: Tensor
) -> None:
    at_once = logits(sparsify(llama), tokens)[:, 20:]
    sparse = sparsify(llama)
    with torch.no_grad():
        # A prompt alone is all prompt under this policy, so every token of it chooses.
        sparse_decode = sparsify(llama, positions="decode")
        out = sparse_decode.module(tokens[:, :20], use_cache=True)
        steps, cache = [], out.past_key_values
        for position in range(20, 40):
            out = sparse_decode.module(
                tokens[:, position : position + 1], past_key_values=cache, use_cache=True
            )
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), at_once, rtol=1e-4, atol=1e-4)
    logits(sparse, tokens)
    for ours, theirs in zip(chosen(sparse), chosen(sparse_decode), strict=True):
        assert torch.equal(ours, theirs)


def test_its_neurons_are_a_better_choice_than_random_ones(llama: LoadedModel, tokens: Tensor) -> None:
    sparse, dense = sparsify(llama), logits(llama, tokens)
    error = float((logits(sparse, tokens) - dense).norm())
    draw = planted.generator(0)
    for module in sparse.module.modules():
        if isinstance(module, CoreInput):
            module.core._choose = lambda prompts: torch.rand(len(prompts), 64, generator=draw) < 0.4
    assert error < float((logits(sparse, tokens) - dense).norm())


@pytest.mark.parametrize("guided", ["stability", "similarity"])
def test_at_sparsity_zero_the_output_is_bit_identical_to_the_dense_one(
    llama: LoadedModel, data: Calibration, tokens: Tensor, guided: str
) -> None:
    assert torch.equal(
        logits(sparsify(llama, data, sparsity=0, guided=guided), tokens), logits(llama, tokens)
    )


def test_a_prompt_takes_the_neurons_of_its_cluster(
    llama: LoadedModel, data: Calibration, tokens: Tensor
) -> None:
    sparse = similar(llama, data)
    got, dense = logits(sparse, tokens), logits(llama, tokens)
    assert torch.equal(got[:, :20], dense[:, :20])
    layers = [module for module in sparse.module.modules() if isinstance(module, CoreInput)]
    labels = layers[0].core.choice.labels
    assert len(labels) == 3
    for layer in layers:
        assert layer.core.choice is layers[0].core.choice
        assert torch.equal(layer.core.chosen, layer.core.lists[labels])
        assert (layer.core.lists.sum(-1) <= int(64 * 0.4)).all()
    forget(sparse)
    logits(sparse, tokens)
    assert measured(sparse)["sparsity_touched_tokens"] == 0.5, "reading the prompt first counts nothing"
    assert torch.equal(logits(sparse.clone(), tokens), got)


def test_counts_of_tokens_are_exact() -> None:
    scores = torch.tensor([[3.0, 2, -1, 1], [0.5, 4, 3, -2], [-1, -2, 5, -3]])
    assert token_counts(scores, 1.0).tolist() == [2, 2, 2, 0]
    assert token_counts_each(scores, 1.0).tolist() == [2, 2, 2, 1]
    assert core_set(torch.tensor([0, 3, 1, 3]), 2).tolist() == [1, 3]
    assert core_set(torch.tensor([0, 3, 1, 3]), 4).tolist() == [1, 3, 2], (
        "neurons that never appear are left out"
    )


def test_only_the_middle_blocks_are_touched() -> None:
    model = planted.build("llama")
    assert sparsify(model, first_block=0.5, end_block=1).facts["core_blocks"] == 1
    with pytest.raises(NotApplicableError, match="none of the 2 blocks"):
        sparsify(model, first_block=0.9, end_block=1)


def test_what_it_lacks_is_said(llama: LoadedModel, data: Calibration, tokens: Tensor) -> None:
    sparse = sparsify(llama, positions="decode")
    with pytest.raises(NotApplicableError, match="none was read"):
        logits(sparse, tokens[:, :1])
    logits(sparse, tokens)
    with pytest.raises(NotApplicableError, match="prompts of a batch of 3 were read"):
        logits(sparse, tokens[:2, :1])
    with pytest.raises(NotApplicableError, match="calibration sequences make no"):
        similar(llama, Calibration(data.inputs[:3]))
    with pytest.raises(NotApplicableError, match="coreinfer calibrates"):
        similar(llama, Calibration.none())
    with pytest.raises(NotApplicableError, match="one feed-forward network a block"):
        sparsify(planted.build("mixture"))


@pytest.mark.parametrize("passed", [{"sparsity": 1}, {"positions": "all"}, {"token_share": 0}])
def test_invalid_hyperparameters_are_refused_by_name(passed: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(passed))):
        build(CoreInfer, passed, "coreinfer")
