"""CHESS against the authors' notebook: thresholds of gates and attention, and masked gates."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from methodbench.testing.parity import Vectors, stated_by
from methodbench.torchkit.activation_sparsity import Threshold
from methodbench_sparse.chess import (
    channel_thresholds,
    grouped,
    importance_threshold,
    mean_quantile,
    mean_square,
)

pytestmark = pytest.mark.vectors("sparse", "chess")


def limit(vectors: Vectors, pattern: str) -> float:
    """A number out of the sentence in which the vectors state their tolerances."""
    return stated_by(vectors.meta["tolerance"], pattern + r" ?([\d.]+(?:e-\d+)?)")


def layers(vectors: Vectors) -> list[str]:
    return sorted({match[1] for key in vectors if (match := re.fullmatch(r"u2_l(\d+)", key))})


def steps(vectors: Vectors, name: str) -> list[Tensor]:
    return grouped([vectors.tensor(name)], vectors.meta["hyper"]["accum_steps"])


def test_quantiles_of_the_first_pass_equal_the_reference(vectors: Vectors) -> None:
    share = vectors.meta["hyper"]["sparsity"]
    for layer in layers(vectors):
        for ours, theirs in (("gate", "cats"), ("attn_in", "attn_in"), ("attn_out", "attn_out")):
            got = mean_quantile(steps(vectors, f"pass1_{ours}_l{layer}"), share)
            assert got == pytest.approx(
                float(vectors[f"thr_{theirs}_l{layer}"][0]), rel=limit(vectors, "rtol")
            )


def test_channel_thresholds_equal_the_reference(vectors: Vectors) -> None:
    share = vectors.meta["hyper"]["sparsity"]
    for layer in layers(vectors):
        squares = mean_square([vectors.tensor(f"pass1_up_l{layer}")])
        torch.testing.assert_close(
            squares, vectors.tensor(f"u2_l{layer}"), rtol=limit(vectors, "rtol"), atol=0
        )
        second = steps(vectors, f"pass2_gate_l{layer}")
        got = importance_threshold(second, squares, share)
        torch.testing.assert_close(
            got, vectors.tensor(f"importance_thr_l{layer}")[0], rtol=limit(vectors, "rtol"), atol=0
        )
        expected = vectors.tensor(f"thr_chess_l{layer}")
        torch.testing.assert_close(
            channel_thresholds(second, squares, share), expected, rtol=limit(vectors, "rtol"), atol=0
        )


def test_masked_gates_equal_the_reference(vectors: Vectors) -> None:
    for layer in layers(vectors):
        thresholds, gate = vectors.tensor(f"thr_chess_l{layer}"), vectors.tensor(f"pass2_gate_l{layer}")[0]
        got = gate.masked_fill(~Threshold(thresholds)(gate), 0)
        assert torch.equal(got, vectors.tensor(f"masked_gate_l{layer}"))
