"""Optimizers and methods of training by their records: fills the tables of a page from a database of results.

    python benchmarks/optimizers.py --db FILE [--db FILE ...] [--page docs/explanation/optimizers.md]

Without ``--page`` the tables are printed. Every number is read from the records. A value is the mean over seeds of each
unit's score, with a 95 % interval over units (over seeds, where a run has one score); a difference is paired by unit.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

from _tables import (
    BySeed,
    Metrics,
    fill,
    header,
    how,
    interval,
    line,
    metrics_of,
    options,
    primary,
    scores,
    value,
    verdicts,
)

from methodbench import stats
from methodbench.store import Run, open_store
from methodbench.tuning import is_trial, regime

#: What a row is held against: the row of the first of these methods that was tuned as it was.
AGAINST = ("plain-training", "adamw")
WORDS = {True: "better", False: "worse"}
Key = tuple[str, str, str]


def main() -> int:
    """Read, and print or fill in."""
    given = options(__doc__).parse_args()
    tables: dict[str, list[str]] = {}
    for db in given.db:
        with open_store(db, create=False) as store:
            runs = [
                run for run in store.runs() if run.kind in ("optimizer", "training") and run.status == "ok"
            ]
            runs = [run for run in runs if not is_trial(run.variant)]
            metrics = metrics_of(store, runs)
        parts = {
            kind: list(results([run for run in runs if run.kind == kind], metrics))
            for kind in ("optimizer", "training")
        }
        parts["claims"] = list(verdicts(runs, db))
        for name, lines in parts.items():
            tables[name] = [*tables.get(name, lines[:2]), *lines[2:]]
    fill(given.page, tables)
    return 0


def results(runs: list[Run], metrics: Metrics) -> Iterator[str]:
    """Lines of the table of one kind of methods: a row for every configuration on every task."""
    rows: dict[Key, BySeed] = {}
    of_task: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.started_at):
        of_task.setdefault(run.task, []).append(run)
    for task, ran in of_task.items():
        varied = sorted(
            name
            for name in {name for run in ran for name in run.task_params}
            if len({str(run.task_params.get(name)) for run in ran}) > 1
        )
        for run in ran:
            known = {name: run.task_params.get(name) for name in varied}
            settings = ", ".join(f"{name}={given}" for name, given in known.items() if given is not None)
            where = ", ".join(part for part in (task, run.model or "", settings) if part)
            rows.setdefault((where, run.method, run.variant), {})[run.seed] = run
    columns = ("task", "method", "configuration", "seeds", "metric", "value", "steps to target")
    yield from header(*columns, "against", "difference", "verdict")
    for key in sorted(rows, key=lambda key: (key[0], regime(key[2]), key[1] not in AGAINST, key[1], key[2])):
        task, method, variant = key
        by_seed = rows[key]
        first = primary(by_seed, metrics)
        if first is None:
            continue
        reached = [metrics[run.id].get("steps-to-target") for run in by_seed.values()]
        steps = [math.inf if row.value is None else row.value for row in reached if row is not None]
        other = peer(key, rows)
        against, difference, word = "", "", ""
        if other is not None:
            shared = sorted(set(by_seed) & set(rows[other]))
            ours, theirs = (
                scores({seed: rows[k][seed] for seed in shared}, first.name, metrics) for k in (key, other)
            )
            bounds = (
                stats.difference_interval(ours, theirs, how(first))
                if ours.size == theirs.size and ours.size > 1
                else None
            )
            if bounds is not None:
                gap = stats.aggregate(ours, how(first)) - stats.aggregate(theirs, how(first))
                against, difference = f"`{other[1]}`", interval(gap, *bounds)
                decided = bounds[1] < 0 or bounds[0] > 0
                word = WORDS[(gap < 0) == (first.direction == "lower")] if decided else "undecided"
        yield line(
            task,
            f"`{method}`",
            configured(variant, by_seed),
            str(len(by_seed)),
            first.title or first.name,
            value(by_seed, first, metrics),
            told(steps),
            against,
            difference,
            word,
        )


def told(steps: list[float]) -> str:
    """Return the mean of steps to a target, or how many runs missed it; empty where there is no target."""
    missed = sum(not math.isfinite(step) for step in steps)
    if missed:
        return f"missed by {missed} of {len(steps)}"
    return f"{sum(steps) / len(steps):.0f}" if steps else ""


def configured(variant: str, by_seed: BySeed) -> str:
    """Return how the hyperparameters came about; some tasks choose the rate by trials within every run."""
    trials = {len(run.facts.get("trials", ())) for run in by_seed.values()}
    chosen = f", rate chosen by {max(trials)} trials of each run" if max(trials) > 1 else ""
    return (variant or "defaults") + chosen


def peer(key: Key, rows: dict[Key, BySeed]) -> Key | None:
    """Return the row that one is held against: the same task, tuned alike; None for that row itself."""
    task, method, variant = key
    for name in AGAINST:
        fits = [k for k in rows if k[:2] == (task, name) and regime(k[2]) == regime(variant)]
        if fits:
            return None if method == name else min(fits, key=lambda k: len(k[2]))
    return None


if __name__ == "__main__":
    sys.exit(main())
