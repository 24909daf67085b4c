"""Wanda against the authors' code: a sequential run over toy blocks, through the method itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from methodbench.context import Context
from methodbench.testing.parity import Vectors, stated_by
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.sequential import walk
from methodbench_sparse.masks import weight_matrix
from methodbench_sparse.wanda import InputScale, Wanda, wanda_score

pytestmark = pytest.mark.vectors("sparse", "wanda")


def rtol(vectors: Vectors) -> float:
    """How closely the scales of the inputs agree; scores this close together are ties, which may break either way."""
    return stated_by(vectors.meta["tolerance"], r"scaler rtol ([\d.e-]+)")


def method(hyper: dict[str, Any]) -> Wanda:
    pattern = f"{hyper['n']}:{hyper['m']}" if hyper["n"] else "unstructured"
    return Wanda(sparsity=hyper["sparsity"], pattern=pattern, use_variant=hyper["use_variant"])


def runs(vectors: Vectors) -> dict[str, Wanda]:
    return {run: method(hyper) for run, hyper in vectors.meta["hyper"].items()}


def test_pruned_weights_equal_the_reference_in_every_run(
    vectors: Vectors, toy: LoadedModel, masks: Any
) -> None:
    data = Calibration(vectors.tensor("calib"))
    for run, wanda in runs(vectors).items():
        pruned = wanda.compress(toy, data, Context())
        originals = toy.adapter.targets(toy.module)
        layers = pruned.adapter.targets(pruned.module)
        assert len(layers) == sum(key.endswith("_W") for key in vectors)
        for name, layer in layers.items():
            _, block, linear = name.split(".")
            dense = weight_matrix(originals[name])
            expected = masks.of(vectors, f"{run}_block{block}_{linear}", dense.shape)
            got = weight_matrix(layer) == 0
            assert torch.equal(weight_matrix(layer), dense.masked_fill(got, 0)), f"{run} {name}"
            scaler = vectors.tensor(f"{run}_scaler_block{block}_{linear}")
            slack = int(wanda.use_variant)
            where = f"{run} {name}"
            masks.assert_equal_up_to_ties(
                got, expected, wanda_score(dense, scaler), slack, rtol(vectors), where
            )


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
