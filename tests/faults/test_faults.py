"""Injected faults, a table: nothing reported is lost, a rerun completes the plan, nothing runs twice."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from methodbench.errors import StoreError
from methodbench.store import open_store

Wait = Callable[..., None]

#: Fault of one cell: how it misbehaves, its limit in seconds, the status of its record, a part of the reason.
CELL_FAULTS: dict[str, tuple[float, str, str]] = {
    "kill": (60, "failed", "killed by SIGKILL"),
    "segfault": (60, "failed", "killed by SIGSEGV"),
    "exit": (60, "failed", "exit code 3"),
    "raise": (60, "failed", "the toy broke"),
    "memory": (60, "oom", "no room"),
    "hog": (60, "oom", "more than the limit"),
    "hog-family": (60, "oom", "more than the limit"),
    "hang": (1, "timeout", "took more than 1 s"),
    "hang-hard": (1, "timeout", "took more than 1 s"),
    "kill-server": (60, "failed", "the fork server died (SIGKILL)"),
    "diverge": (60, "failed", "diverged"),
}


@pytest.mark.slow
def test_every_fault_of_a_cell_stays_in_that_cell(bench: Any) -> None:
    """One grid that holds every fault of the table, beside cells that behave."""
    plan = bench.noops(10, seconds=0.01)
    for how, (limit, _, _) in CELL_FAULTS.items():
        bad = bench.plan({"name": "misbehave", "params": {"how": how}}, timeout=limit)
        plan.cells[5:5] = bad.cells
    report = bench.run(plan, memory_limit=900 * 2**20)
    bench.check()
    ends = {run.params["how"]: run for run in report.runs.values() if run.method == "misbehave"}
    for how, (_, status, reason) in CELL_FAULTS.items():
        assert ends[how].status == status, ends[how].reason
        assert reason in ends[how].reason
    assert sum(run.status == "ok" for run in report.runs.values()) == 10
    assert set(bench.executions().values()) == {1}
    # Failures are results: nothing is run again unasked.
    assert bench.run(plan).new == []


def _part(driver: int, name: str) -> list[psutil.Process]:
    """Return the processes of a running driver that play one part: driver, server or worker."""
    try:
        process = psutil.Process(driver)
        servers = process.children()
        workers = [worker for server in servers for worker in server.children()]
    except psutil.NoSuchProcess:
        return []
    return {"driver": [process] if servers else [], "server": servers, "worker": workers}[name]


def _ended(driver: int) -> bool:
    return psutil.Process(driver).status() == psutil.STATUS_ZOMBIE


def _ready(driver: int, victim: str) -> bool:
    return _ended(driver) or bool(_part(driver, "worker" if victim == "server" else victim))


def _killed(process: psutil.Process) -> bool:
    """Kill a process; False when it had ended by itself."""
    try:
        alive = process.status() != psutil.STATUS_ZOMBIE
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return alive


@pytest.mark.slow
def test_fifty_kills_of_workers_servers_and_drivers_over_one_grid(bench: Any, wait_for: Wait) -> None:
    """SIGKILL at seeded instants, the victims in seeded order; the driver is started again when it was one."""
    rng = random.Random(20)
    victims = ["worker"] * 24 + ["server"] * 14 + ["driver"] * 12
    rng.shuffle(victims)
    cells = 1200
    plan = bench.noops(cells, seconds=0.03)
    driver = bench.start(plan, retry=True)
    for victim in victims:
        while True:
            # The instant counts from when there is such a process; a server is killed while it has a worker.
            wait_for(partial(_ready, driver, victim))
            time.sleep(rng.uniform(0.0, 0.2))
            pool = _part(driver, victim)
            if pool and _killed(rng.choice(pool)):
                break
            if _ended(driver):
                # It gives up when servers die three times before any cell is done.
                bench.wait(driver)
                driver = bench.start(plan, retry=True)
        if victim == "driver":
            assert bench.wait(driver) == -signal.SIGKILL
            bench.check()
            driver = bench.start(plan, retry=True)
    bench.kill_driver(driver)
    bench.check()
    before = bench.executions()
    # A driver that is killed between the transaction and the report has recorded a cell that it never reported.
    with open_store(str(bench.db)) as store:
        done = sum(run.status == "ok" for run in store.runs())
    assert sum(status == "ok" for status in bench.reported().values()) <= done < cells
    report = bench.finish(plan, batch=50)
    assert len(report.runs) == cells
    # Only cells without a result were started again.
    assert sum((bench.executions() - before).values()) == cells - done


@pytest.mark.slow
def test_a_driver_that_is_stopped_with_sigterm_leaves_nothing_running(bench: Any, wait_for: Wait) -> None:
    from methodbench.engine.processes import terminate_like_interrupt

    plan = bench.noops(60)
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            with terminate_like_interrupt():
                bench.run(plan)
        except KeyboardInterrupt:
            code = 130
        finally:
            os._exit(code)
    wait_for(lambda: len(bench.reported()) >= 3)
    family = psutil.Process(pid).children(recursive=True)
    os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
    bench.check()
    bench.finish(plan)
    assert max(bench.executions().values()) <= 2


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_loses_nothing(bench: Any, tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True)
    if made.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        bench.db = mount / "runs.db"
        plan = bench.noops(20, seconds=0.0, tasks=[{"name": "toy-value", "params": {"units": 20_000}}])
        driver = bench.start(plan)
        assert bench.wait(driver) == 2
        message = (tmp_path / "error.txt").read_text()
        assert "full" in message
        assert "Free some space" in message
        done = len(bench.reported())
        assert 0 < done < 20
        subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
        bench.check()
        bench.finish(plan)
        assert len(bench.reported()) == 20
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.slow
def test_a_lock_that_another_process_holds_is_waited_for(bench: Any, wait_for: Wait) -> None:
    plan = bench.noops(12, seconds=0.01)
    driver = bench.start(plan)
    wait_for(lambda: len(bench.reported()) >= 2)
    blocker = sqlite3.connect(bench.db, timeout=30, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    held = len(bench.reported())
    time.sleep(3)
    assert len(bench.reported()) <= held + 1
    blocker.execute("ROLLBACK")
    blocker.close()
    assert bench.wait(driver) == 0
    bench.check()
    bench.finish(plan)
    assert set(bench.executions().values()) == {1}


@pytest.mark.slow
def test_two_drivers_at_once_share_the_work(bench: Any) -> None:
    plan = bench.noops(40, seconds=0.02)
    drivers = [bench.start(plan, cores=1) for _ in range(2)]
    assert [bench.wait(driver) for driver in drivers] == [0, 0]
    bench.check()
    assert len(bench.reported()) == 40
    assert set(bench.executions().values()) == {1}
    bench.finish(plan)


@pytest.mark.slow
def test_one_of_two_drivers_is_killed_and_the_other_does_its_share(bench: Any, wait_for: Wait) -> None:
    plan = bench.noops(40, seconds=0.03)
    first, second = (bench.start(plan, cores=1) for _ in range(2))
    wait_for(lambda: len(bench.reported()) >= 6)
    assert bench.kill_driver(first)
    assert bench.wait(second) == 0
    bench.check()
    assert len(bench.reported()) == 40
    bench.finish(plan)
    # The cells that the first driver had begun, two at most, are the only ones that were started twice.
    assert sum(bench.executions().values()) <= 42


def _restore(copy: Path, path: Path) -> None:
    # A log that belongs to other contents of the file would damage what it is put beside.
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    shutil.copy(copy, path)


def _damage(path: Path, how: str, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        del data[rng.randrange(5000, len(data) - 4096) :]
    else:
        for _ in range(64):
            data[rng.randrange(100, len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_database_ends_a_run_with_a_message_or_not_at_all(
    bench: Any, tmp_path: Path, how: str
) -> None:
    """No damage ends in a traceback; where pages that a run needs are hit, it says which file, and how to mend it."""
    plan = bench.noops(12, seconds=0.0)
    whole = bench.run(plan)
    connection = sqlite3.connect(bench.db)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    intact = tmp_path / "intact.db"
    shutil.copy(bench.db, intact)
    refused = 0
    for seed in range(12):
        _restore(intact, bench.db)
        _damage(bench.db, how, random.Random(seed))
        code = bench.wait(bench.start(plan))
        assert code in (0, 2), (tmp_path / "error.txt").read_text()
        if code == 2:
            refused += 1
            message = (tmp_path / "error.txt").read_text()
            assert "runs.db" in message
            assert "doctor --repair" in message
    assert refused >= 1
    _restore(intact, bench.db)
    assert bench.run(plan).new == []
    assert {run.id for run in bench.run(plan).runs.values()} == {run.id for run in whole.runs.values()}
    bench.check()


def test_a_damaged_cache_of_answers_is_asked_for_again(bench: Any, shared_cache: Path) -> None:
    first = bench.plan({"name": "noop", "params": {"value": 0.5}})
    files = list((shared_cache / "resolved").glob("*.json"))
    whole = {path: path.read_bytes() for path in files}
    changed = (lambda content: content.replace(b"0.5}", b"0.7}"), lambda content: content[:-3])
    garbage = (
        lambda content: b"",
        lambda content: b"{",
        lambda content: b"[1, 2]",
        lambda content: b"\xff\xfe",
    )
    for damage in (*changed, *garbage):
        for path, content in whole.items():
            path.write_bytes(damage(content))
        again = bench.plan({"name": "noop", "params": {"value": 0.5}})
        assert [cell.key for cell in again.cells] == [cell.key for cell in first.cells]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["models", "calibration"])
def test_damaged_files_of_the_cache_are_made_again(bench: Any, shared_cache: Path, folder: str) -> None:
    plan = bench.plan("scale", models=["toy-linear"], tasks=["toy-norm"])
    assert bench.run(plan).complete
    files = [path for path in (shared_cache / folder).rglob("*.safetensors") if path.stat().st_size]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[:-5])
    bench.db = bench.folder / "again.db"
    report = bench.run(plan)
    assert report.complete, [run.reason for run in report.failed]


@pytest.mark.slow
def test_a_read_only_folder_is_said_before_anything_runs(bench: Any, tmp_path: Path) -> None:
    plan = bench.noops(2)
    target = tmp_path / "locked"
    target.mkdir()
    bench.db = target / "runs.db"
    bench.run(plan)
    mounted = subprocess.run(["mount", "--bind", "-o", "ro", str(target), str(target)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a folder read-only")
    try:
        with pytest.raises(StoreError, match=r"runs\.db"):
            bench.run(bench.noops(3))
    finally:
        subprocess.run(["umount", "-l", str(target)], check=True)
    assert threading.active_count() < 10
