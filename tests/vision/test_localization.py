"""Pointing game, relevance mass and relevance rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.protocols import Explainer
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.eigen_cam import EigenCAM
from methodbench_vision.grad_cam import GradCAM
from methodbench_vision.models.shapes_cnn import PREPROCESS, ShapesNet
from methodbench_vision.random_cam import RandomCAM
from methodbench_vision.tasks.explainer_entries import TASKS
from methodbench_vision.tasks.images import procedural_images
from methodbench_vision.tasks.localization import (
    TRAINING_DATA,
    PointingGame,
    pointing,
    relevance_mass,
    relevance_rank,
)


class Oracle:
    """An explainer that knows the masks of the first test images."""

    def __init__(self, masks: Tensor) -> None:
        self.masks = masks.float()

    def explain(self, model: LoadedModel, x: Tensor, target: Tensor) -> Tensor:
        maps, self.masks = self.masks[: len(x)], self.masks[len(x) :]
        return maps


@pytest.fixture
def model() -> LoadedModel:
    torch.manual_seed(0)
    module = ShapesNet().eval()
    facts: dict[str, Any] = {"data": TRAINING_DATA}
    return LoadedModel("toy", "cnn", module, detect(module), preprocess=PREPROCESS, facts=facts)


@pytest.fixture
def masks() -> Tensor:
    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    masks[0, 1:3, 2:5] = True
    masks[1, :, 7] = True
    return masks


def test_the_mask_itself_scores_one(masks: Tensor) -> None:
    for score in (pointing, relevance_mass, relevance_rank):
        assert score(masks.double(), masks).tolist() == [1, 1]
        assert score(1 - masks.double(), masks).tolist() == [0, 0]


def test_one_of_several_highest_pixels_in_the_mask_is_a_hit(masks: Tensor) -> None:
    maps = torch.zeros(2, 6, 8, dtype=torch.float64)
    maps[:, 0, 0] = 1
    assert pointing(maps, masks).tolist() == [0, 0]
    maps[:, 1, 2] = 1
    assert pointing(maps, masks).tolist() == [1, 0]


def test_a_map_that_says_nothing_points_nowhere_and_ranks_by_chance(masks: Tensor) -> None:
    share = masks.double().mean((1, 2))
    for constant in (0.0, 0.5):
        maps = torch.full((2, 6, 8), constant, dtype=torch.float64)
        assert pointing(maps, masks).tolist() == [0, 0]
        torch.testing.assert_close(relevance_rank(maps, masks), share)
    assert relevance_mass(torch.zeros(2, 6, 8, dtype=torch.float64), masks).tolist() == [0, 0]


def test_ties_for_the_last_places_count_by_chance(masks: Tensor) -> None:
    # 2 of the 6 places go to the pixels above zero, one of them inside; 5 of the 46 zeros are inside.
    maps = torch.zeros(1, 6, 8, dtype=torch.float64)
    maps[0, 1, 2], maps[0, 5, 5] = 0.7, 0.9
    assert relevance_rank(maps, masks[:1]).item() == pytest.approx((1 + 4 * 5 / 46) / 6)


def test_an_empty_mask_has_no_score() -> None:
    maps, masks = torch.rand(1, 4, 4, dtype=torch.float64), torch.zeros(1, 4, 4, dtype=torch.bool)
    for score in (pointing, relevance_mass, relevance_rank):
        assert score(maps, masks).isnan().all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), power=st.floats(0.2, 5))
def test_pointing_and_rank_depend_on_the_order_of_pixels_alone(seed: int, power: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(3, 5, 7, generator=generator, dtype=torch.float64)
    masks = torch.rand(3, 5, 7, generator=generator) < 0.3
    masks[:, 0, 0] = True
    for score in (pointing, relevance_rank):
        torch.testing.assert_close(score(maps**power, masks), score(maps, masks))
    for score in (pointing, relevance_rank, relevance_mass):
        torch.testing.assert_close(score(maps.flip(2), masks.flip(2)), score(maps, masks))
    inside, outside = relevance_mass(maps, masks), relevance_mass(maps, ~masks)
    torch.testing.assert_close(inside + outside, torch.ones(3, dtype=torch.float64))


def test_the_task_gives_an_oracle_full_marks(model: LoadedModel) -> None:
    data = procedural_images(0, 30, split="test")
    evaluation = PointingGame(images=30, batch_size=8).evaluate(Oracle(data.objects), model, Context())
    (entry,) = [task for task in TASKS if task.name == "pointing-game"]
    assert set(evaluation.scores) == {metric.name for metric in entry.metrics}
    for scores in evaluation.scores.values():
        assert scores.values.tolist() == [1] * 30
    shifted = Oracle(data.objects.roll(32, dims=2))
    evaluation = PointingGame(images=30, batch_size=8).evaluate(shifted, model, Context())
    assert evaluation.scores["relevance-mass"].values.mean() < 0.5
    heads = PointingGame(images=30, batch_size=8).evaluate(Oracle(data.heads), model, Context())
    assert heads.scores["pointing-head"].values.tolist() == [1] * 30
    assert heads.scores["relevance-rank"].values.mean() < 1


def test_models_of_other_data_are_refused(model: LoadedModel) -> None:
    model.facts["data"] = "imagenet"
    with pytest.raises(NotApplicableError, match="procedural"):
        PointingGame().evaluate(GradCAM(), model, Context())
    with pytest.raises(NotApplicableError, match="no model"):
        PointingGame().evaluate(GradCAM(), None, Context())


@pytest.mark.slow
def test_on_a_trained_net_both_methods_beat_the_random_control(
    shapes_model: LoadedModel, ctx: Context
) -> None:
    model = shapes_model
    task = PointingGame()
    methods: dict[str, Explainer] = {
        "grad-cam": GradCAM(),
        "eigen-cam": EigenCAM(sign="corr"),
        "random-cam": RandomCAM(),
    }
    means = {}
    for name, method in methods.items():
        evaluation = task.evaluate(method, model, ctx)
        means[name] = {metric: scores.values.mean() for metric, scores in evaluation.scores.items()}
    for name in ("grad-cam", "eigen-cam"):
        for metric, mean in means[name].items():
            assert mean > means["random-cam"][metric] + 0.1, (name, metric, means)
        assert means[name]["pointing-object"] > 0.85
