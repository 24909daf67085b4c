"""Muon against Jordan's code, the one of outlier-safe pre-training and torch's, whose iterations run in bfloat16."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from methodbench.testing.parity import Vectors
from methodbench_optim.muon import QUINTIC, Muon, length, newton_schulz

pytestmark = pytest.mark.vectors("optim", "muon")

#: Recorded trajectories: whose settings they have, and what of ours repeats them.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "kj": ("kj", {}),
    "osp": ("osp", {"scale": "rms", "vectors": "normalized", "arithmetic": "bfloat16-per-step"}),
    "torch_original": ("torch", {"arithmetic": "bfloat16-fused"}),
    "torch_match_rms_adamw": ("torch", {"arithmetic": "bfloat16-fused", "scale": "rms"}),
}


def tolerance(vectors: Vectors, pattern: str) -> float:
    found = re.search(pattern, vectors.meta["tolerance"])
    assert found is not None
    return float(found[1])


@pytest.fixture
def in_float32(vectors: Vectors) -> None:
    """The recorded dtype is a sentence; parameters are float32."""
    assert "parameters float32" in vectors.meta["dtype"]
    vectors.meta["dtype"] = "float32"  # type: ignore[index]


def increments(path: np.ndarray, start: np.ndarray, shrink: float) -> np.ndarray:
    """Return what each step added to the decayed parameters."""
    return path - shrink * np.concatenate([start[None], path[:-1]])


@pytest.mark.parametrize("decayed", [False, True], ids=["wd0", "wd1"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_each_increment_is_the_recorded_one(
    in_float32: None,
    vectors: Vectors,
    variant: str,
    decayed: bool,
    follow_given_gradients: Callable[[Any], Any],
) -> None:
    whose, settings = VARIANTS[variant]
    given = vectors.meta["hyperparameters"][whose]
    decay = given.get("weight_decay", given.get("wd")) if decayed else 0.0
    method = Muon(
        lr=given["lr"],
        momentum=given.get("momentum", given.get("beta")),
        ns_steps=vectors.meta["hyperparameters"]["ns_steps"],
        weight_decay=decay,
        **settings,
    )
    path = follow_given_gradients(method)
    for name in ("W", "b"):
        if f"{variant}_wd{decayed:d}_{name}" not in vectors:
            continue
        start, expected = vectors[f"p0_{name}"], vectors[f"{variant}_wd{decayed:d}_{name}"]
        assert path[name].shape == expected.shape
        scale = method.lr * length(torch.as_tensor(start), method.scale)
        shrink = 1 - method.lr * decay
        ours, theirs = (
            increments(p.astype(np.float64), start, shrink) / scale for p in (path[name], expected)
        )
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance(vectors, r"atol ([\d.e-]+)"))


def test_newton_schulz_is_the_reference_in_float64(vectors: Vectors) -> None:
    given = vectors.meta["hyperparameters"]
    assert list(QUINTIC) == given["ns_coeffs"]
    # The input is kept in float32 alone, which would cost eight digits: it is the first of the given gradients.
    matrix = vectors.tensor("grads_W")[:1]
    assert torch.equal(matrix[0].float(), vectors.tensor("ns5_in"))
    found = newton_schulz(matrix, given["ns_steps"], "float64")[0]
    bound = tolerance(vectors, r"ns5_out_f64 with ([\d.e-]+)")
    np.testing.assert_allclose(found.numpy(), vectors["ns5_out_f64"], rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("given", "arithmetic", "expected"),
    [("ns5_in", "bfloat16", "kj_ns5_out_bf16"), ("osp_ns5_in", "bfloat16-per-step", "osp_ns5_out")],
)
def test_newton_schulz_is_the_authors_in_bfloat16(
    vectors: Vectors, given: str, arithmetic: Any, expected: str
) -> None:
    matrix = vectors.tensor(given, torch.float32).unsqueeze(0)
    found = newton_schulz(matrix, vectors.meta["hyperparameters"]["ns_steps"], arithmetic)[0]
    bound = tolerance(vectors, r"atol ([\d.e-]+)")
    np.testing.assert_allclose(found.float().numpy(), vectors[expected], rtol=0, atol=bound)
