"""MeZO against the authors' trainer, and the subspace gradient against that of its paper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from methodbench.context import Context
from methodbench.testing.parity import Vectors
from methodbench.torchkit.closures import Closure
from methodbench_optim.mezo import MeZO, MeZOOptimizer, SubspaceOptimizer, direction_like, generator_of

pytestmark = pytest.mark.vectors("optim", "mezo_subspace")


@pytest.mark.parametrize("decayed", [False, True], ids=["wd0", "wd1"])
def test_mezo_follows_the_recorded_steps(vectors: Vectors, decayed: bool) -> None:
    given, dtype = vectors.meta["hyperparameters"]["mezo"], getattr(torch, vectors.meta["dtype"])
    weight, bias = (nn.Parameter(vectors.tensor(f"p0_{name}", dtype)) for name in ("W", "b"))
    inputs, targets = (vectors.tensor(name, dtype) for name in ("X", "Y"))
    decay = given["weight_decay"] if decayed else 0.0
    optimizer = MeZOOptimizer([weight, bias], lr=given["lr"], eps=given["zo_eps"], weight_decay=decay)
    closure = Closure(
        [weight, bias],
        lambda x: x @ weight.T + bias,
        lambda outputs, wanted: 0.5 * (outputs - wanted).square().mean(),
        inputs,
        targets,
    )
    for step, seed in enumerate(vectors["mezo_seeds"]):
        above, slope = optimizer.follow(closure, int(seed))
        actual: dict[str, Any] = {"W": weight, "b": bias, "projected_grad": slope, "loss_plus": above}
        for name, value in actual.items():
            np.testing.assert_allclose(
                value.detach().numpy() if isinstance(value, torch.Tensor) else value,
                vectors[f"mezo_wd{decayed:d}_{name}"][step],
                rtol=0,
                atol=vectors.meta["tolerance"],
                err_msg=f"{name}, step {step}",
            )
    assert closure.evaluations.functions == 2 * len(vectors["mezo_seeds"])
    assert closure.evaluations.gradients == 0


def test_directions_drawn_again_are_the_recorded_ones(vectors: Vectors) -> None:
    dtype = getattr(torch, vectors.meta["dtype"])
    params = [vectors.tensor(f"p0_{name}", dtype) for name in ("W", "b")]
    for step, seed in enumerate(vectors["mezo_seeds"]):
        generator = generator_of(int(seed), params)
        for name, p in zip(("W", "b"), params, strict=True):
            theirs = vectors[f"mezo_z_{name}"][step]
            ours = direction_like(p, generator).numpy()
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=vectors.meta["tolerance"])


def test_subspace_gradient_follows_the_recorded_steps(vectors: Vectors) -> None:
    given, dtype = vectors.meta["hyperparameters"]["zo_adam"], getattr(torch, vectors.meta["dtype"])
    settings = MeZO(
        estimator="subspace",
        lr=given["lr"],
        beta1=given["beta1"],
        beta2=given["beta2"],
        adam_eps=given["eps"],
        history=given["tau"],
        nu=given["nu"],
        directions=given["n"],
    )
    p = nn.Parameter(vectors.tensor("sub_p0", dtype))
    optimizer = settings.build([{"params": [p], "role": "embedding"}], Context())
    assert isinstance(optimizer, SubspaceOptimizer)
    directions = vectors.tensor("sub_z", dtype)
    refreshes = 0
    for step, slopes in enumerate(vectors["sub_projected_grads"]):
        optimizer.follow(list(slopes), directions[step])
        np.testing.assert_allclose(
            p.detach().numpy(), vectors["sub_traj"][step], rtol=0, atol=vectors.meta["tolerance"]
        )
        if (step + 1) % given["tau"] == 0:
            refreshes += 1
            assert_same_directions(vectors, optimizer, p, vectors.tensor(f"sub_eigvecs_{refreshes}", dtype))
    assert refreshes


def assert_same_directions(
    vectors: Vectors, optimizer: SubspaceOptimizer, p: nn.Parameter, expected: torch.Tensor
) -> None:
    """Compare what is removed, and go on with the recorded directions.

    A centred past of τ points spans τ - 1 directions: the last component is any vector across them, picked by
    rounding. Along the past, the projections are the same.
    """
    removed, past = optimizer.state[p]["removed"], optimizer.state[p]["past"]
    assert removed.shape == expected.shape
    torch.testing.assert_close(removed @ removed.T, torch.eye(len(removed), dtype=removed.dtype))
    spread = past - past.mean(0)
    along = spread / spread.std(0, correction=0)
    ours, theirs = (along @ directions.T @ directions for directions in (removed, expected))
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=0, atol=vectors.meta["tolerance"])
    optimizer.state[p]["removed"] = expected
