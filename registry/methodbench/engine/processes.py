"""Looking at processes and ending them: a worker counts with everything that it started."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil


def descendants(pid: int) -> list[int]:
    """Return the process and everything below it, whatever session or group it is in; empty when it is gone."""
    found: list[int] = []
    pending = [pid]
    while pending:
        one = pending.pop()
        try:
            tasks = os.listdir(f"/proc/{one}/task")
        except OSError:
            if not Path("/proc/self/task").is_dir():
                return _descendants_elsewhere(pid)
            continue
        found.append(one)
        for task in tasks:
            # A thread or a process may end between two looks.
            with contextlib.suppress(OSError):
                pending += map(int, Path(f"/proc/{one}/task/{task}/children").read_text().split())
    return found


def _descendants_elsewhere(pid: int) -> list[int]:
    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.Error:
        return []


def resident_bytes(pid: int, limit: int) -> int:
    """Return the memory of a process with everything below it.

    The sum of resident sets counts shared pages once per process; so above ``limit`` the proportional sets decide,
    where the system tells them.
    """
    family = descendants(pid)
    total = sum(map(_resident, family))
    if total <= limit or len(family) == 1:
        return total
    return sum(map(_proportional, family))


def _resident(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _proportional(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return _resident(pid)
    return _resident(pid)


def send_signal(pid: int, number: signal.Signals) -> None:
    """Send a signal to the process group that ``pid`` leads, and to what has left that group."""
    for one in descendants(pid):
        if one != pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(one, number)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def is_alive(pid: int) -> bool:
    """Return whether a process still runs; one that waits to be reaped does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@contextlib.contextmanager
def terminate_like_interrupt() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP as Ctrl-C: workers are ended, what is finished is kept. Main thread only."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
