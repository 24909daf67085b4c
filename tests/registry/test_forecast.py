"""Predictions from the project's history, and what fits a budget."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from methodbench import api
from methodbench.catalog import Catalog
from methodbench.engine.driver import run_plan
from methodbench.engine.forecast import History, fit_budget, history_of
from methodbench.errors import MethodbenchError
from methodbench.store import Store


def past(value: float, seconds: float, **more: Any) -> Any:
    fields = {
        "method": "noop", "kind": "probe", "params": {"value": value}, "model": "", "task": "toy-value",
        "task_params": {"units": 4}, "device": "cpu", "threads": 1, "status": "ok", "wall_seconds": seconds,
        "peak_memory_bytes": 1000,
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **more})


def cells(catalog: Catalog, *methods: Any, **more: Any) -> list[Any]:
    grid = {"methods": list(methods), "tasks": ["toy-value"], **more}
    return api.plan({"name": "t", "comparisons": [grid]}, catalog=catalog).cells


def test_a_cell_is_predicted_from_the_runs_that_are_most_like_it(catalog: Catalog) -> None:
    (cell,) = cells(catalog, {"name": "noop", "params": {"value": 2.0}})
    everything = [
        past(9, 1000, method="other", kind="other", task="other"),
        past(2.0, 64, method="misbehave", params={}),
        past(3.0, 8, peak_memory_bytes=5000),
        past(2.0, 1), past(2.0, 3), past(2.0, 2, peak_memory_bytes=3000),
    ]  # fmt: skip
    expected = [
        (2, "other seeds", 3, 3000),
        (8, "other settings", 1, 5000),
        (64, "other methods", 1, 1000),
        (1000, "any run", 1, 1000),
    ]
    for count, (seconds, basis, runs, memory) in zip((6, 3, 2, 1), expected, strict=True):
        found = History(everything[:count]).predict(cell)
        assert found is not None
        assert (found.seconds, found.basis, found.runs, found.memory) == (seconds, basis, runs, memory)
    assert History([]).predict(cell) is None
    useless = [past(2.0, 5, status="timeout"), past(2.0, 0)]
    assert History(useless).predict(cell) is None


def test_a_budget_keeps_first_seeds_and_cheap_cells_and_says_what_it_leaves_out(catalog: Catalog) -> None:
    wanted = cells(catalog, {"name": "noop", "grid": {"value": [1.0, 2.0, 3.0]}}, seeds=[0, 1])
    history = History([past(1.0, 10), past(2.0, 4), past(3.0, 1, peak_memory_bytes=10**9)])

    def kept(**options: Any) -> list[tuple[float, int]]:
        budget = fit_budget(wanted, history, **{"seconds": None, "cores": 1, **options})
        assert len(budget.kept) + len(budget.left_out) == 6
        assert budget.seconds <= (options.get("seconds") or 1e9)
        return [(cell.params["value"], cell.seed) for cell in budget.kept]

    # Every first seed, the cheapest first, then the second ones.
    assert kept() == [(3.0, 0), (2.0, 0), (1.0, 0), (3.0, 1), (2.0, 1), (1.0, 1)]
    assert kept(seconds=5) == [(3.0, 0), (2.0, 0)]
    # The dear cell does not fit; cheap ones behind it do.
    assert kept(seconds=10) == [(3.0, 0), (2.0, 0), (3.0, 1), (2.0, 1)]
    # Two cores: 1 and 4 side by side, 10 after 1; then 1, 4 and 10 behind the 4.
    assert kept(seconds=11, cores=2)[:3] == [(3.0, 0), (2.0, 0), (1.0, 0)]
    assert fit_budget(wanted, history, seconds=None, cores=2).seconds == pytest.approx(19)
    assert kept(memory=10**8) == [(2.0, 0), (1.0, 0), (2.0, 1), (1.0, 1)]


def test_without_history_nothing_is_made_up(catalog: Catalog) -> None:
    with pytest.raises(MethodbenchError, match="the database holds no finished run"):
        fit_budget(cells(catalog, "noop"), History([]), seconds=60, cores=1)


def test_the_history_of_a_database_predicts_what_cells_really_take(store: Store, catalog: Catalog) -> None:
    grid = {"name": "sleeper", "grid": {"seconds": [0.1, 0.6]}}
    first = api.plan(
        {"name": "t", "comparisons": [{"methods": [grid], "tasks": ["toy-value"]}]}, catalog=catalog
    )
    assert run_plan(first, store, catalog, cores=1).complete
    history = history_of(store)
    for cell in cells(catalog, grid, seeds=[5]):
        found = history.predict(cell)
        assert found is not None
        assert found.basis == "other seeds"
        assert cell.params["seconds"] <= found.seconds < cell.params["seconds"] + 1.0
        assert found.memory is not None
        assert found.memory > 2**20
