"""Executors: how jobs become processes. The local one is here; others come through the hook."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

#: Seconds between SIGTERM and SIGKILL.
_GRACE = 2.0
#: Seconds between two looks at the workers' time and memory.
_LOOK_SECONDS = 0.1
_LOG_TAIL = 8000
#: A server that dies this often without finishing anything is not started again.
_MAX_DEATHS = 3


@dataclass(slots=True)
class CellOutcome:
    """What became of one cell: what the worker wrote, or why it wrote nothing."""

    status: str
    reason: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)
    log_tail: str = ""


class Sink(Protocol):
    """Receives what happens, on the driver's side."""

    def started(self, job: Mapping[str, Any]) -> None:
        """A worker began with ``job``."""

    def phase(self, job: Mapping[str, Any], phase: str) -> None:
        """The worker of ``job`` entered a phase."""

    def finished(self, job: Mapping[str, Any], index: int, outcome: CellOutcome) -> None:
        """Cell ``index`` of ``job`` came to an end, one way or another. Called once per cell."""


class Executor(Protocol):
    """Runs jobs; the driver behind the sink is the only one that writes records."""

    def run(self, jobs: Sequence[Mapping[str, Any]], sink: Sink) -> None:
        """Run every job to its end and report every cell of it."""

    def close(self) -> None:
        """End every worker that still runs and free what the executor holds; called once, also after errors."""


@dataclass(slots=True)
class _Running:
    job: Mapping[str, Any]
    pid: int = 0
    next_cell: int = 0
    deadline: float = float("inf")
    limit: float = 0.0
    log_start: int = 0
    """Where the log of the cell that runs begins."""
    released: bool = False
    """True once its last cell is on disk: what is left is to leave, so that its cores are free."""
    verdict: tuple[str, str] | None = None
    """(status, reason) once the driver has decided to end it."""
    terminated_at: float | None = None


