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
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from methodbench.catalog import Catalog
from methodbench.entries import Family, Method, Model, Task
from methodbench.errors import MethodbenchError
from methodbench.stats import (
    PairedDifference,
    aggregate,
    bootstrap_intervals,
    paired_differences,
    rank_intervals,
)
from methodbench.store import MetricValue
from methodbench.tuning import regime
from methodbench_leaderboard.formats import kind_title, slug
from methodbench_leaderboard.records import METRIC_FIELDS, Brief, MetricInfo, Records, metric_info

Array = NDArray[np.float64]


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
    threads: int
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

    runs: tuple[Brief, ...]
    """The newest run of each seed, by seed."""
    estimates: Mapping[str, Estimate]
    primary: Estimate | None
    difference: PairedDifference | None = None
    rank: Rank | None = None
    unranked: str = ""
    """Why there is no rank."""
    scored: tuple[Brief, ...] = field(init=False)
    failed: tuple[Brief, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.scored = tuple(run for run in self.runs if run.status == "ok")
        self.failed = tuple(run for run in self.runs if run.status != "ok")

    @property
    def run(self) -> Brief:
        """The run that the cell's numbers link to."""
        return (self.scored or self.runs)[0]

    def mean(self, name: str) -> float | None:
        """Return the mean over scored seeds of a numeric field of :class:`Run`; None where none has it."""
        found = [getattr(run, name) for run in self.scored if getattr(run, name) is not None]
        return math.fsum(found) / len(found) if found else None


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


#: What a board says of rows whose hyperparameters are not as configured.
_REGIMES: Mapping[str, str] = {"tuned": "hyperparameters tuned by trials", "self-tuning": "nothing to tune"}


@dataclass(slots=True)
class Group:
    """Rows that are ranked together: they touch the same positions of a sequence, and were tuned alike."""

    positions: str
    """Positions, then how hyperparameters were chosen where that is not as configured; empty for neither."""
    rows: list[Row]


@dataclass(slots=True)
class Table:
    """Questions with the configurations that answer them: those on one model, or one task with its own."""

    anchor: str
    title: str
    model: Model | None
    questions: list[Question]
    baselines: list[Row]
    """Best first, but for the one that differences are taken to, which leads."""
    groups: list[Group]

    @property
    def rows(self) -> list[Row]:
        return [*self.baselines, *(row for group in self.groups for row in group.rows)]

    def heading(self, group: Group) -> str:
        """Return what a reader is told of the rows of a group."""
        positions, _, how = group.positions.rpartition(" · ")
        if how not in _REGIMES.values():
            positions, how = group.positions, ""
        tuned = any(other.positions.endswith(one) for other in self.groups for one in _REGIMES.values())
        parts = [
            f"Touches positions: {positions}" if positions else "",
            how[:1].upper() + how[1:] or ("Hyperparameters as configured" if tuned else ""),
        ]
        return "; ".join(filter(None, parts)) or "No policy of positions declared"

    @property
    def largest(self) -> Group:
        """The group with the most rows, the first of several; what speaks for the table where only one can."""
        return max(self.groups, key=lambda group: len(group.rows), default=Group("", []))


@dataclass(frozen=True, slots=True)
class Missing:
    """A cell without a score, and why."""

    row: Row
    question: Question
    status: str
    reason: str
    run: Brief | None


@dataclass(slots=True)
class Board:
    """One family on one kind of models."""

    family: Family
    model_kind: str
    tables: list[Table]

    @property
    def title(self) -> str:
        if not self.model_kind:
            return self.family.title
        return f"{self.family.title}: {kind_title(self.model_kind)}"

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


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


#: What a question is asked by, apart from the versions of its protocol, weights and data. Sums over other counts of
#: threads are rounded differently, so the count is part of the question, as it is part of a cell's identity.
_ASKED = ("task", "model", "task_params_json", "dtype", "device_class", "threads")
_VERSION = ("protocol", "weights_digest", "data_digest")


def make_boards(records: Records, catalog: Catalog) -> list[Board]:
    """Return one board for each family and kind of models, by family and kind.

    Baselines appear on every board whose questions they answer; a family of baselines alone has a board only where
    nothing else answers its questions.
    """
    frame, questions = _questions(records, catalog)
    if not questions:
        return []
    cells = _newest_cells(frame)
    places = frame.group_by("family", "model_kind", maintain_order=True).agg(
        pl.col("question").unique(),
        pl.col("kind").unique(),
        pl.col("baseline").all(),
        (pl.col("status") == "not-applicable").all().alias("idle"),
    )
    answered = set(frame.filter(~pl.col("baseline").all().over("family", "model_kind"))["question"])
    boards = []
    for place in places.sort("family", "model_kind").iter_rows(named=True):
        wanted = place["question"]
        if place["idle"] or (place["baseline"] and answered.issuperset(wanted)):
            continue
        own = (pl.col("family") == place["family"]) & (pl.col("model_kind") == place["model_kind"])
        shared = (
            pl.col("baseline")
            & (pl.col("family") != place["family"])
            & pl.col("kind").is_in(place["kind"])
            & pl.col("question").is_in(wanted)
        )
        tables = _tables(cells.filter(own | shared), questions, records, catalog)
        boards.append(Board(_family(catalog, place["family"]), place["model_kind"], tables))
    return boards


def _questions(records: Records, catalog: Catalog) -> tuple[pl.DataFrame, dict[str, Question]]:
    """Return the runs of the newest version of each question, with its key as ``question``, and the questions."""
    frame = records.frame.with_row_index("order").with_columns(
        device_class=pl.col("device").str.split(":").list.first()
    )
    asked = frame.group_by(_ASKED, maintain_order=True).agg(
        *(pl.col(name).last().alias(f"newest_{name}") for name in (*_VERSION, "id", "model_kind", "device")),
        runs=pl.len(),
    )
    asked = asked.with_columns(
        question=pl.Series([_question_key(row) for row in asked.select(_ASKED).iter_rows()], dtype=pl.String)
    )
    frame = frame.join(asked.select(*_ASKED, "question", *(f"newest_{name}" for name in _VERSION)), on=_ASKED)
    current = pl.all_horizontal(pl.col(name) == pl.col(f"newest_{name}") for name in _VERSION)
    frame = frame.filter(current).sort("order")
    kept = dict(frame.group_by("question").len().iter_rows())
    metrics = _primary_metrics(frame)
    same_name: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in asked.iter_rows(named=True):
        same_name[row["task"], row["model"]].append(row)
    questions = {}
    for row in asked.iter_rows(named=True):
        task = find_task(catalog, row["task"])
        questions[row["question"]] = Question(
            key=row["question"],
            task=row["task"],
            model=row["model"],
            model_kind=row["newest_model_kind"],
            protocol=row["newest_protocol"],
            settings=json.loads(row["task_params_json"]),
            dtype=row["dtype"],
            device=row["newest_device"],
            threads=row["threads"],
            suffix=_suffix(row, same_name[row["task"], row["model"]]),
            superseded=row["runs"] - kept[row["question"]],
            metric=metrics.get(row["question"]) or (_declared_metric(task) if task else None),
            data=task.data if task else "",
        )
    return frame, questions


def _question_key(asked: tuple[Any, ...]) -> str:
    task, model, settings, *machine = asked
    return _key(task, model, json.loads(settings), *machine)


def _suffix(row: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """Return in what a question differs from others of the same task and model."""
    if len(others) < 2:
        return ""
    settings = [json.loads(other["task_params_json"]) for other in others]
    own = json.loads(row["task_params_json"])
    parts = []
    for name in sorted({name for each in settings for name in each}):
        if len({json.dumps(each.get(name), sort_keys=True) for each in settings}) > 1:
            parts.append(f"{name}={own.get(name)}")
    parts += [
        str(row[name]) for name in ("dtype", "device_class") if len({other[name] for other in others}) > 1
    ]
    if len({other["threads"] for other in others}) > 1:
        parts.append(f"threads={row['threads']}")
    return ", ".join(parts)


def _primary_metrics(frame: pl.DataFrame) -> dict[str, MetricInfo]:
    """Return the primary metric of each question, as the first run that has one describes it."""
    described = frame.filter(pl.col("metric").is_not_null()).unique(
        "question", keep="first", maintain_order=True
    )
    return {
        question: MetricInfo(*description)
        for question, *description in described.select("question", *METRIC_FIELDS).iter_rows()
    }


def _declared_metric(task: Task) -> MetricInfo:
    entry = task.primary
    return MetricInfo(entry.name, entry.title, entry.unit, entry.direction, entry.aggregate)


def _newest_cells(frame: pl.DataFrame) -> pl.DataFrame:
    """Return one run per configuration, question and seed, of the newest source of the method.

    It is the newest that was scored, else the newest.
    """
    cell = ("question", "method", "params_json")
    newest_source = pl.col("method_digest").last().over(cell)
    return (
        frame.filter(pl.col("method_digest") == newest_source)
        # What trials came to is told by the run that they led to.
        .filter(~pl.col("variant").str.contains(r"(^|, )trial \d+$"))
        .with_columns(is_ok=pl.col("status") == "ok")
        .sort("is_ok", "order")
        .unique([*cell, "seed"], keep="last", maintain_order=True)
        .sort(*cell, "seed")
    )


def _tables(
    cells: pl.DataFrame, questions: Mapping[str, Question], records: Records, catalog: Catalog
) -> list[Table]:
    # Questions about one model share a table; a task that brings its own model has one to itself.
    placed = cells.with_columns(
        anchor_model=pl.col("model"),
        anchor_task=pl.when(pl.col("model") == "").then(pl.col("task")).otherwise(pl.lit("")),
    )
    tables = []
    parts = placed.sort("anchor_model", "anchor_task").partition_by(
        "anchor_model", "anchor_task", maintain_order=True, include_key=True
    )
    for number, part in enumerate(parts, 1):
        model, task = part.row(0, named=True)["anchor_model"], part.row(0, named=True)["anchor_task"]
        rows = _rows(part, questions, records, catalog)
        asked = [questions[key] for key in part["question"].unique()]
        order = sorted(asked, key=lambda question: (-_answers(rows, question), question.task, question.key))
        ranked = [row for row in rows if not row.baseline]
        baselines = _baselines(rows, ranked, order)
        for question in order:
            _compare([*baselines, *ranked], question)
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
                baselines=baselines,
                groups=groups,
            )
        )
    return tables


