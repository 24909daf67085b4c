"""GBLM-Pruner against the authors' code: gathered gradients, and masks of a sequential run over toy blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.testing.parity import Vectors, stated_by
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_sparse.gblm_pruner import GBLMPruner, gather, gblm_score
from methodbench_sparse.masks import weight_matrix
from methodbench_sparse.wanda import lowest, prune_blocks

pytestmark = pytest.mark.vectors("sparse", "gblm_pruner")


def method(vectors: Vectors, run: str) -> GBLMPruner:
    hyper = vectors.meta["hyper"][run]
    pattern = f"{hyper['n']}:{hyper['m']}" if hyper["n"] else "unstructured"
    scale = stated_by(vectors.meta["function"], r"scale (\d+)")
    return GBLMPruner(
        sparsity=hyper["sparsity"],
        pattern=pattern,
        norm=hyper["norm"],
        inverse=hyper["gradient_inv"],
        scale=scale,
    )


def key(name: str) -> str:
    """``blocks.0.q`` -> ``block0_q``, as the vectors call it."""
    _, block, linear = name.split(".")
    return f"block{block}_{linear}"


def losses(vectors: Vectors, model: LoadedModel) -> list[Callable[[], Tensor]]:
    """The loss that ``meta["toy"]`` describes, of each sample."""
    factor = stated_by(vectors.meta["toy"], r"mse\(([\d.]+)\*model")

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(factor * model.module(x[None]), factor * target[None])

    pairs = zip(vectors.tensor("calib"), vectors.tensor("target"), strict=True)
    return [lambda x=x, target=target: loss(x, target) for x, target in pairs]


def test_gathered_gradients_equal_the_reference(vectors: Vectors, toy: LoadedModel) -> None:
    rtol = stated_by(vectors.meta["tolerance"], r"G rtol ([\d.e-]+)")
    for norm, name_of in (("l1", "G1"), ("l2", "G2")):
        model = toy.clone()
        run = next(run for run, hyper in vectors.meta["hyper"].items() if hyper["norm"] == norm)
        linears = model.adapter.targets(model.module)
        found = gather(linears, losses(vectors, model), norm, method(vectors, run).scale)
        for name, gradient in found.items():
            expected = vectors.tensor(f"{key(name)}_{name_of}")
            assert gradient.dtype == expected.dtype
            # Half precision has no more: below its smallest normal number, steps are absolute.
            tiny = torch.finfo(expected.dtype).tiny
            torch.testing.assert_close(gradient.float(), expected.float(), rtol=rtol, atol=tiny)


def test_masks_from_the_stored_gradients_equal_the_reference_in_every_run(
    vectors: Vectors, toy: LoadedModel, masks: Any
) -> None:
    data = Calibration(vectors.tensor("calib"))
    tie = stated_by(vectors.meta["tolerance"], r"G rtol ([\d.e-]+)")
    for run in vectors.meta["hyper"]:
        chosen = method(vectors, run)
        stored = {"l1": "G1", "l2": "G2"}[chosen.norm]
        scores: dict[str, Tensor] = {}

        def mask(weight: Tensor, scaler: Tensor, name: str, chosen: GBLMPruner = chosen, stored: str = stored,
                 scores: dict[str, Tensor] = scores) -> Tensor:  # fmt: skip
            gradient = vectors.tensor(f"{key(name)}_{stored}")
            scores[name] = gblm_score(weight, scaler, gradient, inverse=chosen.inverse)
            return lowest(scores[name], chosen.sparsity, chosen.pattern, chosen.use_variant, name)

        pruned = prune_blocks(toy.clone(), data, Context(), mask)
        for name, layer in pruned.adapter.targets(pruned.module).items():
            got = weight_matrix(layer) == 0
            expected = masks.of(vectors, f"{run}_{key(name)}", got.shape)
            masks.assert_equal_up_to_ties(got, expected, scores[name], 0, tie, f"{run} {name}")
