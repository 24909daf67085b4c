"""EAQuant against the authors' functions: scales, outlier channels, clipping searches, permutation."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from methodbench.testing.parity import Vectors
from methodbench_quant.llm import eaquant as m

pytestmark = pytest.mark.vectors("quant", "eaquant")


def rtol(vectors: Vectors) -> float:
    """The number at the beginning of the vectors' tolerance; ratios must agree exactly."""
    return float(str(vectors.meta["tolerance"]).split()[0])


def close(ours: Tensor, theirs: Tensor, vectors: Vectors) -> None:
    scale = float(theirs.abs().max())
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=rtol(vectors), atol=rtol(vectors) * scale)


def weights(vectors: Vectors) -> list[list[Tensor]]:
    """The readers of each scale; the router's come first."""
    gates, ups = vectors.tensor("gate_proj_W"), vectors.tensor("up_proj_W")
    return [[vectors.tensor("gate_W")], *([gate, up] for gate, up in zip(gates, ups, strict=True))]


def test_base_scales(vectors: Vectors) -> None:
    alpha = vectors.meta["hyper"]["alpha"]
    ours = [
        m.base_scale(peaks, readers, alpha)
        for peaks, readers in zip(vectors.tensor("act_absmax"), weights(vectors), strict=True)
    ]
    close(torch.stack(ours), vectors.tensor("scales"), vectors)


def test_weight_scores(vectors: Vectors) -> None:
    ours = torch.tensor([m.weight_score(readers) for readers in weights(vectors)])
    close(ours[1:], vectors.tensor("weight_scores")[1:], vectors)


def test_merged_scales(vectors: Vectors) -> None:
    scales = vectors.tensor("scales")
    counts = vectors.tensor("token_counts").float()
    assert counts[1:].sum() == counts[0] * vectors.meta["hyper"]["topk"]
    names = [name for name in vectors if name.startswith("merge_")]
    assert names
    for name in names:
        strategy = name.removeprefix("merge_").removesuffix("_gate")
        merged = m.merge_scales(
            scales[1:],
            strategy,  # type: ignore[arg-type]
            counts=counts[1:],
            weight_scores=vectors.tensor("weight_scores")[1:],
            router_shares=vectors.tensor("router_prob_mean"),
            router_scale=scales[0] if name.endswith("_gate") else None,
        )
        close(merged, vectors.tensor(name), vectors)


def test_outlier_channels(vectors: Vectors) -> None:
    cases = vectors.meta["hyper"]["down"]
    assert cases
    for case in cases:
        ours = m.outlier_factor(
            vectors.tensor("ch_max"), vectors.tensor("ch_min"), case["ratio"], case["rate"]
        )
        close(ours, vectors.tensor(f"down_scale_r{round(100 * case['ratio'])}"), vectors)


def test_clipping_searches(vectors: Vectors) -> None:
    weight, x = vectors.tensor("router_W"), vectors.tensor("router_X")
    names = [n for name in vectors if (n := re.fullmatch(r"cal_(\w+?)_asym_W", name))]
    assert names
    experts, top_k = map(int, re.findall(r"\d+", vectors.meta["hyper"]["router"]))
    for match in names:
        case: dict[str, Any] = {}
        share = re.search(r"top(\d+)", match[1])
        if share:
            case["first"] = m.first_experts(top_k, experts, int(share[1]) / 100)
        criterion = {"mse_tensor": "weight", "mse_linear": "output"}.get(match[1])
        criterion = criterion or ("output-router" if match[1].startswith("mse_linear") else "router")
        found = m.search_clip(weight, vectors.meta["hyper"]["router_bits"], criterion, x=x, **case)  # type: ignore[arg-type]
        stem = match.string.removesuffix("_W")
        theirs = vectors.tensor(f"{stem}_ratio").flatten()
        assert torch.allclose(found.ratio.flatten(), theirs, rtol=rtol(vectors), atol=0), stem
        close(found.score.flatten(), vectors.tensor(f"{stem}_score").flatten(), vectors)
        # The authors' values pass through fp16.
        theirs = vectors.tensor(match.string)
        torch.testing.assert_close(
            found.weight, theirs, rtol=torch.finfo(torch.float16).eps, atol=rtol(vectors)
        )


def test_zigzag_permutation(vectors: Vectors) -> None:
    order = m.zigzag(vectors.tensor("zig_x"), vectors.meta["hyper"]["zig_block"])
    assert torch.equal(order, vectors.tensor("zig_perm"))
