"""The same grid of no-op cells through methodbench and through benchopt: seconds per cell.

    python benchmarks/against_benchopt.py --benchopt PYTHON [--cells 200] [--rounds 5] [--json FILE]

PYTHON is an interpreter of an environment with benchopt (``pip install benchopt``). A cell returns a number that its
settings hold, and the number is scored and written down: here as a record in a database, there as a row of a Parquet
file. Both are run by their command lines on one core, in a folder without earlier results. The seconds per cell are the
difference between a run of many cells and a run of one, so that starting up counts for neither.

benchopt runs its cells one after the other in one process. What does the same here is a batch; its limit is 1. An
isolated cell is a process of its own besides, which may crash, hang or be killed and costs nobody else: it is to take
at most five times as long as a cell without any of that, a limit of 0.2.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from common import Figure, add_benchopt, alternate, benchopt_of, parser, rate, report

TOYS = Path(__file__).resolve().parent.parent / "tests" / "plugins"
BATCH = 100

_OBJECTIVE = """
from benchopt import BaseObjective


class Objective(BaseObjective):
    name = "no-op"
    sampling_strategy = "run_once"

    def set_data(self, nothing):
        pass

    def evaluate_result(self, value):
        return {"value": value}

    def get_one_result(self):
        return {"value": 0.0}

    def get_objective(self):
        return {}
"""
_DATASET = """
from benchopt import BaseDataset


class Dataset(BaseDataset):
    name = "nothing"

    def get_data(self):
        return {"nothing": 0}
"""
_SOLVER = """
from benchopt import BaseSolver


class Solver(BaseSolver):
    name = "noop"
    sampling_strategy = "run_once"
    parameters = {{"value": [index / {cells} for index in range({cells})]}}

    def set_objective(self):
        pass

    def run(self, _):
        pass

    def get_result(self):
        return {{"value": self.value}}
"""
_COUNT = (
    "import glob, pandas, sys; print(sum(len(pandas.read_parquet(name)) for name in glob.glob(sys.argv[1])))"
)


def write_theirs(folder: Path, cells: int) -> None:
    """Write a benchmark of so many cells for benchopt."""
    for name, text in (
        ("objective.py", _OBJECTIVE),
        ("datasets/nothing.py", _DATASET),
        ("solvers/noop.py", _SOLVER.format(cells=cells)),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def write_ours(folder: Path, cells: int) -> None:
    """Write a suite of so many cells, and install the toy plugin beside it."""
    info = folder / "site" / "toybench-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toybench\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[methodbench]\ntoybench = toybench.plugin\n")
    grid = {"value": [index / cells for index in range(cells)]}
    comparison = {"methods": [{"name": "noop", "grid": grid}], "tasks": ["toy-value"]}
    (folder / "grid.yaml").write_text(json.dumps({"name": "grid", "comparisons": [comparison]}))


def run_theirs(python: str, folder: Path) -> None:
    """Run benchopt where it has no results yet."""
    for name in ("outputs", "__cache__"):
        shutil.rmtree(folder / name, ignore_errors=True)
    line = [
        python,
        "-m",
        "benchopt",
        "run",
        ".",
        "--no-plot",
        "--no-html",
        "--n-repetitions",
        "1",
        "--max-runs",
        "1",
    ]
    subprocess.run(line, cwd=folder, capture_output=True, check=True)


def run_ours(folder: Path, cells: int, *options: str) -> None:
    """Run methodbench on a database of its own."""
    for path in folder.glob("runs.db*"):
        path.unlink()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), str(TOYS)]),
        "METHODBENCH_CACHE": str(folder / "cache"),
    }
    line = [
        sys.executable,
        "-m",
        "methodbench.cli",
        "run",
        "grid.yaml",
        "--db",
        "runs.db",
        "--cores",
        "1",
        "--json",
    ]
    done = subprocess.run(
        [*line, *options], cwd=folder, env=environment, capture_output=True, check=True, text=True
    )
    assert json.loads(done.stdout)["new"] == cells


def figures(seconds: Mapping[str, float], cells: int, theirs: str) -> list[Figure]:
    """Return cells per second of each way to run them, start-up left out."""
    peer = rate(cells, seconds["theirs, many"], seconds["theirs, one"])
    found = []
    for name, limit in (("batch", 1.0), ("isolated", 0.2)):
        ours = rate(cells, seconds[name], seconds["one"])
        print(f"{name}: {1000 / ours:.2f} ms a cell; benchopt {theirs}: {1000 / peer:.2f} ms a cell")
        found.append(Figure(f"no-op cell, {name} / benchopt", ours, peer, limit, "cells/s"))
    return found


def main() -> int:
    """Measure, print, and return 1 when a limit is missed."""
    options = parser(__doc__ or "")
    options.add_argument("--cells", type=int, default=200)
    add_benchopt(options)
    given = options.parse_args()
    python = benchopt_of(given)
    if python is None:
        return 0
    theirs = subprocess.run(
        [python, "-c", "import benchopt; print(benchopt.__version__)"],
        capture_output=True,
        check=True,
        text=True,
    ).stdout.strip()
    print(f"methodbench {version('methodbench')}, benchopt {theirs}, {given.cells} cells")
    many = given.cells + 1
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for cells in (1, many):
            write_theirs(root / f"theirs-{cells}", cells)
            write_ours(root / f"ours-{cells}", cells)
        contestants = {
            "one": lambda: run_ours(root / "ours-1", 1),
            "theirs, one": lambda: run_theirs(python, root / "theirs-1"),
            "batch": lambda: run_ours(root / f"ours-{many}", many, "--batch", str(BATCH)),
            "isolated": lambda: run_ours(root / f"ours-{many}", many),
            "theirs, many": lambda: run_theirs(python, root / f"theirs-{many}"),
        }
        seconds = alternate(contestants, given.rounds)
        rows = [python, "-c", _COUNT, str(root / f"theirs-{many}" / "outputs" / "*.parquet")]
        count = subprocess.run(rows, capture_output=True, check=True, text=True).stdout
        assert int(count) == many, f"benchopt wrote {count} rows"
    for contestant, value in seconds.items():
        print(f"{contestant:14} {value:7.2f} s from start to exit")
    return report(figures(seconds, given.cells, theirs), given.json)


if __name__ == "__main__":
    raise SystemExit(main())
