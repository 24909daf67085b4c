"""Building the leaderboard from 1,000, 10,000 and 100,000 runs: seconds, memory, bytes, and how they grow.

    python benchmarks/site.py [--runs 1000 10000 100000] [--json FILE]

Every size is built in a process of its own, from a database of made-up records. The limits are the aims that the
project has set itself.
"""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from common import Figure, parser, report
from sqlalchemy import insert

#: Runs -> (seconds, GiB, MB of the site) that a build may take.
LIMITS = {1_000: (2.0, 1.5, 150.0), 10_000: (6.0, 1.5, 150.0), 100_000: (40.0, 1.5, 150.0)}
TASKS, SEEDS, UNITS = 20, 5, 32
START = datetime(2026, 1, 1, tzinfo=UTC)


def fill(path: Path, runs: int, *, methods: int = 100, tasks: int = TASKS) -> None:
    """Write ``runs`` made-up runs of up to ``methods`` methods on ``tasks`` tasks and 5 seeds to a new database."""
    from methodbench.store import Environment, MetricValue, Run, open_store

    rng = np.random.default_rng(runs)
    methods = min(methods, max(1, runs // (tasks * SEEDS)))
    base = rng.normal(3.0, 0.3, (tasks, UNITS))
    with open_store(str(path)) as store, store.engine.begin() as connection:
        connection.execute(
            insert(Environment),
            [{"digest": "e" * 64, "captured_at": START, "data": {"python": "3.12.1", "packages": {}}}],
        )
        for first in range(0, runs, 10_000):
            rows, metrics = [], []
            for number in range(first, min(first + 10_000, runs)):
                seed, rest = number % SEEDS, number // SEEDS
                task, rest = rest % tasks, rest // tasks
                method, model = rest % methods, rest // methods
                identifier = f"{number:012x}"
                scores = base[task] + 0.01 * method + rng.normal(0, 0.05, UNITS)
                value = float(np.exp(scores.mean()))
                names = (f"method-{method:03}", f"task-{task:02}", f"model-{model}")
                rows.append(_run(identifier, *names, seed, number))
                metrics.append(
                    {
                        "run_id": identifier, "name": "perplexity", "title": "perplexity", "unit": "",
                        "direction": "lower", "aggregate": "exp-mean", "primary": True, "value": value,
                        "low": value * 0.97, "high": value * 1.03, "units": UNITS,
                        "scores": scores.astype("<f8").tobytes(),
                    }
                )  # fmt: skip
            connection.execute(insert(Run), rows)
            connection.execute(insert(MetricValue), metrics)


def _run(identifier: str, method: str, task: str, model: str, seed: int, number: int) -> dict[str, Any]:
    params = {"bits": 4, "group_size": 64}
    identity = {"method": method, "task": task, "model": model, "seed": seed, "method_params": params}
    return {
        "id": identifier, "cell_key": f"{number:064x}", "identity": identity, "status": "ok", "method": method,
        "kind": "compressor", "family": "shrink", "variant": "w4", "params_passed": params, "params": params,
        "model": model, "model_kind": "causal-lm", "task": task, "task_params": {"windows": UNITS}, "protocol": 1,
        "seed": seed, "method_digest": "m" * 64, "weights_digest": "w" * 64, "data_digest": "d" * 64,
        "environment_digest": "e" * 64, "methodbench_version": "0.1.0", "suite": "synthetic",
        "command": f"methodbench run --method {method} --model {model} --task {task} --seed {seed}",
        "started_at": START + timedelta(seconds=number), "wall_seconds": 12.5,
        "phases": {"load": 1.0, "evaluate": 11.5},
        "peak_memory_bytes": 600_000_000, "storage": "real", "model_bytes": 90_000_000 + number,
        "bits_per_weight": 4.25,
        # The builder takes a seal for the digest of a record, whatever it is of.
        "seal": hashlib.sha256(identifier.encode()).hexdigest(),
        "facts": {"tokens": 16384}, "warnings": [], "log_tail": "a line of the log\n" * 4,
    }  # fmt: skip


def build_once(database: Path, out: Path) -> None:
    """Build the site and print seconds and peak memory as JSON: what a process of its own is started for."""
    from methodbench.catalog import load_catalog
    from methodbench.store import open_store
    from methodbench_leaderboard import build

    catalog = load_catalog()
    start = time.perf_counter()
    with open_store(str(database), create=False) as store:
        build(store, catalog, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak}))


def main() -> int:
    """Measure, print, and return 1 when a limit is missed."""
    options = parser(__doc__ or "")
    options.add_argument("--runs", type=int, nargs="+", default=sorted(LIMITS))
    options.add_argument(
        "--build", nargs=2, type=Path, help="build DATABASE into FOLDER and say what it took"
    )
    given = options.parse_args()
    if given.build:
        build_once(*given.build)
        return 0
    figures = []
    for runs in given.runs:
        with tempfile.TemporaryDirectory() as scratch:
            database, out = Path(scratch) / "results.db", Path(scratch) / "site"
            fill(database, runs)
            command = [sys.executable, __file__, "--build", str(database), str(out)]
            taken = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            files = [path for path in out.rglob("*") if path.is_file()]
            size = sum(path.stat().st_size for path in files)
            board = max((path.stat().st_size for path in (out / "boards").rglob("*.html")), default=0)
        seconds, memory, megabytes = LIMITS.get(runs, (40.0, 1.5, 150.0))
        print(f"{runs} runs: {len(files)} files, largest board page {board / 1e3:.0f} kB")
        figures += [
            Figure(f"{runs} runs: seconds", 1 / taken["seconds"], 1 / seconds, 1.0, "builds/s"),
            Figure(f"{runs} runs: memory", 2**30 / taken["peak"], 1 / memory, 1.0, "1/GiB"),
            Figure(f"{runs} runs: size", 1e6 / size, 1 / megabytes, 1.0, "1/MB"),
        ]
        print(f"  {taken['seconds']:.1f} s, {taken['peak'] / 2**30:.2f} GiB, {size / 1e6:.1f} MB", flush=True)
    return report(figures, given.json)


if __name__ == "__main__":
    sys.exit(main())
