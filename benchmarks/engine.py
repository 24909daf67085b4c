"""What the engine costs beyond the methods: no-op cells, isolated and in batches, and plans of growing size.

    python benchmarks/engine.py [--cells 300] [--rounds 5] [--growth 1000,10000,100000] [--json FILE]

Figures are cells per second on one core: forked, scored, recorded in a database. The budget is 20 ms for an isolated
cell and 2 ms for one in a batch. The peer starts one interpreter per cell that imports nothing but NumPy, the least
that a run by hand costs. Plans are made in an interpreter of their own, with an empty cache (every setting is checked
for the first time) and with a full one; their budget is 5 s and 1 GiB for 100,000 cells.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.metadata import EntryPoint
from pathlib import Path

from common import Figure, alternate, parser, report

from methodbench import api
from methodbench.catalog import load_catalog
from methodbench.engine.driver import run_plan
from methodbench.store import open_store

TOYS = Path(__file__).resolve().parent.parent / "tests" / "plugins"
BUDGET_SECONDS = 0.020
BATCH_BUDGET_SECONDS = 0.002
BATCH = 100
PEER_CELLS = 10
SEEDS = 10
PLAN_SECONDS = 5.0
PLAN_MIB = 1024

#: Plans a grid of so many cells twice; prints seconds of each and the peak memory in MiB.
_PLANNING = """
import resource, sys, time
from importlib.metadata import EntryPoint
from methodbench import api
from methodbench.catalog import load_catalog
catalog = load_catalog(points=[EntryPoint("toybench", "toybench.plugin", "methodbench")])
settings, seeds = int(sys.argv[1]), int(sys.argv[2])
methods = [{"name": "noop", "grid": {"value": [10 * index / settings for index in range(settings)]}}]
comparison = {"methods": methods, "tasks": ["toy-value"], "seeds": list(range(seeds))}
seconds = []
for _ in range(2):
    start = time.perf_counter()
    plan = api.plan({"name": "growth", "comparisons": [comparison]}, catalog=catalog)
    seconds.append(time.perf_counter() - start)
    assert len(plan.cells) == settings * seeds
print(*seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def planning(cells: int, seeds: int) -> tuple[float, float, float]:
    """Return seconds with an empty and with a full cache, and the peak memory in MiB."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "METHODBENCH_CACHE": cache}
        line = [sys.executable, "-c", _PLANNING, str(cells // seeds), str(seeds)]
        done = subprocess.run(line, capture_output=True, text=True, check=True, env=environment)
    empty, full, memory = map(float, done.stdout.split())
    return empty, full, memory


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--cells", type=int, default=300)
    options.add_argument("--growth", default="1000,10000,100000", help="sizes of plans, with commas between")
    arguments = options.parse_args()
    sys.path.insert(0, str(TOYS))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TOYS), os.environ.get("PYTHONPATH", "")])
    catalog = load_catalog(points=[EntryPoint("toybench", "toybench.plugin", "methodbench")])

    def plan_of(cells: int) -> object:
        grid = {"value": [index / cells for index in range(cells)]}
        comparison = {"methods": [{"name": "noop", "grid": grid}], "tasks": ["toy-value"]}
        return api.plan({"name": "noop", "comparisons": [comparison]}, catalog=catalog)

    # Starting the server is paid once per run, whatever its length: the difference of two runs leaves the cells.
    few, many = plan_of(1), plan_of(arguments.cells + 1)

    def run(plan: object, batch: int = 1) -> None:
        with tempfile.TemporaryDirectory() as folder, open_store(f"{folder}/runs.db") as store:
            report = run_plan(plan, store, catalog, cores=1, batch=batch)  # type: ignore[arg-type]
            assert report.complete

    def one_process_per_run() -> None:
        for _ in range(PEER_CELLS):
            subprocess.run([sys.executable, "-c", "import numpy"], check=True)

    contestants = {
        "few": lambda: run(few),
        "many": lambda: run(many),
        "batch": lambda: run(many, BATCH),
        "peer": one_process_per_run,
    }
    seconds = alternate(contestants, arguments.rounds)
    ours = arguments.cells / (seconds["many"] - seconds["few"])
    in_batches = arguments.cells / (seconds["batch"] - seconds["few"])
    figures = [
        Figure("no-op cell / budget", ours, 1 / BUDGET_SECONDS, 1.0, "cells/s"),
        Figure("no-op cell / one process per run", ours, PEER_CELLS / seconds["peer"], 1.0, "cells/s"),
        Figure("no-op cell in a batch / budget", in_batches, 1 / BATCH_BUDGET_SECONDS, 1.0, "cells/s"),
    ]
    print(f"{'cells':>8} {'seeds':>6} {'empty cache':>12} {'full cache':>11} {'memory':>10}")
    sizes = [int(size) for size in arguments.growth.split(",")]
    for cells in sizes:
        for seeds in (1, SEEDS):
            empty, full, memory = planning(cells, seeds)
            print(f"{cells:8} {seeds:6} {empty:10.2f} s {full:9.2f} s {memory:6.0f} MiB")
            if cells == max(sizes):
                budget = cells / 100_000
                name = f"plan of {cells} cells, {seeds} seed{'s' if seeds > 1 else ''}"
                rates = (cells / empty, cells / full)
                figures += [
                    Figure(f"{name}, empty cache", rates[0], cells / (PLAN_SECONDS * budget), 1.0, "cells/s"),
                    Figure(f"{name}, full cache", rates[1], cells / (PLAN_SECONDS * budget), 1.0, "cells/s"),
                    Figure(f"{name}, 1/memory", 1024 / memory, 1024 / PLAN_MIB, 1.0, "1/GiB"),
                ]
    return report(figures, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
