"""Writes the pages: view models of boards and records, rendered into a folder that is then swapped in."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import secrets
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment as Jinja
from jinja2 import PackageLoader, StrictUndefined

from methodbench import __version__
from methodbench.catalog import Catalog
from methodbench.entries import FIDELITIES, Method, Task
from methodbench.errors import MethodbenchError
from methodbench.stats import DRAWS, SEED
from methodbench.store import MetricValue, Run, Store
from methodbench_leaderboard import charts, formats
from methodbench_leaderboard.aggregate import (
    Board,
    Cell,
    Group,
    MetricInfo,
    Question,
    Records,
    Row,
    Table,
    find_model,
    find_task,
    make_boards,
    metric_info,
    number,
    read_records,
    utc,
)

#: Tells a folder of ours from anything else that must not be replaced.
MARKER = ".methodbench-site"
#: With more questions than this, a table writes intervals and differences below its values.
WIDE = 1
#: Missing cells and failures that a page lists; the rest is counted.
MOST_LISTED = 60

_STATIC = ("site.css", "site.js", "favicon.svg")


def write_site(store: Store, catalog: Catalog, out: Path) -> Path:
    """Write the whole site beside ``out``, then put it in its place; see :func:`methodbench_leaderboard.build`."""

    def write(fresh: Path) -> None:
        _Site(read_records(store), catalog, fresh).write()
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
    wide: bool
    shows: frozenset[str]
    """Which cost columns have a value in some row."""

    @property
    def columns(self) -> int:
        per_question = [2 if self.wide else 3 + asked.compared for asked in self.questions]
        return 1 + sum(per_question) + len(self.shows)


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


class _Site:
    def __init__(self, records: Records, catalog: Catalog, folder: Path) -> None:
        self.records = records
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
        self.jinja.filters["score"] = lambda value: formats.number(number(value))
        self.jinja.globals.update(
            run_path=lambda run_id: f"runs/{formats.run_slug(run_id)}.html",
            method_path=lambda name: f"methods/{formats.slug(name)}.html",
            fidelities=FIDELITIES,
            records=records,
            version=__version__,
            draws=DRAWS,
            bootstrap_seed=SEED,
        )

    def write(self) -> None:
        boards = [self._board_view(board) for board in make_boards(self.records, self.catalog)]
        on_boards = {
            run.id: view.path
            for view in boards
            for shown in view.tables
            for row in shown.table.rows
            for cell in row.cells.values()
            for run in cell.runs
        }
        methods = self._methods()
        counts = Counter(run.status for run in self.records.runs)
        self._page(
            "index.html", "home.html", section="boards", boards=boards, counts=counts, **self._failures()
        )
        for view in boards:
            self._page(view.path, "board.html", section="boards", view=view)
        runs_of: dict[str, list[Run]] = defaultdict(list)
        for run in reversed(self.records.runs):
            runs_of[run.method].append(run)
        self._page("methods.html", "methods.html", section="methods", methods=methods, runs_of=runs_of)
        for name, entry in methods.items():
            self._method_page(name, entry, runs_of[name], boards)
        newest_first = self.records.runs[::-1]
        self._page("runs.html", "runs.html", section="runs", runs=newest_first)
        for run in self.records.runs:
            self._run_page(run, on_boards.get(run.id, ""))
        self._page(
            "about.html", "about.html", section="about", counts=counts, boards=boards, catalog=self.catalog
        )
        self._write("results.csv", self._csv())
        self._write("results.json", self._json())
        source = Path(__file__).parent / "static"
        (self.folder / "static").mkdir()
        for name in _STATIC:
            shutil.copyfile(source / name, self.folder / "static" / name)

    def _write(self, path: str, text: str) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", newline="\n")

    def _page(self, path: str, template: str, **values: Any) -> None:
        root = "../" * path.count("/")
        self._write(path, self.jinja.get_template(template).render(root=root, path=path, **values))

    def _methods(self) -> dict[str, Method | None]:
        names = sorted({*self.catalog.methods, *(run.method for run in self.records.runs)})
        return {name: self.catalog.methods.get(name) for name in names}

    def _failures(self) -> dict[str, Any]:
        failures = [run for run in reversed(self.records.runs) if run.status not in ("ok", "not-applicable")]
        return {"failures": failures[:MOST_LISTED], "failure_count": len(failures)}

    def _board_view(self, board: Board) -> _BoardView:
        family, kind = formats.slug(board.family.name), board.model_kind
        tables = [self._table_view(board, table) for table in board.tables]
        lead = max(
            tables,
            key=lambda view: (sum(map(len, (group.rows for group in view.table.groups))), view.columns),
        )
        sketch = _pareto(lead.table, lead.questions[0].question, sketch=True)[0]
        largest = max(lead.table.groups, key=lambda group: len(group.rows), default=Group("", []))
        return _BoardView(
            board=board,
            path=f"boards/{family}/{formats.slug(kind)}.html" if kind else f"boards/{family}.html",
            tables=tables,
            runs=len(
                {run.id for t in board.tables for row in t.rows for c in row.cells.values() for run in c.runs}
            ),
            sketch=sketch,
            top=Group(largest.positions, largest.rows[:5]),
            lead=lead,
        )

    def _table_view(self, board: Board, table: Table) -> _TableView:
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
            wide=len(table.questions) > WIDE,
            shows=frozenset(shows),
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
        for row, cell in scored:
            seeds: dict[str, list[Any]] = defaultdict(list)
            for run in cell.scored:
                for series in self.records.series.get(run.id, ()):
                    seeds[series.name].append(series.points())
            for name, points in seeds.items():
                by_name[name].append(charts.Curve(row.label, cell.run.id, points))
        drawn = [(name, charts.curve_chart(curves)) for name, curves in sorted(by_name.items())]
        return [(name, chart) for name, chart in drawn if chart is not None]

    def _method_page(
        self, name: str, entry: Method | None, runs: Sequence[Run], boards: Sequence[_BoardView]
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
        commands = list(dict.fromkeys(run.command for run in runs if run.command))
        distribution = self.catalog.distribution("method", name)
        extra = f"[{entry.extra}]" if entry and entry.extra else ""
        self._page(
            f"methods/{formats.slug(name)}.html",
            "method.html",
            section="methods",
            name=name,
            entry=entry,
            runs=runs,
            results=results,
            configurations=configurations,
            settings=sorted({key for params in configurations.values() for key in params}),
            commands=commands[:12],
            more_commands=max(0, len(commands) - 12),
            install=f"pip install '{distribution}{extra}'" if distribution else "",
        )

    def _run_page(self, run: Run, board: str) -> None:
        metrics = self.records.metrics.get(run.id, [])
        environment = self.records.environments.get(run.environment_digest)
        data = dict(environment.data) if environment else {}
        packages = data.pop("packages", {})
        curves = [
            (series.name, charts.curve_chart([charts.Curve(run.method, run.id, [series.points()])]))
            for series in self.records.series.get(run.id, ())
        ]
        self._page(
            f"runs/{formats.run_slug(run.id)}.html",
            "run.html",
            section="runs",
            run=run,
            board=board,
            metrics=[(metric, metric_info(metric), _scores(metric)) for metric in metrics],
            curves=[(name, chart) for name, chart in curves if chart is not None],
            environment=data,
            packages=packages if isinstance(packages, dict) else {},
            method=self.catalog.methods.get(run.method),
            model=find_model(self.catalog, run.model) if run.model else None,
            task=find_task(self.catalog, run.task),
        )

    def _csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            [*_RUN_FIELDS, "started_at", *(f"metric_{name}" for name in _METRIC_FIELDS), "params"]
        )
        for run in self.records.runs:
            found: list[MetricValue | None] = [*self.records.metrics.get(run.id, [])]
            for metric in found or [None]:
                writer.writerow(
                    [
                        *(_csv_cell(getattr(run, name)) for name in _RUN_FIELDS),
                        utc(run.started_at).isoformat(),
                        *(_csv_cell(getattr(metric, name) if metric else None) for name in _METRIC_FIELDS),
                        _csv_cell(formats.plain(run.params)),
                    ]
                )
        return text.getvalue()

    def _json(self) -> str:
        runs = [
            {
                **{name: _json_value(getattr(run, name)) for name in _RUN_FIELDS},
                **{name: _json_value(getattr(run, name)) for name in _JSON_FIELDS},
                "started_at": utc(run.started_at).isoformat(),
                "metrics": [
                    {name: _json_value(getattr(metric, name)) for name in _METRIC_FIELDS}
                    for metric in self.records.metrics.get(run.id, [])
                ],
            }
            for run in self.records.runs
        ]
        document = {"methodbench": __version__, "database": self.records.digest, "runs": runs}
        return json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"


_RUN_FIELDS = (
    "id", "cell_key", "status", "reason", "family", "kind", "method", "variant", "baseline", "model", "model_kind",
    "task", "protocol", "seed", "dtype", "device", "threads", "storage", "bits_per_weight", "accounted_bits",
    "model_bytes", "wall_seconds", "peak_memory_bytes", "throughput", "throughput_unit", "suite", "command",
    "methodbench_version", "method_digest", "weights_digest", "data_digest", "environment_digest",
)  # fmt: skip
_JSON_FIELDS = ("params", "params_passed", "task_params", "phases", "facts", "warnings")
_METRIC_FIELDS = (
    "name",
    "title",
    "unit",
    "direction",
    "aggregate",
    "primary",
    "value",
    "low",
    "high",
    "units",
)


def _csv_cell(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula."""
    if value is None:
        return ""
    if isinstance(value, str):
        text = formats.harmless(value)
        return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text
    return value


def _json_value(value: Any) -> Any:
    """Return ``value`` with numbers that JSON has no form for as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    return value


def _sortable(value: float | None) -> str:
    """Return what a script sorts a cell by: the number, or nothing, which sorts last."""
    return repr(float(value)) if value is not None and math.isfinite(value) else ""


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
