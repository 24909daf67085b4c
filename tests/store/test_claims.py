"""Several drivers on one database: they share its cells, and neither lose nor repeat any."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import Session, col, delete

from methodbench.store import Claim, Driver, Environment, Finished, Run, Store, claims, open_store
from methodbench.store.claims import Lease

START = datetime(2026, 1, 1, tzinfo=UTC)
ENVIRONMENT = Environment(digest="e", captured_at=START, data={})


def make_run(identifier: str, cell: str, status: str = "ok", started: datetime = START) -> Run:
    return Run(
        id=identifier, cell_key=cell, identity={}, status=status, method="m", kind="probe", family="f",
        params_passed={}, params={}, task="t", task_params={}, protocol=1, environment_digest="e", started_at=started,
    )  # fmt: skip


def count(store: Store, table: type) -> int:
    from sqlmodel import select

    with store.reading() as session:
        return len(session.exec(select(table)).all())


def rival(store: Store, **fields: object) -> Driver:
    """The row of a driver on another machine."""
    values = {
        "id": "rival",
        "host": "far",
        "place": "far away",
        "pid": 1,
        "process_started": 1.0,
        "started_at": START,
    }
    driver = Driver(**{**values, **fields})
    with store.writing() as session:
        session.add(driver)
        session.flush()
        session.add(Claim(cell_key="a", driver_id=driver.id, claimed_at=START))
        session.commit()
    return driver


def test_two_runs_at_once_share_the_grid(
    command: Callable[..., subprocess.CompletedProcess[str]], grid: Callable[[int], Path], tmp_path: Path
) -> None:
    line = [
        sys.executable,
        "-m",
        "methodbench.cli",
        "run",
        str(grid(40)),
        "--db",
        "shared.db",
        "--json",
        "--cores",
        "1",
    ]
    drivers = [
        subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        for _ in range(2)
    ]
    answers = []
    for driver in drivers:
        out, err = driver.communicate(timeout=300)
        assert driver.returncode == 0, err
        answers.append(json.loads(out))
    with open_store(str(tmp_path / "shared.db")) as store:
        recorded = Counter(run.cell_key for run in store.runs())
        assert len(recorded) == 40
        assert set(recorded.values()) == {1}
        assert len(store.metrics()) == 80
        assert count(store, Claim) == count(store, Driver) == 0
    # Each knows every result, whoever made it, and both did a part.
    assert [len(answer["runs"]) for answer in answers] == [40, 40]
    assert sum(answer["new"] for answer in answers) == 40
    assert all(answer["new"] > 0 for answer in answers)


def test_a_killed_driver_leaves_its_cells_to_the_next_at_once(
    command: Callable[..., subprocess.CompletedProcess[str]], grid: Callable[[int], Path], tmp_path: Path
) -> None:
    db = tmp_path / "shared.db"
    line = [sys.executable, "-m", "methodbench.cli", "run", str(grid(30)), "--db", str(db), "--cores", "1"]
    driver = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert driver.stdout is not None
    for line_number, _ in enumerate(driver.stdout):
        if line_number == 5:
            break
    driver.kill()
    driver.wait()
    with open_store(str(db)) as store:
        done = len(store.runs())
        assert 0 < done < 30
        assert count(store, Driver) == 1
    start = time.monotonic()
    answer = json.loads(command("run", str(grid(30)), "--db", str(db), "--json").stdout)
    assert answer["new"] == 30 - done
    assert time.monotonic() - start < claims.LEASE_SECONDS
    with open_store(str(db)) as store:
        assert set(Counter(run.cell_key for run in store.runs()).values()) == {1}
        assert count(store, Claim) == count(store, Driver) == 0


def test_a_cell_is_taken_once(store: Store) -> None:
    with Lease(store, {}) as one, Lease(store, {}) as two:
        first, second = one.take(["a", "b"]), two.take(["b", "c"])
        assert (first.mine, second.mine) == ({"a", "b"}, {"c"})
        assert second.held["b"].id == one.id
        one.give_back(["b"])
        assert two.take(["b"]).mine == {"b"}
    assert count(store, Claim) == count(store, Driver) == 0


def test_many_threads_take_each_cell_once(store: Store) -> None:
    keys = [f"cell{index}" for index in range(60)]
    taken: list[str] = []

    def work() -> None:
        with Lease(store, {}) as lease:
            for key in keys:
                mine = lease.take([key]).mine
                taken.extend(mine)
                for cell in mine:
                    store.add(make_run(f"{cell}-{lease.id}", cell), environment=ENVIRONMENT, lease=lease)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(keys)
    assert len(store.runs()) == len(keys)


def test_a_cell_that_was_recorded_since_the_plan_was_made_is_not_taken(store: Store) -> None:
    store.add(make_run("1", "a", "failed"), environment=ENVIRONMENT)
    with Lease(store, {"a": "1", "b": ""}) as lease:
        assert lease.take(["a"]).mine == {"a"}, "its failure is what the plan wants to retry"
        lease.give_back(["a"])
        store.add(make_run("2", "a", "failed", START + timedelta(1)))
        store.add(make_run("3", "b"))
        taken = lease.take(["a", "b"])
        assert taken.mine == set()
        assert {key: run.id for key, run in taken.done.items()} == {"a": "2", "b": "3"}
    assert count(store, Claim) == 0


def test_a_driver_far_away_is_dead_when_it_stops_counting(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: clock[0])
    rival(store)

    def tick(beats: int) -> None:
        with store.writing() as session:
            session.merge(Driver(**{**session.get(Driver, "rival").model_dump(), "beats": beats}))
            session.commit()

    with Lease(store, {}) as lease:
        for beats in range(3):
            tick(beats)
            clock[0] += claims.LEASE_SECONDS * 0.9
            held = lease.take(["a"]).held
            assert not lease.bury(held.values())
        clock[0] += claims.LEASE_SECONDS * 0.9
        assert not lease.bury(lease.take(["a"]).held.values())
        clock[0] += claims.LEASE_SECONDS * 0.2
        assert lease.bury(lease.take(["a"]).held.values())
        assert lease.take(["a"]).mine == {"a"}


def test_a_beat_between_the_look_and_the_funeral_saves_a_driver(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    rival(store)
    with Lease(store, {}) as lease:
        monkeypatch.setattr(lease, "_is_dead", lambda driver: True)
        seen = list(lease.take(["a"]).held.values())
        with store.writing() as session:
            session.get(Driver, "rival").beats += 1
            session.commit()
        assert not lease.bury(seen)
        assert lease.take(["a"]).held["a"].id == "rival"


def test_a_process_of_this_machine_that_has_the_number_of_a_dead_driver_is_not_taken_for_it(
    store: Store,
) -> None:
    import os

    rival(store, place=claims.place(), pid=os.getpid(), process_started=0.0)
    with Lease(store, {}) as lease:
        assert lease.bury(lease.take(["a"]).held.values())
        assert lease.take(["a"]).mine == {"a"}


def test_a_living_driver_of_this_machine_is_never_buried(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "LEASE_SECONDS", -1.0)
    with Lease(store, {}) as one, Lease(store, {}) as two:
        one.take(["a"])
        held = two.take(["a"]).held
        assert not two.bury(held.values())
        assert not two.bury(held.values())


def test_of_two_that_ran_a_cell_the_first_record_counts(store: Store) -> None:
    """A driver that was taken for dead comes back: whoever is first with a record wins, and there is one."""
    with Lease(store, {}) as sleeper, Lease(store, {}) as heir:
        for cell, first in (("a", "heir"), ("b", "sleeper")):
            sleeper.take([cell])
            with store.writing() as session:
                session.delete(session.get(Claim, cell))
                session.commit()
            assert heir.take([cell]).mine == {cell}
            order = [(heir, "heir"), (sleeper, "sleeper")]
            if first == "sleeper":
                order.reverse()
            kept = [
                store.add(make_run(f"{name}-{cell}", cell), environment=ENVIRONMENT, lease=lease).id
                for lease, name in order
            ]
            assert kept == [f"{first}-{cell}"] * 2
    assert sorted(run.id for run in store.runs()) == ["heir-a", "sleeper-b"]


def test_records_written_together_settle_each_claim_by_itself(store: Store) -> None:
    """One was taken over and recorded, one was taken over and still runs, one is held: all in one transaction."""
    with Lease(store, {}) as sleeper, Lease(store, {}) as heir:
        sleeper.take(["a", "b", "c"])
        with store.writing() as session:
            for cell in "ab":
                session.delete(session.get(Claim, cell))
            session.commit()
        assert heir.take(["a", "b"]).mine == {"a", "b"}
        store.add(make_run("heir-a", "a"), environment=ENVIRONMENT, lease=heir)
        finished = [Finished(make_run(f"sleeper-{cell}", cell), environment=ENVIRONMENT) for cell in "abc"]
        kept = store.add_finished(finished, lease=sleeper)
        assert [run.id for run in kept] == ["heir-a", "sleeper-b", "sleeper-c"]
        assert store.add(make_run("heir-b", "b"), lease=heir).id == "sleeper-b"
        assert count(store, Claim) == 0
    assert sorted(run.id for run in store.runs()) == ["heir-a", "sleeper-b", "sleeper-c"]


def test_a_claim_that_ends_while_it_is_in_the_way_leaves_the_cell_free(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where several transactions write at a time, the rival's claim may be gone when one looks whose it was."""
    driver = rival(store)
    with Lease(store, {}) as lease:
        look = Lease._holders

        def gone(self: Lease, session: Session, keys: Collection[str]) -> dict[str, Driver]:
            session.exec(delete(Claim).where(col(Claim.driver_id) == driver.id))
            return look(self, session, keys)

        monkeypatch.setattr(Lease, "_holders", gone)
        assert lease.take(["a", "b"]).mine == {"a", "b"}


