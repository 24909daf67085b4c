"""What the engine costs beyond the methods: no-op cells, isolated and in batches, and plans.

    python benchmarks/engine.py [--cells 300] [--rounds 5] [--plan 100000] [--json FILE]

Figures are cells per second, one worker at a time: forked, scored, recorded in a database. The limits are the budgets
that the project has set itself: 20 ms for an isolated cell, so that isolation is never the reason to do without it,
and 2 ms for one in a batch, about what a careful loop with one commit per result would take. The peer starts one
interpreter per cell that imports nothing but NumPy, the least that a run by hand costs; slower than that no engine is
worth having. Plans are made in an interpreter of their own, with an empty cache (every setting is checked for the first
time) and with a full one; their budget is 5 s and 1 GiB for 100,000 cells, so that `plan` answers while one waits.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.metadata import EntryPoint
from pathlib import Path

from common import Figure, alternate, parser, rate, report

from methodbench import api
from methodbench.catalog import Catalog, load_catalog
from methodbench.engine.driver import run_plan
from methodbench.engine.plan import Plan
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
from methodbench.catalog import Catalog, load_catalog
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


def toys() -> Catalog:
    """Return a catalogue of the toy plugin alone, importable here and in workers."""
    sys.path.insert(0, str(TOYS))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TOYS), os.environ.get("PYTHONPATH", "")])
    return load_catalog(points=[EntryPoint("toybench", "toybench.plugin", "methodbench")])


def plan_of(cells: int, catalog: Catalog) -> Plan:
    """Return a plan of so many no-op cells."""
    grid = {"value": [index / cells for index in range(cells)]}
    comparison = {"methods": [{"name": "noop", "grid": grid}], "tasks": ["toy-value"]}
    return api.plan({"name": "noop", "comparisons": [comparison]}, catalog=catalog)


def run(plan: Plan, catalog: Catalog, batch: int = 1) -> None:
    """Run a plan to its end, with a database of its own."""
    with tempfile.TemporaryDirectory() as folder, open_store(f"{folder}/runs.db") as store:
        assert run_plan(plan, store, catalog, cores=1, batch=batch).complete


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--cells", type=int, default=300)
    options.add_argument("--plan", type=int, default=100_000, help="cells of the plan")
    arguments = options.parse_args()
    catalog = toys()
    # Starting the server is paid once per run, whatever its length: the difference of two runs leaves the cells.
    few, many = plan_of(1, catalog), plan_of(arguments.cells + 1, catalog)

    def one_process_per_run() -> None:
        for _ in range(PEER_CELLS):
            subprocess.run([sys.executable, "-c", "import numpy"], check=True)

    contestants = {
        "few": lambda: run(few, catalog),
        "many": lambda: run(many, catalog),
        "batch": lambda: run(many, catalog, BATCH),
        "peer": one_process_per_run,
    }
    seconds = alternate(contestants, arguments.rounds)
    ours = rate(arguments.cells, seconds["many"], seconds["few"])
    in_batches = rate(arguments.cells, seconds["batch"], seconds["few"])
    figures = [
        Figure("no-op cell / budget", ours, 1 / BUDGET_SECONDS, 1.0, "cells/s"),
        Figure("no-op cell / one process per run", ours, PEER_CELLS / seconds["peer"], 1.0, "cells/s"),
        Figure("no-op cell in a batch / budget", in_batches, 1 / BATCH_BUDGET_SECONDS, 1.0, "cells/s"),
    ]
    cells = arguments.plan
    for seeds in (1, SEEDS):
        empty, full, memory = planning(cells, seeds)
        name = f"plan of {cells} cells, {seeds} seed{'s' if seeds > 1 else ''}"
        limit = 100_000 / PLAN_SECONDS
        figures += [
            Figure(f"{name}, empty cache", cells / empty, limit, 1.0, "cells/s"),
            Figure(f"{name}, full cache", cells / full, limit, 1.0, "cells/s"),
            Figure(f"{name}, 1/memory", 1024 / memory, 1024 / PLAN_MIB, 1.0, "1/GiB"),
        ]
    return report(figures, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