class LocalExecutor:
    """A fork server on this machine, with as many workers as their threads fit on its cores."""

    def __init__(self, *, cores: int, preload: Iterable[str], memory_limit: int | None = None) -> None:
        """
        Args:
            cores: CPU cores to fill.
            preload: modules that the server imports before it forks.
            memory_limit: resident bytes above which a worker is ended; by default 90 % of the machine's memory.
        """
        self.cores = cores
        self.preload = list(preload)
        self.memory_limit = memory_limit or int(psutil.virtual_memory().total * 0.9)
        self._server: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._running: dict[str, _Running] = {}
        self._oom_kills = _oom_kills()
        self._next_look = 0.0

    def run(self, jobs: Sequence[Mapping[str, Any]], sink: Sink) -> None:
        waiting = deque(jobs)
        deaths = 0
        written: list[_Running] = []
        while waiting or self._running:
            if self._server is None:
                # A module that kills the server while it is imported must not do so again.
                self._start_server(self.preload if deaths == 0 else [])
            while waiting and self._fits(waiting[0]):
                self._send(waiting.popleft())
            # Records are written while the next worker starts.
            for running in written:
                self._collect(running, sink)
            written.clear()
            for event in self._events(timeout=0.1):
                if event["event"] == "died":
                    deaths += 1
                    self._requeue(waiting, sink, give_up=deaths >= _MAX_DEATHS)
                else:
                    self._handle(event, waiting, sink, written)
            self._watch()

    # Processes

    def _start_server(self, preload: Sequence[str]) -> None:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        # cuBLAS is deterministic only with a fixed workspace, chosen before the library is loaded.
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self._buffer = b""
        self._server = subprocess.Popen(
            [sys.executable, "-m", "methodbench.engine.forkserver", *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )

    def _send(self, job: Mapping[str, Any]) -> None:
        assert self._server is not None
        assert self._server.stdin is not None
        log = Path(job["log"])
        log_start = log.stat().st_size if log.exists() else 0
        self._running[job["id"]] = _Running(job, next_cell=job["first"], log_start=log_start)
        # A server that is gone shows as end of its output, and the job goes back to the queue then.
        with contextlib.suppress(BrokenPipeError):
            self._server.stdin.write(json.dumps({"do": "start", "job": job}).encode() + b"\n")
            self._server.stdin.flush()

    def close(self) -> None:
        for running in self._running.values():
            self._signal(running, signal.SIGKILL)
        self._running.clear()
        server, self._server = self._server, None
        if server is None:
            return
        assert server.stdin is not None
        assert server.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            server.stdin.close()
        try:
            server.wait(timeout=_GRACE)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        server.stdout.close()

    @staticmethod
    def _signal(running: _Running, number: signal.Signals) -> None:
        if running.pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(running.pid, number)

    # Scheduling

    def _cores_of(self, job: Mapping[str, Any]) -> int:
        # A job that was there when the server died has the machine to itself, so that it can take no other along.
        return self.cores if "again" in job else min(job["threads"], self.cores)

    def _fits(self, job: Mapping[str, Any]) -> bool:
        used = sum(self._cores_of(running.job) for running in self._running.values() if not running.released)
        return used + self._cores_of(job) <= self.cores

    def _requeue(self, waiting: deque[Mapping[str, Any]], sink: Sink, *, give_up: bool) -> None:
        """After the server's death: cells that wrote a result count; the one that ran is tried once more."""
        if self._server is not None:
            self._server.wait()
            self._server = None
        for running in list(self._running.values()):
            self._collect(running, sink)
            again = {**running.job, "first": running.next_cell, "again": True}
            stuck = "again" in running.job and running.job["first"] == running.next_cell
            if give_up or stuck:
                reason = "the fork server died while this cell ran"
                self._give_up_cell(running, waiting, sink, "failed", reason)
            elif running.next_cell < len(_cells(again)):
                waiting.appendleft(again)
        self._running.clear()
        if give_up:
            for job in waiting:
                for index in range(job["first"], len(_cells(job))):
                    sink.finished(job, index, CellOutcome("failed", "the fork server died repeatedly"))
            waiting.clear()

    # Events

    def _events(self, timeout: float) -> list[dict[str, Any]]:
        assert self._server is not None
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
        running = self._running.get(event.get("job", ""))
        if running is None:
            return
        match event["event"]:
            case "started":
                running.pid = event["pid"]
                self._arm(running, running.next_cell)
                sink.started(running.job)
            case "phase":
                sink.phase(running.job, event["phase"])
            case "cell":
                written.append(running)
                running.released = event["index"] + 1 == len(_cells(running.job))
                self._arm(running, event["index"] + 1)
            case "exit":
                del self._running[running.job["id"]]
                self._collect(running, sink)
                status, reason = running.verdict or _explain_exit(event["status"], self._oom_kills)
                self._give_up_cell(running, waiting, sink, status, reason)

    def _arm(self, running: _Running, cell: int) -> None:
        cells = _cells(running.job)
        running.limit = cells[cell]["timeout"] if cell < len(cells) else _GRACE
        running.deadline = time.monotonic() + running.limit

    def _collect(self, running: _Running, sink: Sink) -> None:
        """Report the cells whose results are on disk."""
        folder = Path(running.job["out"])
        while running.next_cell < len(_cells(running.job)):
            path = folder / f"{running.next_cell}.json"
            if not path.is_file():
                return
            result = json.loads(path.read_bytes())
            end = result.get("log_end")
            tail = read_tail(running.job["log"], running.log_start, end)
            running.log_start = end or 0
            outcome = CellOutcome(result["status"], result.get("reason", ""), result, tail)
            path.unlink()
            sink.finished(running.job, running.next_cell, outcome)
            running.next_cell += 1

    @staticmethod
    def _give_up_cell(
        running: _Running, waiting: deque[Mapping[str, Any]], sink: Sink, status: str, reason: str
    ) -> None:
        """Report the cell that ran when its worker ended; those behind it get another worker."""
        index, count = running.next_cell, len(_cells(running.job))
        if index < count:
            outcome = CellOutcome(status, reason, {}, read_tail(running.job["log"], running.log_start))
            sink.finished(running.job, index, outcome)
        if index + 1 < count:
            waiting.appendleft({**running.job, "first": index + 1})

    def _watch(self) -> None:
        """End workers that are over their time or memory: SIGTERM, then SIGKILL, to the whole process group."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        for running in self._running.values():
            if running.terminated_at is not None:
                if now - running.terminated_at > _GRACE:
                    self._signal(running, signal.SIGKILL)
                continue
            if not running.pid:
                continue
            if now > running.deadline:
                running.verdict = ("timeout", f"took more than {running.limit:g} s")
            elif (resident := _resident(running.pid)) > self.memory_limit:
                used, limit = resident / 2**30, self.memory_limit / 2**30
                running.verdict = ("oom", f"held {used:.1f} GiB, more than the limit of {limit:.1f} GiB")
            if running.verdict:
                running.terminated_at = now
                self._signal(running, signal.SIGTERM)


def _cells(job: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return job["cells"]


def _resident(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _explain_exit(status: int, oom_kills_before: int) -> tuple[str, str]:
    if status >= 0:
        return "failed", f"the worker left with exit code {status} before it had a result"
    if -status == signal.SIGKILL and _oom_kills() > oom_kills_before:
        return "oom", "killed by the kernel because memory ran out"
    return "failed", f"killed by {signal.Signals(-status).name}"


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
