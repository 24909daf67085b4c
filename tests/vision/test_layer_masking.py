"""Laws of activations that carry a mask."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.torchkit.adapters import Adapter, detect
from methodbench.torchkit.model import LoadedModel, Preprocess
from methodbench_vision.layer_masking import (
    LayerMasking,
    Masking,
    lime,
    masked,
    masked_logits,
    neighbour_padding,
    plain,
)
from methodbench_vision.models.cifar10 import CifarResNet
from methodbench_vision.models.shapes_cnn import PREPROCESS, ShapesNet
from methodbench_vision.tasks.images import normalize, procedural_images

ALL: tuple[Masking, ...] = ("layer", "partial", "black", "grey")


def loaded(module: nn.Module) -> LoadedModel:
    return LoadedModel(
        "toy", "cnn", module.eval(), detect(module), preprocess=Preprocess((32, 32), (0.5,) * 3, (0.25,) * 3)
    )


@pytest.fixture(params=["plain", "option-A residual", "efficientnet", "resnet"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    torch.manual_seed(0)
    builders = {
        "plain": ShapesNet,
        "option-A residual": lambda: CifarResNet(1),
        "efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=4),
        "resnet": lambda: timm.create_model("test_resnet", num_classes=4),
    }
    return loaded(builders[request.param]())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def hole(size: int = 32) -> Tensor:
    mask = torch.ones(2, 1, size, size)
    mask[:, :, 4:16, 8:20] = 0
    return mask


# Partial convolutions also make up for the zeros beyond the border, so they change the whole picture.
@pytest.mark.parametrize("masking", ["layer", "black", "grey"])
def test_with_everything_visible_the_network_is_as_it_was(
    model: LoadedModel, x: Tensor, masking: Masking
) -> None:
    with torch.no_grad():
        expected = model.module(x)
    ours = masked_logits(model, x, torch.ones(2, 1, 32, 32), masking)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masking", ["layer", "partial"])
def test_what_is_hidden_never_matters(model: LoadedModel, x: Tensor, masking: Masking) -> None:
    mask = hole()
    other = torch.where(mask > 0, x, 100 * torch.randn_like(x))
    torch.testing.assert_close(
        masked_logits(model, other, mask, masking), masked_logits(model, x, mask, masking)
    )


def test_a_picture_that_is_hidden_altogether_gives_finite_logits(model: LoadedModel, x: Tensor) -> None:
    assert bool(masked_logits(model, x, torch.zeros(2, 1, 32, 32)).isfinite().all())


def test_padding_leaves_known_pixels_and_continues_constants() -> None:
    mask = hole()
    x = torch.randn(2, 3, 32, 32)
    padded = neighbour_padding(x, mask, 3)
    known = mask.expand_as(x) > 0
    assert torch.equal(padded[known], x[known])
    constant = neighbour_padding(torch.full((2, 3, 32, 32), 2.5), mask, 6)
    torch.testing.assert_close(constant, torch.full_like(constant, 2.5), rtol=1e-4, atol=0)
    ring = neighbour_padding(torch.ones(2, 1, 32, 32), mask, 1)
    assert float(ring[0, 0, 4, 10]) == pytest.approx(1, abs=1e-4)
    assert float(ring[0, 0, 8, 12]) == 0


@pytest.mark.parametrize("options", [{"stride": 2, "padding": 1}, {"padding": 2, "dilation": 2}, {}])
def test_masks_stay_binary_and_hidden_activations_zero(options: dict[str, int]) -> None:
    out = F.conv2d(
        masked(torch.randn(2, 3, 32, 32), hole()), torch.randn(5, 3, 3, 3), torch.randn(5), **options
    )
    assert set(out.mask.unique().tolist()) <= {0.0, 1.0}  # type: ignore[attr-defined]
    assert out.mask.shape[2:] == out.shape[2:]  # type: ignore[attr-defined]
    assert bool((plain(out) * (1 - out.mask) == 0).all())  # type: ignore[attr-defined]


def test_a_function_without_a_rule_is_named() -> None:
    with pytest.raises(NotApplicableError, match="no rule for softmax"):
        masked(torch.randn(2, 3, 8, 8), torch.ones(2, 1, 8, 8)).softmax(1)
    with pytest.raises(NotApplicableError, match="means over height and width"):
        masked(torch.randn(2, 3, 8, 8), torch.ones(2, 1, 8, 8)).mean(1)


def test_black_needs_to_know_what_black_is(x: Tensor) -> None:
    net = ShapesNet()
    with pytest.raises(NotApplicableError, match="which input is black"):
        masked_logits(LoadedModel("toy", "cnn", net.eval(), detect(net)), x, hole(), "black")


def test_lime_finds_the_coefficients_of_a_linear_score() -> None:
    generator = torch.Generator().manual_seed(0)
    kept = (torch.rand(4000, 9, generator=generator, dtype=torch.float64) < 0.5).double()
    truth = torch.linspace(-1, 1, 9, dtype=torch.float64)
    found = lime(kept, 3 + kept @ truth)
    torch.testing.assert_close(found, truth, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("masking", ALL)
def test_lime_points_at_the_cells_that_the_network_reads(masking: Masking) -> None:
    class Corner(nn.Module):
        """Class 1 is as likely as the upper left quarter is bright."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 1, 1, bias=False)
            nn.init.constant_(self.conv.weight, 1 / 3)

        def forward(self, x: Tensor) -> Tensor:
            quarter = self.conv(x)[:, :, :8, :8]
            score = 4 * F.adaptive_avg_pool2d(quarter, 1).flatten(1)
            return torch.cat([torch.zeros_like(score), score], 1)

    net = Corner().eval()
    preprocess = Preprocess((16, 16), (0.5,) * 3, (0.25,) * 3)
    model = LoadedModel("corner", "cnn", net, Adapter(kind="cnn", stages=("conv",)), preprocess=preprocess)
    picture = torch.ones(1, 3, 16, 16)
    picture[:, :, :4, :4] = 8
    maps = LayerMasking(masking=masking, cells=4, samples=400).explain(model, picture, torch.tensor([1]))
    assert maps.shape == (1, 16, 16)
    assert float(maps[0, :4, :4].min()) == pytest.approx(1, abs=1e-4)
    assert float(maps[0, 8:].max()) < 0.3


@pytest.mark.slow
def test_hidden_backgrounds_change_fewer_answers_than_black_ones(shapes_model: LoadedModel) -> None:
    """Hiding patches without an object in every layer leaves the answer, painting them black does not.

    The grey of the network's mean is close to these backgrounds and leaves the answer too.
    """
    data = procedural_images(0, 200, split="test")
    x = normalize(data.images, PREPROCESS)
    whole = shapes_model.module(x).argmax(1)
    free = F.max_pool2d(data.objects[:, None].float(), 16)[:, 0].flatten(1) == 0
    order = torch.rand(free.shape, generator=torch.Generator().manual_seed(0)).masked_fill(~free, 2.0)
    for share in (0.25, 0.5, 0.75, 1.0):
        hidden = order.argsort(1).argsort(1) < (free.sum(1, keepdim=True) * share).round()
        mask = F.interpolate((~hidden).view(-1, 1, 4, 4).float(), size=64)
        layer, black, grey = (
            float((masked_logits(shapes_model, x, mask, masking).argmax(1) == whole).double().mean())
            for masking in ("layer", "black", "grey")
        )
        assert layer >= max(0.98, grey)
        assert layer > black + 0.1
