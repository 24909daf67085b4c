"""Which cells were tried: a grid of methods by models, and for each model one of methods by tasks."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import polars as pl

from methodbench.catalog import Catalog
from methodbench.entries import Model, Task
from methodbench_leaderboard.aggregate import find_method, find_model, find_task
from methodbench_leaderboard.records import Records

#: What a cell can be, from what needs a look first to what needs none; and what it is called.
STATES: Mapping[str, str] = {
    "failed": "failed",
    "timeout": "timeout",
    "oom": "out of memory",
    "stale": "stale",
    "ok": "done",
    "never": "never tried",
    "not-applicable": "not applicable",
    "unknown": "not installed",
}
#: Cells of one grid; methods with the fewest runs are left to their own pages beyond that.
MOST_CELLS = 6_000
#: Methods that one command names; a gap of more takes several.
_MOST_NAMED = 12
#: Commands that one gap lists.
MOST_COMMANDS = 8


@dataclass(frozen=True, slots=True)
class CoverageCell:
    """What became of one method on one task and model, over all its settings and seeds."""

    counts: Mapping[str, int]
    """Newest run of every setting and seed by state; empty where nothing was tried."""
    state: str
    """The first of :data:`STATES` that occurs."""
    run_id: str
    """A run in that state; empty where there is none."""
    reason: str
    commands: tuple[str, ...] = ()
    """Commands of the runs in that state, each once."""


@dataclass(frozen=True, slots=True)
class Gap:
    """What is missing in one column, and the commands that fill it."""

    task: str
    state: str
    methods: tuple[str, ...]
    commands: tuple[str, ...]
    more: int
    """Commands beyond :data:`MOST_COMMANDS`."""


@dataclass(frozen=True)
class Coverage:
    """Methods by tasks on one model; the empty model stands for tasks that bring their own."""

    model: str
    methods: list[str]
    tasks: list[str]
    cells: Mapping[tuple[str, str], CoverageCell]
    """By method and task."""
    left_out: int
    """Methods beyond :data:`MOST_CELLS`."""

    @cached_property
    def totals(self) -> Counter[str]:
        """Cells by state."""
        return Counter(cell.state for cell in self.cells.values())

    @cached_property
    def by_method(self) -> dict[str, Counter[str]]:
        """Of each method, its cells by state."""
        found: dict[str, Counter[str]] = {}
        for (method, _), cell in self.cells.items():
            found.setdefault(method, Counter())[cell.state] += 1
        return found

    def _commands(self, methods: Sequence[str], task: str, state: str) -> list[str]:
        """Return what fills a gap: the recorded commands, or one for the defaults of methods that were never tried."""
        recorded = [c for method in methods for c in self.cells[method, task].commands]
        if state != "never":
            return list(dict.fromkeys(_retry(command, state) for command in recorded if command))
        parts = [methods[at : at + _MOST_NAMED] for at in range(0, len(methods), _MOST_NAMED)]
        return [_command(part, self.model, task) for part in parts]

    @cached_property
    def gaps(self) -> list[Gap]:
        """What is missing, by task and state."""
        found = []
        for task in self.tasks:
            by_state: dict[str, list[str]] = {}
            for method in self.methods:
                cell = self.cells.get((method, task))
                if cell is not None and cell.state not in ("ok", "not-applicable", "unknown"):
                    by_state.setdefault(cell.state, []).append(method)
            for state in STATES:
                if state in by_state:
                    methods = by_state[state]
                    commands = self._commands(methods, task, state)
                    more = max(0, len(commands) - MOST_COMMANDS)
                    found.append(Gap(task, state, tuple(methods), tuple(commands[:MOST_COMMANDS]), more))
        return found


def _retry(command: str, state: str) -> str:
    """Return a recorded command that runs its cell again; a failure is a record, and is repeated on request only."""
    again = state != "stale" and command.startswith("methodbench run ")
    return f"{command} --retry" if again else command


def _command(methods: Sequence[str], model: str, task: str) -> str:
    words = ["methodbench", "run", *(word for name in methods for word in ("--method", name))]
    return shlex.join([*words, *(["--model", model] if model else []), "--task", task])


def make_coverage(records: Records, catalog: Catalog) -> list[Coverage]:
    """Return the coverage of each model that has runs, those with most runs first.

    Columns are the tasks that some method was run on; rows are the methods, installed or recorded, whose kind one of
    those tasks evaluates.
    """
    if not len(records):
        return []
    newest = _newest(records)
    runs = dict(records.frame.group_by("model").len().iter_rows())
    parts = {str(key[0]): part for key, part in newest.partition_by("model", as_dict=True).items()}
    order = sorted(parts, key=lambda model: (not model, -runs[model], model))
    return [_coverage(model, parts[model], records, catalog) for model in order]


def _newest(records: Records) -> pl.DataFrame:
    """Return the newest run of each setting and seed, one that was scored before one that failed."""
    cell = (
        "method",
        "params_json",
        "model",
        "task",
        "task_params_json",
        "seed",
        "dtype",
        "device",
        "threads",
    )
    stale = pl.col("id").is_in(list(records.stale)) & (pl.col("status") == "ok")
    order = list(STATES)
    return (
        records.frame.with_row_index("order")
        .with_columns(is_ok=pl.col("status") == "ok")
        .sort("is_ok", "order")
        .unique(cell, keep="last", maintain_order=True)
        .with_columns(state=pl.when(stale).then(pl.lit("stale")).otherwise(pl.col("status")))
        .with_columns(
            place=pl.col("state").replace_strict(order, range(len(order)), default=0, return_dtype=pl.Int64)
        )
        .sort("place", "order", descending=[False, True])
    )


def _coverage(model: str, part: pl.DataFrame, records: Records, catalog: Catalog) -> Coverage:
    tried = part.group_by("method", "task", maintain_order=True).agg(
        pl.col("state"),
        pl.col("id").first(),
        pl.col("reason").first(),
        pl.col("command").filter(pl.col("state") == pl.col("state").first(), pl.col("state") != "ok"),
    )
    cells: dict[tuple[str, str], CoverageCell] = {}
    for method, task, states, run_id, reason, commands in tried.iter_rows():
        reason = records.stale.get(run_id, "") if states[0] == "stale" else reason
        cells[method, task] = CoverageCell(Counter(states), states[0], run_id, reason, tuple(commands))
    tasks = sorted({task for _, task in cells})
    entries: dict[str, Task | None] = {task: find_task(catalog, task) for task in tasks}
    kinds = {kind for entry in entries.values() if entry for kind in entry.kinds}
    kinds.update(part["kind"].unique())
    counts = dict(part.group_by("method").len().iter_rows())
    names = {name for name, entry in catalog.methods.items() if entry.kind in kinds} | set(counts)
    most = max(1, MOST_CELLS // max(1, len(tasks)))
    kept = sorted(sorted(names, key=lambda name: (-counts.get(name, 0), name))[:most])
    entry_of_model = find_model(catalog, model) if model else None
    for method in kept:
        for task, entry in entries.items():
            if (method, task) not in cells:
                cells[method, task] = _untried(catalog, method, model, entry_of_model, entry)
    shown = set(kept)
    return Coverage(
        model,
        kept,
        tasks,
        {place: cells[place] for place in sorted(cells) if place[0] in shown},
        len(names) - len(kept),
    )


def _untried(
    catalog: Catalog, method: str, name: str, model: Model | None, task: Task | None
) -> CoverageCell:
    entry = find_method(catalog, method)
    if entry is None or task is None or (name and model is None):
        return CoverageCell({}, "unknown", "", "no installed plugin registers method, model and task")
    reason = catalog.mismatch(entry, model, task)
    return CoverageCell({}, "not-applicable" if reason else "never", "", reason)
