"""Where two runs part: the first setting that differs, the first block, logged step or unit, and the environments.

Works on records alone. Two runs of one cell should agree in every bit; where they do not, the order of the
computation (calibration inputs, weights, outputs, logged steps, scores) tells how far they went together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from methodbench.engine.why import Field, compare, flat

if TYPE_CHECKING:
    from methodbench.store import MetricValue, Run, Series, Store

#: Environment fields in the order in which they are suspected; what is not listed comes last.
_SUSPICION = (
    "torch.", "numpy_blas", "packages.torch", "packages.numpy", "processor.", "accelerators", "variables.", "cores",
    "python", "packages.transformers", "packages.timm", "packages.scipy", "packages.", "commit.", "machine",
    "platform", "memory_bytes",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recorded:
    """Everything that a database holds of one run."""

    run: Run
    metrics: Mapping[str, MetricValue]
    series: Mapping[str, Series]
    marks: list[dict[str, Any]]
    environment: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Parting:
    """The first place where two runs differ in a bit."""

    what: str
    """``calibration``, ``weights``, ``output``, ``step`` or ``unit``."""
    at: str
    """Name of the block, the curve or the metric."""
    index: int | None
    """Number of the step or unit, from 0; None for what has none."""
    first: Mapping[str, Any]
    """What the first run has there: shape and statistics of a block, ``value`` of a step or unit; empty where it
    has nothing."""
    second: Mapping[str, Any]

    def __str__(self) -> str:
        match self.what:
            case "calibration":
                return "the calibration inputs"
            case "weights" | "output":
                return f"{self.what} of {self.at}"
            case _:
                return (
                    f"{self.at}, {self.what} {self.index}" if self.index is not None else f"{self.at} itself"
                )


@dataclass(frozen=True, slots=True)
class ScoreChange:
    """A metric whose scores differ between two runs."""

    metric: str
    first: float | None
    second: float | None
    units: int
    """How many units differ; all of them where the counts differ."""
    of: int

    @property
    def relative(self) -> float:
        """Difference of the values as a share of the first; infinity where it cannot be told."""
        if self.first is None or self.second is None:
            return float("inf")
        if self.first == self.second:
            return 0.0
        return abs(self.second - self.first) / abs(self.first) if self.first else float("inf")


def recorded(store: Store, run: Run) -> Recorded:
    """Read what the database holds of a run."""
    environment = store.environments().get(run.environment_digest)
    return Recorded(
        run,
        {row.name: row for row in store.metrics([run.id])},
        {row.name: row for row in store.series([run.id])},
        store.fingerprint(run.id),
        environment.data if environment else {},
    )


def first_parting(a: Recorded, b: Recorded) -> Parting | None:
    """Return the first place where two runs differ in a bit; None where all that is recorded is the same."""
    return next(_partings(a, b), None)


def compared(a: Recorded, b: Recorded) -> dict[str, int]:
    """Return how many marks, steps and units both runs have."""
    there = {(mark["what"], mark["at"]) for mark in a.marks} & {
        (mark["what"], mark["at"]) for mark in b.marks
    }
    curves = [
        min(len(a.series[name].points()), len(b.series[name].points())) for name in a.series.keys() & b.series
    ]
    units = [min(a.metrics[name].units, b.metrics[name].units) for name in a.metrics.keys() & b.metrics]
    return {"marks": len(there), "steps": sum(curves), "units": sum(units)}


def setting_changes(a: Recorded, b: Recorded) -> list[Field]:
    """Return the settings that differ, in the order of a cell's identity."""
    return [one for one in compare(a.run.identity, b.run.identity) if not one.same]


def environment_changes(a: Recorded, b: Recorded) -> list[Field]:
    """Return what differs between the environments, what is most to be suspected first."""
    changes = [one for one in compare(a.environment, b.environment) if not one.same]
    return sorted(changes, key=lambda one: next(_rank(one.name), len(_SUSPICION)))


def score_changes(a: Recorded, b: Recorded) -> list[ScoreChange]:
    """Return the metrics whose scores differ in a bit, the primary one first."""
    changes = []
    for name in sorted({*a.metrics, *b.metrics}, key=lambda name: (not _is_primary(a, b, name), name)):
        one, other = a.metrics.get(name), b.metrics.get(name)
        if one is not None and other is not None and one.scores == other.scores:
            continue
        size = max(row.units for row in (one, other) if row is not None)
        differing = size
        if one is not None and other is not None and one.units == other.units:
            differing = int(np.sum(_differ(one.unit_scores(), other.unit_scores())))
        first, second = (row.value if row is not None else None for row in (one, other))
        changes.append(ScoreChange(name, first, second, differing, size))
    return changes


def _rank(name: str) -> Iterator[int]:
    return (index for index, start in enumerate(_SUSPICION) if name.startswith(start))


def _is_primary(a: Recorded, b: Recorded, name: str) -> bool:
    return any(side.metrics[name].primary for side in (a, b) if name in side.metrics)


def _partings(a: Recorded, b: Recorded) -> Iterator[Parting]:
    # Records without marks (older ones, runs without a model) have nothing to say about blocks.
    if a.marks and b.marks:
        there = {(mark["what"], mark["at"]): mark for mark in b.marks}
        for mark in a.marks:
            other = there.get((mark["what"], mark["at"]), {})
            if mark["digest"] != other.get("digest"):
                yield Parting(mark["what"], mark["at"], None, mark, other)
        names = {(mark["what"], mark["at"]) for mark in a.marks}
        yield from (Parting(*key, None, {}, mark) for key, mark in there.items() if key not in names)
    for name in sorted({*a.series, *b.series}):
        curves = [side.series[name].points() if name in side.series else np.empty(0) for side in (a, b)]
        yield from _first("step", name, *curves)
    for name in sorted({*a.metrics, *b.metrics}, key=lambda name: (not _is_primary(a, b, name), name)):
        scores = [
            side.metrics[name].unit_scores() if name in side.metrics else np.empty(0) for side in (a, b)
        ]
        yield from _first("unit", name, *scores)


def _first(what: str, name: str, one: np.ndarray, other: np.ndarray) -> Iterator[Parting]:
    shared = min(len(one), len(other))
    places = np.flatnonzero(_differ(one[:shared], other[:shared]))
    index = int(places[0]) if len(places) else shared
    if index < max(len(one), len(other)):
        values = [{"value": float(side[index])} if index < len(side) else {} for side in (one, other)]
        yield Parting(what, name, index, *values)


def _differ(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return where the bits differ: NaN equals itself, and 0 is not -0."""
    return one.astype("<f8").view("<u8") != other.astype("<f8").view("<u8")


def as_dict(parting: Parting | None) -> dict[str, Any] | None:
    """Return a parting as JSON-ready values."""
    if parting is None:
        return None
    return {
        "what": parting.what,
        "at": parting.at,
        "index": parting.index,
        "first": flat(parting.first),
        "second": flat(parting.second),
    }
