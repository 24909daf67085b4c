"""GBLM-Pruner: its limits are Wanda and the gradient alone; hostile input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.text_tuning import text_loss
from methodbench_sparse.gblm_pruner import GBLMPruner, gather, gblm_score
from methodbench_sparse.masks import row_mask
from methodbench_sparse.wanda import Wanda, wanda_score


def weights(model: LoadedModel) -> dict[str, Tensor]:
    return {name: layer.weight for name, layer in model.adapter.targets(model.module).items()}


def prune(model: LoadedModel, data: Calibration, **hyper: Any) -> LoadedModel:
    return GBLMPruner(**hyper).compress(model, data, Context())


@pytest.mark.parametrize("hyper", [{}, {"pattern": "2:4"}, {"use_variant": True}])
def test_without_gradients_it_is_wanda_bit_for_bit(
    llama: LoadedModel, data: Calibration, hyper: dict[str, Any]
) -> None:
    expected = weights(Wanda(sparsity=0.5, **hyper).compress(llama, data, Context()))
    for name, weight in weights(prune(llama, data, sparsity=0.5, scale=0, **hyper)).items():
        assert torch.equal(weight, expected[name]), name


def test_a_huge_weight_of_the_gradients_leaves_them_alone(llama: LoadedModel, data: Calibration) -> None:
    model = llama.clone()
    losses = [lambda ids=ids: text_loss(model, ids) for ids in data.inputs]
    gradients = gather(model.adapter.targets(model.module), losses, "l2", 1e6, torch.float32)
    pruned = weights(prune(llama, data, sparsity=0.5, scale=1e6, gradient_dtype="float32"))
    agreeing = [
        float(((pruned[name] == 0) == row_mask(weight.abs() * gradients[name], 0.5)).float().mean())
        for name, weight in weights(llama).items()
    ]
    assert min(agreeing) > 0.99


def test_gradients_are_those_of_the_dense_model_and_leave_it_untouched(
    llama: LoadedModel, data: Calibration
) -> None:
    before = {name: tensor.clone() for name, tensor in llama.module.state_dict().items()}
    few = prune(llama, data, sparsity=0.1)
    for name, tensor in llama.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(parameter.requires_grad for parameter in few.module.parameters())
    assert not any(parameter.requires_grad for parameter in llama.module.parameters())


def test_squares_and_magnitudes_are_summed_over_samples(llama: LoadedModel, data: Calibration) -> None:
    model = llama.clone()
    linears = model.adapter.targets(model.module)
    single = [
        gather(linears, [lambda ids=ids: text_loss(model, ids)], "l1", 2.0, torch.float32)
        for ids in data.inputs
    ]
    losses = [lambda ids=ids: text_loss(model, ids) for ids in data.inputs]
    for norm in ("l1", "l2"):
        found = gather(linears, losses, norm, 2.0, torch.float32)  # type: ignore[arg-type]
        for name, total in found.items():
            parts = torch.stack([one[name] for one in single])
            expected = parts.sum(0) if norm == "l1" else parts.square().sum(0).sqrt()
            torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-9)


def test_the_inverted_score_divides() -> None:
    weight, scaler, gradient = torch.ones(1, 3), torch.full((3,), 4.0), torch.tensor([[1.0, 2.0, 0.0]])
    assert gblm_score(weight, scaler, gradient, inverse=True)[0, :2].tolist() == pytest.approx([2.0, 1.0])
    assert torch.equal(gblm_score(weight, scaler, torch.zeros(1, 3)), wanda_score(weight, scaler))


def test_hostile_input_is_refused(llama: LoadedModel, data: Calibration) -> None:
    for nothing in (Calibration.none(), Calibration(torch.zeros(2, 3, 8, 8))):
        with pytest.raises(NotApplicableError, match="needs the loss of calibration text"):
            prune(llama, nothing, sparsity=0.5)
    broken = llama.clone()
    layer = next(iter(broken.adapter.targets(broken.module).values()))
    layer.weight = torch.nn.Parameter(layer.weight * torch.nan, requires_grad=False)
    with pytest.raises(DivergedError, match=r"gradient of .* is not finite"):
        prune(broken, data, sparsity=0.5)
    with pytest.raises(ParameterError, match="norm = 'l3'"):
        build(GBLMPruner, {"norm": "l3"}, "gblm-pruner")
