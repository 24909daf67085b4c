"""Tables of boards as data for scripts: rows, questions, cells and per-unit scores, from which ranks can be made again.

A file holds one table. It is a script that hands two deflated texts to the page, so that it also loads from
``file://``: JSON, and the per-unit scores of all cells one after the other as little-endian float64. The bytes of the
scores are grouped by their place within a number, which makes them smaller once deflated.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from methodbench_leaderboard.aggregate import Board, Cell, Question, Row, Table
from methodbench_leaderboard.formats import harmless, plain, shorten

#: Scores that a file holds at most. Questions beyond that keep the ranks of all rows, and the page says so.
MOST_SCORES = 2_000_000
#: Longer commands are left to the page of their run, since half of one is none.
LONGEST_COMMAND = 1000
#: Numeric fields of runs that cells show, averaged over scored seeds: JSON name by field.
_COSTS = {
    "bits_per_weight": "bits", "accounted_bits": "accounted", "model_bytes": "bytes", "wall_seconds": "seconds",
    "peak_memory_bytes": "memory", "throughput": "throughput",
}  # fmt: skip


def row_id(row: Row) -> str:
    """Return what addresses call a configuration by: the same on every table and in every build."""
    return hashlib.sha256(row.key.encode("utf-8", "surrogatepass")).hexdigest()[:10]


def table_path(board_path: str, table: Table) -> str:
    """Return the path of a table's data within the site, given that of its board."""
    return f"data/{board_path.removesuffix('.html')}/{table.anchor}.js"


def write_table(
    folder: Path,
    board_path: str,
    table: Table,
    costs: Mapping[str, Cell | None],
    run_path: Callable[[str], str],
    method_path: Callable[[str], str],
) -> None:
    """Write the data of one table into the site in ``folder``.

    Args:
        costs: of each row, the cell that its cost columns are read from, by the row's key.
        run_path, method_path: paths of pages within the site.
    """
    kept, scores = _kept(table), []
    rows = [_row(row, costs.get(row.key), method_path) for row in table.rows]
    questions = [_question(question) | {"kept": question.key in kept} for question in table.questions]
    cells, at = [], 0
    for number, row in enumerate(table.rows):
        for column, question in enumerate(table.questions):
            cell = row.cells.get(question.key)
            if cell is None:
                continue
            said = _cell(cell, run_path) | {"row": number, "question": column}
            if cell.primary is not None and question.key in kept and cell.primary.scores.size:
                said |= {"at": at, "units": int(cell.primary.scores.size)}
                scores.append(cell.primary.scores.astype("<f8"))
                at += cell.primary.scores.size
            cells.append(said)
    document = {"rows": rows, "questions": questions, "cells": cells, "largest": table.largest.positions}
    text = json.dumps(_plain(document), allow_nan=False, separators=(",", ":"))
    numbers = np.concatenate(scores) if scores else np.empty(0, dtype="<f8")
    shuffled = numbers.view(np.uint8).reshape(-1, 8).T.tobytes()
    path = table_path(board_path, table)
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    name = json.dumps(path.removeprefix("data/").removesuffix(".js"))
    file.write_text(
        f'methodbenchTable({name},"{_packed(text.encode())}","{_packed(shuffled)}");\n', encoding="ascii"
    )


def write_index(folder: Path, boards: Sequence[tuple[Board, str]]) -> None:
    """Write what there is to choose from: every board with its tables and configurations."""
    document = [
        {
            "path": path,
            "title": shorten(board.title, 80),
            "tables": [
                {
                    "src": table_path(path, table),
                    "title": shorten(table.title, 80),
                    "rows": [row_id(row) for row in table.rows],
                }
                for table in board.tables
            ],
            "labels": {row_id(row): shorten(row.label, 80) for table in board.tables for row in table.rows},
        }
        for board, path in boards
    ]
    (folder / "data").mkdir(exist_ok=True)
    text = json.dumps(_plain(document), allow_nan=False, separators=(",", ":"))
    (folder / "data" / "boards.js").write_text(f"methodbenchIndex({text});\n", encoding="ascii")


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 6)).decode()


def _kept(table: Table) -> set[str]:
    """Return the questions whose scores are in the file, from the first on while there is room."""
    kept, room = set(), MOST_SCORES
    for question in table.questions:
        cells = [row.cells[question.key] for row in table.rows if question.key in row.cells]
        size = sum(cell.primary.scores.size for cell in cells if cell.primary is not None)
        if size <= room:
            kept.add(question.key)
            room -= size
    return kept


def _row(row: Row, cost: Cell | None, method_path: Callable[[str], str]) -> dict[str, Any]:
    paper = row.entry.paper if row.entry else None
    return {
        "id": row_id(row),
        "method": shorten(row.method, 80),
        "variant": shorten(row.variant, 120),
        "label": shorten(row.label, 120),
        "family": row.entry.family if row.entry else "",
        "baseline": row.baseline,
        "positions": row.positions,
        "params": {shorten(name, 60): shorten(plain(value), 200) for name, value in row.params.items()},
        "find": shorten(f"{row.label} {plain(row.params)}", 300).lower(),
        "page": method_path(row.method),
        "bibtex": paper.bibtex(row.method) if paper else "",
        "storage": cost.run.storage if cost else "",
        "bits": _bits(cost) if cost else None,
    }


def _bits(cell: Cell) -> float | None:
    """Return bits per weight: those that a simulated format accounts for, else those measured."""
    accounted = cell.mean("accounted_bits") if cell.run.storage == "simulated" else None
    return cell.mean("bits_per_weight") if accounted is None else accounted


def _question(question: Question) -> dict[str, Any]:
    metric = question.metric
    return {
        "key": question.key,
        "task": shorten(question.task, 80),
        "model": shorten(question.model, 80),
        "suffix": shorten(question.suffix, 100),
        "protocol": question.protocol,
        "settings": {
            shorten(name, 60): shorten(plain(value), 200) for name, value in question.settings.items()
        },
        "metric": shorten(metric.label, 60) if metric else "",
        "unit": shorten(metric.unit, 20) if metric else "",
        "lower": metric.lower_is_better if metric else True,
        "how": metric.aggregate if metric else "",
    }


def _cell(cell: Cell, run_path: Callable[[str], str]) -> dict[str, Any]:
    """Return what a script needs of a cell; absent where there is nothing to say."""
    run, primary = cell.run, cell.primary
    said: dict[str, Any] = {
        "path": run_path(run.id),
        "failed": bool(cell.failed),
        "status": run.status,
        "seeds": len(cell.runs),
        "command": run.command if len(run.command) <= LONGEST_COMMAND else "",
        "simulated": any(each.storage == "simulated" for each in cell.scored),
    }
    if primary is not None:
        said |= {"value": primary.value, "low": primary.low, "high": primary.high}
        others = {
            shorten(name, 60): {
                "label": shorten(estimate.metric.label, 60),
                "value": estimate.value,
                "lower": estimate.metric.lower_is_better,
            }
            for name, estimate in cell.estimates.items()
            if name != primary.metric.name
        }
        said |= {"others": others} if others else {}
    if cell.difference is not None:
        said["difference"] = cell.difference.difference
    said |= {short: cell.mean(name) for name, short in _COSTS.items()}
    return {name: value for name, value in said.items() if value is not None}


def _plain(value: Any) -> Any:
    """Return ``value`` with harmless texts, and with numbers that JSON has no form for as JavaScript writes them."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {harmless(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return harmless(value)
