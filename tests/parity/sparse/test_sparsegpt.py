"""SparseGPT against the authors' class: one layer in every run of the vector."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from methodbench.testing.parity import Vectors, stated_by
from methodbench.torchkit.compensation import Hessian, add_batch
from methodbench_sparse.sparsegpt import SparseGPT, sparsegpt

pytestmark = pytest.mark.vectors("sparse", "sparsegpt")


def tolerances(vectors: Vectors) -> tuple[float, float, float]:
    """rtol and atol of kept weights, rtol of the loss."""
    text = vectors.meta["tolerance"]
    weights = (
        stated_by(text, r"weights rtol ([\d.e-]+)"),
        stated_by(text, r"weights rtol [\d.e-]+ atol ([\d.e-]+)"),
    )
    return *weights, stated_by(text, r"loss rtol ([\d.e-]+)")


def settings(vectors: Vectors, run: str) -> dict[str, Any]:
    """Hyperparameters of one run, through the fields of the method."""
    hyper = vectors.meta["hyper"]
    own = hyper["configs"][run]
    pattern: dict[str, Any] = {}
    if own.get("prunen"):
        pattern = {"pattern": f"{own['prunen']}:{own['prunem']}", "sparsity": own["prunen"] / own["prunem"]}
    method = SparseGPT(**{
        "sparsity": own["sparsity"], "blocksize": hyper["blocksize"], "percdamp": hyper["percdamp"],
        **({"bits": own["wbits"]} if "wbits" in own else {}), **pattern,
    })  # fmt: skip
    names = ("sparsity", "pattern", "blocksize", "percdamp", "bits")
    return {name: getattr(method, name) for name in names}


def hessian_of(vectors: Vectors) -> Tensor:
    inputs = vectors.tensor("X")
    hessian = Hessian(inputs.new_zeros(inputs.shape[-1], inputs.shape[-1]))
    for sequence in inputs:
        add_batch(hessian, sequence)
    return hessian.matrix


def test_the_hessian_is_the_mean_over_sequences(vectors: Vectors) -> None:
    rtol, atol, _ = tolerances(vectors)
    torch.testing.assert_close(hessian_of(vectors), vectors.tensor("H"), rtol=rtol, atol=atol)


def test_weights_masks_and_loss_equal_the_reference_in_every_run(vectors: Vectors) -> None:
    rtol, atol, of_loss = tolerances(vectors)
    weight, hessian = vectors.tensor("W"), hessian_of(vectors)
    for run in vectors.meta["hyper"]["configs"]:
        found = sparsegpt(weight, hessian, **settings(vectors, run))
        expected = vectors.tensor(f"W_{run}")
        same = ((found.weight == 0) == (expected == 0)).all(dim=1)
        tied = rows_near_a_tie(weight, hessian, settings(vectors, run), rtol)
        assert bool((same | tied).all()), f"{run}: masks differ in rows without a tie"
        assert bool(same.any()), f"{run}: no row has the mask of the reference"
        torch.testing.assert_close(found.weight[same], expected[same], rtol=rtol, atol=atol)
        if bool(same.all()):
            assert found.loss == pytest.approx(float(vectors[f"loss_{run}"]), rel=of_loss), run


def rows_near_a_tie(weight: Tensor, hessian: Tensor, chosen: dict[str, Any], rtol: float) -> Tensor:
    """Rows whose masks change when weights change by less than the tolerance, bool [rows]."""
    mask = sparsegpt(weight, hessian, **chosen).mask
    near = torch.zeros(len(weight), dtype=torch.bool)
    for seed in range(len(weight)):
        noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
        moved = sparsegpt(weight * (1 + rtol * noise), hessian, **chosen).mask
        near |= (mask != moved).any(dim=1)
    return near
