"""Eigen-CAM and its variants against two re-implementations, up to the arbitrary sign of a projection."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from methodbench.testing.parity import Vectors
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.cam import features, saliency
from methodbench_vision.eigen_cam import EigenCAM, Sign, Variant, first_projection, weighted

pytestmark = pytest.mark.vectors("vision", "eigen_cam")

NetOf = Callable[[Vectors, str], LoadedModel]


@pytest.fixture
def batches(vectors: Vectors) -> list[str]:
    """Prefixes of the activation batches."""
    found = sorted(key.removesuffix(".proj_centered") for key in vectors if key.endswith(".proj_centered"))
    assert found
    return found


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference of two maps [h, w], as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize(
    ("variant", "key"), [("centered", "proj_centered"), ("paper", "proj_uncentered_own")]
)
@pytest.mark.parametrize("sign", ["raw", "flip", "corr"])
def test_projections_equal_the_reference_up_to_sign(
    vectors: Vectors, batches: list[str], tolerance: float, variant: Variant, key: str, sign: Sign
) -> None:
    for batch in batches:
        ours = first_projection(vectors.tensor(f"{batch}.A"), variant, sign)
        for a, b in zip(ours, vectors.tensor(f"{batch}.{key}"), strict=True):
            assert min(relative_error(a, b), relative_error(-a, b)) <= tolerance, batch


def test_flip_gives_the_sign_of_seg_eigen_cam(vectors: Vectors, batches: list[str], tolerance: float) -> None:
    for batch in batches:
        ours = first_projection(vectors.tensor(f"{batch}.A"), sign="flip")
        for a, b in zip(ours, vectors.tensor(f"{batch}.proj_sign_corrected"), strict=True):
            assert relative_error(a, b) <= tolerance, batch


def test_the_pipeline_scales_and_resizes_like_the_reference(
    vectors: Vectors, batches: list[str], tolerance: float
) -> None:
    for batch in batches:
        theirs = vectors.tensor(f"{batch}.scaled")
        size = (theirs.shape[1], theirs.shape[2])
        # The reference stops before the second scaling, which a map of the final size goes through alone.
        ours, rescaled = (
            saliency([vectors.tensor(f"{batch}.proj_sign_corrected")], size),
            saliency([theirs], size),
        )
        torch.testing.assert_close(ours, rescaled, rtol=0, atol=tolerance)


def test_per_channel_maps_differ_from_the_legacy_code_only_in_signs_of_channels(
    vectors: Vectors, batches: list[str], tolerance: float
) -> None:
    for batch in batches:
        for activation, theirs in zip(
            vectors.tensor(f"{batch}.A"), vectors.tensor(f"{batch}.per_channel_legacy_raw"), strict=True
        ):
            channels = first_projection(activation[:, None], "per_channel")
            parts = channels.flatten(1).double().T
            signs = torch.linalg.lstsq(parts, theirs.flatten().double()[:, None]).solution.round()
            assert set(signs.flatten().tolist()) <= {-1.0, 1.0}, batch
            assert relative_error((parts @ signs).view_as(theirs).float(), theirs) <= tolerance, batch
            together = first_projection(activation[None], "per_channel")[0]
            torch.testing.assert_close(together, channels.sum(0), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("weighting", "key"), [("none", "eigencam"), ("grad", "eigengradcam")])
def test_explained_images_equal_the_reference_with_one_of_the_two_signs(
    vectors: Vectors, nets: list[str], net_of: NetOf, tolerance: float, weighting: str, key: str
) -> None:
    for net in nets:
        model, x = net_of(vectors, net), vectors.tensor(f"{net}.x")
        target = vectors.tensor(f"{net}.targets")
        (pair,) = features(model, x, target, layer="act")
        raw = first_projection(weighted(pair) if weighting == "grad" else pair.activation)
        size = (x.shape[2], x.shape[3])
        either = torch.stack([saliency([raw], size), saliency([-raw], size)])
        theirs = vectors.tensor(f"{net}.cam.{key}")
        ours = EigenCAM(weighting=weighting, layer="act").explain(model, x, target)  # type: ignore[arg-type]
        for maps in (ours, theirs):
            distance = (either - maps).abs().amax((2, 3)).amin(0)
            assert float(distance.max()) <= tolerance, net
