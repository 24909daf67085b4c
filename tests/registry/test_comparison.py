"""Comparisons pair what was asked alike."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest

from methodbench.comparison import compare_methods
from methodbench.errors import MethodbenchError
from methodbench.store import Environment, MetricValue, Run, Store

START = datetime(2026, 1, 1, tzinfo=UTC)


def record(store: Store, method: str, threads: int, value: float) -> None:
    asked = {
        "model": "",
        "weights_digest": "",
        "task": "t",
        "task_params": {},
        "protocol": 1,
        "data_digest": "",
    }
    identity = {**asked, "version": 2, "dtype": "float32", "device_class": "cpu", "threads": threads}
    run = Run(
        id=f"{method}{threads}", cell_key=f"{method} {threads}", identity=identity, status="ok", method=method,
        kind="probe", family="f", params_passed={}, params={}, task="t", task_params={}, protocol=1,
        threads=threads, environment_digest="e", started_at=START,
    )  # fmt: skip
    scores = value + np.linspace(0, 0.1, 8)
    metric = MetricValue(
        run_id=run.id, name="value", primary=True, direction="lower", value=float(scores.mean()), units=8,
        scores=scores.tobytes(),
    )  # fmt: skip
    store.add(run, [metric], environment=Environment(digest="e", captured_at=START, data={}))


def test_results_of_other_thread_counts_are_never_paired(store: Store) -> None:
    record(store, "a", 1, 1.0)
    record(store, "b", 4, 2.0)
    with pytest.raises(MethodbenchError, match="share no finished cell"):
        compare_methods(store, "a", "b")
    record(store, "b", 1, 1.5)
    (pair,) = compare_methods(store, "a", "b")
    assert (pair.runs_a, pair.runs_b) == (("a1",), ("b1",))
    assert pair.difference == pytest.approx(-0.5)
