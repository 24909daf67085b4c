"""CHESS: thresholds per channel, what they keep, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.testing import planted
from methodbench.torchkit.activation_sparsity import forget, measured
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_sparse.chess import CHESS, channel_thresholds, mean_quantile, mean_square


def logits(model: LoadedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module(tokens).logits


def sparsify(model: LoadedModel, data: Calibration, **hyper: Any) -> LoadedModel:
    return CHESS(**hyper).compress(model, data, Context())


def counted(model: LoadedModel, tokens: Tensor) -> dict[str, Any]:
    forget(model)
    logits(model, tokens)
    return measured(model)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), share=st.sampled_from([0.3, 0.5, 0.7]))
def test_products_lose_less_than_with_one_threshold_where_up_varies(seed: int, share: float) -> None:
    draw = planted.generator(seed)
    gate = torch.nn.functional.silu(torch.randn(200, 64, generator=draw))
    up = torch.randn(200, 64, generator=draw) * torch.randn(64, generator=draw).exp()
    t = channel_thresholds([gate], mean_square([up]), share)
    scalar = mean_quantile([gate], share)

    def lost(mask: Tensor) -> float:
        return float((gate * up)[~mask].square().sum())

    assert lost(gate.abs() > t) < lost(gate.abs() > scalar)
    assert float((gate.abs() <= t).float().mean()) == pytest.approx(share, abs=1e-3)


def test_equal_channels_have_the_one_threshold_and_scaling_up_changes_nothing() -> None:
    gate = torch.randn(100, 8, generator=planted.generator(0))
    equal = channel_thresholds([gate], torch.full((8,), 3.0), 0.5)
    torch.testing.assert_close(equal, torch.full((8,), mean_quantile([gate], 0.5)))
    squares = torch.rand(8, generator=planted.generator(1)) + 0.1
    torch.testing.assert_close(
        channel_thresholds([gate], squares, 0.5), channel_thresholds([gate], 16 * squares, 0.5)
    )


def test_a_channel_whose_up_is_zero_is_never_active() -> None:
    gate, squares = torch.randn(50, 4, generator=planted.generator(0)), torch.tensor([1.0, 0.0, 1.0, 1.0])
    t = channel_thresholds([gate], squares, 0.5)
    assert t[1] == torch.inf
    assert t[[0, 2, 3]].isfinite().all()
    assert (channel_thresholds([gate], squares, 0.0) == 0).all()


def test_at_sparsity_zero_the_output_is_bit_identical_to_the_dense_one(
    llama: LoadedModel, data: Calibration, tokens: Tensor
) -> None:
    assert torch.equal(logits(sparsify(llama, data, sparsity=0), tokens), logits(llama, tokens))


def test_query_output_and_neurons_are_sparse_and_key_and_value_are_not(
    llama: LoadedModel, data: Calibration, tokens: Tensor
) -> None:
    facts = counted(sparsify(llama, data, sparsity=0.5), tokens)
    assert facts["sparsity_inputs"].keys() == {"q", "o"}
    assert facts["sparsity_neurons"] == pytest.approx(0.5, abs=0.06)
    assert facts["sparsity_inputs"]["q"] == pytest.approx(0.5, abs=0.06)
    plain = counted(sparsify(llama, data, sparsity=0.5, selective=False), tokens)
    assert "sparsity_inputs" not in plain
    model_level = counted(sparsify(llama, data, sparsity=0.3, counted="model", corrections=1), tokens)
    assert model_level["sparsity_model"] == pytest.approx(0.3, abs=0.04)


def test_what_it_lacks_is_said(llama: LoadedModel, data: Calibration) -> None:
    with pytest.raises(NotApplicableError, match="two passes"):
        sparsify(llama, Calibration(data.inputs[:1]))
    with pytest.raises(NotApplicableError, match="out of reach"):
        sparsify(llama, data, sparsity=0.9, counted="model")
    with pytest.raises(NotApplicableError, match="gated networks"):
        sparsify(planted.build("opt"), planted.inputs("opt", 4, 1))


@pytest.mark.parametrize("passed", [{"sparsity": 1}, {"accumulate": 0}])
def test_invalid_hyperparameters_are_refused_by_name(passed: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(passed))):
        build(CHESS, passed, "chess")
