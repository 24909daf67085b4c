"""Wanda against the authors' code: a sequential run over toy blocks, through the method itself."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.testing.parity import Vectors, stated_by
from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.sequential import walk
from methodbench_sparse.masks import weight_matrix
from methodbench_sparse.wanda import InputScale, Wanda, wanda_score

pytestmark = pytest.mark.vectors("sparse", "wanda")


def rtol(vectors: Vectors) -> float:
    """How closely the scales of the inputs agree; scores this close together are ties, which may break either way."""
    return stated_by(vectors.meta["tolerance"], r"scaler rtol ([\d.e-]+)")


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


def method(hyper: dict[str, Any]) -> Wanda:
    pattern = f"{hyper['n']}:{hyper['m']}" if hyper["n"] else "unstructured"
    return Wanda(sparsity=hyper["sparsity"], pattern=pattern, use_variant=hyper["use_variant"])


def runs(vectors: Vectors) -> dict[str, Wanda]:
    return {run: method(hyper) for run, hyper in vectors.meta["hyper"].items()}


def zero_mask(vectors: Vectors, key: str, shape: torch.Size) -> Tensor:
    bits = np.unpackbits(vectors[key], count=shape.numel())
    return torch.from_numpy(bits.astype(bool)).view(shape)


def test_pruned_weights_equal_the_reference_in_every_run(vectors: Vectors, toy: LoadedModel) -> None:
    data = Calibration(vectors.tensor("calib"))
    for run, wanda in runs(vectors).items():
        pruned = wanda.compress(toy, data, Context())
        originals = toy.adapter.targets(toy.module)
        layers = pruned.adapter.targets(pruned.module)
        assert len(layers) == sum(key.endswith("_W") for key in vectors)
        for name, layer in layers.items():
            _, block, linear = name.split(".")
            dense = weight_matrix(originals[name])
            expected = zero_mask(vectors, f"{run}_block{block}_{linear}", dense.shape)
            got = weight_matrix(layer) == 0
            assert torch.equal(weight_matrix(layer), dense.masked_fill(got, 0)), f"{run} {name}"
            scaler = vectors.tensor(f"{run}_scaler_block{block}_{linear}")
            slack = int(wanda.use_variant)
            where = f"{run} {name}"
            assert_equal_up_to_ties(got, expected, wanda_score(dense, scaler), slack, rtol(vectors), where)


def test_input_scale_equals_the_reference_in_every_run(vectors: Vectors, toy: LoadedModel) -> None:
    data = Calibration(vectors.tensor("calib"))
    for run, wanda in runs(vectors).items():
        pruned = wanda.compress(toy, data, Context())
        model = toy.clone()
        for step in walk(model, data, propagate="compressed", batch_size=1):
            linears = model.adapter.linears(step.block)
            scales = {name: InputScale(weight_matrix(linear).shape[1]) for name, linear in linears.items()}
            step.forward({name: scale.add for name, scale in scales.items()})
            for name, scale in scales.items():
                expected = vectors.tensor(f"{run}_scaler_block{step.index}_{name}")
                torch.testing.assert_close(scale.value, expected, rtol=rtol(vectors), atol=0)
            model.module.blocks[step.index] = pruned.module.blocks[step.index]


def assert_equal_up_to_ties(
    got: Tensor, expected: Tensor, scores: Tensor, slack: int, tie: float, where: str
) -> None:
    """Masks that differ may do so only among scores that are equal to rounding, as many each way.

    ``slack`` more zeros in one of them are allowed where a rounded sum, not a count, decides how many go.
    """
    rows = (got != expected).any(dim=1).nonzero().flatten().tolist()
    for row in rows:
        assert abs(int(got[row].sum()) - int(expected[row].sum())) <= slack, f"{where}: zeros of row {row}"
        differing = scores[row][got[row] != expected[row]]
        assert differing.max() - differing.min() <= tie * differing.max(), f"{where}: scores of row {row}"
