"""Cells, their identity, and the jobs that workers run.

A cell is one method with its hyperparameters on one model and one task under one seed. Its key is the digest of
:func:`identity`, and of nothing else: two cells with the same key are the same experiment.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from methodbench.engine.slots import GIB, Needs
from methodbench.entries import Method, Model, Task
from methodbench.provenance import digest

#: Version of :meth:`Cell.identity`; raised when its fields or their meaning change.
IDENTITY_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One experiment of a plan."""

    method: Method
    variant: str
    params_passed: Mapping[str, Any]
    params: Mapping[str, Any]
    model: Model | None
    task: Task
    task_passed: Mapping[str, Any]
    task_params: Mapping[str, Any]
    seed: int
    dtype: str
    device: str
    threads: int
    timeout: float
    suite: str
    method_digest: str
    weights_digest: str
    data_digest: str
    tuning: Mapping[str, Any] = field(default_factory=dict)
    """How its hyperparameters were chosen; no part of its identity. Kept among the facts of its record."""
    key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", digest(self.identity()))

    def identity(self) -> dict[str, Any]:
        """Return the fields that make this cell what it is (version 2).

        ``method_params`` and ``task_params`` are complete, so that a changed default makes another cell;
        ``method_digest`` covers the method's source and the shared code it imports; ``weights_digest`` covers the
        weights, the loader's source and its arguments; ``device_class`` is ``cpu`` or ``cuda``; ``threads`` is the
        count of CPU threads that the cell computes with, since a sum over another count of threads is rounded
        differently, and methods that feed errors forward make that visible in the third digit.
        Version 1 lacked ``threads``.
        """
        return {
            "version": IDENTITY_VERSION,
            "method": self.method.name,
            "method_params": dict(self.params),
            "method_digest": self.method_digest,
            "model": self.model.name if self.model else "",
            "weights_digest": self.weights_digest,
            "task": self.task.name,
            "task_params": dict(self.task_params),
            "protocol": self.task.protocol,
            "data_digest": self.data_digest,
            "seed": self.seed,
            "dtype": self.dtype,
            "device_class": self.device.partition(":")[0],
            "threads": self.threads,
        }

    @property
    def needs(self) -> Needs:
        """What a machine must have free for this cell."""
        asked = (self.method.resources, self.task.resources)
        gpus = max(1, *(one.gpus for one in asked)) if self.device != "cpu" else 0
        return Needs(
            cores=max(self.threads, *(one.cores for one in asked)),
            memory=int(max(one.memory for one in asked) * GIB),
            gpus=gpus,
            device=self.device,
        )

    @property
    def label(self) -> str:
        """One line that tells the cell from others of its plan."""
        method = f"{self.method.name} ({self.variant})" if self.variant else self.method.name
        parts = [method, self.model.name if self.model else "", self.task.name, f"seed {self.seed}"]
        return " · ".join(filter(None, parts))

    def command(self) -> str:
        """Return the command line that runs this cell alone."""
        words = ["methodbench", "run", "--method", self.method.name]
        for name, value in self.params_passed.items():
            words += ["--param", f"{name}={_literal(value)}"]
        if self.model:
            words += ["--model", self.model.name]
        words += ["--task", self.task.name]
        for name, value in self.task_passed.items():
            words += ["--task-param", f"{name}={_literal(value)}"]
        words += ["--seed", str(self.seed)]
        if self.dtype != "float32":
            words += ["--dtype", self.dtype]
        if self.device != "cpu":
            words += ["--device", self.device]
        if self.threads != self.task.threads:
            words += ["--threads", str(self.threads)]
        return shlex.join(words)


def _literal(value: Any) -> str:
    """Write a value so that the command line's YAML scalars read it back."""
    import yaml

    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
    )


@dataclass(frozen=True, slots=True)
class Job:
    """Cells that share a method, its settings, a model and a seed, run one after the other by one worker.

    The model is loaded once for all of them, and compressed once for all that calibrate on the same inputs.
    """

    cells: tuple[Cell, ...]

    @property
    def threads(self) -> int:
        """CPU threads, the same for all of its cells."""
        return self.cells[0].threads


def group_jobs(cells: list[Cell]) -> list[Job]:
    """Group cells into jobs; cells of one model stay together, and what needs least comes first within it."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        shared = [
            cell.model.name if cell.model else cell.task.name,
            cell.method.name,
            cell.method_digest,
            dict(cell.params),
            cell.weights_digest,
            cell.seed,
            cell.dtype,
            cell.device,
            cell.threads,
            dataclasses.astuple(cell.task.resources),
        ]
        groups.setdefault(digest(shared), []).append(cell)
    jobs = [Job(tuple(group)) for group in groups.values()]
    first_seen: dict[str, int] = {}
    for job in jobs:
        first_seen.setdefault(job.cells[0].model.name if job.cells[0].model else "", len(first_seen))
    return sorted(
        jobs,
        key=lambda job: (
            first_seen[job.cells[0].model.name if job.cells[0].model else ""],
            not job.cells[0].method.baseline,
        ),
    )
