"""From records to boards: which configurations and questions there are, and what the scores say.

A *question* is a task with its settings, asked of one model: a column. A *configuration* is a method with its
hyperparameters: a row. Where they meet lies a *cell*: the newest run of each seed. Cells of one question share their
units, so that differences and ranks are paired. No method, task or model is named here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from methodbench.catalog import Catalog
from methodbench.entries import Family, Method, Model, Task
from methodbench.errors import MethodbenchError
from methodbench.stats import (
    PairedDifference,
    aggregate,
    bootstrap_interval,
    paired_difference,
    rank_intervals,
)
from methodbench.store import Environment, MetricValue, Run, Series, Store

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """What a metric is called and which way it is better."""

    name: str
    title: str
    unit: str
    direction: str
    aggregate: str

    @property
    def label(self) -> str:
        return self.title or self.name.replace("-", " ").replace("_", " ")

    @property
    def lower_is_better(self) -> bool:
        return self.direction == "lower"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric over all seeds of a cell, averaged unit by unit."""

    metric: MetricInfo
    value: float
    """NaN when there is no score, infinite when the runs diverged."""
    low: float | None
    high: float | None
    scores: Array
    """[units], averaged over seeds; empty when seeds scored different numbers of units."""
    by_seed: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A task with its settings, asked of one model."""

    key: str
    task: str
    model: str
    model_kind: str
    protocol: int
    settings: Mapping[str, Any]
    dtype: str
    device: str
    suffix: str
    """What tells it from another question with the same task and model; mostly empty."""
    superseded: int
    """How many runs of earlier protocols, weights or data there are; they are not compared with these."""
    metric: MetricInfo | None
    """The primary metric; None when no run was scored and the task is not in the catalogue."""
    data: str = ""


@dataclass(frozen=True, slots=True)
class Rank:
    """A place among the configurations that are ranked together."""

    place: int
    low: int
    high: int
    of: int


@dataclass(slots=True)
class Cell:
    """One configuration on one question."""

    runs: tuple[Run, ...]
    """The newest run of each seed, by seed."""
    estimates: Mapping[str, Estimate]
    primary: Estimate | None
    difference: PairedDifference | None = None
    rank: Rank | None = None
    unranked: str = ""
    """Why there is no rank."""

    @property
    def scored(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.status == "ok")

    @property
    def failed(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.status != "ok")

    @property
    def run(self) -> Run:
        """The run that the cell's numbers link to."""
        return (self.scored or self.runs)[0]

    def mean(self, name: str) -> float | None:
        """Return the mean over scored seeds of a numeric field of :class:`Run`; None where none has it."""
        found = [getattr(run, name) for run in self.scored if getattr(run, name) is not None]
        return float(np.mean(found)) if found else None


@dataclass(slots=True)
class Row:
    """One configuration."""

    key: str
    method: str
    variant: str
    params: Mapping[str, Any]
    baseline: bool
    positions: str
    entry: Method | None
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.method} {self.variant}".strip()

    def cost_cell(self, questions: Sequence[Question]) -> Cell | None:
        """Return the cell that cost columns are read from: the first question that was scored."""
        cells = [self.cells[question.key] for question in questions if question.key in self.cells]
        return next((cell for cell in cells if cell.scored), None)


@dataclass(slots=True)
class Group:
    """Rows that are ranked together: they touch the same positions of a sequence."""

    positions: str
    rows: list[Row]


@dataclass(slots=True)
class Table:
    """Questions with the configurations that answer them: those on one model, or one task with its own."""

    anchor: str
    title: str
    model: Model | None
    questions: list[Question]
    baselines: list[Row]
    groups: list[Group]

    @property
    def rows(self) -> list[Row]:
        return [*self.baselines, *(row for group in self.groups for row in group.rows)]


@dataclass(frozen=True, slots=True)
class Missing:
    """A cell without a score, and why."""

    row: Row
    question: Question
    status: str
    reason: str
    run: Run | None


@dataclass(slots=True)
class Board:
    """One family on one kind of models."""

    family: Family
    model_kind: str
    tables: list[Table]

    @property
    def title(self) -> str:
        return f"{self.family.title}: {self.model_kind}" if self.model_kind else self.family.title

    def missing(self, table: Table, catalog: Catalog) -> list[Missing]:
        """Return the cells of a table that have no score for every seed."""
        found = []
        for row in table.rows:
            for question in table.questions:
                cell = row.cells.get(question.key)
                if cell is None:
                    if not row.baseline:
                        found.append(
                            Missing(row, question, "never tried", _mismatch(catalog, row, question), None)
                        )
                    continue
                found.extend(Missing(row, question, run.status, run.reason, run) for run in cell.failed)
                if not cell.failed and cell.primary is None:
                    found.append(
                        Missing(row, question, "no score", "the run reports no primary metric", cell.run)
                    )
        return found


