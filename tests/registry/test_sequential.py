"""Seeds until a comparison is decided: the error rate that is stated, and what is not run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from methodbench import api, stats
from methodbench.catalog import Catalog
from methodbench.engine.driver import run_plan
from methodbench.engine.sequential import Decisions, run_until_decided
from methodbench.store import Store


def test_the_t_tail_is_that_of_scipy() -> None:
    from scipy.stats import t

    for degrees in (0.7, 1, 2.5, 9, 80, 5000):
        for statistic in (0.0, 0.01, 0.5, 1, 2, 4.7, 30, 400):
            expected = 2 * t.sf(statistic, degrees)
            assert stats.student_t_tail(statistic, degrees) == pytest.approx(expected, rel=1e-10, abs=1e-290)
            assert stats.student_t_tail(-statistic, degrees) == pytest.approx(expected, rel=1e-10, abs=1e-290)


def test_the_levels_of_the_looks_sum_to_the_rate() -> None:
    for looks in (1, 2, 9):
        levels = stats.alpha_spent(0.05, looks)
        assert levels.sum() == pytest.approx(0.05)
        assert (levels > 0).all()
        assert levels.max() / levels.min() < 3


def test_one_unit_leaves_the_paired_t_test_over_seeds() -> None:
    from scipy.stats import ttest_1samp

    differences = np.random.default_rng(0).normal(0.3, 1, size=(7, 1))
    mean, p_value = stats.seeds_and_units_test(differences)
    assert mean == pytest.approx(differences.mean())
    assert p_value == pytest.approx(ttest_1samp(differences[:, 0], 0).pvalue, rel=1e-10)
    assert stats.seeds_and_units_test(np.zeros((3, 4))) == (0.0, 1.0)
    assert stats.seeds_and_units_test(np.full((3, 4), 2.0)) == (2.0, 0.0)


@pytest.mark.parametrize(
    ("of_seeds", "of_units", "units"), [(1.0, 0.0, 1), (0.5, 1.0, 30), (0.0, 1.0, 30), (1, 1, 8)]
)
def test_equal_methods_are_told_apart_no_more_often_than_stated(
    of_seeds: float, of_units: float, units: int
) -> None:
    """Simulated: two equal methods, effects of seeds, of units and of both; up to eight looks at each."""
    rng = np.random.default_rng(3)
    rate, seeds, wrong, trials = 0.1, 9, 0, 1500
    levels = stats.alpha_spent(rate, seeds - 1)
    for _ in range(trials):
        effects = of_seeds * rng.normal(size=(seeds, 1)) + of_units * rng.normal(size=(1, units))
        differences = effects + 0.5 * rng.normal(size=(seeds, units))
        looks = (stats.seeds_and_units_test(differences[:k])[1] for k in range(2, seeds + 1))
        wrong += any(p_value <= level for p_value, level in zip(looks, levels, strict=True))
    # Three standard errors of the simulation above the rate at most.
    assert wrong / trials <= rate + 3 * (rate * (1 - rate) / trials) ** 0.5


def decide(
    store: Store, catalog: Catalog, *methods: Any, seeds: int = 6, units: int = 4, **options: Any
) -> Decisions:
    task = {"name": "toy-value", "params": {"units": units}}
    grid = {"methods": list(methods), "tasks": [task], "seeds": list(range(seeds))}
    plan = api.plan({"name": "t", "comparisons": [grid]}, catalog=catalog)
    return run_until_decided(
        plan, store, lambda part: run_plan(part, store, catalog, cores=2, batch=8), **options
    )


def test_clear_differences_stop_early_and_the_rest_is_left_out(store: Store, catalog: Catalog) -> None:
    """Two of three methods differ by less than the noise of the task; the third is far away."""
    values = {"name": "jitter", "grid": {"value": [1.0, 1.0001, 5.0]}}
    decisions = decide(store, catalog, values)
    verdicts = {(pair.a.name, pair.b.name): pair for pair in decisions.pairs}
    near = verdicts["jitter@value=1.0", "jitter@value=1.0001"]
    assert near.verdict == "open"
    assert near.seeds == 6
    for pair in decisions.pairs:
        if pair is not near:
            assert (pair.verdict, pair.better) == ("decided", "jitter@value=5.0")
            assert pair.seeds < 6
            assert abs(pair.difference) == pytest.approx(4, abs=0.1)
    # Only the far one is spared seeds.
    assert {cell.params["value"] for cell in decisions.left_out} == {5.0}
    assert len(decisions.left_out) + len(store.runs()) == 18
    assert decisions.report.complete
    # A second call looks at the same seeds, decides the same and runs nothing.
    again = decide(store, catalog, values)
    assert again.report.new == []
    assert [pair.verdict for pair in again.pairs] == [pair.verdict for pair in decisions.pairs]
    assert [cell.key for cell in again.left_out] == [cell.key for cell in decisions.left_out]


def test_equal_scores_and_failures_need_no_further_seed(store: Store, catalog: Catalog) -> None:
    decisions = decide(
        store, catalog, "noop", {"name": "sleeper", "params": {"seconds": 0}}, {"name": "misbehave"}
    )
    verdicts = {frozenset((pair.a.name, pair.b.name)): pair.verdict for pair in decisions.pairs}
    assert verdicts[frozenset({"noop", "sleeper@seconds=0"})] == "equal"
    assert set(verdicts.values()) == {"equal", "not comparable"}
    assert len(store.runs()) == 6
    assert len(decisions.left_out) == 12
    assert not decisions.report.complete


def test_more_seeds_than_the_suite_lists(catalog: Catalog) -> None:
    from methodbench.suite import Suite

    grid = {"methods": ["noop"], "tasks": ["toy-value"], "seeds": [3, 1]}
    suite = Suite.model_validate({"name": "t", "comparisons": [grid]})
    assert suite.with_seeds(5).comparisons[0].seeds == [3, 1, 0, 2, 4]
    assert suite.with_seeds(2).comparisons[0].seeds == [3, 1]
