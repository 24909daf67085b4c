"""The small networks of the vector files, rebuilt from their weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
from torch import Tensor, nn
from torch.nn import functional as F

from methodbench.testing.parity import Vectors
from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.model import LoadedModel

NetOf = Callable[[Vectors, str], LoadedModel]


class SmallNet(nn.Module):
    """Three convolutions, the first two with stride 2; a mean or a grid of means; one Linear."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.c1 = _convolution(weights["c1.weight"], stride=2)
        self.c2 = _convolution(weights["c2.weight"], stride=2)
        self.c3 = _convolution(weights["c3.weight"], stride=1)
        self.act = nn.ReLU()
        classes, width = weights["fc.weight"].shape
        self.grid = math.isqrt(width // weights["c3.weight"].shape[0])
        self.fc = nn.Linear(width, classes)
        self.load_state_dict(weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.c3(F.relu(self.c2(F.relu(self.c1(x))))))
        return self.fc(F.adaptive_avg_pool2d(x, self.grid).flatten(1))


def _convolution(weight: Tensor, stride: int) -> nn.Conv2d:
    out, into, size, _ = weight.shape
    return nn.Conv2d(into, out, size, stride=stride, padding=size // 2)


@pytest.fixture
def net_of() -> NetOf:
    """Builds the network whose weights a vector file keeps under ``<prefix>.w.``."""

    def build(vectors: Vectors, prefix: str) -> LoadedModel:
        start = f"{prefix}.w."
        weights = {key.removeprefix(start): vectors.tensor(key) for key in vectors if key.startswith(start)}
        return LoadedModel("small-net", "cnn", SmallNet(weights).eval(), Adapter(kind="cnn", stages=("c3",)))

    return build


@pytest.fixture
def nets(vectors: Vectors) -> list[str]:
    """Prefixes of the networks in the vector file."""
    found = sorted(key.removesuffix(".w.fc.weight") for key in vectors if key.endswith(".w.fc.weight"))
    assert found
    return found


@pytest.fixture
def tolerance(vectors: Vectors) -> float:
    """The first number of the tolerance that the vector file states."""
    number = re.search(r"\d+(\.\d+)?(e-?\d+)?", str(vectors.meta["tolerance"]))
    assert number is not None
    return float(number[0])


@pytest.fixture
def net(vectors: Vectors) -> nn.Module:
    """Two strided convolutions with ReLU, a grid of means, one Linear."""
    weights = {key.removeprefix("net."): vectors.tensor(key) for key in vectors if key.startswith("net.")}
    channels, classes = weights["2.weight"].shape[0], weights["6.weight"].shape[0]
    side = round((weights["6.weight"].shape[1] / channels) ** 0.5)
    module = nn.Sequential(
        nn.Conv2d(weights["0.weight"].shape[1], weights["0.weight"].shape[0], 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(weights["2.weight"].shape[1], channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(side),
        nn.Flatten(),
        nn.Linear(channels * side * side, classes),
    )
    module.load_state_dict(weights)
    return module.eval()
