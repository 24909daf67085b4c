"""Statistics over per-unit scores: arrays in, arrays out; nothing here knows of methods or records.

Every random procedure is seeded, so that the same scores give the same interval everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DRAWS = 1000
LEVEL = 0.95
SEED = 7
#: Draws are made in slices of at most this many indices, to bound memory.
_SLICE = 4_000_000


def aggregate(scores: Array, how: str) -> float:
    """Reduce per-unit scores [units] to the value of a metric.

    Args:
        scores: NaN entries mark units without a score and are left out.
        how: ``mean``, ``exp-mean`` (perplexity from mean losses per unit), ``median`` or ``single``.

    Returns:
        The value; NaN when there is no score at all, infinity when the exponential overflows.
    """
    finite = scores[~np.isnan(scores)]
    if finite.size == 0:
        return float("nan")
    return float(_reduce(finite[None, :], how)[0])


def _reduce(rows: Array, how: str) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        match how:
            case "mean":
                return rows.mean(axis=1)
            case "exp-mean":
                return np.exp(rows.mean(axis=1))
            case "median":
                return np.median(rows, axis=1)
            case "single":
                return rows[:, 0]
    raise ValueError(f"unknown aggregate {how!r}")


def _resample(units: int, draws: int, seed: int, use: Callable[[NDArray[np.int64]], Array]) -> Array:
    """Apply ``use`` to bootstrap indices [draws, units], slice by slice; concatenate what it returns."""
    rng = np.random.default_rng(seed)
    step = max(1, _SLICE // max(units, 1))
    parts = []
    for start in range(0, draws, step):
        parts.append(use(rng.integers(0, units, size=(min(step, draws - start), units))))
    return np.concatenate(parts)


def _percentiles(values: Array, level: float) -> tuple[float, float]:
    tail = 100 * (1 - level) / 2
    # "lower"/"higher" keep the ends at drawn values: interpolation between infinities would give NaN.
    low = np.percentile(values, tail, method="lower")
    high = np.percentile(values, 100 - tail, method="higher")
    return float(low), float(high)


def bootstrap_interval(
    scores: Array, how: str, *, draws: int = DRAWS, level: float = LEVEL, seed: int = SEED
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of :func:`aggregate` over units (Efron & Tibshirani 1993, chapter 13).

    Returns:
        (low, high), or None where one unit, or an aggregate of ``single``, leaves nothing to resample.
    """
    finite = scores[~np.isnan(scores)]
    if finite.size < 2 or how == "single":
        return None
    values = _resample(finite.size, draws, seed, lambda index: _reduce(finite[index], how))
    return _percentiles(values, level)


