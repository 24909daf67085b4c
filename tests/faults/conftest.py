"""Drivers as processes of their own, which tests may kill, and what must hold after any fault."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from methodbench import api
from methodbench.catalog import Catalog
from methodbench.engine.driver import Report, SilentReporter, run_plan
from methodbench.engine.plan import Plan
from methodbench.errors import MethodbenchError
from methodbench.provenance import environment
from methodbench.store import open_store


class _Notes(SilentReporter):
    """Writes the key of each cell that is reported as done, once its record is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def finished(self, cell: Any, run: Any, metrics: Any) -> None:
        with self.path.open("a") as notes:
            notes.write(f"{cell.key} {run.status}\n")


class Bench:
    """One database, the drivers that write to it, and what they reported."""

    def __init__(self, folder: Path, catalog: Catalog) -> None:
        self.folder = folder
        self.catalog = catalog
        self.db = folder / "runs.db"
        self.notes = folder / "reported.txt"
        self.ledger = folder / "ledger.txt"
        self.drivers: list[int] = []
        # Forked drivers share what costs seconds to find out.
        environment()

    def plan(self, *methods: Any, tasks: Any = ("toy-value",), **more: Any) -> Plan:
        grid = {"methods": list(methods), "tasks": list(tasks), "timeout": 60, **more}
        return api.plan({"name": "faults", "comparisons": [grid]}, catalog=self.catalog)

    def noops(self, count: int, seconds: float = 0.05, **more: Any) -> Plan:
        """A grid of cells that note in the ledger that they run."""
        values = [index / count for index in range(count)]
        params = {"seconds": seconds, "ledger": str(self.ledger)}
        return self.plan({"name": "sleeper", "params": params, "grid": {"value": values}}, **more)

    def run(self, plan: Plan, **options: Any) -> Report:
        """Run a plan in this process."""
        with open_store(str(self.db)) as store:
            return run_plan(
                plan, store, self.catalog, **{"cores": 2, "reporter": _Notes(self.notes), **options}
            )

    def start(self, plan: Plan, **options: Any) -> int:
        """Run a plan in a driver process of its own; returns its pid.

        The driver exits with 0 when the plan is complete, 1 when something failed, 2 for an error of the user, whose
        message it leaves in ``error.txt``, and 3 for anything else.
        """
        pid = os.fork()
        if pid == 0:
            code = 3
            try:
                code = 0 if self.run(plan, **options).complete else 1
            except MethodbenchError as error:
                (self.folder / "error.txt").write_text(str(error))
                code = 2
            except BaseException:
                (self.folder / "error.txt").write_text(traceback.format_exc())
            finally:
                os._exit(code)
        self.drivers.append(pid)
        return pid

    def wait(self, pid: int, limit: float = 120) -> int:
        """Wait for a driver and return its exit code (negative: the signal that ended it)."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self.drivers.remove(pid)
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        pytest.fail(f"driver {pid} did not end in {limit:g} s")

    def kill_driver(self, pid: int) -> bool:
        """SIGKILL a driver, wait until nothing of its family is left; False where it had ended by itself before."""
        family = psutil.Process(pid).children(recursive=True)
        os.kill(pid, signal.SIGKILL)
        code = self.wait(pid)
        assert code in (-signal.SIGKILL, 0, 1)
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
        return code == -signal.SIGKILL

    def reported(self) -> dict[str, str]:
        """Status by key of every cell that a driver reported as done."""
        if not self.notes.exists():
            return {}
        whole = self.notes.read_text().rpartition("\n")[0]
        return dict(line.split() for line in whole.splitlines())

    def executions(self) -> Counter[str]:
        """How often each no-op was started, by value and seed."""
        return Counter(self.ledger.read_text().splitlines()) if self.ledger.exists() else Counter()

    def check(self) -> None:
        """What must hold after any fault: nothing reported is lost, no result is there twice, the file is sound."""
        connection = sqlite3.connect(self.db)
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        connection.close()
        with open_store(str(self.db)) as store:
            runs = store.runs()
            latest = store.latest(self.reported())
            metrics = {row.run_id: row for row in store.metrics() if row.primary}
        for key, status in self.reported().items():
            assert latest[key].status in (status, "ok")
        good = Counter(run.cell_key for run in runs if run.status == "ok")
        assert not [key for key, count in good.items() if count > 1]
        for run in runs:
            if run.status == "ok":
                scores = metrics[run.id].unit_scores()
                assert scores.size == run.facts["units"]
                np.testing.assert_allclose(scores, run.params.get("value", 1.0), atol=0.1)

    def finish(self, plan: Plan, **options: Any) -> Report:
        """Run what is missing, failures included, and check that the plan is complete, and done once."""
        done = {key for key, status in self.reported().items() if status == "ok"}
        report = self.run(plan, retry=True, **options)
        assert report.complete, [run.reason for run in report.failed]
        assert not done & set(report.new)
        self.check()
        assert self.run(plan).new == []
        return report


@pytest.fixture
def bench(tmp_path: Path, catalog: Catalog) -> Iterator[Bench]:
    made = Bench(tmp_path, catalog)
    yield made
    for pid in list(made.drivers):
        made.kill_driver(pid)


@pytest.fixture
def wait_for() -> Callable[..., None]:
    """Wait until a condition holds."""

    def wait(condition: Callable[[], object], limit: float = 60) -> None:
        deadline = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    return wait
