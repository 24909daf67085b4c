"""How plans, runs and queries grow from 1,000 to 100,000: the table and the plot of the documentation.

    python benchmarks/growth.py [--sizes 1000 10000 100000] [--run 1000 10000] [--rounds 5] [--docs] [--json FILE]

A plan is made of distinct settings in an interpreter of its own; cells are run in batches, one worker at a time;
queries are what `results` and `status` ask, beside the bare question in SQL through plain sqlite3. Everything is to
grow at most linearly: a cell or run of the largest size is to take no more than twice what one of the smallest takes
(a limit of 0.5; the rest is room for noise and for caches that no longer hold everything). `--docs` writes the table
and the plot into the documentation, where nobody edits them by hand.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import engine
import store
from common import Figure, alternate, parser, report

from methodbench.provenance import environment
from methodbench_leaderboard.charts import Scale, make_scale

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "explanation"
#: What is measured: column of the table, and the unit.
COLUMNS = {
    "plan": "plan, new settings [s]",
    "known": "plan, known settings [s]",
    "memory": "memory of the plan [MiB]",
    "cell": "run in a batch [ms a cell]",
    "results": "`results` [s]",
    "status": "`status` [s]",
    "plain results": "bare SQL for `results` [s]",
    "plain status": "bare SQL for `status` [s]",
}
#: Lines of the plot, in seconds, and their colours.
LINES = {
    "plan": "#0b62a4",
    "known": "#5aa9d6",
    "results": "#b4461e",
    "status": "#c99a00",
    "plain results": "#d8a48f",
    "plain status": "#dccf9a",
}
BUDGETS = {"plan, 100,000 cells": engine.PLAN_SECONDS, "results, status": store.BUDGET_SECONDS}
Points = dict[int, dict[str, float]]


def measure(sizes: Sequence[int], runs: Sequence[int], rounds: int) -> Points:
    """Return what each size takes, by column."""
    points: Points = {}
    catalog = engine.toys()
    # The server's start is no cell's.
    few = engine.plan_of(1, catalog)
    for size in sizes:
        empty, full, memory = engine.planning(size, 1)
        points[size] = {"plan": empty, "known": full, "memory": memory}
        if size in runs:
            plan = engine.plan_of(size, catalog)
            start = time.perf_counter()
            engine.run(few, catalog, engine.BATCH)
            middle = time.perf_counter()
            engine.run(plan, catalog, engine.BATCH)
            points[size]["cell"] = 1000 * (time.perf_counter() - middle - (middle - start)) / (size - 1)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "runs.db"
            store.filled(path, size, 2)
            points[size] |= alternate(store.queries(path), rounds)
    return points


def figures(points: Points) -> list[Figure]:
    """Return the growth of each column: cells or runs a second at the largest size beside those at the smallest."""
    found = []
    for name in ("plan", "known", "cell", "results", "status"):
        measured = {size: row[name] for size, row in points.items() if name in row}
        if len(measured) < 2:
            continue
        # A cell's time is told per cell, a query's for the whole database.
        rates = {size: (1000 / value if name == "cell" else size / value) for size, value in measured.items()}
        small, large = min(rates), max(rates)
        found.append(Figure(f"{name}: {large:,} / {small:,}", rates[large], rates[small], 0.5, "1/s"))
    return found


def table(points: Points) -> str:
    """Return the figures as a table in Markdown."""
    lines = [f"| cells or runs | {' | '.join(COLUMNS.values())} |", f"|{' --- |' * (len(COLUMNS) + 1)}"]
    for size, row in points.items():
        cells = (f"{row[name]:.3g}" if name in row else "" for name in COLUMNS)
        lines.append(f"| {size:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(points: Points) -> str:
    """Return seconds against size, both axes logarithmic, as an SVG picture."""
    width, height, left, bottom, right = 640.0, 380.0, 64.0, 330.0, 470.0
    x = make_scale(list(points), left, right)
    y = make_scale(
        [*(row[name] for row in points.values() for name in LINES), *BUDGETS.values()], bottom, 16.0
    )
    assert x is not None
    assert y is not None
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif"'
        ' font-size="12" role="img">',
        "<title>Seconds against cells or runs</title>",
        f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>',
    ]
    for tick in y.ticks():
        parts.append(f'<path d="M{left} {tick.at}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{tick.at + 4}" text-anchor="end">{escape(tick.label)}</text>')
    for size in points:
        parts.append(f'<text x="{x(size)}" y="{bottom + 18}" text-anchor="middle">{size:,}</text>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle}" y="{bottom + 38}" text-anchor="middle">cells or runs</text>')
    parts.append('<text x="14" y="180" transform="rotate(-90 14 180)" text-anchor="middle">seconds</text>')
    for label, seconds in BUDGETS.items():
        parts.append(f'<path d="M{left} {y(seconds)}H{right}" stroke="#555" stroke-dasharray="2 4"/>')
        parts.append(f'<text x="{left + 6}" y="{y(seconds) - 4}" fill="#555">budget: {escape(label)}</text>')
    parts += _lines(points, x, y, right)
    return "\n".join([*parts, "</svg>", ""])


def _lines(points: Points, x: Scale, y: Scale, right: float) -> list[str]:
    """Draw each column, with its name at the end; names that would touch are pushed apart."""
    parts = []
    last = points[max(points)]
    place = -20.0
    for name in sorted(LINES, key=lambda name: y(last[name])):
        colour = LINES[name]
        path = "L".join(f"{x(size)} {y(row[name])}" for size, row in points.items())
        dash = ' stroke-dasharray="6 4"' if name.startswith("plain") else ""
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        parts += [
            f'<circle cx="{x(size)}" cy="{y(row[name])}" r="3" fill="{colour}"/>'
            for size, row in points.items()
        ]
        place = max(place + 15, y(last[name]) + 4)
        text = escape(COLUMNS[name].replace("`", "").partition(" [")[0])
        parts.append(f'<text x="{right + 8}" y="{place}" fill="{colour}">{text}</text>')
    return parts


def circumstances() -> str:
    """Say where and when the figures were taken, and how busy the machine was."""
    host: Mapping[str, object] = environment()
    processor = dict(host["processor"])["model"]  # type: ignore[call-overload]
    load = os.getloadavg()[0]
    when = datetime.now(UTC).strftime("%Y-%m-%d")
    return (
        f"Taken on {when} with Python {platform.python_version()}, {processor}, {host['cores']} cores,"
        f" at a load average of {load:.1f}."
    )


def write(points: Points, folder: Path) -> None:
    """Put the table and the plot into the documentation."""
    (folder / "growth.svg").write_text(plot(points))
    page = folder / "growth.md"
    before, rest = page.read_text().split("<!-- figures -->\n", 1)
    after = rest.split("<!-- end of figures -->\n", 1)[1]
    made = f"<!-- figures -->\n{table(points)}\n\n{circumstances()}\n<!-- end of figures -->\n"
    page.write_text(f"{before}{made}{after}")


def main() -> int:
    """Measure, print, and return 1 when a limit is missed."""
    options = parser(__doc__ or "")
    options.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    options.add_argument(
        "--run", type=int, nargs="*", default=[1_000, 10_000], help="sizes that are also run"
    )
    options.add_argument(
        "--docs", type=Path, nargs="?", const=FOLDER, help="write table and plot into the documentation"
    )
    given = options.parse_args()
    points = measure(sorted(given.sizes), given.run, given.rounds)
    print(table(points))
    if given.docs:
        write(points, given.docs)
    return report(figures(points), given.json)


if __name__ == "__main__":
    raise SystemExit(main())
