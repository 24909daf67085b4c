"""Reads the database: what boards need of every run at once, everything else when a page asks for it."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from sqlalchemy import JSON, Row, Table, Text, select, type_coerce

from methodbench import pictures
from methodbench.store import MetricValue, Run, Series, Store, Witness

#: Kinds of methods whose runs may keep pictures.
_PICTURED = ("explainer", "segmenter")
#: Runs whose metrics, curves or details are asked for at once.
_CHUNK = 400
_RUN: Table = Run.__table__  # type: ignore[attr-defined]
_METRIC: Table = MetricValue.__table__  # type: ignore[attr-defined]
_SERIES: Table = Series.__table__  # type: ignore[attr-defined]
_WITNESS: Table = Witness.__table__  # type: ignore[attr-defined]


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


def metric_info(metric: MetricValue) -> MetricInfo:
    """Return the description that the run recorded with its metric."""
    return MetricInfo(metric.name, metric.title, metric.unit, metric.direction, metric.aggregate)


class Brief(NamedTuple):
    """What tables need of a run; see :class:`methodbench.store.Run` for the fields."""

    id: str
    cell_key: str
    status: str
    reason: str
    method: str
    kind: str
    family: str
    baseline: bool
    variant: str
    params_json: str
    """Hyperparameters as JSON."""
    model: str
    model_kind: str
    task: str
    task_params_json: str
    """Settings of the protocol as JSON."""
    protocol: int
    seed: int
    dtype: str
    device: str
    threads: int
    method_digest: str
    weights_digest: str
    data_digest: str
    environment_digest: str
    methodbench_version: str
    suite: str
    command: str
    started_at: datetime
    """UTC."""
    wall_seconds: float
    peak_memory_bytes: int | None
    storage: str
    model_bytes: int | None
    bits_per_weight: float | None
    accounted_bits: float | None
    throughput: float | None
    throughput_unit: str
    metric: str | None
    """Name of the primary metric; None, like what describes it, where the run has none."""
    metric_title: str | None
    metric_unit: str | None
    direction: str | None
    aggregate: str | None
    value: float | None
    low: float | None
    high: float | None
    units: int | None

    @property
    def params(self) -> dict[str, Any]:
        return _parsed(self.params_json)

    @property
    def task_params(self) -> dict[str, Any]:
        return _parsed(self.task_params_json)


#: Fields of a brief that describe its primary metric, in the order of :class:`MetricInfo`.
METRIC_FIELDS = ("metric", "metric_title", "metric_unit", "direction", "aggregate")
_VALUE_FIELDS = ("value", "low", "high", "units")

_SCHEMA: dict[str, Any] = {
    **dict.fromkeys(Brief._fields, pl.String),
    **dict.fromkeys(("protocol", "seed", "threads", "peak_memory_bytes", "model_bytes", "units"), pl.Int64),
    **dict.fromkeys(
        ("wall_seconds", "bits_per_weight", "accounted_bits", "throughput", "value", "low", "high"),
        pl.Float64,
    ),
    "baseline": pl.Boolean,
    "started_at": pl.Datetime("us", "UTC"),
}


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> dict[str, Any]:
    return dict(json.loads(text))


class Records:
    """The database, as pages see it. Replays stand beside the run that they repeat and are no runs of their own."""

    def __init__(self, store: Store, stale: Mapping[str, str] | None = None) -> None:
        """
        Args:
            stale: what has changed since a run was made that no longer holds, by its id.
        """
        self._store = store
        self.stale = stale or {}
        self.frame = _read_briefs(store)
        """One row per run, oldest first, with the fields of :class:`Brief`."""
        self.environments = store.environments()
        self.digest, self.seals = _digest(store)
        """sha256 over every record, and the seal of each run by its id; empty where it has none."""

    def __len__(self) -> int:
        return len(self.frame)

    @functools.cached_property
    def runs(self) -> list[Brief]:
        """Every run, oldest first."""
        return self.briefs(self.frame)

    @staticmethod
    def briefs(frame: pl.DataFrame) -> list[Brief]:
        """Return rows of :attr:`frame` as objects."""
        return [Brief._make(row) for row in frame.select(Brief._fields).iter_rows()]

    @property
    def newest(self) -> datetime | None:
        return self.frame["started_at"].last() if len(self.frame) else None  # type: ignore[return-value]

    @functools.cached_property
    def witnesses(self) -> dict[str, list[dict[str, Any]]]:
        """What the replays of each run came to, oldest first, by the run's id; only runs that have some."""
        query = (
            select(_WITNESS, _RUN.c.started_at, _RUN.c.environment_digest, _RUN.c.methodbench_version)
            .join(_RUN, _RUN.c.id == _WITNESS.c.run_id)
            .order_by(_RUN.c.started_at, _RUN.c.id)
        )
        found: dict[str, list[dict[str, Any]]] = {}
        with self._store.engine.connect() as connection:
            for row in connection.execute(query):
                said = dict(row._mapping) | {"started_at": utc(row.started_at).isoformat()}
                found.setdefault(row.original, []).append(said)
        return found

    def metrics(self, run_ids: Iterable[str]) -> dict[str, list[MetricValue]]:
        """Return the metrics of some runs by run, the primary one first."""
        return self._of_runs(MetricValue, _METRIC, run_ids, lambda row: (not row.primary, row.name))

    @functools.cached_property
    def pictures(self) -> dict[str, list[tuple[str, bytes, bytes]]]:
        """Name, picture and overlay of the pictures that runs kept, by the run's id; only what holds up."""
        query = select(_RUN.c.id, _RUN.c.facts[pictures.FACT]).where(
            _RUN.c.status == "ok", _RUN.c.kind.in_(_PICTURED), _RUN.c.witness_of.is_(None)
        )
        with self._store.engine.connect() as connection:
            found = {run_id: pictures.read(kept) for run_id, kept in connection.execute(query)}
        return {run_id: kept for run_id, kept in found.items() if kept}

    def series(self, run_ids: Iterable[str]) -> dict[str, list[Series]]:
        """Return the curves of some runs by run."""
        return self._of_runs(Series, _SERIES, run_ids, lambda row: row.name)

    def _of_runs(self, cls: Any, table: Table, run_ids: Iterable[str], order: Any) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        with self._store.engine.connect() as connection:
            for some in _chunks(list(dict.fromkeys(run_ids))):
                for row in connection.execute(select(table).where(table.c.run_id.in_(some))).all():
                    found.setdefault(row.run_id, []).append(cls.model_construct(**row._mapping))
        return {run_id: sorted(rows, key=order) for run_id, rows in found.items()}

    def details(self, run_ids: Sequence[str]) -> Iterator[Row[Any]]:
        """Yield every column of some runs, in the order that was asked for."""
        with self._store.engine.connect() as connection:
            for some in _chunks(run_ids):
                rows = {row.id: row for row in connection.execute(select(_RUN).where(_RUN.c.id.in_(some)))}
                yield from (rows[run_id] for run_id in some)

    def table(self, *, scores: bool = False) -> pl.DataFrame:
        """Return one row per run and metric, runs in order, without details; with ``scores``, those of every unit."""
        names = [name for name, _ in _METRIC.c.items() if scores or name != "scores"]
        described = {name: name if name == "run_id" else f"metric_{name}" for name in names}
        described |= {"units": "units", "scores": "scores"} if scores else {"units": "units"}
        with self._store.engine.connect() as connection:
            rows = connection.execute(select(*(_METRIC.c[name] for name in names))).fetchall()
        schema: dict[str, Any] = {described[name]: _METRIC_TYPES.get(name, pl.String) for name in names}
        metrics = pl.DataFrame([tuple(row) for row in rows], schema=schema, orient="row")
        if scores:
            metrics = metrics.with_columns(_as_lists(metrics["scores"]))
        runs = self.frame.drop(*METRIC_FIELDS, *_VALUE_FIELDS).rename(
            {"params_json": "params", "task_params_json": "task_params"}
        )
        changed = [self.stale.get(run_id) for run_id in runs["id"]]
        runs = runs.with_columns(pl.Series("stale", changed, dtype=pl.String))
        joined = runs.with_row_index("order").join(metrics, left_on="id", right_on="run_id", how="left")
        keys = ["order", "metric_primary", "metric_name"]
        return joined.sort(keys, descending=[False, True, False]).drop("order")

    def documents(self, run_ids: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yield id and JSON text of some runs, with everything but per-unit scores and curves."""
        columns = [
            type_coerce(column, Text).label(name) if isinstance(column.type, JSON) else column
            for name, column in _RUN.c.items()
            if name != "identity"
        ]
        json_names = [name for name, column in _RUN.c.items() if isinstance(column.type, JSON)]
        fields = [name for name, _ in _METRIC.c.items() if name not in ("run_id", "scores")]
        with self._store.engine.connect() as connection:
            for some in _chunks(run_ids):
                metrics: dict[str, list[dict[str, Any]]] = {}
                query = select(_METRIC.c.run_id, *(_METRIC.c[name] for name in fields))
                chosen = query.where(_METRIC.c.run_id.in_(some)).order_by(_METRIC.c.name)
                for row in connection.execute(chosen).all():
                    metrics.setdefault(row[0], []).append(dict(zip(fields, row[1:], strict=True)))
                found = connection.execute(select(*columns).where(_RUN.c.id.in_(some))).all()
                rows = {row.id: row for row in found}
                for run_id in some:
                    said = {**rows[run_id]._asdict(), "stale": self.stale.get(run_id)}
                    if run_id in self.witnesses:
                        said["witnesses"] = self.witnesses[run_id]
                    yield run_id, _document(said, json_names, metrics.get(run_id, []))


#: Polars types of the columns of a metric that are not text.
_METRIC_TYPES: dict[str, Any] = {
    "primary": pl.Boolean, "value": pl.Float64, "low": pl.Float64, "high": pl.Float64, "units": pl.Int64,
    "scores": pl.Binary,
}  # fmt: skip


_STRICT = json.JSONEncoder(allow_nan=False)


def _as_lists(packed: pl.Series) -> pl.Series:
    """Return the scores of each row as a list; all rows at once, since there are millions of scores."""
    texts = packed.to_list()
    values = np.frombuffer(b"".join(texts), dtype="<f8")
    rows = np.repeat(np.arange(len(texts), dtype=np.uint32), [len(text) // 8 for text in texts])
    lists = pl.DataFrame({"row": rows, "scores": values}).group_by("row", maintain_order=True).agg("scores")
    places = pl.DataFrame({"row": np.arange(len(texts), dtype=np.uint32)})
    empty = pl.lit([], dtype=pl.List(pl.Float64))
    return (
        places.join(lists, on="row", how="left", maintain_order="left")["scores"]
        .to_frame()
        .select(pl.col("scores").fill_null(empty))["scores"]
    )


def _document(row: dict[str, Any], json_names: Sequence[str], metrics: list[dict[str, Any]]) -> str:
    """Write a run as JSON, without pictures. JSON goes in as it is, unless it holds numbers that JSON lacks."""
    texts = {name: row.pop(name) for name in json_names if name in row}
    if f'"{pictures.FACT}"' in (texts.get("facts") or ""):
        facts = json.loads(texts["facts"])
        texts["facts"] = json.dumps({name: value for name, value in facts.items() if name != pictures.FACT})
    row["started_at"] = utc(row["started_at"]).isoformat()
    row["metrics"] = metrics
    try:
        parts = [_STRICT.encode(row)[1:-1]]
    except ValueError:
        parts = [json.dumps(_finite(row))[1:-1]]
    for name, text in texts.items():
        if text is None:
            continue
        if "NaN" in text or "Infinity" in text:
            text = json.dumps(_finite(json.loads(text)))
        parts.append(f'"{name}": {text}')
    return f"{{{', '.join(parts)}}}"


def _finite(value: Any) -> Any:
    """Return ``value`` with numbers that JSON has no form for as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def _chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(values), _CHUNK):
        yield values[start : start + _CHUNK]


