"""AdaRound against the authors' code (BRECQ): grids, relaxed and decided rounding, and one layer's learning."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from methodbench.testing.parity import Vectors, stated, stated_by
from methodbench.torchkit.learned_rounding import nearest_offset, stretched_sigmoid
from methodbench.torchkit.quantizers import UniformGrid
from methodbench_quant.vit.adaround import (
    find_scale,
    harden,
    learn_rounding,
    on_levels,
    reconstruction_loss,
    temperature,
)

pytestmark = pytest.mark.vectors("quant_vision", "adaround")


def close(actual: Tensor, vectors: Vectors, name: str) -> None:
    rtol, atol = stated(vectors.meta["tolerance"]["quantizers"])
    expected = vectors.tensor(name)
    torch.testing.assert_close(actual.reshape(expected.shape), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("prefix", "method", "symmetric"),
    [
        ("max", "max", False),
        ("max_scale", "max_scale", False),
        ("mse", "mse", False),
        ("symmax", "max", True),
    ],
)
def test_scales_are_the_authors(vectors: Vectors, prefix: str, method: str, symmetric: bool) -> None:
    weight = vectors.tensor("w")
    grid = find_scale(weight, vectors.meta["w_bits"], method, symmetric)  # type: ignore[arg-type]
    assert grid.zero is not None
    close(grid.scale, vectors, f"{prefix}_delta")
    close(grid.zero, vectors, f"{prefix}_zp")
    close(grid.snap(weight), vectors, f"{prefix}_y")


@pytest.fixture
def grid(vectors: Vectors) -> UniformGrid:
    return find_scale(vectors.tensor("w"), vectors.meta["w_bits"], "mse")


@pytest.mark.parametrize("start", ["0", "_rand"])
def test_relaxed_and_decided_rounding_are_the_authors(
    vectors: Vectors, grid: UniformGrid, start: str
) -> None:
    weight, offset = vectors.tensor("w"), vectors.tensor(f"alpha{start}")
    if start == "0":
        close(nearest_offset(weight / grid.scale), vectors, "alpha0")
    close(stretched_sigmoid(offset), vectors, f"soft{start}")
    close(on_levels(weight, grid, stretched_sigmoid(offset)), vectors, f"w_soft{start}")
    close(harden(weight, grid, offset).dequantize(), vectors, f"w_hard{start}")


def test_annealing_is_the_authors(vectors: Vectors) -> None:
    steps = len(vectors["b_schedule"])
    beta = [
        temperature(step + 1, steps, vectors.meta["warmup"], tuple(vectors.meta["b_range"]))
        for step in range(steps)
    ]
    close(torch.tensor(beta, dtype=torch.float64), vectors, "b_schedule")


def test_learning_one_layer_is_the_authors(vectors: Vectors, grid: UniformGrid) -> None:
    meta, tolerance = vectors.meta, vectors.meta["tolerance"]
    x, weight, bias, target = (vectors.tensor(name) for name in ("x", "w", "b", "y_fp"))

    def forward(weights: Mapping[str, Tensor], batch: Tensor) -> Tensor:
        return batch @ weights["layer"].T + bias

    close(forward({"layer": weight}, x), vectors, "y_fp")
    nearest = forward({"layer": grid.snap(weight)}, x)
    close(nearest, vectors, "y_nearest")
    close(reconstruction_loss(nearest, target), vectors, "rec_nearest")
    learned = learn_rounding(
        forward,
        {"layer": weight},
        {"layer": grid},
        x,
        target,
        iterations=meta["iters"],
        batch=len(x),
        lr=stated_by(meta["optimizer"], r"lr ([\d.e-]+)"),
        weight=meta["round_loss_weight"],
        b_range=tuple(meta["b_range"]),
        warmup=meta["warmup"],
    )
    offset = learned.offsets["layer"]
    rtol, atol = stated(tolerance["alpha_final"])
    torch.testing.assert_close(offset, vectors.tensor("alpha_final"), rtol=rtol, atol=atol)
    final, expected = harden(weight, grid, offset).dequantize(), vectors.tensor("w_final")
    differs = ((final - expected).abs() / grid.scale).round()
    assert float(differs.max()) <= 1
    assert float((differs > 0).float().mean()) <= stated(tolerance["w_final"])[0]
    output = forward({"layer": final}, x)
    close(forward({"layer": expected}, x), vectors, "y_final")
    torch.testing.assert_close(
        reconstruction_loss(output, target),
        vectors.tensor("rec_final"),
        rtol=stated(tolerance["rec_final"])[0],
        atol=0,
    )
