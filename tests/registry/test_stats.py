"""Statistics against scipy and against what must hold for any data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from methodbench import stats
from methodbench.stats import (
    aggregate,
    bootstrap_interval,
    bradley_terry,
    chi_square_tail,
    difference_interval,
    expected_time,
    friedman,
    holm,
    interaction,
    paired_difference,
    pareto_front,
    performance_profile,
    performance_ratios,
    permutation_test,
    profile_scores,
    random_words,
    rank_intervals,
    studentized_range_cdf,
    studentized_range_quantile,
    time_to_target,
    wilcoxon,
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


def pcg3d(x: int, y: int, z: int) -> tuple[int, int, int]:
    """The hash as the module's description has it, in plain integers."""
    mask = 0xFFFFFFFF
    x, y, z = ((value * 1664525 + 1013904223) & mask for value in (x, y, z))
    x = (x + y * z) & mask
    y = (y + z * x) & mask
    z = (z + x * y) & mask
    x, y, z = (value ^ value >> 16 for value in (x, y, z))
    x = (x + y * z) & mask
    y = (y + z * x) & mask
    z = (z + x * y) & mask
    return x, y, z


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 1), st.integers(0, 2000), st.integers(1, 40))
def test_random_words_are_those_of_the_description(seed: int, stream: int, draw: int, count: int) -> None:
    key = (seed + 2654435769 * stream) % 2**32
    expected = [pcg3d(position // 3, draw, key)[position % 3] for position in range(count)]
    assert random_words(seed, stream, range(draw, draw + 1), count)[0].tolist() == expected


def test_words_do_not_depend_on_how_draws_are_sliced() -> None:
    whole = random_words(7, 0, range(50), 17)
    np.testing.assert_array_equal(whole[20:30], random_words(7, 0, range(20, 30), 17))


@pytest.mark.parametrize("seed", [0, 7, 123456])
def test_resampled_units_are_uniform_and_independent(seed: int) -> None:
    units, draws = 97, 3000
    words = random_words(seed, 0, range(draws), units)
    index = (words.astype(np.uint64) * units >> np.uint64(32)).astype(int)
    assert scipy_stats.chisquare(np.bincount(index.ravel(), minlength=units)).pvalue > 1e-3
    pairs = index[:, :-1] * units + index[:, 1:]
    assert scipy_stats.chisquare(np.bincount(pairs.ravel(), minlength=units**2)).pvalue > 1e-3
    draws_apart = index[:-1] * units + index[1:]
    assert scipy_stats.chisquare(np.bincount(draws_apart.ravel(), minlength=units**2)).pvalue > 1e-3
    bits = words[:, :, None] >> np.arange(32, dtype=np.uint32) & 1
    assert np.abs(bits.mean(axis=(0, 1)) - 0.5).max() < 5 * 0.5 / np.sqrt(words.size)
    # How often a unit is drawn, over draws: binomial.
    counts = np.stack([np.bincount(row, minlength=units) for row in index])
    assert counts.var() == pytest.approx(1 - 1 / units, rel=0.02)


def test_the_difference_interval_scales_and_shifts_each_side() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(5, 1, 40), rng.normal(3, 1, 40)
    plain = difference_interval(a, b, "mean")
    assert difference_interval(a, b, "mean", shift=2.0) == pytest.approx((plain[0] + 2, plain[1] + 2))
    doubled = difference_interval(a, b, "mean", factors=(1.0, 2.0))
    assert doubled == pytest.approx(difference_interval(a, 2 * b, "mean"))
    alone = difference_interval(a, None, "mean", factors=(2.0, 1.0), shift=-1.0)
    assert alone == pytest.approx(tuple(2 * end - 1 for end in bootstrap_interval(a, "mean")))
    assert difference_interval(a[:1], b[:1], "mean") is None


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(0, 1000))
def test_the_permutation_test_counts_every_arrangement_of_few_units(units: int, seed: int) -> None:
    differences = np.random.default_rng(seed).normal(size=units) + 0.3
    theirs = scipy_stats.permutation_test(
        (differences, np.zeros(units)),
        lambda x, y: np.mean(x - y),
        permutation_type="samples",
        n_resamples=np.inf,
    )
    assert permutation_test(differences) == pytest.approx(theirs.pvalue, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(0, 10_000), st.booleans(), st.booleans())
def test_wilcoxon_agrees_with_scipy(units: int, seed: int, ties: bool, zeros: bool) -> None:
    differences = np.random.default_rng(seed).normal(size=units) + 0.2
    if ties:
        differences = np.round(differences, 1)
    if zeros:
        differences[::5] = 0.0
    if not differences.any():
        assert wilcoxon(differences) == (0.0, 1.0)
        return
    statistic, p_value = wilcoxon(differences)
    exact = units <= 50 and not zeros and len(set(np.abs(differences))) == units and 0.0 not in differences
    theirs = scipy_stats.wilcoxon(differences, correction=False, method="exact" if exact else "approx")
    assert statistic == pytest.approx(theirs.statistic, abs=1e-6)
    assert p_value == pytest.approx(theirs.pvalue, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_agrees_with_statsmodels(p_values: list[float]) -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    ours = holm(np.array(p_values))
    np.testing.assert_allclose(ours, multitest.multipletests(p_values, method="holm")[1], atol=1e-12)
    with_gap = holm(np.array([p_values[0], np.nan, *p_values[1:]]))
    assert np.isnan(with_gap[1])
    np.testing.assert_array_equal(np.delete(with_gap, 1), ours)


@pytest.mark.parametrize(
    ("methods", "tasks", "ties"), [(2, 5, False), (4, 9, False), (6, 12, True), (9, 30, False)]
)
def test_friedman_and_nemenyi_agree_with_scipy_posthocs_and_autorank(
    methods: int, tasks: int, ties: bool
) -> None:
    posthocs = pytest.importorskip("scikit_posthocs")
    autorank = pytest.importorskip("autorank._util")
    values = np.random.default_rng(methods).normal(size=(methods, tasks)) + np.arange(methods)[:, None] * 0.4
    if ties:
        values = np.round(values)
    ours = friedman(values, lower_is_better=True)
    if methods > 2:
        theirs = scipy_stats.friedmanchisquare(*values)
        assert ours.statistic == pytest.approx(theirs.statistic, abs=1e-6)
        assert ours.p_value == pytest.approx(theirs.pvalue, abs=1e-6)
    expected = np.mean([scipy_stats.rankdata(column) for column in values.T], axis=0)
    np.testing.assert_allclose(ours.mean_ranks, expected, atol=1e-12)
    np.testing.assert_allclose(friedman(-values, lower_is_better=False).mean_ranks, expected, atol=1e-12)
    pairwise = posthocs.posthoc_nemenyi_friedman(values.T).to_numpy()
    np.testing.assert_allclose(ours.pairwise_p, pairwise, atol=1e-6)
    # autorank takes the quantile from statsmodels' approximation by polynomials; scipy's is compared below.
    theirs = autorank._critical_distance(0.05, methods, tasks)
    assert ours.critical_difference == pytest.approx(theirs, rel=1e-4)


def test_friedman_refuses_what_it_cannot_rank() -> None:
    with pytest.raises(ValueError, match="two methods and two tasks"):
        friedman(np.ones((1, 3)), lower_is_better=True)
    with pytest.raises(ValueError, match="on every task"):
        friedman(np.array([[1.0, np.nan], [1.0, 2.0]]), lower_is_better=True)
    equal = friedman(np.ones((3, 4)), lower_is_better=True)
    assert (equal.statistic, equal.p_value) == (0.0, 1.0)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 20])