def _rows(
    part: pl.DataFrame, questions: Mapping[str, Question], records: Records, catalog: Catalog
) -> list[Row]:
    estimates = _estimates(part, records)
    grouped: dict[tuple[str, str], dict[str, list[Brief]]] = defaultdict(lambda: defaultdict(list))
    for brief, question in zip(Records.briefs(part), part["question"], strict=True):
        grouped[brief.method, _key(brief.params)][question].append(brief)
    rows = []
    for (method, params), by_question in sorted(grouped.items()):
        newest = max(
            (run for runs in by_question.values() for run in runs), key=lambda run: (run.started_at, run.id)
        )
        entry = find_method(catalog, method)
        row = Row(
            key=f"{method}-{params}",
            method=method,
            variant=newest.variant,
            params=newest.params,
            baseline=newest.baseline,
            positions=_ranked_with(entry.touches(newest.params) if entry else "", newest.variant),
            entry=entry,
        )
        for key, runs in by_question.items():
            metric = questions[key].metric
            found = estimates.get((key, runs[0].id), {})
            row.cells[key] = Cell(tuple(runs), found, found.get(metric.name) if metric else None)
        rows.append(row)
    _tell_apart(rows)
    return rows


def _ranked_with(positions: str, variant: str) -> str:
    """Return what rows must share to be ranked together: the positions they touch, and how they were tuned."""
    return " · ".join(filter(None, [positions, _REGIMES.get(regime(variant), "")]))


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


