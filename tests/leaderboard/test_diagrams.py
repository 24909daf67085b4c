"""Geometry of the charts that compare over tasks, settings and units."""

from __future__ import annotations

import math

import numpy as np
import pytest

from methodbench.stats import friedman, profile_scores
from methodbench_leaderboard import diagrams
from methodbench_leaderboard.diagrams import HeatCell, Scores, Setting


def test_a_critical_difference_diagram_says_what_friedman_says():
    rng = np.random.default_rng(5)
    values = np.arange(6.0)[:, None] + rng.normal(0, 1.2, (6, 8))
    labels = list("abcdef")
    chart = diagrams.critical_difference(labels, values)
    found = friedman(values, lower_is_better=True)
    assert chart is not None
    assert {item.label: item.mean_rank for item in chart.methods} == dict(
        zip(labels, found.mean_ranks.tolist(), strict=True)
    )
    assert chart.distance == found.critical_difference
    # Two methods lie under one bar exactly when their mean ranks differ by no more than the critical difference.
    for i, a in enumerate(labels):
        for j, b in enumerate(labels[:i]):
            together = any({a, b} <= set(clique.labels) for clique in chart.cliques)
            apart = abs(found.mean_ranks[i] - found.mean_ranks[j]) > found.critical_difference
            assert together != apart, (a, b)
    # Distances on the axis are those of the ranks, on the scale that the ruler has.
    at = {item.label: item.x for item in chart.methods}
    per_rank = (at["f"] - at["a"]) / (found.mean_ranks[5] - found.mean_ranks[0])
    assert chart.ruler[1] - chart.ruler[0] == pytest.approx(per_rank * chart.distance, abs=0.5)


def test_configurations_without_a_value_on_every_task_are_left_out_and_counted():
    values = np.arange(12.0).reshape(4, 3)
    values[2, 1] = math.nan
    chart = diagrams.critical_difference(list("abcd"), values)
    assert chart is not None
    assert [item.label for item in chart.methods] == ["a", "b", "d"]
    assert chart.left_out == 1
    assert diagrams.critical_difference(list("ab"), np.ones((2, 3))) is None
    assert diagrams.critical_difference(list("abc"), np.ones((3, 1))) is None


def test_of_many_methods_the_best_are_drawn():
    values = np.arange(100.0)[:, None] * np.ones((100, 3))
    chart = diagrams.critical_difference([f"m{i:03}" for i in range(100)], values)
    assert chart is not None
    assert [item.label for item in chart.methods] == [f"m{i:03}" for i in range(diagrams.MOST_RANKED)]
    assert chart.compared == 100
    assert all(0 <= item.x <= chart.width for item in chart.methods)


def test_shades_grow_with_the_difference_to_the_baseline():
    cells = [HeatCell(10.0, None, "base"), HeatCell(9.0, 1.0, "better"), HeatCell(11.0, -1.0, "worse"),
             HeatCell(10.3, -0.3, "little"), HeatCell(math.inf, None, "lost"), None]  # fmt: skip
    assert diagrams.shades(cells, lower_is_better=True) == ["m", "b3", "w3", "w1", "w3", "none"]


def test_a_few_huge_differences_leave_the_rest_its_shades():
    values = [12.0, 16.0, 40.0, 70.0, 1e6, 2e6]
    cells = [HeatCell(10.0, None, "base"), *(HeatCell(value, 10.0 - value, str(value)) for value in values)]
    assert diagrams.shades(cells, lower_is_better=True) == ["m", "m", "m", "w1", "w2", "w3", "w3"]


def test_shades_follow_places_where_there_is_no_baseline():
    cells = [HeatCell(float(value), None, "run") for value in range(7)]
    assert diagrams.shades(cells, lower_is_better=True) == ["b3", "b2", "b1", "m", "w1", "w2", "w3"]
    assert diagrams.shades(cells, lower_is_better=False) == ["w3", "w2", "w1", "m", "b1", "b2", "b3"]
    assert diagrams.shades([HeatCell(2.0, None, "a"), HeatCell(2.0, None, "b")], True) == ["m", "m"]