def _read_briefs(store: Store) -> pl.DataFrame:
    """Read all runs but replays, and the primary metric of each."""
    described = (*METRIC_FIELDS, *_VALUE_FIELDS)
    own = [name for name in Brief._fields if name not in described]
    runs = [
        type_coerce(_RUN.c[name.removesuffix("_json")], Text) if name.endswith("_json") else _RUN.c[name]
        for name in own
    ]
    columns = ("name", "title", "unit", "direction", "aggregate", *_VALUE_FIELDS)
    with store.engine.connect() as connection:
        rows = connection.execute(select(*runs).where(_RUN.c.witness_of.is_(None))).fetchall()
        query = select(_METRIC.c.run_id, *(_METRIC.c[name] for name in columns)).where(_METRIC.c.primary)
        metrics = connection.execute(query).fetchall()
    when = own.index("started_at")
    frame = pl.DataFrame(
        [(*row[:when], utc(row[when]), *row[when + 1 :]) for row in rows],
        schema={name: _SCHEMA[name] for name in own},
        orient="row",
    )
    values = pl.DataFrame(
        [tuple(row) for row in metrics],
        schema={"id": pl.String, **{name: _SCHEMA[name] for name in described}},
        orient="row",
    )
    # A run has one primary metric; of an odd one with several, the first by name.
    values = values.sort("id", "metric").unique("id", keep="first", maintain_order=True)
    return frame.join(values, on="id", how="left").sort("started_at", "id").select(Brief._fields)


