"""Geometry of the charts that compare configurations over tasks, settings and units; see :mod:`charts`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from methodbench.stats import friedman, performance_ratios, profile_scores
from methodbench_leaderboard.charts import CHARACTER, LARGEST, MOST_CURVES, Scale, Tick, make_scale

Array = NDArray[np.float64]

#: Methods that a critical-difference diagram has room for; the best are drawn.
MOST_RANKED = 24
#: Steps of colour on each side of the middle of a heat map.
SHADES = 3
#: Lines of a heat map and of a chart of distributions.
MOST_LINES = 30


@dataclass(frozen=True, slots=True)
class RankedMethod:
    label: str
    mean_rank: float
    x: float
    y: float
    left: bool
    """Whether the label stands at the left end."""


@dataclass(frozen=True, slots=True)
class Clique:
    """Methods that the test does not tell apart."""

    start: float
    end: float
    y: float
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CriticalDifference:
    width: float
    height: float
    left: float
    right: float
    axis: float
    methods: list[RankedMethod]
    cliques: list[Clique]
    ticks: list[Tick]
    ruler: tuple[float, float]
    """Both ends of a line as long as the critical difference."""
    distance: float
    p_value: float
    tasks: int
    compared: int
    """Methods that were ranked together; the best :data:`MOST_RANKED` are drawn."""
    left_out: int
    """Configurations without a value on every task."""


def critical_difference(
    labels: Sequence[str], values: Array, *, width: float = 640
) -> CriticalDifference | None:
    """Lay out mean ranks over tasks with the groups that Nemenyi's test does not tell apart (Demsar, JMLR 7, 2006).

    Args:
        labels: one for each row of ``values``.
        values: [methods, tasks], lower is better in every column; rows with NaN are left out.

    Returns:
        None where fewer than three methods or two tasks are left.
    """
    complete = np.asarray(~np.isnan(values).any(axis=1))
    if values.shape[1] < 2 or complete.sum() < 3:
        return None
    found = friedman(values[complete], lower_is_better=True)
    names = [label for label, whole in zip(labels, complete, strict=True) if whole]
    order = sorted(range(len(names)), key=lambda i: (float(found.mean_ranks[i]), names[i]))[:MOST_RANKED]
    ranks = [float(found.mean_ranks[i]) for i in order]
    shown = [names[i] for i in order]
    groups = _cliques(ranks, found.critical_difference)
    # Labels are cut where they are drawn.
    margin = 18 + CHARACTER * min(26, max(map(len, shown)))
    left, right = margin, width - margin
    last = max(math.ceil(ranks[-1]), math.floor(ranks[0]) + 1)
    scale = Scale(float(math.floor(ranks[0])), float(last), left, right, False)
    axis = 52.0
    levels = axis + 14 + 9 * len(groups)
    half = math.ceil(len(shown) / 2)
    methods = []
    for place, (label, rank) in enumerate(zip(shown, ranks, strict=True)):
        row = place if place < half else len(shown) - 1 - place
        methods.append(RankedMethod(label, rank, scale(rank), levels + 10 + 20 * row, place < half))
    cliques = [
        Clique(scale(ranks[a]) - 4, scale(ranks[b]) + 4, axis + 14 + 9 * level, tuple(shown[a : b + 1]))
        for level, (a, b) in enumerate(groups)
    ]
    # A ruler longer than the axis ends with it.
    ruler = (left, scale(min(scale.low + found.critical_difference, scale.high)))
    return CriticalDifference(
        width, levels + 10 + 20 * half, left, right, axis, methods, cliques, scale.ticks(8), ruler,
        found.critical_difference, found.p_value, values.shape[1], len(names), len(labels) - len(names),
    )  # fmt: skip


def _cliques(ranks: Sequence[float], distance: float) -> list[tuple[int, int]]:
    """Return first and last place of each largest run of sorted ``ranks`` that spans at most ``distance``."""
    found: list[tuple[int, int]] = []
    for first in range(len(ranks)):
        last = max(i for i in range(first, len(ranks)) if ranks[i] - ranks[first] <= distance)
        if last > first and (not found or last > found[-1][1]):
            found.append((first, last))
    return found


@dataclass(frozen=True, slots=True)
class Square:
    x: float
    y: float
    shade: str
    """``w3`` (worst) to ``b3`` (best), ``m`` for the middle, ``none`` without a value."""
    value: float | None
    difference: float | None
    run_id: str


@dataclass(frozen=True, slots=True)
class HeatMap:
    width: float
    height: float
    left: float
    top: float
    side: tuple[float, float]
    """Width and height of a cell."""
    rows: list[tuple[float, str]]
    columns: list[tuple[float, str]]
    squares: list[Square]
    against_baseline: bool
    """Whether colours say the difference to the baseline, else the place among the configurations."""
    left_out: int


@dataclass(frozen=True, slots=True)
class HeatCell:
    """What a heat map is given where a configuration meets a task."""

    value: float
    difference: float | None
    """To the baseline, positive where better; None where there is none."""
    run_id: str


def shades(cells: Sequence[HeatCell | None], lower_is_better: bool) -> list[str]:
    """Return the shade of each cell of one task.

    Where there are differences to a baseline, shades grow with them on both sides of zero, as far as the largest that
    is not an outlier, and twice their median size at most: a few that are huge leave the rest its shades. What diverged
    is worst, and what has no difference is in the middle. Else shades follow the place among the values.
    """
    found = ["none"] * len(cells)
    known = [(i, cell) for i, cell in enumerate(cells) if cell is not None and not math.isnan(cell.value)]
    differences = [cell.difference for _, cell in known if cell.difference is not None]
    if differences:
        sizes = np.abs([value for value in differences if abs(value) <= LARGEST])
        reach = min(float(np.quantile(sizes, 0.9)), 2 * float(np.median(sizes))) if sizes.size else 0.0
        for i, cell in known:
            if math.isinf(cell.value):
                found[i] = f"{'w' if (cell.value > 0) == lower_is_better else 'b'}{SHADES}"
            else:
                found[i] = _shade((cell.difference or 0.0) / reach if reach else 0.0)
        return found
    order = sorted({cell.value for _, cell in known}, reverse=not lower_is_better)
    for i, cell in known:
        place = order.index(cell.value) / max(len(order) - 1, 1)
        found[i] = _shade(1 - 2 * place) if len(order) > 1 else "m"
    return found


def _shade(share: float) -> str:
    """Return the shade of a share between -1 (worst) and 1 (best)."""
    step = min(SHADES, math.floor(abs(share) * SHADES + 0.5))
    return "m" if step == 0 else f"{'b' if share > 0 else 'w'}{step}"


def heat_map(
    rows: Sequence[str],
    columns: Sequence[tuple[str, bool]],
    cells: Sequence[Sequence[HeatCell | None]],
) -> HeatMap | None:
    """Lay out configurations by tasks; None where fewer than two of either have values.

    Args:
        columns: name of each task, and whether lower is better.
        cells: [rows][columns].
    """
    if len(rows) < 2 or len(columns) < 2:
        return None
    shown = rows[:MOST_LINES]
    by_column = [shades([line[c] for line in cells], lower) for c, (_, lower) in enumerate(columns)]
    left = 16 + CHARACTER * min(28, max(map(len, shown)))
    width, height = 78.0, 26.0
    # Names of tasks are slanted, so that they need no more width than their column.
    top = 20 + 0.72 * CHARACTER * min(40, max(len(name) for name, _ in columns))
    squares = [
        Square(
            left + width * c, top + height * r, by_column[c][r],
            cell.value if cell else None, cell.difference if cell else None, cell.run_id if cell else "",
        )
        for r in range(len(shown))
        for c in range(len(columns))
        for cell in [cells[r][c]]
    ]  # fmt: skip
    reach = 0.72 * CHARACTER * min(40, len(columns[-1][0]))
    return HeatMap(
        left + width * len(columns) + max(8.0, reach - width / 2),
        top + height * len(shown) + 4,
        left,
        top,
        (width, height),
        [(top + height * r + 17, label) for r, label in enumerate(shown)],
        [(left + width * (c + 0.5), name) for c, (name, _) in enumerate(columns)],
        squares,
        any(cell is not None and cell.difference is not None for line in cells for cell in line),
        len(rows) - len(shown),
    )


@dataclass(frozen=True, slots=True)
class Setting:
    """One value of a hyperparameter with what it came to."""

    setting: float
    value: float
    low: float | None
    high: float | None
    run_id: str


@dataclass(frozen=True, slots=True)
class SettingMark:
    x: float
    y: float
    low: float
    high: float
    item: Setting


@dataclass(frozen=True, slots=True)
class SettingLine:
    label: str
    style: int
    path: str
    marks: list[SettingMark]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    lines: list[SettingLine]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_log: bool
    y_log: bool
    left_out: int
    """Lines beyond :data:`~charts.MOST_CURVES`."""


def sensitivity(
    lines: Sequence[tuple[str, Sequence[Setting]]], *, width: float = 560, height: float = 280
) -> Sensitivity | None:
    """Lay out a metric against one hyperparameter, a line for each setting of the others.

    Values that are not finite are left out; None where no line has two points.
    """
    kept = [
        (label, sorted((item for item in items if abs(item.value) <= LARGEST), key=lambda item: item.setting))
        for label, items in lines
    ]
    kept = [(label, items) for label, items in kept if len({item.setting for item in items}) > 1]
    shown = kept[:MOST_CURVES]
    if not shown:
        return None
    left, right, top, bottom = 60.0, width - 14, 16.0, height - 46
    every = [item for _, items in shown for item in items]
    x = make_scale([item.setting for item in every], left, right)
    y = make_scale(
        [part for item in every for part in (item.value, item.low, item.high) if part is not None],
        bottom,
        top,
    )
    if x is None or y is None:
        return None
    drawn = []
    for style, (label, items) in enumerate(shown):
        marks = [
            SettingMark(
                x(item.setting), y(item.value), y(item.value if item.low is None else item.low),
                y(item.value if item.high is None else item.high), item,
            )
            for item in items
        ]  # fmt: skip
        path = "M" + "L".join(f"{mark.x:g},{mark.y:g}" for mark in marks)
        drawn.append(SettingLine(label, style, path, marks))
    # Few settings are told by themselves, not by round numbers between them.
    values = sorted({item.setting for item in every})
    few = len({x(value) for value in values}) == len(values) <= 7
    x_ticks = [Tick(x(value), f"{value:g}") for value in values] if few else x.ticks(6)
    return Sensitivity(
        width, height, left, right, top, bottom, drawn, x_ticks, y.ticks(5), x.log, y.log, len(kept) - len(shown)
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Box:
    y: float
    low: float
    first: float
    middle: float
    third: float
    high: float
    label: str
    run_id: str
    summary: tuple[float, float, float, float, float]
    """5th, 25th, 50th, 75th and 95th percentile of the scores."""
    units: int
    left_out: int
    """Scores that are not finite."""
    baseline: bool


@dataclass(frozen=True, slots=True)
class Spread:
    width: float
    height: float
    left: float
    right: float
    boxes: list[Box]
    ticks: list[Tick]
    log: bool
    reference: float | None
    """Median of the first baseline."""
    more: int


@dataclass(frozen=True, slots=True)
class Scores:
    """What a chart of distributions is given for one configuration."""

    label: str
    run_id: str
    scores: Array
    baseline: bool


def spread(items: Sequence[Scores], *, width: float = 560) -> Spread | None:
    """Lay out the distribution of scores over units; None where no two are told apart by more than two values.

    Answers that are right or wrong have no distribution beyond their mean.
    """
    usable = []
    for item in items:
        finite = item.scores[np.abs(item.scores) <= LARGEST]
        if finite.size >= 4:
            usable.append((item, finite))
    if not usable or all(np.unique(finite).size < 3 for _, finite in usable):
        return None
    shown = usable[:MOST_LINES]
    quantiles = [np.quantile(finite, [0.05, 0.25, 0.5, 0.75, 0.95]) for _, finite in shown]
    left, right = 16 + CHARACTER * min(26, max(len(item.label) for item, _ in shown)), width - 66
    scale = make_scale([float(value) for each in quantiles for value in each], left, right)
    if scale is None:
        return None
    boxes = []
    for place, ((item, finite), each) in enumerate(zip(shown, quantiles, strict=True)):
        low, first, middle, third, high = (float(value) for value in each)
        boxes.append(
            Box(
                24.0 + 22 * place, scale(low), scale(first), scale(middle), scale(third), scale(high), item.label,
                item.run_id, (low, first, middle, third, high), int(finite.size),
                int(item.scores.size - finite.size), item.baseline,
            )
        )  # fmt: skip
    reference = next((box.middle for box in boxes if box.baseline), None)
    return Spread(
        width, 24.0 + 22 * len(boxes) + 26, left, right, boxes, scale.ticks(4), scale.log, reference,
        len(usable) - len(shown),
    )  # fmt: skip


#: Ratios to the best cost that a performance profile is drawn and scored up to, as in AlgoPerf.
LARGEST_RATIO = 4.0


@dataclass(frozen=True, slots=True)
class ProfileLine:
    label: str
    style: int
    path: str
    score: float
    """The mean of the profile over ratios from 1 to :data:`LARGEST_RATIO`."""
    solved: int
    """Tasks whose target was reached."""


@dataclass(frozen=True, slots=True)
class Profile:
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[ProfileLine]
    tasks: tuple[str, ...]
    more: int
    """Configurations of lower scores, which are not drawn."""


def performance_profile(
    labels: Sequence[str], tasks: Sequence[str], costs: Array, *, width: float = 640, height: float = 300
) -> Profile | None:
    """Lay out the share of tasks that each method solves within a multiple of the best cost (arXiv 2306.07179).

    Args:
        labels: one for each row of ``costs``.
        tasks: one for each column.
        costs: [methods, tasks], positive; infinity where the target was missed.

    Returns:
        None where there are fewer than two methods or two tasks, or nobody reached anything.
    """
    if min(costs.shape) < 2 or not np.isfinite(costs).any():
        return None
    ratios, scores = performance_ratios(costs), profile_scores(costs, LARGEST_RATIO)
    order = sorted(range(len(labels)), key=lambda row: (-scores[row], labels[row]))
    left, right, top, bottom = 44.0, width - 16.0, 18.0, height - 42.0
    across = Scale(1.0, LARGEST_RATIO, left, right, log=True)
    up = Scale(0.0, 1.0, bottom, top, log=False)
    lines = []
    for style, row in enumerate(order[:MOST_CURVES]):
        steps = np.sort(ratios[row][ratios[row] <= LARGEST_RATIO])
        path = f"M{left},{up(0.0)}"
        for count, ratio in enumerate(steps, 1):
            path += f"H{across(float(ratio))}V{up(count / len(tasks))}"
        solved = int(np.isfinite(costs[row]).sum())
        lines.append(ProfileLine(labels[row], style, path + f"H{right}", float(scores[row]), solved))
    return Profile(
        width, height, left, right, top, bottom,
        [Tick(across(ratio), f"{ratio:g}") for ratio in (1.0, 1.5, 2.0, 3.0, 4.0)],
        [Tick(up(share), f"{share:.0%}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)],
        lines, tuple(tasks), len(order) - len(lines),
    )  # fmt: skip