def test_a_heat_map_has_a_square_for_every_row_and_task():
    cells = [[HeatCell(1.0, None, "a"), None], [HeatCell(2.0, None, "b"), HeatCell(3.0, None, "c")]]
    chart = diagrams.heat_map(["one", "two"], [("x", True), ("y", False)], cells)
    assert chart is not None
    assert [square.run_id for square in chart.squares] == ["a", "", "b", "c"]
    assert len({(square.x, square.y) for square in chart.squares}) == 4
    assert diagrams.heat_map(["one", "two"], [("x", True)], [[None], [None]]) is None


def test_a_sensitivity_line_goes_through_its_values_in_order():
    items = [Setting(8, 1.0, 0.5, 1.5, "c"), Setting(2, 3.0, None, None, "a"), Setting(4, 2.0, 1.5, 2.5, "b"),
             Setting(1, math.inf, None, None, "lost")]  # fmt: skip
    chart = diagrams.sensitivity([("", items), ("alone", [Setting(3, 1.0, None, None, "z")])])
    assert chart is not None
    assert [[mark.item.run_id for mark in line.marks] for line in chart.lines] == [["a", "b", "c"]]
    assert [tick.label for tick in chart.x_ticks] == ["2", "4", "8"]
    xs = [mark.x for mark in chart.lines[0].marks]
    assert xs == sorted(xs)
    assert diagrams.sensitivity([("", [Setting(3, math.nan, None, None, "a")] * 2)]) is None


def test_boxes_stand_at_the_percentiles_of_the_scores():
    scores = np.linspace(0.0, 100.0, 101)
    chart = diagrams.spread(
        [Scores("base", "a", scores, True), Scores("lost", "b", np.r_[scores, [math.inf]], False)]
    )
    assert chart is not None
    assert [box.summary for box in chart.boxes] == [(5.0, 25.0, 50.0, 75.0, 95.0)] * 2
    assert [box.left_out for box in chart.boxes] == [0, 1]
    assert chart.reference == chart.boxes[0].middle
    right_or_wrong = Scores("answers", "c", np.array([0.0, 1.0] * 10), False)
    assert diagrams.spread([right_or_wrong]) is None


def test_a_performance_profile_is_scored_as_algoperf_scores_it_and_ends_at_what_was_reached():
    costs = np.array([[100.0, 100.0, math.inf], [200.0, 100.0, 50.0], [1000.0, math.inf, math.inf]])
    chart = diagrams.performance_profile(["a", "b", "c"], ["x", "y", "z"], costs)
    assert chart is not None
    expected = dict(zip("abc", profile_scores(costs), strict=True))
    assert {line.label: line.score for line in chart.lines} == expected
    assert [line.label for line in chart.lines] == sorted(expected, key=lambda label: -expected[label])
    assert {line.label: line.solved for line in chart.lines} == {"a": 2, "b": 3, "c": 1}
    by_label = {line.label: line for line in chart.lines}
    top, third = chart.top, (chart.bottom - chart.top) / 3
    assert by_label["b"].path.endswith(f"V{top}H{chart.right}")
    assert by_label["a"].path.endswith(f"V{round(top + third, 1)}H{chart.right}")
    # Ten times the best cost is beyond what is drawn: a line along the axis.
    assert by_label["c"].path == f"M{chart.left},{chart.bottom}H{chart.right}"


def test_there_is_no_profile_of_one_method_one_task_or_of_misses_alone():
    assert diagrams.performance_profile(["a"], ["x", "y"], np.ones((1, 2))) is None
    assert diagrams.performance_profile(["a", "b"], ["x"], np.ones((2, 1))) is None
    assert diagrams.performance_profile(["a", "b"], ["x", "y"], np.full((2, 2), math.inf)) is None


def test_of_many_profiles_the_best_are_drawn():
    costs = np.arange(1.0, 21.0).reshape(10, 2)
    chart = diagrams.performance_profile([f"m{i}" for i in range(10)], ["x", "y"], costs)
    assert chart is not None
    assert (len(chart.lines), chart.more, chart.lines[0].label) == (8, 2, "m0")
