"""What a cell costs beyond its method: no-op cells in isolated workers, against their budget and one process per run.

    python benchmarks/engine.py [--cells 300] [--rounds 5] [--json FILE]

Figures are cells per second on one core: planned, forked, scored, recorded in a database. The budget is 20 ms a cell.
The peer starts one interpreter per cell that imports nothing but NumPy, the least that a run by hand costs.
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
PEER_CELLS = 10


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--cells", type=int, default=300)
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

    def run(plan: object) -> None:
        with tempfile.TemporaryDirectory() as folder, open_store(f"{folder}/runs.db") as store:
            report = run_plan(plan, store, catalog, cores=1)  # type: ignore[arg-type]
            assert report.complete

    def one_process_per_run() -> None:
        for _ in range(PEER_CELLS):
            subprocess.run([sys.executable, "-c", "import numpy"], check=True)

    contestants = {"few": lambda: run(few), "many": lambda: run(many), "peer": one_process_per_run}
    seconds = alternate(contestants, arguments.rounds)
    ours = arguments.cells / (seconds["many"] - seconds["few"])
    figures = [
        Figure("no-op cell / budget", ours, 1 / BUDGET_SECONDS, 1.0, "cells/s"),
        Figure("no-op cell / one process per run", ours, PEER_CELLS / seconds["peer"], 1.0, "cells/s"),
    ]
    return report(figures, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
