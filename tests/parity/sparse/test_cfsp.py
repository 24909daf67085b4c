"""CFSP against the authors' code: statistics, kept shares, masks and outputs of the smaller toy model."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.testing.parity import Vectors, stated_by
from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_sparse.cfsp import CFSP, keep_ratios, statistics
from methodbench_sparse.structured import gated_networks

pytestmark = pytest.mark.vectors("sparse", "cfsp")

ROLES = (("gate", "gate"), ("up", "up"), ("down", "down"))


class ToyBlock(nn.Module):
    """The block that ``meta["toy"]`` describes: x + down(silu(gate h) * (up h)), h = x / rms(x)."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, epsilon: float) -> None:
        super().__init__()
        for name, weight in (("gate", gate), ("up", up), ("down", down)):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight.float(), requires_grad=False)
            self.add_module(name, linear)
        self.act_fn = nn.SiLU()
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        h = x / (x.square().mean(dim=-1, keepdim=True) + self.epsilon).sqrt()
        return x + self.down(self.act_fn(self.gate(h)) * self.up(h))


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
    epsilon = stated_by(vectors.meta["toy"], r"mean\(x\^2\)\+([\d.e-]+)")
    indices = sorted(int(match[1]) for key in vectors if (match := re.fullmatch(r"gate(\d+)", key)))
    blocks = [
        ToyBlock(*(vectors.tensor(f"{name}{index}") for name in ("gate", "up", "down")), epsilon)
        for index in indices
    ]
    adapter = Adapter(kind="causal-lm", stack="blocks", roles=ROLES)
    return LoadedModel("toy", "causal-lm", ToyModel(blocks).eval(), adapter)


def method(hyper: dict[str, object]) -> CFSP:
    return CFSP(
        sparsity=hyper["pruning_ratio"],
        sharpness=hyper["a"],
        score=hyper["local"],
        importance=hyper["global_"],
        inner=hyper["b"],
        outer=hyper["c"],
        multiple=CFSP().multiple if hyper["cuda_friendly"] else 1,
        per_budget=False,
    )


def test_statistics_and_kept_shares_equal_the_reference(vectors: Vectors, toy: LoadedModel) -> None:
    data = Calibration(vectors.tensor("calib"))
    rtol = stated_by(vectors.meta["tolerance"], r"importance rtol ([\d.e-]+)")
    for run, hyper in vectors.meta["hyper"].items():
        chosen = method(hyper)
        norms, importances = statistics(toy, data, gated_networks(toy), chosen.importance)
        torch.testing.assert_close(torch.stack(norms), vectors.tensor("A"), rtol=rtol, atol=0)
        expected = vectors.tensor(f"{run}_importance")
        torch.testing.assert_close(importances, expected, rtol=rtol, atol=0)
        rtol_keep = stated_by(vectors.meta["tolerance"], r"keep_ratio rtol ([\d.e-]+)")
        keep = keep_ratios(importances, chosen.sparsity, chosen.sharpness)
        torch.testing.assert_close(keep, vectors.tensor(f"{run}_keep_ratio"), rtol=rtol_keep, atol=0)


def test_the_smaller_model_equals_the_reference(vectors: Vectors, toy: LoadedModel) -> None:
    data = Calibration(vectors.tensor("calib"))
    rtol = stated_by(vectors.meta["tolerance"], r"y rtol ([\d.e-]+)")
    for run, hyper in vectors.meta["hyper"].items():
        pruned = method(hyper).compress(toy, data, Context())
        assert pruned.facts["neurons_left"] == vectors[f"{run}_width"].tolist()
        for index, network in enumerate(gated_networks(toy)):
            neurons = network.neurons
            mask = torch.from_numpy(np.unpackbits(vectors[f"{run}_mask"][index], count=neurons).astype(bool))
            dense, small = (
                model.module.get_submodule(network.up).get_parameter("weight") for model in (toy, pruned)
            )
            assert torch.equal(small, dense[mask]), f"{run}, block {index}"
        y = pruned.module(data.inputs[0])
        expected = vectors.tensor(f"{run}_y")
        torch.testing.assert_close(y, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))