def utc(moment: datetime) -> datetime:
    """Return ``moment`` in UTC; databases without time zones give naive times that are UTC."""
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _digest(store: Store) -> tuple[str, dict[str, str]]:
    """Return sha256 over the seals of all runs, or over all their columns where there is no seal yet; and the seals."""
    hasher = hashlib.sha256()
    seals: dict[str, str] = {}
    unsealed: list[str] = []
    with store.engine.connect() as connection:
        for run_id, seal in connection.execute(select(_RUN.c.id, _RUN.c.seal).order_by(_RUN.c.id)):
            hasher.update(f"{run_id}\0{seal}\n".encode("utf-8", "surrogatepass"))
            seals[run_id] = seal
            if not seal:
                unsealed.append(run_id)
        for some in _chunks(unsealed):
            for table, key in ((_RUN, _RUN.c.id), (_METRIC, _METRIC.c.run_id), (_SERIES, _SERIES.c.run_id)):
                columns = [type_coerce(c, Text) if isinstance(c.type, JSON) else c for c in table.c]
                query = select(*columns).where(key.in_(some)).order_by(*table.primary_key)
                for row in connection.execute(query).all():
                    hasher.update(repr([_plain(value) for value in row]).encode("utf-8", "surrogatepass"))
    return hasher.hexdigest(), seals


def _plain(value: Any) -> Any:
    """Return a value of a column as something whose ``repr`` is the same everywhere."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return utc(value).isoformat() if isinstance(value, datetime) else value
