"""BAS against the authors' VGG and their boxes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methodbench.testing.parity import Vectors, stated_by
from methodbench_vision.tasks.wsol import iou
from methodbench_vision.weak.bas import Parts, Step, foreground, largest_box, loss, resized, suppress

pytestmark = pytest.mark.vectors("vision", "bas")


def convolution(vectors: Vectors, name: str) -> nn.Conv2d:
    weight = vectors.tensor(f"w.{name}.weight")
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=weight.shape[2] // 2)
    layer.weight = nn.Parameter(weight)
    layer.bias = nn.Parameter(vectors.tensor(f"w.{name}.bias"))
    return layer


def names(vectors: Vectors, pattern: str) -> list[str]:
    """Layers whose weights are there, in order."""
    return sorted(match[1] for key in vectors if (match := re.fullmatch(rf"w\.({pattern})\.weight", key)))


@pytest.fixture
def parts(vectors: Vectors) -> Parts:
    """VGG16 with narrow layers; its identities do nothing behind a ReLU."""
    stem: list[nn.Module] = []
    for name in names(vectors, r"conv[1-4]_\d"):
        stem += [nn.MaxPool2d(2)] if stem else []
        stem += [convolution(vectors, name), nn.ReLU()]
    tail: list[nn.Module] = [nn.MaxPool2d(2)]
    for name in names(vectors, r"conv5_\d"):
        tail += [convolution(vectors, name), nn.ReLU()]
    heads = [convolution(vectors, name) for name in names(vectors, r"classifier_cls\.\d")]
    classify = [layer for head in heads for layer in (head, nn.ReLU())][:-1]
    return Parts(
        nn.Sequential(*stem),
        nn.Sequential(*tail),
        nn.Sequential(*classify),
        convolution(vectors, "classifier_loc.0"),
    )


@pytest.fixture
def features(vectors: Vectors, parts: Parts) -> Tensor:
    factor = stated_by(vectors.meta["notes"], r"upsampled x(\d+)")
    return parts.stem(F.interpolate(vectors.tensor("x28"), scale_factor=factor, mode="nearest"))


@pytest.fixture
def step(vectors: Vectors, parts: Parts, features: Tensor) -> Step:
    return suppress(parts, features, vectors.tensor("label"))


def total(vectors: Vectors, step: Step) -> Tensor:
    label = vectors.tensor("label")
    classified = F.cross_entropy(step.score, label)
    return loss(step, label, classified, vectors.meta["alpha"], vectors.meta["beta"])


def test_scores_activations_and_losses(vectors: Vectors, step: Step, tolerance: float) -> None:
    for ours, key in (
        (step.score, "score_1"),
        (step.guided, "score_2"),
        (step.foreground, "M_fg"),
        (step.activation, "S"),
        (step.background, "S_bg"),
        (step.bas, "bas"),
        (step.area, "area"),
        (total(vectors, step), "loss"),
    ):
        torch.testing.assert_close(
            ours,
            vectors.tensor(key),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, key=key: f"{key}: {text}",
        )


def test_gradients_of_the_loss(vectors: Vectors, parts: Parts, step: Step, tolerance: float) -> None:
    total(vectors, step).backward()
    for ours, key in (
        (parts.localize, "grad.classifier_loc.0.weight"),
        (parts.tail[1], "grad.conv5_1.weight"),
        (parts.classify[-1], "grad.classifier_cls.4.weight"),
    ):
        theirs = vectors.tensor(key)
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours.weight.grad, theirs, rtol=tolerance, atol=tolerance * scale, msg=key)


def test_the_suppression_reaches_the_map_alone(
    vectors: Vectors, parts: Parts, step: Step, tolerance: float
) -> None:
    step.bas.sum().backward()
    theirs = vectors.tensor("gradbas.classifier_loc.0.weight")
    scale = float(theirs.abs().max())
    torch.testing.assert_close(parts.localize.weight.grad, theirs, rtol=tolerance, atol=tolerance * scale)
    untouched = all(p.grad is None for part in (parts.tail, parts.classify) for p in part.parameters())
    assert untouched == bool(vectors["gradbas.conv5_1.is_zero"])


def test_the_map_of_the_best_classes(
    vectors: Vectors, parts: Parts, features: Tensor, step: Step, tolerance: float
) -> None:
    drawn = parts.localize(features).sigmoid()
    ours = foreground(drawn, step.score, vectors.meta["topk"])
    theirs = vectors.tensor("M_fg_topk")
    torch.testing.assert_close(ours[:, None], theirs, rtol=tolerance, atol=tolerance)


def test_maps_boxes_and_overlaps(vectors: Vectors, tolerance: float) -> None:
    theirs = vectors.tensor("box.normalized")
    ours = resized(vectors.tensor("box.maps"), (theirs.shape[1], theirs.shape[2]))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    found = np.array(
        [[largest_box(one, tau) for tau in vectors["box.thresholds"]] for one in vectors["box.normalized"]]
    )
    assert np.array_equal(found, vectors["box.boxes"])
    overlaps = iou(found.reshape(-1, 4), vectors["box.gt"][None]).reshape(vectors["box.iou"].shape)
    np.testing.assert_allclose(overlaps, vectors["box.iou"], rtol=tolerance)
