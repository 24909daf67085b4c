"""The fork server: imports torch once, then forks one worker per job.

It reads one JSON command per line from standard input and writes one JSON event per line to standard output. It
stays fork-safe: it imports, but runs no parallel operator and never touches an accelerator, since a child of a
process whose OpenMP pool has run can hang, and a CUDA context does not survive a fork. When the driver goes away
(end of input), it kills its workers and leaves; when it is killed itself, the kernel takes its workers along.

A worker is the subreaper of what it starts, and the server is that of its workers: whatever a worker leaves behind,
in whichever session, becomes a child of the server when the worker ends, and is killed then.

Commands: ``{"do": "start", "job": {...}}``. Events: ``ready``; ``started`` with ``pid``; ``cell`` and ``phase`` from
workers; ``exit`` with ``status`` as ``os.waitstatus_to_exitcode`` gives it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from methodbench import provenance

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
#: Seconds for the modules that are imported before the first fork; then SIGALRM ends the server.
_PRELOAD_SECONDS = 300
#: The kernel that runs out of memory takes a worker before anything else of the user's.
_OOM_SCORE = "800"


def _emit(fd: int, event: Mapping[str, Any]) -> None:
    # One write of less than PIPE_BUF bytes is atomic, so that workers and server can share the pipe.
    line = json.dumps(event).encode() + b"\n"
    os.write(
        fd, line if len(line) < select.PIPE_BUF else json.dumps({**event, "phase": "..."}).encode() + b"\n"
    )


def _child(job: Mapping[str, Any], events: int, server: int) -> None:
    """Become the worker: a process group of its own, output to the job's log, death with the server."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            # It died before the kernel was asked to tell.
            os._exit(1)
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write(_OOM_SCORE)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # For libraries that are loaded from here on; those that are there already are told by the worker.
    os.environ["OMP_NUM_THREADS"] = str(job["threads"])
    os.environ.update(job["environment"])
    from methodbench.engine.worker import execute

    execute(job, lambda event: _emit(events, {"job": job["id"], **event}))


def main(preload: list[str]) -> None:
    """Serve until standard input ends.

    Args:
        preload: modules and implementations to import before the first fork; those that fail are left to the workers
            to report.
    """
    events = os.dup(1)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.alarm(_PRELOAD_SECONDS)
    for name in preload:
        module, _, attribute = name.partition(":")
        with contextlib.suppress(Exception):
            importlib.import_module(module)
            if attribute:
                # Workers compare it with what was planned; it is the source of what they inherit.
                provenance.source_digest(name)
    signal.alarm(0)
    # Objects made so far are moved out of the collector's sight, so that children do not copy their pages.
    gc.collect()
    gc.freeze()
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_read, False)
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write)
    workers: dict[int, str] = {}
    _emit(events, {"event": "ready"})
    buffer = b""
    while True:
        readable, _, _ = select.select([0, wake_read], [], [])
        if wake_read in readable:
            os.read(wake_read, 4096)
            _reap(workers, events)
        if 0 in readable:
            chunk = os.read(0, 1 << 20)
            if not chunk:
                break
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                _start(json.loads(line)["job"], workers, events)
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _start(job: Mapping[str, Any], workers: dict[int, str], events: int) -> None:
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _child(job, events, server)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    workers[pid] = job["id"]
    _emit(events, {"event": "started", "job": job["id"], "pid": pid})


def _reap(workers: dict[int, str], events: int) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        job = workers.pop(pid, None)
        # Whatever the worker started and left behind ends with it.
        if job is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        for left in _children():
            if left not in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(left, signal.SIGKILL)
        if job is not None:
            _emit(events, {"event": "exit", "job": job, "status": os.waitstatus_to_exitcode(status)})


def _children() -> list[int]:
    """Return the children of this process; none where the system does not tell."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as children:
            return [int(pid) for pid in children.read().split()]
    except OSError:
        return []


if __name__ == "__main__":
    main(sys.argv[1:])
