"""Saving what can be read of a damaged SQLite database into a sound one. The damaged file is kept beside it."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, Boolean, Column, DateTime, Float, Integer, LargeBinary, Table

from methodbench.errors import StoreError
from methodbench.store import records
from methodbench.store.capsule import Content
from methodbench.store.claims import Lease, runs_here
from methodbench.store.database import Store, open_store
from methodbench.store.merging import merge, seal_unsealed
from methodbench.store.records import CHILDREN, ENVIRONMENT, RUN, Record, plain_json
from methodbench.store.schema import Driver

#: How far a scan jumps at most over rows that cannot be read.
_FAR = 1 << 40
_PAGE = 4096


@dataclass(slots=True)
class Findings:
    """What is wrong with a database."""

    damage: list[str] = field(default_factory=list)
    """What SQLite itself says."""
    broken: list[str] = field(default_factory=list)
    """Runs whose seal is broken: what they say is not what was recorded."""
    unsealed: int = 0
    """Runs of the first schema, which had no seals."""
    dead: list[Driver] = field(default_factory=list)
    """Drivers that died and left claims."""

    @property
    def good(self) -> bool:
        return not self.damage and not self.broken


@dataclass(slots=True)
class Repair:
    """What a repair came to."""

    saved: int
    lost: int
    """Runs that are known to have been there and could not be saved; their cells will be run again."""
    kept: Path | None
    """The damaged file and where it is now; None where none was needed."""


def examine(store: Store) -> Findings:
    """Look at a database page by page and record by record. Raises StoreError when it cannot be read at all."""
    found = Findings()
    if store.engine.dialect.name == "sqlite":
        with store.reading() as session:
            rows = session.connection().exec_driver_sql("PRAGMA integrity_check(20)")
            found.damage = [str(row[0]) for row in rows if row[0] != "ok"]
        if found.damage:
            return found
    with store.reading() as session:
        for record in records.read(session.connection()):
            if not record.run["seal"]:
                found.unsealed += 1
            elif records.seal(record) != record.run["seal"]:
                found.broken.append(record.run["id"])
    found.dead = Lease(store, {}).dead()
    return found


def mend(store: Store, findings: Findings) -> int:
    """Put right what needs no copy: claims of the dead go, old records are sealed. Return how many records were."""
    lease = Lease(store, {})
    lease.bury(findings.dead)
    with store.writing() as session:
        sealed = seal_unsealed(session)
        session.commit()
    return sealed


def rebuild(path: Path) -> Repair:
    """Save every whole record of a damaged SQLite file into a new file of the same name.

    A record is whole when its run, all that belongs to it and its environment can be read and its seal holds. Records
    of the first schema have no seal; those are saved when all that they need is there.

    Raises:
        StoreError: nothing can be read, the folder cannot be written, or a run of this machine is at work on the file
            and would go on to write into the one that was put aside. The file is as it was.
    """
    for driver in _at_work(path):
        raise StoreError(
            f"a run is at work on {path} (pid {driver.pid}), and what it records would be left behind",
            "Stop it with Ctrl-C or wait for its end, then repair.",
        )
    try:
        free = shutil.disk_usage(path.parent).free
        if free < path.stat().st_size:
            raise StoreError(
                f"not enough space beside {path} to repair it",
                "Free as much as the database takes, and try again.",
            )
        content, lost = _salvage(path)
        fresh = path.with_name(f"{path.name}.repaired")
        for leftover in _files(fresh):
            leftover.unlink(missing_ok=True)
        with open_store(str(fresh)) as store:
            merge(store, content)
            with store.engine.connect() as connection:
                connection.exec_driver_sql("COMMIT")
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        kept = _aside(path)
        for before, after in zip(_files(path), _files(kept), strict=True):
            if before.exists():
                before.rename(after)
        fresh.rename(path)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be repaired: {error.strerror or error}", "Nothing was changed."
        ) from error
    return Repair(len(content.records), lost, kept)


def _at_work(path: Path) -> list[Driver]:
    """Return the living drivers of this machine; none where the table of drivers cannot be read."""
    wanted = ("id", "host", "place", "pid", "process_started")
    found = []
    with (
        contextlib.suppress(sqlite3.DatabaseError, TypeError, ValueError),
        contextlib.closing(sqlite3.connect(path)) as raw,
    ):
        for row in raw.execute(f"SELECT {', '.join(wanted)} FROM driver"):
            driver = Driver(**dict(zip(wanted, row, strict=True)), started_at=datetime.now(UTC))
            if runs_here(driver):
                found.append(driver)
    return found


def _files(path: Path) -> list[Path]:
    return [path, Path(f"{path}-wal"), Path(f"{path}-shm")]


def _aside(path: Path) -> Path:
    number = 1
    while (kept := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return kept


def _salvage(path: Path) -> tuple[Content, int]:
    """Read what can be read; return the whole records and how many more runs are known of."""
    known, found, environments = _read(path)
    if not found or not environments:
        # The list of tables is gone, or a part of it. A new database has its tables on the same pages.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            copy = _with_a_new_schema(path, Path(folder))
            more, found_there, environments_there = _read(copy)
        known |= more
        found = found or found_there
        environments = environments or environments_there
    if not known and not environments:
        raise StoreError(
            f"nothing can be read from {path}: its records are destroyed or it never was a database",
            "Restore a copy. The file was left as it is.",
        )
    digests = {row["digest"] for row in environments}
    whole = {name: record for name, record in found.items() if _is_whole(record, digests)}
    for record in whole.values():
        _cut_links(record, whole)
    return Content(list(whole.values()), environments), len(known) - len(whole)


def _read(path: Path) -> tuple[set[str], dict[str, Record], list[dict[str, Any]]]:
    """Return the identifiers of all runs that are known of, the records that can be read, and the environments."""
    raw = sqlite3.connect(path, isolation_level=None)
    raw.row_factory = sqlite3.Row
    raw.text_factory = bytes
    try:
        # So SQLite goes on with the tables that it can make out when its list of them is damaged.
        with contextlib.suppress(sqlite3.DatabaseError):
            raw.execute("PRAGMA writable_schema = ON")
        known = _known_runs(raw)
        environments = [row for values in _scan(raw, ENVIRONMENT) if (row := _converted(ENVIRONMENT, values))]
        found: dict[str, Record] = {}
        for values in _scan(raw, RUN):
            row = _converted(RUN, values)
            if row is not None:
                found[row["id"]] = Record(row)
                known.add(row["id"])
        for table in CHILDREN:
            for values in _scan(raw, table):
                row = _converted(table, values)
                if row is not None and row["run_id"] in found:
                    found[row["run_id"]].children.setdefault(table.name, []).append(row)
    finally:
        raw.close()
    return known, found, environments


def _with_a_new_schema(path: Path, folder: Path) -> Path:
    """Return a copy of a database whose list of tables is that of a new one.

    Right for a database that was made by this release, whose tables begin on the pages where a new one's begin; of any
    other nothing whole is read. Pages that are only in the write-ahead log are put in place first, where that can be
    done.
    """
    copy, new = folder / "copy.db", folder / "new.db"
    for source, target in zip(_files(path)[:2], _files(copy)[:2], strict=True):
        if source.exists():
            shutil.copyfile(source, target)
    with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(sqlite3.connect(copy)) as raw:
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for leftover in _files(copy)[1:]:
        leftover.unlink(missing_ok=True)
    with open_store(str(new)) as store, store.engine.connect() as connection:
        connection.exec_driver_sql("COMMIT")
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    fresh, data = new.read_bytes(), bytearray(copy.read_bytes())
    for page in _schema_pages(fresh):
        data[page * _PAGE : (page + 1) * _PAGE] = fresh[page * _PAGE : (page + 1) * _PAGE]
    # The number of pages, and no list of free ones (https://www.sqlite.org/fileformat2.html, section 1.3).
    struct.pack_into(">3I", data, 28, len(data) // _PAGE, 0, 0)
    copy.write_bytes(data)
    return copy


def _schema_pages(data: bytes) -> list[int]:
    """Return the pages, from 0, that hold the list of tables: the root, which is the first page, and its leaves.

    The root follows the file's header of 100 bytes (https://www.sqlite.org/fileformat2.html, section 1.6).
    """
    kind, cells = data[100], struct.unpack_from(">H", data, 103)[0]
    if kind != 5:
        return [0]
    offsets = struct.unpack_from(f">{cells}H", data, 112)
    children = [struct.unpack_from(">I", data, offset)[0] for offset in (*offsets, 108)]
    return [0, *(child - 1 for child in children)]


def _is_whole(record: Record, environments: set[str]) -> bool:
    if record.run["environment_digest"] not in environments:
        return False
    if record.run["seal"]:
        return records.seal(record) == record.run["seal"]
    record.run["seal"] = records.seal(record)
    return record.run["status"] != "ok" or bool(record.children.get("metric"))


def _cut_links(record: Record, whole: Mapping[str, Record]) -> None:
    """Let go of runs that were not saved."""
    if record.run["witness_of"] not in whole:
        record.run["witness_of"] = None
    for table in CHILDREN:
        if links := records.links(table):
            rows = record.children.pop(table.name, [])
            kept = [row for row in rows if all(row[link] in whole for link in links)]
            if kept:
                record.children[table.name] = kept


def _known_runs(raw: sqlite3.Connection) -> set[str]:
    """Return the identifiers of runs that an index still knows."""
    known: set[str] = set()
    with contextlib.suppress(sqlite3.DatabaseError):
        for (identifier,) in raw.execute("SELECT id FROM run INDEXED BY sqlite_autoindex_run_1 ORDER BY id"):
            known.add(_text(identifier))
    return known


def _scan(raw: sqlite3.Connection, table: Table) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table that can be read, skipping over the pages that cannot."""
    names = {column.name for column in table.c}
    try:
        there = [_text(row[1]) for row in raw.execute(f"PRAGMA table_info({table.name})")]
    except sqlite3.DatabaseError:
        return
    columns = ", ".join(f'"{name}"' for name in there if name in names)
    if not columns:
        return
    query = (
        f'SELECT rowid AS "rowid", {columns} FROM "{table.name}" NOT INDEXED WHERE rowid >= ? ORDER BY rowid'
    )
    start, jump = -(1 << 62), 1
    last = _last_rowid(raw, table)
    while start <= last:
        try:
            for row in raw.execute(query, (start,)):
                values = dict(row)
                # The column has the name that SQLite gives it, whatever the table's own columns are.
                number = values.pop("rowid")
                if number < start:
                    raise sqlite3.DatabaseError("rows out of order: a page points back at another")
                start, jump = number + 1, 1
                yield values
            return
        except sqlite3.DatabaseError:
            # Somewhere behind `start` is a page that cannot be read: over it in growing steps.
            start = max(start, 0) + jump
            jump = min(jump * 2, _FAR)
            start = _back(raw, table, start, jump)