def test_the_chi_square_tail_agrees_with_scipy(degrees: int) -> None:
    for statistic in (0.0, 0.3, 2.0, 11.0, 80.0):
        assert chi_square_tail(statistic, degrees) == pytest.approx(
            scipy_stats.chi2.sf(statistic, degrees), rel=1e-9, abs=1e-15
        )


@pytest.mark.parametrize("groups", [2, 3, 5, 10, 30])
def test_the_studentized_range_agrees_with_scipy(groups: int) -> None:
    q = np.array([0.1, 1.0, 2.5, 3.7, 6.0])
    theirs = scipy_stats.studentized_range.cdf(q, groups, np.inf)
    np.testing.assert_allclose(studentized_range_cdf(q, groups), theirs, atol=1e-9)
    for level in (0.9, 0.95, 0.99):
        quantile = studentized_range_quantile(level, groups)
        assert quantile == pytest.approx(scipy_stats.studentized_range.ppf(level, groups, np.inf), abs=1e-6)


def test_bradley_terry_agrees_with_logistic_regression_of_statsmodels() -> None:
    sm = pytest.importorskip("statsmodels.api")
    rng = np.random.default_rng(0)
    values = rng.normal(size=(5, 40)) + np.arange(5)[:, None] * 0.5
    ours = bradley_terry(values, lower_is_better=True, prior=0)
    design, won = [], []
    for i in range(5):
        for j in range(i + 1, 5):
            for task in range(40):
                row = np.zeros(5)
                row[i], row[j] = 1, -1
                design.append(row)
                won.append(float(values[i, task] < values[j, task]))
    fitted = sm.Logit(np.array(won), np.array(design)[:, :4]).fit(disp=False, tol=1e-12, maxiter=100).params
    theirs = np.append(fitted, 0.0)
    np.testing.assert_allclose(ours.log_strength, theirs - theirs.mean(), atol=1e-6)
    probability = ours.win_probability()
    np.testing.assert_allclose(probability + probability.T, 1.0)


