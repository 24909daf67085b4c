"""Performance profiles of a board: which tasks and configurations are compared, and what a miss costs."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from methodbench_leaderboard.pages import _profiles


def cell(*steps: float) -> Any:
    metric = SimpleNamespace(unit="steps", label="steps to target")
    loss = SimpleNamespace(unit="nats", label="loss")
    return SimpleNamespace(
        estimates={
            "steps-to-target": SimpleNamespace(metric=metric, by_seed=steps),
            "loss": SimpleNamespace(metric=loss, by_seed=(1.0,)),
        }
    )


def board(*tasks: tuple[str, dict[str, Any]], positions: str = "") -> Any:
    tables = []
    for name, cells in tasks:
        question = SimpleNamespace(key=name, task=name, suffix="")
        rows = [
            SimpleNamespace(label=label, positions=positions, cells={name: found})
            for label, found in cells.items()
        ]
        group = SimpleNamespace(positions=positions, rows=rows)
        tables.append(
            SimpleNamespace(
                questions=[question], rows=rows, groups=[group], heading=lambda group: group.positions
            )
        )
    return SimpleNamespace(tables=tables)


def test_the_cost_is_the_median_over_seeds_and_a_miss_is_infinite():
    found = _profiles(
        board(
            ("x", {"a": cell(10.0, 20.0, math.inf), "b": cell(40.0, math.nan, math.inf)}),
            ("y", {"a": cell(0.0), "b": cell(2.0)}),
        )
    )
    ((heading, metric, chart),) = found
    assert (heading, metric, chart.tasks) == ("Hyperparameters as configured", "steps to target", ("x", "y"))
    assert {line.label: line.solved for line in chart.lines} == {"a": 2, "b": 1}


def test_tasks_that_few_configurations_ran_are_left_out():
    ((_, _, chart),) = _profiles(
        board(
            ("x", {"a": cell(10.0), "b": cell(20.0)}),
            ("y", {"a": cell(10.0), "b": cell(20.0)}),
            ("z", {"c": cell(1.0)}),
        )
    )
    assert chart.tasks == ("x", "y")
    assert [line.label for line in chart.lines] == ["a", "b"]


def test_a_board_without_targets_has_no_profile():
    assert _profiles(board(("x", {"a": cell(10.0), "b": cell(20.0)}))) == []


def test_a_task_with_settings_of_its_own_goes_before_one_that_all_have_run():
    """Here ``alone`` and ``shared`` have as many configurations; only those of ``shared`` are found elsewhere."""
    found = _profiles(
        board(
            ("shared", {"a": cell(10.0), "b": cell(20.0), "c": cell(5.0)}),
            ("alone", {"a lr=1": cell(10.0), "b lr=1": cell(20.0), "d lr=2": cell(5.0)}),
            ("x", {"a": cell(10.0), "b": cell(20.0), "c": cell(math.inf)}),
            ("y", {"a": cell(10.0), "b": cell(20.0)}),
        )
    )
    ((_, _, chart),) = found
    assert chart.tasks == ("shared", "x", "y")
    assert {line.label for line in chart.lines} == {"a", "b"}
