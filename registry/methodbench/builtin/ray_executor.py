"""Cells on a Ray cluster: ``--executor ray``.

Every job is one Ray task that declares its cores, memory and GPUs as Ray resources. Inside the task runs the same fork
server as on this machine, so that limits, kills and failures behave the same, and the same code gives the same bits.
Tasks send what happens to a mailbox, an actor that the driver empties; the driver alone writes records. A job whose
node or process dies is sent again, from the first cell that was not reported, with a node's cores to itself. A cell
that had begun both times failed; a job that had not begun waits and is sent again, since Ray goes on placing tasks on
a dead node until it has missed its heartbeats.

Nodes need the same version of methodbench and of the plugins; a method whose source differs is refused. Weights and
data are fetched on each node into its own cache.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methodbench import sources
from methodbench.engine.executors import CellOutcome, ExecutorOptions, LocalExecutor, Sink
from methodbench.engine.prepared import is_prepared, prepared_folder
from methodbench.engine.slots import Needs, Slots, visible_gpus
from methodbench.errors import MethodbenchError, MissingExtraError
from methodbench.provenance import environment, source_digest

#: Seconds that the driver waits for tasks between two looks into the mailbox.
_LOOK_SECONDS = 0.05
#: Seconds between two checks that what waits can still be placed somewhere.
_PLACE_SECONDS = 2.0
#: How often a cell may lose the node or process that had begun it; the second time it had the node to itself.
_LOSSES = 2
#: How often a job may be lost before it began; the pauses between double, and together outlast Ray's heartbeats.
_MISSES = 7
_FIRST_PAUSE_SECONDS = 0.5
_OBJECT_STORE_BYTES = 128 * 2**20


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingExtraError("the executor ray", error.name or "ray", "methodbench[ray]") from None
    return ray


# On the nodes


class Mailbox:
    """The actor through which tasks tell the driver what happens."""

    def __init__(self) -> None:
        self._events: list[Mapping[str, Any]] = []

    def put(self, event: Mapping[str, Any]) -> None:
        """Keep one event."""
        self._events.append(event)

    def take(self) -> list[Mapping[str, Any]]:
        """Return what has come since the last call."""
        events, self._events = self._events, []
        return events


class _Forward:
    """A sink that sends everything to the mailbox."""

    def __init__(self, mailbox: Any, attempt: str) -> None:
        self._mailbox = mailbox
        self._attempt = attempt
        self._last: Any = None

    def _put(self, **event: Any) -> None:
        self._last = self._mailbox.put.remote({"attempt": self._attempt, **event})

    def admit(self, job: Mapping[str, Any]) -> Mapping[str, Any]:
        # The driver has admitted the job before it sent the task.
        return job

    def started(self, job: Mapping[str, Any]) -> None:
        self._put(event="started")

    def phase(self, job: Mapping[str, Any], index: int, phase: str) -> None:
        self._put(event="phase", index=index, phase=phase)

    def finished(self, job: Mapping[str, Any], outcomes: Mapping[int, CellOutcome]) -> None:
        for outcome in outcomes.values():
            outcome.host = environment()
        plain = {index: dataclasses.asdict(outcome) for index, outcome in outcomes.items()}
        self._put(event="finished", outcomes=plain)

    def flush(self) -> None:
        """Wait until the mailbox has everything: calls of one task arrive in order."""
        if self._last is not None:
            _ray().get(self._last)


class _Preparation:
    """A sink that keeps the only outcome there is."""

    outcome = CellOutcome("failed", "it was not prepared")

    def admit(self, job: Mapping[str, Any]) -> Mapping[str, Any]:
        return job

    def started(self, job: Mapping[str, Any]) -> None: ...
    def phase(self, job: Mapping[str, Any], index: int, phase: str) -> None: ...
    def finished(self, job: Mapping[str, Any], outcomes: Mapping[int, CellOutcome]) -> None:
        (self.outcome,) = outcomes.values()


@functools.cache
def _host(preload: tuple[str, ...], memory_limit: int | None) -> LocalExecutor:
    """Return the fork server of this Ray process; it ends with the process."""
    return LocalExecutor(ExecutorOptions(cores=1, preload=preload, memory_limit=memory_limit))


def run_job(
    job: Mapping[str, Any], preload: tuple[str, ...], memory_limit: int | None, mailbox: Any, attempt: str
) -> None:
    """Run one job on the node that this task was placed on."""
    host = _host(preload, memory_limit)
    gpus = _ray().get_runtime_context().get_accelerator_ids().get("GPU", [])
    host.slots = Slots(Needs.of(job).cores, host.slots.memory, [str(gpu) for gpu in gpus])
    forward = _Forward(mailbox, attempt)
    folder = Path(tempfile.mkdtemp(prefix="methodbench-ray-"))
    try:
        here = _at_home(job, folder)
        problem = "" if "prepare" in here else _unfit(here, host, folder)
        if problem:
            left = range(here["first"], len(here["cells"]))
            forward.finished(here, {index: CellOutcome("failed", problem) for index in left})
        else:
            host.run([here], forward)
        forward.flush()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _at_home(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the job with the folders of this node."""
    here = {**job, "out": str(folder), "log": str(folder / "log.txt"), "cache": str(sources.cache_dir())}
    if "prepare" in here:
        here["prepare"] = _model_at_home(here["prepare"], fetch=True)
    else:
        here["parts"] = [
            {**part, "model": _model_at_home(part["model"]) if part["model"] else None}
            for part in here["parts"]
        ]
    return here


