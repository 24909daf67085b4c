"""Statistics over per-unit scores: arrays in, arrays out; nothing here knows of methods or records.

Every random procedure is seeded, so that the same scores give the same interval everywhere. The random numbers are
simple enough to be made again, bit for bit, in any language with 32-bit integers:

*Words.* :func:`random_words` gives the 32-bit word number ``p`` of draw ``d`` under a key as lane ``p mod 3`` of
``pcg3d(p div 3, d, key)``, the hash of Jarzynski and Olano (Hash Functions for GPU Rendering, JCGT 9(3), 2020). All
sums and products are modulo 2^32::

    x, y, z  ->  x * 1664525 + 1013904223,  and the same for y and z
    x += y*z;  y += z*x;  z += x*y           (each line uses what the line before has made)
    x ^= x >> 16;  y ^= y >> 16;  z ^= z >> 16
    x += y*z;  y += z*x;  z += x*y

*Keys.* ``key = seed + 2654435769 * stream``; the bootstrap is stream 0, the permutation test stream 1.

*Indices.* Unit number ``p`` of bootstrap draw ``d`` is ``floor(word * units / 2^32)``; where fewer than 2^21 units are
drawn from, double precision computes that exactly.

*Signs.* Sign number ``p`` of permutation ``d`` is +1 where the highest bit of the word is set, else -1.

*Ends of intervals.* Sorted draws ``v[0..m-1]``: the lower end is ``v[floor((m-1) * tail)]``, the upper end
``v[ceil((m-1) * (1-tail))]`` with ``tail = (1-level)/2``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

DRAWS = 1000
LEVEL = 0.95
SEED = 7
#: Draws are made in slices of at most this many indices, to bound memory.
_SLICE = 1_000_000
#: Up to this many arrangements a permutation test counts all of them instead of drawing some.
_EXACT = 4096
#: Aggregates that differ by less, relatively, are ties: the order of a summation must not decide a rank.
_TIE = 1e-12
_BOOTSTRAP, _PERMUTATION = 0, 1


# --- random numbers ---------------------------------------------------------------------------------------------


def random_words(seed: int, stream: int, draws: range, count: int) -> NDArray[np.uint32]:
    """Return uint32 [len(draws), count] of uniform words; see the module's description for the algorithm.

    Args:
        draws: numbers of the draws, so that slices of a long series can be made one at a time.
        count: words per draw.
    """
    key = np.uint32((seed + 2654435769 * stream) % 2**32)
    blocks = -(-count // 3)
    lanes = np.empty((3, len(draws), blocks), dtype=np.uint32)
    lanes[0] = np.arange(blocks, dtype=np.uint32)
    lanes[1] = np.arange(draws.start, draws.stop, dtype=np.uint32)[:, None]
    lanes[2] = key
    lanes *= np.uint32(1664525)
    lanes += np.uint32(1013904223)
    _stir(*lanes)
    lanes ^= lanes >> np.uint32(16)
    _stir(*lanes)
    return lanes.transpose(1, 2, 0).reshape(len(draws), blocks * 3)[:, :count]


def _stir(x: NDArray[np.uint32], y: NDArray[np.uint32], z: NDArray[np.uint32]) -> None:
    x += y * z
    y += z * x
    z += x * y


def _resample(units: int, draws: int, seed: int, use: Callable[[Indices], Array]) -> Array:
    """Apply ``use`` to bootstrap indices [draws, units], slice by slice; concatenate what it returns."""
    step = max(1, _SLICE // max(units, 1))
    parts = []
    for start in range(0, draws, step):
        parts.append(use(_indices(units, range(start, min(start + step, draws)), seed)))
    return np.concatenate(parts)


def _indices(units: int, draws: range, seed: int) -> Indices:
    words = random_words(seed, _BOOTSTRAP, draws, units)
    return ((words.astype(np.uint64) * np.uint64(units)) >> np.uint64(32)).astype(np.int64)


def resampled_aggregates(rows: Array, how: str, *, draws: int = DRAWS, seed: int = SEED) -> Array:
    """Aggregates of bootstrap resamples of units, the same resamples for every row.

    Args:
        rows: scores [rows, units]; NaN-free.

    Returns:
        [draws, rows].
    """
    # Rows that are equal must stay equal: a matrix product may add them up in different orders.
    distinct, places = np.unique(rows, axis=0, return_inverse=True)
    units = rows.shape[1]
    values = np.empty((draws, len(distinct)))
    by_product = (
        np.isfinite(distinct).all(axis=1) if how in ("mean", "exp-mean") else np.zeros(len(distinct), bool)
    )
    step = max(1, _SLICE // units)
    if by_product.any():
        for start in range(0, draws, step):
            part = range(start, min(start + step, draws))
            values[start : part.stop, by_product] = (
                _counts(units, part, seed) @ distinct[by_product].T / units
            )
        if how == "exp-mean":
            with np.errstate(over="ignore"):
                np.exp(values, out=values, where=by_product)
    if not by_product.all():
        rest = distinct[~by_product]
        values[:, ~by_product] = _resample(
            units, draws, seed, lambda index: np.stack([_reduce(row[index], how) for row in rest], axis=1)
        )
    return values[:, places.ravel()]


@functools.lru_cache(maxsize=4)
def _counts(units: int, draws: range, seed: int) -> Array:
    """Return how often each unit is in each bootstrap draw, float64 [draws, units]."""
    index = _indices(units, draws, seed)
    flat = index + units * np.arange(len(draws))[:, None]
    return (
        np.bincount(flat.ravel(), minlength=units * len(draws)).reshape(len(draws), units).astype(np.float64)
    )


# --- one method: values and intervals ---------------------------------------------------------------------------


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


def _percentiles(values: Array, level: float) -> tuple[Array, Array]:
    """Return both ends of the interval over the first axis, at drawn values.

    Interpolation between infinities would give NaN.
    """
    tail = (1 - level) / 2
    last = len(values) - 1
    # The small terms keep 0.025 * 1000 from becoming 25.000000000000004.
    low, high = math.floor(last * tail + 1e-9), math.ceil(last * (1 - tail) - 1e-9)
    ordered = np.partition(values, (low, high), axis=0)
    return ordered[low], ordered[high]


def bootstrap_interval(
    scores: Array, how: str, *, draws: int = DRAWS, level: float = LEVEL, seed: int = SEED
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of :func:`aggregate` over units (Efron & Tibshirani 1993, chapter 13).

    Returns:
        (low, high), or None where one unit, or an aggregate of ``single``, leaves nothing to resample.
    """
    return difference_interval(scores, None, how, draws=draws, level=level, seed=seed)


