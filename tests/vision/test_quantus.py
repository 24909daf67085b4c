"""Scores of explanations against Quantus, where it is installed.

Localization, sparseness, the filling of ROAD and the randomization test are the same. ROAD and infidelity are defined
otherwise there; the tests say how, and that nothing else differs.

No extra asks for it, since it names a build of OpenCV whose files are those of the headless one that the vision extra
has; ``make`` installs it without.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.eigen_cam import EigenCAM
from methodbench_vision.grad_cam import GradCAM
from methodbench_vision.tasks.localization import pointing, relevance_mass, relevance_rank
from methodbench_vision.tasks.perturbation import (
    cascade,
    gini,
    imputed,
    infidelity,
    rank_correlation,
    removal_change,
)

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


class Fading(nn.Conv2d):
    """A convolution that is drawn anew to the same weights, whatever the seed."""

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.linspace(-1, 1, self.weight.numel()).sin().view_as(self.weight))
            if self.bias is not None:
                self.bias.fill_(0.1)


class Net(nn.Module):
    """A small classifier of pictures of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Fading(1, 4, 3, padding=1), Fading(4, 6, 3, padding=1)
        self.last = Fading(6, 3, 1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.second(self.first(x).relu()).relu()
        return self.last(maps.mean((2, 3), keepdim=True)).flatten(1)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_missing_pixels_are_filled_as_in_quantus(share: float) -> None:
    random = np.random.default_rng(0)
    image, missing = random.random((3, 12, 15)), random.random((12, 15)) < share
    theirs_ = quantus.noisy_linear_imputation(image, np.flatnonzero(missing), noise=0.0)
    np.testing.assert_allclose(imputed(image, missing), theirs_, atol=1e-10)


def test_road_of_quantus_is_ours_with_the_share_of_right_answers_for_the_probability(
    net: Net, x: Tensor, drawn: tuple[Tensor, Tensor]
) -> None:
    maps = drawn[0]
    with torch.no_grad():
        # Without a favourite class answers change easily.
        net.last.bias -= net(x).mean(0)
        target = net(x).argmax(1)

    def right(pictures: Tensor) -> Tensor:
        return (net(pictures).argmax(1) == target).double()

    shares = [25, 50, 75]
    metric = quantus.ROAD(percentages=shares, noise=0.0, disable_warnings=True)
    found = metric(
        model=net, x_batch=x.numpy(), y_batch=target.numpy(), a_batch=maps[:, None].numpy(), device="cpu"
    )
    random = np.random.default_rng(0)
    with torch.no_grad():
        kept = {p: removal_change(right, x, maps, 100 - p, 0.0, random) + right(x) for p in shares}
    assert {p: float(values.mean()) for p, values in kept.items()} == pytest.approx(found)
    # The check has teeth only where some answers change.
    assert min(found.values()) < 1


def test_infidelity_of_quantus_is_ours_before_the_map_is_scaled(
    net: Net, drawn: tuple[Tensor, Tensor]
) -> None:
    """Quantus removes block after block, and weighs what is removed by the picture, here 1 everywhere."""
    # So faint that map and score weigh alike, which a parabola through large numbers would not resolve.
    maps = drawn[0] / 1000
    x, target = torch.ones(6, 1, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])

    def score(pictures: Tensor) -> Tensor:
        return net(pictures).gather(1, target[:, None])[:, 0].double()

    def quantus_of(scale: float) -> np.ndarray:
        metric = quantus.Infidelity(
            perturb_patch_sizes=[4], n_perturb_samples=1, perturb_baseline=0.0, disable_warnings=True
        )
        found = metric(
            model=net,
            x_batch=x.numpy(),
            y_batch=target.numpy(),
            a_batch=(scale * maps)[:, None].numpy(),
            device="cpu",
        )
        return np.asarray(found)

    kept = torch.ones(16, 1, 4, 4)
    for block in range(16):
        kept[block:].view(16 - block, 16)[:, block] = 0
    with torch.no_grad():
        ours = infidelity(score, x, maps, kept).numpy()
    # In the scale it is a parabola, of which ours is the lowest point.
    scales = (0.2, 1.0, 3.0)
    values = np.stack([quantus_of(scale) for scale in scales])
    bend, slope, height = np.polyfit(scales, values, 2)
    np.testing.assert_allclose(ours, height - slope**2 / (4 * bend), rtol=1e-3, atol=1e-6)
    assert (ours < values[1]).all()


@pytest.mark.parametrize("method", [GradCAM(layer="second"), EigenCAM(layer="second", sign="corr")])
def test_randomization_is_that_of_quantus(net: Net, x: Tensor, method: Any) -> None:
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    loaded = LoadedModel("net", "cnn", net, Adapter(kind="cnn"))
    before = method.explain(loaded, x, target)

    def explain(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, **_: object) -> np.ndarray:
        one = LoadedModel("net", "cnn", model, Adapter(kind="cnn"))
        maps = method.explain(one, torch.as_tensor(inputs), torch.as_tensor(targets))
        return np.asarray(maps[:, None])

    metric = quantus.MPRT(layer_order="top_down", abs=False, normalise=False, disable_warnings=True)
    found = metric(
        model=net,
        x_batch=x.numpy(),
        y_batch=target.numpy(),
        a_batch=before[:, None].numpy(),
        explain_func=explain,
        device="cpu",
    )
    ours = [rank_correlation(before, method.explain(one, x, target)) for one in cascade(loaded, 0)]
    assert list(found)[1:] == ["last", "second", "first"]
    for layer, values in zip(("last", "second", "first"), ours, strict=True):
        # A constant map has no ranks: NaN there, 0 here.
        np.testing.assert_allclose(values, np.nan_to_num(found[layer]), atol=1e-9, err_msg=layer)
    assert np.isfinite(found["last"]).any()
