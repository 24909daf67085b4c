"""Fair tuning: the same number of trials for every method, then the best one under seeds that chose nothing.

This follows the external tuning of AlgoPerf (arXiv 2306.07179) in small. A trial is an ordinary cell: it is recorded,
reused and resumed like any other. When all trials of a study have ended, the one with the best metric of choice, the
mean over the seeds of the trials, is run under the seeds of the comparison. That cell is an ordinary one as well, whose
record says what was tried and how much the choice mattered. A trial that failed is worse than every other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from methodbench.engine.cell import Cell
from methodbench.engine.driver import Report
from methodbench.engine.plan import Plan, Skip, Study
from methodbench.store import Run, Store
from methodbench.tuning import labelled


def run_with_studies(plan: Plan, store: Store, run: Callable[[Plan], Report]) -> Report:
    """Run a plan, then what its studies come to, and return the report of both.

    Args:
        run: runs a plan without looking at its studies.
    """
    report = run(plan)
    if not plan.studies:
        return report
    cells, skips = chosen(plan, store, report.runs)
    after = run(Plan(plan.suite, cells, skips))
    whole = Plan(plan.suite, [*plan.cells, *cells], [*plan.skips, *skips], plan.studies)
    return Report(
        whole, report.runs | after.runs, [*report.new, *after.new], report.left_out | after.left_out
    )


def chosen(plan: Plan, store: Store, runs: Mapping[str, Run]) -> tuple[list[Cell], list[Skip]]:
    """Return the cells that the studies of a plan lead to, and why some lead to none.

    Args:
        runs: newest runs of the cells of the plan, by key.
    """
    values = _values(plan, store, runs)
    cells: dict[str, Cell] = {}
    skips = []
    for study in plan.studies:
        first = study.trials[0][0]
        missing = sum(cell.key not in runs for trial in study.trials for cell in trial)
        scores = [_mean([values.get(cell.key, math.nan) for cell in trial]) for trial in study.trials]
        if missing or all(math.isnan(score) for score in scores):
            why = f"{missing} of its trials have not run" if missing else "every one of its trials failed"
            model = first.model.name if first.model else ""
            name = labelled(study.variant, "tuned")
            skips.append(Skip(first.method.name, name, model, first.task.name, f"not tuned: {why}"))
            continue
        for cell in _best(study, scores, runs):
            cells.setdefault(cell.key, cell)
    return list(cells.values()), skips


def metric_of_choice(cell: Cell) -> tuple[str, bool]:
    """Return the metric that trials on the task of ``cell`` are compared by, and whether lower is better."""
    name = cell.task.tuned_by or cell.task.primary.name
    metric = next(metric for metric in cell.task.metrics if metric.name == name)
    return name, metric.direction == "lower"


def _values(plan: Plan, store: Store, runs: Mapping[str, Run]) -> dict[str, float]:
    """Return the metric of choice of each trial that ended well, by key of its cell."""
    trials = {cell.key: cell for study in plan.studies for trial in study.trials for cell in trial}
    ended = {run.id: key for key, run in runs.items() if key in trials and run.status == "ok"}
    found = {}
    for row in store.metrics(ended):
        key = ended[row.run_id]
        if row.name == metric_of_choice(trials[key])[0] and row.value is not None:
            found[key] = row.value
    return found


def _mean(values: list[float]) -> float:
    """Return the mean; NaN where one of them is not finite."""
    return float(np.mean(values)) if all(map(math.isfinite, values)) else math.nan


def sensitivity(scores: list[float], *, lower_is_better: bool) -> float:
    """Return how much the mean trial loses against the best; a failed one, NaN, counts as the worst that ended."""
    costs = np.array(scores) if lower_is_better else -np.array(scores)
    costs = np.where(np.isnan(costs), np.nanmax(costs), costs)
    return float(costs.mean() - costs.min())


def _best(study: Study, scores: list[float], runs: Mapping[str, Run]) -> list[Cell]:
    """Return the cells of the best trial under the seeds of the comparison."""
    name, lower = metric_of_choice(study.trials[0][0])
    costs = np.array(scores) if lower else -np.array(scores)
    place = int(np.nanargmin(costs))
    trial = study.trials[place][0]
    record: dict[str, Any] = {
        "regime": "tuned",
        "trials": study.tuning.trials,
        "seed": study.tuning.seed,
        "trial_seeds": list(study.tuning.trial_seeds),
        "metric": name,
        "best_trial": place + 1,
        "best": dict(study.points[place]),
        "best_value": scores[place],
        "sensitivity": sensitivity(scores, lower_is_better=lower),
        "failed_trials": sum(map(math.isnan, scores)),
        "tried": [
            {
                "params": dict(point),
                "value": None if math.isnan(score) else score,
                "runs": [runs[cell.key].id for cell in cells],
            }
            for point, score, cells in zip(study.points, scores, study.trials, strict=True)
        ],
    }
    return [
        dataclasses.replace(trial, seed=seed, variant=labelled(study.variant, "tuned"), tuning=record)
        for seed in study.seeds
    ]
