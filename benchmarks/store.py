"""What the database costs: inserting beside plain sqlite3, and queries.

    python benchmarks/store.py [--rounds 5] [--rows 1000000] [--runs 100000] [--json FILE]

Insertion writes the same metric rows, 10 units each, in transactions of 10,000 rows; the figure is rows per second
beside plain sqlite3 with the same settings. Its limit is 0.5: at most twice the time, which is what checks, types and
a dialect may cost. Queries are what `results` and `status` ask of the database; their limit is the project's budget of
0.5 s, so that looking costs no thought.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from common import Figure, alternate, parser, report

from methodbench.store import Environment, open_store, records
from methodbench.store.records import Record
from methodbench.store.schema import MetricValue, Run

START = datetime(2026, 1, 1, tzinfo=UTC)
SCORES = np.linspace(0, 1, 10).tobytes()
BATCH = 10_000
BUDGET_SECONDS = 0.5


def run_row(number: int) -> dict[str, Any]:
    run = Run(
        id=f"{number:012x}", cell_key=f"{number:064x}", identity={"version": 2, "method": "m"}, status="ok",
        method=f"method{number % 40}", kind="probe", family="f", params_passed={"bits": 4}, params={"bits": 4},
        task=f"task{number % 25}", task_params={"length": 512}, protocol=1, environment_digest="e",
        suite=f"s{number % 5}", model=f"model{number % 10}", method_digest="0" * 64,
        weights_digest="1" * 64, data_digest="2" * 64,
        started_at=START + timedelta(seconds=number), log_tail="a line of the log\n" * 20,
    )  # fmt: skip
    return records.row_of(run)


def metric_row(number: int, name: str) -> dict[str, Any]:
    metric = MetricValue(
        run_id=f"{number:012x}", name=name, title="Loss", unit="nats", value=0.5, low=0.4, high=0.6, units=10,
        scores=SCORES, primary=name == "m0",
    )  # fmt: skip
    return records.row_of(metric)


def filled(path: Path, runs: int, metrics: int) -> None:
    """Make a database of so many runs with so many metrics each."""
    with open_store(str(path)) as store:
        environment = records.row_of(Environment(digest="e", captured_at=START, data={}))
        for start in range(0, runs, BATCH):
            store.add_many(batch(start, min(start + BATCH, runs), metrics), [environment])


def batch(start: int, end: int, metrics: int) -> Iterator[Record]:
    for number in range(start, end):
        rows = [metric_row(number, f"m{index}") for index in range(metrics)]
        yield Record(run_row(number), {"metric": rows} if rows else {})


def insertion(folder: Path, rows: int, rounds: int) -> Figure:
    """Insert metric rows of runs that are there, ours and plain."""
    per_run = 10
    base = folder / "base.db"
    filled(base, rows // per_run, 0)
    with closing(sqlite3.connect(base)) as raw:
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    made = [metric_row(number, f"m{index}") for number in range(rows // per_run) for index in range(per_run)]
    names = list(made[0])
    plain = [tuple(row.values()) for row in made]

    def fresh() -> Path:
        path = folder / "target.db"
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        path.write_bytes(base.read_bytes())
        return path

    def ours() -> None:
        with open_store(str(fresh())) as store:
            for start in range(0, rows, BATCH):
                with store.writing() as session:
                    records.insert(session.connection(), MetricValue.__table__, made[start : start + BATCH])
                    session.commit()

    def peer() -> None:
        with closing(sqlite3.connect(fresh(), isolation_level=None)) as raw:
            for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
                raw.execute(f"PRAGMA {pragma}")
            columns = ", ".join(f'"{name}"' for name in names)
            statement = f"INSERT INTO metric ({columns}) VALUES ({', '.join('?' * len(names))})"
            for start in range(0, rows, BATCH):
                raw.execute("BEGIN IMMEDIATE")
                raw.executemany(statement, plain[start : start + BATCH])
                raw.execute("COMMIT")

    seconds = alternate({"ours": ours, "peer": peer}, rounds)
    return Figure(
        f"insert {rows:,} metric rows / sqlite3",
        rows / seconds["ours"],
        rows / seconds["peer"],
        0.5,
        "rows/s",
    )


def queries(path: Path) -> dict[str, Callable[[], Any]]:
    def results() -> None:
        with open_store(str(path), create=False) as store:
            frame = store.frame(200)
            store.versions_of(frame["run"])
            store.count()

    def status() -> None:
        with open_store(str(path), create=False) as store:
            store.counts()

    def plain_results() -> None:
        with closing(sqlite3.connect(path)) as raw:
            raw.execute(
                "SELECT * FROM (SELECT id FROM run WHERE witness_of IS NULL ORDER BY started_at DESC LIMIT 200) AS r "
                "JOIN run ON run.id = r.id LEFT JOIN metric ON metric.run_id = r.id"
            ).fetchall()

    def plain_status() -> None:
        with closing(sqlite3.connect(path)) as raw:
            raw.execute("SELECT suite, status, count(*) FROM run GROUP BY suite, status").fetchall()

    return {
        "results": results,
        "status": status,
        "plain results": plain_results,
        "plain status": plain_status,
    }


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--rows", type=int, default=1_000_000)
    options.add_argument("--runs", type=int, default=100_000)
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "runs.db"
        filled(path, arguments.runs, 2)
        seconds = alternate(
            {query: queries(path)[query] for query in ("results", "status")}, arguments.rounds
        )
        path.unlink()
        figures = [
            Figure(
                f"{query}, {arguments.runs:,} runs / budget",
                1 / taken,
                1 / BUDGET_SECONDS,
                1.0,
                "queries/s",
            )
            for query, taken in seconds.items()
        ]
        figures.append(insertion(folder, arguments.rows, arguments.rounds))
    return report(figures, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
