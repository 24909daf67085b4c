"""CATS: thresholds of gates, shares that are counted, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.activation_sparsity import feed_forwards, forget, measured
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_sparse.cats import CATS, gate_counts, threshold


def logits(model: LoadedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module(tokens).logits


def sparsify(model: LoadedModel, data: Calibration, **hyper: Any) -> LoadedModel:
    return CATS(**hyper).compress(model, data, Context())


def counted(model: LoadedModel, tokens: Tensor) -> dict[str, Any]:
    forget(model)
    logits(model, tokens)
    return measured(model)


def test_at_sparsity_zero_the_output_is_bit_identical_to_the_dense_one(
    llama: LoadedModel, data: Calibration, tokens: Tensor
) -> None:
    assert torch.equal(logits(sparsify(llama, data, sparsity=0), tokens), logits(llama, tokens))


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_the_neurons_of_unseen_tokens_are_near_the_target(
    llama: LoadedModel, data: Calibration, tokens: Tensor, sparsity: float
) -> None:
    facts = counted(sparsify(llama, data, sparsity=sparsity), tokens)
    assert facts["sparsity_neurons"] == pytest.approx(sparsity, abs=0.05)
    assert "sparsity_inputs" not in facts
    assert facts["positions"] == "all"


def test_a_model_level_target_is_met_by_more_zero_neurons(
    llama: LoadedModel, data: Calibration, tokens: Tensor
) -> None:
    facts = counted(sparsify(llama, data, sparsity=0.25, counted="model", corrections=2), tokens)
    assert facts["sparsity_model"] == pytest.approx(0.25, abs=0.03)
    assert facts["sparsity_neurons"] > 0.35
    with pytest.raises(NotApplicableError, match="out of reach"):
        sparsify(llama, data, sparsity=0.65, counted="model")


def test_gates_beyond_one_are_never_zeroed() -> None:
    counts = gate_counts(torch.linspace(2, 3, 100))
    assert threshold(counts, 0.9) == 1.0
    assert threshold(counts, 0.0) == 0.0


def test_constant_gates_are_zeroed_only_below_their_value() -> None:
    counts = gate_counts(torch.full((50,), 0.25))
    assert 0.24 < threshold(counts, 0.5) <= 0.25
    assert threshold(gate_counts(torch.zeros(0)), 0.5) == 0


def test_a_relu_network_is_masked_as_well() -> None:
    from methodbench.testing import planted

    model, data = planted.build("opt"), planted.inputs("opt", 6, 1)
    sparse = sparsify(model, data, sparsity=0.7)
    planted.output(sparse.module, data.inputs)
    natural = []
    for network in feed_forwards(model):
        model.module.get_submodule(network.activation).register_forward_hook(
            lambda _, __, out: natural.append(float((out == 0).double().mean()))
        )
    planted.output(model.module, data.inputs)
    assert measured(sparse)["sparsity_neurons"] >= max(0.65, min(natural))


def test_it_needs_calibration_inputs(llama: LoadedModel) -> None:
    with pytest.raises(NotApplicableError, match="cats calibrates on activations"):
        sparsify(llama, Calibration.none())


@pytest.mark.parametrize("passed", [{"sparsity": 1}, {"sparsity": 2}, {"counted": "bytes"}])
def test_invalid_hyperparameters_are_refused_by_name(passed: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(passed))):
        build(CATS, passed, "cats")
