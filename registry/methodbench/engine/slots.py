"""What a machine offers and what jobs take of it: CPU cores, memory, and each GPU."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Needs:
    """What one job needs of a machine while it runs."""

    cores: int
    memory: int = 0
    """Bytes that method and task declare; 0 where they declare nothing."""
    gpus: int = 0
    device: str = "cpu"
    """``cpu``, ``cuda`` (any GPU) or ``cuda:N`` (that one)."""

    @classmethod
    def of(cls, job: Mapping[str, Any]) -> Needs:
        """Return the needs of a job as the driver wrote them."""
        return cls(**job["needs"])

    @property
    def gpu(self) -> int | None:
        """Index of the one GPU that is asked for by number; None where any will do."""
        name, _, index = self.device.partition(":")
        return int(index) if name == "cuda" and index else None


@dataclass(slots=True)
class Grant:
    """What a running job holds."""

    cores: int
    memory: int
    gpus: tuple[int, ...] = ()


@dataclass(slots=True)
class Slots:
    """The free part of a machine.

    A job that must wait keeps what it lacks from being taken by jobs behind it, so that it is not overtaken for ever;
    jobs that need nothing of that may pass.
    """

    cores: int
    memory: int
    gpus: Sequence[str]
    """How ``CUDA_VISIBLE_DEVICES`` names each GPU."""
    used_cores: int = 0
    used_memory: int = 0
    busy: set[int] = field(default_factory=set)
    """GPUs that a job holds."""
    lost: set[int] = field(default_factory=set)
    """GPUs held by a process that cannot be killed."""

    def lacking(self, needs: Needs) -> str:
        """Return why this machine can never run such a job, or an empty string."""
        if needs.memory > self.memory:
            wanted, there = needs.memory / GIB, self.memory / GIB
            return f"needs {wanted:.1f} GiB of memory, and {there:.1f} GiB may be used here"
        count = len(self.gpus)
        if needs.gpu is not None and needs.gpu >= count:
            return f"needs {needs.device}, and this machine offers {_gpus(count)}"
        if needs.gpus > count:
            return f"needs {_gpus(needs.gpus)}, and this machine offers {_gpus(count)}"
        usable = count - len(self.lost)
        if needs.gpus > usable or needs.gpu in self.lost:
            return "every GPU that would do is held by a process that cannot be killed"
        return ""

    def missing(self, needs: Needs) -> set[str]:
        """Return which resources are not free for such a job at the moment."""
        missing = set()
        if self.used_cores + min(needs.cores, self.cores) > self.cores:
            missing.add("cores")
        if needs.memory and self.used_memory + needs.memory > self.memory:
            missing.add("memory")
        if needs.gpus and len(self._free(needs)) < needs.gpus:
            missing.add("gpus")
        return missing

    def _free(self, needs: Needs) -> list[int]:
        taken = self.busy | self.lost
        free = [index for index in range(len(self.gpus)) if index not in taken]
        if needs.gpu is None:
            return free
        # The GPU that is named comes first: it is device 0 of the worker.
        return [needs.gpu, *(index for index in free if index != needs.gpu)] if needs.gpu in free else []

    def take(self, needs: Needs) -> Grant:
        """Take what a job needs; the caller has seen that nothing is missing."""
        gpus = tuple(self._free(needs)[: needs.gpus]) if needs.gpus else ()
        grant = Grant(min(needs.cores, self.cores), needs.memory, gpus)
        self.used_cores += grant.cores
        self.used_memory += grant.memory
        self.busy |= set(gpus)
        return grant

    def give_back(self, grant: Grant, *, stuck: bool = False) -> None:
        """Free what a job held, once; after a process that cannot be killed, its GPUs stay out of use."""
        self.used_cores -= grant.cores
        self.used_memory -= grant.memory
        self.busy -= set(grant.gpus)
        if stuck:
            self.lost |= set(grant.gpus)
        grant.cores, grant.memory, grant.gpus = 0, 0, ()

    def environment(self, grant: Grant) -> dict[str, str]:
        """Return the variables that show a worker its own GPUs and no other."""
        if not grant.gpus:
            return {}
        return {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": ",".join(self.gpus[index] for index in grant.gpus),
        }


def _gpus(count: int) -> str:
    return {0: "no GPU", 1: "1 GPU"}.get(count, f"{count} GPUs")


@functools.cache
def visible_gpus() -> tuple[str, ...]:
    """Return the names of the GPUs that this process may use, without touching any of them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return tuple(name.strip() for name in chosen.split(",") if name.strip() and name.strip() != "-1")
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    count = sum(line.startswith("GPU ") for line in answer.stdout.splitlines())
    return tuple(str(index) for index in range(count))
