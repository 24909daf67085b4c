"""The driver: runs a plan through an executor and is the only one that writes records."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from methodbench import __version__, sources
from methodbench.composition import describe_links
from methodbench.engine.cell import Cell, Job, group_jobs
from methodbench.engine.executors import CellOutcome, Executor, ExecutorOptions, LocalExecutor
from methodbench.engine.prepared import is_prepared, prepared_folder
from methodbench.engine.slots import Needs
from methodbench.entries import Method, Model
from methodbench.errors import MethodbenchError, UnknownNameError
from methodbench.provenance import canonical_json, described, environment, source_digest, wheel
from methodbench.store import Environment, Fingerprint, Finished, MetricValue, Run, Series, Store
from methodbench.store.claims import Lease

if TYPE_CHECKING:
    from methodbench.catalog import Catalog
    from methodbench.engine.plan import Plan

#: CPU threads of preparing a model. Fixed: what is trained depends on it as results do.
_PREPARE_THREADS = 2


#: Seconds between two looks at what other drivers have done.
_LOOK_SECONDS = 0.5


class Reporter(Protocol):
    """Shows a person what goes on; every call is cheap and none may raise."""

    def begin(self, plan: Plan, todo: Sequence[Cell], done: Mapping[str, Run]) -> None:
        """The plan is known, and what of it is done already."""

    def fetching(self, model: Model, received: int, total: int | None) -> None:
        """Bytes of a download; ``total`` is None when it is not known."""

    def left_out(self, cells: Sequence[Cell], reason: str) -> None:
        """These cells cannot be run here and are not recorded."""

    def elsewhere(self, count: int, where: str) -> None:
        """This many cells are run by other drivers of this database, which this one waits for."""

    def started(self, label: str) -> None:
        """A worker began."""

    def phase(self, label: str, phase: str) -> None:
        """A worker entered a phase."""

    def finished(self, cell: Cell, run: Run, metrics: Sequence[MetricValue]) -> None:
        """A cell has its record."""

    def end(self) -> None:
        """Nothing more follows."""


class SilentReporter:
    """Shows nothing."""

    def begin(self, plan: Plan, todo: Sequence[Cell], done: Mapping[str, Run]) -> None: ...
    def fetching(self, model: Model, received: int, total: int | None) -> None: ...
    def left_out(self, cells: Sequence[Cell], reason: str) -> None: ...
    def elsewhere(self, count: int, where: str) -> None: ...
    def started(self, label: str) -> None: ...
    def phase(self, label: str, phase: str) -> None: ...
    def finished(self, cell: Cell, run: Run, metrics: Sequence[MetricValue]) -> None: ...
    def end(self) -> None: ...


@dataclass(slots=True)
class Report:
    """What a run of a plan came to."""

    plan: Plan
    runs: dict[str, Run] = field(default_factory=dict)
    """Newest run of each cell, by cell key; those that were there before included."""
    new: list[str] = field(default_factory=list)
    """Keys of the cells that were run."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Reason by key of each cell that could not be run here."""

    @property
    def failed(self) -> list[Run]:
        return [run for run in self.runs.values() if run.status not in ("ok", "not-applicable")]

    @property
    def complete(self) -> bool:
        """Whether every cell of the plan has a record that is no failure."""
        return not self.failed and all(cell.key in self.runs for cell in self.plan.cells)


