"""CRAFT against the authors' code."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methodbench.testing.parity import Vectors, stated_by
from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.craft import CRAFT, ConceptBank, crops, design_masks, total_indices

pytestmark = pytest.mark.vectors("vision", "craft")


class Net(nn.Module):
    """g: two strided convolutions with ReLU; h: global mean, Linear, tanh, Linear."""

    def __init__(self, vectors: Vectors) -> None:
        super().__init__()
        a, b = (vectors.tensor(f"g.{name}.weight") for name in "ab")
        f, o = (vectors.tensor(f"h.{name}.weight") for name in "fo")
        self.g = nn.Sequential(
            nn.Conv2d(a.shape[1], a.shape[0], a.shape[2], 2, a.shape[2] // 2),
            nn.ReLU(),
            nn.Conv2d(b.shape[1], b.shape[0], b.shape[2], 2, b.shape[2] // 2),
            nn.ReLU(),
        )
        self.h = nn.Sequential(nn.Linear(f.shape[1], f.shape[0]), nn.Tanh(), nn.Linear(*o.shape[::-1]))
        state = {"g.0": "g.a", "g.2": "g.b", "h.0": "h.f", "h.2": "h.o"}
        self.load_state_dict(
            {
                f"{ours}.{part}": vectors.tensor(f"{theirs}.{part}")
                for ours, theirs in state.items()
                for part in ("weight", "bias")
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.g(x).mean((2, 3)))


@pytest.fixture
def model(vectors: Vectors) -> LoadedModel:
    return LoadedModel("craft-net", "cnn", Net(vectors).eval(), Adapter(kind="cnn", stages=("g",)))


@pytest.fixture
def x(vectors: Vectors) -> Tensor:
    return vectors.tensor("X", torch.float32)


@pytest.fixture
def method(vectors: Vectors) -> CRAFT:
    meta = vectors.meta
    return CRAFT(
        concepts=meta["r"], designs=meta["nb_design"], patch_size=meta["patch"], seed=meta["seed"], layer="g"
    )


def limit(vectors: Vectors, what: str) -> float:
    """A number out of the sentence in which the vectors state their tolerances."""
    return stated_by(vectors.meta["tolerance"], rf"{what} ([\d.e-]+)")


def test_designs_of_both_kinds(vectors: Vectors) -> None:
    for key in ("halton.masks",):
        theirs = vectors.tensor(key)
        concepts = theirs.shape[1]
        ours = design_masks(concepts, len(theirs) // (concepts + 2))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=limit(vectors, "estimators"))


def test_total_indices_are_jansens(vectors: Vectors) -> None:
    theirs = vectors.tensor("est.jansen", torch.float64)
    outputs = vectors.tensor("est.outputs")
    ours = total_indices(outputs, len(outputs) // (len(theirs) + 2))
    close = limit(vectors, "estimators")
    torch.testing.assert_close(ours, theirs, rtol=close, atol=close)


def test_crops_come_image_by_image_and_row_by_row(vectors: Vectors, x: Tensor) -> None:
    part = crops(x, vectors.meta["patch"])
    assert len(part) == int(vectors["n_crops"])
    assert torch.equal(part[0], vectors.tensor("crop_first"))
    for name in [name for name in vectors if name.startswith("crop_index")]:
        assert torch.equal(part[int(name.removeprefix("crop_index"))], vectors.tensor(name))


def test_concepts_equal_the_reference_after_matching(
    vectors: Vectors, model: LoadedModel, x: Tensor, method: CRAFT
) -> None:
    bank = method.fit(model, crops(x, method.patch_size), method.layer, (x.shape[2], x.shape[3]))
    ours, theirs = bank.components, vectors.tensor("W")
    rank = len(theirs)
    best = min(
        itertools.permutations(range(rank)),
        key=lambda order: float((ours[list(order)] - theirs).abs().max()),
    )
    close = limit(vectors, "U,W")
    torch.testing.assert_close(ours[list(best)], theirs, rtol=close, atol=close)
    torch.testing.assert_close(bank.coefficients[:, list(best)], vectors.tensor("U"), rtol=close, atol=close)


def test_coefficients_importance_and_percentiles_with_the_references_concepts(
    vectors: Vectors, model: LoadedModel, x: Tensor, method: CRAFT
) -> None:
    bank = ConceptBank(method.layer, vectors.tensor("W"), vectors.tensor("U"))
    theirs = vectors.tensor("transform3")
    coefficients = method.transform(model, x[: len(theirs)], bank)
    close = limit(vectors, "U,W")
    torch.testing.assert_close(coefficients, theirs, rtol=close, atol=close)
    # The reference averages over the first images; how many, the file does not say.
    importance = vectors.tensor("importance", torch.float64)
    distances = []
    for count in range(1, len(x) + 1):
        inside = method.transform(model, x[:count], bank)
        ours = method.importance(model, x[:1], bank, inside, vectors.meta["class_id"])
        distances.append(float((ours - importance).abs().max()))
    assert min(distances) <= limit(vectors, "importance"), distances
    percentiles = np.percentile(theirs.flatten(0, 2).numpy(), method.percentile, axis=0)
    np.testing.assert_allclose(percentiles, vectors["map_percentiles"], rtol=close, atol=close)