def bootstrap_intervals(
    rows: Array, how: str, *, draws: int = DRAWS, level: float = LEVEL, seed: int = SEED
) -> list[tuple[float, float] | None]:
    """Return :func:`bootstrap_interval` of each of many rows [rows, units], sharing the resamples."""
    whole: NDArray[np.bool_] = np.logical_not(np.isnan(rows).any(axis=1))
    if rows.shape[1] < 2 or how == "single":
        return [None] * len(rows)
    found: list[tuple[float, float] | None] = [
        None if complete else bootstrap_interval(row, how, draws=draws, level=level, seed=seed)
        for row, complete in zip(rows, whole, strict=True)
    ]
    if whole.any():
        low, high = _percentiles(resampled_aggregates(rows[whole], how, draws=draws, seed=seed), level)
        for place, *ends in zip(np.flatnonzero(whole), low, high, strict=True):
            found[place] = (float(ends[0]), float(ends[1]))
    return found


# --- two methods ------------------------------------------------------------------------------------------------


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
        b: scores of the same units in the same order, or None for ``factors[0] * aggregate(a) + shift`` alone.

    Returns:
        (low, high), or None where fewer than two units were scored by both.

    Raises:
        ValueError: the two score different numbers of units.
    """
    first, second = (a[~np.isnan(a)], None) if b is None else _both(a, b)
    if first.size < 2 or how == "single":
        return None

    def drawn(index: Indices) -> Array:
        left = factors[0] * _reduce(first[index], how) + shift
        return left if second is None else left - factors[1] * _reduce(second[index], how)

    with np.errstate(invalid="ignore"):
        values = _resample(first.size, draws, seed, drawn)
    # Two infinite aggregates differ by nothing that can be told.
    values[np.isnan(values)] = 0.0
    low, high = _percentiles(values, level)
    return float(low), float(high)


def _both(a: Array, b: Array) -> tuple[Array, Array]:
    """Return the scores of the units that both scored."""
    if a.shape != b.shape:
        raise ValueError(f"paired scores differ in length: {a.size} and {b.size}")
    both = ~(np.isnan(a) | np.isnan(b))
    return a[both], b[both]


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

    The interval is :func:`difference_interval`, the p-value :func:`permutation_test`. A single unit decides
    nothing: its interval is infinite.

    Raises:
        ValueError: the two score different numbers of units, or share none.
    """
    a, b = _both(a, b)
    if a.size == 0:
        raise ValueError("no unit was scored by both")
    value_a, value_b = float(_reduce(a[None], how)[0]), float(_reduce(b[None], how)[0])
    interval = difference_interval(a, b, how, draws=draws, level=level, seed=seed)
    low, high = interval or (-math.inf, math.inf)
    with np.errstate(invalid="ignore"):
        p_value = permutation_test(a - b, draws=draws, seed=seed)
    return PairedDifference(value_a, value_b, value_a - value_b, low, high, p_value, int(a.size))


