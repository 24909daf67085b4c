"""A state machine over run, kill and resume: whatever the order, records are complete, single and sound."""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from methodbench.store import open_store

CELLS = 24


@pytest.mark.slow
def test_any_order_of_run_kill_and_resume_keeps_the_records_right(bench: Any) -> None:
    make, catalog = type(bench), bench.catalog

    class Runs(RuleBasedStateMachine):
        """The model is the set of cells that were reported as done; it only grows."""

        def __init__(self) -> None:
            super().__init__()
            self.folder = tempfile.TemporaryDirectory()
            self.bench = make(Path(self.folder.name), catalog)
            self.plan = self.bench.noops(CELLS, seconds=0.01)
            self.done: set[str] = set()
            self.driver = 0

        def part(self, count: int) -> Any:
            return type(self.plan)(self.plan.suite, self.plan.cells[:count])

        @precondition(lambda self: not self.driver)
        @rule(count=st.integers(1, CELLS))
        def run_part(self, count: int) -> None:
            assert self.bench.run(self.part(count), retry=True).complete
            # A driver that is killed between a record and its report leaves a cell done that nobody reported.
            keys = [cell.key for cell in self.plan.cells[:count]]
            with open_store(str(self.bench.db)) as store:
                latest = store.latest(keys)
            assert [latest[key].status for key in keys] == ["ok"] * count

        @precondition(lambda self: not self.driver)
        @rule(batch=st.sampled_from([1, 5]))
        def start(self, batch: int) -> None:
            self.driver = self.bench.start(self.plan, retry=True, batch=batch)

        @precondition(lambda self: self.driver)
        @rule(seconds=st.floats(0, 0.8), seed=st.integers(0, 9))
        def kill_below(self, seconds: float, seed: int) -> None:
            """Kill a process that the driver started: the server or a worker."""
            time.sleep(seconds)
            # It may have ended by itself.
            with contextlib.suppress(psutil.NoSuchProcess):
                below = psutil.Process(self.driver).children(recursive=True)
                if below:
                    random.Random(seed).choice(below).kill()

        @precondition(lambda self: self.driver)
        @rule(seconds=st.floats(0, 0.8))
        def kill_driver(self, seconds: float) -> None:
            time.sleep(seconds)
            self.bench.kill_driver(self.driver)
            self.driver = 0

        @precondition(lambda self: self.driver)
        @rule()
        def let_it_end(self) -> None:
            assert self.bench.wait(self.driver) in (0, 1)
            self.driver = 0

        @invariant()
        def nothing_is_lost(self) -> None:
            if not self.driver and self.bench.db.exists():
                self.bench.check()
            done = {key for key, status in self.bench.reported().items() if status == "ok"}
            assert self.done <= done
            self.done = done

        def teardown(self) -> None:
            if self.driver:
                self.bench.kill_driver(self.driver)
            report = self.bench.finish(self.plan)
            assert len(report.runs) == CELLS
            self.folder.cleanup()

    chosen = settings(
        max_examples=4, stateful_step_count=5, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(Runs, settings=chosen)
