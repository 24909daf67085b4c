"""What the engine tells an implementation about its cell."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from methodbench.torchkit.model import LoadedModel


@dataclass(slots=True)
class Context:
    """Seed, device, cache folder and log of one cell.

    Implementations draw every random number from generators seeded with :attr:`seed`, put tensors on
    :attr:`device`, and may keep files that are costly to make under :attr:`cache`.
    """

    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    cache: Path | None = None
    warnings: list[str] = field(default_factory=list)
    """What a reader of the result should know; shown on the run's page."""
    phases: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds by phase."""
    supplies: Mapping[str, Any] = field(default_factory=dict)
    """What a task hands to the training methods that list it in ``needs``: ``"replay"``, general samples as a pair of
    inputs and targets; ``"task-vectors"``, differences of fine-tuned from present weights by parameter name."""
    dense: LoadedModel | None = None
    """Inside a chain of compressors, the model before its first link: what a compensating link corrects towards. While
    a task evaluates a compressed model, the model as it was loaded: what a comparison is with."""

    def warn(self, message: str) -> None:
        """Attach a remark to the record, once, and write it to the log."""
        if message not in self.warnings:
            self.warnings.append(message)
            self.log(f"warning: {message}")

    def log(self, message: str) -> None:
        """Write one line to the cell's log, the tail of which is kept."""
        print(message, file=sys.stderr, flush=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the work; repeated phases add up."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start
