"""Executors: how jobs become processes. The local one is here; others come through the hook."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import psutil

from methodbench.engine.processes import is_alive, resident_bytes, send_signal
from methodbench.engine.slots import Grant, Needs, Slots, visible_gpus

#: Seconds between SIGTERM and SIGKILL.
GRACE = 2.0
#: Seconds after SIGKILL at which a worker counts as stuck in the kernel (a GPU call, a dead network disk).
STUCK_SECONDS = 15.0
#: Seconds in which a server that is up must have forked a worker.
_START_SECONDS = 60.0
#: Seconds between two looks at the workers' time and memory.
_LOOK_SECONDS = 0.1
_LOG_TAIL = 8000
#: A server that dies this often without finishing anything is not started again.
_MAX_DEATHS = 3
#: How many finished cells are reported at once: what a kill of the driver can cost, where cells are that fast.
_TOGETHER = 100
#: How many waiting jobs are looked at for one that fits.
_WINDOW = 256


@dataclass(slots=True)
class CellOutcome:
    """What became of one cell: what the worker wrote, or why it wrote nothing."""

    status: str
    reason: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)
    log_tail: str = ""
    host: Mapping[str, Any] | None = None
    """Description of the machine that it ran on; None for the driver's own."""


class Sink(Protocol):
    """Receives what happens, on the driver's side."""

    def admit(self, job: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Say what of ``job`` is still to be run, right before it is sent; None when other drivers have all of it.

        A job may be admitted again when its worker or the server died.
        """

    def started(self, job: Mapping[str, Any]) -> None:
        """A worker began with ``job``."""

    def phase(self, job: Mapping[str, Any], index: int, phase: str) -> None:
        """The worker of ``job`` entered a phase of cell ``index``."""

    def finished(self, job: Mapping[str, Any], outcomes: Mapping[int, CellOutcome]) -> None:
        """Cells of ``job``, by index, came to an end, one way or another. Each cell is reported once.

        Cells that are reported together are recorded together, and on return they are.
        """


@dataclass(frozen=True, slots=True)
class ExecutorOptions:
    """What every executor is told."""

    cores: int
    """CPU cores to fill on this machine."""
    preload: Sequence[str] = ()
    """Modules that all workers import anyway."""
    memory_limit: int | None = None
    """Bytes above which a worker is ended, with everything that it started; by default 90 % of the memory."""
    address: str = ""
    """Where the cluster is (``--executor-address``); empty for this machine."""


class Executor(Protocol):
    """Runs jobs; the driver behind the sink is the only one that writes records."""

    def lacking(self, needs: Needs) -> str:
        """Return why a job with these needs can never run, or an empty string."""

    def run(self, jobs: Sequence[Mapping[str, Any]], sink: Sink) -> None:
        """Run every job to its end and report every cell of it."""

    def close(self) -> None:
        """End every worker that still runs and free what the executor holds; called once, also after errors."""


@dataclass(slots=True, eq=False)
class _Running:
    job: Mapping[str, Any]
    grant: Grant
    sent_at: float
    pid: int = 0
    next_cell: int = 0
    """The first cell that is not reported yet."""
    current: int = 0
    """The cell that the worker is at, as its events tell."""
    deadline: float = float("inf")
    limit: float = 0.0
    log_start: int = 0
    """Where the log of the cell that runs begins."""
    verdict: tuple[str, str] | None = None
    """(status, reason) once the driver has decided to end it."""
    terminated_at: float | None = None


class LocalExecutor:
    """A fork server on this machine, with as many workers as their needs fit on it."""

    def __init__(self, options: ExecutorOptions) -> None:
        self.options = options
        memory = int(psutil.virtual_memory().total * 0.9)
        self.memory_limit = options.memory_limit or memory
        self.slots = Slots(options.cores, memory, visible_gpus())
        self._server: subprocess.Popen[bytes] | None = None
        self._server_log: BinaryIO | None = None
        self._server_end = "died"
        self._ready = False
        self._preloads = True
        """False once a server has died while it imported modules."""
        self._progress = False
        """Whether a cell has come to its end since a server died last."""
        self._buffer = b""
        self._running: dict[str, _Running] = {}
        self._oom_kills = _oom_kills()
        self._next_look = 0.0

    def lacking(self, needs: Needs) -> str:
        return self.slots.lacking(needs)

    def run(self, jobs: Sequence[Mapping[str, Any]], sink: Sink) -> None:
        waiting = deque(jobs)
        deaths = 0
        written: list[_Running] = []
        while waiting or self._running:
            if self._server is None and waiting:
                # A module that kills the server while it is imported must not do so again.
                self._start_server(self.options.preload if self._preloads else [])
            self._send_what_fits(waiting, sink)
            # Records are written while the next worker starts.
            for running in written:
                self._collect(running, sink)
            written.clear()
            for event in self._events(timeout=0.1):
                if event["event"] == "died":
                    deaths = 1 if self._progress else deaths + 1
                    self._progress = False
                    self._requeue(waiting, sink, give_up=deaths >= _MAX_DEATHS)
                else:
                    self._handle(event, waiting, sink, written)
            self._watch(waiting, sink)

    # Processes

    def _start_server(self, preload: Sequence[str]) -> None:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        # cuBLAS is deterministic only with a fixed workspace, chosen before the library is loaded.
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self._buffer = b""
        self._ready = False
        self._server_log = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the server)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "methodbench.engine.forkserver", *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._server_log,
            env=environment,
            start_new_session=True,
        )

    def _send(self, job: Mapping[str, Any], grant: Grant) -> None:
        assert self._server is not None
        assert self._server.stdin is not None
        log = Path(job["log"])
        log_start = log.stat().st_size if log.exists() else 0
        job = {**job, "environment": {**job.get("environment", {}), **self.slots.environment(grant)}}
        if grant.gpus:
            # The worker sees its own GPUs alone, and the one that was asked for is the first of them.
            job["device"] = "cuda"
        self._running[job["id"]] = _Running(job, grant, time.monotonic(), next_cell=job["first"])
        self._running[job["id"]].log_start = log_start
        # A server that is gone shows as end of its output, and the job goes back to the queue then.
        with contextlib.suppress(BrokenPipeError):
            self._server.stdin.write(json.dumps({"do": "start", "job": job}).encode() + b"\n")
            self._server.stdin.flush()

    def close(self) -> None:
        for running in self._running.values():
            if running.pid:
                send_signal(running.pid, signal.SIGKILL)
        self._running.clear()
        server, self._server = self._server, None
        if server is None:
            return
        assert server.stdin is not None
        assert server.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            server.stdin.close()
        try:
            server.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        server.stdout.close()
        if self._server_log is not None:
            self._server_log.close()

    # Scheduling

    def _needs(self, job: Mapping[str, Any]) -> Needs:
        needs = Needs.of(job)
        # A job that was there when the server died has the machine to itself, so that it can take no other along.
        return Needs(self.slots.cores, needs.memory, needs.gpus, needs.device) if "again" in job else needs

    def _send_what_fits(self, waiting: deque[Mapping[str, Any]], sink: Sink) -> None:
        """Start the jobs that fit; what the first ones wait for is not taken by those behind them."""
        blocked: set[str] = set()
        started = []
        for position, job in enumerate(islice(waiting, _WINDOW)):
            needs = self._needs(job)
            if lacking := self.slots.lacking(needs):
                self._give_up_job(job, sink, CellOutcome("failed", lacking))
                started.append(position)
                continue
            asks = {"cores"} | ({"memory"} if needs.memory else set()) | ({"gpus"} if needs.gpus else set())
            if missing := self.slots.missing(needs):
                blocked |= missing
            elif not blocked & asks:
                started.append(position)
                admitted = sink.admit(job)
                if admitted is not None:
                    self._send(admitted, self.slots.take(needs))
            if "cores" in blocked:
                break
        for position in reversed(started):
            del waiting[position]

    def _requeue(self, waiting: deque[Mapping[str, Any]], sink: Sink, *, give_up: bool) -> None:
        """After the server's death: cells that wrote a result count; the one that ran is tried once more."""
        self._preloads = self._preloads and self._ready
        log = self._end_server()
        for running in list(self._running.values()):
            if running.pid:
                # The kernel ends workers with their server, but not what they started.
                send_signal(running.pid, signal.SIGKILL)
            self.slots.give_back(running.grant)
            self._collect(running, sink)
            again = {**running.job, "first": running.next_cell, "again": True}
            stuck = "again" in running.job and running.job["first"] == running.next_cell
            if running.verdict:
                self._give_up_cell(running, waiting, sink, *running.verdict)
            elif give_up or stuck:
                reason = f"the fork server {self._server_end} while this cell ran"
                self._give_up_cell(running, waiting, sink, "failed", reason)
            elif running.next_cell < len(_cells(again)):
                waiting.appendleft(again)
        self._running.clear()
        if give_up:
            reason = f"the fork server {self._server_end} repeatedly"
            for job in waiting:
                self._give_up_job(job, sink, CellOutcome("failed", reason, {}, log))
            waiting.clear()

    def _end_server(self) -> str:
        """Reap the server that died; return what it said last."""
        server, self._server = self._server, None
        if server is not None:
            assert server.stdin is not None
            assert server.stdout is not None
            status = server.wait()
            if status == -signal.SIGALRM:
                self._server_end = "took too long to import what it preloads"
            elif status < 0:
                self._server_end = f"died ({_signal_name(-status)})"
            server.stdout.close()
            # What it had not read is flushed here, to nobody.
            with contextlib.suppress(BrokenPipeError):
                server.stdin.close()
        if self._server_log is None:
            return ""
        self._server_log.seek(0)
        text = self._server_log.read()[-_LOG_TAIL:].decode("utf-8", "replace")
        self._server_log.close()
        return text

    # Events

    def _events(self, timeout: float) -> list[dict[str, Any]]:
        if self._server is None:
            return []
        assert self._server.stdout is not None
        readable, _, _ = select.select([self._server.stdout], [], [], timeout)
        if not readable:
            return []
        chunk = os.read(self._server.stdout.fileno(), 1 << 20)
        if not chunk:
            return [{"event": "died"}]
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def _handle(
        self,
        event: Mapping[str, Any],
        waiting: deque[Mapping[str, Any]],
        sink: Sink,
        written: list[_Running],
    ) -> None:
        if event["event"] == "ready":
            self._ready = True
            for running in self._running.values():
                running.sent_at = time.monotonic()
            return
        found = self._running.get(event.get("job", ""))
        if found is not None:
            self._handle_worker(found, event, waiting, sink, written)

    def _handle_worker(
        self,
        running: _Running,
        event: Mapping[str, Any],
        waiting: deque[Mapping[str, Any]],
        sink: Sink,
        written: list[_Running],
    ) -> None:
        match event["event"]:
            case "started":
                running.pid = event["pid"]
                self._arm(running, running.next_cell)
                sink.started(running.job)
            case "phase":
                sink.phase(running.job, running.current, event["phase"])
            case "cell":
                self._progress = True
                if running not in written:
                    written.append(running)
                if event["index"] + 1 == len(_cells(running.job)) and not running.grant.gpus:
                    # Its last cell is on disk: what is left is to leave. A GPU is free only when the process is gone.
                    self.slots.give_back(running.grant)
                self._arm(running, event["index"] + 1)
            case "exit":
                del self._running[running.job["id"]]
                self.slots.give_back(running.grant)
                self._collect(running, sink)
                status, reason = running.verdict or _explain_exit(event["status"], self._oom_kills)
                self._give_up_cell(running, waiting, sink, status, reason)

    def _arm(self, running: _Running, cell: int) -> None:
        cells = _cells(running.job)
        running.current = min(cell, len(cells) - 1)
        running.limit = cells[cell]["timeout"] if cell < len(cells) else GRACE
        running.deadline = time.monotonic() + running.limit

    def _collect(self, running: _Running, sink: Sink) -> None:
        """Report the cells whose results are on disk, at most ``_TOGETHER`` at a time."""
        ended: dict[int, CellOutcome] = {}
        while (outcome := _read_outcome(running)) is not None:
            ended[running.next_cell] = outcome
            running.next_cell += 1
            if len(ended) == _TOGETHER:
                sink.finished(running.job, ended)
                ended = {}
        if ended:
            sink.finished(running.job, ended)

    @staticmethod
    def _give_up_job(job: Mapping[str, Any], sink: Sink, outcome: CellOutcome) -> None:
        """Report the cells of a job that waits for a worker and gets none."""
        admitted = sink.admit(job)
        if admitted is not None:
            sink.finished(admitted, dict.fromkeys(range(admitted["first"], len(_cells(admitted))), outcome))

    @staticmethod
    def _give_up_cell(
        running: _Running, waiting: deque[Mapping[str, Any]], sink: Sink, status: str, reason: str
    ) -> None:
        """Report the cell that ran when its worker ended; those behind it get another worker."""
        index, count = running.next_cell, len(_cells(running.job))
        if index < count:
            outcome = CellOutcome(status, reason, {}, read_tail(running.job["log"], running.log_start))
            sink.finished(running.job, {index: outcome})
        if index + 1 < count:
            waiting.appendleft({**running.job, "first": index + 1})

    def _watch(self, waiting: deque[Mapping[str, Any]], sink: Sink) -> None:
        """End workers that are over their time or memory: SIGTERM, then SIGKILL, to all that they started."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        for running in list(self._running.values()):
            if running.terminated_at is not None:
                self._insist(running, now - running.terminated_at, waiting, sink)
                continue
            if not running.pid:
                if self._ready and now - running.sent_at > _START_SECONDS:
                    self._kill_server()
                continue
            if now > running.deadline:
                running.verdict = ("timeout", f"took more than {running.limit:g} s")
            elif (resident := resident_bytes(running.pid, self.memory_limit)) > self.memory_limit:
                used, limit = resident / 2**30, self.memory_limit / 2**30
                running.verdict = ("oom", f"held {used:.1f} GiB, more than the limit of {limit:.1f} GiB")
            if running.verdict:
                running.terminated_at = now
                send_signal(running.pid, signal.SIGTERM)

    def _insist(
        self, running: _Running, seconds: float, waiting: deque[Mapping[str, Any]], sink: Sink
    ) -> None:
        """Follow up a worker that was told to end ``seconds`` ago."""
        if seconds > GRACE:
            send_signal(running.pid, signal.SIGKILL)
        if seconds < GRACE + STUCK_SECONDS:
            return
        if not is_alive(running.pid):
            # It is gone, and the server does not say so: the server is the one that hangs.
            self._kill_server()
            return
        # Not even SIGKILL ends a process that waits inside the kernel. The run goes on without what it holds.
        del self._running[running.job["id"]]
        self.slots.give_back(running.grant, stuck=True)
        self._collect(running, sink)
        status, reason = running.verdict or ("timeout", "")
        reason = f"{reason}; its process {running.pid} is stuck and could not be killed"
        self._give_up_cell(running, waiting, sink, status, reason)

    def _kill_server(self) -> None:
        """End a server that does not answer; its death is handled like any other."""
        if self._server is not None:
            self._server.kill()


def _read_outcome(running: _Running) -> CellOutcome | None:
    """Take the result of a job's next cell from the disk; None while there is none."""
    if running.next_cell >= len(_cells(running.job)):
        return None
    path = os.path.join(running.job["out"], f"{running.next_cell}.json")
    try:
        with open(path, "rb") as file:
            result = json.loads(file.read())
    except FileNotFoundError:
        return None
    os.unlink(path)
    end = result.get("log_end")
    tail = read_tail(running.job["log"], running.log_start, end)
    running.log_start = end or 0
    return CellOutcome(result["status"], result.get("reason", ""), result, tail)


def _cells(job: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return job["cells"]


def _explain_exit(status: int, oom_kills_before: int) -> tuple[str, str]:
    if status >= 0:
        return "failed", f"the worker left with exit code {status} before it had a result"
    if -status == signal.SIGKILL and _oom_kills() > oom_kills_before:
        return "oom", "killed by the kernel because memory ran out"
    return "failed", f"killed by {_signal_name(-status)}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        # Real-time signals have numbers alone.
        return f"signal {number}"


def _oom_kills() -> int:
    """Return how often this kernel has killed a process for memory; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def read_tail(path: str, start: int = 0, end: int | None = None) -> str:
    """Return the last 8,000 bytes of a log between two positions; empty when there is none."""
    try:
        with open(path, "rb") as log:
            last = log.seek(0, os.SEEK_END) if end is None else end
            first = log.seek(max(start, last - _LOG_TAIL))
            return log.read(max(0, last - first)).decode("utf-8", "replace")
    except OSError:
        return ""
