"""Agile-Quant against the authors' code: activation quantizers, token scores and sets."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from methodbench.testing.parity import Vectors
from methodbench_quant.llm.agile_quant import ActivationRange, Log2Probabilities, select, token_scores

pytestmark = pytest.mark.vectors("quant", "agile_quant")


def rtol(vectors: Vectors) -> float:
    """The number at the beginning of the vectors' tolerance; sets must agree exactly."""
    return float(str(vectors.meta["tolerance"]).split(";")[0])


def calibrated(batches: Tensor, bits: int, axis: int | None, signed: bool) -> ActivationRange:
    quantizer = ActivationRange(bits, axis, signed=signed)
    for batch in batches:
        assert torch.equal(quantizer(batch), batch)
    quantizer.freeze()
    return quantizer


def close(ours: Tensor, theirs: Tensor, vectors: Vectors) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol(vectors), atol=rtol(vectors))


def test_activations_get_the_authors_levels(vectors: Vectors) -> None:
    cases = [m for name in vectors if (m := re.fullmatch(r"(u?)int(\d+)_(channel|layer)_wise_y", name))]
    assert cases
    for case in cases:
        stem = case.string.removesuffix("_y")
        axis = -1 if case[3] == "channel" else None
        quantizer = calibrated(vectors.tensor("cal_x"), int(case[2]), axis, not case[1])
        close(quantizer(vectors.tensor("x")), vectors.tensor(case.string), vectors)
        grid = quantizer.grid()
        close(grid.scale.flatten(), vectors.tensor(f"{stem}_scale"), vectors)
        zero = torch.zeros_like(grid.scale) if grid.zero is None else grid.zero
        assert torch.equal(zero.flatten(), vectors.tensor(f"{stem}_zp").float())


def test_heads_have_grids_of_their_own(vectors: Vectors) -> None:
    cases = [m for name in vectors if (m := re.fullmatch(r"q_int(\d+)_y", name))]
    assert cases
    for case in cases:
        batches = vectors.tensor("cal_q")
        quantizer = calibrated(batches, int(case[1]), 1, True)
        close(quantizer.grid().scale.flatten(), vectors.tensor(f"q_int{case[1]}_scale"), vectors)
        outputs = [quantizer(batch) for batch in batches]
        expected = vectors.tensor(case.string)
        assert any(torch.allclose(out, expected, rtol=rtol(vectors), atol=rtol(vectors)) for out in outputs)


def test_probabilities_get_the_authors_levels(vectors: Vectors) -> None:
    attention = vectors.tensor("attn")
    names = [m for name in vectors if (m := re.fullmatch(r"attn_(int|log2_uint)(\d+)_y", name))]
    assert {m[1] for m in names} == {"int", "log2_uint"}
    for match in names:
        bits = int(match[2])
        if match[1] == "int":
            quantizer = calibrated(attention[None], bits, 1, True)
            close(quantizer.grid().scale.flatten(), vectors.tensor(f"attn_int{bits}_scale"), vectors)
            close(quantizer(attention), vectors.tensor(match.string), vectors)
        else:
            close(Log2Probabilities(bits)(attention), vectors.tensor(match.string), vectors)


def indices(mask: Tensor) -> Tensor:
    return torch.nonzero(mask)[:, 1].view(len(mask), -1)


def test_tokens_are_scored_and_chosen_as_by_the_authors(vectors: Vectors) -> None:
    hyper = vectors.meta["hyper"]
    attention = vectors.tensor("attn")
    previous = torch.zeros(attention.shape[0], attention.shape[-1], dtype=torch.bool)
    previous.scatter_(1, vectors.tensor("tok_prev")[:1], True)
    for rule, importance in (("start", "start"), ("conv", "received")):
        scores = token_scores(attention, importance)  # type: ignore[arg-type]
        close(scores, vectors.tensor(f"tok_{rule}_score"), vectors)
        shares = (hyper["token_remove_percent"], hyper["lower_bit_percent"])
        plain = select(scores, *shares)
        assert torch.equal(indices(plain.removed), vectors.tensor(f"tok_{rule}_removed_sorted"))
        assert torch.equal(indices(plain.low), vectors.tensor(f"tok_{rule}_low_sorted"))
        inherited = select(scores, *shares, previous)
        assert torch.equal(indices(inherited.low), vectors.tensor(f"tok_{rule}_low_with_prev_sorted"))
