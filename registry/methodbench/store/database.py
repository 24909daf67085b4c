"""Reading and writing records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import func
from sqlalchemy import select as sa_select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Engine
from sqlmodel import Session, SQLModel, col, select

from methodbench.errors import StoreError
from methodbench.store import records
from methodbench.store.opening import open_engine, translated
from methodbench.store.records import Record, row_of
from methodbench.store.schema import Environment, Fingerprint, MetricValue, Run, Series, Witness

if TYPE_CHECKING:
    import polars as pl

    from methodbench.store.claims import Lease

#: Runs that are results of their own, not repetitions of another run.
_OWN = col(Run.witness_of).is_(None)


class Version(NamedTuple):
    """What decides whether a record still holds: everything of its identity that nobody asks for."""

    method: str
    method_digest: str
    model: str
    weights_digest: str
    task: str
    protocol: int
    data_digest: str
    identity: int
    """Version of the identity itself."""


_VERSION: tuple[Any, ...] = (
    Run.method, Run.method_digest, Run.model, Run.weights_digest, Run.task, Run.protocol, Run.data_digest,
    col(Run.identity)["version"].as_integer(),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finished:
    """A cell that came to its end: its run, and the rows that belong to it."""

    run: Run
    metrics: Sequence[MetricValue] = ()
    series: Sequence[Series] = ()
    environment: Environment | None = None
    fingerprint: Fingerprint | None = None
    witness: Witness | None = None

    def record(self) -> Record:
        """Return the values by column, sealed; the run gets its seal too."""
        record = Record(row_of(self.run))
        one = (row for row in (self.fingerprint, self.witness) if row is not None)
        for row in (*self.metrics, *self.series, *one):
            record.children.setdefault(_table(row), []).append(row_of(row))
        self.run.seal = record.run["seal"] = records.seal(record)
        return record


@dataclass(slots=True)
class Store:
    """An open database; the only writer is the driver of a run."""

    engine: Engine
    url: str
    known_environments: set[str] = field(default_factory=set)
    """Digests of environments that are in the database for sure."""
    read_only: bool = False

    def close(self) -> None:
        self.engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that reads; what drivers of databases say becomes a StoreError."""
        with translated(self.url), Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session that writes: others that write wait for its end. The caller commits."""
        engine = self.engine.execution_options(writes=True)
        with translated(self.url), Session(engine, expire_on_commit=False) as session:
            yield session

    def add(
        self,
        run: Run,
        metrics: Sequence[MetricValue] = (),
        series: Sequence[Series] = (),
        environment: Environment | None = None,
        fingerprint: Fingerprint | None = None,
        witness: Witness | None = None,
        *,
        lease: Lease | None = None,
    ) -> Run:
        """Write one finished cell in one transaction; see :meth:`add_finished`."""
        finished = Finished(run, metrics, series, environment, fingerprint, witness)
        return self.add_finished([finished], lease=lease)[0]

    def add_finished(self, finished: Sequence[Finished], *, lease: Lease | None = None) -> list[Run]:
        """Write finished cells, each wholly or not at all, and end their claims with them.

        All are written in one transaction. Where that fails, each is written in one of its own, so that a record that
        cannot be written takes no other along; the error of the first that cannot is raised.

        Args:
            finished: cells that are not reported as done yet; each cell once.
            lease: the driver's presence; see :mod:`methodbench.store.claims`.

        Returns:
            The records that count: those that were given, or those that another driver made of the same cells because
            it had taken this one for dead.
        """
        if lease is not None:
            self._follow([one.run for one in finished], lease.known)
        made = [one.record() for one in finished]
        try:
            return self._write(finished, made, lease)
        except Exception:
            if len(finished) == 1:
                raise
        return [self._write([one], [record], lease)[0] for one, record in zip(finished, made, strict=True)]

    def _write(self, finished: Sequence[Finished], made: Sequence[Record], lease: Lease | None) -> list[Run]:
        """Write records in one transaction, but for those of cells that another driver has recorded."""
        needed = {one.environment.digest: one.environment for one in finished if one.environment is not None}
        fresh = {key: row for key, row in needed.items() if key not in self.known_environments}
        with self.writing() as session:
            others = (
                lease.settle(session, [one.run.cell_key for one in finished]) if lease is not None else {}
            )
            self.put_environments(session, map(row_of, fresh.values()))
            own = [record for record in made if record.run["cell_key"] not in others]
            records.write(session.connection(), own)
            session.commit()
        self.known_environments |= fresh.keys()
        return [others.get(one.run.cell_key, one.run) for one in finished]

    def add_many(self, made: Iterable[Record], environments: Iterable[dict[str, Any]] = ()) -> None:
        """Write records, and the environments that they need, in one transaction."""
        with self.writing() as session:
            self.put_environments(session, environments)
            records.write(session.connection(), made)
            session.commit()

    def put_environments(self, session: Session, rows: Iterable[dict[str, Any]]) -> None:
        """Insert the environments that are not there yet, whoever else is about to insert the same."""
        connection = session.connection()
        insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
        for row in rows:
            connection.execute(insert(records.ENVIRONMENT).values(row).on_conflict_do_nothing())

    def _follow(self, runs: Sequence[Run], known: Mapping[str, str]) -> None:
        """Keep a cell's records in the order they were made in, also when the clock was set back in between."""
        before = {run.cell_key: known[run.cell_key] for run in runs if known.get(run.cell_key)}
        if not before:
            return
        with self.reading() as session:
            query = select(Run.id, Run.started_at).where(col(Run.id).in_(before.values()))
            began = dict(session.exec(query).all())
        for run in runs:
            last = began.get(before.get(run.cell_key, ""))
            if last is not None and run.started_at <= last:
                said = run.started_at.isoformat(timespec="seconds")
                run.warnings = [*run.warnings, f"the clock was set back: it said {said} when this run began"]
                run.started_at = last + timedelta(microseconds=1)

    def count(self, **wanted: str | None) -> int:
        """Return how many runs there are with these values of columns."""
        query = sa_select(func.count()).select_from(records.RUN).where(_OWN, *_conditions(wanted))
        with translated(self.url), self.engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def latest(self, cell_keys: Iterable[str], session: Session | None = None) -> dict[str, Run]:
        """Return the newest finished run of each cell, an ``ok`` one before any other.

        Args:
            session: transaction to look in; one of its own by default.
        """
        if session is None:
            with self.reading() as own:
                return self.latest(cell_keys, own)
        found: dict[str, Run] = {}
        for some in records.portions(cell_keys):
            query = select(Run).where(col(Run.cell_key).in_(some), _OWN)
            for run in session.exec(query.order_by(col(Run.started_at), col(Run.id))):
                before = found.get(run.cell_key)
                if before is None or run.status == "ok" or before.status != "ok":
                    found[run.cell_key] = run
        return found

    def run_or_cell(self, prefix: str) -> Run:
        """Return the newest run of the cell whose key starts with ``prefix``, or the run whose id does.

        Raises:
            StoreError: none does, or several cells or runs do.
        """
        # Ids have 12 digits, keys 64: what is longer than an id is a key, what is shorter is more often an id.
        with self.reading() as session:
            query = select(Run).where(col(Run.cell_key).startswith(prefix, autoescape=True), _OWN)
            by_id = select(Run.id).where(col(Run.id).startswith(prefix, autoescape=True)).limit(1)
            known = bool(prefix) and session.exec(by_id).first() is None
            found = session.exec(query.order_by(col(Run.started_at).desc())).all() if known else []
        if not found:
            return self.run(prefix)
        if len({run.cell_key for run in found}) > 1:
            raise StoreError(f"cell {prefix!r} is ambiguous", "Give more digits of its key.")
        return next((run for run in found if run.status == "ok"), found[0])

    def run(self, run_id: str) -> Run:
        """Return the run whose id starts with ``run_id``. Raises StoreError when none or several do."""
        with self.reading() as session:
            query = select(Run).where(col(Run.id).startswith(run_id, autoescape=True)).limit(2)
            found = session.exec(query).all()
        if not found or not run_id:
            raise StoreError(f"no run {run_id!r} in {self.url}", "`methodbench results` lists the runs.")
        if len(found) > 1:
            raise StoreError(f"run {run_id!r} is ambiguous", "Give more digits of its id.")
        return found[0]

    def runs(self, *, witnesses: bool = False) -> list[Run]:
        """Return every run, oldest first; those that only repeat another one when ``witnesses`` asks for them."""
        query = select(Run).order_by(col(Run.started_at), col(Run.id))
        with self.reading() as session:
            return list(session.exec(query if witnesses else query.where(_OWN)))

    def runs_of(self, methods: Iterable[str] | None, tasks: Iterable[str] | None = None) -> list[Run]:
        """Return the runs of these methods on these tasks (None for every one), oldest first."""
        query = select(Run).where(_OWN).order_by(col(Run.started_at), col(Run.id))
        if methods is not None:
            query = query.where(col(Run.method).in_(list(methods)))
        if tasks is not None:
            query = query.where(col(Run.task).in_(list(tasks)))
        with self.reading() as session:
            return list(session.exec(query))

    def versions(self) -> list[Version]:
        """Return the versions of methods, weights, tasks and data that there are records of, each once."""
        query = sa_select(*_VERSION).where(_OWN).distinct()
        with translated(self.url), self.engine.connect() as connection:
            return [Version(*row) for row in connection.execute(query)]

    def versions_of(self, run_ids: Iterable[str]) -> dict[str, Version]:
        """Return the version of each of these runs, by its id."""
        found: dict[str, Version] = {}
        with translated(self.url), self.engine.connect() as connection:
            for some in records.portions(run_ids):
                query = sa_select(col(Run.id), *_VERSION).where(col(Run.id).in_(some))
                found |= {identifier: Version(*row) for identifier, *row in connection.execute(query)}
        return found

    def ids(self, version: Version) -> list[str]:
        """Return the ids of the runs of one version."""
        matches = [column == value for column, value in zip(_VERSION, version, strict=True)]
        with translated(self.url), self.engine.connect() as connection:
            return list(connection.execute(sa_select(col(Run.id)).where(_OWN, *matches)).scalars())

    def counts(self) -> list[tuple[str, str, Version, int]]:
        """Return how many runs there are of each suite, status and version."""
        columns = (col(Run.suite), col(Run.status), *_VERSION)
        query = sa_select(*columns, func.count()).where(_OWN).group_by(*columns)
        with translated(self.url), self.engine.connect() as connection:
            rows = connection.execute(query)
            return [(suite, status, Version(*version), count) for suite, status, *version, count in rows]

    def names(self, column: str) -> list[str]:
        """Return the values of a column of the runs that are not empty, each once."""
        query = sa_select(records.RUN.c[column]).where(_OWN).distinct()
        with translated(self.url), self.engine.connect() as connection:
            return sorted(filter(None, connection.execute(query).scalars()))

    def fingerprint(self, run_id: str) -> list[dict[str, Any]]:
        """Return the marks of a run, in the order of its computation; empty where it left none."""
        with self.reading() as session:
            found = session.get(Fingerprint, run_id)
            return found.marks if found else []

    def witnesses(self, run_id: str) -> list[Witness]:
        """Return what the replays of a run came to, oldest first."""
        query = select(Witness).where(Witness.original == run_id)
        with self.reading() as session:
            return list(
                session.exec(query.join(Run, col(Run.id) == Witness.run_id).order_by(col(Run.started_at)))
            )

    def metrics(self, run_ids: Iterable[str] | None = None) -> list[MetricValue]:
        """Return the metrics of the given runs (of all by default)."""
        return self._children(MetricValue, run_ids)

    def series(self, run_ids: Iterable[str] | None = None) -> list[Series]:
        """Return the curves of the given runs (of all by default)."""
        return self._children(Series, run_ids)

    def environments(self) -> dict[str, Environment]:
        """Return the environments by digest."""
        with self.reading() as session:
            return {row.digest: row for row in session.exec(select(Environment))}

    def _children(self, table: Any, run_ids: Iterable[str] | None) -> list[Any]:
        with self.reading() as session:
            if run_ids is None:
                return list(session.exec(select(table).order_by(table.run_id, table.name)))
            rows: list[Any] = []
            for some in records.portions(run_ids):
                query = select(table).where(table.run_id.in_(some))
                rows.extend(session.exec(query.order_by(table.run_id, table.name)))
            return rows

    def frame(self, last: int | None = None, **wanted: str | None) -> pl.DataFrame:
        """Return one row per run and metric, as a Polars frame; a run without a metric has one row of nulls.

        Args:
            last: only so many of the newest runs; all by default.
            wanted: values of columns of the runs; None for any.
        """
        import polars as pl

        schema: dict[str, Any] = {
            "run": pl.String, "method": pl.String, "variant": pl.String, "model": pl.String, "task": pl.String,
            "seed": pl.Int64, "status": pl.String, "reason": pl.String, "metric": pl.String, "value": pl.Float64,
            "low": pl.Float64, "high": pl.Float64, "units": pl.Int64, "unit": pl.String, "direction": pl.String,
            "primary": pl.Boolean, "storage": pl.String, "bits_per_weight": pl.Float64, "model_bytes": pl.Int64,
            "wall_seconds": pl.Float64, "peak_memory_bytes": pl.Int64, "throughput": pl.Float64,
            "throughput_unit": pl.String, "family": pl.String, "suite": pl.String,
            "started_at": pl.Datetime(time_zone="UTC"), "cell_key": pl.String,
        }  # fmt: skip
        renamed: dict[str, Any] = {"run": Run.id, "metric": MetricValue.name}
        columns = [
            renamed.get(name) or getattr(Run, name, None) or getattr(MetricValue, name) for name in schema
        ]
        runs = sa_select(col(Run.id)).where(_OWN, *_conditions(wanted))
        if last is not None:
            runs = runs.order_by(col(Run.started_at).desc(), col(Run.id).desc()).limit(last)
        query = sa_select(*columns).join(MetricValue, isouter=True).where(col(Run.id).in_(runs))
        query = query.order_by(col(Run.started_at), col(Run.id))
        with translated(self.url), self.engine.connect() as connection:
            rows = [tuple(row) for row in connection.execute(query)]
        return pl.DataFrame(rows, schema=schema, orient="row")


def open_store(url: str | None = None, *, create: bool = True) -> Store:
    """Open the database, bringing its schema up to date.

    Args:
        url: a path of an SQLite file or a ``postgresql://`` URL; by default ``METHODBENCH_DB`` or ``methodbench.db``.
        create: make the database when it does not exist, and make sure that it can be written. Without it, an SQLite
            file that cannot be written is opened for reading.

    Raises:
        StoreError: it does not exist, cannot be read or written, is damaged, or was made by a newer version.
    """
    opened = open_engine(url, create=create)
    return Store(opened.engine, opened.where, read_only=opened.read_only)


def _conditions(wanted: Mapping[str, str | None]) -> list[Any]:
    return [records.RUN.c[name] == value for name, value in wanted.items() if value is not None]


def _table(row: SQLModel) -> str:
    return str(row.__tablename__)