def run_plan(
    plan: Plan,
    store: Store,
    catalog: Catalog,
    *,
    executor: str = "local",
    address: str = "",
    cores: int | None = None,
    memory_limit: int | None = None,
    batch: int = 1,
    retry: bool = False,
    reporter: Reporter | None = None,
) -> Report:
    """Run the cells of a plan that have no record yet.

    Args:
        executor: ``local``, or a name that a plugin knows.
        address: where the executor's cluster is; empty for this machine.
        cores: CPU cores to use; by default all that this process may.
        memory_limit: bytes above which a worker is ended, with everything that it started.
        batch: how many cells one worker may run, one after the other. More than one saves the fork per cell, and
            gives up that each cell starts in a fresh process.
        retry: also run cells whose newest record is a failure.
        reporter: shows progress.

    Returns:
        The newest run of every cell. Interrupting with Ctrl-C ends the workers and raises KeyboardInterrupt; what
        was finished is in the database, and the next call goes on from there.
    """
    reporter = reporter or SilentReporter()
    before = store.latest(cell.key for cell in plan.cells)
    settled = {key: run for key, run in before.items() if not retry or run.status in ("ok", "not-applicable")}
    todo = [cell for cell in plan.cells if cell.key not in settled]
    report = Report(plan, dict(settled))
    reporter.begin(plan, todo, settled)
    try:
        todo = _fetch_weights(todo, report, reporter)
        if todo:
            with _scratch() as scratch:
                cores = cores or available_cores()
                options = ExecutorOptions(cores, _preload(todo), memory_limit, address)
                runner = _executor(executor, catalog, options)
                known = {key: run.id for key, run in before.items()}
                try:
                    todo = _fitting(todo, runner, report, reporter)
                    with Lease(store, known) as lease:
                        drive = _Drive(store, lease, report, reporter, scratch, catalog)
                        drive.run(todo, runner, batch)
                finally:
                    runner.close()
    finally:
        reporter.end()
    return report


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for what workers write, gone at the end.

    Raises:
        MethodbenchError: it cannot be written.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="methodbench-", ignore_cleanup_errors=True)
    except OSError as error:
        raise _unwritable(error) from error
    with folder as name:
        yield Path(name)


def _unwritable(error: OSError) -> MethodbenchError:
    return MethodbenchError(
        f"cannot write temporary files: {error}",
        "Free some space or set TMPDIR to another folder, and run the same command again: finished cells are kept.",
    )


def available_cores() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fetch_weights(todo: list[Cell], report: Report, reporter: Reporter) -> list[Cell]:
    """Fetch the sources of models that are not prepared yet; leave out the cells of those that cannot be had."""
    problems: dict[str, str] = {}
    fetched: set[str] = set()
    for cell in todo:
        model = cell.model
        if model is None or cell.weights_digest in fetched:
            continue
        fetched.add(cell.weights_digest)
        if is_prepared(prepared_folder(cell.weights_digest)):
            continue
        try:
            sources.fetch(
                model.source, sha256=model.sha256, progress=functools.partial(reporter.fetching, model)
            )
        except MethodbenchError as error:
            problems[cell.weights_digest] = f"{model.name}: {error.message}"
    for weights, reason in problems.items():
        cells = [cell for cell in todo if cell.weights_digest == weights]
        report.left_out |= {cell.key: reason for cell in cells}
        reporter.left_out(cells, reason)
    return [cell for cell in todo if cell.weights_digest not in problems]


def _executor(name: str, catalog: Catalog, options: ExecutorOptions) -> Executor:
    if name == "local":
        if options.address:
            raise MethodbenchError(
                "the local executor runs on this machine and takes no address",
                "Name the executor that the address belongs to, for example --executor ray.",
            )
        return LocalExecutor(options)
    found = catalog.manager.hook.methodbench_executor(name=name, options=options)
    if found is None:
        raise UnknownNameError("executor", name, ["local", "ray"])
    return found


def _fitting(todo: list[Cell], executor: Executor, report: Report, reporter: Reporter) -> list[Cell]:
    """Leave out the cells that need more than the executor ever has."""
    reasons: dict[Needs, str] = {}
    without: dict[str, list[Cell]] = {}
    fitting = []
    for cell in todo:
        needs = cell.needs
        if needs not in reasons:
            reasons[needs] = executor.lacking(needs)
        if reasons[needs]:
            without.setdefault(reasons[needs], []).append(cell)
        else:
            fitting.append(cell)
    for reason, cells in without.items():
        report.left_out |= {cell.key: reason for cell in cells}
        reporter.left_out(cells, reason)
    return fitting


def _preload(todo: Sequence[Cell]) -> list[str]:
    """Return the implementations that workers of these cells import anyway, so that they are imported once."""
    entries = {id(entry): entry for cell in todo for entry in (cell.method, cell.task, cell.model) if entry}
    found: dict[str, None] = {}
    for entry in entries.values():
        match entry:
            case Method():
                found |= dict.fromkeys(entry.implementations)
            case Model():
                found[entry.loader] = None
            case _:
                found[entry.impl] = None
    return ["methodbench.engine.worker", *found]


