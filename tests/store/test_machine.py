"""Whatever is recorded, exported, imported and merged in whatever order: nothing is lost, doubled or altered."""

from __future__ import annotations

import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from methodbench.provenance import digest
from methodbench.store import Environment, MetricValue, Run, open_store, repair
from methodbench.store.capsule import read_capsule, write_capsule
from methodbench.store.merging import content_of, content_of_database, merge

START = datetime(2026, 1, 1, tzinfo=UTC)
SOFTWARE = {"python": "3.11"}
ENVIRONMENT = Environment(digest=digest(SOFTWARE), captured_at=START, data=SOFTWARE)
PLACES = st.sampled_from(["here", "there", "elsewhere"])


class Exchange(RuleBasedStateMachine):
    """Three databases that trade records; the model is a set of seals for each."""

    capsules = Bundle("capsules")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="methodbench-machine-"))
        self.stores = {
            name: open_store(str(self.folder / f"{name}.db")) for name in ("here", "there", "elsewhere")
        }
        self.seals: dict[str, set[str]] = {name: set() for name in self.stores}
        self.results: dict[str, dict[str, str]] = {name: {} for name in self.stores}
        """Seal of the result of each cell: the first success that came to a database stays."""
        self.number = 0

    def teardown(self) -> None:
        for store in self.stores.values():
            store.close()
        shutil.rmtree(self.folder)

    @rule(
        place=PLACES,
        cell=st.integers(0, 3),
        score=st.sampled_from([1.0, 2.0]),
        status=st.sampled_from(["ok", "failed"]),
    )
    def add(self, place: str, cell: int, score: float, status: str) -> None:
        store = self.stores[place]
        identity = {"method": "m", "cell": cell}
        key = digest(identity)
        # A driver runs a cell only while it has no success.
        if key in self.results[place]:
            return
        self.number += 1
        run = Run(
            id=f"{self.number:012x}", cell_key=key, identity=identity, status=status, method="m", kind="probe",
            family="f", params_passed={}, params={}, task="t", task_params={}, protocol=1,
            environment_digest=ENVIRONMENT.digest, started_at=START + timedelta(seconds=self.number),
        )  # fmt: skip
        scores = np.array([score, score])
        metric = MetricValue(run_id=run.id, name="loss", value=score, units=2, scores=scores.tobytes())
        store.add(run, [metric] if status == "ok" else [], environment=ENVIRONMENT)
        self.seals[place].add(run.seal)
        if status == "ok":
            self.results[place][key] = run.seal

    @rule(target=capsules, place=PLACES)
    def export(self, place: str) -> tuple[Path, frozenset[str]]:
        content = content_of(self.stores[place])
        path = write_capsule(content, self.folder)
        again = write_capsule(content_of(self.stores[place]), self.folder / "again")
        assert again.name == path.name
        return path, frozenset(self.seals[place])

    @rule(place=PLACES, capsule=capsules)
    def import_capsule(self, place: str, capsule: tuple[Path, frozenset[str]]) -> None:
        content = read_capsule(capsule[0])
        assert {record.run["seal"] for record in content.records} == capsule[1]
        known = self.seals[place] & capsule[1]
        merged = merge(self.stores[place], content)
        assert merged.known == len(known)
        self._came(place, capsule[1])

    @rule(source=PLACES, place=PLACES)
    def merge_database(self, source: str, place: str) -> None:
        if source != place:
            merge(self.stores[place], content_of_database(str(self.folder / f"{source}.db")))
            self._came(place, self.seals[source])

    def _came(self, place: str, seals: frozenset[str] | set[str]) -> None:
        self.seals[place] |= seals
        for run in self.stores[place].runs():
            if run.status == "ok":
                self.results[place].setdefault(run.cell_key, run.seal)

    @invariant()
    def nothing_is_lost_doubled_or_altered(self) -> None:
        for place, store in self.stores.items():
            runs = store.runs(witnesses=True)
            seals = [run.seal for run in runs]
            assert len(seals) == len(set(seals))
            assert set(seals) == self.seals[place]
            assert repair.examine(store).good
            successes = [run for run in store.runs() if run.status == "ok"]
            assert {run.cell_key: run.seal for run in successes} == self.results[place]
            assert len(successes) == len(self.results[place]), (
                "one result a cell; the others are its witnesses"
            )
            own = {run.id for run in store.runs()}
            assert all(run.witness_of in own for run in runs if run.witness_of)


Exchange.TestCase.settings = settings(
    max_examples=12, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
TestExchange = pytest.mark.slow(Exchange.TestCase)
