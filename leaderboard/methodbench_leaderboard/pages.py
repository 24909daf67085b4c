"""Writes the pages: view models of boards and records, rendered into a folder that is then swapped in."""

from __future__ import annotations

import contextlib
import math
import secrets
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import polars as pl
from jinja2 import Environment as Jinja
from jinja2 import PackageLoader, StrictUndefined

from methodbench import __version__
from methodbench.catalog import Catalog
from methodbench.engine.why import stale_runs
from methodbench.entries import FIDELITIES, Method, Task
from methodbench.errors import MethodbenchError
from methodbench.parity import records_of
from methodbench.stats import DRAWS, SEED
from methodbench.store import MetricValue, Store
from methodbench_leaderboard import boarddata, charts, downloads, formats, shards
from methodbench_leaderboard.aggregate import (
    Board,
    Cell,
    Group,
    MetricInfo,
    Question,
    Row,
    Table,
    find_model,
    find_task,
    make_boards,
    number,
)
from methodbench_leaderboard.records import Records, metric_info

#: Tells a folder of ours from anything else that must not be replaced.
MARKER = ".methodbench-site"
#: With more questions than this, a table writes intervals and differences below its values ...
WIDE = 1
#: ... and with more cells than this it leaves the differences and charts to the pages of tasks.
COMPACT = 240
#: Missing cells and failures that a page lists; the rest is counted.
MOST_LISTED = 60

#: Up to this many runs each has a page of its own; more are shown by one page from sharded data.
MOST_RUN_PAGES = 400
#: Newest runs that the page of all runs lists, and the page of a method.
MOST_RUNS, MOST_RUNS_OF_METHOD = 500, 100

_STATIC = (
    "site.css", "site.js", "run.js", "stats.js", "tables.js", "charts.js", "board.js", "compare.js", "favicon.svg",
)  # fmt: skip


def write_site(store: Store, catalog: Catalog, out: Path) -> Path:
    """Write the whole site beside ``out``, then put it in its place; see :func:`methodbench_leaderboard.build`."""

    def write(fresh: Path) -> None:
        _Site(store, catalog, fresh).write()
        (fresh / MARKER).write_text("A site built by methodbench; the next build replaces this folder.\n")

    replace_folder(out, write)
    return out / "index.html"


def replace_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new folder, then put it in the place of ``out`` in one step.

    Raises:
        MethodbenchError: ``out`` holds something that is not a site, or cannot be written; it is left as it was.
    """
    target = out.expanduser().resolve()
    _check_replaceable(target)
    fresh = target.parent / f".{target.name}-{secrets.token_hex(4)}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        try:
            write(fresh)
            _swap(fresh, target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        where = error.filename or target
        raise MethodbenchError(
            f"cannot write the site: {where}: {error.strerror or error}",
            "Make room or choose another folder. What was there is unchanged.",
        ) from error


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise MethodbenchError(f"{target} is a file, not a folder", "Choose another folder.")
    if not (target / MARKER).is_file() and any(target.iterdir()):
        raise MethodbenchError(
            f"{target} is not empty and was not built by methodbench",
            "Nothing was replaced: choose another folder, or empty this one.",
        )


def _swap(fresh: Path, target: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    old = target.parent / f"{fresh.name}-old"
    target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _QuestionView:
    """One question of a table, with its charts."""

    question: Question
    task: Task | None
    anchor: str
    strips: Mapping[str, charts.Strip | None]
    pareto: charts.ParetoChart | None
    cost_label: str
    forest: charts.ForestChart | None
    curves: list[tuple[str, charts.CurveChart]]
    compared: bool
    """Whether some row has a difference to the baseline."""
    metrics: list[MetricInfo]
    """Every metric that the question was scored by, the primary one first."""


@dataclass(frozen=True, slots=True)
class _TableView:
    table: Table
    questions: list[_QuestionView]
    costs: Mapping[str, Cell | None]
    """Of each row, the cell that costs are read from."""
    missing: list[Any]
    layout: Literal["full", "wide", "compact"]
    shows: frozenset[str]
    """Which cost columns have a value in some row."""
    axes: list[tuple[str, str]]
    """What quality may be drawn against: field of a run, label."""
    data: str
    """Path of what scripts rank again from."""

    @property
    def columns(self) -> int:
        per_question = [
            {"full": 3 + asked.compared, "wide": 2, "compact": 1}[self.layout] for asked in self.questions
        ]
        return 1 + sum(per_question) + len(self.shows)


@dataclass(frozen=True, slots=True)
class _Offers:
    """What a reader may filter a board by, and the columns to choose from."""

    tasks: list[tuple[str, str]]
    """Slug and name."""
    storages: list[str]
    costs: frozenset[str]
    columns: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class _BoardView:
    board: Board
    path: str
    tables: list[_TableView]
    runs: int
    sketch: charts.ParetoChart | None
    top: Group
    """The group of most rows on the first table, cut to the best."""
    lead: _TableView
    offers: _Offers


@dataclass(frozen=True, slots=True)
class _Section:
    """One question on the page of its task."""

    title: str
    asked: _QuestionView
    anchor: str
    table: Table
    board: str
    """Path of the board, with the table's anchor."""
    board_title: str


