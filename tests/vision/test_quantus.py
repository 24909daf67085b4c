"""Localization scores and sparseness against Quantus, where it is installed.

It is no requirement of the tests: it brings a build of OpenCV whose files are those of the headless one that the vision
extra asks for.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from methodbench_vision.tasks.localization import pointing, relevance_mass, relevance_rank
from methodbench_vision.tasks.perturbation import gini

quantus = pytest.importorskip("quantus")


class Fixed(torch.nn.Module):
    """A model that Quantus wants and does not ask."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), 2)


@pytest.fixture
def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(6, 16, 16, generator=generator, dtype=torch.float64)
    masks = torch.zeros(6, 16, 16, dtype=torch.bool)
    for index in range(6):
        masks[index, 2 + index : 9, 3 : 6 + index] = True
    return maps, masks


def theirs(name: str, maps: torch.Tensor, masks: torch.Tensor, **options: object) -> np.ndarray:
    metric = getattr(quantus, name)(disable_warnings=True, abs=False, normalise=True, **options)
    found = metric(
        model=Fixed(),
        x_batch=np.zeros((len(maps), 1, 16, 16)),
        y_batch=np.zeros(len(maps), dtype=int),
        a_batch=maps[:, None].numpy(),
        s_batch=masks[:, None].numpy(),
        channel_first=True,
    )
    return np.asarray(found, dtype=np.float64)


@pytest.mark.parametrize(
    ("score", "name"),
    [
        (pointing, "PointingGame"),
        (relevance_mass, "RelevanceMassAccuracy"),
        (relevance_rank, "RelevanceRankAccuracy"),
    ],
)
def test_localization_scores_are_those_of_quantus(
    score: object, name: str, drawn: tuple[torch.Tensor, torch.Tensor]
) -> None:
    maps, masks = drawn
    np.testing.assert_allclose(score(maps, masks).numpy(), theirs(name, maps, masks), atol=1e-6)


def test_sparseness_is_that_of_quantus(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    maps, masks = drawn
    np.testing.assert_allclose(gini(maps).numpy(), theirs("Sparseness", maps, masks), atol=1e-5)
