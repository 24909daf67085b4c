"""Hadamard matrices, and products with them that never form the matrix.

A Hadamard matrix of order ``n`` has entries ±1 and orthogonal rows: ``H H^T = n I``. ``H / sqrt(n)`` spreads
one large coordinate evenly over all. Orders here are ``K * 2^m``: Sylvester's construction gives the power of
two, and ``K`` is 1 or one of the orders of which QuaRot and HALO ship a table. The tables follow from three
constructions (Paley 1933, Williamson 1944) with the first rows below, and equal the authors' element by element::

    H_n = H_K (x) H_(n/K);    x -> x H_n^T / sqrt(n)
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Literal

import torch
from torch import Tensor

from methodbench.errors import NotApplicableError

RotationMode = Literal["hadamard", "random"]

#: First rows of the circulant blocks A, B, C, D of Williamson's construction, by order.
_WILLIAMSON: dict[int, tuple[str, str, str, str]] = {
    52: ("+-+--++++--+-", "+---++++++---", "++-+--++--+-+", "+----+--+----"),
    100: (
        "+-++++----++--++----++++-",
        "+++-+++---+-++-+---+++-++",
        "+-++-+++-++----++-+++-++-",
        "+--++-+-+--------+-+-++--",
    ),
    156: (
        "+++--+-+-----+--++----++--+-----+-+--++",
        "++++---+--++----+-+--+-+----++--+---+++",
        "+++--++-+---+-+--+----+--+-+---+-++--++",
        "+---++-+-+-----+++-++-+++-----+-+-++---",
    ),
    172: (
        "+---++--++++-+-+++-++--++-+++-+-++++--++---",
        "++-++++++----+-+--++-++-++--+-+----++++++-+",
        "+++-+-++--+-+-++++-+----+-++++-+-+--++-+-++",
        "++---++++-+--+--++--------++--+--+-++++---+",
    ),
}
_PALEY_ONE = (12, 20, 44, 60, 108, 140)
_PALEY_TWO = (28, 36)

#: Orders that are no power of two, one per odd part; where two share it, the larger that divides comes first.
ORDERS = tuple(sorted([40, *_WILLIAMSON, *_PALEY_ONE, *_PALEY_TWO], reverse=True))

#: Largest matrix that a transform multiplies by at once; wider powers of two are split.
_FACTOR = 64


def hadamard_order(n: int) -> int:
    """Return ``K``, the order of the table that makes a Hadamard matrix of order ``n``; 1 for powers of two.

    Raises:
        NotApplicableError: ``n / K`` is a power of two for no known ``K``.
    """
    for order in (*ORDERS, 1):
        if n >= order and n % order == 0 and (n // order).bit_count() == 1:
            return order
    raise NotApplicableError(
        f"there is no Hadamard matrix of order {n}",
        f"Known orders are 2^m and 2^m times one of {', '.join(map(str, sorted(ORDERS)))}.",
    )


def has_hadamard(n: int) -> bool:
    """Whether :func:`hadamard` knows a matrix of order ``n``."""
    try:
        hadamard_order(n)
    except NotApplicableError:
        return False
    return True


def hadamard(n: int) -> Tensor:
    """Return the Hadamard matrix of order ``n``, int8 [n, n] of ±1: the table (x) Sylvester's matrix.

    Raises:
        NotApplicableError: no such matrix is known.
    """
    order = hadamard_order(n)
    return torch.kron(_table(order), _sylvester(n // order))


def hadamard_transform(x: Tensor, dim: int = -1, *, transpose: bool = False) -> Tensor:
    """Return ``x H^T / sqrt(n)`` along an axis of ``n`` entries (QuaRot's ``matmul_hadU``).

    Costs ``n`` times the sum of a few factors of at most 64 (or the table's order) instead of ``n^2``.

    Args:
        x: floating, any shape; differentiable.
        transpose: ``x H / sqrt(n)`` instead, which undoes it.

    Returns:
        A tensor of ``x``'s shape and dtype.

    Raises:
        NotApplicableError: no Hadamard matrix of that order is known.
    """
    if dim not in (-1, x.ndim - 1):
        return hadamard_transform(x.transpose(dim, -1), transpose=transpose).transpose(dim, -1)
    n = x.shape[-1]
    y = x
    rest = n
    for size in _factors(n):
        rest //= size
        factor = _scaled(size, x.dtype, x.device)
        factor = factor.T if transpose else factor
        y = y.reshape(-1, size) @ factor.T if rest == 1 else factor @ y.reshape(-1, size, rest)
    return y.reshape(x.shape)


def random_hadamard(n: int, generator: torch.Generator) -> Tensor:
    """Return an orthogonal matrix whose row ``i`` is ``s_i`` times row ``i`` of ``H^T / sqrt(n)``, float64
    [n, n].

    Args:
        generator: draws the signs ``s``, uniform over ±1.
    """
    return signed_hadamard(torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1)


def signed_hadamard(signs: Tensor) -> Tensor:
    """Return the transform of ``diag(signs)`` for signs ±1 [n]: float64 [n, n]."""
    return hadamard_transform(torch.diag(signs.double()))


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """Return an orthogonal matrix drawn from the Haar measure, float64 [n, n]."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * torch.sign(torch.diagonal(r))


def random_rotation(n: int, mode: RotationMode, generator: torch.Generator) -> Tensor:
    """Return :func:`random_hadamard` or :func:`random_orthogonal`, float64 [n, n]."""
    return random_hadamard(n, generator) if mode == "hadamard" else random_orthogonal(n, generator)


@cache
def _factors(n: int) -> tuple[int, ...]:
    order = hadamard_order(n)
    rest = n // order
    factors = [order] if order > 1 else []
    while rest > 1:
        factors.append(min(rest, _FACTOR))
        rest //= factors[-1]
    return tuple(factors) or (1,)


@lru_cache(maxsize=64)
def _scaled(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    table = _table(size) if size in ORDERS else _sylvester(size)
    return (table.double() / math.sqrt(size)).to(device=device, dtype=dtype)


def _sylvester(n: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.int8)
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    while matrix.shape[0] < n:
        matrix = torch.kron(two, matrix)
    return matrix


def _table(order: int) -> Tensor:
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    if order in _WILLIAMSON:
        return _williamson(_WILLIAMSON[order])
    if order in _PALEY_ONE:
        return torch.eye(order, dtype=torch.int8) + _paley_core(order - 1, skew=True)
    if order in _PALEY_TWO:
        core, eye = _paley_core(order // 2 - 1, skew=False), torch.eye(order // 2, dtype=torch.int8)
        return torch.cat([torch.cat([core + eye, core - eye], 1), torch.cat([core - eye, -core - eye], 1)])
    half = _table(order // 2)
    return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])


def _paley_core(q: int, *, skew: bool) -> Tensor:
    """Return the bordered matrix of quadratic residues ``chi((i - j) mod q)``, int8 [q + 1, q + 1]."""
    squares = {i * i % q for i in range(1, q)}
    chi = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, q)], dtype=torch.int8)
    index = torch.arange(q)
    core = torch.ones(q + 1, q + 1, dtype=torch.int8)
    core[0, 0] = 0
    core[0, 1:] = -1 if skew else 1
    core[1:, 1:] = chi[(index[:, None] - index[None, :]) % q]
    return core


def _williamson(rows: tuple[str, str, str, str]) -> Tensor:
    a, b, c, d = (_circulant(row) for row in rows)
    blocks = [[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]]
    return torch.cat([torch.cat(row, 1) for row in blocks])


def _circulant(row: str) -> Tensor:
    first = torch.tensor([1 if sign == "+" else -1 for sign in row], dtype=torch.int8)
    return torch.stack([first.roll(shift) for shift in range(len(row))])
