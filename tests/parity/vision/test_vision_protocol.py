"""Localization scores against Quantus, perturbation curves against the rules of xplique."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from methodbench.testing.parity import Vectors
from methodbench_vision.tasks.faithfulness import (
    area,
    class_confidence,
    confidence_change,
    perturbation_curve,
)
from methodbench_vision.tasks.localization import pointing, relevance_mass, relevance_rank

pytestmark = pytest.mark.vectors("vision", "vision_protocol")


def test_localization_scores_equal_the_reference(vectors: Vectors, tolerance: float) -> None:
    maps, masks = vectors.tensor("maps", torch.float64), vectors.tensor("masks")
    for score, key in (
        (pointing, "pointing_game"),
        (relevance_mass, "relevance_mass_accuracy"),
        (relevance_rank, "relevance_rank_accuracy"),
    ):
        torch.testing.assert_close(score(maps, masks), vectors.tensor(key), rtol=0, atol=tolerance, msg=key)


@pytest.mark.parametrize("curve", ["insertion", "deletion"])
def test_curves_and_areas_equal_the_reference(
    vectors: Vectors, net: nn.Module, tolerance: float, curve: str
) -> None:
    theirs = vectors.tensor(f"{curve}.curves_own", torch.float64)
    confidence = class_confidence(net, vectors.tensor("targets"))
    ours = perturbation_curve(
        confidence,
        vectors.tensor("x"),
        vectors.tensor("cams"),
        theirs.shape[1] - 1,
        insertion=curve == "insertion",
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    areas = vectors.tensor(f"{curve}.auc_own", torch.float64)
    torch.testing.assert_close(area(ours), areas, rtol=0, atol=tolerance)


def test_changes_of_confidence_equal_the_reference(
    vectors: Vectors, net: nn.Module, tolerance: float
) -> None:
    x, maps = vectors.tensor("x"), vectors.tensor("cams")
    confidence = class_confidence(net, vectors.tensor("targets"))
    change = confidence_change(confidence(x), confidence(x * maps[:, None]))

    def reference(key: str) -> Tensor:
        return vectors.tensor(key, torch.float64)

    torch.testing.assert_close(change.drop, reference("average_drop_own"), rtol=0, atol=tolerance)
    torch.testing.assert_close(change.gain, reference("average_gain_own"), rtol=0, atol=tolerance)
    torch.testing.assert_close(change.increase, reference("increase_own"), rtol=0, atol=0)
    torch.testing.assert_close(change.increase, reference("cam_mult.increase_softmax"), rtol=0, atol=0)
