"""Opening, migrating and querying the result database."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import event, inspect, text
from sqlalchemy import select as sa_select
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError
from sqlmodel import Session, col, create_engine, select

from methodbench.errors import StoreError
from methodbench.store.schema import (
    SCHEMA_REVISION,
    Environment,
    Fingerprint,
    MetricValue,
    Run,
    Series,
    Witness,
)

if TYPE_CHECKING:
    import polars as pl

#: Failures are results too: a cell that ended in one of these is not run again unless asked for.
DONE = ("ok", "failed", "timeout", "oom", "not-applicable")

#: Runs that are results of their own, not repetitions of another run.
_OWN = col(Run.witness_of).is_(None)


def default_url() -> str:
    """Return ``METHODBENCH_DB`` or ``methodbench.db`` in the current folder."""
    return os.environ.get("METHODBENCH_DB") or "methodbench.db"


@dataclass(slots=True)
class Store:
    """An open database; the only writer is the driver of a run."""

    engine: Engine
    url: str
    known_environments: set[str] = field(default_factory=set)
    """Digests of environments that are in the database for sure."""

    def close(self) -> None:
        self.engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _session(self) -> Iterator[Session]:
        with _translated(self.url), Session(self.engine, expire_on_commit=False) as session:
            yield session

    def add(
        self,
        run: Run,
        metrics: Iterable[MetricValue] = (),
        series: Iterable[Series] = (),
        environment: Environment | None = None,
        fingerprint: Fingerprint | None = None,
        witness: Witness | None = None,
    ) -> None:
        """Write one finished cell in one transaction."""
        with self._session() as session:
            unknown = environment is not None and environment.digest not in self.known_environments
            if environment is not None and unknown and session.get(Environment, environment.digest) is None:
                session.add(Environment(**environment.model_dump()))
                session.flush()
            session.add(run)
            session.flush()
            session.add_all(metrics)
            session.add_all(series)
            session.add_all(row for row in (fingerprint, witness) if row is not None)
            session.commit()
            if environment is not None:
                self.known_environments.add(environment.digest)

    def latest(self, cell_keys: Iterable[str]) -> dict[str, Run]:
        """Return the newest finished run of each cell, an ``ok`` one before any other."""
        wanted = list(dict.fromkeys(cell_keys))
        found: dict[str, Run] = {}
        with self._session() as session:
            for start in range(0, len(wanted), 500):
                query = select(Run).where(col(Run.cell_key).in_(wanted[start : start + 500]), _OWN)
                for run in session.exec(query.order_by(col(Run.started_at))):
                    before = found.get(run.cell_key)
                    if before is None or run.status == "ok" or before.status != "ok":
                        found[run.cell_key] = run
        return found

    def run(self, run_id: str) -> Run:
        """Return the run whose id starts with ``run_id``. Raises StoreError when none or several do."""
        with self._session() as session:
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
        with self._session() as session:
            return list(session.exec(query if witnesses else query.where(_OWN)))

    def fingerprint(self, run_id: str) -> list[dict[str, Any]]:
        """Return the marks of a run, in the order of its computation; empty where it left none."""
        with self._session() as session:
            found = session.get(Fingerprint, run_id)
            return found.marks if found else []

    def witnesses(self, run_id: str) -> list[Witness]:
        """Return what the replays of a run came to, oldest first."""
        query = select(Witness).where(Witness.original == run_id)
        with self._session() as session:
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
        with self._session() as session:
            return {row.digest: row for row in session.exec(select(Environment))}

    def _children(self, table: Any, run_ids: Iterable[str] | None) -> list[Any]:
        with self._session() as session:
            if run_ids is None:
                return list(session.exec(select(table).order_by(table.run_id, table.name)))
            wanted = list(dict.fromkeys(run_ids))
            rows: list[Any] = []
            for start in range(0, len(wanted), 500):
                query = select(table).where(table.run_id.in_(wanted[start : start + 500]))
                rows.extend(session.exec(query.order_by(table.run_id, table.name)))
            return rows

    def frame(self) -> pl.DataFrame:
        """Return one row per run and metric, as a Polars frame; a run without a metric has one row of nulls."""
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
        query = sa_select(*columns).join(MetricValue, isouter=True).where(_OWN)
        query = query.order_by(col(Run.started_at), col(Run.id))
        with _translated(self.url), self.engine.connect() as connection:
            rows = [tuple(row) for row in connection.execute(query)]
        return pl.DataFrame(rows, schema=schema, orient="row")


def open_store(url: str | None = None, *, create: bool = True) -> Store:
    """Open the database, bringing its schema up to date.

    Args:
        url: a path of an SQLite file or an SQLAlchemy URL; by default :func:`default_url`.
        create: make the database when it does not exist.

    Raises:
        StoreError: it does not exist, cannot be read or written, is damaged, or was made by a newer version.
    """
    where = url or default_url()
    full = where if "://" in where else f"sqlite:///{Path(where).expanduser()}"
    try:
        parsed = make_url(full)
        parsed.get_dialect()
    except ArgumentError:
        raise StoreError(f"{where!r} is neither a path nor a database URL") from None
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        path = Path(parsed.database)
        if not path.exists():
            if not create:
                raise StoreError(f"no results yet: {path} does not exist", "`methodbench demo` makes some.")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(f"cannot create the folder of {path}: {error.strerror}") from error
    try:
        engine = create_engine(parsed)
    except ModuleNotFoundError as error:
        raise StoreError(
            f"the database {where!r} needs the driver {error.name!r}", f"pip install {error.name}"
        ) from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure_sqlite)
    store = Store(engine, where)
    with _translated(where):
        _migrate(engine, where)
    return store


def _configure_sqlite(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout=30000")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _migrate(engine: Engine, where: str) -> None:
    revision = _revision(engine)
    if revision == SCHEMA_REVISION:
        return
    if revision is None and inspect(engine).get_table_names():
        raise StoreError(f"{where} is a database of something else", "Give another path with --db.")
    if revision is not None and revision > SCHEMA_REVISION:
        raise StoreError(
            f"{where} was written by a newer methodbench (schema {revision}, this one knows {SCHEMA_REVISION})",
            "Upgrade methodbench, or give another database with --db. Nothing was changed.",
        )
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE" if not connection.in_transaction() else "SELECT 1")
        config.attributes["connection"] = connection
        command.upgrade(config, SCHEMA_REVISION)


def _revision(engine: Engine) -> str | None:
    if not inspect(engine).has_table("alembic_version"):
        return None
    with engine.connect() as connection:
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


@contextmanager
def _translated(where: str) -> Iterator[None]:
    """Turn what a database driver says into one message that a user can act on."""
    try:
        yield
    except OperationalError as error:
        problem = str(error.orig)
        hints = {
            "readonly": "Make the file and its folder writable, or give another database with --db.",
            "full": "Free some space and run the same command again: finished cells are kept.",
            "locked": "Another process holds it; wait for it to finish and run the same command again.",
            "unable to open": "Check the path and the permissions of its folder.",
        }
        hint = next((text for key, text in hints.items() if key in problem), "")
        raise StoreError(f"database {where}: {problem}", hint) from error
    except DatabaseError as error:
        raise StoreError(
            f"database {where} cannot be read: {error.orig}",
            "It is damaged or no database: move it away and run again, or restore a copy.",
        ) from error
