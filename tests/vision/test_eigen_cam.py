"""Properties of the first principal component of feature maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from methodbench.errors import DivergedError
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.eigen_cam import (
    EigenCAM,
    Sign,
    Variant,
    _top_by_eigh,
    _top_by_squaring,
    first_projection,
)
from methodbench_vision.grad_cam import GradCAM
from methodbench_vision.models.shapes_cnn import ShapesNet

SHAPES = [(3, 5, 4), (40, 3, 4), (12, 6, 2)]
seeds = st.integers(0, 2**16)


def feature_maps(seed: int, shape: tuple[int, int, int]) -> Tensor:
    """Post-ReLU maps [2, C, h, w] with one direction well above the others."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, *shape, generator=generator)
    pattern = torch.rand(2, 1, *shape[1:], generator=generator)
    weights = torch.rand(2, shape[0], 1, 1, generator=generator)
    return (noise * 0.3 + 8 * weights * pattern).relu()


def assert_equal_up_to_sign(a: Tensor, b: Tensor) -> None:
    scale = b.abs().amax((1, 2))
    distance = torch.minimum((a - b).abs().amax((1, 2)), (a + b).abs().amax((1, 2)))
    assert float((distance / scale).max()) < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", ["centered", "paper"])
@settings(max_examples=10, deadline=None)
@given(seed=seeds, scale=st.floats(0.01, 100))
def test_scaling_scales_and_mixing_channels_by_a_rotation_changes_nothing(
    shape: tuple[int, int, int], variant: Variant, seed: int, scale: float
) -> None:
    maps = feature_maps(seed, shape)
    plain = first_projection(maps, variant)
    assert_equal_up_to_sign(first_projection(scale * maps, variant), scale * plain)
    rotation = torch.linalg.qr(torch.randn(shape[0], shape[0], generator=torch.Generator().manual_seed(seed)))
    mixed = torch.einsum("dc,bchw->bdhw", rotation.Q, maps)
    assert_equal_up_to_sign(first_projection(mixed, variant), plain)
    assert_equal_up_to_sign(first_projection(maps.flip(1), variant), plain)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", ["centered", "paper"])
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_every_sign_rule_gives_the_same_component(
    shape: tuple[int, int, int], variant: Variant, seed: int
) -> None:
    maps = feature_maps(seed, shape)
    raw = first_projection(maps, variant, "raw")
    flip, corr = first_projection(maps, variant, "flip"), first_projection(maps, variant, "corr")
    assert_equal_up_to_sign(flip, raw)
    assert_equal_up_to_sign(corr, raw)
    assert bool((flip.amax((1, 2)) >= -flip.amin((1, 2))).all())
    for projection, activation in zip(corr, maps, strict=True):
        assert np.corrcoef(projection.flatten(), activation.mean(0).flatten())[0, 1] >= 0


@pytest.mark.parametrize("sign", ["flip", "corr"])
def test_a_decided_sign_does_not_depend_on_the_sign_of_the_solver(sign: Sign) -> None:
    maps = feature_maps(3, (12, 6, 5))
    mirrored = torch.cat([maps, torch.zeros_like(maps)], dim=1).roll(12, dims=1)
    torch.testing.assert_close(
        first_projection(mirrored, sign=sign), first_projection(maps, sign=sign), rtol=1e-3, atol=1e-3
    )


def test_a_pattern_on_one_channel_is_returned_without_its_mean() -> None:
    pattern = torch.rand(1, 5, 7, generator=torch.Generator().manual_seed(0))
    maps = torch.zeros(1, 6, 5, 7)
    maps[:, 4] = pattern
    assert_equal_up_to_sign(first_projection(maps), pattern - pattern.mean())
    assert_equal_up_to_sign(first_projection(maps, "paper"), pattern)


@settings(max_examples=10, deadline=None)
@given(seed=seeds, gap=st.floats(1e-5, 1), scale=st.floats(1e-12, 1e12))
def test_high_powers_find_the_vector_that_the_decomposition_does(seed: int, gap: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(3, 24, 24, generator=generator, dtype=torch.float64)).Q
    values = torch.rand(3, 24, generator=generator, dtype=torch.float64)
    values[:, 0], values[:, 1] = 1 + gap, 1
    gram = scale * (basis * values[:, None]) @ basis.mT
    expected, found = _top_by_eigh(gram), _top_by_squaring(gram)
    torch.testing.assert_close((expected * found).sum(1).abs(), torch.ones(3).double(), atol=1e-9, rtol=0)
    assert bool((_top_by_squaring(torch.zeros_like(gram)) == 0).all())


def test_per_channel_adds_up_row_sums_times_each_channels_own_direction() -> None:
    maps = feature_maps(5, (1, 4, 6))
    for projection, channel in zip(first_projection(maps, "per_channel"), maps[:, 0], strict=True):
        direction = np.linalg.svd(channel.numpy())[2][0]
        expected = torch.from_numpy(np.outer(channel.sum(1), direction))
        assert_equal_up_to_sign(projection[None], expected[None])


def test_nan_counts_as_zero_and_infinity_is_an_error() -> None:
    maps = feature_maps(0, (4, 3, 3))
    holed, zeroed = maps.clone(), maps.clone()
    holed[0, 1, 2, 2], zeroed[0, 1, 2, 2] = torch.nan, 0
    torch.testing.assert_close(first_projection(holed), first_projection(zeroed))
    holed[1, 0, 0, 0] = torch.inf
    with pytest.raises(DivergedError, match="infinite"):
        first_projection(holed)


def test_a_changed_head_changes_grad_cam_but_not_eigen_cam() -> None:
    torch.manual_seed(0)
    net = ShapesNet().eval()
    model = LoadedModel("toy", "cnn", net, detect(net))
    x, target = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    eigen, grad = EigenCAM().explain(model, x, target), GradCAM().explain(model, x, target)
    with torch.no_grad():
        net.fc.weight.copy_(net.fc.weight.roll(1, dims=0))
    assert torch.equal(EigenCAM().explain(model, x, target.flip(0)), eigen)
    assert not torch.allclose(GradCAM().explain(model, x, target), grad, atol=0.1)
