"""Layer masking against the authors' layers and a small residual network."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methodbench.testing.parity import Vectors
from methodbench_vision.layer_masking import Convolution, masked, neighbour_padding, plain

pytestmark = pytest.mark.vectors("vision", "layer_masking")

#: What the modes of the published layers mean; they are whole numbers.
MODES: dict[int, Convolution] = {1: "pad", 0: "zero", -1: "partial"}


def sign(mode: str) -> int:
    return (int(mode) > 0) - (int(mode) < 0)


@pytest.fixture
def x(vectors: Vectors) -> Tensor:
    return vectors.tensor("x")


@pytest.fixture
def mask(vectors: Vectors) -> Tensor:
    return vectors.tensor("mask")


def close(ours: Tensor, theirs: Tensor, tolerance: float, what: str) -> None:
    torch.testing.assert_close(plain(ours), theirs, rtol=tolerance, atol=tolerance, msg=what)


def test_neighbour_padding(vectors: Vectors, x: Tensor, mask: Tensor, tolerance: float) -> None:
    keys = [key for key in vectors if key.startswith("fmm.")]
    assert keys
    for key in keys:
        close(neighbour_padding(x, mask, int(key.partition(".")[2])), vectors.tensor(key), tolerance, key)


def test_masked_convolutions(vectors: Vectors, x: Tensor, mask: Tensor, tolerance: float) -> None:
    found = [match for key in vectors if (match := re.fullmatch(r"(conv.*)\.out\.(-?\d+)", key))]
    assert found
    for match in found:
        name, mode = match[1], match[2]
        weight = vectors.tensor(f"{name}.weight")
        bias = vectors.tensor(f"{name}.bias") if f"{name}.bias" in vectors else None
        theirs = vectors.tensor(match[0])
        stride = round(x.shape[2] / theirs.shape[2])
        ours = F.conv2d(
            masked(x, mask, convolution=MODES[sign(mode)]),
            weight,
            bias,
            stride=stride,
            padding=weight.shape[2] // 2,
        )
        close(ours, theirs, tolerance, match[0])
        close(ours.mask, vectors.tensor(f"{name}.mask.{mode}"), tolerance, match[0])  # type: ignore[attr-defined]


def test_masked_pooling(vectors: Vectors, x: Tensor, mask: Tensor, tolerance: float) -> None:
    stride = round(x.shape[2] / vectors["maxpool.out"].shape[2])
    pools = {
        "maxpool": nn.MaxPool2d(3, stride, 1),
        "avgpool": nn.AvgPool2d(stride, round(x.shape[2] / vectors["avgpool.out"].shape[2])),
    }
    for name, pool in pools.items():
        ours = pool(masked(x, mask))
        close(ours, vectors.tensor(f"{name}.out"), tolerance, name)
        close(ours.mask, vectors.tensor(f"{name}.mask"), tolerance, name)
    close(F.adaptive_avg_pool2d(masked(x, mask), 1), vectors.tensor("adaptive.out"), tolerance, "adaptive")


class Bottleneck(nn.Module):
    def __init__(self, weights: dict[str, Tensor], stride: int) -> None:
        super().__init__()
        for index in (1, 2, 3):
            out, into, kernel, _ = weights[f"conv{index}.weight"].shape
            conv = nn.Conv2d(into, out, kernel, stride if index == 2 else 1, kernel // 2, bias=False)
            setattr(self, f"conv{index}", conv)
            setattr(self, f"bn{index}", nn.BatchNorm2d(out))
        self.downsample = None
        if "downsample.0.weight" in weights:
            out, into = weights["downsample.0.weight"].shape[:2]
            self.downsample = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class Net(nn.Module):
    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        out, into, kernel, _ = weights["conv1.weight"].shape
        self.conv1 = nn.Conv2d(into, out, kernel, 2, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.pool = nn.MaxPool2d(3, 2, 1)
        for name, stride in (("b1", 1), ("b2", 2)):
            start = f"{name}."
            inside = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
            setattr(self, name, Bottleneck(inside, stride))
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(weights["fc.weight"].shape[1], weights["fc.weight"].shape[0])
        self.load_state_dict(weights, strict=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        return self.fc(self.gap(self.b2(self.b1(x))).flatten(1))


def test_a_residual_network_end_to_end(vectors: Vectors, x: Tensor, mask: Tensor, tolerance: float) -> None:
    start = "net.w."
    net = Net(
        {key.removeprefix(start): vectors.tensor(key) for key in vectors if key.startswith(start)}
    ).eval()
    with torch.no_grad():
        for key, ours in {
            "plain": net(x),
            "masked": net(masked(x, mask)),
            "fullmask": net(masked(x, torch.ones_like(mask))),
            "zeroed_input": net(x * mask),
            "partialconv": net(masked(x, mask, convolution="partial")),
        }.items():
            close(ours, vectors.tensor(f"net.logits_{key}"), tolerance, key)
