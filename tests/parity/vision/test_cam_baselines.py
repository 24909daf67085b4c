"""Grad-CAM against pytorch-grad-cam."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from methodbench.testing.parity import Vectors
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.cam import features, layer_names
from methodbench_vision.grad_cam import GradCAM

pytestmark = pytest.mark.vectors("vision", "cam_baselines")

NetOf = Callable[[Vectors, str], LoadedModel]


def test_the_rebuilt_nets_give_the_same_logits(
    vectors: Vectors, nets: list[str], net_of: NetOf, tolerance: float
) -> None:
    for net in nets:
        logits = net_of(vectors, net).module(vectors.tensor(f"{net}.x"))
        torch.testing.assert_close(
            logits, vectors.tensor(f"{net}.logits"), rtol=tolerance, atol=tolerance, check_dtype=False
        )


def test_activations_and_gradients_are_those_of_the_hooked_layer(
    vectors: Vectors, nets: list[str], net_of: NetOf, tolerance: float
) -> None:
    for net in nets:
        x, target = vectors.tensor(f"{net}.x"), vectors.tensor(f"{net}.targets")
        (pair,) = features(net_of(vectors, net), x, target, layer="act")
        for ours, name in ((pair.activation, "A"), (pair.gradient, "G")):
            theirs = vectors.tensor(f"{net}.{name}")
            scale = float(theirs.abs().max())
            torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=tolerance)


def test_grad_cam_chooses_the_layer_before_the_pooling(
    vectors: Vectors, nets: list[str], net_of: NetOf
) -> None:
    for net in nets:
        assert layer_names(net_of(vectors, net), vectors.tensor(f"{net}.x")) == ["act"]


def test_grad_cam_gives_the_reference_maps(
    vectors: Vectors, nets: list[str], net_of: NetOf, tolerance: float
) -> None:
    for net in nets:
        x, target = vectors.tensor(f"{net}.x"), vectors.tensor(f"{net}.targets")
        maps = GradCAM().explain(net_of(vectors, net), x, target)
        torch.testing.assert_close(maps, vectors.tensor(f"{net}.cam.gradcam"), rtol=0, atol=tolerance)


def test_grad_cam_averages_two_layers_like_the_reference(
    vectors: Vectors, nets: list[str], net_of: NetOf, tolerance: float
) -> None:
    for net in nets:
        x, target = vectors.tensor(f"{net}.x"), vectors.tensor(f"{net}.targets")
        maps = GradCAM(layer=("act", "c2")).explain(net_of(vectors, net), x, target)
        theirs = vectors.tensor(f"{net}.cam.gradcam_2layers_act_c2")
        torch.testing.assert_close(maps, theirs, rtol=0, atol=tolerance)
