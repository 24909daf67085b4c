"""Relufication: where ReLUs stand, what is counted, and that a short fine-tuning recovers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.testing import planted
from methodbench.torchkit.activation_sparsity import feed_forwards, forget, measured
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import Calibration, LoadedModel, next_token_loss
from methodbench.torchkit.nonlinearities import ShiftedReLU, nonlinearities
from methodbench_sparse.relufication import Relufication, aggregated_sparsity, norm_readers


def rectified(model: LoadedModel, data: Calibration, **hyper: Any) -> LoadedModel:
    return Relufication(**{"steps": 0, **hyper}).compress(model, data, Context(seed=2))


def bert() -> LoadedModel:
    """A network with norms behind its halves."""
    config = BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    module = BertModel(config).eval()
    return LoadedModel("bert", "sentence-encoder", module, detect(module))


def counts(model: LoadedModel, tokens: torch.Tensor) -> dict[str, Any]:
    forget(model)
    model.module(tokens)
    return measured(model)


def test_stage_0_is_the_dense_model(llama: LoadedModel, data: Calibration, tokens: torch.Tensor) -> None:
    assert torch.equal(
        rectified(llama, data, stage=0, steps=5).module(tokens).logits, llama.module(tokens).logits
    )


def test_zeros_are_counted_where_they_are_read(
    llama: LoadedModel, data: Calibration, tokens: torch.Tensor
) -> None:
    first = rectified(llama, data, stage=1)
    seen: list[torch.Tensor] = []
    for network in feed_forwards(first):
        down = first.module.get_submodule(network.down)
        down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = counts(first, tokens)
    zeros = float(torch.stack([(x == 0).double().mean() for x in seen]).mean())
    assert found["sparsity_neurons"] == pytest.approx(zeros)
    assert 0.3 < zeros < 0.7
    assert 0 < found["sparsity_model"] < zeros
    second = counts(rectified(llama, data, stage=2), tokens)
    assert second["sparsity_model"] > found["sparsity_model"]


def test_a_larger_shift_leaves_fewer_neurons(
    llama: LoadedModel, data: Calibration, tokens: torch.Tensor
) -> None:
    found = [
        counts(rectified(llama, data, shift=shift), tokens)["sparsity_neurons"]
        for shift in (0.0, 0.2, 1.0, 100.0)
    ]
    assert found == sorted(found)
    assert found[0] < found[1] < found[2]
    assert found[-1] == 1.0


def test_only_the_two_norms_before_the_halves_are_rectified(llama: LoadedModel, data: Calibration) -> None:
    readers = norm_readers(llama)
    assert len(readers) == 4
    assert {len(names) for names in readers.values()} == {2, 3}
    assert sum(isinstance(part, ShiftedReLU) for part in rectified(llama, data).module.modules()) == 2


def test_fine_tuning_recovers_and_touches_no_shared_tensor(llama: LoadedModel, data: Calibration) -> None:
    before = {name: tensor.clone() for name, tensor in llama.module.state_dict().items()}
    raw = next_token_loss(rectified(llama, data), data.inputs)
    tuned = rectified(llama, data, steps=60, lr=3e-3, tokens=40)
    assert next_token_loss(tuned, data.inputs) < raw - 0.2
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in tuned.module.parameters())
    module: Any = tuned.module
    assert module.lm_head.weight is module.model.embed_tokens.weight, "tied weights stay tied"


def test_the_share_that_no_token_has_used_falls(llama: LoadedModel) -> None:
    activations = torch.relu(torch.randn(40, 64, generator=planted.generator(0)) - 1)
    found = aggregated_sparsity(activations)
    assert bool((found.diff() <= 0).all())
    assert float(found[0]) == pytest.approx(float((activations[0] == 0).double().mean()))
    # Tokens that use the same neurons leave more unused than independent ones would.
    repeated = aggregated_sparsity(activations[:1].repeat(40, 1))
    assert float(repeated[-1]) == float(found[0]) > float(found[-1])


def test_hostile_input_is_refused(llama: LoadedModel, data: Calibration) -> None:
    with pytest.raises(NotApplicableError, match="needs calibration text"):
        rectified(llama, Calibration.none(), steps=1)
    broken: Any = llama.clone()
    embedding = broken.module.model.embed_tokens
    embedding.weight = torch.nn.Parameter(embedding.weight * torch.nan, requires_grad=False)
    with pytest.raises(DivergedError, match="fine-tuning"):
        rectified(broken, data, steps=1)
    with pytest.raises(NotApplicableError, match="activation function"):
        rectified(planted.build("cnn", outliers=False), data)
    with pytest.raises(NotApplicableError, match="one norm before each of its halves"):
        norm_readers(bert())
    for hyper in ({"stage": 3}, {"shift": -1.0}, {"lr": 0.0}):
        with pytest.raises(ParameterError, match=next(iter(hyper))):
            build(Relufication, hyper, "relufication")


def test_thresholds_pass_what_they_keep_unchanged() -> None:
    x = torch.tensor([-1.0, 0.0, 0.3, 0.5, 2.0])
    assert ShiftedReLU()(x).tolist() == pytest.approx([0, 0, 0.3, 0.5, 2.0])
    assert ShiftedReLU(threshold=0.5)(x).tolist() == pytest.approx([0, 0, 0, 0.5, 2.0])
    assert ShiftedReLU(shift=0.5)(x).tolist() == pytest.approx([0, 0, 0, 0, 1.5])
    assert torch.equal(ShiftedReLU(threshold=0.0)(x), torch.relu(x))
    with pytest.raises(ValueError, match="shifted, or it has a threshold"):
        ShiftedReLU(shift=1, threshold=1)


def test_activation_functions_are_found_by_type(llama: LoadedModel) -> None:
    assert list(
        nonlinearities(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.GELU(), torch.nn.Softmax(-1)))
    ) == ["1"]
    assert len(nonlinearities(llama.module)) == 2
