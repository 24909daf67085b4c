"""Records as tables and documents for other programs: CSV, Parquet, JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from methodbench.errors import CapsuleError
from methodbench.store import records
from methodbench.store.capsule import Content
from methodbench.store.records import CHILDREN
from methodbench.store.schema import MetricValue

#: Columns of a run that stand beside each of its metrics.
_RUN_COLUMNS = (
    "id", "method", "variant", "model", "task", "seed", "status", "reason", "dtype", "device", "threads", "storage",
    "bits_per_weight", "model_bytes", "wall_seconds", "peak_memory_bytes", "throughput", "throughput_unit", "family",
    "suite", "started_at", "cell_key", "seal", "witness_of",
)  # fmt: skip
_METRIC_COLUMNS = ("name", "value", "low", "high", "units", "unit", "direction", "aggregate", "primary")


def write_csv(content: Content, path: Path) -> None:
    """Write one row per run and metric; infinities as ``inf``, what is missing as nothing. Per-unit scores stay out."""
    import csv

    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(_header())
            for row in _flat(content):
                table.writerow([_cell(value) for value in row])
    except OSError as error:
        raise _unwritable(path, error) from error


def write_parquet(content: Content, path: Path) -> None:
    """Write one row per run and metric, with the per-unit scores as a list column."""
    import numpy as np
    import polars as pl

    rows = [
        (*row, np.frombuffer(metric["scores"], "<f8").tolist() if metric else None)
        for row, metric in _paired(content)
    ]
    integers = ("seed", "threads", "model_bytes", "peak_memory_bytes", "units")
    reals = ("bits_per_weight", "wall_seconds", "throughput", "value", "low", "high")
    schema: dict[str, Any] = dict.fromkeys(_header(), pl.String)
    schema |= dict.fromkeys(integers, pl.Int64) | dict.fromkeys(reals, pl.Float64)
    schema |= {"started_at": pl.Datetime("us", "UTC"), "primary": pl.Boolean, "scores": pl.List(pl.Float64)}
    try:
        pl.DataFrame(rows, schema=schema, orient="row").write_parquet(path, compression="zstd")
    except OSError as error:
        raise _unwritable(path, error) from error


def write_json(content: Content, path: Path) -> None:
    """Write everything, environments and per-unit scores included; infinities become their names."""
    document = {
        "environments": {row["digest"]: row["data"] for row in content.environments},
        "runs": [
            {
                **{name: _plain(value) for name, value in record.run.items()},
                **{
                    table.name: [
                        {name: _plain(value) for name, value in row.items() if name != "run_id"}
                        for row in record.children.get(table.name, [])
                    ]
                    for table in CHILDREN
                },
            }
            for record in content.records
        ],
    }
    try:
        path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from error


def _header() -> list[str]:
    return ["run", *_RUN_COLUMNS[1:], "metric", *_METRIC_COLUMNS[1:]]


def _paired(content: Content) -> list[tuple[list[Any], dict[str, Any] | None]]:
    rows: list[tuple[list[Any], dict[str, Any] | None]] = []
    for record in content.records:
        run = [record.run[name] for name in _RUN_COLUMNS]
        for metric in record.children.get(str(MetricValue.__tablename__), [None]):
            rows.append(([*run, *(metric[name] if metric else None for name in _METRIC_COLUMNS)], metric))
    return rows


def _flat(content: Content) -> list[list[Any]]:
    return [row for row, _ in _paired(content)]


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        # A spreadsheet takes what begins like this for a formula.
        return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
    value = records.portable(value)
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else value


def _plain(value: Any) -> Any:
    import numpy as np

    if isinstance(value, bytes):
        return [records.portable(number) for number in np.frombuffer(value, "<f8").tolist()]
    return records.portable(value)


def _unwritable(path: Path, error: OSError) -> CapsuleError:
    return CapsuleError(f"cannot write {path}: {error.strerror or error}", "Give another place with --out.")
