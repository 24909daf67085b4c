"""Hadamard matrices and transforms: exact, orthogonal, and never formed where that is dear."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methodbench.errors import NotApplicableError
from methodbench.torchkit.hadamard import (
    ORDERS,
    hadamard,
    hadamard_order,
    hadamard_transform,
    has_hadamard,
    random_hadamard,
    random_orthogonal,
)


@pytest.mark.parametrize("n", [1, 2, 8, *ORDERS, 36 * 16, 12 * 128])
def test_rows_are_orthogonal_in_integer_arithmetic(n: int) -> None:
    matrix = hadamard(n).long()
    assert torch.equal(matrix.abs(), torch.ones(n, n, dtype=torch.long))
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.long))


@settings(max_examples=30, deadline=None)
@given(
    n=st.sampled_from([1, 2, 16, 12, 48, 80, 112, 104, 256, 576, 1536, 11008]),
    dim=st.integers(0, 2),
    seed=st.integers(0, 10**6),
)
def test_the_transform_is_the_product_with_the_matrix_and_keeps_norms(n: int, dim: int, seed: int) -> None:
    shape = [2, 3, 2]
    shape[dim] = n
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = hadamard_transform(x, dim)
    torch.testing.assert_close(y.norm(dim=dim), x.norm(dim=dim), rtol=1e-12, atol=1e-12)
    if n < 2000:
        expected = torch.movedim(torch.movedim(x, dim, -1) @ hadamard(n).double().T / n**0.5, -1, dim)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("n", "order"), [(64, 1), (20, 20), (40, 40), (80, 40), (120, 60), (576, 36), (4, 1)]
)
def test_the_table_follows_from_the_odd_part(n: int, order: int) -> None:
    assert hadamard_order(n) == order


@pytest.mark.parametrize("n", [9, 36 * 5, 6, 92])
def test_an_order_without_a_table_is_refused_with_the_known_ones(n: int) -> None:
    assert not has_hadamard(n)
    with pytest.raises(NotApplicableError, match=f"of order {n}") as caught:
        hadamard(n)
    assert "12, 20, 28" in caught.value.hint


@pytest.mark.parametrize("make", [random_hadamard, random_orthogonal])
@pytest.mark.parametrize("n", [56, 64])
def test_random_rotations_are_orthogonal_and_follow_the_seed(make: object, n: int) -> None:
    assert callable(make)
    q = make(n, torch.Generator().manual_seed(3))
    torch.testing.assert_close(q @ q.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(q, make(n, torch.Generator().manual_seed(3)))
    assert not torch.equal(q, make(n, torch.Generator().manual_seed(4)))


def test_one_large_coordinate_is_spread_over_all() -> None:
    x = torch.zeros(576)
    x[100] = 1
    torch.testing.assert_close(hadamard_transform(x).abs(), torch.full((576,), 576**-0.5))


def test_heavy_tails_become_bell_shaped() -> None:
    x = torch.randn(64, 576, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 5

    def kurtosis(rows: torch.Tensor) -> float:
        centred = rows - rows.mean(1, keepdim=True)
        return float((centred.pow(4).mean(1) / centred.square().mean(1).square()).mean())

    assert kurtosis(x) > 30
    assert kurtosis(hadamard_transform(x)) < 3.3


def test_gradients_flow_through_the_transform() -> None:
    x = torch.randn(3, 48, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hadamard_transform, (x,))
