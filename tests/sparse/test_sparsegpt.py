"""SparseGPT: what goes, what the rest makes up for, and hostile input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_sparse.masks import row_mask
from methodbench_sparse.sparsegpt import SparseGPT, sparsegpt
from methodbench_sparse.wanda import wanda_score

seeds = st.integers(0, 2**16)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(seed: int, tokens: int, width: int) -> Tensor:
    """Inputs [tokens, width] whose columns share a few directions."""
    return normal(seed, tokens, 4) @ normal(seed + 1, 4, width) + 0.3 * normal(seed + 2, tokens, width)


def weights(model: LoadedModel) -> dict[str, Tensor]:
    return {name: layer.weight for name, layer in model.adapter.targets(model.module).items()}


def prune(model: LoadedModel, data: Calibration, **hyper: Any) -> LoadedModel:
    return SparseGPT(**hyper).compress(model, data, Context())


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_every_group_loses_exactly_n(llama: LoadedModel, data: Calibration, pattern: str) -> None:
    zeros, group = (int(part) for part in pattern.split(":"))
    for name, weight in weights(prune(llama, data, sparsity=0.5, pattern=pattern)).items():
        assert ((weight == 0).unflatten(1, (-1, group)).sum(dim=-1) == zeros).all(), name


@settings(max_examples=25, deadline=None)
@given(seed=seeds, sparsity=st.floats(0.05, 0.9), blocksize=st.sampled_from([8, 16, 64]))
def test_every_block_of_columns_loses_its_count_and_one(seed: int, sparsity: float, blocksize: int) -> None:
    inputs = correlated(seed, 200, 32)
    found = sparsegpt(normal(seed + 3, 12, 32), 2 * inputs.T @ inputs, sparsity=sparsity, blocksize=blocksize)
    for block in found.weight.split(blocksize, dim=1):
        assert int((block == 0).sum()) == min(int(block.numel() * sparsity) + 1, block.numel())


@settings(max_examples=25, deadline=None)
@given(seed=seeds, sparsity=st.floats(0.05, 0.9), level=st.floats(0.1, 10))
def test_with_white_inputs_it_is_magnitude_pruning_of_blocks(
    seed: int, sparsity: float, level: float
) -> None:
    weight = normal(seed, 12, 32)
    found = sparsegpt(weight, level * torch.eye(32), sparsity=sparsity, blocksize=16)
    for dense, block in zip(weight.split(16, dim=1), found.weight.split(16, dim=1), strict=True):
        cut = dense.abs().flatten().sort().values[int(dense.numel() * sparsity)]
        torch.testing.assert_close(block, dense.masked_fill(dense.abs() <= cut, 0), rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_the_loss_is_the_output_error_where_damping_is_small(seed: int) -> None:
    inputs, weight = normal(seed, 400, 24).double().float(), normal(seed + 1, 10, 24)
    hessian = 2 * inputs.T @ inputs / 400
    found = sparsegpt(weight, hessian, sparsity=0.5, blocksize=8, percdamp=1e-6)
    change = found.weight - weight
    assert found.loss == pytest.approx(0.5 * float(((change @ hessian) * change).sum()), rel=1e-2)


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_outputs_are_nearer_than_wandas_and_magnitudes_for_correlated_inputs(seed: int) -> None:
    inputs, weight = correlated(seed, 400, 32), normal(seed + 3, 24, 32)
    found = sparsegpt(weight, 2 * inputs.T @ inputs / 400, sparsity=0.5)
    scaler = inputs.square().sum(0)

    def error(pruned: Tensor) -> float:
        return float((inputs @ (pruned - weight).T).norm())

    wanda = weight.masked_fill(row_mask(wanda_score(weight, scaler), 0.5), 0)
    magnitude = weight.masked_fill(row_mask(weight.abs(), 0.5), 0)
    assert error(found.weight) < min(error(wanda), error(magnitude))


def test_kept_weights_lie_on_the_grid_of_the_dense_row_when_rounded(
    llama: LoadedModel, data: Calibration
) -> None:
    for name, weight in weights(prune(llama, data, sparsity=0.5, bits=3)).items():
        for row in weight:
            assert len(row.unique()) <= 8, name
        assert float((weight == 0).float().mean()) >= 0.5, name


def test_sparsity_zero_is_bit_identical_and_the_input_model_is_untouched(
    llama: LoadedModel, data: Calibration
) -> None:
    before = {name: tensor.clone() for name, tensor in llama.module.state_dict().items()}
    same = prune(llama, data, sparsity=0)
    prune(llama, data, sparsity=0.5)
    for name, tensor in llama.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert torch.equal(same.module.state_dict()[name], before[name]), name


def test_dead_inputs_go_and_unreached_layers_are_pruned_by_magnitude() -> None:
    inputs, weight = normal(0, 100, 16), normal(1, 8, 16)
    inputs[:, 3] = 0
    found = sparsegpt(weight, 2 * inputs.T @ inputs, sparsity=0.25)
    assert bool((found.weight[:, 3] == 0).all())
    unreached = sparsegpt(weight, torch.zeros(16, 16), sparsity=0.25)
    cut = weight.abs().flatten().sort().values[int(weight.numel() * 0.25)]
    torch.testing.assert_close(unreached.weight, weight.masked_fill(weight.abs() <= cut, 0))


def test_hostile_numbers_and_widths_are_refused(llama: LoadedModel) -> None:
    weight, hessian = normal(0, 4, 12), torch.eye(12)
    with pytest.raises(NotApplicableError, match="12 inputs, which do not divide into groups of 8"):
        sparsegpt(weight, hessian, sparsity=0.5, pattern="4:8")
    with pytest.raises(DivergedError, match="holds NaN or infinity"):
        sparsegpt(weight / 0, hessian, sparsity=0.5)
    with pytest.raises(DivergedError, match="activations"):
        sparsegpt(weight, hessian * torch.nan, sparsity=0.5)
    with pytest.raises(NotApplicableError, match="no calibration data"):
        prune(llama, Calibration.none(), sparsity=0.5)


@pytest.mark.parametrize(
    ("passed", "message"),
    [
        ({"sparsity": 1.0}, "sparsity = 1.0"),
        ({"pattern": "2:4", "sparsity": 0.6}, "sparsity is 0.5, not 0.6"),
        ({"pattern": "2:4", "blocksize": 6}, "blocksize 6 does not divide into groups of 4"),
        ({"percdamp": 0}, "percdamp = 0"),
    ],
)
def test_invalid_hyperparameters_are_refused_by_name(passed: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        build(SparseGPT, passed, "sparsegpt")
    assert message in str(caught.value)
