"""I&S-ViT: its logarithmic quantizer, and blocks whose errors fall while they are learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.testing import planted
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_quant.vit.is_vit import ISViT, ShiftUniformLog2
from methodbench_quant.vit.repq_vit import RepQViT, log_sqrt2, search_log_sqrt2, search_uniform


def probabilities(seed: int, temperature: float, rows: int = 64, keys: int = 64) -> Tensor:
    return (temperature * torch.randn(rows, keys, generator=planted.generator(seed))).softmax(-1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), temperature=st.floats(0.5, 6), bits=st.integers(2, 6))
def test_levels_are_shifted_powers_of_two_and_rise_with_the_value(
    seed: int, temperature: float, bits: int
) -> None:
    x = probabilities(seed, temperature)
    quantizer = ShiftUniformLog2.searched(x, bits)
    y = quantizer(x)
    exponents = torch.log2(y.double() + float(quantizer.shift))
    torch.testing.assert_close(exponents, exponents.round(), rtol=0, atol=1e-3)
    assert len(y.unique()) <= 2**bits + 1
    order = x.flatten().argsort()
    assert bool((y.flatten()[order].diff() >= 0).all())


@pytest.mark.parametrize("temperature", [1.5, 3.0, 6.0])
def test_small_probabilities_are_met_better_than_by_other_grids(temperature: float) -> None:
    x = probabilities(0, temperature, rows=512)
    small = x < 0.05
    percentiles = RepQViT().percentiles

    def error(y: Tensor) -> float:
        return float((y - x)[small].square().mean())

    ours = error(ShiftUniformLog2.searched(x, 3)(x))
    uniform = error(search_uniform(x.flatten(), 3, percentiles).snap(x.flatten()).view_as(x))
    root = error(log_sqrt2(x, search_log_sqrt2(x, 3, percentiles), 3))
    assert ours <= 0.5 * uniform
    assert ours <= 0.5 * root or temperature > 1.5


def test_gradients_pass_the_roundings() -> None:
    x = probabilities(1, 2.0).requires_grad_()
    ShiftUniformLog2.searched(x.detach(), 4)(x).sum().backward()
    assert x.grad is not None
    assert bool((x.grad > 0).float().mean() > 0.5)


@pytest.fixture
def vit() -> LoadedModel:
    return planted.build("vit")


@pytest.fixture
def images() -> Calibration:
    return planted.inputs("vit", 48, 1)


def quantized(model: LoadedModel, data: Calibration, **hyper: Any) -> LoadedModel:
    chosen: dict[str, Any] = {"iterations": 40, "lr": 4e-5, "batch": 48, **hyper}
    return ISViT(**chosen).compress(model, data, Context(seed=0))


def test_learning_brings_the_blocks_nearer_to_the_float_model(vit: LoadedModel, images: Calibration) -> None:
    learned = quantized(vit, images)
    for stage in ("per_channel", "per_tensor"):
        assert learned.facts[f"loss_{stage}_last"] < learned.facts[f"loss_{stage}_first"], stage
    unlearned = quantized(vit, images, iterations=0)
    assert "loss_per_tensor_first" not in unlearned.facts
    with torch.no_grad():
        exact = vit.module(images.inputs)
        errors = [
            float((model.module(images.inputs) - exact).square().mean()) for model in (learned, unlearned)
        ]
    assert errors[0] < errors[1]
    assert learned.storage == "real"
    assert learned.facts["activations"] == "4 bits, simulated"


def test_the_float_model_is_left_alone(vit: LoadedModel, images: Calibration) -> None:
    before = {name: tensor.clone() for name, tensor in vit.module.state_dict().items()}
    quantized(vit, images, iterations=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.module.state_dict().items())


def test_one_image_is_enough_and_said(vit: LoadedModel, images: Calibration) -> None:
    ctx = Context()
    found = ISViT(iterations=1).compress(vit, Calibration(images.inputs[:1]), ctx)
    assert torch.isfinite(found.module(images.inputs)).all()
    assert any("calibrated on 1 images" in warning for warning in ctx.warnings)


def test_hostile_input_is_refused(vit: LoadedModel, images: Calibration) -> None:
    with pytest.raises(NotApplicableError, match="calibration images"):
        quantized(vit, Calibration.none())
    with pytest.raises(DivergedError, match=r"constant or not finite|not finite"):
        quantized(vit, Calibration(images.inputs * torch.nan))
    constant = vit.clone()
    for block in constant.adapter.blocks(constant.module):
        for norm in (block.norm1, block.norm2):
            norm.weight = nn.Parameter(torch.zeros_like(norm.get_parameter("weight")), requires_grad=False)
    with pytest.raises(DivergedError, match="constant"):
        quantized(constant, images)
    with pytest.raises(NotApplicableError):
        quantized(planted.build("cnn", outliers=False), planted.inputs("cnn", 8, 1))
    for hyper in ({"w_bits": 1}, {"iterations": -1}, {"lr": 0.0}):
        with pytest.raises(ParameterError, match=next(iter(hyper))):
            build(ISViT, hyper, "is-vit")
