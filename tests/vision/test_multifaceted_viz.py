"""Facets of a class and the ascent from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.model import Calibration, LoadedModel, Preprocess
from methodbench_vision.multifaceted_viz import (
    MEAN_SCHEDULE,
    MultifacetedViz,
    Octave,
    ascended,
    crop_offset,
    denoised,
    facets,
    mean_images,
    scaled_schedule,
    step_and_weight,
    to_pixels,
    total_variation,
)


class Colours(nn.Module):
    """Class 1 fires for red or for green, class 0 for blue."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        nn.init.zeros_(self.conv.bias)
        self.conv.weight.data = torch.eye(3)[:, :, None, None] * 3 - 1
        self.fc = nn.Linear(3, 2)
        nn.init.zeros_(self.fc.bias)
        self.fc.weight.data = torch.tensor([[0.0, 0, 4], [4.0, 4, 0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


def model() -> LoadedModel:
    preprocess = Preprocess((16, 16), (0.0,) * 3, (1.0,) * 3)
    adapter = Adapter(kind="cnn", stages=("conv",), head_name="fc")
    return LoadedModel("colours", "cnn", Colours().eval(), adapter, preprocess=preprocess)


def images(count: int = 40) -> tuple[Tensor, np.ndarray]:
    """Red and green pictures in turn, with noise, and which are red."""
    generator = torch.Generator().manual_seed(0)
    x = 0.1 * torch.rand(count, 3, 16, 16, generator=generator)
    x[::2, 0] += 0.7
    x[1::2, 1] += 0.7
    return x, np.arange(count) % 2 == 0


def test_two_looks_of_a_class_fall_into_two_facets() -> None:
    x, red = images()
    features = Colours().conv(x).relu().mean((2, 3)).detach().double().numpy()
    clusters = facets(features, 2, seed=0)
    assert len(set(clusters[red])) == 1
    assert len(set(clusters[~red])) == 1
    assert set(clusters) == {0, 1}


def test_means_are_of_the_images_nearest_to_each_centroid() -> None:
    pixels = np.arange(5.0)[:, None, None, None] * np.ones((5, 3, 2, 2))
    features = np.array([[0.0], [1.0], [5.0], [10.0], [11.0]])
    means = mean_images(pixels, features, np.array([0, 0, 0, 1, 1]), nearest=2)
    # The first centroid is 2, to which 1 and 0 are nearest.
    assert means[:, 0, 0, 0].tolist() == [0.5, 3.5]


def test_a_step_has_the_asked_mean_size_and_keeps_to_margin_and_range() -> None:
    random = np.random.default_rng(0)
    x, gradient = random.uniform(50, 200, (3, 10, 10)), random.normal(size=(3, 10, 10))
    moved = ascended(x, gradient, 2.0, 0, (0.0, 255.0))
    assert np.abs(moved - x).mean() == pytest.approx(2.0)
    inside = ascended(x, gradient, 2.0, 3, (0.0, 255.0))
    assert np.array_equal(inside[:, :3], x[:, :3])
    assert np.array_equal(inside[:, :, -3:], x[:, :, -3:])
    assert not np.array_equal(inside[:, 3:7, 3:7], x[:, 3:7, 3:7])
    far = ascended(x, gradient, 1e6, 0, (0.0, 255.0))
    assert far.min() >= 0
    assert far.max() <= 255
    assert np.array_equal(ascended(x, np.zeros_like(x), 2.0, 0, (0.0, 255.0)), x)


def test_small_weights_smooth_more() -> None:
    x = np.random.default_rng(0).uniform(0, 255, (3, 16, 16))
    smooth, rough = denoised(x, 0.001), denoised(x, 100.0)
    assert total_variation(smooth) < 0.2 * total_variation(x)
    np.testing.assert_allclose(rough[:, 1:-1, 1:-1], x[:, 1:-1, 1:-1], atol=1.0)


def test_schedules_run_from_start_to_end_and_shrink_with_effort() -> None:
    octave = Octave(100, 1.0, 0.3, 0, (0.5, 2.0), (4.0, 1.0))
    assert step_and_weight(octave, 0) == (4.0, pytest.approx(0.495))
    assert step_and_weight(octave, 99)[0] == pytest.approx(1.03)
    assert [o.iterations for o in scaled_schedule(MEAN_SCHEDULE, 0.1)] == [19, 15, 2, 2]
    assert crop_offset(np.random.RandomState(0), 16, 16, 0.3) == 0


def test_facets_from_mean_images_excite_the_class_and_keep_their_colours() -> None:
    x, _ = images()
    probe = MultifacetedViz(facets=2, effort=0.1)
    found = probe.measure(model(), Calibration(x), Context())
    assert found["activation"] > found["start-activation"]
    assert found["confidence"] > 0.8
    noise = MultifacetedViz(facets=2, effort=0.1, start="noise").measure(model(), Calibration(x), Context())
    assert found["colour-spread"] > noise["colour-spread"]
    assert sorted(np.asarray(found["facet-sizes"]).tolist()) == [20, 20]


def test_a_class_that_no_image_is_taken_for_is_refused_and_pixels_are_what_was_normalized() -> None:
    x, _ = images()
    with pytest.raises(NotApplicableError, match="none of the 40 images"):
        MultifacetedViz(unit=0).measure(model(), Calibration(x), Context())
    preprocess = Preprocess((16, 16), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    normalized = (x - torch.tensor(preprocess.mean)[:, None, None]) / torch.tensor(preprocess.std)[
        :, None, None
    ]
    np.testing.assert_allclose(
        to_pixels(normalized.double(), preprocess), 255 * x.double().numpy(), atol=1e-3
    )
