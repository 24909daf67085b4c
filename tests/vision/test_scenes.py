"""Procedural pictures of several objects and of nuclei, and what is scored on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methodbench.context import Context
from methodbench.errors import MethodbenchError
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
