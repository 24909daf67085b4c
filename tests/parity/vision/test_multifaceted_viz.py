"""The loop of Multifaceted Feature Visualization against a reference of the published one."""

from __future__ import annotations

import re

import numpy as np
import pytest

from methodbench.testing.parity import Vectors, stated_by
from methodbench_vision.multifaceted_viz import (
    CENTRE_SCHEDULE,
    MEAN_SCHEDULE,
    ascended,
    crop_offset,
    denoised,
    step_and_weight,
)

pytestmark = pytest.mark.vectors("vision", "multifaceted_viz")


def test_steps_and_weights_of_all_octaves(vectors: Vectors) -> None:
    for name, schedule in (("center", CENTRE_SCHEDULE), ("mean", MEAN_SCHEDULE)):
        pairs = [step_and_weight(octave, i) for octave in schedule for i in range(octave.iterations)]
        steps, weights = zip(*pairs, strict=True)
        atol = stated_by(vectors.meta["tolerance"], r"([\d.e-]+) for steps")
        np.testing.assert_allclose(steps, vectors[f"{name}.step"], rtol=0, atol=atol)
        np.testing.assert_allclose(weights, vectors[f"{name}.tv"], rtol=0, atol=atol)


def test_crop_offsets_of_a_seeded_generator(vectors: Vectors) -> None:
    notes = str(vectors.meta["notes"])
    canvas, side = (int(re.search(rf"{what} (\d+)", notes)[1]) for what in ("image", "input"))  # type: ignore[index]
    window = float(re.search(r"window (\.\d+)", notes)[1])  # type: ignore[index]
    random = np.random.RandomState(vectors.meta["seed"])
    ours = [
        [crop_offset(random, canvas, side, window), crop_offset(random, canvas, side, window)]
        for _ in vectors["offsets"]
    ]
    assert np.array_equal(ours, vectors["offsets"])


def test_three_steps_with_given_gradients(vectors: Vectors) -> None:
    mean = np.array([104.0, 117.0, 123.0])[:, None, None]  # BGR, as the published loop has it
    x = vectors["x0"]
    for index, (weight, step, margin) in enumerate(vectors["step_params"]):
        moved = ascended(x, vectors[f"g{index}"], step, int(margin), (-mean, 255 - mean))
        x = denoised((moved + mean)[::-1], weight)[::-1] - mean
        atol = stated_by(vectors.meta["tolerance"], r"([\d.e-]+) after TV")
        np.testing.assert_allclose(x, vectors[f"x{index + 1}"], rtol=0, atol=atol)
