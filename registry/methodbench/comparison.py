"""Paired comparison of two methods over the cells that both have run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from methodbench.errors import MethodbenchError, UnknownNameError
from methodbench.provenance import canonical_json
from methodbench.stats import holm, paired_difference
from methodbench.store import MetricValue, Run, Store

Verdict = Literal["win", "tie", "loss"]


@dataclass(frozen=True, slots=True)
class PairedResult:
    """Method ``a`` against method ``b`` on one model and task, over all seeds that both ran."""

    model: str
    task: str
    metric: str
    direction: str
    """``lower`` or ``higher``: which is better."""
    variant_a: str
    variant_b: str
    value_a: float
    value_b: float
    difference: float
    low: float
    high: float
    p_value: float
    """Two-sided, from the permutation test on per-unit differences."""
    p_holm: float
    """The same after Holm's correction for all rows of the comparison."""
    units: int
    seeds: int
    verdict: Verdict
    """What the 95 % interval of the difference says of ``a``; ``tie`` when it includes zero."""
    runs_a: tuple[str, ...]
    runs_b: tuple[str, ...]


def compare_methods(store: Store, a: str, b: str) -> list[PairedResult]:
    """Compare two methods, each given as ``name`` or ``name@variant``.

    Cells are paired when model, weights, task, protocol, its settings, data, seed and dtype agree; variants are
    paired when they carry the same label, or when both were named. Scores of several seeds are averaged per unit.

    Raises:
        UnknownNameError: no run of that method or variant is in the database.
        MethodbenchError: the two share no cell.
    """
    runs = [run for run in store.runs() if run.status == "ok"]
    chosen_a, chosen_b = _select(runs, a), _select(runs, b)
    named = "@" in a and "@" in b
    groups: dict[str, tuple[dict[int, Run], dict[int, Run]]] = {}
    for run_a in chosen_a:
        for run_b in chosen_b:
            same = run_a.seed == run_b.seed and question(run_a) == question(run_b)
            if same and (named or run_a.variant == run_b.variant or _sole(chosen_b)):
                label = canonical_json([question(run_a), run_a.variant, run_b.variant])
                of_a, of_b = groups.setdefault(label, ({}, {}))
                of_a[run_a.seed], of_b[run_b.seed] = run_a, run_b
    if not groups:
        raise MethodbenchError(
            f"{a} and {b} share no finished cell",
            "Run both on the same model and task; name variants as METHOD@VARIANT to pair different settings.",
        )
    wanted = [run.id for pair in groups.values() for side in pair for run in side.values()]
    metrics: dict[str, MetricValue] = {row.run_id: row for row in store.metrics(wanted) if row.primary}
    rows = []
    for of_a, of_b in groups.values():
        result = _pair(list(of_a.values()), list(of_b.values()), metrics)
        if result is not None:
            rows.append(result)
    adjusted = holm(np.array([row.p_value for row in rows]))
    rows = [replace(row, p_holm=float(p)) for row, p in zip(rows, adjusted, strict=True)]
    return sorted(rows, key=lambda row: (row.task, row.model, row.variant_a, row.variant_b))


def _select(runs: Sequence[Run], wanted: str) -> list[Run]:
    """Return the newest run of each cell of a method, optionally of one variant."""
    name, at, variant = wanted.partition("@")
    newest: dict[str, Run] = {}
    for run in runs:
        if run.method == name and (not at or run.variant == variant):
            newest[run.cell_key] = run
    if newest:
        return list(newest.values())
    variants = {run.variant for run in runs if run.method == name}
    if variants:
        raise UnknownNameError(f"variant of {name}", variant, variants)
    raise UnknownNameError("method with results", name, {run.method for run in runs})


def _sole(runs: Sequence[Run]) -> bool:
    return len({run.variant for run in runs}) == 1


def question(run: Run) -> str:
    """Return what two runs of one seed must share for their difference to be about the methods alone."""
    asked = (
        "model",
        "weights_digest",
        "task",
        "task_params",
        "protocol",
        "data_digest",
        "dtype",
        "device_class",
    )
    return canonical_json({name: run.identity[name] for name in asked})


def _pair(runs_a: list[Run], runs_b: list[Run], metrics: dict[str, MetricValue]) -> PairedResult | None:
    of_a = [metrics[run.id] for run in runs_a if run.id in metrics]
    of_b = [metrics[run.id] for run in runs_b if run.id in metrics]
    if not of_a or not of_b or len({row.units for row in (*of_a, *of_b)}) != 1:
        return None
    scores_a = np.mean([row.unit_scores() for row in of_a], axis=0)
    scores_b = np.mean([row.unit_scores() for row in of_b], axis=0)
    metric = of_a[0]
    result = paired_difference(scores_a, scores_b, metric.aggregate)
    verdict: Verdict = "tie"
    if result.decided:
        verdict = "win" if (result.difference < 0) == (metric.direction == "lower") else "loss"
    return PairedResult(
        model=runs_a[0].model,
        task=runs_a[0].task,
        metric=metric.name,
        direction=metric.direction,
        variant_a=runs_a[0].variant,
        variant_b=runs_b[0].variant,
        value_a=result.value_a,
        value_b=result.value_b,
        difference=result.difference,
        low=result.low,
        high=result.high,
        p_value=result.p_value,
        p_holm=result.p_value,
        units=result.units,
        seeds=len(runs_a),
        verdict=verdict,
        runs_a=tuple(run.id for run in runs_a),
        runs_b=tuple(run.id for run in runs_b),
    )
