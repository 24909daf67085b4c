"""Statistics against scipy and against what must hold for any data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from methodbench.stats import (
    aggregate,
    bootstrap_interval,
    paired_difference,
    pareto_front,
    rank_intervals,
)

NORMAL = np.random.default_rng(0).normal(size=80)


def test_aggregates_leave_out_units_without_a_score() -> None:
    scores = np.array([1.0, np.nan, 3.0])
    assert aggregate(scores, "mean") == 2.0
    assert aggregate(scores, "median") == 2.0
    assert aggregate(scores, "exp-mean") == pytest.approx(np.exp(2.0))
    assert np.isnan(aggregate(np.array([np.nan]), "mean"))
    assert aggregate(np.array([5000.0]), "exp-mean") == np.inf


def test_the_bootstrap_interval_agrees_with_scipys_percentile_bootstrap() -> None:
    low, high = bootstrap_interval(NORMAL, "mean", draws=20_000)
    theirs = scipy_stats.bootstrap(
        (NORMAL,), np.mean, n_resamples=20_000, method="percentile", random_state=np.random.default_rng(1)
    ).confidence_interval
    assert low == pytest.approx(theirs.low, abs=0.01)
    assert high == pytest.approx(theirs.high, abs=0.01)


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(300):
        low, high = bootstrap_interval(rng.normal(size=60), "mean", draws=400)
        hits += low <= 0 <= high
    assert 0.90 <= hits / 300 <= 0.98


def test_there_is_no_interval_for_a_single_score() -> None:
    assert bootstrap_interval(np.array([1.0]), "mean") is None
    assert bootstrap_interval(NORMAL, "single") is None


def test_an_infinite_score_gives_an_infinite_end_and_no_nan() -> None:
    low, high = bootstrap_interval(np.array([1.0, 2.0, np.inf, 3.0]), "mean")
    assert high == np.inf
    assert not np.isnan(low)


def test_the_paired_p_value_agrees_with_scipys_permutation_test() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=12), rng.normal(size=12) + 0.5
    ours = paired_difference(a, b, "mean", draws=20_000)
    theirs = scipy_stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    )
    assert ours.p_value == pytest.approx(theirs.pvalue, abs=0.01)
    assert ours.difference == pytest.approx(np.mean(a - b))
    assert ours.low < ours.difference < ours.high


def test_pairing_finds_a_small_shift_that_unpaired_intervals_hide() -> None:
    noise = np.random.default_rng(0).normal(scale=10, size=50)
    result = paired_difference(noise + 0.1, noise, "mean")
    assert result.decided
    assert result.p_value < 0.01


def test_equal_scores_are_a_tie() -> None:
    result = paired_difference(NORMAL, NORMAL, "mean")
    assert (result.difference, result.p_value, result.decided) == (0.0, 1.0, False)


def test_scores_of_different_units_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        paired_difference(NORMAL, NORMAL[:-1], "mean")


def test_ranks_tell_clear_winners_and_leave_the_others_open() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=200)
    scores = np.stack([base, base + 1, base + 1 + rng.normal(scale=0.5, size=200), base + 9])
    ranks = rank_intervals(scores, "mean", lower_is_better=True)
    assert ranks[0].tolist() == [1, 1, 1]
    assert ranks[3].tolist() == [4, 4, 4]
    assert ranks[1, 1:].tolist() == ranks[2, 1:].tolist() == [2, 3]
    flipped = rank_intervals(-scores, "mean", lower_is_better=False)
    np.testing.assert_array_equal(ranks, flipped)


def test_equal_methods_share_the_better_rank_and_missing_scores_rank_last() -> None:
    scores = np.stack([NORMAL, NORMAL, np.full(80, np.nan)])
    ranks = rank_intervals(scores, "mean", lower_is_better=True)
    assert ranks[:, 0].tolist() == [1, 1, 3]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(2, 30), st.integers(0, 1000))
def test_rank_intervals_contain_the_rank_and_lie_within_bounds(methods: int, units: int, seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=(methods, units))
    ranks = rank_intervals(scores, "mean", lower_is_better=True, draws=50)
    assert (ranks[:, 1] <= ranks[:, 0]).all()
    assert (ranks[:, 0] <= ranks[:, 2]).all()
    assert ranks.min() >= 1
    assert ranks.max() <= methods


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 10), st.floats(-5, 5))
def test_intervals_follow_scale_and_shift(seed: int, scale: float, shift: float) -> None:
    scores = np.random.default_rng(seed).normal(size=20)
    low, high = bootstrap_interval(scores, "mean", draws=100)
    moved = bootstrap_interval(scores * scale + shift, "mean", draws=100)
    assert moved == pytest.approx((low * scale + shift, high * scale + shift))


def test_the_pareto_front_holds_what_nothing_beats_on_both() -> None:
    costs = np.array([[1.0, 5.0], [2.0, 2.0], [3.0, 3.0], [5.0, 1.0], [2.0, 2.0]])
    assert pareto_front(costs).tolist() == [True, True, False, True, True]
