"""Properties that Grad-CAM has by its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.cam import activations, saliency
from methodbench_vision.grad_cam import GradCAM, channel_weights
from methodbench_vision.models.shapes_cnn import ShapesNet


class Affine(nn.Module):
    """Logits of a network, scaled and shifted."""

    def __init__(self, net: nn.Module, scale: float, shift: float) -> None:
        super().__init__()
        self.net, self.scale, self.shift = net, scale, shift

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.net(x) + self.shift


@pytest.fixture(scope="module")
def net() -> ShapesNet:
    torch.manual_seed(0)
    return ShapesNet().eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def loaded(module: nn.Module, net: ShapesNet) -> LoadedModel:
    return LoadedModel("toy", "cnn", module.eval(), detect(net))


def test_weights_are_means_over_positions() -> None:
    gradient = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert torch.equal(channel_weights(gradient), torch.tensor([[5.5, 17.5]]))


def test_before_a_global_mean_and_one_linear_layer_it_is_cam(net: ShapesNet, x: Tensor) -> None:
    model, target = loaded(net, net), torch.tensor([2, 0])
    (maps,) = activations(model, x)
    cam = torch.einsum("bc,bchw->bhw", net.fc.weight.detach()[target], maps)
    torch.testing.assert_close(
        GradCAM().explain(model, x, target), saliency([cam], (32, 32)), rtol=0, atol=1e-4
    )


def test_other_classes_get_other_maps(net: ShapesNet, x: Tensor) -> None:
    model = loaded(net, net)
    maps = [GradCAM().explain(model, x, torch.full((2,), target)) for target in range(4)]
    assert all(not torch.allclose(a, b, atol=0.1) for i, a in enumerate(maps) for b in maps[:i])


@settings(max_examples=10, deadline=None)
@given(scale=st.floats(0.1, 100), shift=st.floats(-100, 100))
def test_scaling_and_shifting_all_logits_changes_nothing(
    net: ShapesNet, x: Tensor, scale: float, shift: float
) -> None:
    target = torch.tensor([1, 3])
    plain = GradCAM().explain(loaded(net, net), x, target)
    moved = GradCAM().explain(loaded(Affine(net, scale, shift), net), x, target)
    torch.testing.assert_close(moved, plain, rtol=0, atol=1e-3)


def test_averaging_a_layer_with_itself_changes_nothing(net: ShapesNet, x: Tensor) -> None:
    model, target = loaded(net, net), torch.tensor([1, 3])
    once = GradCAM(layer="features").explain(model, x, target)
    twice = GradCAM(layer=("features", "features")).explain(model, x, target)
    torch.testing.assert_close(twice, once)
