"""What the vectors of row-wise pruners share: a toy model of blocks, and masks packed into bits."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methodbench.testing.parity import Vectors
from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.model import LoadedModel


class ToyBlock(nn.Module):
    """The block that ``meta["toy"]`` describes: x1 = x + Wq x; y = x1 + W2 silu(W1 x1)."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q(x)
        return x + self.fc2(nn.functional.silu(self.fc1(x)))


class ToyModel(nn.Module):
    def __init__(self, blocks: list[ToyBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def toy(vectors: Vectors) -> LoadedModel:
    blocks: dict[int, dict[str, Tensor]] = {}
    for key in vectors:
        if match := re.fullmatch(r"block(\d+)_(\w+)_W", key):
            blocks.setdefault(int(match[1]), {})[match[2]] = vectors.tensor(key)
    module = ToyModel([ToyBlock(blocks[index]) for index in sorted(blocks)]).eval()
    return LoadedModel("toy", "causal-lm", module, Adapter(kind="causal-lm", stack="blocks"))


class Masks:
    """Masks of the vectors, and how ours are held against them."""

    @staticmethod
    def of(vectors: Vectors, key: str, shape: torch.Size) -> Tensor:
        bits = np.unpackbits(vectors[key], count=shape.numel())
        return torch.from_numpy(bits.astype(bool)).view(shape)

    @staticmethod
    def assert_equal_up_to_ties(
        got: Tensor, expected: Tensor, scores: Tensor, slack: int, tie: float, where: str
    ) -> None:
        """Masks that differ may do so only among scores that are equal to rounding, as many each way.

        ``slack`` more zeros in one of them are allowed where a rounded sum, not a count, decides how many go.
        """
        rows = (got != expected).any(dim=1).nonzero().flatten().tolist()
        for row in rows:
            assert abs(int(got[row].sum()) - int(expected[row].sum())) <= slack, (
                f"{where}: zeros of row {row}"
            )
            differing = scores[row][got[row] != expected[row]]
            assert differing.max() - differing.min() <= tie * differing.max(), f"{where}: scores of row {row}"


@pytest.fixture
def masks() -> Masks:
    return Masks()
