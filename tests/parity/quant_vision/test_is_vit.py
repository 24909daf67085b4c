"""I&S-ViT against the authors' code: its quantizers, and one Linear through the first and the third stage."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from methodbench.testing.parity import Vectors, stated_by
from methodbench_quant.vit.is_vit import (
    ISViT,
    Learned,
    ShiftUniformLog2,
    learn_weights,
    shift_scores,
    squared_distance,
)
from methodbench_quant.vit.repq_vit import search_uniform
from methodbench_quant.vit.sites import Uniform

pytestmark = pytest.mark.vectors("quant_vision", "is_vit")


def close(actual: Tensor | float, vectors: Vectors, name: str, what: str = "quantizers") -> None:
    rtol, atol = (
        stated_by(vectors.meta["tolerance"][what], rf"{kind} ([\d.e-]+)") for kind in ("rtol", "atol")
    )
    expected = vectors.tensor(name)
    found = torch.as_tensor(actual).reshape(expected.shape)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


def test_shifts_are_scored_and_chosen_as_in_the_reference(vectors: Vectors) -> None:
    bits = vectors.meta["a_bits"]
    scores, _, _ = shift_scores(vectors.tensor("attn"), bits, vectors["sulq_candidates"].tolist())
    close(scores, vectors, "sulq_scores")
    found = ShiftUniformLog2.searched(vectors.tensor("attn"), bits)
    close(found.shift, vectors, "sulq_shift")
    close(found.low, vectors, "sulq_min")
    close(found.high, vectors, "sulq_max")
    share = stated_by(vectors.meta["tolerance"]["sulq_y"], r"allow ([\d.]+)")
    for x, y in (("attn", "sulq_y"), ("attn_unseen", "sulq_y_unseen")):
        rtol, atol = (
            stated_by(vectors.meta["tolerance"]["quantizers"], rf"{kind} ([\d.e-]+)")
            for kind in ("rtol", "atol")
        )
        same = torch.isclose(found(vectors.tensor(x)), vectors.tensor(y), rtol=rtol, atol=atol)
        assert float((~same).double().mean()) <= share


def test_uniform_quantizers_equal_the_reference(vectors: Vectors) -> None:
    method = ISViT(w_bits=vectors.meta["w_bits"], a_bits=vectors.meta["a_bits"])
    x, w = vectors.tensor("x"), vectors.tensor("w")
    for prefix, grouped, bits, percentiles, original in (
        ("uc", x.flatten(0, -2).T, method.a_bits, method.percentiles, lambda y: y.T.reshape(x.shape)),
        ("u", x.flatten(), method.a_bits, method.percentiles, lambda y: y.view_as(x)),
        ("w", w, method.w_bits, method.w_percentiles, lambda y: y),
        ("wt", w.flatten(), method.w_bits, method.w_percentiles, lambda y: y.view_as(w)),
    ):
        grid = search_uniform(grouped, bits, percentiles)
        assert grid.zero is not None
        close(grid.scale, vectors, f"{prefix}_delta")
        close(grid.zero, vectors, f"{prefix}_zp")
        close(original(grid.snap(grouped)), vectors, f"{prefix}_y")


def test_a_linear_through_both_stages_equals_the_reference(vectors: Vectors) -> None:
    method = ISViT(w_bits=vectors.meta["w_bits"], a_bits=vectors.meta["a_bits"], lr=vectors.meta["lr"])
    x = vectors.tensor("x")
    target = F.linear(x, vectors.tensor("w"), vectors.tensor("b"))

    def learn(weight: Tensor, bias: Tensor, quantize: Uniform, through: bool) -> tuple[Learned, float]:
        grid = search_uniform(weight, method.w_bits, method.w_percentiles)
        if through:
            close(grid.scale, vectors, "stage3_w_delta")
            assert grid.zero is not None
            close(grid.zero, vectors, "stage3_w_zp")

        def forward(weights: Mapping[str, Tensor], biases: Mapping[str, Tensor], batch: Tensor) -> Tensor:
            whole = grid.pass_through(weights["l"], bounds=False) if through else weights["l"]
            return F.linear(quantize(batch), whole, biases["l"])

        first = float(squared_distance(forward({"l": weight}, {"l": bias}, x), target))
        return learn_weights(
            forward, {"l": weight}, {"l": bias}, x, target, iterations=vectors.meta["iters"],
            batch=len(x), lr=method.lr, generator=torch.Generator()
        ), first  # fmt: skip

    # Behind a LayerNorm scales are per channel.
    channels = search_uniform(x.flatten(0, -2).T, method.a_bits, method.percentiles)
    assert channels.zero is not None
    quantize = Uniform(channels.scale.squeeze(-1), channels.zero.squeeze(-1), method.a_bits)
    weight, bias = vectors.tensor("w"), vectors.tensor("b")
    for stage, through in (("stage1", False), ("stage3", True)):
        learned, first = learn(weight, bias, quantize, through)
        weight, bias = learned.weights["l"], learned.biases["l"]
        close(weight, vectors, f"{stage}_w", "recon")
        close(bias, vectors, f"{stage}_b", "recon")
        close(first, vectors, f"{stage}_loss0", "recon")
