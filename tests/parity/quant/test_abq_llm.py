"""ABQ-LLM against the authors' code: grids, gradients of the clipping, transforms, the loss."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from methodbench.testing.parity import Vectors, stated_by
from methodbench.torchkit.quantizers import UniformGrid, groups_of
from methodbench_quant.llm.abq_llm import (
    balanced_grid,
    distribution_loss,
    mean_kl,
    scale_keys,
    scale_norm,
    truncate,
)

pytestmark = pytest.mark.vectors("quant", "abq_llm")


def close(vectors: Vectors, ours: Tensor, name: str) -> None:
    tolerance = vectors.meta["tolerance"]
    expected = vectors.tensor(name)
    torch.testing.assert_close(
        ours.detach().view(expected.shape), expected, rtol=tolerance["rtol"], atol=tolerance["atol"], msg=name
    )


def weight_cases(vectors: Vectors) -> list[str]:
    found = [name.removesuffix("_init") for name in vectors if re.fullmatch(r"w\d_\w+_init", name)]
    assert found
    return found


def clipped(vectors: Vectors, case: str, low: Tensor, high: Tensor) -> tuple[Tensor, UniformGrid]:
    size = vectors.meta["group_size"] if case.endswith("group") else -1
    grouped = groups_of(vectors.tensor("W"), size)
    shape = (*grouped.shape[:2], 1)
    clip = (torch.sigmoid(low).view(shape), torch.sigmoid(high).view(shape))
    return grouped, balanced_grid(grouped, int(case[1]), clip=clip)


def test_weights_with_random_clipping_are_the_authors(vectors: Vectors) -> None:
    for case in weight_cases(vectors):
        low, high = vectors.tensor(f"{case}_low"), vectors.tensor(f"{case}_up")
        grouped, grid = clipped(vectors, case, low, high)
        close(vectors, grid.pass_through(grouped, bounds=False).flatten(1), case)
        close(vectors, grid.snap(grouped).flatten(1), case)
        close(vectors, grid.scale, f"{case}_scale")
        assert grid.zero is not None
        close(vectors, grid.zero, f"{case}_zero")


def test_weights_with_the_first_clipping_are_the_authors(vectors: Vectors) -> None:
    for case in weight_cases(vectors):
        factor = torch.full_like(
            vectors.tensor(f"{case}_up"), stated_by(vectors.meta["notes"], r"factors (\d+)")
        )
        grouped, grid = clipped(vectors, case, factor, factor)
        close(vectors, grid.snap(grouped).flatten(1), f"{case}_init")


def test_gradients_of_the_clipping_are_the_authors(vectors: Vectors) -> None:
    for bits in [name.removesuffix("_gout") for name in vectors if name.endswith("_gout")]:
        case = f"{bits}_channel"
        low, high = (vectors.tensor(f"{case}_{end}").requires_grad_(True) for end in ("low", "up"))
        grouped, grid = clipped(vectors, case, low, high)
        (
            grid.pass_through(grouped, bounds=False).flatten(1) * vectors.tensor(f"{bits}_gout")
        ).sum().backward()
        assert low.grad is not None
        assert high.grad is not None
        close(vectors, low.grad, f"{bits}_glow")
        close(vectors, high.grad, f"{bits}_gup")


def test_activations_per_token_are_the_authors(vectors: Vectors) -> None:
    x = vectors.tensor("X")
    for name in [name for name in vectors if re.fullmatch(r"a\d_token", name)]:
        close(vectors, balanced_grid(x, int(name[1])).snap(x), name)


def test_the_loss_and_its_parts_are_the_authors(vectors: Vectors) -> None:
    y, dense, on_inputs, p, p_dense = (
        vectors.tensor(f"loss_{name}") for name in ("y_q", "y_fp", "y_fp2", "P_q", "P_fp")
    )
    tolerance = vectors.meta["tolerance"]
    parts = {float(vectors["loss_kl1"]), float(vectors["loss_kl2"])}
    ours = {float(mean_kl(p, p_dense).abs()), float(mean_kl(p_dense, p).abs())}
    assert sorted(ours) == pytest.approx(sorted(parts), rel=tolerance["rtol"], abs=tolerance["atol"])
    close(vectors, distribution_loss(y, dense, on_inputs, p, p_dense), "loss_total")


def test_transforms_are_the_authors(vectors: Vectors) -> None:
    p = {
        f"{layer}.{kind}": vectors.tensor(f"t_{layer}_{kind[0]}")
        for layer in ("ln", "fc", "k", "q")
        for kind in ("weight", "bias")
    }
    scale_norm(p, "ln", ("fc", "k", "q"), vectors.tensor("t_s1"), vectors.tensor("t_shift"))
    scale = truncate(vectors.tensor("t_s3"))
    close(vectors, scale, "t_s3_truncated")
    scale_keys(p, "q", "k", scale, scale)
    for name, ours in p.items():
        layer, _, kind = name.partition(".")
        close(vectors, ours, f"t_{layer}_{kind[0]}_after")