@dataclass(slots=True)
class Records:
    """Everything in the database."""

    runs: list[Run]
    """Oldest first."""
    metrics: dict[str, list[MetricValue]]
    """Of each run, the primary one first."""
    series: dict[str, list[Series]]
    environments: dict[str, Environment]
    digest: str
    """sha256 over all of it."""

    @property
    def newest(self) -> datetime | None:
        return max((utc(run.started_at) for run in self.runs), default=None)

    def primary(self, run: Run) -> MetricValue | None:
        return next((metric for metric in self.metrics.get(run.id, ()) if metric.primary), None)


def utc(moment: datetime) -> datetime:
    """Return ``moment`` in UTC; databases without time zones give naive times that are UTC."""
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def read_records(store: Store) -> Records:
    """Read the whole database, in an order that does not depend on how it was written."""
    runs = sorted(store.runs(), key=lambda run: (utc(run.started_at), run.id))
    metrics: dict[str, list[MetricValue]] = defaultdict(list)
    for metric in sorted(store.metrics(), key=lambda row: (row.run_id, not row.primary, row.name)):
        metrics[metric.run_id].append(metric)
    series: dict[str, list[Series]] = defaultdict(list)
    for curve in sorted(store.series(), key=lambda row: (row.run_id, row.name)):
        series[curve.run_id].append(curve)
    hasher = hashlib.sha256()
    for run in runs:
        hasher.update(_columns(run))
        for metric in metrics[run.id]:
            hasher.update(_columns(metric))
        for curve in series[run.id]:
            hasher.update(_columns(curve))
    return Records(runs, dict(metrics), dict(series), store.environments(), hasher.hexdigest())


def _columns(record: Run | MetricValue | Series) -> bytes:
    values = {name: getattr(record, name) for name in type(record).model_fields}
    return json.dumps(values, sort_keys=True, default=_plain).encode()


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, datetime):
        return utc(value).isoformat()
    return str(value)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _asked(run: Run) -> str:
    """Return the identity of a question apart from the versions of its protocol, weights and data."""
    device = run.identity.get("device_class", run.device)
    return _key(run.task, run.model, run.task_params, run.dtype, device)


def _version(run: Run) -> tuple[int, str, str]:
    return run.protocol, run.weights_digest, run.data_digest


def make_boards(records: Records, catalog: Catalog) -> list[Board]:
    """Return one board for each family and kind of models, by family and kind.

    Baselines appear on every board whose questions they answer; a family of baselines alone has a board only where
    nothing else answers its questions.
    """
    questions = _questions(records, catalog)
    home: dict[str, Question] = {}
    by_place: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in records.runs:
        question = questions.get(_asked(run))
        if question is not None and question[1] == _version(run):
            home[run.id] = question[0]
            by_place[run.family, run.model_kind].append(run)
    answered = {
        home[run.id].key
        for runs in by_place.values()
        if not all(run.baseline for run in runs)
        for run in runs
    }
    boards = []
    for (family, kind), runs in sorted(by_place.items()):
        if all(run.baseline for run in runs) and {home[run.id].key for run in runs} <= answered:
            continue
        if all(run.status == "not-applicable" for run in runs):
            continue
        wanted = {home[run.id].key for run in runs}
        kinds = {run.kind for run in runs}
        shared = [
            run
            for run in records.runs
            if run.baseline and run.family != family and run.kind in kinds and run.id in home
            if home[run.id].key in wanted
        ]
        tables = _tables([*runs, *shared], home, records, catalog)
        boards.append(Board(catalog.family(family), kind, tables))
    return boards


def _questions(records: Records, catalog: Catalog) -> dict[str, tuple[Question, tuple[int, str, str]]]:
    """Return the newest version of each question, by :func:`_asked`."""
    runs_of: dict[str, list[Run]] = defaultdict(list)
    for run in records.runs:
        runs_of[_asked(run)].append(run)
    same_name: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for runs in runs_of.values():
        same_name[runs[0].task, runs[0].model].append(runs[0])
    found = {}
    for asked, runs in runs_of.items():
        newest = runs[-1]
        current = [run for run in runs if _version(run) == _version(newest)]
        task = find_task(catalog, newest.task)
        question = Question(
            key=asked,
            task=newest.task,
            model=newest.model,
            model_kind=newest.model_kind,
            protocol=newest.protocol,
            settings=newest.task_params,
            dtype=newest.dtype,
            device=newest.device,
            suffix=_suffix(newest, same_name[newest.task, newest.model]),
            superseded=len(runs) - len(current),
            metric=_primary_metric(current, records, task),
            data=task.data if task else "",
        )
        found[asked] = (question, _version(newest))
    return found