def _model_at_home(model: Mapping[str, Any], *, fetch: bool = False) -> dict[str, Any]:
    here = {**model, "folder": str(prepared_folder(model["digest"]))}
    if fetch:
        found = sources.fetch(model["spec"], sha256=model["sha256"]).path
        here["source"] = str(found) if found else None
    return here


def _unfit(job: Mapping[str, Any], host: LocalExecutor, folder: Path) -> str:
    """Return why this node must not run the job, or an empty string; prepares the models that it lacks."""
    for part in job["parts"]:
        method, model = part["method"], part["model"]
        for one in (method, *method["links"]):
            if source_digest(one["impl"]) != one["source_digest"]:
                return f"node {os.uname().nodename} has another version of the method {one['name']}"
        if model is not None and not is_prepared(Path(model["folder"])):
            preparation = {
                **job,
                **job["preparation"],
                "id": f"{job['id']}-prepare",
                "first": 0,
                "out": str(folder),
                "log": str(folder / "prepare.txt"),
                "prepare": _model_at_home(model, fetch=True),
            }
            result = _Preparation()
            host.run([preparation], result)
            if result.outcome.status != "ok":
                return f"{model['name']} could not be prepared: {result.outcome.reason}"
    return ""


# On the driver's side


@dataclass(slots=True, eq=False)
class _Running:
    job: Mapping[str, Any]
    next_cell: int
    started: bool = False


