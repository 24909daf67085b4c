"""Geometry of charts."""

from __future__ import annotations

import math
import re
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from methodbench.entries import Axis
from methodbench_leaderboard import charts

FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=64)


@settings(max_examples=80, deadline=None)
@given(st.lists(FLOATS, max_size=12))
def test_a_scale_keeps_every_value_on_the_axis_in_order(values):
    scale = charts.make_scale(values, 10, 200)
    finite = sorted(value for value in values if math.isfinite(value))
    if scale is None:
        assert all(abs(value) > charts.LARGEST for value in finite)
        return
    at = [scale(value) for value in finite]
    assert at == sorted(at)
    assert all(10 <= place <= 200 for place in at)
    assert all(10 <= tick.at <= 200 for tick in scale.ticks())


def test_wide_positive_ranges_are_logarithmic_and_others_are_not():
    assert charts.make_scale([1, 1000], 0, 1).log
    assert not charts.make_scale([-1, 1000], 0, 1).log
    assert not charts.make_scale([1, 2], 0, 1).log


def _points(*pairs: tuple[float, float]) -> list[charts.Point]:
    return [charts.Point(str(place), "0" * 12, *pair) for place, pair in enumerate(pairs)]


def test_the_front_joins_what_nothing_beats_on_both():
    chart = charts.pareto_chart(_points((3, 40), (4, 30), (4, 35), (8, 31)), lower_is_better=True)
    assert {mark.point.label for mark in chart.marks if mark.on_front} == {"0", "1"}
    higher = charts.pareto_chart(_points((3, 40), (4, 30), (4, 35), (8, 50)), lower_is_better=False)
    assert {mark.point.label for mark in higher.marks if mark.on_front} == {"0", "3"}


def test_the_better_end_is_at_the_top():
    for lower in (True, False):
        chart = charts.pareto_chart(_points((3, 40), (4, 30)), lower_is_better=lower)
        y = {mark.point.quality: mark.y for mark in chart.marks}
        assert (y[30] < y[40]) == lower


def test_points_that_are_not_finite_are_named_not_drawn():
    chart = charts.pareto_chart(_points((3, 40), (4, 30), (5, math.inf), (math.nan, 1)), lower_is_better=True)
    assert chart.left_out == ["2", "3"]
    assert len(chart.marks) == 2
    assert charts.pareto_chart(_points((3, 40), (3, 30)), lower_is_better=True) is None


def test_labels_cover_neither_points_nor_one_another():
    rng = np.random.default_rng(0)
    chart = charts.pareto_chart(
        _points(*((float(a), float(b)) for a, b in rng.random((30, 2)) + 1)), lower_is_better=True
    )
    boxes = []
    for mark in chart.marks:
        if mark.text:
            x, y, anchor = mark.text
            width = charts.CHARACTER * len(mark.point.label)
            left = x - width if anchor == "end" else x
            boxes.append((left, y - 10, left + width, y + 3))
    assert len(boxes) > 5
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[i + 1 :])


def test_one_exploding_curve_does_not_flatten_the_others():
    calm = np.linspace(2, 1, 50)
    explosion = np.where(np.arange(50) < 40, 10.0 ** np.arange(50), np.inf)
    chart = charts.curve_chart(
        [charts.Curve("calm", "0" * 12, [calm]), charts.Curve("wild", "0" * 12, [explosion])]
    )
    heights = [float(y) for y in re.findall(r",([\d.]+)", chart.lines[0].path)]
    assert chart.clipped
    assert max(heights) - min(heights) > 0.03 * (chart.bottom - chart.top)
    assert all(math.isfinite(height) for height in heights)


def test_seeds_give_a_mean_and_a_band():
    seeds = [np.array([3.0, 1.0]), np.array([5.0, 2.0])]
    (line,) = charts.curve_chart([charts.Curve("a", "0" * 12, seeds)]).lines
    assert line.last == pytest.approx(1.5)
    assert line.band
    (single,) = charts.curve_chart([charts.Curve("a", "0" * 12, seeds[:1])]).lines
    assert not single.band