def _estimates(part: pl.DataFrame, records: Records) -> dict[tuple[str, str], dict[str, Estimate]]:
    """Return the estimates of each cell by metric; a cell goes by its question and the id of its first run."""
    metrics = records.metrics(part.filter(pl.col("status") == "ok")["id"])
    cells = part.group_by("question", "method", "params_json", maintain_order=True).agg("id")
    found: dict[tuple[str, str], dict[str, Estimate]] = {}
    averaged: dict[tuple[int, str], list[tuple[tuple[str, str], MetricInfo, tuple[float, ...], Array]]] = {}
    for question, _, _, ids in cells.iter_rows():
        key = question, ids[0]
        found[key] = {}
        by_name: dict[str, list[MetricValue]] = defaultdict(list)
        for run_id in ids:
            for metric in metrics.get(run_id, ()):
                by_name[metric.name].append(metric)
        for name, rows in by_name.items():
            info, by_seed = metric_info(rows[0]), tuple(number(row.value) for row in rows)
            scores = [row.unit_scores() for row in rows]
            if len(rows) == 1:
                found[key][name] = Estimate(info, by_seed[0], rows[0].low, rows[0].high, scores[0], by_seed)
            elif len({len(each) for each in scores}) > 1 or not scores[0].size:
                found[key][name] = Estimate(info, float(np.mean(by_seed)), None, None, np.empty(0), by_seed)
            else:
                with np.errstate(invalid="ignore"):
                    mean = np.mean(scores, axis=0)
                averaged.setdefault((mean.size, info.aggregate), []).append((key, info, by_seed, mean))
    for (_, how), members in averaged.items():
        intervals = bootstrap_intervals(np.stack([mean for *_, mean in members]), how)
        for (key, info, by_seed, mean), interval in zip(members, intervals, strict=True):
            low, high = interval or (None, None)
            found[key][info.name] = Estimate(info, aggregate(mean, how), low, high, mean, by_seed)
    return found