class RayExecutor:
    """Runs jobs as tasks of a Ray cluster, local or at an address."""

    def __init__(self, options: ExecutorOptions) -> None:
        """Connect to the cluster at ``options.address``, or start one on this machine.

        Raises:
            MissingExtraError: Ray is not installed.
            MethodbenchError: no cluster answers at the address.
        """
        self._ray = _ray()
        self._options = options
        self._own = not self._ray.is_initialized()
        if self._own:
            self._connect(options)
        self._task = self._ray.remote(max_retries=0, max_calls=0)(run_job)
        self._mailbox: Any = None
        self._running: dict[str, _Running] = {}
        self._refs: dict[Any, str] = {}
        self._paused: list[tuple[float, Mapping[str, Any]]] = []
        self._next_place = 0.0

    def _connect(self, options: ExecutorOptions) -> None:
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # A task that asks for no GPU keeps what the environment says.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if not options.address:
            self._start_here(quiet)
            return
        try:
            self._ray.init(address=options.address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, ImportError) as error:
            raise MethodbenchError(
                f"no Ray cluster answers at {options.address}: {_first_line(error)}",
                "Start one with `ray start --head`, and give HOST:6379, or ray://HOST:10001 from outside of it.",
            ) from error

    def _start_here(self, quiet: Mapping[str, Any]) -> None:
        """Start a cluster of one node; Ray has fixed patience with its own processes, so a busy machine gets two."""
        problem: Exception | None = None
        for _ in range(2):
            try:
                self._ray.init(
                    address="local",
                    num_cpus=self._options.cores,
                    num_gpus=len(visible_gpus()),
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    **quiet,
                )
                return
            except Exception as error:
                # Ray raises bare exceptions when a process of its own does not come up in time.
                self._ray.shutdown()
                problem = error
        raise MethodbenchError(
            f"Ray does not start on this machine: {_first_line(problem)}",
            "The machine may be too busy: try again, or use the local executor, which needs no cluster.",
        ) from problem

    def _nodes(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def lacking(self, needs: Needs) -> str:
        if needs.gpu is not None:
            return f"{needs.device} names a GPU of one machine; on a cluster the device is cuda"
        for node in self._nodes():
            if needs.gpus <= node.get("GPU", 0) and needs.memory <= node.get("memory", 0) and node.get("CPU"):
                return ""
        wanted = [f"{needs.memory / 2**30:.1f} GiB of memory" if needs.memory else ""]
        wanted.append(f"{needs.gpus} GPU{'s' if needs.gpus > 1 else ''}" if needs.gpus else "")
        return f"no node of the Ray cluster has {' and '.join(filter(None, wanted)) or 'a CPU'}"

    def run(self, jobs: Sequence[Mapping[str, Any]], sink: Sink) -> None:
        waiting = deque(jobs)
        while waiting or self._running or self._paused:
            self._resume(waiting)
            while waiting and len(self._running) < self._window():
                admitted = sink.admit(waiting.popleft())
                if admitted is not None:
                    self._send(admitted)
            if not self._refs:
                time.sleep(_LOOK_SECONDS if self._paused else 0)
                continue
            # Tasks that have ended first: what they sent is in the mailbox by then.
            done, _ = self._ray.wait(list(self._refs), num_returns=len(self._refs), timeout=_LOOK_SECONDS)
            try:
                events = self._ray.get(self._mailbox.take.remote())
            except self._ray.exceptions.RayActorError:
                self._lose_everything(waiting, sink)
                continue
            for event in events:
                self._handle(event, sink)
            for ref in done:
                self._end(ref, waiting, sink)
            self._check_places(sink)

    def close(self) -> None:
        for ref in self._refs:
            # The fork server of a task ends when its process does, and takes its workers along.
            self._ray.cancel(ref, force=True)
        self._refs.clear()
        self._running.clear()
        self._paused.clear()
        if self._mailbox is not None:
            self._ray.kill(self._mailbox)
        if self._own:
            self._ray.shutdown()

    def _window(self) -> int:
        return max(16, 4 * int(sum(node.get("CPU", 0) for node in self._nodes())))

    def _send(self, job: Mapping[str, Any]) -> None:
        if self._mailbox is None:
            self._mailbox = self._ray.remote(num_cpus=0)(Mailbox).remote()
        needs = Needs.of(job)
        widest = max((node.get("CPU", 0) for node in self._nodes()), default=1)
        # A job that lost its node has one to itself, so that it can take no other along.
        cores = widest if "losses" in job else min(needs.cores, widest)
        resources: dict[str, Any] = {"num_cpus": cores, "num_gpus": needs.gpus}
        if needs.memory:
            resources["memory"] = needs.memory
        attempt = uuid.uuid4().hex
        task = self._task.options(**resources)
        preload, limit = tuple(self._options.preload), self._options.memory_limit
        ref = task.remote(job, preload, limit, self._mailbox, attempt)
        self._running[attempt] = _Running(job, job["first"])
        self._refs[ref] = attempt

    def _handle(self, event: Mapping[str, Any], sink: Sink) -> None:
        running = self._running.get(event["attempt"])
        if running is None:
            # From a task that was given up: its cells are run by another.
            return
        match event["event"]:
            case "started":
                if not running.started:
                    sink.started(running.job)
                running.started = True
            case "phase":
                sink.phase(running.job, event["index"], event["phase"])
            case "finished":
                outcomes = {index: CellOutcome(**outcome) for index, outcome in event["outcomes"].items()}
                running.next_cell = max(outcomes) + 1
                sink.finished(running.job, outcomes)

    def _end(self, ref: Any, waiting: deque[Mapping[str, Any]], sink: Sink) -> None:
        """Handle a task that has ended: well, or with its process or node."""
        exceptions = self._ray.exceptions
        running = self._running.pop(self._refs.pop(ref))
        try:
            self._ray.get(ref)
            problem, status = "its task ended early", "failed"
        except exceptions.OutOfMemoryError:
            problem, status = "Ray ended its task because the node ran out of memory", "oom"
        except exceptions.RayTaskError as error:
            problem, status = f"its Ray task failed: {_last_line(error)}", "failed"
        except exceptions.RayError as error:
            problem, status = f"its Ray task was lost: {_first_line(error)}", "failed"
        self._settle(running, waiting, sink, status, problem)

    def _settle(
        self, running: _Running, waiting: deque[Mapping[str, Any]], sink: Sink, status: str, problem: str
    ) -> None:
        job, index, count = running.job, running.next_cell, len(running.job["cells"])
        if index >= count:
            return
        same = job["first"] == index
        losses = (job.get("losses", 0) if same else 0) + running.started
        misses = (job.get("misses", 0) if same else 0) + (not running.started)
        again = {**job, "first": index, "losses": losses, "misses": misses}
        if losses >= _LOSSES or misses >= _MISSES:
            sink.finished(job, {index: CellOutcome(status, problem)})
            if index + 1 < count:
                waiting.appendleft({**job, "first": index + 1, "losses": 0, "misses": 0})
        elif running.started:
            waiting.appendleft(again)
        else:
            pause = _FIRST_PAUSE_SECONDS * 2 ** (misses - 1)
            self._paused.append((time.monotonic() + pause, again))

    def _resume(self, waiting: deque[Mapping[str, Any]]) -> None:
        """Put the jobs whose pause is over to the front of what waits."""
        now = time.monotonic()
        waiting.extendleft(job for until, job in self._paused if until <= now)
        self._paused = [(until, job) for until, job in self._paused if until > now]

    def _lose_everything(self, waiting: deque[Mapping[str, Any]], sink: Sink) -> None:
        """The node of the mailbox is gone: what runs can no longer report, and starts anew with another one.

        That is no cell's fault, so that what had begun counts as if it had not.
        """
        for ref in self._refs:
            self._ray.cancel(ref, force=True)
        lost = list(self._running.values())
        self._refs.clear()
        self._running.clear()
        self._mailbox = None
        for running in lost:
            running.started = False
            self._settle(running, waiting, sink, "failed", "the node of the mailbox was lost every time")

    def _check_places(self, sink: Sink) -> None:
        """Report jobs that no node of the cluster can take any more."""
        now = time.monotonic()
        if now < self._next_place:
            return
        self._next_place = now + _PLACE_SECONDS
        for ref, attempt in list(self._refs.items()):
            running = self._running[attempt]
            reason = "" if running.started else self.lacking(Needs.of(running.job))
            if reason:
                self._ray.cancel(ref, force=True)
                del self._refs[ref], self._running[attempt]
                left = range(running.next_cell, len(running.job["cells"]))
                sink.finished(running.job, {index: CellOutcome("failed", reason) for index in left})


def _first_line(error: BaseException | None) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