def test_bradley_terry_intervals_hold_the_strength_and_a_prior_tames_a_perfect_record() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(4, 25)) + np.array([0, 1, 1, 9])[:, None]
    with pytest.raises(ValueError, match="give a prior"):
        bradley_terry(values, lower_is_better=True, prior=0)
    ours = bradley_terry(values, lower_is_better=True)
    assert np.isfinite(ours.log_strength).all()
    assert ours.log_strength.sum() == pytest.approx(0, abs=1e-12)
    assert ours.log_strength.argmax() == 0
    assert ours.log_strength.argmin() == 3
    assert (ours.low <= ours.log_strength).all()
    assert (ours.log_strength <= ours.high).all()
    assert ours.low[1] < ours.log_strength[2] < ours.high[1]
    turned = bradley_terry(-values, lower_is_better=False)
    np.testing.assert_allclose(turned.low, ours.low)


def test_bradley_terry_leaves_out_tasks_that_a_method_did_not_run() -> None:
    values = np.array([[1.0, 1.0, np.nan], [2.0, 0.0, 0.0]])
    ours = bradley_terry(values, lower_is_better=True, prior=0)
    np.testing.assert_allclose(ours.log_strength, 0.0, atol=1e-12)


def test_performance_profiles_follow_their_definition() -> None:
    costs = np.array([[1.0, 2.0, np.inf, np.nan], [2.0, 1.0, 3.0, np.inf]])
    np.testing.assert_array_equal(
        performance_ratios(costs), [[1.0, 2.0, np.inf, np.inf], [2.0, 1.0, 1.0, np.inf]]
    )
    profile = performance_profile(costs, np.array([1.0, 1.5, 2.0, 1e9]))
    np.testing.assert_array_equal(profile, [[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 0.75, 0.75]])
    with pytest.raises(ValueError, match="positive"):
        performance_ratios(np.array([[0.0]]))


def test_profile_scores_are_those_of_algoperfs_rules() -> None:
    times = np.array([[1.0, 10.0, 7.0], [2.0, 20.0, 14.0]])
    # Twice as slow everywhere: (4 - 2) / (4 - 1).
    np.testing.assert_allclose(profile_scores(times), [1.0, 2 / 3])
    np.testing.assert_allclose(profile_scores(times * [3.0, 0.1, 1e6]), profile_scores(times))
    slow = np.vstack([times, [[3.9, np.inf, 1e9]]])
    np.testing.assert_allclose(profile_scores(slow)[:2], profile_scores(times))
    np.testing.assert_allclose(profile_scores(np.array([[3.0, np.inf]])), [0.5])
    # The definition: the mean of the profile over the ratios from 1 to 4.
    taus = np.linspace(1, 4, 200_001)
    profile = performance_profile(slow, taus)
    assert (np.diff(profile, axis=1) >= 0).all()
    np.testing.assert_allclose(profile.mean(axis=1), profile_scores(slow), atol=1e-4)
    with pytest.raises(ValueError, match="above 1"):
        profile_scores(times, largest=1.0)


