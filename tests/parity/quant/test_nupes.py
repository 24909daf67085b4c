"""NUPES: the data-free operator and search against the vectors' reference implementation."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from methodbench.testing.parity import Vectors
from methodbench.torchkit.power_map import find_power_grid
from methodbench_quant.llm.nupes import NUPES, error_norm, search_grid, search_simplex

pytestmark = pytest.mark.vectors("quant", "nupes")


def weights(vectors: Vectors) -> list[Tensor]:
    return [vectors.tensor(name) for name in sorted(vectors) if re.fullmatch(r"W\d+", name)]


def tolerance(vectors: Vectors) -> dict[str, float]:
    return {name: vectors.meta["tolerance"][name] for name in ("rtol", "atol")}


def test_weights_get_the_reference_values(vectors: Vectors) -> None:
    found = [(name, re.fullmatch(r"(W\d+)_q_b(\d+)_a(\d+)", name)) for name in vectors]
    cases = [(name, match) for name, match in found if match]
    assert {int(match[2]) for _, match in cases} == set(vectors.meta["bits"])
    for name, match in cases:
        weight = vectors.tensor(match[1])
        ours = find_power_grid(weight, int(match[2]), int(match[3]) / 100).snap(weight)
        torch.testing.assert_close(ours.float(), vectors.tensor(name), **tolerance(vectors))


def test_integers_and_scales_are_the_reference(vectors: Vectors) -> None:
    found = [(name, re.fullmatch(r"(W\d+)_int_a(\d+)", name)) for name in vectors]
    cases = [(name, match) for name, match in found if match]
    assert cases
    for name, match in cases:
        weight, codes = vectors.tensor(match[1]), vectors.tensor(name)
        # The largest magnitude of a channel has the outermost code, which tells the bits.
        bits = int(codes.abs().max() + 1).bit_length()
        grid = find_power_grid(weight, bits, int(match[2]) / 100)
        assert torch.equal(grid.encode(weight).to(codes.dtype), codes)
        torch.testing.assert_close(
            grid.scale, vectors.tensor(name.replace("_int_", "_scale_")), **tolerance(vectors)
        )


def test_the_error_is_the_reference_on_every_exponent(vectors: Vectors) -> None:
    for bits in vectors.meta["bits"]:
        ours = [error_norm(weights(vectors), bits, float(a)) for a in vectors["eps_grid_a"]]
        torch.testing.assert_close(
            torch.tensor(ours, dtype=torch.float64), vectors.tensor(f"eps_grid_b{bits}"), **tolerance(vectors)
        )


def test_the_simplex_search_ends_near_the_least_error(vectors: Vectors) -> None:
    limits = vectors.meta["tolerance"]
    unique = re.search(r"not unique to better than ([\d.]+) \(([\d, ]+) bits\)", vectors.meta["notes"])
    assert unique is not None
    for bits in vectors.meta["bits"]:
        found = search_simplex(lambda a, bits=bits: error_norm(weights(vectors), bits, a), NUPES().start)
        error, least = error_norm(weights(vectors), bits, found), float(vectors[f"eps_min_b{bits}"])
        allowed = limits.get(f"eps_rtol_b{bits}", limits["eps_rtol"])
        assert error <= (1 + allowed) * least
        if str(bits) in unique[2].split(", "):
            assert found == pytest.approx(float(vectors[f"a_argmin_b{bits}"]), abs=float(unique[1]))


def test_the_grid_search_reaches_the_least_error_where_it_is_ragged(vectors: Vectors) -> None:
    for bits in vectors.meta["bits"]:
        found = search_grid(lambda a, bits=bits: error_norm(weights(vectors), bits, a))
        error = error_norm(weights(vectors), bits, found)
        assert error <= (1 + vectors.meta["tolerance"]["eps_rtol"]) * float(vectors[f"eps_min_b{bits}"])
