"""Procedural pictures of several objects and of nuclei, and what is scored on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methodbench.context import Context
from methodbench.errors import MethodbenchError
from methodbench_vision.tasks.images import procedural_images
from methodbench_vision.tasks.nuclei import NucleiInstances, aji, dice, panoptic_quality
from methodbench_vision.tasks.scenes import nuclei, scenes
from methodbench_vision.tasks.weak import SeedSegmentation, confusions, miou
from methodbench_vision.tasks.weak_entries import TASKS
from methodbench_vision.tasks.wsol import IGNORED
from methodbench_vision.weak.cam_seeds import CamSeeds

INSTANCES = st.integers(0, 2**16).map(lambda seed: np.random.default_rng(seed).integers(0, 5, (12, 12)))


def test_fewer_pictures_are_the_first_of_more_and_the_splits_differ() -> None:
    for draw in (scenes, nuclei):
        few, more, other = draw(3, 2), draw(3, 4), draw(3, 2, split="train")
        assert torch.equal(few.images, more.images[:2])
        assert not torch.equal(few.images, other.images)


def test_labels_masks_and_heads_tell_the_same() -> None:
    found = scenes(0, 12)
    for labels, mask, head in zip(found.labels, found.masks, found.heads, strict=True):
        assert set(mask.unique().tolist()) - {0} == {k + 1 for k in labels.nonzero()[:, 0].tolist()}
        assert bool((mask[head] > 0).all())
        assert 0 < int(head.sum()) < int((mask > 0).sum())


def test_classes_come_together_as_often_as_asked() -> None:
    def share(together: float) -> float:
        labels = scenes(0, 200, together=together).labels
        several = labels.sum(1) > 1
        return float((labels[several, 0] == labels[several, 1]).float().mean())

    assert share(1.0) > share(0.3) + 0.2


#: Some pixels of the pictures as every record knows them; a change of the default settings would show here.
KNOWN = {
    procedural_images: [
        0.644352,
        0.420771,
        0.678873,
        0.468173,
        0.45789,
        0.258392,
        0.395397,
        0.334845,
        0.311936,
        0.310323,
        0.388356,
    ],
    scenes: [
        0.59187,
        0.517194,
        0.48097,
        0.365952,
        0.426376,
        0.372951,
        0.594773,
        0.322537,
        0.327435,
        0.306906,
        0.326881,
    ],
    nuclei: [
        0.859549,
        0.82946,
        0.890656,
        0.673321,
        0.620904,
        0.672564,
        0.421912,
        0.493654,
        1.0,
        0.81616,
        0.930433,
        0.856699,
        1.0,
        0.640258,
        0.588743,
        0.755109,
        0.731434,
        0.816213,
        0.74634,
        0.93169,
    ],
}


@pytest.mark.parametrize("draw", [procedural_images, scenes, nuclei])
def test_the_default_settings_draw_the_known_pictures(draw: Any) -> None:
    found = draw(3, 2).images[:, :, ::29, ::29]
    torch.testing.assert_close(found.flatten()[::5], torch.tensor(KNOWN[draw]), rtol=0, atol=1e-5)
    explicit = {"texture": 1.0} if draw is nuclei else {"texture": 1.0, "difficulty": 0.0}
    assert torch.equal(draw(3, 2, **explicit).images, draw(3, 2).images)


@pytest.mark.parametrize("draw", [procedural_images, scenes, nuclei])
def test_texture_is_the_contrast_of_the_background_and_moves_nothing(draw: Any) -> None:
    even, usual, strong = (draw(0, 4, texture=texture) for texture in (0.0, 1.0, 2.0))
    truth = {procedural_images: "objects", scenes: "masks", nuclei: "instances"}[draw]
    assert torch.equal(getattr(even, truth), getattr(strong, truth))
    outside = (getattr(usual, truth) == 0)[:, None]
    spread = [float(one.images.masked_select(outside).std()) for one in (even, usual, strong)]
    assert spread[0] < spread[1] < spread[2]
    inside = ~outside
    pixels = [one.images.masked_select(inside) for one in (even, strong)]
    assert torch.equal(*pixels)


@pytest.mark.parametrize("draw", [procedural_images, scenes])
def test_difficulty_takes_the_contrast_of_objects_and_of_their_stripes(draw: Any) -> None:
    pictures = [draw(0, 8, difficulty=difficulty, texture=0.0) for difficulty in (0.0, 0.5, 1.0)]
    heads = pictures[0].heads[:, None]
    assert all(torch.equal(one.heads, pictures[0].heads) for one in pictures)
    stripes = [float(one.images.masked_select(heads).std()) for one in pictures]
    assert stripes[0] > 1.5 * stripes[1] > 1.5 * stripes[2]
    # What is left of the stripes is the noise of the camera, and the object's mean is the background's.
    assert stripes[2] == pytest.approx(0.02, rel=0.1)
    assert float(pictures[2].images.masked_select(heads).mean()) == pytest.approx(0.42, abs=0.005)


def test_tasks_draw_the_pictures_that_their_settings_ask_for(ctx: Context) -> None:
    usual, hard = (
        SeedSegmentation(images=2, train_images=8, difficulty=difficulty).evaluate(
            CamSeeds(epochs=1), None, ctx
        )
        for difficulty in (0.0, 0.7)
    )
    assert usual.facts["data_digest"] != hard.facts["data_digest"]


def test_every_nucleus_has_a_point_inside_of_it() -> None:
    found = nuclei(1, 3, jitter=4.0)
    for instances, points in zip(found.instances, found.points, strict=True):
        assert 10 <= len(points) <= 40
        x, y = points.long().T
        assert instances[y, x].tolist() == list(range(1, len(points) + 1))


def test_pixels_to_ignore_change_no_true_positive() -> None:
    random = np.random.default_rng(0)
    maps, present = random.random((2, 3, 8, 8)), np.ones((2, 3))
    truth = random.integers(0, 4, (2, 8, 8))
    ignored = truth.copy()
    ignored[:, :2] = IGNORED
    rest = [one[..., 2:, :] for one in (maps, truth)]
    assert np.array_equal(
        confusions(maps, present, ignored, np.array([0.3])),
        confusions(rest[0], present, rest[1], np.array([0.3])),
    )


def test_a_class_that_is_not_present_is_never_drawn_and_the_truth_has_a_miou_of_one() -> None:
    truth = np.array([[[0, 1], [0, 2]]])
    maps = np.stack([truth == 1, truth == 2], 1).astype(float)
    assert miou(confusions(maps, np.ones((1, 2)), truth, np.array([0.5])).sum(1)).tolist() == [1.0]
    table = confusions(maps, np.array([[1, 0]]), truth, np.array([0.5]))
    assert table[0, 0, :, 2].sum() == 0


@given(INSTANCES)
@settings(max_examples=20, deadline=None)
def test_instances_agree_with_themselves_whatever_their_numbers(truth: np.ndarray) -> None:
    renamed = np.where(truth > 0, 7 * truth + 3, 0)
    for score in (aji, dice, panoptic_quality):
        assert score(truth, renamed) == pytest.approx(1.0)


@given(INSTANCES, INSTANCES)
@settings(max_examples=20, deadline=None)
def test_scores_of_instances_lie_between_0_and_1(truth: np.ndarray, found: np.ndarray) -> None:
    for score in (aji, dice, panoptic_quality):
        assert 0 <= score(truth, found) <= 1


def test_what_is_predicted_for_nothing_lowers_aji() -> None:
    truth = np.zeros((8, 8), dtype=int)
    truth[:2, :2] = 1
    found = truth.copy()
    found[6:, 6:] = 2
    assert aji(truth, found) == pytest.approx(4 / 8)
    assert panoptic_quality(truth, found) == pytest.approx(1 / 1.5)
    assert aji(truth, np.zeros_like(truth)) == 0
    assert aji(np.zeros_like(truth), np.zeros_like(truth)) == 1


def test_the_seed_task_reports_every_metric_of_its_entry(ctx: Context) -> None:
    (entry,) = (task for task in TASKS if task.name == "shapes-wsss")
    found = SeedSegmentation(images=6, train_images=12).evaluate(CamSeeds(epochs=1), None, ctx)
    assert set(found.scores) == {metric.name for metric in entry.metrics}
    best = found.scores["seed-miou"].values[0]
    assert best == found.series["seed-miou-by-threshold"].max()


def test_instances_of_another_size_are_refused(ctx: Context) -> None:
    class Wrong:
        def fit(self, weak_labels: object, ctx: Context) -> object:
            return lambda x: torch.zeros(len(x), 4, 4, dtype=torch.long)

    with pytest.raises(MethodbenchError, match="predicted instances"):
        NucleiInstances(images=1, train_images=2).evaluate(Wrong(), None, ctx)
