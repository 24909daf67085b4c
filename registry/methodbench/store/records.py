"""Records as plain data: one run with all that belongs to it, its seal, and its way into the database.

The rows that belong to a run are those of every table with a ``run_id``; a table that comes with a later schema is
sealed, exported and imported without a change here.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, Boolean, Column, Connection, Float, Integer, LargeBinary, String, Table, select
from sqlmodel import AutoString, SQLModel

from methodbench.provenance import canonical_json
from methodbench.store.schema import Environment, Run

RUN: Table = Run.__table__  # type: ignore[attr-defined]
ENVIRONMENT: Table = Environment.__table__  # type: ignore[attr-defined]
#: Tables of what belongs to a run.
CHILDREN: tuple[Table, ...] = tuple(table for table in SQLModel.metadata.sorted_tables if "run_id" in table.c)

#: Columns that say where a record stands in one database, not what it says.
_LOCAL = frozenset({"id", "run_id", "seal", "witness_of"})


def portions(keys: Iterable[str]) -> Iterator[list[str]]:
    """Yield keys, each once, by as many as one statement takes."""
    ordered = list(dict.fromkeys(keys))
    for start in range(0, len(ordered), 500):
        yield ordered[start : start + 500]


@dataclass(slots=True)
class Record:
    """One run and the rows that belong to it, as values by column."""

    run: dict[str, Any]
    children: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Rows by name of their table."""


def links(table: Table) -> list[str]:
    """Return the columns that point to a run other than the row's own."""
    return [
        column.name
        for column in table.c
        if column.name != "run_id" and any(key.column is RUN.c.id for key in column.foreign_keys)
    ]


#: Tables whose rows are part of what a run says; a row that points to another run says something about two.
SEALED: tuple[Table, ...] = tuple(table for table in CHILDREN if not links(table))


def row_of(model: SQLModel) -> dict[str, Any]:
    """Return the values of a table's object by column, in the form that every database keeps."""
    table: Table = model.__table__  # type: ignore[attr-defined]
    return {column.name: clean(column, getattr(model, column.name)) for column in table.c}


def clean(column: Column, value: Any) -> Any:
    """Return ``value`` as it comes back from any database: no NUL in text, no NaN, times in UTC."""
    if isinstance(column.type, JSON):
        return plain_json(value)
    if isinstance(value, str):
        if "\0" in value:
            value = value.replace("\0", "�")
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, float) and math.isnan(value) and isinstance(column.type, Float):
        return None
    if isinstance(value, datetime):
        return value.astimezone(UTC)
    return value


def plain_json(value: Any) -> Any:
    """Return ``value`` as JSON keeps it; numbers that JSON has no form for become their names."""
    return json.loads(json.dumps(value), parse_constant=_NAMES.__getitem__)


#: Types whose values SQLite's driver takes without conversion.
_AS_IT_IS = (String, Float, Integer, Boolean, LargeBinary, AutoString)

#: What Python's JSON calls the numbers that JSON has no form for, and what they are kept as.
_NAMES = {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}


def seal(record: Record) -> str:
    """Return the digest of what a record says.

    Identifiers are left out, so that a record has the same seal in every database; empty values are left out too, so
    that a column that a later schema adds does not break the seals of older records.
    """
    rows = {
        table.name: sorted(
            (_sealed(table, row) for row in record.children.get(table.name, [])), key=canonical_json
        )
        for table in SEALED
        if record.children.get(table.name)
    }
    content = {"run": _sealed(RUN, record.run), **rows}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def _sealed(table: Table, row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        column.name: portable(row[column.name])
        for column in table.c
        if column.name not in _LOCAL and row[column.name] not in (None, "", b"", {}, [])
    }


def portable(value: Any) -> Any:
    """Return a column's value in the form that a seal covers."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write(connection: Connection, records: Iterable[Record]) -> None:
    """Insert records, a table at a time."""
    runs: list[dict[str, Any]] = []
    children: dict[str, list[dict[str, Any]]] = {table.name: [] for table in CHILDREN}
    for record in records:
        runs.append(record.run)
        for name, rows in record.children.items():
            children[name] += rows
    for table, rows in ((RUN, runs), *((table, children[table.name]) for table in CHILDREN)):
        insert(connection, table, rows)


def insert(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
    """Insert rows of one table, in the form that :func:`row_of` gives."""
    if not rows:
        return
    names = list(rows[0])
    plain = all(isinstance(table.c[name].type, _AS_IT_IS) for name in names)
    if not plain or connection.dialect.name != "sqlite":
        connection.execute(table.insert(), rows)
        return
    # The driver takes these values as they are; looking at each of them is most of what an insertion costs.
    columns = ", ".join(f'"{name}"' for name in names)
    statement = f'INSERT INTO "{table.name}" ({columns}) VALUES ({", ".join("?" * len(names))})'
    values = operator.itemgetter(*names)
    connection.exec_driver_sql(statement, [values(row) for row in rows])


def read(connection: Connection, where: Any = None, *, batch: int = 500) -> Iterator[Record]:
    """Yield records in order of their seal-independent place: start, then id.

    Args:
        where: condition on the table of runs; all by default.
        batch: how many runs are held at a time.
    """
    query = select(RUN.c.id).order_by(RUN.c.started_at, RUN.c.id)
    identifiers = list(connection.scalars(query if where is None else query.where(where)))
    for start in range(0, len(identifiers), batch):
        some = identifiers[start : start + batch]
        rows = connection.execute(select(RUN).where(RUN.c.id.in_(some))).mappings()
        found = {row["id"]: Record(dict(row)) for row in rows}
        for table in CHILDREN:
            children = select(table).where(table.c.run_id.in_(some)).order_by(*table.primary_key.columns)
            for row in connection.execute(children).mappings():
                found[row["run_id"]].children.setdefault(table.name, []).append(dict(row))
        yield from (found[identifier] for identifier in some if identifier in found)