def test_the_time_to_a_target_is_the_first_point_that_reaches_it() -> None:
    curves = np.array([[5.0, 2.0, 1.0, 3.0], [5.0, 4.0, np.nan, 4.0], [1.0, 9.0, 9.0, 9.0]])
    times = time_to_target(curves, 2.0, lower_is_better=True)
    assert times.tolist() == [1.0, np.inf, 0.0]
    steps = np.array([0.0, 10.0, 20.0, 30.0])
    assert time_to_target(-curves, -2.0, lower_is_better=False, steps=steps).tolist() == [10.0, np.inf, 0.0]
    assert expected_time(np.array([10.0, np.inf, 0.0]), np.full(3, 30.0)) == 20.0
    assert expected_time(np.array([np.inf]), np.array([30.0])) == np.inf


def test_an_interaction_is_told_from_the_sum_of_its_links() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(2.0, 0.5, 60)
    noise = [rng.normal(scale=0.05, size=60) for _ in range(3)]
    a, b = base + 0.3 + noise[0], base + 0.2 + noise[1]
    additive = interaction(base, [a, b], base + 0.5 + noise[2], "exp-mean")
    assert additive.alone == pytest.approx((0.3, 0.2), abs=0.03)
    assert additive.low < 0 < additive.high
    worse = interaction(base, [a, b], base + 0.9 + noise[2], "exp-mean")
    assert worse.excess == pytest.approx(0.4, abs=0.05)
    assert worse.low > 0
    three = interaction(base, [a, b, a], base + 0.8 + noise[2], "mean")
    assert three.excess == pytest.approx(0.0, abs=0.05)
    assert interaction(base[:1], [a[:1]], b[:1], "mean").high == np.inf
    with pytest.raises(ValueError, match="differ in length"):
        interaction(base, [a], b[:-1], "mean")


@pytest.mark.parametrize("how", ["mean", "exp-mean", "median"])
def test_many_rows_at_once_have_the_intervals_and_tests_of_each_alone(how):
    rng = np.random.default_rng(5)
    rows = rng.normal(1.0, 0.5, (6, 40))
    rows[3] = rows[1]
    reference = rng.normal(1.0, 0.5, 40)
    intervals = stats.bootstrap_intervals(rows, how)
    differences = stats.paired_differences(rows, reference, how)
    for row, interval, difference in zip(rows, intervals, differences, strict=True):
        assert interval == pytest.approx(stats.bootstrap_interval(row, how), rel=1e-12)
        alone = stats.paired_difference(row, reference, how)
        assert [
            getattr(difference, name) for name in ("difference", "low", "high", "p_value")
        ] == pytest.approx(
            [getattr(alone, name) for name in ("difference", "low", "high", "p_value")], rel=1e-9
        )
    # Equal rows tie exactly, wherever they stand.
    assert intervals[3] == intervals[1]
    drawn = stats.resampled_aggregates(rows, how)
    assert (drawn[:, 3] == drawn[:, 1]).all()


def test_rows_with_missing_or_infinite_scores_are_resampled_beside_whole_ones():
    rows = np.random.default_rng(6).normal(size=(3, 20))
    rows[1, 4] = np.nan
    rows[2, 7] = np.inf
    found = stats.bootstrap_intervals(rows, "mean")
    for row, interval in zip(rows, found, strict=True):
        assert interval == pytest.approx(stats.bootstrap_interval(row, "mean"))


def test_the_order_of_a_summation_decides_no_rank() -> None:
    """Means of three seeds of right and wrong answers are thirds, whose sums tie but for their rounding."""
    rng = np.random.default_rng(4)
    scores = rng.integers(0, 4, (12, 60)) / 3
    shuffled = np.stack([rng.permutation(row) for row in np.tile(scores[:1], (12, 1))])
    assert len({float(np.cumsum(row)[-1]) for row in shuffled}) > 1
    assert rank_intervals(shuffled, "mean", lower_is_better=True)[:, 0].tolist() == [1] * 12
    exact = rank_intervals(np.round(scores * 3), "mean", lower_is_better=False)
    assert rank_intervals(scores, "mean", lower_is_better=False).tolist() == exact.tolist()
