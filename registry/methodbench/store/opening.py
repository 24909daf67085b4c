"""Opening a database: where it is, how it is configured, bringing its schema up to date, and what errors mean."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import event, inspect, text
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, InternalError, OperationalError
from sqlmodel import create_engine

from methodbench.errors import StoreError
from methodbench.store.location import default_url
from methodbench.store.schema import SCHEMA_REVISION

#: Seconds to wait for another process that writes or migrates.
BUSY_SECONDS = 30
#: Key of the PostgreSQL advisory lock that migrations hold.
_MIGRATION_LOCK = 0x6D62_6D69

#: Alembic keeps what it works on in a module: one migration at a time in one process.
_ALEMBIC = threading.Lock()

#: Part of a driver's message -> how to mend it.
_HINTS = {
    "readonly": "Make the file and its folder writable, or give another database with --db.",
    "read-only": "Make the file and its folder writable, or give another database with --db.",
    "full": "Free some space and run the same command again: finished cells are kept.",
    "No space left": "Free some space and run the same command again: finished cells are kept.",
    "disk I/O": "Check the disk and its free space, then run the same command again: finished cells are kept.",
    "locked": "Another process holds it; wait for it to finish and run the same command again.",
    "lock timeout": "Another process holds it; wait for it to finish and run the same command again.",
    "unable to open": "Check the path and the permissions of its folder.",
    "password": "Check user and password of the URL, or set PGPASSWORD.",
    "does not exist": "Create the database and the user first: `createdb NAME`, `createuser NAME`.",
    "connection": "Is the server running, and are host and port of the URL right? Finished cells are kept.",
}


class Opened:
    """An engine, and what is known of its database."""

    def __init__(self, engine: Engine, where: str, *, read_only: bool) -> None:
        self.engine = engine
        self.where = where
        """Path or URL, without password."""
        self.read_only = read_only


def open_engine(url: str | None, *, create: bool) -> Opened:
    """Connect and bring the schema up to date; see :func:`methodbench.store.open_store`."""
    where = url or default_url()
    parsed, where = _parse(where)
    sqlite = parsed.get_backend_name() == "sqlite"
    read_only = sqlite and bool(parsed.database) and _prepare_file(Path(str(parsed.database)), create)
    try:
        if read_only:
            engine = _read_only_engine(Path(str(parsed.database)))
        else:
            engine = create_engine(parsed, pool_pre_ping=not sqlite)
    except ModuleNotFoundError as error:
        package = "methodbench[postgres]" if error.name == "psycopg" else error.name
        raise StoreError(
            f"the database {where!r} needs the driver {error.name!r}", f"pip install '{package}'"
        ) from error
    if sqlite:
        event.listen(engine, "connect", _configure_read_only if read_only else _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        event.listen(engine, "connect", _configure_postgres)
    try:
        with translated(where):
            _migrate(engine, where, read_only=read_only)
            if create:
                # A run of hours must not end with a record that cannot be written.
                with engine.execution_options(writes=True).begin():
                    pass
    except BaseException:
        engine.dispose()
        raise
    return Opened(engine, where, read_only=read_only)


def _parse(where: str) -> tuple[URL, str]:
    try:
        parsed = make_url(where if "://" in where else f"sqlite:///{Path(where).expanduser()}")
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        parsed.get_dialect()
    except ArgumentError:
        raise StoreError(f"{where!r} is neither a path nor a database URL") from None
    except ModuleNotFoundError as error:
        raise StoreError(f"the database {where!r} needs the driver {error.name!r}") from error
    shown = parsed.render_as_string(hide_password=True) if "://" in where else where
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise StoreError(
            f"{shown}: records are kept in SQLite or PostgreSQL",
            "Give the path of a file or a postgresql:// URL.",
        )
    return parsed, shown


def _prepare_file(path: Path, create: bool) -> bool:
    """Return whether an SQLite file can only be read; make its folder where it may be made."""
    if str(path) == ":memory:" or str(path).startswith("file:"):
        return False
    if not path.exists():
        if not create:
            raise StoreError(f"no results yet: {path} does not exist", "`methodbench demo` makes some.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot create the folder of {path}: {error.strerror}") from error
    elif path.is_dir():
        raise StoreError(f"{path} is a folder, not a database", "Give the path of a file with --db.")
    if _writable(path) and _writable(path.parent):
        return False
    if create:
        what = "file" if path.exists() and not _writable(path) else "folder"
        raise StoreError(f"database {path}: the {what} cannot be written", _HINTS["readonly"])
    return True


def _writable(path: Path) -> bool:
    if not path.exists():
        return True
    with contextlib.suppress(OSError):
        if os.statvfs(path).f_flag & os.ST_RDONLY:
            return False
    return os.access(path, os.W_OK)


def _read_only_engine(path: Path) -> Engine:
    return create_engine("sqlite://", creator=lambda: connect_read_only(path))


def connect_read_only(path: Path) -> sqlite3.Connection:
    """Connect to an SQLite file that this process leaves as it is."""
    whole = path.resolve().as_posix().replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    # Without write access to the folder SQLite cannot make the index of the write-ahead log; a file that has no
    # log can be read without one.
    log = Path(f"{path}-wal")
    alone = not (log.exists() and log.stat().st_size) and not _writable(path.parent)
    return sqlite3.connect(
        f"file:{whole}?mode=ro{'&immutable=1' if alone else ''}",
        uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False,
    )  # fmt: skip


def _configure_sqlite(connection: Any, _: Any) -> None:
    # Transactions are begun by `_begin_sqlite`; the driver's own habit is to begin them late.
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout={BUSY_SECONDS * 1000}")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")
    deadline = time.monotonic() + BUSY_SECONDS
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        # The change of mode does not wait for others by itself.
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _configure_read_only(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA query_only=ON")


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that will write takes its turn at once: one that has read first could not wait any more.
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _configure_postgres(connection: Any, _: Any) -> None:
    # Times are stored without an offset, in UTC, as SQLite has them.
    with connection.cursor() as cursor:
        cursor.execute("SET TIME ZONE 'UTC'")
        cursor.execute(f"SET lock_timeout = '{BUSY_SECONDS}s'")
    connection.commit()


def _migrate(engine: Engine, where: str, *, read_only: bool) -> None:
    if _is_current(engine, where):
        return
    if read_only:
        raise StoreError(
            f"{where} has an older schema than {SCHEMA_REVISION} and cannot be written",
            "Copy it to a folder that can be written and give the copy with --db.",
        )
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with _ALEMBIC, engine.execution_options(writes=True).begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        # Another process may have done it while this one waited for the lock.
        if not _is_current(connection, where):
            config.attributes["connection"] = connection
            command.upgrade(config, SCHEMA_REVISION)


def _is_current(bind: Engine | Connection, where: str) -> bool:
    """Return whether the schema is this version's. Raises StoreError for one that is newer or not ours."""
    tables = inspect(bind).get_table_names()
    if not tables:
        return False
    revision = None
    if "alembic_version" in tables:
        query = text("SELECT version_num FROM alembic_version")
        if isinstance(bind, Engine):
            with bind.connect() as connection:
                revision = connection.execute(query).scalar()
        else:
            revision = bind.execute(query).scalar()
    if revision is None:
        raise StoreError(f"{where} is a database of something else", "Give another path with --db.")
    if revision > SCHEMA_REVISION:
        raise StoreError(
            f"{where} was written by a newer methodbench (schema {revision}, this one knows {SCHEMA_REVISION})",
            "Upgrade methodbench, or give another database with --db. Nothing was changed.",
        )
    return bool(revision == SCHEMA_REVISION)


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn what a database driver says into one message that a user can act on."""
    try:
        yield
    except (DatabaseError, sqlite3.DatabaseError) as error:
        problem = str(error.orig if isinstance(error, DatabaseError) else error).strip()
        operational = isinstance(error, (OperationalError, InternalError, sqlite3.OperationalError))
        if operational and "decode" not in problem:
            hint = next((text for key, text in _HINTS.items() if key in problem), "")
            raise StoreError(f"database {where}: {problem}", hint) from error
        # Anything else than the plain class is a statement that is wrong, so a bug.
        if operational or type(error) in (DatabaseError, sqlite3.DatabaseError):
            raise damaged(where, problem) from error
        raise
    except json.JSONDecodeError as error:
        raise damaged(where, f"a stored value is no JSON ({error})") from error
    except UnicodeDecodeError as error:
        raise damaged(where, "it holds text that is none") from error
    except ValueError as error:
        # SQLAlchemy's words for a stored time that is none.
        if "datetime string" not in str(error) and "isoformat" not in str(error):
            raise
        raise damaged(where, str(error)) from error


def damaged(where: str, problem: str) -> StoreError:
    """Return the error for a file that is damaged, or no database at all."""
    return StoreError(
        f"database {where} cannot be read: {problem}",
        "It is damaged or no database: `methodbench doctor --repair` saves what can be read, and keeps the original.",
    )
