"""Progress of a run: a bar with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from methodbench.cli.output import duration, interval, number, size

if TYPE_CHECKING:
    from methodbench.engine.cell import Cell
    from methodbench.engine.driver import Reporter
    from methodbench.engine.plan import Plan
    from methodbench.entries import Model
    from methodbench.store import MetricValue, Run

_MARKS = {"ok": ("ok", "green"), "not-applicable": ("n/a", "yellow")}


class LineReporter:
    """One line per finished cell."""

    def __init__(self) -> None:
        self.total = 0
        self.count = 0
        self._announced: set[str] = set()

    def say(self, text: str) -> None:
        """Print one line."""
        click.echo(text)

    def begin(self, plan: Plan, todo: Sequence[Cell], done: Mapping[str, Run]) -> None:
        self.total = len(todo)
        self.count = 0
        known = f", {len(done)} done before" if done else ""
        skipped = f", {len(plan.skips)} skipped" if plan.skips else ""
        self.say(f"{plan.suite}: {len(todo)} cells to run{known}{skipped}")

    def fetching(self, model: Model, received: int, total: int | None) -> None:
        if model.name not in self._announced:
            self._announced.add(model.name)
            self.say(f"fetching {model.name} ({model.source.partition('!')[0]})")

    def left_out(self, cells: Sequence[Cell], reason: str) -> None:
        self.total -= len(cells)
        self.say(click.style(f"left out {len(cells)} cells: {reason}", fg="yellow"))

    def elsewhere(self, count: int, where: str) -> None:
        self.say(f"waiting for {count} cell{'s' if count != 1 else ''} that run elsewhere: {where}")

    def started(self, label: str) -> None:
        if label.startswith("prepare "):
            self.say(f"preparing {label.removeprefix('prepare ')} (once on this machine)")

    def phase(self, label: str, phase: str) -> None:
        """Lines do not show phases."""

    def finished(self, cell: Cell, run: Run, metrics: Sequence[MetricValue]) -> None:
        self.count += 1
        mark, colour = _MARKS.get(run.status, (run.status, "red"))
        counter = f"[{self.count:>{len(str(self.total))}}/{self.total}]"
        what = f"{click.style(mark.ljust(4), fg=colour)} {cell.label}"
        if run.status == "ok":
            first = next((metric for metric in metrics if metric.primary), None)
            value = (
                f"{first.title} {number(first.value)} {interval(first.low, first.high)}".rstrip()
                if first
                else ""
            )
        else:
            value = run.reason
        self.say(f"{counter} {what}: {value} ({duration(run.wall_seconds)})")

    def end(self) -> None:
        """Nothing is held."""


class BarReporter(LineReporter):
    """The same lines above a bar that says what runs and how long it will take."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        self.console = Console(highlight=False)
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=True,
        )
        self.task: Any = None

    def say(self, text: str) -> None:
        from rich.text import Text

        self.console.print(Text.from_ansi(text), soft_wrap=True)

    def begin(self, plan: Plan, todo: Sequence[Cell], done: Mapping[str, Run]) -> None:
        super().begin(plan, todo, done)
        if self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None
        if todo:
            self.task = self.bar.add_task("starting workers", total=len(todo))
            self.bar.start()

    def _describe(self, text: str) -> None:
        if self.task is not None:
            width = max(20, self.console.width - 62)
            self.bar.update(self.task, description=text if len(text) <= width else text[: width - 1] + "…")

    def fetching(self, model: Model, received: int, total: int | None) -> None:
        super().fetching(model, received, total)
        self._describe(f"fetching {model.name}: {size(received)}" + (f" of {size(total)}" if total else ""))

    def left_out(self, cells: Sequence[Cell], reason: str) -> None:
        super().left_out(cells, reason)
        if self.task is not None:
            self.bar.update(self.task, total=self.total)

    def started(self, label: str) -> None:
        super().started(label)
        self._describe(label)

    def phase(self, label: str, phase: str) -> None:
        self._describe(f"{phase}: {label}")

    def finished(self, cell: Cell, run: Run, metrics: Sequence[MetricValue]) -> None:
        super().finished(cell, run, metrics)
        if self.task is not None:
            self.bar.advance(self.task)

    def end(self) -> None:
        self.bar.stop()


def reporter(*, quiet: bool) -> Reporter:
    """Return what fits the output: nothing, a bar on a terminal, lines elsewhere."""
    from methodbench.engine.driver import SilentReporter

    if quiet:
        return SilentReporter()
    return BarReporter() if sys.stdout.isatty() else LineReporter()
