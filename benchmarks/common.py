"""What the comparisons with peers share: alternating timing, a table of figures, a model to measure on."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from methodbench.torchkit.model import LoadedModel


@dataclass(frozen=True)
class Figure:
    """One number of ours beside a peer's, both rates (more is better)."""

    name: str
    ours: float
    peer: float
    limit: float
    """Smallest ratio that is good enough."""
    unit: str

    @property
    def ratio(self) -> float:
        """Ours over the peer's."""
        return self.ours / self.peer

    @property
    def met(self) -> bool:
        """Whether the ratio reaches the limit."""
        return self.ratio >= self.limit


def parser(description: str, rounds: int = 5) -> argparse.ArgumentParser:
    """Return a parser with the options that every comparison has."""
    options = argparse.ArgumentParser(description=description.strip().splitlines()[0])
    options.add_argument("--rounds", type=int, default=rounds, help="timed runs of each contestant")
    options.add_argument("--json", type=Path, help="file to write the figures to")
    return options


def add_benchopt(options: argparse.ArgumentParser) -> None:
    """Add the option that names benchopt, which lives in an environment of its own."""
    options.add_argument(
        "--benchopt",
        default=os.environ.get("METHODBENCH_BENCHOPT", ""),
        help="an interpreter that has benchopt",
    )


def benchopt_of(given: argparse.Namespace) -> str | None:
    """Return the interpreter that has benchopt; say how to get one where there is none."""
    if given.benchopt and shutil.which(given.benchopt) is not None:
        return str(given.benchopt)
    print("no benchopt: nothing is measured. Make an environment with `pip install benchopt` and name its")
    print("interpreter with --benchopt or METHODBENCH_BENCHOPT.")
    return None


def alternate(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Return the median seconds of each contestant.

    Each runs once unmeasured; then rounds alternate between contestants, so that whatever else the machine does
    hits all alike.

    Args:
        clock: gives seconds; ``time.process_time`` leaves out what other processes take of the processor.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for _ in range(rounds):
        for name, run in contestants.items():
            gc.collect()
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def rate(cells: int, many: float, few: float) -> float:
    """Return cells per second from the seconds of a run of many cells and of one that has ``cells`` fewer.

    Raises:
        SystemExit: the longer run took no longer, so that a busy machine was all that was measured.
    """
    if many <= few:
        raise SystemExit(
            f"{cells} more cells took {many - few:.2f} s: the machine is too busy; give more --cells or --rounds"
        )
    return cells / (many - few)


def report(figures: Iterable[Figure], path: Path | None) -> int:
    """Print one row per figure, write them as JSON, and return 1 when a limit was missed, else 0."""
    rows = list(figures)
    print(f"{'figure':40} {'ours':>10} {'peer':>10} {'ratio':>7} {'limit':>7}  unit")
    for row in rows:
        mark = "" if row.met else "  below the limit"
        numbers = f"{row.ours:10.2f} {row.peer:10.2f} {row.ratio:7.3f} {row.limit:7.2f}"
        print(f"{row.name:40} {numbers}  {row.unit}{mark}")
    if path is not None:
        content = [dataclasses.asdict(row) | {"ratio": row.ratio, "met": row.met} for row in rows]
        path.write_text(json.dumps(content, indent=2) + "\n")
    return 0 if all(row.met for row in rows) else 1


def language_model(folder: Path | None) -> LoadedModel:
    """Return the language model in ``folder`` (safetensors, configuration, tokenizer), or SmolLM2-135M."""
    from methodbench import sources
    from methodbench.context import Context
    from methodbench_quant.models.causal_lm import GGUFCausalLM, HubCausalLM
    from methodbench_quant.models.entries import MODELS

    if folder is not None:
        return HubCausalLM().load(folder, Context())
    entry = next(model for model in MODELS if model.kind == "causal-lm")
    target = Path(tempfile.mkdtemp(prefix="methodbench-bench-"))
    GGUFCausalLM().prepare(sources.fetch(entry.source, sha256=entry.sha256).path, target, Context())
    return GGUFCausalLM().load(target, Context())