def paired_differences(
    rows: Array, reference: Array, how: str, *, draws: int = DRAWS, level: float = LEVEL, seed: int = SEED
) -> list[PairedDifference]:
    """Return :func:`paired_difference` of each of many rows [rows, units] and one reference [units].

    All scores are finite and there are two units or more.
    """
    both = np.concatenate([rows, reference[None]])
    drawn = resampled_aggregates(both, how, draws=draws, seed=seed)
    low, high = _percentiles(drawn[:, :-1] - drawn[:, -1:], level)
    values = _reduce(both, how)
    p_values = permutation_tests(rows - reference, draws=draws, seed=seed)
    return [
        PairedDifference(
            value_a=float(values[place]),
            value_b=float(values[-1]),
            difference=float(values[place] - values[-1]),
            low=float(low[place]),
            high=float(high[place]),
            p_value=float(p_values[place]),
            units=rows.shape[1],
        )
        for place in range(len(rows))
    ]


def permutation_test(differences: Array, *, draws: int = DRAWS, seed: int = SEED) -> float:
    """Two-sided sign-flip test that paired differences [units] are centred on zero.

    Under the hypothesis every difference is as likely with the other sign (Good, Permutation, Parametric and
    Bootstrap Tests of Hypotheses, 2005, chapter 3). Up to 12 units every arrangement is counted; beyond that
    ``draws`` of them, plus the observed one, so that p is never zero (Phipson & Smyth 2010).

    Returns:
        The share of arrangements whose mean is at least as far from zero as the observed one; NaN where the mean is
        not finite.
    """
    return (
        float(permutation_tests(differences[None], draws=draws, seed=seed)[0])
        if differences.size
        else math.nan
    )


