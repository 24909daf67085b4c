"""Boxes, thresholds and pixels of weakly supervised localization."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.baselines import CentreGaussian, FullImage, OracleMask, RandomMap
from methodbench_vision.models.shapes_cnn import PREPROCESS, ShapesNet
from methodbench_vision.tasks.explainer_entries import TASKS
from methodbench_vision.tasks.images import procedural_images
from methodbench_vision.tasks.localization import TRAINING_DATA
from methodbench_vision.tasks.wsol import (
    IGNORED,
    Localization,
    best_ious,
    boxes,
    hits,
    iou,
    pixel_average_precision,
    pooled_iou,
    scaled,
)


def shapes_model(**facts: Any) -> LoadedModel:
    torch.manual_seed(0)
    net = ShapesNet().eval()
    return LoadedModel(
        "toy", "cnn", net, detect(net), preprocess=PREPROCESS, facts={"data": TRAINING_DATA, **facts}
    )


def rectangle(x0: int, y0: int, x1: int, y1: int, size: int = 40) -> np.ndarray:
    one = np.zeros((size, size))
    one[y0 : y1 + 1, x0 : x1 + 1] = 1
    return one


def test_a_box_reaches_one_pixel_beyond_its_contour_and_stays_inside_the_picture() -> None:
    assert boxes(rectangle(5, 7, 20, 30), 0.5, multiple=False).tolist() == [[5, 7, 21, 31]]
    assert boxes(rectangle(30, 30, 39, 39), 0.5, multiple=False).tolist() == [[30, 30, 39, 39]]
    assert boxes(np.zeros((40, 40)), 0.5, multiple=True).tolist() == [[0, 0, 0, 0]]


def test_the_largest_contour_wins_unless_all_are_asked_for() -> None:
    both = np.maximum(rectangle(0, 0, 5, 5), rectangle(20, 20, 35, 30))
    assert boxes(both, 0.5, multiple=False).tolist() == [[20, 20, 36, 31]]
    assert sorted(boxes(both, 0.5, multiple=True).tolist()) == [[0, 0, 6, 6], [20, 20, 36, 31]]


def test_iou_counts_both_ends() -> None:
    a = np.array([[0, 0, 9, 9]])
    assert iou(a, a)[0, 0] == 1
    assert iou(a, np.array([[5, 0, 14, 9]]))[0, 0] == pytest.approx(50 / 150)
    assert iou(a, np.array([[10, 10, 12, 12]]))[0, 0] == 0


def test_masks_as_maps_reach_the_top_of_every_score_and_noise_the_share_of_the_object() -> None:
    data = procedural_images(0, 24)
    masks, thresholds = data.objects.numpy(), np.arange(0, 1, 0.1)
    best = best_ious(masks.astype(float), data.boxes[:, None].numpy(), thresholds, multiple=False)
    assert hits(best, 0.7).mean() == 1
    assert float(best.max(1).min()) > 0.85
    assert pixel_average_precision(masks.astype(float), masks) == pytest.approx(100)
    assert pooled_iou(masks.astype(float), masks, thresholds) == 1
    noise = np.random.default_rng(0).random(masks.shape)
    assert pixel_average_precision(noise, masks) == pytest.approx(100 * masks.mean(), abs=2)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_ignored_pixels_change_no_score_and_more_boxes_never_hurt(seed: int) -> None:
    random = np.random.default_rng(seed)
    maps = np.stack([scaled(one) for one in random.random((3, 20, 20))])
    labels = (random.random((3, 20, 20)) < 0.3).astype(np.uint8)
    holed = labels.copy()
    holed[:, :5] = IGNORED
    cut = maps[:, 5:], labels[:, 5:]
    assert pixel_average_precision(maps, holed) == pytest.approx(pixel_average_precision(*cut))
    assert pooled_iou(maps, holed, [0.5]) == pytest.approx(pooled_iou(*cut, [0.5]))
    truth = np.array([[[3, 3, 15, 15]]] * 3)
    single = best_ious(maps, truth, np.array([0.2, 0.6]), multiple=False)
    assert bool((best_ious(maps, truth, np.array([0.2, 0.6]), multiple=True) >= single).all())


def test_constant_and_nan_maps_become_zero() -> None:
    assert not scaled(np.full((4, 4), 3.0)).any()
    assert not scaled(np.array([[0.0, np.nan]])).any()


def test_the_task_ranks_the_rows_as_they_must_be_and_reports_every_metric() -> None:
    task = Localization(images=16, validation_images=8, threshold_step=0.1)
    (entry,) = [one for one in TASKS if one.name == "shapes-wsol"]
    rows = {
        name: task.evaluate(method, shapes_model(), Context())  # type: ignore[arg-type]
        for name, method in {
            "oracle": OracleMask(),
            "centre": CentreGaussian(),
            "noise": RandomMap(),
            "full": FullImage(),
        }.items()
    }
    for evaluation in rows.values():
        assert set(evaluation.scores) == {metric.name for metric in entry.metrics}
        for metric in entry.metrics:
            assert len(evaluation.scores[metric.name].values) == (1 if metric.aggregate == "single" else 16)

    def mean(row: str, metric: str) -> float:
        return float(rows[row].scores[metric].values.mean())

    assert mean("oracle", "max-box-acc-v2") == mean("oracle", "gt-known-loc") == 1
    assert mean("oracle", "pxap") == pytest.approx(100)
    assert mean("centre", "pxap") > mean("noise", "pxap")
    assert mean("full", "pointing-object") == 0


def test_models_that_never_saw_the_shapes_are_refused() -> None:
    with pytest.raises(NotApplicableError, match="not trained on the procedural images"):
        Localization().evaluate(RandomMap(), shapes_model(data="digits"), Context())
