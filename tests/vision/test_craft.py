"""Designs, indices and concepts of CRAFT."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.torchkit.adapters import Adapter, detect
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.craft import CRAFT, concept_maps, crops, design_masks, strongest_crops, total_indices
from methodbench_vision.models.shapes_cnn import ShapesNet

POINTS = 512


def indices(score: object, concepts: int) -> Tensor:
    masks = design_masks(concepts, POINTS, "sobol").double()
    return total_indices(score(masks), POINTS)  # type: ignore[operator]


def test_indices_of_an_additive_score_are_its_shares_of_variance_and_sum_to_one() -> None:
    weights = torch.tensor([3.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    found = indices(lambda masks: masks @ weights, 4)
    torch.testing.assert_close(found, weights**2 / weights.square().sum(), rtol=0.02, atol=0.01)
    assert float(found[1]) == 0
    order = [2, 0, 3, 1]
    permuted = indices(lambda masks: masks @ weights[order], 4)
    torch.testing.assert_close(permuted, found[order], rtol=0.05, atol=0.02)


def test_indices_of_a_product_exceed_one_in_sum_and_of_a_constant_are_zero() -> None:
    product = indices(lambda masks: masks[:, 0] * masks[:, 1], 3)
    assert float(product.sum()) > 1.1
    assert float(product[2]) == 0
    assert torch.equal(indices(lambda masks: torch.full((len(masks),), 2.0), 3), torch.zeros(3).double())
    assert float(indices(lambda masks: masks[:, 0], 1)) == pytest.approx(1, abs=0.02)


def test_crops_cover_the_picture_in_steps_of_four_fifths() -> None:
    x = torch.arange(2 * 3 * 20 * 20.0).view(2, 3, 20, 20)
    part = crops(x, 10)
    assert part.shape == (8, 3, 10, 10)
    assert torch.equal(part[1], x[0, :, :10, 8:18])
    assert torch.equal(part[6], x[1, :, 8:18, :10])
    assert torch.equal(crops(x, 64), x)


def test_maps_keep_what_lies_above_the_percentile() -> None:
    coefficients = torch.arange(100.0).view(1, 10, 10, 1)
    maps = concept_maps(coefficients, 90.0, (10, 10))
    assert torch.equal(maps[0, 0] > 0, (coefficients[0, :, :, 0] > 89.5))
    assert strongest_crops(torch.arange(50.0)).tolist() == [49, 48, 47, 46, 45]


class Parts(nn.Module):
    """Three colours are found by three channels; class 1 needs red and ignores blue."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
        self.fc = nn.Linear(3, 2)
        for layer in (self.early[0], self.late[0]):
            nn.init.zeros_(layer.bias)
            layer.weight.data = torch.eye(3)[:, :, None, None].clone()
        self.fc.weight.data = torch.tensor([[0.0, 0, 0], [5.0, 1.0, 0.0]])
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.late(self.early(x)).mean((2, 3)))


def planted() -> tuple[LoadedModel, Tensor, Tensor]:
    """Pictures with a red, a green and a blue patch at random places, and the mask of the red one."""
    generator = torch.Generator().manual_seed(0)
    x, red = torch.zeros(12, 3, 32, 32), torch.zeros(12, 32, 32, dtype=torch.bool)
    for image in range(len(x)):
        cells = torch.randperm(16, generator=generator)[:3]
        for colour, cell in enumerate(cells.tolist()):
            rows, columns = (slice(8 * k, 8 * k + 8) for k in divmod(cell, 4))
            x[image, colour, rows, columns] = 1
            if colour == 0:
                red[image, rows, columns] = True
    model = LoadedModel("parts", "cnn", Parts().eval(), Adapter(kind="cnn", stages=("early", "late")))
    return model, x, red


@pytest.mark.parametrize("recursive", [False, True])
def test_planted_concepts_are_found_ranked_and_located(recursive: bool) -> None:
    model, x, red = planted()
    method = CRAFT(
        concepts=3, patch_size=8, designs=64, design="sobol", layer="late", recursive=recursive, percentile=50
    )
    bank = method.fit(model, crops(x, 8), "late", (32, 32))
    colours = bank.components.argmax(1)
    assert sorted(colours.tolist()) == [0, 1, 2]
    importance = method.importance(model, x[:1], bank, method.transform(model, x, bank), label=1)
    ranked = importance[colours.argsort()]
    assert ranked[0] > 10 * ranked[1] > 10 * ranked[2]
    maps = method.explain(model, x, torch.ones(12, dtype=torch.int64))
    inside = torch.stack([one[mask].mean() for one, mask in zip(maps, red, strict=True)])
    outside = torch.stack([one[~mask].mean() for one, mask in zip(maps, red, strict=True)])
    assert bool((inside > 5 * outside).all())


def test_classes_are_explained_apart_and_negative_activations_refused() -> None:
    model, x, _ = planted()
    method = CRAFT(concepts=3, patch_size=8, designs=8, layer="late")
    target = torch.tensor([0, 1] * 6)
    both = method.explain(model, x, target)
    torch.testing.assert_close(both[1::2], method.explain(model, x[1::2], target[1::2]))
    torch.manual_seed(0)
    net = ShapesNet().eval()
    with pytest.raises(NotApplicableError, match="negative activations"):
        CRAFT(layer="features.3.1").explain(LoadedModel("toy", "cnn", net, detect(net)), x, target)
    with pytest.raises(NotApplicableError, match="no stage before"):
        CRAFT(layer="early", recursive=True, concepts=3, patch_size=8, designs=8).explain(model, x, target)