class _Site:
    def __init__(self, store: Store, catalog: Catalog, folder: Path) -> None:
        self.store = store
        self.records = records = Records(store, stale_runs(store, catalog))
        self.sharded = len(records) > MOST_RUN_PAGES
        self.catalog = catalog
        self.folder = folder
        self.jinja = Jinja(
            loader=PackageLoader("methodbench_leaderboard"),
            autoescape=True,
            undefined=StrictUndefined,
            finalize=formats.harmless,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        for name in (
            "arxiv_url", "repository_url", "number", "signed", "size", "seconds", "moment", "plain", "shorten",
            "short_digest",
        ):  # fmt: skip
            self.jinja.filters[name] = getattr(formats, name)
        self.jinja.filters["finite"] = lambda value: value is not None and math.isfinite(value)
        self.jinja.filters["sortable"] = _sortable
        self.jinja.filters["slug"] = formats.slug
        self.jinja.filters["row_id"] = boarddata.row_id
        self.jinja.filters["score"] = lambda value: formats.number(number(value))
        self.jinja.globals.update(
            run_path=self._run_path,
            method_path=_method_path,
            task_path=lambda name: f"tasks/{formats.slug(name)}.html",
            fidelities=FIDELITIES,
            records=records,
            version=__version__,
            draws=DRAWS,
            bootstrap_seed=SEED,
        )

    def write(self) -> None:
        records = self.records
        boards = [self._board_view(board) for board in make_boards(records, self.catalog)]
        on_boards = {
            run.id: view.path
            for view in boards
            for shown in view.tables
            for row in shown.table.rows
            for cell in row.cells.values()
            for run in cell.runs
        }
        methods = self._methods()
        counts = Counter(dict(records.frame.group_by("status").len().iter_rows()))
        documents = records.documents(records.frame["id"].to_list())
        collector = shards.Collector(on_boards)
        if self.sharded:
            documents = collector.through(documents)
        self.jinja.globals["downloads"] = downloads.write(self.store, records, documents, self.folder)
        self._page(
            "index.html", "home.html", section="boards", boards=boards, counts=counts, **self._failures()
        )
        for view in boards:
            self._page(view.path, "board.html", section="boards", view=view)
            for shown in view.tables:
                boarddata.write_table(
                    self.folder, view.path, shown.table, shown.costs, self._run_path, _method_path
                )
        boarddata.write_index(self.folder, [(view.board, view.path) for view in boards])
        self._page("compare.html", "compare.html", section="boards", boards=boards)
        newest_first = records.frame.reverse()
        run_counts = dict(newest_first.group_by("method").len().iter_rows())
        self._page("methods.html", "methods.html", section="methods", methods=methods, run_counts=run_counts)
        for name, entry in methods.items():
            of_method = newest_first.filter(pl.col("method") == name)
            self._method_page(name, entry, of_method, boards)
        self._task_pages(boards)
        self._page(
            "runs.html", "runs.html", section="runs", runs=records.briefs(newest_first.head(MOST_RUNS))
        )
        for digest, environment in sorted(records.environments.items()):
            data = dict(environment.data)
            packages = data.pop("packages", {})
            self._page(
                _environment_path(digest), "environment.html", section="runs", digest=digest, environment=data,
                captured=environment.captured_at, packages=packages if isinstance(packages, dict) else {},
            )  # fmt: skip
        if self.sharded:
            self._page("run.html", "run_viewer.html", section="runs")
            collector.write(self.folder / "data" / "runs")
        else:
            self._run_pages(on_boards)
        self._page(
            "about.html", "about.html", section="about", counts=counts, boards=boards, catalog=self.catalog
        )
        source = Path(__file__).parent / "static"
        (self.folder / "static").mkdir()
        for name in _STATIC:
            shutil.copyfile(source / name, self.folder / "static" / name)

    def _run_path(self, run_id: str) -> str:
        if self.sharded:
            return f"run.html#{quote(run_id, safe='')}"
        return f"runs/{formats.run_slug(run_id)}.html"

    def _write(self, path: str, text: str) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", newline="\n")

    def _page(self, path: str, template: str, **values: Any) -> None:
        root = "../" * path.count("/")
        self._write(path, self.jinja.get_template(template).render(root=root, path=path, **values))

    def _methods(self) -> dict[str, Method | None]:
        names = sorted({*self.catalog.methods, *self.records.frame["method"].unique()})
        return {name: self.catalog.methods.get(name) for name in names}

    def _failures(self) -> dict[str, Any]:
        failures = self.records.frame.reverse().filter(~pl.col("status").is_in(["ok", "not-applicable"]))
        return {
            "failures": self.records.briefs(failures.head(MOST_LISTED)),
            "failure_count": len(failures),
        }

    def _board_view(self, board: Board) -> _BoardView:
        family, kind = formats.slug(board.family.name), board.model_kind
        path = f"boards/{family}/{formats.slug(kind)}.html" if kind else f"boards/{family}.html"
        tables = [self._table_view(board, table, path) for table in board.tables]
        lead = max(
            tables,
            key=lambda view: (sum(map(len, (group.rows for group in view.table.groups))), view.columns),
        )
        sketch = _pareto(lead.table, lead.questions[0].question, sketch=True)[0]
        largest = max(lead.table.groups, key=lambda group: len(group.rows), default=Group("", []))
        return _BoardView(
            board=board,
            path=path,
            tables=tables,
            runs=len(
                {run.id for t in board.tables for row in t.rows for c in row.cells.values() for run in c.runs}
            ),
            sketch=sketch,
            top=Group(largest.positions, largest.rows[:5]),
            lead=lead,
            offers=_offers(tables),
        )

    def _table_view(self, board: Board, table: Table, path: str) -> _TableView:
        costs = {row.key: row.cost_cell(table.questions) for row in table.rows}
        names = ("bits_per_weight", "model_bytes", "wall_seconds", "peak_memory_bytes", "throughput")
        shows = {
            name for name in names if any(cell and cell.mean(name) is not None for cell in costs.values())
        }
        if any(run.storage for cell in costs.values() if cell for run in cell.scored):
            shows.add("storage")
        return _TableView(
            table=table,
            questions=[
                self._question_view(table, question, f"{table.anchor}-{place}")
                for place, question in enumerate(table.questions, 1)
            ],
            costs=costs,
            missing=board.missing(table, self.catalog),
            layout="full"
            if len(table.questions) <= WIDE
            else "wide"
            if len(table.questions) * len(table.rows) <= COMPACT
            else "compact",
            shows=frozenset(shows),
            axes=[(name, label) for name, label in _AXES if name in shows],
            data=boarddata.table_path(path, table),
        )

    def _question_view(self, table: Table, question: Question, anchor: str) -> _QuestionView:
        scored = [
            (row, row.cells[question.key])
            for row in table.rows
            if question.key in row.cells and row.cells[question.key].primary
        ]
        estimates = {row.key: cell.primary for row, cell in scored if cell.primary is not None}
        baseline = next((estimates[row.key].value for row, _ in scored if row.baseline), None)
        strips = charts.make_strips(
            [
                (estimates[row.key].value, estimates[row.key].low, estimates[row.key].high)
                for row, _ in scored
            ],
            baseline,
        )
        pareto, cost_label = _pareto(table, question)
        forest = charts.forest_chart(
            [
                charts.Whisker(
                    row.label, cell.run.id, estimates[row.key].value, estimates[row.key].low, estimates[row.key].high,
                    row.baseline,
                )
                for row, cell in scored
            ][:40]
        )  # fmt: skip
        metrics = {
            metric.name: metric
            for _, cell in scored
            for metric in (e.metric for e in cell.estimates.values())
        }
        primary = question.metric.name if question.metric else ""
        return _QuestionView(
            question=question,
            task=find_task(self.catalog, question.task),
            anchor=anchor,
            strips={row.key: strip for (row, _), strip in zip(scored, strips, strict=True)},
            pareto=pareto,
            cost_label=cost_label,
            forest=forest,
            curves=self._curves(scored),
            compared=any(cell.difference for _, cell in scored),
            metrics=sorted(metrics.values(), key=lambda metric: (metric.name != primary, metric.name)),
        )

    def _curves(self, scored: Sequence[tuple[Row, Cell]]) -> list[tuple[str, charts.CurveChart]]:
        by_name: dict[str, list[charts.Curve]] = defaultdict(list)
        drawn_cells = scored[: charts.MOST_CURVES]
        curves_of = self.records.series([run.id for _, cell in drawn_cells for run in cell.scored])
        for row, cell in drawn_cells:
            seeds: dict[str, list[Any]] = defaultdict(list)
            for run in cell.scored:
                for series in curves_of.get(run.id, ()):
                    seeds[series.name].append(series.points())
            for name, points in seeds.items():
                by_name[name].append(charts.Curve(row.label, cell.run.id, points))
        drawn = [(name, charts.curve_chart(curves)) for name, curves in sorted(by_name.items())]
        return [(name, chart) for name, chart in drawn if chart is not None]

    def _task_pages(self, boards: Sequence[_BoardView]) -> None:
        sections: dict[str, list[_Section]] = defaultdict(list)
        for view in boards:
            for shown in view.tables:
                for asked in shown.questions:
                    question, asked_by = asked.question, sections[asked.question.task]
                    title = " ".join(filter(None, [question.model or question.task, question.suffix]))
                    asked_by.append(
                        _Section(
                            title=f"{title}: {view.board.title}",
                            # One question may be on the boards of several families.
                            asked=replace(asked, anchor=f"q{len(asked_by) + 1}"),
                            anchor=f"s{len(asked_by) + 1}",
                            table=shown.table,
                            board=f"{view.path}#{shown.table.anchor}",
                            board_title=view.board.title,
                        )
                    )
        run_counts = dict(self.records.frame.group_by("task").len().iter_rows())
        names = sorted({*self.catalog.tasks, *run_counts})
        tasks = {name: find_task(self.catalog, name) for name in names}
        self._page("tasks.html", "tasks.html", section="tasks", tasks=tasks, run_counts=run_counts)
        for name, entry in tasks.items():
            self._page(
                f"tasks/{formats.slug(name)}.html",
                "task.html",
                section="tasks",
                name=name,
                entry=entry,
                sections=sections[name],
            )

    def _method_page(
        self, name: str, entry: Method | None, runs: pl.DataFrame, boards: Sequence[_BoardView]
    ) -> None:
        results = [
            (view, shown, row)
            for view in boards
            for shown in view.tables
            for row in shown.table.rows
            if row.method == name
        ]
        configurations: dict[str, Mapping[str, Any]] = {}
        for _, _, row in results:
            configurations.setdefault(row.variant or "defaults", row.params)
        commands = [command for command in runs["command"].unique(maintain_order=True).to_list() if command]
        distribution = self.catalog.distribution("method", name)
        extra = f"[{entry.extra}]" if entry and entry.extra else ""
        self._page(
            f"methods/{formats.slug(name)}.html",
            "method.html",
            section="methods",
            name=name,
            entry=entry,
            runs=self.records.briefs(runs.head(MOST_RUNS_OF_METHOD)),
            run_count=len(runs),
            results=results,
            compared=list({(view.path, row.key): (view, row) for view, _, row in results}.values()),
            configurations=configurations,
            settings=sorted({key for params in configurations.values() for key in params}),
            commands=commands[:12],
            more_commands=max(0, len(commands) - 12),
            install=f"pip install '{distribution}{extra}'" if distribution else "",
            parity=records_of(entry, self.catalog) if entry else [],
        )

    def _run_pages(self, on_boards: Mapping[str, str]) -> None:
        ids = self.records.frame["id"].to_list()
        metrics, series = self.records.metrics(ids), self.records.series(ids)
        for run in self.records.details(ids):
            curves = [
                (curve.name, charts.curve_chart([charts.Curve(run.method, run.id, [curve.points()])]))
                for curve in series.get(run.id, ())
            ]
            self._page(
                self._run_path(run.id),
                "run.html",
                section="runs",
                run=run,
                board=on_boards.get(run.id, ""),
                metrics=[
                    (metric, metric_info(metric), _scores(metric)) for metric in metrics.get(run.id, ())
                ],
                curves=[(name, chart) for name, chart in curves if chart is not None],
                environment=(
                    _environment_path(run.environment_digest)
                    if run.environment_digest in self.records.environments
                    else ""
                ),
                method=self.catalog.methods.get(run.method),
                model=find_model(self.catalog, run.model) if run.model else None,
                task=find_task(self.catalog, run.task),
            )


def _method_path(name: str) -> str:
    return f"methods/{formats.slug(name)}.html"


def _offers(tables: Sequence[_TableView]) -> _Offers:
    questions = [asked.question for shown in tables for asked in shown.questions]
    costs = frozenset().union(*(shown.shows for shown in tables))
    full = [shown for shown in tables if shown.layout == "full"]
    columns = [("rank", "Rank")]
    columns += [("interval", "95 % interval")] if full else []
    compared = any(asked.compared for shown in full for asked in shown.questions)
    columns += [("difference", "Difference to the baseline")] if compared else []
    return _Offers(
        tasks=sorted({(formats.slug(question.task), question.task) for question in questions}),
        storages=sorted(
            {
                cell.run.storage
                for shown in tables
                for cell in shown.costs.values()
                if cell is not None and cell.run.storage
            }
        ),
        costs=costs,
        columns=[*columns, *((name, label) for name, label in _COLUMNS if name in costs)],
    )


def _environment_path(digest: str) -> str:
    return f"environments/{formats.run_slug(digest)[:16]}.html"


def _sortable(value: float | None) -> str:
    """Return what a script sorts a cell by: the number, or nothing, which sorts last."""
    return f"{value:.7g}" if value is not None and math.isfinite(value) else ""


def _scores(metric: MetricValue) -> charts.Histogram | None:
    with contextlib.suppress(ValueError):
        return charts.histogram(np.asarray(metric.unit_scores(), dtype=np.float64))
    return None


#: What quality may be drawn against, the first that tells rows apart: field of a run, label of the axis.
_COSTS = (
    ("bits_per_weight", "bits per weight"),
    ("model_bytes", "size of the model, bytes"),
    ("wall_seconds", "time of the run, seconds"),
)


#: The axes that a reader may choose.
_AXES = (*_COSTS, ("peak_memory_bytes", "peak memory, bytes"))
#: Columns of costs, as a reader chooses them.
_COLUMNS = (
    ("bits_per_weight", "Bits per weight"),
    ("storage", "Storage"),
    ("model_bytes", "Size"),
    ("wall_seconds", "Time"),
    ("peak_memory_bytes", "Peak memory"),
    ("throughput", "Throughput"),
)


def _pareto(
    table: Table, question: Question, *, sketch: bool = False
) -> tuple[charts.ParetoChart | None, str]:
    if question.metric is None or not question.model:
        return None, ""
    size = {"width": 240.0, "height": 96.0} if sketch else {}
    for name, label in _COSTS:
        points = []
        for row in table.rows:
            cell = row.cells.get(question.key)
            if cell is None or cell.primary is None:
                continue
            cost = cell.mean(name)
            simulated = any(run.storage == "simulated" for run in cell.scored)
            if name == "bits_per_weight" and simulated:
                cost = cell.mean("accounted_bits") or cost
            points.append(
                charts.Point(
                    formats.shorten(row.label, 32),
                    cell.run.id,
                    math.nan if cost is None else cost,
                    cell.primary.value,
                    row.baseline,
                    simulated,
                )
            )
        chart = charts.pareto_chart(
            points,
            lower_is_better=question.metric.lower_is_better,
            joined=len(table.groups) < 2,
            sketch=sketch,
            **size,
        )
        if chart is not None:
            return chart, label
    return None, ""
