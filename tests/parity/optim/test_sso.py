"""SSO against the authors' code on a linear model with cross entropy or squared error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.testing.parity import Vectors
from methodbench.torchkit.closures import Closure, Evaluations
from methodbench_optim.sso import SSO

pytestmark = pytest.mark.vectors("optim", "sso")


def configured(vectors: Vectors, name: str) -> SSO:
    """Return the method with the recorded settings under our names; both line searches must share theirs."""
    outer, inner = vectors.meta["hyperparameters"]["outer"][name], vectors.meta["hyperparameters"]["inner"]
    fields: dict[str, Any] = {
        "eta": outer["eta"],
        "inner_steps": outer["m"],
        "eta_schedule": outer.get("eta_schedule", "constant"),
        "target_search": name.startswith("sls"),
        "c": inner["c"],
        "shrink": inner["beta_update"],
        "expand": inner["expand_coeff"],
        "batches_per_epoch": inner["n_batches_per_epoch"],
        "initial_step": vectors.meta["hyperparameters"]["init_step_size"],
    }
    for theirs, ours in (("c", "c"), ("beta_update", "shrink"), ("expand_coeff", "expand")):
        assert outer.get(theirs, fields[ours]) == fields[ours]
    return SSO(**fields)


def test_each_batch_ends_at_the_recorded_parameters(vectors: Vectors) -> None:
    assert vectors.meta["hyperparameters"]["outer"]
    for name in vectors.meta["hyperparameters"]["outer"]:
        assert_follows(vectors, name)


def assert_follows(vectors: Vectors, name: str) -> None:
    dtype = getattr(torch, vectors.meta["dtype"])
    weight, bias = (nn.Parameter(vectors.tensor(key, dtype)) for key in ("W0", "b0"))
    inputs, targets = vectors.tensor("X", dtype), vectors.tensor("Y")
    optimizer = configured(vectors, name).build([{"params": [weight, bias], "role": "matrix"}], Context())
    counts = Evaluations()

    def loss(outputs: Tensor, wanted: Tensor) -> Tensor:
        if wanted.is_floating_point():
            return F.mse_loss(outputs, wanted.to(outputs.dtype))
        return F.cross_entropy(outputs, wanted)

    for batch, rows in enumerate(vectors.tensor("batch_idx")):
        closure = Closure(
            [weight, bias], lambda x: x @ weight.T + bias, loss, inputs[rows], targets[rows], counts
        )
        optimizer.step(closure)
        actual = {"W": weight, "b": bias, "eta": torch.tensor(optimizer.param_groups[0]["eta"])}
        for key, value in actual.items():
            np.testing.assert_allclose(
                value.detach().numpy(),
                vectors[f"{name}_{key}"][batch],
                rtol=0,
                atol=vectors.meta["tolerance"],
                err_msg=f"{name}_{key}, batch {batch}",
            )
        assert counts.inner_steps == vectors[f"{name}_inner_steps"][batch]
    assert counts.gradients == len(vectors["batch_idx"])
