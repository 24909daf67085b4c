"""Locks between processes, held through a file."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock at ``path``, waiting for its holder.

    The system releases the lock when its holder ends, however it ends. Taking it twice in a thread deadlocks.
    The file stays behind: removing it would let two processes hold locks on different files of one name.

    Args:
        path: file of the lock; made, with its folders, where missing.

    Raises:
        OSError: the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