def permutation_tests(rows: Array, *, draws: int = DRAWS, seed: int = SEED) -> Array:
    """Return :func:`permutation_test` of each row of differences [rows, units], sharing the arrangements."""
    with np.errstate(invalid="ignore"):
        observed = np.abs(rows.sum(axis=1))
    finite = np.isfinite(observed) & np.isfinite(rows).all(axis=1)
    found = np.full(len(rows), np.nan)
    if not finite.any():
        return found
    # The tolerance counts arrangements that equal the observed one but for the order of summation.
    bar = observed[finite] * (1 - 1e-12)
    units = rows.shape[1]
    exact = 2**units <= _EXACT
    total = 2**units if exact else draws
    extreme = np.zeros(finite.sum(), dtype=np.int64)
    step = max(1, _SLICE // units)
    for start in range(0, total, step):
        part = range(start, min(start + step, total))
        if exact:
            signs = (np.arange(part.start, part.stop)[:, None] >> np.arange(units) & 1) * 2.0 - 1.0
        else:
            signs = np.where(random_words(seed, _PERMUTATION, part, units) >> np.uint32(31), 1.0, -1.0)
        extreme += (np.abs(signs @ rows[finite].T) >= bar).sum(axis=0)
    found[finite] = extreme / total if exact else (extreme + 1) / (total + 1)
    return found


def wilcoxon(differences: Array) -> tuple[float, float]:
    """Wilcoxon's signed-rank test of paired differences [units], two-sided (Biometrics Bulletin 1(6), 1945).

    Zeros are dropped. The distribution is exact for at most 50 differences without ties or zeros, else normal with
    the correction of the variance for ties, without a correction for continuity (Hollander & Wolfe 1999, 3.1).

    Returns:
        (statistic, p): the smaller of the two sums of ranks, and the p-value; (0, 1) where all are zero.
    """
    kept = differences[(differences != 0) & ~np.isnan(differences)]
    n = kept.size
    if n == 0:
        return 0.0, 1.0
    ranks, ties = _ranks(np.abs(kept)[None])
    positive = float(ranks[0][kept > 0].sum())
    statistic = min(positive, n * (n + 1) / 2 - positive)
    if n <= 50 and n == differences.size and ties[0] == 0:
        counts = np.zeros(n * (n + 1) // 2 + 1)
        counts[0] = 1.0
        for rank in range(1, n + 1):
            counts[rank:] += counts[:-rank].copy()
        return statistic, float(min(1.0, 2 * counts[: int(statistic) + 1].sum() / 2.0**n))
    variance = n * (n + 1) * (2 * n + 1) / 24 - ties[0] / 48
    z = abs(statistic - n * (n + 1) / 4) / math.sqrt(variance)
    return statistic, math.erfc(z / math.sqrt(2))


def _ranks(rows: Array) -> tuple[Array, Array]:
    """Return mean ranks (from 1, ascending) within each row, and per row the sum of ``t^3 - t`` over its ties."""
    ranks, ties = np.empty(rows.shape), np.empty(len(rows))
    for index, row in enumerate(rows):
        _, place, counts = np.unique(row, return_inverse=True, return_counts=True)
        ranks[index] = (np.cumsum(counts) - (counts - 1) / 2)[place]
        ties[index] = (counts.astype(np.float64) ** 3 - counts).sum()
    return ranks, ties


def holm(p_values: Array) -> Array:
    """Return Holm's step-down adjusted p-values (Scandinavian Journal of Statistics 6(2), 1979), in the given order.

    NaN stays NaN and does not count as a test.
    """
    adjusted = np.full(p_values.shape, np.nan)
    tests = np.flatnonzero(~np.isnan(p_values))
    order = tests[np.argsort(p_values[tests], kind="stable")]
    steps = np.maximum.accumulate(p_values[order] * np.arange(order.size, 0, -1))
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted


# --- several methods --------------------------------------------------------------------------------------------


def rank_intervals(
    scores: Array,
    how: str,
    *,
    lower_is_better: bool,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = SEED,
) -> Indices:
    """Ranks with bootstrap intervals, from paired per-unit scores (Hall & Miller, Annals of Statistics 37, 2009).

    Args:
        scores: [methods, units], the same units for each method; NaN counts as worst.

    Returns:
        int64 [methods, 3]: rank (ties share the better one), lowest and highest rank of the interval. Aggregates
        that differ in no more than the rounding of their sums are ties.
    """
    worst = np.inf if lower_is_better else -np.inf
    filled = np.where(np.isnan(scores), worst, scores)
    sign = 1.0 if lower_is_better else -1.0

    def ranks(values: Array) -> Array:
        # 1 + number of methods that are better, for [draws, methods]
        signed = sign * values
        with np.errstate(invalid="ignore"):
            bar = np.where(np.isfinite(signed), signed - _TIE * np.abs(signed), signed)
        return 1.0 + (signed[:, None, :] < bar[:, :, None]).sum(axis=2)

    point = ranks(np.stack([_reduce(row[None], how) for row in filled], axis=1))[0]
    if filled.shape[1] < 2 or how == "single":
        return np.stack([point, point, point], axis=1).astype(np.int64)
    drawn = resampled_aggregates(filled, how, draws=draws, seed=seed)
    # A slice of draws at a time: every pair of methods is compared in each.
    step = max(1, _SLICE // filled.shape[0] ** 2)
    places = np.concatenate([ranks(drawn[start : start + step]) for start in range(0, draws, step)])
    low, high = _percentiles(places, level)
    return np.stack([point, np.minimum(low, point), np.maximum(high, point)], axis=1).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Friedman:
    """Friedman's test over tasks, and what Nemenyi's comparison of all pairs needs."""

    statistic: float
    p_value: float
    mean_ranks: Array
    """float64 [methods]; 1 is best."""
    critical_difference: float
    """Mean ranks that differ by more are told apart."""
    tasks: int

    @property
    def pairwise_p(self) -> Array:
        """float64 [methods, methods], Nemenyi's p-values; 1 on the diagonal."""
        methods = self.mean_ranks.size
        error = math.sqrt(methods * (methods + 1) / (6 * self.tasks))
        apart = np.abs(self.mean_ranks[:, None] - self.mean_ranks[None, :]) / error * math.sqrt(2)
        p_values: Array = np.clip(1 - studentized_range_cdf(apart, methods), 0.0, 1.0)
        return p_values


def friedman(values: Array, *, lower_is_better: bool, level: float = LEVEL) -> Friedman:
    """Friedman's test with ties (JASA 32, 1937) and Nemenyi's critical difference (Demsar, JMLR 7, 2006, 3.2.2).

    Args:
        values: [methods, tasks], one value of each method on each task; without NaN.

    Raises:
        ValueError: fewer than two methods or tasks, or a value is NaN.
    """
    methods, tasks = values.shape
    if methods < 2 or tasks < 2:
        raise ValueError(f"needs two methods and two tasks, got {methods} and {tasks}")
    if np.isnan(values).any():
        raise ValueError("every method needs a value on every task")
    ranks, ties = _ranks(values.T if lower_is_better else -values.T)
    mean_ranks = ranks.mean(axis=0)
    spread = 12 * tasks / (methods * (methods + 1)) * (((mean_ranks - (methods + 1) / 2) ** 2).sum())
    correction = 1 - ties.sum() / (tasks * methods * (methods**2 - 1))
    statistic = float(spread / correction) if correction > 0 else 0.0
    error = math.sqrt(methods * (methods + 1) / (6 * tasks))
    return Friedman(
        statistic=statistic,
        p_value=chi_square_tail(statistic, methods - 1),
        mean_ranks=mean_ranks,
        critical_difference=studentized_range_quantile(level, methods) / math.sqrt(2) * error,
        tasks=tasks,
    )


def chi_square_tail(statistic: float, degrees: int) -> float:
    """P(chi-square with ``degrees`` of freedom > statistic): the finite sum for whole degrees (Abramowitz & Stegun
    1964, 26.4.4 and 26.4.5)."""
    half = statistic / 2
    if degrees % 2:
        tail, term, first = math.erfc(math.sqrt(half)), math.exp(-half) * math.sqrt(half / math.pi) * 2, 1.5
    else:
        tail, term, first = 0.0, math.exp(-half), 1.0
    for step in range(degrees // 2):
        tail += term
        term *= half / (first + step)
    return min(tail, 1.0)


def _normal_cdf(z: Array) -> Array:
    return 0.5 * (1 + np.asarray(_ERF(z / math.sqrt(2)), dtype=np.float64))


_ERF = np.frompyfunc(math.erf, 1, 1)


def studentized_range_cdf(q: Array, groups: int) -> Array:
    """P(range of ``groups`` standard normals <= q): the studentized range with infinitely many degrees of freedom.

    ``k * integral of phi(z) * (Phi(z) - Phi(z - q))^(k-1)`` (Tukey 1953), by the trapezoidal rule on [-9, 9], whose
    error for a function as smooth as this is that of rounding.
    """
    z = np.linspace(-9.0, 9.0, 1201)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    flat = np.atleast_1d(q).reshape(-1, 1)
    inner = (_normal_cdf(z) - _normal_cdf(z - flat)) ** (groups - 1)
    found = groups * (density * inner).sum(axis=1) * (z[1] - z[0])
    result: Array = np.clip(found, 0.0, 1.0).reshape(np.shape(q))
    return result


def studentized_range_quantile(level: float, groups: int) -> float:
    """Return q with :func:`studentized_range_cdf` (q) = level, by bisection to the last bits."""
    low, high = 0.0, 40.0
    for _ in range(55):
        middle = (low + high) / 2
        if float(studentized_range_cdf(np.array([middle]), groups)[0]) < level:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@dataclass(frozen=True, slots=True)
class Strengths:
    """Bradley-Terry strengths with intervals."""

    log_strength: Array
    """float64 [methods], natural logarithms that sum to zero."""
    low: Array
    high: Array

    def win_probability(self) -> Array:
        """Return float64 [methods, methods]: how likely the row beats the column on a new task."""
        difference = self.log_strength[:, None] - self.log_strength[None, :]
        result: Array = 1 / (1 + np.exp(-difference))
        return result


def bradley_terry(
    values: Array,
    *,
    lower_is_better: bool,
    prior: float = 0.5,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = SEED,
) -> Strengths:
    """Bradley-Terry model of pairwise wins over tasks (Bradley & Terry, Biometrika 39, 1952), by Newton's method.

    Each task is a round in which every pair that has values there plays once; equal values are half a win each. The
    intervals resample tasks.

    Args:
        values: [methods, tasks]; NaN where a method was not run.
        prior: wins that every method is given over every other, which keeps the strengths of one that always wins
            finite; 0 gives the plain maximum of the likelihood, without intervals.

    Raises:
        ValueError: without a prior, the likelihood has no maximum: a group of methods always wins or never plays.
    """
    methods, tasks = values.shape
    signed = values if lower_is_better else -values
    a, b = signed[:, None, :], signed[None, :, :]
    wins = (a < b) + 0.5 * (a == b)
    wins[np.arange(methods), np.arange(methods)] = 0.0
    given = prior * (1 - np.eye(methods))
    point = _strengths((wins.sum(axis=2) + given)[None])[0]
    if not np.isfinite(point).all():
        raise ValueError("some methods always win, or were never compared: give a prior")
    if tasks < 2 or prior == 0:
        infinite = np.full(methods, np.inf)
        return Strengths(point, -infinite, infinite)
    flat = wins.reshape(methods * methods, tasks)

    def drawn(index: Indices) -> Array:
        counts = np.zeros((len(index), tasks))
        np.add.at(counts, (np.arange(len(index))[:, None], index), 1.0)
        return _strengths((counts @ flat.T).reshape(-1, methods, methods) + given)

    low, high = _percentiles(_resample(tasks, draws, seed, drawn), level)
    return Strengths(point, low, high)


def _strengths(wins: Array) -> Array:
    """Return the maximum-likelihood log strengths [draws, methods] of wins [draws, methods, methods]; else NaN."""
    methods = wins.shape[1]
    played = wins + wins.transpose(0, 2, 1)
    theta = np.zeros(wins.shape[:2])
    centre = np.ones((methods, methods)) / methods
    for _ in range(100):
        expected = 1 / (1 + np.exp(np.clip(theta[:, None, :] - theta[:, :, None], -700, 700)))
        gradient = (wins - played * expected).sum(axis=2)
        weight = played * expected * (1 - expected)
        hessian = np.eye(methods) * weight.sum(axis=2)[:, :, None] - weight
        try:
            # The likelihood does not change along (1, ..., 1); the added matrix fixes the sum at zero.
            step = np.linalg.solve(hessian + centre, gradient[..., None])[..., 0]
        except np.linalg.LinAlgError:
            return np.full_like(theta, np.nan)
        # Newton's steps are cut where the quadratic model cannot be trusted.
        theta += step / np.maximum(1.0, np.abs(step).max(axis=1, keepdims=True))
        if np.abs(step).max() < 1e-12:
            return theta - theta.mean(axis=1, keepdims=True)
    still = np.abs(step).max(axis=1, keepdims=True) < 1e-9
    return np.where(still, theta - theta.mean(axis=1, keepdims=True), np.nan)


# --- optimizers -------------------------------------------------------------------------------------------------


def performance_ratios(costs: Array) -> Array:
    """Return each cost over the best cost on its problem (Dolan & More, Mathematical Programming 91, 2002).

    Args:
        costs: [methods, problems], positive, lower is better; NaN and infinity are failures.

    Returns:
        float64 [methods, problems] of ratios, 1 for the best; infinity for failures and where nobody succeeded.

    Raises:
        ValueError: a cost is zero or negative, so that a ratio says nothing.
    """
    if (costs <= 0).any():
        raise ValueError("costs must be positive")
    filled = np.where(np.isnan(costs), np.inf, costs)
    with np.errstate(invalid="ignore"):
        ratios = filled / filled.min(axis=0, keepdims=True)
    return np.where(np.isnan(ratios), np.inf, ratios)


def performance_profile(costs: Array, taus: Array) -> Array:
    """Performance profile: the share of problems that a method solves within ``tau`` times the best cost.

    Args:
        costs: as in :func:`performance_ratios`.
        taus: [points], from 1 upwards.

    Returns:
        float64 [methods, points].
    """
    ratios = performance_ratios(costs)
    result: Array = (ratios[:, None, :] <= taus[None, :, None]).mean(axis=2)
    return result


def profile_scores(costs: Array, largest: float = 4.0) -> Array:
    """Return AlgoPerf's benchmark scores: the mean of each performance profile from 1 to ``largest`` (Dahl et al.,
    arXiv 2306.07179, equation 4).

    The profile is a step function, so its integral is exact: a problem that is solved at the ratio r adds
    (largest - r) / (largest - 1), and nothing beyond ``largest``.

    Args:
        costs: as in :func:`performance_ratios`, for example steps to a target with infinity for misses.

    Returns:
        float64 [methods] in [0, 1]; 1 for a method that is the best everywhere.

    Raises:
        ValueError: ``largest`` is not above 1, or a cost is not positive.
    """
    if not largest > 1:
        raise ValueError(f"the largest ratio must be above 1, not {largest}")
    shares: Array = np.clip((largest - performance_ratios(costs)) / (largest - 1), 0.0, None).mean(axis=1)
    return shares


def time_to_target(
    curves: Array, target: float, *, lower_is_better: bool, steps: Array | None = None
) -> Array:
    """Return when each curve first reaches the target (Dahl et al., Benchmarking Neural Network Training
    Algorithms, arXiv 2306.07179).

    Args:
        curves: [runs, points]; NaN never reaches anything.
        steps: [points] what the points cost (steps, seconds); 0, 1, 2 ... by default.

    Returns:
        float64 [runs]; infinity where the target is not reached.
    """
    with np.errstate(invalid="ignore"):
        reached = curves <= target if lower_is_better else curves >= target
    at = np.arange(curves.shape[1], dtype=np.float64) if steps is None else steps
    first: Array = np.where(reached.any(axis=1), at[reached.argmax(axis=1)], np.inf)
    return first


def expected_time(times: Array, budgets: Array) -> float:
    """Expected running time to a target with restarts (Auger & Hansen, CEC 2005): spent over number of successes.

    Args:
        times: [runs] from :func:`time_to_target`.
        budgets: [runs] what a run that fails has spent.
    """
    solved = np.isfinite(times)
    if not solved.any():
        return math.inf
    return float(np.where(solved, times, budgets).sum() / solved.sum())


# --- several criteria, several links ----------------------------------------------------------------------------


def pareto_front(costs: Array) -> NDArray[np.bool_]:
    """Return which of the points [points, criteria] no other dominates (Kung, Luccio & Preparata, JACM 22, 1975).

    A point dominates another that is no better on any criterion and worse on one; lower is better.
    """
    better_or_equal = np.all(costs[None, :, :] <= costs[:, None, :], axis=2)
    strictly = np.any(costs[None, :, :] < costs[:, None, :], axis=2)
    return ~np.any(better_or_equal & strictly, axis=1)


@dataclass(frozen=True, slots=True)
class Interaction:
    """What links do together beyond what they do alone."""

    alone: tuple[float, ...]
    """Effect of each link alone: its value minus the baseline's."""
    together: float
    """Effect of the chain."""
    excess: float
    """``together`` minus the sum of ``alone``."""
    low: float
    high: float
    units: int


def interaction(
    baseline: Array,
    links: Sequence[Array],
    chain: Array,
    how: str,
    *,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = SEED,
) -> Interaction:
    """Departure of a chain from additivity, with a paired bootstrap interval (interaction contrast of a factorial
    design: Fisher, The Design of Experiments, 1935, chapter 6).

    Effects add on the scale on which units are averaged: ``exp-mean`` scores are compared by their mean (for
    perplexity, in nats per token), since there effects multiply.

    Args:
        baseline: scores [units] of the model that nothing was done to.
        links: scores of each link alone, on the same units.
        chain: scores of all links one after the other.

    Raises:
        ValueError: the scores differ in length, or no unit was scored by all.
    """
    if len({scores.shape for scores in (baseline, *links, chain)}) != 1:
        raise ValueError("paired scores differ in length")
    rows = np.stack([baseline, *links, chain])
    rows = rows[:, ~np.isnan(rows).any(axis=0)]
    if rows.shape[1] == 0:
        raise ValueError("no unit was scored by all")
    scale = "mean" if how == "exp-mean" else how

    def excess(index: Indices) -> Array:
        values = np.stack([_reduce(row[index], scale) for row in rows])
        return values[-1] - values[1:-1].sum(axis=0) + (len(links) - 1) * values[0]

    values = [float(_reduce(row[None], scale)[0]) for row in rows]
    alone = tuple(value - values[0] for value in values[1:-1])
    together = values[-1] - values[0]
    low, high = -math.inf, math.inf
    if rows.shape[1] >= 2 and how != "single":
        with np.errstate(invalid="ignore"):
            drawn = _resample(rows.shape[1], draws, seed, excess)
        drawn[np.isnan(drawn)] = 0.0
        low, high = map(float, _percentiles(drawn, level))
    return Interaction(alone, together, together - sum(alone), low, high, int(rows.shape[1]))


def student_t_tail(statistic: float, degrees: float) -> float:
    """Return the two-sided tail probability of Student's t with real ``degrees`` of freedom.

    It is the regularized incomplete beta function at degrees / (degrees + statistic**2), by its continued fraction
    (Press et al. 2007, section 6.4).
    """
    if np.isnan(statistic):
        return float("nan")
    if np.isinf(statistic):
        return 0.0
    x = degrees / (degrees + statistic * statistic)
    a, b = degrees / 2, 0.5
    if x >= 1:
        return 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    return _incomplete_beta(a, b, x)


def _incomplete_beta(a: float, b: float, x: float) -> float:
    if x <= 0:
        return 0.0
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    tiny = 1e-300
    c, d = 1.0, 1 / max(1 - (a + b) * x / (a + 1), tiny)
    value = d
    for m in range(1, 500):
        before = value
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / (_away_from_zero(1 + term * d, tiny))
            c = _away_from_zero(1 + term / c, tiny)
            value *= c * d
        if abs(value - before) <= 1e-15 * abs(value):
            break
    return front * value / a


def _away_from_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny


def seeds_and_units_test(differences: Array) -> tuple[float, float]:
    """Test whether two methods differ on average over seeds and units, both drawn at random.

    The variance of the mean is the sum of what seeds and what units contribute, which counts what both share twice
    and so errs on the safe side (Owen 2007, the pigeonhole bootstrap); the degrees of freedom are Satterthwaite's.

    Args:
        differences: [seeds, units], paired; at least two seeds.

    Returns:
        The mean difference and its two-sided p-value: 1 when all differences are zero, and 0 when they are the same
        for every seed and unit.
    """
    seeds, units = differences.shape
    mean = float(differences.mean())
    of_seeds = float(differences.mean(axis=1).var(ddof=1)) / seeds
    of_units = float(differences.mean(axis=0).var(ddof=1)) / units if units > 1 else 0.0
    variance = of_seeds + of_units
    if variance == 0:
        return mean, 0.0 if mean else 1.0
    pieces = of_seeds**2 / (seeds - 1) + (of_units**2 / (units - 1) if units > 1 else 0.0)
    return mean, student_t_tail(mean / math.sqrt(variance), variance**2 / pieces)


def alpha_spent(rate: float, looks: int) -> Array:
    """Split an error rate over looks at growing data, so that the sum holds whatever the looks have in common.

    The pieces are those of Lan and DeMets' (1983) spending function of Pocock type, nearly even over the looks.

    Returns:
        [looks], which sum to ``rate``.
    """
    share = np.arange(looks + 1) / looks
    return np.diff(rate * np.log1p((math.e - 1) * share))
