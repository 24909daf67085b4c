"""ProSparse against the authors' schedule, and against a reference of its network and penalty."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from methodbench.testing.parity import Vectors, stated_by
from methodbench.torchkit.nonlinearities import ShiftedReLU
from methodbench_sparse.prosparse import SUM_SCALE, ProSparse, penalty, sine

pytestmark = pytest.mark.vectors("sparse", "prosparse")


def test_the_factor_rises_as_in_the_reference(vectors: Vectors) -> None:
    hyper = vectors.meta["hyper"]
    rtol = stated_by(vectors.meta["tolerance"], r"rtol ([\d.e-]+)")
    for index, (start, end, steps) in enumerate(hyper["segments_start_end_steps"]):
        expected = vectors[f"lambda_trace_{index}"]
        found = [sine(hyper["trace_step"] * j, steps, start, end) for j in range(len(expected))]
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * end)


def test_a_recipe_of_stages_follows_the_reference_from_one_to_the_next(vectors: Vectors) -> None:
    hyper = vectors.meta["hyper"]
    rtol = stated_by(vectors.meta["tolerance"], r"rtol ([\d.e-]+)")
    segments = hyper["segments_start_end_steps"]
    # A first stage of one step leads to where the first segment starts.
    ends = np.cumsum([1, *(steps for _, _, steps in segments)])
    lambdas = [segments[0][0], *(end for _, end, _ in segments)]
    method = ProSparse(lambdas=tuple(lambdas), ends=tuple(ends.tolist()), steps=int(ends[-1]))
    for index, (_, end, steps) in enumerate(segments):
        places = range(0, steps, hyper["trace_step"])
        found = [method.factor(int(ends[index]) + place) for place in places]
        np.testing.assert_allclose(
            found, vectors[f"lambda_trace_{index}"][: len(places)], rtol=rtol, atol=rtol * end
        )


@pytest.mark.parametrize("kind", ["relu", "fatrelu"])
def test_the_network_and_its_penalty_equal_the_reference(vectors: Vectors, kind: str) -> None:
    rtol, atol = (stated_by(vectors.meta["tolerance"], rf"{what} ([\d.e-]+)") for what in ("rtol", "atol"))
    activation = ShiftedReLU(threshold=vectors.meta["hyper"]["fat_threshold"] if kind == "fatrelu" else 0.0)
    x, gate, up, down = (vectors.tensor(name) for name in ("x", "W_s", "W_1", "W_2"))
    s = activation(nn.functional.linear(x, gate))
    hidden = s * nn.functional.linear(x, up)
    torch.testing.assert_close(hidden, vectors.tensor(f"{kind}_x1"), rtol=rtol, atol=atol)
    output = nn.functional.linear(hidden, down)
    torch.testing.assert_close(output, vectors.tensor(f"{kind}_out"), rtol=rtol, atol=atol)
    total = penalty([hidden], "sum_scaled") / SUM_SCALE
    torch.testing.assert_close(total, vectors.tensor(f"{kind}_l1_sum"), rtol=rtol, atol=atol)
    share = float((s == 0).double().mean())
    assert share == pytest.approx(float(vectors[f"{kind}_sparsity"]), rel=rtol)
