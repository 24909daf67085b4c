"""Writes the pages: view models of boards and records, rendered into a folder that is then swapped in."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import secrets
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import polars as pl
from jinja2 import Environment as Jinja
from jinja2 import PackageLoader, StrictUndefined

from methodbench import __version__, pictures
from methodbench.catalog import Catalog
from methodbench.claims import VERDICTS, commands_for
from methodbench.contract import check_record_of
from methodbench.engine.why import stale_runs
from methodbench.entries import FIDELITIES, Method, Model, Task
from methodbench.errors import MethodbenchError
from methodbench.parity import records_of
from methodbench.stats import DRAWS, SEED
from methodbench.store import Environment, MetricValue, Store
from methodbench.store.schema import SCHEMA_REVISION
from methodbench_leaderboard import boarddata, charts, diagrams, downloads, formats, shards
from methodbench_leaderboard.aggregate import (
    Board,
    Cell,
    Group,
    MetricInfo,
    Missing,
    Question,
    Row,
    Table,
    find_method,
    find_model,
    find_task,
    make_boards,
    number,
)
from methodbench_leaderboard.coverage import STATES, Coverage, make_coverage
from methodbench_leaderboard.evidence import Evidence, counterparts, differing, sensitivities
from methodbench_leaderboard.gallery import Gallery
from methodbench_leaderboard.manifest import MARKER, Manifest, code_digest, key_of
from methodbench_leaderboard.records import Records, metric_info

#: With more questions than this, a table writes intervals and differences below its values ...
WIDE = 1
#: ... and with more cells than this it leaves the differences and charts to the pages of tasks.
COMPACT = 240
#: Missing cells and failures that a page lists; the rest is counted.
MOST_LISTED = 60

#: Up to this many runs each has a page of its own; more are shown by one page from sharded data.
MOST_RUN_PAGES = 400
#: Rows of results on the page of a model, charts of sensitivity on that of a method, cells of the grid of all models.
MOST_RESULTS, MOST_SENSITIVITIES, MOST_COVERED = 400, 12, 4_000
#: Kind of the methods that measure a model and leave it as it is.
PROBE = "probe"
#: Cells that the page of a method links every seed of; with more, the first.
MOST_SEEDED = 100
#: Newest runs that the page of all runs lists, and the page of a method.
MOST_RUNS, MOST_RUNS_OF_METHOD = 500, 100

#: Ids that an address holds as they are.
_PLAIN_ID = re.compile(r"[A-Za-z0-9]+")

_STATIC = (
    "site.css", "site.js", "run.js", "stats.js", "tables.js", "charts.js", "board.js", "compare.js", "favicon.svg",
)  # fmt: skip


def write_site(store: Store, catalog: Catalog, out: Path) -> Path:
    """Write the whole site beside ``out``, then put it in its place; see :func:`methodbench_leaderboard.build`."""

    def write(fresh: Path) -> None:
        _Site(store, catalog, fresh, Manifest(out.expanduser())).write()

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
    missing: list[Missing]
    """Runs without a score."""
    untried: list[tuple[Question, list[Missing]]]
    """What was never tried, by question."""
    critical: list[tuple[str, diagrams.CriticalDifference]]
    """Mean ranks over tasks, for each group of positions."""
    heat: diagrams.HeatMap | None
    shades: Mapping[tuple[str, str], str]
    """Shade of a cell of a compact table, by row and question; the table is its own heat map."""
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
    cost_label: str
    """What the sketch has quality against."""
    top: Group
    """The group of most rows on the first table, cut to the best."""
    contenders: list[Row]
    """Rows of that group that may be first on the first question: their rank intervals include it."""
    ranked: int
    """Rows that they were ranked among."""
    lead: _TableView
    offers: _Offers
    profiles: list[tuple[str, str, diagrams.Profile]]
    """Of each group that is ranked together, over all tables: its heading, the cost, the performance profile."""


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
    def __init__(self, store: Store, catalog: Catalog, folder: Path, manifest: Manifest) -> None:
        self.store = store
        self.manifest = manifest
        self.records = records = Records(store, stale_runs(store, catalog))
        self.sharded = len(records) > MOST_RUN_PAGES
        self.catalog = catalog
        self.folder = folder
        self.evidence = Evidence(records, catalog)
        self.gallery = Gallery(records, folder)
        self.table_keys: dict[int, str | None] = {}
        self.offered: list[str] = []
        """Names of the files in every page's footer."""
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
            "short_digest", "reduction", "kind_title",
        ):  # fmt: skip
            self.jinja.filters[name] = getattr(formats, name)
        self.jinja.filters["badge"] = self.evidence.badge
        self.jinja.filters["cost"] = _cost
        # Jinja's own `capitalize` makes "insertion AUC" "Insertion auc".
        self.jinja.filters["sentence"] = lambda text: text[:1].upper() + text[1:]
        self.jinja.filters["finite"] = lambda value: value is not None and math.isfinite(value)
        self.jinja.filters["sortable"] = _sortable
        self.jinja.filters["slug"] = formats.slug
        self.jinja.filters["row_id"] = boarddata.row_id
        self.jinja.filters["score"] = lambda value: formats.number(number(value))
        self.jinja.globals.update(
            run_path=self._run_path,
            method_path=_method_path,
            task_path=lambda name: f"tasks/{formats.slug(name)}.html",
            model_path=lambda name: f"models/{formats.slug(name)}.html",
            coverage_path=_coverage_path,
            states=STATES,
            verdicts=VERDICTS,
            badge=self.evidence.badge,
            differing=differing,
            shades=[f"#{r:02x}{g:02x}{b:02x}" for r, g, b in pictures.SHADES],
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
        files = downloads.write(self.store, records, documents, self.folder)
        self.jinja.globals["downloads"] = files
        self.offered = [file.path for file in files]
        self._page(
            "index.html",
            "home.html",
            section="boards",
            boards=boards,
            counts=counts,
            compared=self._compared(),
            **self._failures(),
        )
        for view in boards:
            keys = [self._table_key(shown.table) for shown in view.tables]
            self._kept(
                view.path, "board.html", [repr(view.board.family), *keys],
                partial(dict, section="boards", view=view),
            )  # fmt: skip
            for shown in view.tables:
                boarddata.write_table(
                    self.folder, view.path, shown.table, shown.costs, self._run_path, _method_path
                )
        boarddata.write_index(self.folder, [(view.board, view.path) for view in boards])
        self._page("compare.html", "compare.html", section="boards", boards=boards)
        newest_first = records.frame.reverse()
        run_counts = dict(newest_first.group_by("method").len().iter_rows())
        self._page("methods.html", "methods.html", section="methods", methods=methods, run_counts=run_counts)
        by_method, none = newest_first.partition_by("method", as_dict=True), newest_first.clear()
        for name, entry in methods.items():
            self._method_page(name, entry, by_method.get((name,), none), boards)
        self._task_pages(boards)
        self._model_pages(boards)
        self._coverage_pages()
        self._page(
            "runs.html", "runs.html", section="runs", runs=records.briefs(newest_first.head(MOST_RUNS))
        )
        for digest, environment in sorted(records.environments.items()):
            self._kept(
                _environment_path(digest), "environment.html", [digest, environment.captured_at.isoformat()],
                partial(_environment_view, digest, environment),
            )  # fmt: skip
        if self.sharded:
            self._page("run.html", "run_viewer.html", section="runs")
            collector.write(self.folder / "data" / "runs")
        else:
            self._run_pages(on_boards)
        self._page(
            "about.html", "about.html", section="about", counts=counts, boards=boards, catalog=self.catalog,
            versions=_versions(self.catalog), schema=SCHEMA_REVISION,
        )  # fmt: skip
        source = Path(__file__).parent / "static"
        (self.folder / "static").mkdir()
        for name in _STATIC:
            shutil.copyfile(source / name, self.folder / "static" / name)
        self.manifest.write(self.folder)

    def _run_path(self, run_id: str) -> str:
        if self.sharded:
            return f"run.html#{run_id if _PLAIN_ID.fullmatch(run_id) else quote(run_id, safe='')}"
        return f"runs/{formats.run_slug(run_id)}.html"

    def _page(self, path: str, template: str, **values: Any) -> bytes:
        root = "../" * path.count("/")
        text = self.jinja.get_template(template).render(root=root, path=path, **values)
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        data = text.encode("utf-8")
        file.write_bytes(data)
        return data

    def _kept(
        self, path: str, template: str, inputs: Sequence[Any], view: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Write a page, or take it over from the earlier site where it was made from the same ``inputs``.

        Args:
            inputs: everything that the page says; it is always written anew where one of them is None.
        """
        if any(item is None for item in inputs):
            self._page(path, template, **view())
            return
        key = key_of(code_digest(), __version__, template, self.sharded, self.offered, inputs)
        if not self.manifest.take(path, key, self.folder / path):
            self.manifest.note(path, key, self._page(path, template, **view()))

    def _table_key(self, table: Table) -> str | None:
        """Return the digest of all that a table says; None where it has runs of unknown contents."""
        if id(table) not in self.table_keys:
            seals = self.records.seals
            rows = [
                (
                    row.key, row.variant, repr(row.entry), repr(self.evidence.badge(row.method)),
                    {key: [[seals[run.id], run.id] for run in cell.runs] for key, cell in row.cells.items()},
                )
                for row in table.rows
            ]  # fmt: skip
            tasks = [repr(find_task(self.catalog, question.task)) for question in table.questions]
            known = all(
                seals[run.id] for row in table.rows for cell in row.cells.values() for run in cell.runs
            )
            self.table_keys[id(table)] = (
                key_of(table.anchor, table.title, repr(table.model), repr(table.questions), tasks, rows)
                if known
                else None
            )
        return self.table_keys[id(table)]

    def _methods(self) -> dict[str, Method | None]:
        names = sorted({*self.catalog.methods, *self.records.frame["method"].unique()})
        return {name: find_method(self.catalog, name) for name in names}

    def _compared(self) -> list[tuple[int, str]]:
        """Return how many methods, models and tasks there are runs of."""
        frame = self.records.frame
        models = frame.filter(pl.col("model") != "")["model"].n_unique()
        return [(frame["method"].n_unique(), "method"), (models, "model"), (frame["task"].n_unique(), "task")]

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
        first = lead.questions[0].question
        sketch, cost_label = _pareto(lead.table, first, sketch=True)
        largest = lead.table.largest
        ranks = {
            row.key: cell.rank
            for row in largest.rows
            for cell in [row.cells.get(first.key)]
            if cell is not None and cell.rank is not None
        }
        return _BoardView(
            board=board,
            path=path,
            tables=tables,
            runs=len(
                {run.id for t in board.tables for row in t.rows for c in row.cells.values() for run in c.runs}
            ),
            sketch=sketch,
            cost_label=cost_label,
            contenders=[row for row in largest.rows if row.key in ranks and ranks[row.key].low == 1],
            ranked=len(ranks),
            top=Group(largest.positions, largest.rows[:5]),
            lead=lead,
            offers=_offers(tables),
            profiles=_profiles(board),
        )

    def _table_view(self, board: Board, table: Table, path: str) -> _TableView:
        costs = {row.key: row.cost_cell(table.questions) for row in table.rows}
        names = ("bits_per_weight", "model_bytes", "wall_seconds", "peak_memory_bytes", "throughput")
        shows = {
            name for name in names if any(cell and cell.mean(name) is not None for cell in costs.values())
        }
        if any(run.storage for cell in costs.values() if cell for run in cell.scored):
            shows.add("storage")
        missing = board.missing(table, self.catalog)
        compact = len(table.questions) > WIDE and len(table.questions) * len(table.rows) > COMPACT
        return _TableView(
            table=table,
            critical=_critical(table),
            heat=None if compact else _heat_map(table),
            shades=_shades(table) if compact else {},
            questions=[
                self._question_view(table, question, f"{table.anchor}-{place}")
                for place, question in enumerate(table.questions, 1)
            ],
            costs=costs,
            missing=[gap for gap in missing if gap.run is not None],
            untried=[
                (question, gaps)
                for question in table.questions
                if (gaps := [gap for gap in missing if gap.run is None and gap.question is question])
            ],
            layout="full" if len(table.questions) <= WIDE else "compact" if compact else "wide",
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
                by_name[name].append(charts.Curve(row.label, cell.run.id, points, boarddata.row_id(row)))
        first = scored[0][1].run if scored else None
        drawn = [
            (name, self._curve_chart(name, curves, first.task, first.task_params))
            for name, curves in sorted(by_name.items())
            if first is not None
        ]
        return [(name, chart) for name, chart in drawn if chart is not None]

    def _curve_chart(
        self, name: str, curves: Sequence[charts.Curve], task: str, settings: Mapping[str, Any]
    ) -> charts.CurveChart | None:
        """Lay out the curves ``name`` of a task over the axis that its entry declares."""
        entry = find_task(self.catalog, task)
        axis = next((axis for axis in entry.axes if axis.series == name), None) if entry else None
        if axis is None:
            return charts.curve_chart(curves)
        return charts.curve_chart(curves, positions=partial(axis.positions, settings), x_label=axis.label)

    def _task_pages(self, boards: Sequence[_BoardView]) -> None:
        sections: dict[str, list[_Section]] = defaultdict(list)
        for view in boards:
            for shown in view.tables:
                for asked in shown.questions:
                    question, asked_by = asked.question, sections[asked.question.task]
                    title = " ".join(filter(None, [question.model or question.task, question.suffix]))
                    asked_by.append(
                        _Section(
                            title=title,
                            # One question may be on the boards of several families.
                            asked=replace(asked, anchor=f"q{len(asked_by) + 1}"),
                            anchor=f"s{len(asked_by) + 1}",
                            table=shown.table,
                            board=f"{view.path}#{shown.table.anchor}",
                            board_title=view.board.title,
                        )
                    )
        run_counts = dict(self.records.frame.group_by("task").len().iter_rows())
        histories = _histories(self.records.frame)
        names = sorted({*self.catalog.tasks, *run_counts})
        tasks = {name: find_task(self.catalog, name) for name in names}
        self._page("tasks.html", "tasks.html", section="tasks", tasks=tasks, run_counts=run_counts)
        for name, entry in tasks.items():
            keys = [
                (section.board, section.title, self._table_key(section.table)) for section in sections[name]
            ]
            history = histories.get(name, [])
            inputs = [repr(entry), keys, repr(history)] if all(key for _, _, key in keys) else [None]
            self._kept(
                f"tasks/{formats.slug(name)}.html", "task.html", inputs,
                partial(_task_view, name, entry, sections[name], history),
            )  # fmt: skip

    def _model_pages(self, boards: Sequence[_BoardView]) -> None:
        frame = self.records.frame
        run_counts = dict(frame.filter(pl.col("model") != "").group_by("model").len().iter_rows())
        names = sorted({*self.catalog.models, *run_counts})
        models = {name: find_model(self.catalog, name) for name in names}
        kinds = dict(frame.select("model", "model_kind").unique("model", keep="last").iter_rows())
        self._page(
            "models.html", "models.html", section="models", models=models, run_counts=run_counts, kinds=kinds
        )
        tables: dict[str, list[tuple[_BoardView, _TableView]]] = defaultdict(list)
        for view in boards:
            for shown in view.tables:
                if shown.table.questions[0].model:
                    tables[shown.table.questions[0].model].append((view, shown))
        for name, entry in models.items():
            keys = [(view.path, self._table_key(shown.table)) for view, shown in tables[name]]
            inputs = [repr(entry), keys, run_counts.get(name, 0)] if all(key for _, key in keys) else [None]
            self._kept(
                f"models/{formats.slug(name)}.html", "model.html", inputs,
                partial(
                    self._model_view, name, entry, tables[name], run_counts.get(name, 0), kinds.get(name, "")
                ),
            )  # fmt: skip

    def _model_view(
        self,
        name: str,
        entry: Model | None,
        tables: Sequence[tuple[_BoardView, _TableView]],
        runs: int,
        kind: str,
    ) -> dict[str, Any]:
        frame = self.records.frame.filter(pl.col("model") == name)
        weights = frame.filter(pl.col("weights_digest") != "")["weights_digest"].unique(maintain_order=True)
        dense = frame.filter(pl.col("baseline") & pl.col("model_bytes").is_not_null())["model_bytes"]
        results = [
            (view, shown, row, asked, row.cells[asked.question.key])
            for view, shown in tables
            for row in shown.table.rows
            for asked in shown.questions
            if asked.question.key in row.cells
        ]
        # Baselines stand on the boards of several families.
        results = list({(row.key, asked.question.key): (v, s, row, asked, cell)
                        for v, s, row, asked, cell in reversed(results)}.values())[::-1]  # fmt: skip
        return {
            "section": "models",
            "name": name,
            "entry": entry,
            "kind": entry.kind if entry else kind,
            "run_count": runs,
            "weights": weights.to_list(),
            "dense": dense.last() if len(dense) else None,
            "boards": [(view, shown.table.anchor) for view, shown in tables],
            "results": [item for item in results if item[4].run.kind != PROBE][:MOST_RESULTS],
            "result_count": sum(item[4].run.kind != PROBE for item in results),
            "measures": [item for item in results if item[4].run.kind == PROBE][:MOST_RESULTS],
        }

    def _coverage_pages(self) -> None:
        found = make_coverage(self.records, self.catalog)
        methods = sorted({method for grid in found for method in grid.methods})
        shown = found[: max(1, MOST_COVERED // max(1, len(methods)))]
        totals = sum((grid.totals for grid in found), Counter())
        self._page(
            "coverage.html", "coverage.html", section="coverage", grids=shown, methods=methods, totals=totals,
            more=found[len(shown) :],
        )  # fmt: skip
        for grid in found:
            self._kept(
                _coverage_path(grid.model), "coverage_model.html", [_coverage_key(grid)],
                partial(dict, section="coverage", grid=grid),
            )  # fmt: skip

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
        newest = self.records.briefs(runs.head(MOST_RUNS_OF_METHOD))
        claims, judged = self.evidence.claims(name), self.evidence.judged.get(name, [])
        # What was tested comes first.
        judged = sorted(judged, key=lambda result: result.verdict == "not attempted")
        chains = {chain: found for chain, found in self.evidence.chains.items() if name in _parts(chain)}
        checked = check_record_of(entry, self.catalog) if entry else None
        names = sorted({key for params in configurations.values() for key in params})
        shared = next(iter(configurations.values()), {})
        varied = [
            key
            for key in names
            if len(configurations) == 1
            or any(key not in params or params[key] != shared.get(key) for params in configurations.values())
        ]
        described = self.evidence.descriptions.get(name)
        defaults = {param["name"]: param["default"] for param in described["params"]} if described else {}
        view = {
            "section": "methods",
            "name": name,
            "entry": entry,
            "runs": newest,
            "run_count": len(runs),
            "results": results,
            "compared": list({(board.path, row.key): (board, row) for board, _, row in results}.values()),
            "configurations": configurations,
            "seeds_linked": sum(len(row.cells) for _, _, row in results) <= MOST_SEEDED,
            "settings": varied,
            "constant": {key: value for key, value in shared.items() if key not in varied},
            "commands": commands[:12],
            "more_commands": max(0, len(commands) - 12),
            "install": f"pip install '{distribution}{extra}'" if distribution else "",
            "parity": records_of(entry, self.catalog) if entry else [],
            "checked": checked,
            "checked_this": checked is not None and entry is not None and checked.is_of(entry),
            "described": described,
            "idea": self.evidence.idea(name),
            "claims": claims,
            "claims_problem": self.evidence.problem(name),
            "judged": judged,
            "chains": chains,
            "galleries": self.gallery.of_method(name),
        }
        # What the tables say goes into the key by their digests.
        said = {key: repr(value) for key, value in view.items() if key not in ("results", "compared")}
        tables = {
            f"{board.board.title} {board.path}#{shown.table.anchor}": self._table_key(shown.table)
            for board, shown, _ in results
        }
        known = all(tables.values()) and all(self.records.seals[run.id] for run in newest)
        self._kept(
            f"methods/{formats.slug(name)}.html", "method.html", [said, tables] if known else [None],
            lambda: {
                **view,
                "counterparts": counterparts(
                    claims, [(shown.table, row) for _, shown, row in results], defaults
                )
                if claims
                else {},
                "attempts": {
                    result.claim.id: commands_for(self.catalog, result.claim)
                    for result in judged
                    if result.verdict == "not attempted"
                },
                "sensitivities": sensitivities(
                    (row, [asked.question for asked in shown.questions]) for _, shown, row in results
                )[:MOST_SENSITIVITIES],
            },
        )  # fmt: skip

    def _run_pages(self, on_boards: Mapping[str, str]) -> None:
        records = self.records
        for run in records.runs:
            # A page that is taken over needs its files as well.
            self.gallery.of_run(run.id)
            seal = records.seals[run.id]
            task = find_task(self.catalog, run.task)
            model = find_model(self.catalog, run.model) if run.model else None
            inputs = [
                run.id, seal, on_boards.get(run.id, ""), records.stale.get(run.id, ""), repr(task), repr(model),
                run.environment_digest in records.environments, records.witnesses.get(run.id, []),
            ]  # fmt: skip
            self._kept(
                self._run_path(run.id), "run.html", inputs if seal else [None],
                partial(self._run_view, run.id, on_boards.get(run.id, ""), task, model),
            )  # fmt: skip

    def _run_view(self, run_id: str, board: str, task: Task | None, model: Model | None) -> dict[str, Any]:
        records = self.records
        run = next(records.details([run_id]))
        metrics, series = records.metrics([run_id]), records.series([run_id])
        curves = [
            (
                curve.name,
                self._curve_chart(
                    curve.name,
                    [charts.Curve(run.method, run.id, [curve.points()])],
                    run.task,
                    run.task_params,
                ),
            )
            for curve in series.get(run.id, ())
        ]
        known = run.environment_digest in records.environments
        return {
            "section": "runs",
            "run": run,
            "board": board,
            "metrics": [(metric, metric_info(metric), _scores(metric)) for metric in metrics.get(run.id, ())],
            "curves": [(name, chart) for name, chart in curves if chart is not None],
            "pictures": self.gallery.of_run(run_id),
            "facts": {name: value for name, value in run.facts.items() if name != pictures.FACT},
            "environment": _environment_path(run.environment_digest) if known else "",
            "stale": records.stale.get(run.id, ""),
            "witnesses": records.witnesses.get(run.id, []),
            "model": model,
            "task": task,
        }


def _task_view(
    name: str, entry: Task | None, sections: Sequence[_Section], history: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    drawn = [(section, _spread(section)) for section in sections]
    return {"section": "tasks", "name": name, "entry": entry, "sections": drawn, "history": history}


def _histories(frame: pl.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Return of each task the versions of its protocol and data that there are runs of, newest first."""
    versions = (
        frame.group_by("task", "protocol", "data_digest")
        .agg(
            runs=pl.len(),
            scored=(pl.col("status") == "ok").sum(),
            methods=pl.col("method").n_unique(),
            first=pl.col("started_at").min(),
            last=pl.col("started_at").max(),
            newest=pl.col("id").last(),
        )
        .sort("task", "last", "protocol", "data_digest", descending=[False, True, True, False])
    )
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for version in versions.iter_rows(named=True):
        found[version["task"]].append(version)
    return found


def _parts(chain: str) -> set[str]:
    """Return a chain's name and those of its links."""
    return {chain, *(part.strip() for part in chain.split("+"))}


def _coverage_path(model: str) -> str:
    return f"coverage/{formats.slug(model) if model else 'own-models'}.html"


def _coverage_key(grid: Coverage) -> str:
    cells = [
        (*place, dict(cell.counts), cell.state, cell.run_id, cell.reason, cell.commands)
        for place, cell in grid.cells.items()
    ]
    return key_of(grid.model, grid.left_out, cells)


def _environment_view(digest: str, environment: Environment) -> dict[str, Any]:
    data = dict(environment.data)
    packages = data.pop("packages", {})
    return {
        "section": "runs",
        "digest": digest,
        "environment": formats.flat(data),
        "captured": environment.captured_at,
        "packages": packages if isinstance(packages, dict) else {},
    }


def _versions(catalog: Catalog) -> dict[str, str]:
    """Return the version of each distribution whose plugins are in the catalogue."""
    found = {}
    for name in sorted({plugin.distribution for plugin in catalog.plugins if plugin.distribution}):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _critical(table: Table) -> list[tuple[str, diagrams.CriticalDifference]]:
    found = []
    for group in table.groups:
        values = np.full((len(group.rows), len(table.questions)), math.nan)
        for r, row in enumerate(group.rows):
            for c, question in enumerate(table.questions):
                cell = row.cells.get(question.key)
                if cell is not None and cell.primary is not None and question.metric is not None:
                    values[r, c] = cell.primary.value * (1 if question.metric.lower_is_better else -1)
        scored = ~np.isnan(values).all(axis=0)
        chart = diagrams.critical_difference([row.label for row in group.rows], values[:, scored])
        if chart is not None:
            found.append((group.positions, chart))
    return found


def _profiles(board: Board) -> list[tuple[str, str, diagrams.Profile]]:
    """Return performance profiles of what it took to reach the tasks' targets: metrics that count steps.

    The cost of a configuration on a task is the median over its seeds, so it is infinite where most of them missed.
    Tasks are those that all configurations of a chart have run: the tasks that share the fewest configurations with
    others go until two of both are left. Configurations that were tuned have other settings on each task, and go by
    their label.
    """
    found = []
    headings = {
        group.positions: table.heading(group) if group.positions else "Hyperparameters as configured"
        for table in board.tables
        for group in table.groups
    }
    for positions, heading in sorted(headings.items()):
        costs: dict[str, dict[str, dict[str, float]]] = {}
        for table in board.tables:
            for row, question in itertools.product(table.rows, table.questions):
                cell = row.cells.get(question.key)
                if cell is None or row.positions != positions:
                    continue
                for estimate in cell.estimates.values():
                    if estimate.metric.unit == "steps":
                        title = f"{question.task} {question.suffix}".strip()
                        seeds = [
                            math.inf if math.isnan(value) else max(value, 1.0) for value in estimate.by_seed
                        ]
                        of_task = costs.setdefault(estimate.metric.label, {}).setdefault(title, {})
                        of_task[row.label] = float(np.median(seeds))
        for metric, of_tasks in sorted(costs.items()):
            tasks, labels = _largest_common(of_tasks)
            if len(tasks) < 2:
                continue
            values = np.array([[of_tasks[task][label] for task in sorted(tasks)] for label in labels])
            chart = diagrams.performance_profile(labels, sorted(tasks), values)
            if chart is not None:
                found.append((heading, metric, chart))
    return found


def _largest_common(ran: Mapping[str, Collection[str]]) -> tuple[list[str], list[str]]:
    """Return tasks, and two or more configurations that have run all of them; no task where there are none."""
    tasks = sorted(ran)
    while len(tasks) > 1:
        labels = sorted(set.intersection(*(set(ran[task]) for task in tasks)))
        if len(labels) > 1:
            return tasks, labels
        shared = {
            task: sum(len({*ran[task]} & {*ran[other]}) for other in tasks if other != task) for task in tasks
        }
        tasks.remove(min(tasks, key=lambda task: (shared[task], task)))
    return [], []


def _heat_cells(table: Table) -> list[list[diagrams.HeatCell | None]]:
    lines: list[list[diagrams.HeatCell | None]] = []
    for row in table.rows:
        line: list[diagrams.HeatCell | None] = []
        for question in table.questions:
            cell = row.cells.get(question.key)
            if cell is None or cell.primary is None or question.metric is None:
                line.append(None)
                continue
            sign = -1.0 if question.metric.lower_is_better else 1.0
            better = None if cell.difference is None else sign * cell.difference.difference
            line.append(diagrams.HeatCell(cell.primary.value, better, cell.run.id))
        lines.append(line)
    return lines


def _heat_map(table: Table) -> diagrams.HeatMap | None:
    columns = [
        (" ".join(filter(None, [q.task, q.suffix])), q.metric is None or q.metric.lower_is_better)
        for q in table.questions
    ]
    return diagrams.heat_map([row.label for row in table.rows], columns, _heat_cells(table))


def _shades(table: Table) -> dict[tuple[str, str], str]:
    cells = _heat_cells(table)
    return {
        (row.key, question.key): shade
        for c, question in enumerate(table.questions)
        for row, shade in zip(
            table.rows,
            diagrams.shades(
                [line[c] for line in cells], question.metric is None or question.metric.lower_is_better
            ),
            strict=True,
        )
        if shade not in ("m", "none")
    }


def _spread(section: _Section) -> diagrams.Spread | None:
    key = section.asked.question.key
    return diagrams.spread(
        [
            diagrams.Scores(row.label, cell.run.id, cell.primary.scores, row.baseline)
            for row in section.table.rows
            for cell in [row.cells.get(key)]
            if cell is not None and cell.primary is not None
        ]
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
    return f"{value:.6g}" if value is not None and math.isfinite(value) else ""


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


def _cost(value: float, label: str) -> str:
    """Return a cost in the unit of its axis."""
    if label.endswith(", bytes"):
        return formats.size(value)
    return formats.seconds(value) if label.endswith(", seconds") else f"{value:.2f}"


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
    compared = {row.key for row in [*table.baselines, *table.largest.rows]}
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
                    row.key in compared,
                )
            )
        chart = charts.pareto_chart(
            points,
            lower_is_better=question.metric.lower_is_better,
            sketch=sketch,
            **size,
        )
        if chart is not None:
            return chart, label
    return None, ""
