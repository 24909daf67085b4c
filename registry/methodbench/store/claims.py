"""Claims: several drivers on one database share its cells and neither lose nor repeat any.

A driver takes a cell right before it runs it, in one transaction that also looks whether somebody has recorded it in
the meantime. Its record and the end of its claim are one transaction too. A driver that lives counts its ``beats`` up;
others take its cells over when its process is gone (same machine) or its count has not moved for a while by their own
clock. Nobody compares the clocks of two machines, and a clock that is set back changes nothing. A driver that was
taken for dead and comes back finds its claim gone, and keeps its record only if no other was made.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from sqlalchemy import Table, delete, exists, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session, col, select

from methodbench.errors import StoreError
from methodbench.store.records import portions
from methodbench.store.schema import Claim, Driver, Run

if TYPE_CHECKING:
    from methodbench.store.database import Store

#: Seconds between two beats.
BEAT_SECONDS = 5.0
#: Seconds without a beat after which a driver counts as dead.
LEASE_SECONDS = 60.0

_CLAIM: Table = Claim.__table__  # type: ignore[attr-defined]


@dataclass(slots=True)
class Taken:
    """What came of asking for cells."""

    mine: set[str] = field(default_factory=set)
    done: dict[str, Run] = field(default_factory=dict)
    """Recorded since the caller looked."""
    held: dict[str, Driver] = field(default_factory=dict)
    """Taken by another driver."""


class Lease:
    """The presence of one driver in the database. Use as a context manager; leaving it gives all claims back."""

    def __init__(self, store: Store, known: Mapping[str, str]) -> None:
        """
        Args:
            known: newest record of each cell that the driver has seen, by cell key: id, or an empty string for none.
        """
        self.store = store
        self.known = dict(known)
        self.id = uuid.uuid4().hex[:12]
        self._seen: dict[str, tuple[int, float]] = {}
        """Beats of other drivers, and when by this process's clock they last changed."""
        self._stop = threading.Event()
        self._beat = threading.Thread(target=self._keep_beating, name="methodbench-lease", daemon=True)

    def __enter__(self) -> Lease:
        with self.store.writing() as session:
            self._register(session)
            session.commit()
        self._beat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._beat.join(timeout=BEAT_SECONDS)
        # A database that cannot be written keeps the claims; they end with this process.
        with contextlib.suppress(StoreError), self.store.writing() as session:
            session.exec(delete(Claim).where(col(Claim.driver_id) == self.id))
            session.exec(delete(Driver).where(col(Driver.id) == self.id))
            session.commit()
        # One that died between two cells held nothing, and nobody met it.
        with contextlib.suppress(StoreError):
            self.bury(self.dead())

    def take(self, keys: Iterable[str]) -> Taken:
        """Claim cells. Those that are done or another's are left alone."""
        wanted = list(dict.fromkeys(keys))
        taken = Taken()
        with self.store.writing() as session:
            self._register(session)
            pending: Collection[str] = wanted
            # What stood in the way of a claim may be gone right after, where several transactions write at a time.
            while pending:
                self._claim(session, pending)
                holders = self._holders(session, pending)
                taken.mine |= {key for key, driver in holders.items() if driver.id == self.id}
                taken.held |= {key: driver for key, driver in holders.items() if driver.id != self.id}
                pending = [key for key in pending if key not in holders]
            newest = self.store.latest(taken.mine, session)
            taken.done = {key: run for key, run in newest.items() if run.id != self.known.get(key, "")}
            taken.mine -= taken.done.keys()
            self._drop(session, taken.done)
            session.commit()
        self.known |= {key: run.id for key, run in taken.done.items()}
        return taken

    def look(self, keys: Iterable[str]) -> Taken:
        """Say what became of cells that others had taken, without claiming any: ``mine`` are those that are free."""
        wanted = list(dict.fromkeys(keys))
        found = Taken()
        with self.store.reading() as session:
            # Claims first: a cell that is in neither was given back.
            found.held = self._holders(session, wanted)
        newest = self.store.latest(key for key in wanted if key not in found.held)
        found.done = {key: run for key, run in newest.items() if run.id != self.known.get(key, "")}
        found.mine = set(wanted) - found.held.keys() - found.done.keys()
        self.known |= {key: run.id for key, run in found.done.items()}
        return found

    def give_back(self, keys: Collection[str]) -> None:
        """End claims without a record."""
        with self.store.writing() as session:
            self._drop(session, keys)
            session.commit()

    def settle(self, session: Session, cell_keys: Collection[str]) -> dict[str, Run]:
        """End the claims on cells inside the transaction that records them.

        Returns:
            By cell key, the records that another driver has made after it had taken this one for dead; for every
            other cell the caller's record is the one that counts.
        """
        lost = set(cell_keys)
        for some in portions(cell_keys):
            mine = delete(Claim).where(col(Claim.driver_id) == self.id, col(Claim.cell_key).in_(some))
            lost -= set(session.exec(mine.returning(col(Claim.cell_key))).scalars())
        if not lost:
            return {}
        # A claim of one's own, or the wait for the holder's transaction: nobody else records these cells meanwhile.
        self._register(session)
        self._claim(session, lost)
        for some in portions(lost):
            session.exec(select(Claim.cell_key).where(col(Claim.cell_key).in_(some)).with_for_update()).all()
        newest = self.store.latest(lost, session)
        others = {key: run for key, run in newest.items() if run.id != self.known.get(key, "")}
        self._drop(session, others)
        # Whoever has taken over the rest is still at work: these records come first.
        for some in portions(lost - others.keys()):
            session.exec(delete(Claim).where(col(Claim.cell_key).in_(some)))
        return others

    def dead(self) -> list[Driver]:
        """Return the drivers of this machine that have died."""
        with self.store.reading() as session:
            return [driver for driver in session.exec(select(Driver)) if self._is_dead(driver)]

    def bury(self, drivers: Iterable[Driver]) -> bool:
        """Remove those of ``drivers`` that are dead, with their claims; return whether there was any."""
        buried = False
        for driver in {driver.id: driver for driver in drivers}.values():
            if not self._is_dead(driver):
                continue
            with self.store.writing() as session:
                same = (col(Driver.id) == driver.id, col(Driver.beats) == driver.beats)
                alive = exists().where(*same)
                session.exec(delete(Claim).where(col(Claim.driver_id) == driver.id, alive))
                if session.exec(delete(Driver).where(*same)).rowcount:
                    session.commit()
                    buried = True
        return buried

    def _is_dead(self, driver: Driver) -> bool:
        if driver.id == self.id:
            return False
        if driver.place == place():
            return not _runs(driver.pid, driver.process_started)
        beats, since = self._seen.get(driver.id, (-1, 0.0))
        now = time.monotonic()
        if driver.beats != beats:
            self._seen[driver.id] = (driver.beats, now)
            return False
        return now - since > LEASE_SECONDS

    def _claim(self, session: Session, keys: Iterable[str]) -> None:
        """Claim what nobody holds, in one order for all drivers, so that no two wait for each other."""
        now = datetime.now(UTC)
        rows = [{"cell_key": key, "driver_id": self.id, "claimed_at": now} for key in sorted(keys)]
        session.connection().execute(self._insert(_CLAIM).on_conflict_do_nothing(), rows)

    def _holders(self, session: Session, keys: Collection[str]) -> dict[str, Driver]:
        """Return who holds each of the cells that are claimed."""
        found: dict[str, Driver] = {}
        for some in portions(keys):
            query = select(Claim.cell_key, Driver).join(Driver, col(Driver.id) == Claim.driver_id)
            found |= dict(session.exec(query.where(col(Claim.cell_key).in_(some))).all())
        return found

    def _drop(self, session: Session, keys: Collection[str]) -> None:
        for some in portions(keys):
            mine = delete(Claim).where(col(Claim.driver_id) == self.id, col(Claim.cell_key).in_(some))
            session.exec(mine)

    def _register(self, session: Session) -> None:
        """Put this driver's row where it is missing: others may have taken it for dead."""
        row = Driver(
            id=self.id,
            host=socket.gethostname(),
            place=place(),
            pid=os.getpid(),
            process_started=_process_started(os.getpid()),
            started_at=datetime.now(UTC),
        )
        session.exec(self._insert(Driver).values(**row.model_dump()).on_conflict_do_nothing())

    def _insert(self, table: Any) -> Any:
        dialect = postgresql if self.store.engine.dialect.name == "postgresql" else sqlite
        return dialect.insert(table)

    def _keep_beating(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            # A beat that cannot be written is not missed: the next one tells the same. Whatever was in the way, this
            # goes on: a driver that stops counting is taken for dead.
            with contextlib.suppress(Exception), self.store.writing() as session:
                beat = update(Driver).where(col(Driver.id) == self.id).values(beats=col(Driver.beats) + 1)
                session.exec(beat)
                session.commit()


def runs_here(driver: Driver) -> bool:
    """Return whether a driver is a living process of this machine."""
    return driver.place == place() and _runs(driver.pid, driver.process_started)


def place() -> str:
    """Return what makes a process id unique: machine, boot and process namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _runs(pid: int, started: float) -> bool:
    try:
        return _process_started(pid) == started and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _process_started(pid: int) -> float:
    """Return when a process began: ticks since boot on Linux, which no change of the clock moves."""
    try:
        return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return psutil.Process(pid).create_time()
