"""AdaRound and BRECQ: what learned rounding may change, and that it helps, on transformers and CNNs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import DivergedError
from methodbench.torchkit.batchnorm import fold_batchnorms
from methodbench.torchkit.learned_rounding import nearest_offset, stretched_sigmoid
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_quant.vit.adaround import AdaRound, find_scale, harden, learn_rounding, on_levels
from methodbench_quant.vit.sites import SimulatedConv2d, SimulatedLinear, Uniform
from methodbench_quant.vit.units import captured, units


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adaround(model: LoadedModel, data: Calibration, **options: object) -> LoadedModel:
    sizes: dict[str, object] = {"calibration_images": 16, "iterations": 30, "a_iterations": 10, "lr": 1e-2}
    return AdaRound(**(sizes | options)).compress(model, data, Context())  # type: ignore[arg-type]


@given(st.integers(2, 8), st.integers(0, 1000), st.sampled_from(["max", "max_scale", "mse"]))
@settings(max_examples=20, deadline=None)
def test_decided_weights_lie_on_the_levels_beside_the_weight(bits: int, seed: int, method: str) -> None:
    weight = normal(4, 30, seed=seed)
    grid = find_scale(weight, bits, method)  # type: ignore[arg-type]
    offset = normal(4, 30, seed=seed + 1)
    hard = harden(weight, grid, offset)
    assert grid.zero is not None
    steps = hard.codes - grid.zero - (weight / grid.scale).floor()
    inside = (hard.codes > 0) & (hard.codes < 2**bits - 1)
    assert set(steps[inside].unique().tolist()) <= {0.0, 1.0}
    d = stretched_sigmoid(offset)
    assert bool(((d >= 0) & (d <= 1)).all())
    decided = on_levels(weight, grid, (offset >= 0).float())
    torch.testing.assert_close(decided, hard.dequantize(), rtol=1e-5, atol=1e-6)


def test_no_iterations_give_rounding_to_nearest() -> None:
    weight = normal(4, 30)
    grid = find_scale(weight, 4, "max")
    offset = nearest_offset(weight / grid.scale)
    assert torch.equal(harden(weight, grid, offset).codes.float(), grid.encode(weight))


def test_learned_rounding_beats_nearest_on_one_layer_with_an_outlier_channel() -> None:
    gain = torch.ones(20)
    gain[3] = 10
    x, weight = normal(200, 20) @ (torch.eye(20) + 0.3 * normal(20, 20, seed=2)) * gain, normal(8, 20, seed=1)
    grid = find_scale(weight, 3, "mse")
    learned = learn_rounding(
        lambda weights, batch: batch @ weights["w"].T,
        {"w": weight},
        {"w": grid},
        x,
        x @ weight.T,
        iterations=400,
        batch=64,
        lr=2e-2,
        generator=torch.Generator().manual_seed(0),
    )
    assert learned.fit is not None
    assert learned.fit.last < 0.9 * learned.fit.first


def test_batch_norms_are_folded_into_the_convolutions_they_read(
    cnn: LoadedModel, images: Calibration
) -> None:
    folded = fold_batchnorms(cnn, images.inputs[:1])
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.module.modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in cnn.module.modules()) == 5
    torch.testing.assert_close(folded.module(images.inputs), cnn.module(images.inputs), rtol=1e-4, atol=1e-4)


def test_units_come_in_the_order_of_their_calls(vit: Any, cnn: LoadedModel, images: Calibration) -> None:
    def names(model: LoadedModel, granularity: str) -> list[str]:
        layers = [n for n, m in model.module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        return [u.name for u in units(model, layers, granularity, images.inputs[:1])]  # type: ignore[arg-type]

    assert names(cnn, "block") == ["conv1", "layer1.0", "layer2.0", "fc"]
    assert names(vit(), "block") == ["patch_embed.proj", "blocks.0", "blocks.1", "head"]
    assert names(cnn, "layer")[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]


def test_captured_inputs_and_outputs_are_those_of_the_forward_pass(
    cnn: LoadedModel, images: Calibration
) -> None:
    x, y = captured(cnn.module, "layer2.0", images.inputs)
    assert torch.equal(cnn.module.get_submodule("layer2.0")(x), y)
    assert x.shape == (16, 8, 8, 8)


@pytest.mark.parametrize("unit", ["layer", "block"])
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_learning_lowers_the_error_of_the_logits(
    unit: str, kind: str, vit: Any, cnn: LoadedModel, images: Calibration
) -> None:
    model = cnn if kind == "cnn" else vit()
    expected = model.module(images.inputs)

    def error(iterations: int) -> float:
        result = adaround(model, images, w_bits=3, unit=unit, iterations=iterations, batch=8, lr=3e-2)
        return float((result.module(images.inputs) - expected).square().mean())

    assert error(120) < error(0)


def test_first_and_last_layer_have_their_own_bits(
    cnn: LoadedModel, images: Calibration, monkeypatch: Any
) -> None:
    monkeypatch.setattr("methodbench_quant.vit.sites.WIDTHS", ())
    module = adaround(cnn, images, w_bits=2, a_bits=3).module
    layers = {n: m for n, m in module.named_modules() if isinstance(m, SimulatedConv2d | SimulatedLinear)}
    counts = {n: max(len(row.unique()) for row in m.weight.flatten(1)) for n, m in layers.items()}
    assert counts["conv1"] > 4
    assert all(count <= 4 for n, count in counts.items() if n not in ("conv1", "fc"))
    bits = {n: m.input_quantizer.bits for n, m in layers.items()}
    assert bits == {n: 8 if n in ("conv1", "fc") else 3 for n in layers}


def test_activations_stay_at_sixteen_bits(vit: Any, images: Calibration) -> None:
    model = vit()
    module = adaround(model, images, w_bits=8, iterations=0).module
    assert not any(isinstance(m, Uniform) for m in module.modules())
    torch.testing.assert_close(module(images.inputs), model.module(images.inputs), rtol=0.05, atol=0.3)


def test_the_dense_model_is_left_alone(cnn: LoadedModel, images: Calibration) -> None:
    before = {name: tensor.clone() for name, tensor in cnn.module.state_dict().items()}
    adaround(cnn, images, unit="block", a_bits=4)
    after = cnn.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_images_that_are_not_finite_diverge(cnn: LoadedModel) -> None:
    with pytest.raises(DivergedError, match="not finite"):
        adaround(cnn, Calibration(torch.full((8, 3, 8, 8), float("nan"))))


@pytest.mark.slow
def test_on_digits_three_bits_learned_block_by_block_beat_nearest(digits: Any) -> None:
    options = {"w_bits": 3, "calibration_images": 128, "lr": 1e-2}
    learned = digits.after(AdaRound(unit="block", iterations=200, **options), 128)
    assert learned > digits.after(AdaRound(iterations=0, **options), 128)
