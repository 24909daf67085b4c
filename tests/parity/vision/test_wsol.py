"""Boxes, PxAP and ROAD against wsolevaluation and pytorch-grad-cam."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methodbench.testing.parity import Vectors
from methodbench_vision.tasks.perturbation import Faithfulness, imputed, removal_change, road
from methodbench_vision.tasks.wsol import DELTAS, best_ious, boxes, hits, pixel_average_precision

pytestmark = pytest.mark.vectors("vision", "vision_protocol")


def test_boxes_of_the_largest_contour(vectors: Vectors) -> None:
    for one, theirs in zip(vectors["maps"], vectors["boxes_single"], strict=True):
        ours = [boxes(one, tau, multiple=False)[0] for tau in vectors["thresholds"]]
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(("kind", "multiple"), [("single", False), ("multi", True)])
def test_best_ious_and_accuracies(vectors: Vectors, tolerance: float, kind: str, multiple: bool) -> None:
    ours = best_ious(vectors["maps"], vectors["gt_boxes"], vectors["thresholds"], multiple=multiple)
    np.testing.assert_allclose(ours, vectors[f"best_iou_{kind}"], atol=tolerance)
    accuracies = [hits(ours, delta).mean() for delta in DELTAS]
    scale = 100 if vectors[f"maxboxacc_{kind}_30_50_70"].max() > 1 else 1
    np.testing.assert_allclose(
        scale * np.array(accuracies), vectors[f"maxboxacc_{kind}_30_50_70"], atol=scale * tolerance
    )
    name, value = ("MaxBoxAccV2", np.mean(accuracies)) if multiple else ("MaxBoxAcc_V1", accuracies[1])
    np.testing.assert_allclose(scale * value, vectors[name], atol=scale * tolerance)


def test_pixel_average_precision(vectors: Vectors, tolerance: float) -> None:
    ours = pixel_average_precision(vectors["maps"], vectors["gt_mask_with_ignore255"])
    theirs = float(vectors["PxAP"])
    assert ours == pytest.approx(theirs if theirs > 1 else 100 * theirs, abs=100 * tolerance)


def test_imputation_without_noise(vectors: Vectors, tolerance: float) -> None:
    missing = vectors["road.mask"] < 0.5
    ours = imputed(vectors["x"][0], missing)
    np.testing.assert_allclose(ours, vectors["road.imputed_noise0"], atol=tolerance)


def test_road_without_noise(vectors: Vectors, net: nn.Module, tolerance: float) -> None:
    x, maps, targets = vectors.tensor("x"), vectors.tensor("cams"), vectors.tensor("targets")

    def logit(images: Tensor) -> Tensor:
        with torch.no_grad():
            return net(images).gather(1, targets[:, None])[:, 0].double()

    random = np.random.default_rng(0)
    percentiles = sorted({float(m[1]) for key in vectors if (m := re.fullmatch(r"road\.morf\.(\d+)", key))})
    assert percentiles
    for p in percentiles:
        for name, ranked in (("morf", maps), ("lerf", 1 - maps)):
            ours = removal_change(logit, x, ranked, p, 0.0, random)
            theirs = vectors.tensor(f"road.{name}.{p:.0f}", torch.float64)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=10 * tolerance)
    # The file does not say at which percentiles the combined score was averaged: evenly spaced ones, between the lowest
    # and the highest that it holds, or those of the package. One of these grids must give all of its scores.
    low, high = min(percentiles), max(percentiles)
    grids = [np.linspace(low, high, count) for count in range(len(percentiles), int(high - low) // 10 + 2)]
    theirs = vectors.tensor("road.combined", torch.float64)
    distances = [
        float((road(logit, x, maps, tuple(grid), 0.0, random) - theirs).abs().max())
        for grid in (*grids, Faithfulness().percentiles)
    ]
    assert min(distances) <= 10 * tolerance, distances
