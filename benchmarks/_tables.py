"""What the scripts that fill pages of measured results share: rows of Markdown from records, averaged over seeds."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from methodbench import stats
from methodbench.api import claims
from methodbench.catalog import load_catalog
from methodbench.store import MetricValue, Run, Store

MARKER = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
#: Finished runs of one configuration by seed.
BySeed = dict[int, Run]
#: Metrics by run and name.
Metrics = dict[str, dict[str, MetricValue]]


def options(doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of a script that fills a page from databases."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--db", required=True, action="append", help="database of results; repeatable")
    parser.add_argument("--page", type=Path, help="page to fill; without it the tables are printed")
    return parser


def fill(page: Path | None, sections: Mapping[str, Sequence[str]]) -> None:
    """Write each section between its marks on the page, or print all; other sections of the page stay as they are.

    Raises:
        SystemExit: the page has no place for a section.
    """
    if page is None:
        print("\n\n".join(f"{name}\n\n{joined(lines)}" for name, lines in sections.items()))
        return
    text = page.read_text(encoding="utf-8")
    unplaced = sections.keys() - {match[2] for match in MARKER.finditer(text)}
    if unplaced:
        marks = ", ".join(f"<!-- {name} -->" for name in sorted(unplaced))
        raise SystemExit(
            f"{page} has no place for some of the records: it needs the marks {marks}, each with an end"
        )

    def filled(match: re.Match[str]) -> str:
        return f"{match[1]}\n{joined(sections[match[2]])}\n\n{match[3]}" if match[2] in sections else match[0]

    page.write_text(MARKER.sub(filled, text), encoding="utf-8")


def joined(lines: Sequence[str]) -> str:
    """Return a table as text; a head without rows says so."""
    return "\n".join(lines) if lines[2:] else "No records."


def metrics_of(store: Store, runs: Iterable[Run]) -> Metrics:
    """Return the metrics of the runs, by run and name."""
    found: Metrics = {}
    for row in store.metrics(run.id for run in runs):
        found.setdefault(row.run_id, {})[row.name] = row
    return found


def primary(by_seed: BySeed, metrics: Metrics) -> MetricValue | None:
    """Return the primary metric of the first run; None where it has none."""
    run = next(iter(by_seed.values()))
    return next((row for row in metrics.get(run.id, {}).values() if row.primary), None)


def how(row: MetricValue) -> str:
    """Return how scores are summed up; one score per run is averaged over seeds."""
    return "mean" if row.aggregate == "single" else row.aggregate


def scores(by_seed: BySeed, name: str, metrics: Metrics) -> np.ndarray:
    """Return the scores per unit, means over seeds; of runs with one score, those of the seeds."""
    found = np.stack([metrics[by_seed[seed].id][name].unit_scores() for seed in sorted(by_seed)])
    return found[:, 0] if found.shape[1] == 1 else found.mean(0)


def value(by_seed: BySeed, row: MetricValue, metrics: Metrics) -> str:
    """Return a metric over the seeds with its 95 % interval over units."""
    mine = scores(by_seed, row.name, metrics)
    bounds = stats.bootstrap_interval(mine, how(row)) if mine.size > 1 else None
    return shown(stats.aggregate(mine, how(row)), *(bounds or (None, None)))


def verdicts(runs: list[Run], db: str) -> Iterator[str]:
    """Lines of the table of claims that the records can judge."""
    yield from header("method", "claim", "where", "metric", "left", "right", "difference", "verdict")
    places = {
        run.id: ", ".join(part for part in (run.model or "", run.task, device_class(run)) if part)
        for run in runs
    }
    methods = load_catalog().methods
    for name in sorted({run.method for run in runs}):
        for judged in claims(name, db=db) if methods[name].claims else ():
            for row in judged.conditions:
                where = next((places[run] for run in row.runs_left if run in places), None)
                if where is None or row.verdict == "not attempted" or row.left is None or row.right is None:
                    continue
                difference = interval(row.difference, row.low, row.high) or number(row.difference)
                sides = (where, row.metric, number(row.left), number(row.right), difference)
                yield line(f"`{name}`", judged.claim.text, *sides, row.verdict)


def label(run: Run) -> str:
    """Return the preset whose hyperparameters a run has: a preset's name may mean others since it ran."""
    presets = load_catalog().methods[run.method].presets
    if presets.get(run.variant) == run.params_passed:
        return run.variant
    same = [name for name, params in presets.items() if params == run.params_passed]
    return same[0] if run.variant in presets and same else run.variant


def device_class(run: Run) -> str:
    """Return ``cpu`` or ``cuda``."""
    return run.device.partition(":")[0]


def shown(value: float | None, low: float | None, high: float | None) -> str:
    """Return a value with its 95 % interval, where it has one."""
    if value is None or low is None or high is None:
        return number(value)
    return f"{number(value)} [{number(low)}, {number(high)}]"


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """Return a difference with its 95 % interval, four digits each; empty without them."""
    if value is None or low is None or high is None:
        return ""
    # Differences of means that cancel leave rounding errors.
    return "{:+.4g} [{:+.4g}, {:+.4g}]".format(*(round(number, 12) + 0.0 for number in (value, low, high)))


def header(*names: str) -> Iterable[str]:
    """Lines that open a table."""
    return line(*names), line(*("---" for _ in names))


def line(*cells: str) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(cells)} |"


def number(value: float | None) -> str:
    """Return a number with four digits."""
    return "" if value is None else f"{value:.4g}"