def _suffix(run: Run, others: Sequence[Run]) -> str:
    if len(others) < 2:
        return ""
    parts = []
    for name in sorted({name for other in others for name in other.task_params}):
        if (
            len({json.dumps(other.task_params.get(name), sort_keys=True, default=str) for other in others})
            > 1
        ):
            parts.append(f"{name}={run.task_params.get(name)}")
    parts += [
        str(getattr(run, name))
        for name in ("dtype", "device")
        if len({getattr(other, name) for other in others}) > 1
    ]
    return ", ".join(parts)


def _primary_metric(runs: Iterable[Run], records: Records, task: Task | None) -> MetricInfo | None:
    for run in runs:
        metric = records.primary(run)
        if metric is not None:
            return metric_info(metric)
    if task is None:
        return None
    entry = task.primary
    return MetricInfo(entry.name, entry.title, entry.unit, entry.direction, entry.aggregate)


def metric_info(metric: MetricValue) -> MetricInfo:
    """Return the description that the run recorded with its metric."""
    return MetricInfo(metric.name, metric.title, metric.unit, metric.direction, metric.aggregate)


def _tables(
    runs: Sequence[Run], home: Mapping[str, Question], records: Records, catalog: Catalog
) -> list[Table]:
    places: dict[tuple[str, str], dict[str, Question]] = defaultdict(dict)
    of_question: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        question = home[run.id]
        places[(question.model, "") if question.model else ("", question.task)][question.key] = question
        of_question[question.key].append(run)
    tables = []
    for number, ((model, task), questions) in enumerate(sorted(places.items()), 1):
        rows = _rows([run for key in questions for run in of_question[key]], home, records, catalog)
        order = sorted(
            questions.values(), key=lambda question: (-_answers(rows, question), question.task, question.key)
        )
        for question in order:
            _compare(rows, question)
        ranked = [row for row in rows if not row.baseline]
        groups = [
            Group(positions, _by_result([row for row in ranked if row.positions == positions], order))
            for positions in sorted({row.positions for row in ranked})
        ]
        tables.append(
            Table(
                anchor=f"table-{number}",
                title=model or task,
                model=find_model(catalog, model) if model else None,
                questions=order,
                baselines=_by_result([row for row in rows if row.baseline], order),
                groups=groups,
            )
        )
    return tables


def _rows(runs: Sequence[Run], home: Mapping[str, Question], records: Records, catalog: Catalog) -> list[Row]:
    grouped: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        grouped[run.method, _key(run.params)].append(run)
    rows = []
    for (method, params), mine in sorted(grouped.items()):
        newest = max(mine, key=lambda run: (utc(run.started_at), run.id))
        entry = catalog.methods.get(method)
        row = Row(
            key=f"{method}-{params}",
            method=method,
            variant=newest.variant,
            params=newest.params,
            baseline=newest.baseline,
            positions=entry.positions if entry else "",
            entry=entry,
        )
        by_question: dict[str, list[Run]] = defaultdict(list)
        for run in mine:
            by_question[home[run.id].key].append(run)
        for key, attempts in by_question.items():
            chosen = _newest_by_seed(attempts)
            estimates = _estimates(chosen, records)
            metric = home[attempts[0].id].metric
            row.cells[key] = Cell(chosen, estimates, estimates.get(metric.name) if metric else None)
        rows.append(row)
    _tell_apart(rows)
    return rows


def _newest_by_seed(attempts: Sequence[Run]) -> tuple[Run, ...]:
    """Return one run a seed, of the newest source of the method: the newest that was scored, else the newest."""
    ordered = sorted(attempts, key=lambda run: (utc(run.started_at), run.id))
    chosen: dict[int, Run] = {}
    for run in ordered:
        if run.method_digest != ordered[-1].method_digest:
            continue
        before = chosen.get(run.seed)
        if before is None or run.status == "ok" or before.status != "ok":
            chosen[run.seed] = run
    return tuple(chosen[seed] for seed in sorted(chosen))


def _tell_apart(rows: Sequence[Row]) -> None:
    """Give rows that carry the same label the hyperparameters in which they differ."""
    for label, count in Counter(row.label for row in rows).items():
        if count < 2:
            continue
        same = [row for row in rows if row.label == label]
        for row in same:
            parts = [
                f"{name}={value}"
                for name, value in sorted(row.params.items())
                if any(other.params.get(name) != value for other in same)
            ]
            row.variant = " ".join(filter(None, [row.variant, f"({', '.join(parts)})" if parts else ""]))


def _estimates(runs: Sequence[Run], records: Records) -> dict[str, Estimate]:
    by_name: dict[str, list[MetricValue]] = defaultdict(list)
    for run in runs:
        if run.status == "ok":
            for metric in records.metrics.get(run.id, ()):
                by_name[metric.name].append(metric)
    return {name: _estimate(metrics) for name, metrics in by_name.items()}


