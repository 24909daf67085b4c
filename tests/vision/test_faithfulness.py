"""Insertion, deletion and changes of confidence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import DivergedError, MethodbenchError, NotApplicableError
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import LoadedModel, Preprocess
from methodbench_vision.tasks.explainer_entries import TASKS
from methodbench_vision.tasks.faithfulness import (
    InsertionDeletion,
    area,
    class_confidence,
    confidence_change,
    perturbation_curve,
    perturbation_curves,
    square_crops,
)
from methodbench_vision.tasks.folding import folded
from methodbench_vision.tasks.images import sample_pictures


@dataclass
class Fixed:
    """An explainer that returns what it is told to, once per image."""

    one: Tensor

    def explain(self, model: LoadedModel, x: Tensor, target: Tensor) -> Tensor:
        return self.one.expand(len(x), *self.one.shape)


def photograph_model(side: int) -> LoadedModel:
    torch.manual_seed(0)
    module = timm.create_model("test_efficientnet", num_classes=5).eval()
    preprocess = Preprocess(size=(side, side), mean=(0.5,) * 3, std=(0.5,) * 3)
    return LoadedModel("toy", "cnn", module, detect(module), preprocess=preprocess)


def share_of_left_half(x: Tensor) -> Tensor:
    """Confidence of a classifier that looks at the left half only."""
    return x[:, 0, :, : x.shape[3] // 2].double().mean((1, 2))


def test_the_map_that_the_confidence_follows_has_the_best_areas() -> None:
    x = torch.ones(1, 3, 8, 8)
    left = torch.zeros(1, 8, 8)
    left[:, :, :4] = torch.linspace(0.5, 1, 32).reshape(8, 4)
    for maps, insertion, deletion in ((left, 0.75, 0.25), (1 - left, 0.25, 0.75)):
        inserted = perturbation_curve(share_of_left_half, x, maps, 8, insertion=True)
        deleted = perturbation_curve(share_of_left_half, x, maps, 8, insertion=False)
        assert area(inserted).item() == pytest.approx(insertion)
        assert area(deleted).item() == pytest.approx(deletion)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), steps=st.integers(1, 40))
def test_curves_run_between_the_empty_and_the_whole_picture(seed: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, maps = torch.rand(2, 3, 5, 6, generator=generator), torch.rand(2, 5, 6, generator=generator)

    def mean(images: Tensor) -> Tensor:
        return images.double().mean((1, 2, 3))

    inserted = perturbation_curve(mean, x, maps, steps, insertion=True)
    deleted = perturbation_curve(mean, x, maps, steps, insertion=False)
    assert inserted.shape == (2, steps + 1)
    torch.testing.assert_close(inserted[:, 0], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(inserted[:, -1], mean(x))
    # What is shown by one is hidden by the other, and this score is additive over pixels.
    torch.testing.assert_close(inserted + deleted, mean(x)[:, None].expand(2, steps + 1))


def test_pixels_of_equal_value_are_taken_row_by_row() -> None:
    x = torch.arange(1.0, 5.0).reshape(1, 1, 2, 2)
    curve = perturbation_curve(lambda y: y.sum((1, 2, 3)), x, torch.zeros(1, 2, 2), 4, insertion=True)
    assert curve.tolist() == [[0, 1, 3, 6, 10]]


def test_confidence_is_the_softmax_probability_of_each_images_class() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    confidence = class_confidence(lambda x: x, torch.tensor([1, 0]))
    expected = logits.double().softmax(1)[[0, 1], [1, 0]]
    torch.testing.assert_close(confidence(logits), expected)


def test_changes_of_confidence_follow_their_definitions() -> None:
    before, after = torch.tensor([0.8, 0.5, 0.5], dtype=torch.float64), torch.tensor([0.2, 0.75, 0.5])
    change = confidence_change(before, after.double())
    assert change.drop.tolist() == pytest.approx([0.75, 0, 0])
    assert change.gain.tolist() == pytest.approx([0, 0.5, 0])
    assert change.increase.tolist() == [0, 1, 0]
    sure = confidence_change(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    assert [float(value) for value in sure] == [1, 0, 0]


def test_crops_are_squares_of_the_allowed_sizes_and_the_first_is_centred() -> None:
    picture = np.arange(20 * 30 * 3, dtype=np.int64).reshape(20, 30, 3)
    crops = square_crops([picture, picture], 50, 0.5, seed=1)
    assert len(crops) == 100
    np.testing.assert_array_equal(crops[0], picture[:, 5:25])
    sides = [crop.shape[0] for crop in crops]
    assert all(crop.shape == (side, side, 3) for crop, side in zip(crops, sides, strict=True))
    assert min(sides) >= 10
    assert max(sides[1:50]) <= 20
    assert len(set(sides)) > 5
    again = square_crops([picture, picture], 10, 0.5, seed=1)
    for a, b in zip(again[:10], crops[:10], strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_task_scores_every_crop_and_reports_every_metric() -> None:
    model = photograph_model(96)
    ramp = torch.linspace(0, 1, 96 * 96).reshape(96, 96)
    evaluation = InsertionDeletion(crops=2, steps=3).evaluate(Fixed(ramp), model, Context())
    (entry,) = [task for task in TASKS if task.name == "insertion-deletion"]
    assert set(evaluation.scores) == {metric.name for metric in entry.metrics}
    units = 2 * len(sample_pictures())
    assert all(len(scores.values) == units for scores in evaluation.scores.values())
    insertion = evaluation.scores["insertion-auc"].values
    assert len(np.unique(insertion)) == units
    assert np.all((insertion > 0) & (insertion < 1))
    assert evaluation.series["insertion"].shape == (4,)
    assert evaluation.series["insertion"][-1] == pytest.approx(evaluation.facts["mean_confidence"])
    assert evaluation.series["deletion"][0] == pytest.approx(evaluation.facts["mean_confidence"])


def test_default_crops_give_at_least_20_units() -> None:
    assert InsertionDeletion().crops * len(sample_pictures()) >= 20


def test_small_models_are_not_shown_photographs() -> None:
    with pytest.raises(NotApplicableError, match="32 pixels"):
        InsertionDeletion().evaluate(Fixed(torch.rand(32, 32)), photograph_model(32), Context())


@pytest.mark.parametrize(
    ("one", "error", "reason"),
    [
        (torch.rand(95, 96), MethodbenchError, "shape"),
        (torch.full((96, 96), torch.nan), DivergedError, "not finite"),
        (2 * torch.rand(96, 96), MethodbenchError, "must lie in"),
    ],
)
def test_maps_that_break_the_contract_are_named(
    one: Tensor, error: type[MethodbenchError], reason: str
) -> None:
    with pytest.raises(error, match=reason) as caught:
        InsertionDeletion(crops=1).evaluate(Fixed(one), photograph_model(96), Context())
    assert "Fixed" in str(caught.value)


def test_steps_in_one_pass_are_those_of_one_pass_each() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 6 * 6, 4))
    x, maps, target = torch.randn(3, 3, 6, 6), torch.rand(3, 6, 6), torch.tensor([0, 3, 1])
    together = perturbation_curve(class_confidence(net, target), x, maps, 20, insertion=True)
    for index in range(3):
        alone = class_confidence(net, target[index : index + 1])
        one = perturbation_curve(alone, x[index : index + 1], maps[index : index + 1], 20, insertion=True)
        torch.testing.assert_close(together[index : index + 1], one)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_both_curves_at_once_are_each_alone_with_their_ends_scored_once(steps: int) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 6 * 6, 4))
    x, maps, target = torch.randn(3, 3, 6, 6), torch.rand(3, 6, 6), torch.tensor([0, 3, 1])
    scored = 0

    def confidence(pictures: Tensor) -> Tensor:
        nonlocal scored
        scored += len(pictures)
        return class_confidence(net, target)(pictures)

    shown, hidden = perturbation_curves(confidence, x, maps, steps)
    assert scored == 2 * steps * len(x)
    for curve, insertion in ((shown, True), (hidden, False)):
        torch.testing.assert_close(curve, perturbation_curve(confidence, x, maps, steps, insertion=insertion))


def test_a_folded_network_answers_the_same_and_the_original_stays() -> None:
    model = photograph_model(64)
    for buffer in model.module.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model.module(x)
        fast = folded(model.module, x[:1])
        assert fast is not model.module
        torch.testing.assert_close(fast(x), before, rtol=1e-3, atol=1e-4)
        assert torch.equal(model.module(x), before)


def test_a_norm_whose_convolution_is_read_elsewhere_is_not_folded() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.convolution(x)
            return (self.norm(y) + y).mean((2, 3))

    net = Twice().eval()
    net.norm.running_var.fill_(9.0)
    assert folded(net, torch.randn(1, 3, 8, 8)) is net
    plain = torch.nn.Flatten()
    assert folded(plain, torch.randn(1, 3, 8, 8)) is plain