def _back(raw: sqlite3.Connection, table: Table, start: int, jump: int) -> int:
    """After a jump that landed on readable ground, return the first readable row at or before it."""
    if jump <= 2 or not _readable(raw, table, start):
        return start
    low, high = start - jump // 2, start
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _readable(raw, table, middle) else (middle, high)
    return high


def _readable(raw: sqlite3.Connection, table: Table, start: int) -> bool:
    try:
        query = f'SELECT * FROM "{table.name}" NOT INDEXED WHERE rowid >= ? ORDER BY rowid LIMIT 1'
        return raw.execute(query, (start,)).fetchone() is not None
    except sqlite3.DatabaseError:
        return False


def _last_rowid(raw: sqlite3.Connection, table: Table) -> int:
    """Return the largest row number, or more than any where that cannot be read."""
    try:
        (last,) = raw.execute(f'SELECT max(rowid) FROM "{table.name}" NOT INDEXED').fetchone()
    except sqlite3.DatabaseError:
        return 1 << 32
    return -1 if last is None else int(last)


def _converted(table: Table, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a row as the rest of methodbench knows it; None when a value is not of its column's type."""
    row = {}
    for column in table.c:
        value = values.get(column.name)
        if column.name not in values:
            # A column of a later schema.
            value = "" if not column.nullable else None
        try:
            row[column.name] = _value(column, value)
        except (ValueError, TypeError, RecursionError):
            return None
    return row


def _value(column: Column, value: Any) -> Any:
    if value is None:
        if not column.nullable:
            raise ValueError(f"{column.name} is missing")
        return None
    if isinstance(column.type, JSON):
        return plain_json(json.loads(value))
    if isinstance(column.type, LargeBinary):
        return _of(bytes, value)
    if isinstance(column.type, Boolean):
        return bool(_of(int, value))
    if isinstance(column.type, Integer):
        return _of(int, value)
    if isinstance(column.type, Float):
        return float(_of(float, value) if not isinstance(value, int) else value)
    text = _text(value)
    if isinstance(column.type, DateTime) or "DateTime" in type(column.type).__name__:
        return datetime.fromisoformat(text).replace(tzinfo=UTC)
    return text


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} where {kind.__name__} was")
    return value


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else _of(str, value)
