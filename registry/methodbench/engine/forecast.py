"""What a plan will cost, from the project's own history, and what of it fits a budget of time.

A cell is predicted from the runs in the database that are most like it: the same cell under other seeds, else the
same method on the same task, and so on to any run at all. Each prediction says which of these it rests on.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from methodbench.engine.cell import Cell
from methodbench.errors import MethodbenchError
from methodbench.provenance import canonical_json

if TYPE_CHECKING:
    from methodbench.store import Store

#: Newest runs of one kind that a prediction rests on.
_RUNS = 20


class PastRun(Protocol):
    """What a prediction needs of a run."""

    method: str
    kind: str
    params: Mapping[str, Any]
    model: str
    task: str
    task_params: Mapping[str, Any]
    device: str
    threads: int
    status: str
    wall_seconds: float
    peak_memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Forecast:
    """Time and memory that one cell is expected to take."""

    seconds: float
    memory: int | None
    """Largest peak among the runs that it rests on, in bytes."""
    runs: int
    basis: str


_Key = tuple[Any, ...]
#: From the most to the least like the cell: how the basis is called, and what a run must share.
_LEVELS: tuple[tuple[str, Callable[[Mapping[str, Any]], _Key]], ...] = (
    (
        "other seeds",
        lambda x: (x["method"], x["params"], x["model"], x["task"], x["task_params"], x["where"]),
    ),
    ("other settings", lambda x: (x["method"], x["model"], x["task"], x["task_params"], x["where"])),
    ("other protocol settings", lambda x: (x["method"], x["model"], x["task"], x["where"])),
    ("other methods", lambda x: (x["kind"], x["model"], x["task"], x["task_params"], x["where"])),
    ("other methods and settings", lambda x: (x["kind"], x["model"], x["task"])),
    ("other models", lambda x: (x["method"], x["task"])),
    ("other methods and models", lambda x: (x["task"],)),
    ("other tasks", lambda x: (x["method"],)),
    ("any run", lambda x: ()),
)


class History:
    """Finished runs, grouped for prediction."""

    def __init__(self, runs: Iterable[PastRun]) -> None:
        """
        Args:
            runs: oldest first; those that did not end well tell nothing and are left out.
        """
        self._groups: list[dict[_Key, list[PastRun]]] = [{} for _ in _LEVELS]
        self._known: dict[_Key, Forecast] = {}
        for run in runs:
            if run.status != "ok" or run.wall_seconds <= 0:
                continue
            traits = {
                "method": run.method, "kind": run.kind, "params": canonical_json(dict(run.params)),
                "model": run.model, "task": run.task, "task_params": canonical_json(dict(run.task_params)),
                "where": (run.device.partition(":")[0], run.threads),
            }  # fmt: skip
            for (_, key), groups in zip(_LEVELS, self._groups, strict=True):
                groups.setdefault(key(traits), []).append(run)

    def predict(self, cell: Cell) -> Forecast | None:
        """Return what the cell is expected to take; None when there is no history at all."""
        traits = {
            "method": cell.method.name, "kind": cell.method.kind, "params": canonical_json(dict(cell.params)),
            "model": cell.model.name if cell.model else "", "task": cell.task.name,
            "task_params": canonical_json(dict(cell.task_params)),
            "where": (cell.device.partition(":")[0], cell.threads),
        }  # fmt: skip
        for level, ((name, key), groups) in enumerate(zip(_LEVELS, self._groups, strict=True)):
            place = key(traits)
            found = groups.get(place)
            if found:
                known = self._known.get((level, place))
                if known is None:
                    known = self._known[(level, place)] = _forecast(name, found)
                return known
        return None


def history_of(store: Store) -> History:
    """Return the history of a database, reading only what predictions need."""
    from sqlmodel import col, select

    from methodbench.store import Run

    names = list(PastRun.__annotations__)
    with store.reading() as session:
        query = select(*(getattr(Run, name) for name in names))
        rows: Any = session.exec(query.where(col(Run.status) == "ok").order_by(col(Run.started_at)))
        return History(rows)


def _forecast(basis: str, runs: Sequence[PastRun]) -> Forecast:
    newest = runs[-_RUNS:]
    peaks = [run.peak_memory_bytes for run in newest if run.peak_memory_bytes]
    seconds = median(run.wall_seconds for run in newest)
    return Forecast(seconds, max(peaks, default=None), len(newest), basis)


@dataclass(slots=True)
class Budget:
    """What of a plan fits."""

    kept: list[Cell]
    """In the order in which they were chosen."""
    left_out: dict[str, str]
    """Reason by key."""
    forecasts: dict[str, Forecast]
    """By key, for all cells."""
    seconds: float
    """Wall-clock time until the last of the kept cells is expected to end."""


def fit_budget(
    cells: Sequence[Cell], history: History, *, seconds: float | None, cores: int, memory: int | None = None
) -> Budget:
    """Choose the cells that fit a budget of wall-clock time.

    First seeds come before second ones, baselines before what is compared with them, and cheap cells before dear
    ones, so that a small budget still answers as many questions as it can. Cells run side by side as far as their
    threads fit on the cores, in this order.

    Args:
        cells: those that have no record yet.
        seconds: the budget; None keeps everything, in the same order.
        cores: of the machine.
        memory: bytes that one cell may hold; cells that are expected to need more are left out.

    Raises:
        MethodbenchError: there is no finished run to predict from.
    """
    forecasts: dict[str, Forecast] = {}
    for cell in cells:
        found = history.predict(cell)
        if found is None:
            raise MethodbenchError(
                "nothing can be predicted: the database holds no finished run",
                "Run a small part first, for example one method under one seed; predictions follow from its records.",
            )
        forecasts[cell.key] = found
    machine = _Schedule(cores)
    kept: list[Cell] = []
    left_out: dict[str, str] = {}
    for cell in sorted(cells, key=_order(cells, forecasts)):
        forecast = forecasts[cell.key]
        if memory is not None and forecast.memory is not None and forecast.memory > memory:
            left_out[cell.key] = "is expected to need more memory than it may hold"
        elif machine.add(forecast.seconds, cell.needs.cores, seconds):
            kept.append(cell)
        else:
            left_out[cell.key] = "does not fit the budget of time"
    return Budget(kept, left_out, forecasts, machine.end)


def _order(cells: Sequence[Cell], forecasts: Mapping[str, Forecast]) -> Callable[[Cell], Any]:
    rounds: dict[_Key, dict[int, int]] = {}
    places: dict[str, tuple[int, int]] = {}
    for position, cell in enumerate(cells):
        model = cell.model.name if cell.model else ""
        passed = canonical_json([dict(cell.params), dict(cell.task_params)])
        seeds = rounds.setdefault((cell.method.name, model, cell.task.name, passed), {})
        places[cell.key] = seeds.setdefault(cell.seed, len(seeds)), position

    def order(cell: Cell) -> tuple[int, bool, float, int]:
        nth_seed, position = places[cell.key]
        return nth_seed, not cell.method.baseline, forecasts[cell.key].seconds, position

    return order


class _Schedule:
    """Cells on a machine with so many cores, each started in turn as soon as there is room."""

    def __init__(self, cores: int) -> None:
        self.cores = cores
        self.end = 0.0
        self._now = 0.0
        self._free = cores
        self._running: list[tuple[float, int]] = []

    def add(self, seconds: float, cores: int, limit: float | None) -> bool:
        """Start a cell next, unless it would end after ``limit``; return whether it was started."""
        wanted = min(cores, self.cores)
        running, now, free = list(self._running), self._now, self._free
        while free < wanted:
            now, given = heapq.heappop(running)
            free += given
        if limit is not None and now + seconds > limit:
            return False
        heapq.heappush(running, (now + seconds, wanted))
        self._running, self._now, self._free = running, now, free - wanted
        self.end = max(self.end, now + seconds)
        return True