def _estimate(metrics: Sequence[MetricValue]) -> Estimate:
    info = metric_info(metrics[0])
    by_seed = tuple(number(metric.value) for metric in metrics)
    scores = [metric.unit_scores() for metric in metrics]
    if len(metrics) == 1:
        return Estimate(info, by_seed[0], metrics[0].low, metrics[0].high, scores[0], by_seed)
    if len({len(each) for each in scores}) > 1 or not scores[0].size:
        return Estimate(info, float(np.mean(by_seed)), None, None, np.empty(0), by_seed)
    with np.errstate(invalid="ignore"):
        averaged = np.mean(scores, axis=0)
    low, high = bootstrap_interval(averaged, info.aggregate) or (None, None)
    return Estimate(info, aggregate(averaged, info.aggregate), low, high, averaged, by_seed)


def number(value: float | None) -> float:
    """Return ``value``, NaN for None."""
    return math.nan if value is None else value


def _answers(rows: Iterable[Row], question: Question) -> int:
    return sum(question.key in row.cells and row.cells[question.key].primary is not None for row in rows)


def _compare(rows: Sequence[Row], question: Question) -> None:
    """Set differences to the baseline, and ranks within each group of positions."""
    if question.metric is None:
        return
    scored = [
        row for row in rows if question.key in row.cells and row.cells[question.key].primary is not None
    ]
    baseline = next((row for row in scored if row.baseline), None)
    reference = baseline.cells[question.key].primary if baseline else None
    for row in scored:
        cell = row.cells[question.key]
        if reference is not None and row is not baseline and cell.primary is not None:
            cell.difference = _difference(cell.primary, reference)
    by_positions: dict[str, list[Cell]] = defaultdict(list)
    for row in scored:
        if not row.baseline:
            by_positions[row.positions].append(row.cells[question.key])
    for cells in by_positions.values():
        _rank(cells, question.metric)


def _difference(estimate: Estimate, reference: Estimate) -> PairedDifference | None:
    if estimate.scores.shape != reference.scores.shape or not estimate.scores.size:
        return None
    if not (np.isfinite(estimate.scores).all() and np.isfinite(reference.scores).all()):
        return None
    found = paired_difference(estimate.scores, reference.scores, estimate.metric.aggregate)
    return found if math.isfinite(found.difference) else None


def _rank(cells: Sequence[Cell], metric: MetricInfo) -> None:
    # Cells that were scored on another number of units, or lost a seed, are not comparable unit by unit.
    sizes = Counter(
        cell.primary.scores.size for cell in cells if cell.primary is not None and not cell.failed
    )
    sizes.pop(0, None)
    units = max(sizes, key=lambda size: (sizes[size], size), default=0)
    chosen = []
    for cell in cells:
        if cell.failed:
            cell.unranked = "not ranked: a seed has no score"
        elif cell.primary is None or cell.primary.scores.size != units or not units:
            cell.unranked = "not ranked: scored on other units than the rest"
        else:
            chosen.append((cell, cell.primary.scores))
    if not chosen:
        return
    matrix = np.stack([scores for _, scores in chosen])
    places = rank_intervals(matrix, metric.aggregate, lower_is_better=metric.lower_is_better)
    for (cell, _), (place, low, high) in zip(chosen, places, strict=True):
        cell.rank = Rank(int(place), int(low), int(high), len(chosen))


def _by_result(rows: Sequence[Row], questions: Sequence[Question]) -> list[Row]:
    """Sort by the first question: best value first, then what is not finite, then what has no score."""

    def order(row: Row) -> tuple[Any, ...]:
        parts: list[tuple[int, float]] = []
        for question in questions:
            cell = row.cells.get(question.key)
            if cell is None or cell.primary is None or question.metric is None:
                parts.append((2 if cell else 3, 0.0))
            elif not math.isfinite(cell.primary.value):
                parts.append((1, 0.0))
            else:
                parts.append(
                    (0, cell.primary.value if question.metric.lower_is_better else -cell.primary.value)
                )
        return (*parts, row.label)

    return sorted(rows, key=order)


def find_task(catalog: Catalog, name: str) -> Task | None:
    """Return the task called ``name``; None when no installed plugin knows it."""
    try:
        return catalog.task(name)
    except MethodbenchError:
        return None


def find_model(catalog: Catalog, name: str) -> Model | None:
    """Return the model called ``name``; None when no installed plugin knows it."""
    try:
        return catalog.model(name)
    except MethodbenchError:
        return None


def _mismatch(catalog: Catalog, row: Row, question: Question) -> str:
    task = find_task(catalog, question.task)
    model = find_model(catalog, question.model) if question.model else None
    if row.entry is None or task is None or (question.model and model is None):
        return ""
    return catalog.mismatch(row.entry, model, task)
