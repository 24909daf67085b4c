"""Bringing records of elsewhere into a database. Doing it twice changes nothing; what disagrees stays side by side."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import JSON, select, update
from sqlmodel import Session

from methodbench.errors import CapsuleError
from methodbench.store import records
from methodbench.store.capsule import Content, Refused, check_record
from methodbench.store.database import Store, open_store
from methodbench.store.location import default_url
from methodbench.store.opening import connect_read_only, translated
from methodbench.store.records import CHILDREN, RUN, Record


@dataclass(slots=True)
class Merged:
    """What came of bringing in records."""

    new: list[str] = field(default_factory=list)
    """Identifiers of runs that count as results here."""
    known: int = 0
    """Records that were here already."""
    agreeing: list[str] = field(default_factory=list)
    """Runs of cells that have a result here, with the same scores to the last bit: kept as witnesses."""
    disagreeing: list[str] = field(default_factory=list)
    """Runs of cells that have a result here, with other scores: kept as witnesses beside it."""


def merge(store: Store, content: Content) -> Merged:
    """Put records into a database, all of them or, on an error, none.

    A record is known by its seal. A cell that has a result here keeps it; a second one becomes its witness. A run whose
    identifier is another run's here gets a new one, made from its seal.
    """
    merged = Merged()
    with store.writing() as session:
        seal_unsealed(session)
        _put_environments(store, session, content.environments)
        renamed: dict[str, str] = {}
        # A witness comes after what it repeats.
        for record in sorted(content.records, key=_order):
            _put(session, record, renamed, merged)
        session.commit()
    return merged


def _order(record: Record) -> tuple[Any, ...]:
    return record.run["witness_of"] is not None, record.run["started_at"], record.run["seal"]


def _put(session: Session, record: Record, renamed: dict[str, str], merged: Merged) -> None:
    connection = session.connection()
    run = dict(record.run)
    identifier = run["id"]
    same = connection.execute(
        select(RUN.c.id).where(RUN.c.seal == run["seal"]).order_by(RUN.c.id).limit(1)
    ).scalar()
    if same is not None:
        renamed[identifier] = same
        merged.known += 1
        return
    while connection.execute(select(RUN.c.id).where(RUN.c.id == run["id"])).scalar() is not None:
        run["id"] = (
            run["seal"][:12] if run["id"] == identifier else f"{int(run['id'], 16) + 1 & 0xFFFFFFFFFFFF:012x}"
        )
    renamed[identifier] = run["id"]
    put = Record(run)
    for table in CHILDREN:
        for row in record.children.get(table.name, []):
            moved = {**row, "run_id": run["id"]}
            for link in records.links(table):
                moved[link] = renamed[row[link]]
            put.children.setdefault(table.name, []).append(moved)
    if run["witness_of"] is not None:
        original = renamed[run["witness_of"]]
        # What it repeats may be a witness of a result that was here.
        root = connection.execute(select(RUN.c.witness_of).where(RUN.c.id == original)).scalar()
        run["witness_of"] = root or original
        merged.agreeing.append(run["id"])
    else:
        _find_place(session, put, merged)
    records.write(connection, [put])


def _find_place(session: Session, record: Record, merged: Merged) -> None:
    """Make a record the witness of the result that its cell has, or let it be the result."""
    run = record.run
    own = (RUN.c.cell_key == run["cell_key"]) & RUN.c.witness_of.is_(None) & (RUN.c.status == "ok")
    first = next(records.read(session.connection(), own), None) if run["status"] == "ok" else None
    if first is None:
        merged.new.append(run["id"])
        return
    run["witness_of"] = first.run["id"]
    differences = _differences(first, record)
    (merged.disagreeing if differences else merged.agreeing).append(run["id"])
    record.children["witness"] = [
        {
            "run_id": run["id"],
            "original": first.run["id"],
            "verdict": "drifted" if differences else "bit-identical",
            "tolerance": 0.0,
            "parts_at": "",
            "differences": differences,
            "suspects": [],
        }
    ]


def _differences(recorded: Record, other: Record) -> list[dict[str, Any]]:
    """Return the metrics whose scores are not the same to the last bit."""
    before = {row["name"]: row for row in recorded.children.get("metric", [])}
    after = {row["name"]: row for row in other.children.get("metric", [])}
    found = []
    for name in sorted(before.keys() | after.keys()):
        one, two = before.get(name), after.get(name)
        if one is not None and two is not None and one["scores"] == two["scores"]:
            continue
        scores = [np.frombuffer(row["scores"], "<f8") if row else np.empty(0) for row in (one, two)]
        common = min(len(array) for array in scores)
        unequal = int((scores[0][:common].view("<i8") != scores[1][:common].view("<i8")).sum())
        found.append(
            {
                "metric": name,
                "first": records.portable(one["value"]) if one else None,
                "second": records.portable(two["value"]) if two else None,
                "units": unequal + abs(len(scores[0]) - len(scores[1])),
                "of": max(map(len, scores)),
            }
        )
    return found


def _put_environments(store: Store, session: Session, rows: Iterable[dict[str, Any]]) -> None:
    rows = list(rows)
    store.put_environments(session, rows)
    table = records.ENVIRONMENT
    for row in rows:
        # The earliest sight of an environment, whatever the order of merging.
        later = (table.c.digest == row["digest"]) & (table.c.captured_at > row["captured_at"])
        session.connection().execute(update(table).where(later).values(captured_at=row["captured_at"]))


def seal_unsealed(session: Session) -> int:
    """Seal the records that were written before there were seals; return how many."""
    connection = session.connection()
    count = 0
    for record in list(records.read(connection, RUN.c.seal == "")):
        tidied = _tidied(record)
        tidied["seal"] = records.seal(record)
        connection.execute(update(RUN).where(RUN.c.id == record.run["id"]).values(**tidied))
        count += 1
    return count


def _tidied(record: Record) -> dict[str, Any]:
    """Let the names of infinities and NaN stand in the JSON of a record of the first schema; return those values."""
    tidied = {
        column.name: records.plain_json(record.run[column.name])
        for column in RUN.c
        if isinstance(column.type, JSON)
    }
    record.run.update(tidied)
    return tidied


def content_of(store: Store, where: Any = None) -> Content:
    """Read records and their environments from a database, with the runs that they are witnesses of.

    Args:
        where: condition on the table of runs; all by default.
    """
    with store.reading() as session:
        connection = session.connection()
        found = list(records.read(connection, where))
        here = {record.run["id"] for record in found}
        missing = {record.run["witness_of"] for record in found} - here - {None}
        while missing:
            more = list(records.read(connection, RUN.c.id.in_(missing)))
            found += more
            here |= {record.run["id"] for record in more}
            missing = {record.run["witness_of"] for record in more} - here - {None}
        for record in found:
            if not record.run["seal"]:
                _tidied(record)
                record.run["seal"] = records.seal(record)
            for table in CHILDREN:
                if record.children.get(table.name) and (links := records.links(table)):
                    rows = record.children[table.name]
                    record.children[table.name] = [
                        row for row in rows if all(row[link] in here for link in links)
                    ]
        digests = {record.run["environment_digest"] for record in found}
        every = connection.execute(select(records.ENVIRONMENT)).mappings()
        environments = [dict(row) for row in every if row["digest"] in digests]
    return Content(found, environments)


def content_of_database(url: str) -> Content:
    """Read and check the records of another database, which is left as it is.

    Raises:
        StoreError: it cannot be read.
        CapsuleError: its records are not what their seals and digests say.
    """
    with _copy(url) as where, open_store(where, create=False) as other:
        content = content_of(other)
    digests = {row["digest"] for row in content.environments}
    identifiers = {record.run["id"] for record in content.records}
    for record in content.records:
        try:
            check_record(record, digests, identifiers)
        except Refused as error:
            raise CapsuleError(f"{url}: {error}") from error
    return content


@contextlib.contextmanager
def _copy(url: str) -> Iterator[str]:
    """Copy an SQLite file, so that a schema of an older version is brought up to date elsewhere."""
    path = Path(url)
    if "://" in url or not path.is_file():
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="methodbench-") as folder:
        target = Path(folder) / path.name
        with translated(url):
            source = connect_read_only(path)
            copy = sqlite3.connect(target)
            try:
                source.backup(copy)
            finally:
                copy.close()
                source.close()
        yield str(target)


def is_same_database(url: str, db: str | None) -> bool:
    """Return whether both name one SQLite file."""
    paths = [Path(name) for name in (url, db or default_url())]
    return all(path.exists() for path in paths) and paths[0].samefile(paths[1])
