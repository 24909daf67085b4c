"""Paired comparison of two methods over the cells that both have run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from methodbench.composition import SEPARATOR, split_use
from methodbench.errors import MethodbenchError, UnknownNameError
from methodbench.provenance import canonical_json
from methodbench.stats import holm, interaction, paired_difference
from methodbench.store import MetricValue, Run, Store
from methodbench.tuning import is_trial

Verdict = Literal["win", "tie", "loss"]
Joint = Literal["more than the sum", "the sum", "harmful"]


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

    Cells are paired when model, weights, task, protocol, its settings, data, seed, dtype, kind of device and count of
    threads agree; variants are paired when they carry the same label, or when both were named. Scores of several seeds
    are averaged per unit.

    Raises:
        UnknownNameError: no run of that method or variant is in the database.
        MethodbenchError: the two share no cell.
    """
    runs = [run for run in store.runs() if run.status == "ok" and not is_trial(run.variant)]
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
    name, variant = split_use(wanted)
    newest: dict[str, Run] = {}
    for run in runs:
        if run.method == name and (not variant or run.variant == variant):
            newest[run.cell_key] = run
    if newest:
        return list(newest.values())
    variants = {run.variant for run in runs if run.method == name}
    if variants:
        raise UnknownNameError(f"variant of {name}", variant, variants)
    raise UnknownNameError("method with results", name, {run.method for run in runs})


def _sole(runs: Sequence[Run]) -> bool:
    return len({run.variant for run in runs}) == 1


def question(run: Run, without: Collection[str] = ()) -> str:
    """Return what two runs of one seed must share for their difference to be about the methods alone.

    It is read from the columns of the record: the identity of a record that others made may hold other fields.

    Args:
        without: settings of the task that may differ, because they are what is compared.
    """
    return canonical_json(
        {
            "model": run.model,
            "weights_digest": run.weights_digest,
            "task": run.task,
            "task_params": {key: value for key, value in run.task_params.items() if key not in without},
            "protocol": run.protocol,
            "data_digest": run.data_digest,
            "dtype": run.dtype,
            "device_class": run.device.partition(":")[0],
            "threads": run.threads,
        }
    )


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


@dataclass(frozen=True, slots=True)
class ChainResult:
    """What the links of a chain do together beyond what they do alone, on one model and task."""

    chain: str
    variant: str
    model: str
    task: str
    metric: str
    direction: str
    scale: str
    """What the effects are differences of: the metric, or the mean score per unit where it is exponentiated."""
    links: tuple[str, ...]
    alone: tuple[float, ...]
    """Effect of each link alone against the untouched model; positive is better."""
    together: float
    excess: float
    """``together`` minus the sum of ``alone``; positive is better."""
    low: float
    high: float
    units: int
    seeds: int
    verdict: Joint
    """``more than the sum`` or ``harmful`` where the 95 % interval of the excess lies above or below zero."""
    runs: tuple[str, ...]


def chain_interactions(store: Store, chain: str) -> list[ChainResult]:
    """Compare a chain (``a + b`` or ``a@preset + b@preset``) with its links, each alone, and the untouched model.

    The links must have run alone with the settings that they have in the chain, and a baseline beside them, on the
    same model, task, data and seeds.

    Raises:
        UnknownNameError: no run of that chain is in the database.
        MethodbenchError: a link or the baseline has not run alone; names it.
    """
    runs = [run for run in store.runs() if run.status == "ok"]
    results, missing = judge_chain(runs, _select(runs, chain), store.metrics)
    if missing and not results:
        raise MethodbenchError(
            f"{split_use(chain)[0]}: no record of {missing} alone",
            "Run every link alone with the settings that it has in the chain, and the baseline, on the same task.",
        )
    return results


def judge_chain(
    runs: Sequence[Run], chosen: Sequence[Run], metrics_of: Callable[[list[str]], Iterable[MetricValue]]
) -> tuple[list[ChainResult], str]:
    """Compare runs of one chain with its links and the baseline among ``runs``; see :func:`chain_interactions`.

    Args:
        runs: finished runs, oldest first.
        metrics_of: returns the metrics of runs by their ids.

    Returns:
        One result for each model, task and variant, and what is missing for the first that could not be judged.
    """
    by_question: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        by_question.setdefault((question(run), run.seed), []).append(run)
    groups: dict[str, list[list[Run]]] = {}
    missing = ""
    for run in chosen:
        beside = by_question[question(run), run.seed]
        names = run.method.split(SEPARATOR)
        row = [next((other for other in reversed(beside) if other.baseline and other.kind == run.kind), None)]
        for name in names:
            wanted = {
                key.removeprefix(f"{name}."): value
                for key, value in run.params.items()
                if key.startswith(f"{name}.")
            }
            row.append(next((o for o in reversed(beside) if o.method == name and o.params == wanted), None))
        if all(row):
            label = canonical_json([question(run), run.variant])
            groups.setdefault(label, []).append([*(found for found in row if found is not None), run])
        else:
            absent = [
                name for name, found in zip(["the baseline", *names], row, strict=True) if found is None
            ]
            missing = (
                missing or f"{' and '.join(absent)} on {' · '.join(filter(None, [run.model, run.task]))}"
            )
    wanted_runs = [run.id for group in groups.values() for row in group for run in row]
    metrics: dict[str, MetricValue] = {row.run_id: row for row in metrics_of(wanted_runs) if row.primary}
    results = [_interaction(group, metrics) for group in groups.values()]
    found = (result for result in results if result is not None)
    return sorted(found, key=lambda row: (row.task, row.model, row.variant)), missing


def _interaction(group: Sequence[Sequence[Run]], metrics: dict[str, MetricValue]) -> ChainResult | None:
    """Judge one chain; ``group`` has one row per seed: baseline, links, chain."""
    rows = [[metrics.get(run.id) for run in seed] for seed in group]
    kept = [[row for row in seed if row is not None] for seed in rows if all(seed)]
    if not kept or len({row.units for seed in kept for row in seed}) != 1:
        return None
    scores = np.mean([[row.unit_scores() for row in seed] for seed in kept], axis=0)
    metric, chain = kept[0][-1], group[0][-1]
    sign = -1.0 if metric.direction == "lower" else 1.0
    found = interaction(scores[0], list(scores[1:-1]), scores[-1], metric.aggregate)
    low, high = sorted((sign * found.low, sign * found.high))
    verdict: Joint = "the sum"
    if low > 0 or high < 0:
        verdict = "more than the sum" if low > 0 else "harmful"
    return ChainResult(
        chain=chain.method,
        variant=chain.variant,
        model=chain.model,
        task=chain.task,
        metric=metric.name,
        direction=metric.direction,
        scale="mean log score" if metric.aggregate == "exp-mean" else metric.name,
        links=tuple(chain.method.split(SEPARATOR)),
        alone=tuple(sign * effect for effect in found.alone),
        together=sign * found.together,
        excess=sign * found.excess,
        low=low,
        high=high,
        units=found.units,
        seeds=len(kept),
        verdict=verdict,
        runs=tuple(run.id for seed in group for run in seed),
    )