def number(value: float | None) -> float:
    """Return ``value``, NaN for None."""
    return math.nan if value is None else value


def _answers(rows: Iterable[Row], question: Question) -> int:
    return sum(question.key in row.cells and row.cells[question.key].primary is not None for row in rows)


def _baselines(rows: Sequence[Row], ranked: Sequence[Row], questions: Sequence[Question]) -> list[Row]:
    """Return the baselines; the strongest one that some method reaches on the first question leads.

    What no method reaches, an oracle for instance, is the end of a scale and says little of a difference; it leads
    where there is no other.
    """
    found = _by_result([row for row in rows if row.baseline], questions)
    question = questions[0]

    def value(row: Row) -> float:
        cell = row.cells.get(question.key)
        if cell is None or cell.primary is None or question.metric is None:
            return math.nan
        return -cell.primary.value if question.metric.lower_is_better else cell.primary.value

    best = max((one for one in map(value, ranked) if not math.isnan(one)), default=math.nan)
    leading = next((row for row in found if value(row) <= best), None)
    return sorted(found, key=lambda row: row is not leading)


def _compare(rows: Sequence[Row], question: Question) -> None:
    """Set differences to the first baseline, and ranks within each group of positions."""
    if question.metric is None:
        return
    scored = [
        row for row in rows if question.key in row.cells and row.cells[question.key].primary is not None
    ]
    baseline = next((row for row in scored if row.baseline), None)
    reference = baseline.cells[question.key].primary if baseline else None
    if reference is not None:
        _differ([row.cells[question.key] for row in scored if row is not baseline], reference)
    by_positions: dict[str, list[Cell]] = defaultdict(list)
    for row in scored:
        if not row.baseline:
            by_positions[row.positions].append(row.cells[question.key])
    for cells in by_positions.values():
        _rank(cells, question.metric)


def _differ(cells: Sequence[Cell], reference: Estimate) -> None:
    """Set the paired differences to ``reference`` of the cells that were scored on the same units."""
    if reference.scores.size < 2 or not np.isfinite(reference.scores).all():
        return
    chosen = [
        (cell, cell.primary.scores)
        for cell in cells
        if cell.primary is not None
        and cell.primary.scores.shape == reference.scores.shape
        and np.isfinite(cell.primary.scores).all()
    ]
    if not chosen:
        return
    rows = np.stack([scores for _, scores in chosen])
    found = paired_differences(rows, reference.scores, reference.metric.aggregate)
    for (cell, _), difference in zip(chosen, found, strict=True):
        if math.isfinite(difference.difference):
            cell.difference = difference


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


def _family(catalog: Catalog, name: str) -> Family:
    """Return the family called ``name``; one that no plugin describes, and whose name need be no name, by its name."""
    return catalog.families.get(name) or Family(name=slug(name), title=name, summary="")


def find_method(catalog: Catalog, name: str) -> Method | None:
    """Return the method or chain called ``name``; None when the installed plugins do not know it."""
    try:
        return catalog.method(name)
    except MethodbenchError:
        return None


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