@settings(max_examples=40, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=60))
def test_a_histogram_counts_every_score_that_can_be_drawn(values):
    chart = charts.histogram(np.array(values))
    drawable = [value for value in values if abs(value) <= charts.LARGEST]
    if chart is not None:
        assert sum(bar.count for bar in chart.bars) == len(drawable)
        assert chart.left_out == len(values) - len(drawable)


def test_what_is_not_compared_is_never_on_the_front():
    apart = charts.Point("apart", "run", 2, 10, compared=False)
    chart = charts.pareto_chart([*_points((3, 40), (4, 30), (4, 35)), apart], lower_is_better=True)
    assert chart is not None
    assert sorted((mark.point.cost, mark.point.quality) for mark in chart.marks if mark.on_front) == [
        (3, 40),
        (4, 30),
    ]
    assert any(mark.point is apart for mark in chart.marks)


def test_points_of_a_curve_lie_where_the_tasks_axis_says():
    curve = charts.Curve("a", "1", [np.array([4.0, 3.0, 2.0, 1.5])])
    looks = Axis(series="loss", every="evaluate_every", last="steps")
    settings = {"evaluate_every": 20, "steps": 50, "rates": [1e-3, 1e-2, 1e-1, 1.0]}
    assert looks.positions(settings, 4) == [0, 20, 40, 50]
    drawn = charts.curve_chart([curve], positions=partial(looks.positions, settings), x_label=looks.label)
    assert drawn.x_label == "step"
    assert [tick.label for tick in drawn.x_ticks] == ["0", "10", "20", "30", "40", "50"]
    xs = [float(x) for x in re.findall(r"[ML]([\d.]+),", drawn.lines[0].path)]
    # From 40 to 50 it is half as far as from 20 to 40.
    assert xs[3] - xs[2] == pytest.approx((xs[2] - xs[1]) / 2, abs=0.2)

    rates = Axis(series="loss", label="learning rate", at="rates")
    drawn = charts.curve_chart([curve], positions=partial(rates.positions, settings), x_label=rates.label)
    assert drawn.x_label == "learning rate, log scale"
    xs = [float(x) for x in re.findall(r"[ML]([\d.]+),", drawn.lines[0].path)]
    assert np.diff(xs) == pytest.approx(xs[1] - xs[0], abs=0.3)


@pytest.mark.parametrize(
    "axis",
    [Axis(series="a", every="absent"), Axis(series="a", at="absent"), Axis(series="a", at="short")],
)
def test_without_the_settings_of_its_axis_a_curve_is_drawn_over_the_numbers_of_its_points(axis):
    curve = charts.Curve("a", "1", [np.array([4.0, 3.0, 2.0])])
    drawn = charts.curve_chart(
        [curve], positions=partial(axis.positions, {"short": [1.0, 2.0]}), x_label=axis.label
    )
    assert drawn.x_label == "point of the curve"
    assert [tick.label for tick in drawn.x_ticks][-1] == "2"


def test_the_ends_of_an_axis_of_powers_have_ticks_whatever_rounding_makes_of_them():
    # Three tenths is not three times a tenth in binary.
    ticks = charts.Scale(3e-4, 0.3, 0.0, 100.0, True).ticks(6)
    assert [tick.label for tick in ticks] == ["3e−4", "0.001", "0.003", "0.01", "0.03", "0.1", "0.3"]


@pytest.mark.parametrize("name", ["every", "at"])
@pytest.mark.parametrize(
    "value",
    [
        "a",
        "<script>",
        ["a", "b", "c"],
        [1, 2, None],
        {"x": 1},
        float("nan"),
        float("inf"),
        -1,
        10**400,
        [[]] * 3,
    ],
)
def test_settings_that_strangers_wrote_lay_out_nothing(name, value):
    axis = Axis(series="a", **{name: "theirs"})
    assert axis.positions({"theirs": value}, 3) is None
    assert Axis(series="a", every="ours", last="theirs").positions({"ours": 1, "theirs": "a"}, 3) is None