def difference_interval(
    a: Array,
    b: Array | None,
    how: str,
    *,
    factors: tuple[float, float] = (1.0, 1.0),
    shift: float = 0.0,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = SEED,
) -> tuple[float, float] | None:
    """Paired percentile bootstrap of ``factors[0] * aggregate(a) - factors[1] * aggregate(b) + shift``.

    Units are resampled together for both sides (Efron & Tibshirani 1993, chapter 13).

    Args:
        a: scores [units].
        b: scores of the same units in the same order, or None for a difference to the number in ``shift``.

    Returns:
        (low, high), or None where fewer than two units were scored by both.

    Raises:
        ValueError: the two score different numbers of units.
    """
    if b is not None and a.shape != b.shape:
        raise ValueError(f"paired scores differ in length: {a.size} and {b.size}")
    missing = np.isnan(a) if b is None else np.isnan(a) | np.isnan(b)
    first, second = a[~missing], None if b is None else b[~missing]
    if first.size < 2 or how == "single":
        return None

    def drawn(index: NDArray[np.int64]) -> Array:
        left = factors[0] * _reduce(first[index], how) + shift
        return left if second is None else left - factors[1] * _reduce(second[index], how)

    with np.errstate(invalid="ignore"):
        values = _resample(first.size, draws, seed, drawn)
    # Two infinite aggregates differ by nothing that can be told.
    return _percentiles(np.nan_to_num(values, nan=0.0, posinf=np.inf, neginf=-np.inf), level)


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Difference of two aggregates over the same units, ``a`` minus ``b``."""

    value_a: float
    value_b: float
    difference: float
    low: float
    high: float
    p_value: float
    """Two-sided, from the sign-flip permutation test on per-unit differences."""
    units: int

    @property
    def decided(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def paired_difference(
    a: Array, b: Array, how: str, *, draws: int = DRAWS, level: float = LEVEL, seed: int = SEED
) -> PairedDifference:
    """Paired bootstrap of ``aggregate(a) - aggregate(b)``; both have one score per unit, in the same order.

    The interval resamples units (Efron & Tibshirani 1993, chapter 13); the p-value flips the signs of the per-unit
    differences (Good 2005, chapter 3), with the observed arrangement counted, so that it is never zero.

    Raises:
        ValueError: the two score different numbers of units, or share none.
    """
    if a.shape != b.shape:
        raise ValueError(f"paired scores differ in length: {a.size} and {b.size}")
    both = ~(np.isnan(a) | np.isnan(b))
    a, b = a[both], b[both]
    if a.size == 0:
        raise ValueError("no unit was scored by both")
    value_a, value_b = float(_reduce(a[None], how)[0]), float(_reduce(b[None], how)[0])
    if a.size == 1:
        difference = value_a - value_b
        return PairedDifference(value_a, value_b, difference, -np.inf, np.inf, 1.0, 1)
    with np.errstate(invalid="ignore"):
        values = _resample(a.size, draws, seed, lambda index: _reduce(a[index], how) - _reduce(b[index], how))
    low, high = _percentiles(np.nan_to_num(values, nan=0.0), level)
    return PairedDifference(
        value_a, value_b, value_a - value_b, low, high, _sign_flip_p(a - b, draws, seed), int(a.size)
    )


def _sign_flip_p(differences: Array, draws: int, seed: int) -> float:
    observed = abs(differences.mean())
    if not np.isfinite(observed):
        return float("nan")
    rng = np.random.default_rng(seed)
    step = max(1, _SLICE // differences.size)
    extreme = 1
    for start in range(0, draws, step):
        signs = rng.integers(0, 2, size=(min(step, draws - start), differences.size)) * 2 - 1
        # The tolerance counts arrangements that equal the observed one but for the order of summation.
        extreme += int((np.abs((signs * differences).mean(axis=1)) >= observed * (1 - 1e-12)).sum())
    return extreme / (draws + 1)


def rank_intervals(
    scores: Array,
    how: str,
    *,
    lower_is_better: bool,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = SEED,
) -> NDArray[np.int64]:
    """Ranks with bootstrap intervals, from paired per-unit scores.

    Args:
        scores: [methods, units], the same units for each method; NaN counts as worst.

    Returns:
        int64 [methods, 3]: rank (ties share the better one), lowest and highest rank of the interval.
    """
    worst = np.inf if lower_is_better else -np.inf
    filled = np.where(np.isnan(scores), worst, scores)
    sign = 1.0 if lower_is_better else -1.0

    def ranks(values: Array) -> NDArray[np.int64]:
        # 1 + number of methods that are strictly better, for [draws, methods]
        return 1 + (sign * values[:, None, :] < sign * values[:, :, None]).sum(axis=2)

    point = ranks(np.stack([_reduce(row[None], how) for row in filled], axis=1))[0]
    if filled.shape[1] < 2 or how == "single":
        return np.stack([point, point, point], axis=1)
    drawn = _resample(
        filled.shape[1],
        draws,
        seed,
        lambda index: ranks(np.stack([_reduce(row[index], how) for row in filled], axis=1)).astype(
            np.float64
        ),
    )
    tail = 100 * (1 - level) / 2
    low = np.percentile(drawn, tail, axis=0, method="lower").astype(np.int64)
    high = np.percentile(drawn, 100 - tail, axis=0, method="higher").astype(np.int64)
    return np.stack([point, np.minimum(low, point), np.maximum(high, point)], axis=1)


def pareto_front(costs: Array) -> NDArray[np.bool_]:
    """Return which of the points [points, criteria] no other point beats on every criterion (lower is better)."""
    better_or_equal = np.all(costs[None, :, :] <= costs[:, None, :], axis=2)
    strictly = np.any(costs[None, :, :] < costs[:, None, :], axis=2)
    return ~np.any(better_or_equal & strictly, axis=1)