def test_heartbeats_outlive_what_goes_wrong_with_one_of_them(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.02)
    write, failed = Store.writing, []

    def fail(self: Store) -> Any:
        if threading.current_thread().name == "methodbench-lease" and len(failed) < 3:
            failed.append(1)
            raise RuntimeError("the pool of connections is exhausted")
        return write(self)

    monkeypatch.setattr(Store, "writing", fail)
    with Lease(store, {}) as lease:
        deadline = time.monotonic() + 30
        beats = 0
        while beats < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
            with store.reading() as session:
                beats = session.get(Driver, lease.id).beats
    assert beats >= 2
    assert len(failed) == 3


def test_heartbeats_count_up_and_stop_with_the_driver(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.02)
    with Lease(store, {}) as lease:
        deadline = time.monotonic() + 30
        beats = 0
        while beats < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
            with store.reading() as session:
                beats = session.get(Driver, lease.id).beats
        assert beats >= 3
    assert not lease._beat.is_alive()
    assert count(store, Driver) == 0


def test_a_clock_that_was_set_back_does_not_hide_a_newer_record(store: Store) -> None:
    store.add(make_run("1", "a", "failed", START), environment=ENVIRONMENT)
    with Lease(store, {"a": "1"}) as lease:
        lease.take(["a"])
        store.add(make_run("2", "a", "timeout", START - timedelta(days=400)), lease=lease)
    newest = store.latest(["a"])["a"]
    assert newest.id == "2"
    assert newest.started_at > START
    assert "the clock was set back: it said 2024-11-27" in newest.warnings[0]
