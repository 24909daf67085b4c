"""ShiftAddLLM against the authors' code; the random projection is off in the vectors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from methodbench.testing.parity import Vectors, stated_by
from methodbench.torchkit.compensation import Hessian, add_batch
from methodbench_quant.llm.shiftaddllm import (
    _LAT_COLUMNS,
    apot,
    fit,
    greedy_start,
    nearest_signs,
    rescale,
    shift_add,
    sign_patterns,
)

pytestmark = pytest.mark.vectors("quant", "shiftaddllm")


def hessian_of(vectors: Vectors) -> Tensor:
    """The mean over sequences of ``X^T X``: half of GPTQ's."""
    x = vectors.tensor("X", torch.float32)
    hessian = Hessian(torch.zeros(x.shape[-1], x.shape[-1]))
    add_batch(hessian, x)
    return hessian.matrix / 2


def variants(vectors: Vectors, pattern: str) -> list[tuple[str, int, str]]:
    """Names of entries that match ``pattern`` (bits, rest), with their bits and the rest."""
    found = [(name, re.fullmatch(pattern, name)) for name in vectors]
    return [(name, int(match[1]), match[2]) for name, match in found if match]


def matching(ours: Tensor, theirs: Tensor, tolerance: dict[str, float]) -> float:
    return float(torch.isclose(ours, theirs, rtol=tolerance["rtol"], atol=tolerance["atol"]).float().mean())


def decoded(w: Tensor, scale: Tensor) -> Tensor:
    """Return the nearest codeword of each of ``w`` [G, n]."""
    return (nearest_signs(w, scale, sign_patterns(scale.shape[1], w)) * scale[:, None]).sum(-1)


def test_sums_of_powers_are_the_authors(vectors: Vectors) -> None:
    x = vectors.tensor("apot_in")
    names = variants(vectors, r"apot(\d+)()")
    assert names
    for name, terms, _ in names:
        torch.testing.assert_close(apot(x, terms), vectors.tensor(name))


def test_groups_get_the_authors_codes(vectors: Vectors) -> None:
    meta, weight = vectors.meta, vectors.tensor("W", torch.float32)
    names = variants(vectors, r"qs_b(\d+)(_.*)?_w")
    assert names
    for name, bits, rest in names:
        terms = int(found[1]) if (found := re.search(r"apot(\d+)", rest or "")) else meta["apot_nums"]
        sizes = [size for size in range(1, weight.numel() + 1) if weight.numel() % size == 0]
        sizes = sizes if "_g" in (rest or "") else [weight.shape[1]]
        best = 0.0
        for size in sizes:
            groups = weight.reshape(-1, size)
            scale = fit(groups, bits, rounds=meta["rounds"], terms=terms)
            ours = decoded(groups, scale).view_as(weight)
            best = max(best, matching(ours, vectors.tensor(name), meta["tolerance"]))
            alphas = name.removesuffix("_w") + "_alpha"
            if size == weight.shape[1] and alphas in vectors:
                assert (
                    matching(scale, vectors.tensor(alphas), meta["tolerance"])
                    >= meta["tolerance"]["min_match"]
                )
        assert best >= meta["tolerance"]["min_match"], name


def test_plain_binary_coding_is_the_authors(vectors: Vectors) -> None:
    meta, weight = vectors.meta, vectors.tensor("W", torch.float32)
    names = variants(vectors, r"bcq_b(\d+)(_greedy)?_w")
    assert names
    for name, bits, greedy in names:
        if greedy:
            scale, signs = greedy_start(weight, bits, torch.tensor(weight.shape[1]))
            ours = (signs * scale[:, None]).sum(-1)
        else:
            ours = decoded(weight, fit(weight, bits, rounds=meta["rounds"], terms=None))
        assert matching(ours, vectors.tensor(name), meta["tolerance"]) >= meta["tolerance"]["min_match"], name


def test_the_hessian_is_the_authors(vectors: Vectors) -> None:
    theirs = vectors.tensor("H", torch.float32)
    tolerance, scale = vectors.meta["tolerance"], float(theirs.abs().max())
    torch.testing.assert_close(
        hessian_of(vectors), theirs, rtol=tolerance["rtol"], atol=tolerance["atol"] * scale
    )


def coded(vectors: Vectors, mode: str, bits: int, rescaled: bool) -> Tensor:
    meta, weight, hessian = vectors.meta, vectors.tensor("W", torch.float32), hessian_of(vectors)
    r = torch.ones(weight.shape[1])
    if rescaled:
        weight, hessian, r = rescale(weight, hessian)
    rows = weight.shape[0] if meta["groupsize"] == -1 else meta["groupsize"]
    options: dict[str, Any] = (
        {"tile": _LAT_COLUMNS, "row_blocks": [rows // _LAT_COLUMNS]}
        if mode == "lat"
        else {"row_blocks": [rows]}
    )
    (code,) = shift_add(
        [weight],
        [hessian],
        bits=bits,
        rounds=meta["rounds"],
        terms=meta["apot_nums"],
        percdamp=meta["percdamp"],
        blocksize=meta["blocksize"],
        **options,
    )
    return code.dequantize() / r


@pytest.mark.parametrize("mode", ["acc", "lat"])
def test_error_feedback_gives_the_authors_weights_and_errors(vectors: Vectors, mode: str) -> None:
    tolerance = vectors.meta["tolerance"]
    weight, x = vectors.tensor("W", torch.float32), vectors.tensor("X", torch.float32)
    names = variants(vectors, rf"w_{mode}_b(\d+)(_rescale)?")
    assert names
    for name, bits, rescaled in names:
        ours = coded(vectors, mode, bits, bool(rescaled))
        error = float((x @ (ours - weight).T).square().mean())
        expected = float(vectors["mse" + name.removeprefix("w")])
        assert error == pytest.approx(expected, rel=tolerance["mse_rtol"]), name
        # The alternating rounds amplify last-bit differences: the notes say which share must match.
        share = stated_by(vectors.meta["notes"], r"w_\*.*min_match (\d+\.\d+)")
        assert matching(ours, vectors.tensor(name), tolerance) >= share, name
        if f"mse_rowbcq_b{bits}" in vectors:
            assert error < float(vectors[f"mse_rowbcq_b{bits}"]) < float(vectors[f"mse_colbcq_b{bits}"])
