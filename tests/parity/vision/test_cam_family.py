"""The class activation maps against pytorch-grad-cam, attention rollout against vit-explain."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from methodbench.testing.parity import Vectors
from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.attention_rollout import rollout
from methodbench_vision.class_activation_map import CAM
from methodbench_vision.grad_cam_pp import GradCAMPlusPlus
from methodbench_vision.layer_cam import LayerCAM
from methodbench_vision.score_cam import ScoreCAM

pytestmark = pytest.mark.vectors("vision", "cam_baselines")

NetOf = Callable[[Vectors, str], LoadedModel]


@pytest.mark.parametrize(
    ("method", "key"),
    [
        (GradCAMPlusPlus(), "gradcampp"),
        (LayerCAM(), "layercam"),
        (ScoreCAM(), "scorecam"),
        (ScoreCAM(batch_size=7), "scorecam"),
    ],
)
def test_maps_equal_the_reference(
    vectors: Vectors, nets: list[str], net_of: NetOf, tolerance: float, method: Any, key: str
) -> None:
    for net in nets:
        maps = method.explain(
            net_of(vectors, net), vectors.tensor(f"{net}.x"), vectors.tensor(f"{net}.targets")
        )
        torch.testing.assert_close(maps, vectors.tensor(f"{net}.cam.{key}"), rtol=0, atol=tolerance, msg=key)


def test_cam_is_the_reference_grad_cam_on_nets_with_a_global_mean(
    vectors: Vectors, nets: list[str], net_of: NetOf, tolerance: float
) -> None:
    compared = 0
    for net in nets:
        model = net_of(vectors, net)
        if getattr(model.module, "grid", None) != 1:
            continue
        adapter = Adapter(kind="cnn", stages=("c3",), head_name="fc")
        model = LoadedModel(model.name, model.kind, model.module, adapter)
        maps = CAM().explain(model, vectors.tensor(f"{net}.x"), vectors.tensor(f"{net}.targets"))
        theirs = vectors.tensor(f"{net}.cam.gradcam")
        torch.testing.assert_close(maps, theirs, rtol=0, atol=tolerance)
        compared += 1
    assert compared


def test_rollout_equals_the_reference_for_every_fusion_and_share(vectors: Vectors, tolerance: float) -> None:
    blocks = list(vectors.tensor("rollout.att"))
    pattern = re.compile(r"rollout\.(legacy|row_normalized)\.(mean|max|min)\.(\d+\.\d+)(_own)?")
    found = [(key, match) for key in vectors if (match := pattern.fullmatch(key))]
    assert found
    for key, match in found:
        theirs = vectors.tensor(key)
        joined = rollout(
            blocks,
            fusion=match[2],  # type: ignore[arg-type]
            discard_ratio=float(match[3]),
            normalize="legacy" if match[1] == "legacy" else "row",
        )
        row = joined[0, 0, -theirs.numel() :].view_as(theirs)
        torch.testing.assert_close(row / row.max(), theirs, rtol=0, atol=tolerance, msg=key)
