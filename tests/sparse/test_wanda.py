"""Wanda: scores, rows, and what calibration changes."""

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
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.outliers import inject_outliers
from methodbench_sparse.magnitude import Magnitude
from methodbench_sparse.masks import row_mask
from methodbench_sparse.wanda import TOLERANCE, InputScale, Wanda, variant_mask

seeds = st.integers(0, 2**16)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(model: LoadedModel) -> dict[str, Tensor]:
    return {name: layer.weight for name, layer in model.adapter.targets(model.module).items()}


def logits(model: LoadedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module(tokens).logits


def prune(model: LoadedModel, data: Calibration, **hyper: Any) -> LoadedModel:
    return Wanda(**hyper).compress(model, data, Context())


@pytest.mark.parametrize("sparsity", [0.29, 0.5, 0.7])
def test_every_row_loses_exactly_its_count(llama: LoadedModel, data: Calibration, sparsity: float) -> None:
    for name, weight in weights(prune(llama, data, sparsity=sparsity)).items():
        assert ((weight == 0).sum(dim=1) == int(weight.shape[1] * sparsity)).all(), name


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_every_group_loses_exactly_n(llama: LoadedModel, data: Calibration, pattern: str) -> None:
    zeros, group = (int(part) for part in pattern.split(":"))
    for name, weight in weights(prune(llama, data, sparsity=0.5, pattern=pattern)).items():
        assert ((weight == 0).unflatten(1, (-1, group)).sum(dim=-1) == zeros).all(), name


@pytest.mark.parametrize("hyper", [{}, {"pattern": "2:4"}, {"use_variant": True}])
def test_kept_weights_are_bit_identical_and_the_input_model_is_untouched(
    llama: LoadedModel, data: Calibration, hyper: dict[str, Any]
) -> None:
    before = {name: tensor.clone() for name, tensor in llama.module.state_dict().items()}
    pruned = prune(llama, data, sparsity=0.5, **hyper)
    for name, weight in weights(pruned).items():
        assert torch.equal(weight, before[f"{name}.weight"].masked_fill(weight == 0, 0)), name
    for name, tensor in llama.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert pruned.storage == "simulated"
    assert pruned.accounted_bits is None
    assert pruned.facts["zeros_share"] == pytest.approx(0.5, abs=2 * TOLERANCE)


def test_sparsity_zero_prunes_nothing(llama: LoadedModel, data: Calibration) -> None:
    for use_variant in (False, True):
        pruned = prune(llama, data, sparsity=0, use_variant=use_variant)
        assert all(torch.equal(weight, weights(llama)[name]) for name, weight in weights(pruned).items())


@settings(max_examples=25, deadline=None)
@given(seed=seeds, level=st.floats(0.01, 100))
def test_inputs_of_equal_norm_make_it_row_wise_magnitude_pruning(seed: int, level: float) -> None:
    weight = normal(seed, 8, 24)
    scaler = torch.full((24,), level)
    assert torch.equal(Wanda(sparsity=0.5).mask(weight, scaler), row_mask(weight.abs(), 0.5))


@settings(max_examples=25, deadline=None)
@given(seed=seeds, hyper=st.sampled_from([{}, {"pattern": "2:4"}, {"pattern": "4:8"}, {"use_variant": True}]))
def test_moving_a_scale_from_weights_to_inputs_leaves_the_mask(seed: int, hyper: dict[str, Any]) -> None:
    weight, inputs = normal(seed, 8, 24), normal(seed + 1, 2, 10, 24)
    scale = 2.0 ** torch.randint(-4, 5, (24,), generator=torch.Generator().manual_seed(seed + 2))
    method = Wanda(sparsity=0.5, **hyper)
    plain, scaled = InputScale(24), InputScale(24)
    plain.add(inputs)
    scaled.add(inputs * scale)
    assert torch.equal(method.mask(weight, plain.value), method.mask(weight / scale, scaled.value))


@settings(max_examples=25, deadline=None)
@given(seed=seeds, cuts=st.lists(st.integers(1, 5), max_size=4))
def test_batches_split_differently_give_the_same_input_scale(seed: int, cuts: list[int]) -> None:
    inputs = normal(seed, 6, 7, 9)
    whole, parts = InputScale(9), InputScale(9)
    whole.add(inputs)
    for part in inputs.tensor_split(sorted(cuts)):
        parts.add(part)
    torch.testing.assert_close(whole.value, inputs.square().sum(dim=(0, 1)) / 6, rtol=1e-5, atol=0)
    torch.testing.assert_close(parts.value, whole.value, rtol=1e-5, atol=0)
    assert parts.sequences == whole.sequences == 6


@settings(max_examples=25, deadline=None)
@given(seed=seeds, sparsity=st.floats(0.1, 0.7))
def test_the_variant_comes_near_the_sparsity_and_cuts_rows_at_equal_shares(
    seed: int, sparsity: float
) -> None:
    scores = normal(seed, 40, 200).abs()
    mask = variant_mask(scores, sparsity)
    assert float(mask.float().mean()) == pytest.approx(sparsity, abs=10 * TOLERANCE)
    shares = scores.masked_fill(~mask, 0).sum(dim=1) / scores.sum(dim=1)
    assert shares.max() - shares.min() < 0.02
    assert mask.sum(dim=1).unique().numel() > 1


def test_later_blocks_are_scored_on_the_outputs_of_pruned_ones(llama: LoadedModel, data: Calibration) -> None:
    pruned = prune(llama, data, sparsity=0.7)
    half = llama.clone()
    half.module.model.layers[0] = pruned.module.model.layers[0]
    captured: list[Tensor] = []
    layer = half.module.model.layers[1].self_attn.q_proj
    handle = layer.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    logits(half, data.inputs)
    handle.remove()
    scale = InputScale(32)
    scale.add(captured[0])
    expected = Wanda(sparsity=0.7).mask(layer.weight, scale.value)
    assert torch.equal(pruned.module.model.layers[1].self_attn.q_proj.weight == 0, expected)


def test_planted_outliers_leave_wandas_mask_and_hurt_magnitude(
    llama: LoadedModel, data: Calibration, tokens: Tensor
) -> None:
    hostile = inject_outliers(llama, factor=16, channels=4)
    dense = logits(llama, tokens)
    plain, planted = (prune(model, data, sparsity=0.2) for model in (llama, hostile))
    for name, weight in weights(plain).items():
        assert torch.equal(weight == 0, weights(planted)[name] == 0), name
    torch.testing.assert_close(logits(planted, tokens), logits(plain, tokens))
    method = Magnitude(sparsity=0.2)
    magnitude = [method.compress(model, Calibration.none(), Context()) for model in (llama, hostile)]
    on_plain, on_hostile = (float((logits(model, tokens) - dense).norm()) for model in magnitude)
    assert on_hostile > 2 * on_plain
    assert on_hostile > 2 * float((logits(planted, tokens) - dense).norm())


def test_a_layer_that_no_token_reaches_is_pruned_by_magnitude() -> None:
    weight = normal(3, 8, 16)
    unreached = InputScale(16)
    unreached.add(torch.empty(0, 16))
    assert unreached.sequences == 0
    assert torch.equal(Wanda(sparsity=0.5).mask(weight, unreached.value), row_mask(weight.abs(), 0.5))


def test_without_calibration_inputs_it_is_not_applicable(llama: LoadedModel) -> None:
    with pytest.raises(NotApplicableError, match="calibration"):
        prune(llama, Calibration.none(), sparsity=0.5)


@pytest.mark.parametrize(
    ("passed", "message"),
    [
        ({"sparsity": 1.5}, "sparsity = 1.5"),
        ({"pattern": "2:4", "sparsity": 0.6}, "sparsity is 0.5, not 0.6"),
        ({"pattern": "2:4", "use_variant": True}, "use_variant needs pattern unstructured"),
        ({"pattern": "dense"}, "pattern = 'dense'"),
    ],
)
def test_invalid_hyperparameters_are_refused_by_name(passed: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        build(Wanda, passed, "wanda")
    assert message in str(caught.value)
