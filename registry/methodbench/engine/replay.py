"""Replay: a recorded run is run again from its record alone, and the two are compared bit by bit.

The replay is a plan of one cell in a database of its own, so that no record can be reused and nothing else runs in
its worker. What comes of it is kept beside the original as a witness, which never takes the original's place.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from methodbench.engine import parting
from methodbench.engine.driver import Reporter, run_plan
from methodbench.engine.parting import Parting, Recorded, ScoreChange
from methodbench.engine.plan import Plan
from methodbench.engine.why import Field, present_cell
from methodbench.errors import MethodbenchError
from methodbench.store import Environment, Fingerprint, MetricValue, Run, Series, Store, Witness, open_store

if TYPE_CHECKING:
    from methodbench.catalog import Catalog

Verdict = Literal["bit-identical", "within tolerance", "drifted"]

#: A worker gets this many times what the original took before it is killed, and at least so many seconds.
_PATIENCE, _LEAST_SECONDS = 20.0, 600.0


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replay came to."""

    verdict: Verdict
    original: Run
    witness: Run
    tolerance: float
    parting: Parting | None
    """First place where the two differ in a bit."""
    scores: list[ScoreChange]
    """Metrics whose scores differ in a bit."""
    suspects: list[Field]
    """What differs between then and now: code, weights and data first, then the environments."""
    compared: Mapping[str, int]
    """How many marks, steps and units were compared."""


def replay(
    run: Run,
    store: Store,
    catalog: Catalog,
    *,
    tolerance: float = 1e-3,
    executor: str = "local",
    cores: int | None = None,
    timeout: float | None = None,
    reporter: Reporter | None = None,
) -> Replay:
    """Run a recorded run again, compare, and keep the result as a witness.

    Args:
        tolerance: largest difference of a metric, as a share of its recorded value, that is no drift.
        timeout: seconds after which the replay is killed; by default 20 times what the original took, and at
            least 600.

    Raises:
        MethodbenchError: the run has no result to compare with, or what it needs is not installed any more.
    """
    if run.status != "ok":
        raise MethodbenchError(
            f"run {run.id} is {run.status}: it has no result to compare with",
            "`methodbench run --retry` runs failed cells again.",
        )
    limit = timeout or max(_LEAST_SECONDS, _PATIENCE * run.wall_seconds)
    cell = dataclasses.replace(present_cell(run, catalog, exactly=True), timeout=limit)
    with (
        tempfile.TemporaryDirectory(prefix="methodbench-replay-") as folder,
        open_store(str(Path(folder) / "replay.db")) as scratch,
    ):
        report = run_plan(
            Plan(run.suite, [cell]),
            scratch,
            catalog,
            executor=executor,
            cores=cores,
            reporter=reporter,
        )
        if report.left_out:
            raise MethodbenchError(f"run {run.id} cannot be replayed: {report.left_out[cell.key]}")
        again = parting.recorded(scratch, report.runs[cell.key])
    found = judge(parting.recorded(store, run), again, tolerance)
    _keep(found, again, store)
    return found


def judge(original: Recorded, again: Recorded, tolerance: float) -> Replay:
    """Return the verdict on two records of one request."""
    where = parting.first_parting(original, again)
    scores = parting.score_changes(original, again)
    if again.run.status != "ok":
        verdict: Verdict = "drifted"
    elif where is None:
        verdict = "bit-identical"
    elif all(change.relative <= tolerance for change in scores):
        verdict = "within tolerance"
    else:
        verdict = "drifted"
    suspects = [
        *parting.setting_changes(original, again),
        *_version_change(original.run, again.run),
        *parting.environment_changes(original, again),
    ]
    counts = parting.compared(original, again)
    return Replay(verdict, original.run, again.run, tolerance, where, scores, suspects, counts)


def _version_change(one: Run, other: Run) -> list[Field]:
    change = Field("methodbench_version", one.methodbench_version, other.methodbench_version)
    return [] if change.same else [change]


def _keep(found: Replay, again: Recorded, store: Store) -> None:
    run = again.run
    witness = Witness(
        run_id=run.id,
        original=found.original.id,
        verdict=found.verdict,
        tolerance=found.tolerance,
        parts_at=str(found.parting or ""),
        differences=[_difference(change) for change in found.scores],
        suspects=[_suspect(suspect) for suspect in found.suspects],
    )
    run.witness_of = found.original.id
    store.add(
        Run(**run.model_dump()),
        [MetricValue(**row.model_dump()) for row in again.metrics.values()],
        [Series(**row.model_dump()) for row in again.series.values()],
        Environment(digest=run.environment_digest, captured_at=run.started_at, data=dict(again.environment)),
        Fingerprint(run_id=run.id, marks=again.marks) if again.marks else None,
        witness,
    )


def _difference(change: ScoreChange) -> dict[str, Any]:
    # Databases refuse JSON with infinities; their text says as much.
    values = dataclasses.asdict(change)
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def _suspect(field: Field) -> dict[str, Any]:
    return {"field": field.name, "recorded": field.recorded, "replayed": field.wanted}
