"""Geometry of charts: numbers in, coordinates out. Templates draw them as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from methodbench.stats import pareto_front
from methodbench_leaderboard.formats import compact

#: Above this ratio of largest to smallest a positive axis is logarithmic.
LOG_RATIO = 12.0
#: The same for costs, which come in doublings.
COST_LOG_RATIO = 3.0
#: Curves may rise this far above their median before the axis ends, and fall this far below it.
RISE, FALL = 1e3, 1e9
#: Where curves cross zero: this many interquartile ranges beyond the quartiles.
REACH = 100.0
#: Values beyond this are drawn at the end of an axis: differences of larger ones overflow.
LARGEST = 1e300
#: Approximate width of a character of a label, in units of the view box.
CHARACTER = 6.8
#: Lines of one chart of curves; more are told by neither colour nor dash.
MOST_CURVES = 8
#: Points of a drawn curve.
MOST_POINTS = 160


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values to coordinates, linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        """Return the coordinate of ``value``, held within the axis."""
        low, high, at = (
            (math.log10(self.low), math.log10(self.high), math.log10(max(value, self.low)))
            if self.log
            else (self.low, self.high, value)
        )
        share = min(max((at - low) / (high - low), 0.0), 1.0)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, most: int = 6) -> list[Tick]:
        """Return round values within the axis."""
        return [Tick(self(value), compact(value)) for value in self._values(most)]

    def _values(self, most: int) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for digits in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
                values = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
                values = [
                    value for value in values if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)
                ]
                if len(values) <= most + 1:
                    break
            return values[:: max(1, math.ceil(len(values) / most))] if len(values) > most + 1 else values
        raw = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def make_scale(
    values: Sequence[float], start: float, end: float, *, log_ratio: float = LOG_RATIO, pad: float = 0.06
) -> Scale | None:
    """Return a scale that shows every value up to :data:`LARGEST`; None when there is none.

    It is logarithmic where all values are positive and the largest is over ``log_ratio`` times the smallest.
    """
    finite = [float(value) for value in values if abs(value) <= LARGEST]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    if low > 0 and high / low > log_ratio:
        margin = (high / low) ** pad
        if math.isfinite(high * margin) and low / margin > 0:
            return Scale(low / margin, high * margin, start, end, True)
    # Values that differ in their last bits only are drawn as equal.
    size = max(abs(low), abs(high))
    width = high - low if high - low > 1e-9 * size else 0.1 * size
    width = width if width > 1 / LARGEST else 1.0
    return Scale(low - pad * width, high + pad * width, start, end, False)


@dataclass(frozen=True, slots=True)
class Strip:
    """The small interval inside a table cell."""

    low: float
    high: float
    at: float
    reference: float | None


def make_strips(
    intervals: Sequence[tuple[float, float | None, float | None] | None],
    reference: float | None,
    width: float = 120,
) -> list[Strip | None]:
    """Return strips for (value, low, high) triples on one common scale; None where there is nothing to draw."""
    values = [part for item in intervals if item for part in item if part is not None]
    scale = make_scale(values, 4, width - 4)
    if scale is None:
        return [None] * len(intervals)
    strips: list[Strip | None] = []
    for item in intervals:
        if item is None or not math.isfinite(item[0]):
            strips.append(None)
            continue
        value, low, high = item
        strips.append(
            Strip(
                scale(value if low is None else low),
                scale(value if high is None else high),
                scale(value),
                None if reference is None or not math.isfinite(reference) else scale(reference),
            )
        )
    return strips


@dataclass(frozen=True, slots=True)
class Point:
    """What a chart of quality against cost is given for one configuration."""

    label: str
    run_id: str
    cost: float
    quality: float
    baseline: bool = False
    simulated: bool = False
    compared: bool = True
    """Whether it may be on the front; False for what is not to be compared with the rest."""


@dataclass(frozen=True, slots=True)
class Mark:
    x: float
    y: float
    point: Point
    on_front: bool
    text: tuple[float, float, str] | None
    """Where the label stands and its anchor; None where there is no room."""


@dataclass(frozen=True, slots=True)
class ParetoChart:
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x: Scale
    y: Scale
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Mark]
    front: str
    """Path of the front, empty where fewer than two points are on it."""
    left_out: list[str]
    """Labels of configurations without finite numbers."""


def pareto_chart(
    points: Sequence[Point],
    *,
    lower_is_better: bool,
    width: float = 560,
    height: float = 330,
    sketch: bool = False,
) -> ParetoChart | None:
    """Lay out quality against cost; None where fewer than two points or only one cost can be drawn."""
    drawn = [point for point in points if math.isfinite(point.cost) and math.isfinite(point.quality)]
    if len(drawn) < 2:
        return None
    costs = [point.cost for point in drawn]
    if max(costs) - min(costs) <= 0.01 * abs(max(costs)):
        return None
    left, right, top, bottom = (
        (6.0, width - 6, 6.0, height - 6) if sketch else (56.0, width - 16, 26.0, height - 46)
    )
    x = make_scale(costs, left, right, log_ratio=COST_LOG_RATIO)
    qualities = [point.quality for point in drawn]
    # The better end is at the top, whichever direction the metric has.
    y = make_scale(qualities, top if lower_is_better else bottom, bottom if lower_is_better else top)
    if x is None or y is None:
        return None
    sign = 1.0 if lower_is_better else -1.0
    best = np.array([point.compared for point in drawn])
    best[best] = pareto_front(
        np.array([[point.cost, sign * point.quality] for point in drawn if point.compared], dtype=np.float64)
    )
    spots = [(x(point.cost), y(point.quality)) for point in drawn]
    on = sorted(spot for spot, front in zip(spots, best, strict=True) if front)
    path = ""
    if len(on) > 1:
        path = f"M{on[0][0]:g},{on[0][1]:g}" + "".join(f"H{px:g}V{py:g}" for px, py in on[1:])
    texts: list[tuple[float, float, str] | None] = [None] * len(drawn)
    if not sketch:
        order = sorted(
            range(len(drawn)), key=lambda i: (not best[i], not drawn[i].baseline, costs[i], drawn[i].label)
        )
        lines = [
            area
            for (x0, y0), (x1, y1) in pairwise(on)
            for area in ((x0, y0 - 1, x1, y0 + 1), (x1 - 1, min(y0, y1), x1 + 1, max(y0, y1)))
        ]
        labels = [point.label for point in drawn]
        texts = _place_labels(labels, spots, order, (left, right, top, bottom), lines)
    marks = [
        Mark(px, py, point, bool(front), text)
        for (px, py), point, front, text in zip(spots, drawn, best, texts, strict=True)
    ]
    # What is on the front is drawn last, above the rest.
    marks.sort(key=lambda mark: (mark.on_front, mark.x, mark.y))
    left_out = [point.label for point in points if point not in drawn]
    return ParetoChart(
        width, height, left, right, top, bottom, x, y, x.ticks(7), y.ticks(5), marks, path, left_out
    )  # fmt: skip


#: Where a label may stand beside its point, the best place first.
_BESIDE = (
    (8, 4, "start"),
    (-8, 4, "end"),
    (6, -8, "start"),
    (-6, -8, "end"),
    (6, 16, "start"),
    (-6, 16, "end"),
)


def _place_labels(
    labels: Sequence[str],
    spots: Sequence[tuple[float, float]],
    order: Sequence[int],
    box: tuple[float, float, float, float],
    lines: Sequence[tuple[float, float, float, float]],
) -> list[tuple[float, float, str] | None]:
    """Put labels beside their points, in ``order``, where they cover neither a point, a line nor one another."""
    left, right, top, bottom = box
    taken = [*lines, *((px - 5, py - 5, px + 5, py + 5) for px, py in spots)]
    placed: list[tuple[float, float, str] | None] = [None] * len(labels)
    for index in order:
        px, py = spots[index]
        width = CHARACTER * len(labels[index])
        for dx, dy, anchor in _BESIDE:
            start = px + dx if anchor == "start" else px + dx - width
            area = (start, py + dy - 10, start + width, py + dy + 3)
            if area[0] < left or area[2] > right + 14 or area[1] < top - 12 or area[3] > bottom:
                continue
            own = (px - 5, py - 5, px + 5, py + 5)
            if any(_overlap(area, other) for other in taken if other != own):
                continue
            taken.append(area)
            placed[index] = (round(px + dx, 1), round(py + dy, 1), anchor)
            break
    return placed


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@dataclass(frozen=True, slots=True)
class Whisker:
    """What a forest plot is given for one configuration."""

    label: str
    run_id: str
    value: float
    low: float | None
    high: float | None
    baseline: bool = False


@dataclass(frozen=True, slots=True)
class ForestLine:
    y: float
    at: float | None
    """None where the value is not finite."""
    low: float
    high: float
    item: Whisker


@dataclass(frozen=True, slots=True)
class ForestChart:
    width: float
    height: float
    left: float
    right: float
    lines: list[ForestLine]
    ticks: list[Tick]
    reference: float | None
    log: bool


def forest_chart(items: Sequence[Whisker], *, width: float = 560) -> ForestChart | None:
    """Lay out intervals below one another; None where fewer than two values are finite."""
    if sum(math.isfinite(item.value) for item in items) < 2:
        return None
    left, right = min(196.0, 16 + CHARACTER * max(len(item.label) for item in items)), width - 66
    values = [part for item in items for part in (item.value, item.low, item.high) if part is not None]
    scale = make_scale(values, left, right)
    if scale is None:
        return None
    lines = []
    for index, item in enumerate(items):
        finite = math.isfinite(item.value)
        lines.append(
            ForestLine(
                y=24.0 + 22 * index,
                at=scale(item.value) if finite else None,
                low=scale(item.low if item.low is not None else item.value) if finite else left,
                high=scale(item.high if item.high is not None else item.value) if finite else left,
                item=item,
            )
        )
    pinned = next((item.value for item in items if item.baseline and math.isfinite(item.value)), None)
    return ForestChart(
        width=width,
        height=24.0 + 22 * len(items) + 26,
        left=left,
        right=right,
        lines=lines,
        ticks=scale.ticks(4),
        reference=None if pinned is None else scale(pinned),
        log=scale.log,
    )


@dataclass(frozen=True, slots=True)
class Curve:
    """What a chart of curves is given for one configuration: one array of points a seed."""

    label: str
    run_id: str
    seeds: list[NDArray[np.float64]]
    key: str = ""
    """What the page calls the configuration by."""


@dataclass(frozen=True, slots=True)
class CurveLine:
    label: str
    run_id: str
    key: str
    style: int
    path: str
    band: str
    """Outline of the range over seeds; empty with one seed."""
    seeds: int
    last: float


@dataclass(frozen=True, slots=True)
class CurveChart:
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    lines: list[CurveLine]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    log: bool
    clipped: bool
    """Whether some points lie beyond the axis; they are drawn at its edge."""
    left_out: list[str] = field(default_factory=list)
    x_label: str = ""


def curve_chart(
    curves: Sequence[Curve],
    *,
    positions: Callable[[int], Sequence[float] | None] | None = None,
    x_label: str = "",
    width: float = 560,
    height: float = 320,
) -> CurveChart | None:
    """Lay out mean curves with the range over seeds; None where no curve has two points.

    The first :data:`MOST_CURVES` are drawn. Points that are not finite break a line.

    Args:
        positions: where so many points lie, rising; over their numbers by default, and where it is None.
        x_label: what positions count.
    """
    usable = [curve for curve in curves if any(points.size > 1 for points in curve.seeds)]
    shown = usable[:MOST_CURVES]
    if not shown:
        return None
    left, right, top, bottom = 56.0, width - 12, 20.0, height - 46
    summaries = [_over_seeds(curve.seeds) for curve in shown]
    steps = max(mean.size for mean, _, _ in summaries)
    everything = np.concatenate([part for summary in summaries for part in summary])
    finite = everything[np.isfinite(everything)]
    if not finite.size:
        return None
    ends = _limits(finite)
    y = make_scale(ends, bottom, top, pad=0.04)
    places = positions(steps) if positions else None
    if places is None or any(b <= a for a, b in pairwise(places)):
        places, x_label = range(steps), "point of the curve"
    first = float(places[0])
    # What is listed by powers is read by powers.
    log = first > 0 and float(places[-1]) / first >= LOG_RATIO
    x = Scale(first, float(places[-1]) if steps > 1 else first + 1, left, right, log)
    if y is None:
        return None
    lines = []
    for style, (curve, (mean, low, high)) in enumerate(zip(shown, summaries, strict=True)):
        keep = np.unique(np.linspace(0, mean.size - 1, min(mean.size, MOST_POINTS)).round().astype(int))
        xs = [x(float(places[step])) for step in keep]
        band = ""
        if len(curve.seeds) > 1 and np.isfinite(low[keep]).all() and np.isfinite(high[keep]).all():
            upper = [f"{px:g},{y(float(value)):g}" for px, value in zip(xs, high[keep], strict=True)]
            lower = [f"{px:g},{y(float(value)):g}" for px, value in zip(xs, low[keep], strict=True)]
            band = "M" + "L".join(upper + lower[::-1]) + "Z"
        path = _path(xs, mean[keep], y)
        lines.append(
            CurveLine(
                curve.label, curve.run_id, curve.key, style, path, band, len(curve.seeds), float(mean[-1])
            )
        )
    return CurveChart(
        width, height, left, right, top, bottom, lines, x.ticks(6), y.ticks(5), y.log,
        bool(finite.min() < ends[0] or finite.max() > ends[1]),
        [curve.label for curve in usable[MOST_CURVES:]], x_label + (", log scale" if log else ""),
    )  # fmt: skip


def _limits(finite: NDArray[np.float64]) -> tuple[float, float]:
    """Return the ends of an axis that one exploding curve must not stretch until the others are flat."""
    low, high = float(finite.min()), float(finite.max())
    if low > 0:
        middle = float(np.median(finite))
        return max(low, middle / FALL), min(high, middle * RISE)
    first, last = (float(value) for value in np.percentile(finite, [25, 75]))
    reach = REACH * (last - first) or math.inf
    return max(low, first - reach), min(high, last + reach)


def _over_seeds(
    seeds: Sequence[NDArray[np.float64]],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    shortest = min(points.size for points in seeds if points.size > 1)
    stacked = np.stack([points[:shortest] for points in seeds if points.size > 1])
    with np.errstate(invalid="ignore"):
        return stacked.mean(axis=0), stacked.min(axis=0), stacked.max(axis=0)


def _path(xs: Sequence[float], values: NDArray[np.float64], y: Scale) -> str:
    parts = []
    pen_down = False
    for px, value in zip(xs, values, strict=True):
        if not math.isfinite(value):
            pen_down = False
            continue
        parts.append(f"{'L' if pen_down else 'M'}{px:g},{y(float(value)):g}")
        pen_down = True
    return "".join(parts)


@dataclass(frozen=True, slots=True)
class Bar:
    x: float
    y: float
    width: float
    height: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True)
class Histogram:
    width: float
    height: float
    bottom: float
    bars: list[Bar]
    rug: list[float]
    """Single scores, where there are few enough to see."""
    ticks: list[Tick]
    mean: float
    left_out: int
    """Scores that are not finite, or beyond :data:`LARGEST`."""


def histogram(scores: NDArray[np.float64], *, width: float = 560, height: float = 150) -> Histogram | None:
    """Lay out the distribution of per-unit scores; None for fewer than two scores that can be drawn."""
    finite = scores[np.abs(scores) <= LARGEST]
    if finite.size < 2:
        return None
    left, right, top, bottom = 12.0, width - 12, 8.0, height - 32
    scale = make_scale([float(finite.min()), float(finite.max())], left, right, log_ratio=math.inf, pad=0.02)
    if scale is None:
        return None
    count = int(min(40, max(15, math.ceil(math.sqrt(finite.size) * 1.5))))
    counts, edges = np.histogram(finite, bins=count, range=(scale.low, scale.high))
    tallest = int(counts.max())
    bars = []
    for index, amount in enumerate(counts):
        if amount:
            x0, x1 = scale(float(edges[index])), scale(float(edges[index + 1]))
            size = round((bottom - top) * int(amount) / tallest, 1)
            bars.append(
                Bar(x0, round(bottom - size, 1), round(max(x1 - x0 - 1, 1), 1), size, float(edges[index]),
                    float(edges[index + 1]), int(amount))
            )  # fmt: skip
    rug = [scale(float(score)) for score in finite] if finite.size <= 80 else []
    return Histogram(
        width,
        height,
        bottom,
        bars,
        rug,
        scale.ticks(6),
        scale(float(finite.mean())),
        int(scores.size - finite.size),
    )