class _Drive:
    """One run of one plan: the sink of the executor."""

    def __init__(
        self,
        store: Store,
        lease: Lease,
        report: Report,
        reporter: Reporter,
        scratch: Path,
        catalog: Catalog,
    ) -> None:
        self.store = store
        self.lease = lease
        self.report = report
        self.reporter = reporter
        self.scratch = scratch
        self.catalog = catalog
        self.jobs: dict[str, tuple[Cell, ...]] = {}
        self.unprepared: dict[str, str] = {}
        """Why a model could not be prepared, by weights digest."""
        self.environments: dict[str, Environment] = {}
        """What workers computed with, by what they said about it."""
        self.taken: set[str] = set()
        """Jobs whose cells this driver has claimed."""
        self.held: dict[str, Cell] = {}
        """Cells that other drivers have taken, by key."""
        self.tasks: dict[tuple[int, int], dict[str, Any]] = {}
        """What workers are told of a task, by its entry and its settings, which live as long as the plan."""

    def run(self, todo: Sequence[Cell], executor: Executor, batch: int) -> None:
        executor.run([self._preparation(cell) for cell in _one_per_model(todo)], self)
        self._run_ready(todo, executor, batch)
        while self.held:
            self._run_ready(self._wait_for_others(), executor, batch)

    def _run_ready(self, todo: Sequence[Cell], executor: Executor, batch: int) -> None:
        ready, failed = [], {}
        for cell in todo:
            reason = self.unprepared.get(cell.weights_digest) if cell.model else None
            if reason is None:
                ready.append(cell)
            else:
                failed[cell.key] = CellOutcome("failed", reason)
        mine = self._take([cell for cell in todo if cell.key in failed]) if failed else ()
        self._record([(cell, failed[cell.key]) for cell in mine])
        executor.run([self._job_data(jobs) for jobs in _batches(group_jobs(ready), batch)], self)

    # Other drivers of this database

    def admit(self, job: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if "prepare" in job or job["id"] in self.taken:
            return self._with_folder(job)
        cells = self.jobs[job["id"]]
        mine = self._take(cells)
        if not mine:
            return None
        self.taken.add(job["id"])
        self.jobs[job["id"]] = mine
        keys = {cell.key for cell in mine}
        kept = [data for cell, data in zip(cells, job["cells"], strict=True) if cell.key in keys]
        return self._with_folder({**job, "cells": kept})

    @staticmethod
    def _with_folder(job: Mapping[str, Any]) -> Mapping[str, Any]:
        """Make the folder that a job writes to; it is removed when all cells of the job are recorded."""
        try:
            Path(job["out"]).mkdir(exist_ok=True)
        except OSError as error:
            raise _unwritable(error) from error
        return job

    def _take(self, cells: Sequence[Cell]) -> tuple[Cell, ...]:
        """Claim cells and return those that this driver has now; note what became of the others."""
        taken = self.lease.take(cell.key for cell in cells)
        self.report.runs |= taken.done
        self.held |= {cell.key: cell for cell in cells if cell.key in taken.held}
        return tuple(cell for cell in cells if cell.key in taken.mine)

    def _wait_for_others(self) -> list[Cell]:
        """Wait until other drivers have recorded the cells they hold; return those that they leave to this one."""
        waiting, self.held = self.held, {}
        said = ""
        free: list[Cell] = []
        while waiting and not free:
            look = self.lease.look(waiting)
            self.report.runs |= look.done
            free = [cell for key, cell in waiting.items() if key in look.mine]
            waiting = {key: waiting[key] for key in look.held}
            where = ", ".join(sorted({f"{driver.host} (pid {driver.pid})" for driver in look.held.values()}))
            if where and where != said:
                said = where
                self.reporter.elsewhere(len(waiting), where)
            if waiting and not free and not self.lease.bury(look.held.values()):
                time.sleep(_LOOK_SECONDS)
        self.held = waiting
        return free

    # What workers get

    def _common(self, cell: Cell, threads: int) -> dict[str, Any]:
        identifier = uuid.uuid4().hex[:12]
        out = self.scratch / identifier
        return {
            "id": identifier,
            "out": str(out),
            "log": str(out / "log.txt"),
            "first": 0,
            "device": cell.device,
            "threads": threads,
            "needs": dataclasses.asdict(cell.needs),
            "environment": {},
            "cache": str(sources.cache_dir()),
        }

    def _preparation(self, cell: Cell) -> dict[str, Any]:
        assert cell.model is not None
        source = sources.fetch(cell.model.source, sha256=cell.model.sha256).path
        wanted = {**_model_data(cell.model, cell.weights_digest), "source": str(source) if source else None}
        return {**self._common(cell, _PREPARE_THREADS), **_preparing(cell), "prepare": wanted}

    def _job_data(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """Return what one worker gets: parts that differ in method, model or seed, and the cells of each."""
        first = jobs[0].cells[0]
        data = self._common(first, jobs[0].threads)
        data["parts"] = [_part_data(job.cells[0]) for job in jobs]
        data["cells"] = [
            {"part": part, "timeout": cell.timeout, "task": self._task_data(cell)}
            for part, job in enumerate(jobs)
            for cell in job.cells
        ]
        # For machines that lack a model which is prepared here.
        data["preparation"] = _preparing(first)
        self.jobs[data["id"]] = tuple(cell for job in jobs for cell in job.cells)
        return data

    def _task_data(self, cell: Cell) -> dict[str, Any]:
        """Describe a task with its settings, once for all cells that share both."""
        key = id(cell.task), id(cell.task_params)
        if key not in self.tasks:
            self.tasks[key] = _task_data(cell)
        return self.tasks[key]

    # What comes back

    def _label(self, job: Mapping[str, Any], index: int) -> str:
        if "prepare" in job:
            return f"prepare {job['prepare']['name']}"
        return self.jobs[job["id"]][index].label

    def started(self, job: Mapping[str, Any]) -> None:
        self.reporter.started(self._label(job, job["first"]))

    def phase(self, job: Mapping[str, Any], index: int, phase: str) -> None:
        self.reporter.phase(self._label(job, index), phase)

    def finished(self, job: Mapping[str, Any], outcomes: Mapping[int, CellOutcome]) -> None:
        if "prepare" in job:
            (outcome,) = outcomes.values()
            if outcome.status != "ok":
                wanted = job["prepare"]
                reason = f"{wanted['name']} could not be prepared: {outcome.reason}"
                self.unprepared[wanted["digest"]] = reason
            return
        cells = self.jobs[job["id"]]
        self._record([(cells[index], outcome) for index, outcome in outcomes.items()])
        if len(cells) - 1 in outcomes:
            shutil.rmtree(job["out"], ignore_errors=True)

    def _environment(self, outcome: CellOutcome) -> Environment:
        """Return the environment of a run: the machine it ran on, and what the worker computed with."""
        numeric = outcome.result.get("numerics", {})
        key = canonical_json([outcome.host, numeric])
        if key not in self.environments:
            digest, data = described(outcome.host or environment(), numeric)
            self.environments[key] = Environment(digest=digest, captured_at=datetime.now(UTC), data=data)
        return self.environments[key]

    def _record(self, ended: Sequence[tuple[Cell, CellOutcome]]) -> None:
        """Write what became of cells, then say so."""
        finished = [self._finished(cell, outcome) for cell, outcome in ended]
        kept = self.store.add_finished(finished, lease=self.lease) if finished else []
        for (cell, _), one, run in zip(ended, finished, kept, strict=True):
            self.report.runs[cell.key] = run
            if run is one.run:
                self.report.new.append(cell.key)
                self.reporter.finished(cell, run, one.metrics)

    def _finished(self, cell: Cell, outcome: CellOutcome) -> Finished:
        """Return the record of a cell that came to its end."""
        result = outcome.result
        captured = self._environment(outcome)
        identifier = uuid.uuid4().hex[:12]
        wall = result.get("wall_seconds", 0.0)
        started = result.get("started")
        run = Run(
            id=identifier,
            cell_key=cell.key,
            identity=cell.identity(),
            status=outcome.status,
            reason=outcome.reason,
            method=cell.method.name,
            kind=cell.method.kind,
            family=cell.method.family,
            baseline=cell.method.baseline,
            variant=cell.variant,
            params_passed=dict(cell.params_passed),
            params=dict(cell.params),
            model=cell.model.name if cell.model else "",
            model_kind=cell.model.kind if cell.model else "",
            task=cell.task.name,
            task_params=dict(cell.task_params),
            task_passed=dict(cell.task_passed),
            protocol=cell.task.protocol,
            seed=cell.seed,
            dtype=cell.dtype,
            device=cell.device,
            threads=cell.threads,
            method_digest=cell.method_digest,
            wheel=wheel(self.catalog.distribution("method", cell.method.name)),
            weights_digest=cell.weights_digest,
            data_digest=cell.data_digest,
            environment_digest=captured.digest,
            methodbench_version=__version__,
            suite=cell.suite,
            command=cell.command(),
            started_at=datetime.fromtimestamp(started, UTC) if started else datetime.now(UTC),
            wall_seconds=wall,
            phases=dict(result.get("phases", {})),
            peak_memory_bytes=result.get("peak_memory_bytes"),
            storage=result.get("storage", ""),
            model_bytes=result.get("model_bytes"),
            bits_per_weight=result.get("bits_per_weight"),
            accounted_bits=result.get("accounted_bits"),
            throughput=result.get("throughput"),
            throughput_unit=result.get("throughput_unit", ""),
            facts={**result.get("facts", {}), **({"tuning": dict(cell.tuning)} if cell.tuning else {})},
            warnings=list(result.get("warnings", [])),
            log_tail=outcome.log_tail,
        )
        metrics = [
            MetricValue(
                run_id=identifier, units=len(row["scores"]), **{**row, "scores": _blob(row["scores"])}
            )
            for row in result.get("metrics", [])
        ]
        series = [
            Series(run_id=identifier, name=name, values=_blob(points))
            for name, points in result.get("series", {}).items()
        ]
        marks = result.get("marks")
        fingerprint = Fingerprint(run_id=identifier, marks=marks) if marks else None
        return Finished(run, metrics, series, captured, fingerprint)


def _one_per_model(cells: Sequence[Cell]) -> list[Cell]:
    """Return one cell for each model that is not prepared yet."""
    found: dict[str, Cell] = {}
    for cell in cells:
        if cell.model is not None and not is_prepared(prepared_folder(cell.weights_digest)):
            found.setdefault(cell.weights_digest, cell)
    return list(found.values())


def _batches(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Join neighbours into batches of at most ``size`` cells; what one worker runs needs the same of the machine."""
    batches: list[list[Job]] = []
    count = 0
    before: object = None
    for job in jobs:
        first = job.cells[0]
        needs = (job.threads, first.device, first.method.resources, first.task.resources)
        if not batches or needs != before or count + len(job.cells) > size:
            batches.append([])
            count = 0
        batches[-1].append(job)
        count += len(job.cells)
        before = needs
    return batches


def _preparing(cell: Cell) -> dict[str, Any]:
    """Return how a model is prepared, whichever cell needs it first.

    Models are trained and converted under seed 0 whatever the cell's seed: they are part of the question.
    """
    return {
        "seed": 0,
        "device": "cpu",
        "threads": _PREPARE_THREADS,
        "needs": dataclasses.asdict(Needs(_PREPARE_THREADS)),
        "cells": [{"timeout": cell.timeout}],
    }


def _part_data(cell: Cell) -> dict[str, Any]:
    return {
        "seed": cell.seed,
        "dtype": cell.dtype,
        "method": _method_data(cell),
        "model": _model_data(cell.model, cell.weights_digest) if cell.model else None,
    }


def _method_data(cell: Cell) -> dict[str, Any]:
    method, params = cell.method, cell.params
    return {
        "name": method.name,
        "kind": method.kind,
        "impl": method.impl,
        # Of the plan; that of a chain covers its links, which are checked one by one.
        "source_digest": source_digest(method.impl) if method.links else cell.method_digest,
        "params": dict(params),
        "needs": list(method.needs),
        "links": [
            {**link, "source_digest": source_digest(link["impl"])} for link in describe_links(method, params)
        ],
    }


def _model_data(model: Model, weights_digest: str) -> dict[str, Any]:
    return {
        "name": model.name,
        "kind": model.kind,
        "loader": model.loader,
        "spec": model.source,
        "sha256": model.sha256,
        "options": dict(model.options),
        "digest": weights_digest,
        "folder": str(prepared_folder(weights_digest)),
    }


def _task_data(cell: Cell) -> dict[str, Any]:
    metrics = [
        {
            "name": metric.name,
            "direction": metric.direction,
            "unit": metric.unit,
            "title": metric.label,
            "aggregate": metric.aggregate,
            "primary": metric.primary,
        }
        for metric in cell.task.metrics
    ]
    return {
        "name": cell.task.name,
        "impl": cell.task.impl,
        "params": dict(cell.task_params),
        "digest": cell.data_digest,
        "metrics": metrics,
    }


def _blob(values: Sequence[float]) -> bytes:
    return np.asarray(values, dtype="<f8").tobytes()
