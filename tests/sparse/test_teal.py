"""TEAL: thresholds that split the inputs, the search, and what it refuses."""

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
from methodbench.torchkit.activation_sparsity import SparseInput, TopK, forget, measured
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_sparse.teal import TEAL, Histogram


def logits(model: LoadedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module(tokens).logits


def sparsify(model: LoadedModel, data: Calibration, **hyper: Any) -> LoadedModel:
    return TEAL(**{"positions": "all", **hyper}).compress(model, data, Context())


def counted(model: LoadedModel, tokens: Tensor) -> dict[str, Any]:
    forget(model)
    logits(model, tokens)
    return measured(model)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), share=st.floats(0.05, 0.9))
def test_a_share_of_symmetric_values_lies_below_the_threshold(seed: int, share: float) -> None:
    x = torch.randn(20000, generator=torch.Generator().manual_seed(seed))
    threshold = Histogram.of(x, 10000, 0.01).threshold(share)
    assert float((x.abs() <= threshold).double().mean()) == pytest.approx(share, abs=0.03)


def test_values_of_which_almost_all_are_one_keep_the_rest() -> None:
    x = torch.zeros(1000)
    x[:5] = torch.tensor([1.0, 2.0, 3.0, -1.0, -2.0])
    threshold = Histogram.of(x, 100, 0.01).threshold(0.9)
    assert ((x.abs() > threshold) == (x != 0)).all()


@pytest.mark.parametrize("mask_by", ["threshold", "topk"])
def test_at_sparsity_zero_the_output_is_bit_identical_to_the_dense_one(
    llama: LoadedModel, data: Calibration, tokens: Tensor, mask_by: str
) -> None:
    sparse = sparsify(llama, data, sparsity=0, mask_by=mask_by, greedy=True)
    assert torch.equal(logits(sparse, tokens), logits(llama, tokens))


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.65])
def test_the_sparsity_of_unseen_tokens_is_near_the_target(
    llama: LoadedModel, data: Calibration, tokens: Tensor, sparsity: float
) -> None:
    facts = counted(sparsify(llama, data, sparsity=sparsity), tokens)
    assert facts["sparsity_model"] == pytest.approx(sparsity, abs=0.05)
    corrected = counted(sparsify(llama, data, sparsity=sparsity, corrections=2), data.inputs)
    assert corrected["sparsity_model"] == pytest.approx(sparsity, abs=0.01)
    exact = counted(sparsify(llama, data, sparsity=sparsity, mask_by="topk"), tokens)
    assert sparsity <= exact["sparsity_model"] < sparsity + 1 / 32


def test_small_inputs_are_a_better_choice_than_random_ones(
    llama: LoadedModel, data: Calibration, tokens: Tensor
) -> None:
    sparse = sparsify(llama, data, sparsity=0.4, mask_by="topk")
    dense = logits(llama, tokens)
    error = float((logits(sparse, tokens) - dense).norm())
    draw = torch.Generator().manual_seed(0)

    class Random(TopK):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.rand(x.shape, generator=draw))

    for layer in sparse.module.modules():
        if isinstance(layer, SparseInput):
            layer.rule = Random(layer.rule.keep)
    assert error < 0.7 * float((logits(sparse, tokens) - dense).norm())


def test_the_search_errs_no_more_than_equal_shares_on_its_own_text(
    llama: LoadedModel, data: Calibration
) -> None:
    hyper = {"sparsity": 0.5, "greedy_sequences": 6, "base_step": 0.05, "last_fraction": 1.0}
    dense = logits(llama, data.inputs)
    errors = {
        greedy: float((logits(sparsify(llama, data, greedy=greedy, **hyper), data.inputs) - dense).norm())
        for greedy in (False, True)
    }
    assert errors[True] < errors[False]


def test_linears_that_share_their_input_share_their_threshold(llama: LoadedModel, data: Calibration) -> None:
    block = sparsify(llama, data).module.model.layers[0]
    thresholds = [
        float(block.get_submodule(name).rule.threshold)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    ]
    assert thresholds[0] == thresholds[1] == thresholds[2] != thresholds[3]


def test_constant_inputs_are_not_masked_and_the_record_says_so(data: Calibration, llama: LoadedModel) -> None:
    flat = llama.clone()
    for block in flat.adapter.blocks(flat.module):
        block.input_layernorm.weight = torch.nn.Parameter(torch.zeros(32), requires_grad=False)
    ctx = Context()
    sparse = TEAL(positions="all").compress(flat, data, ctx)
    assert any("constant" in warning for warning in ctx.warnings)
    with torch.no_grad():
        assert sparse.module(data.inputs).logits.isfinite().all()
    assert float(sparse.module.model.layers[0].self_attn.q_proj.rule.threshold) == 0


def test_it_needs_calibration_inputs(llama: LoadedModel) -> None:
    with pytest.raises(NotApplicableError, match="teal calibrates on activations"):
        sparsify(llama, Calibration.none())


@pytest.mark.parametrize(
    ("passed", "field"),
    [
        ({"sparsity": 1}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"sparsity": 1.5}, "sparsity"),
        ({"positions": "first"}, "positions"),
        ({"outliers": 0.5}, "outliers"),
    ],
)
def test_invalid_hyperparameters_are_refused_by_name(passed: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError, match=field):
        build(TEAL, passed, "teal")
