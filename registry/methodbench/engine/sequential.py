"""Seeds only where they decide something: a sequential paired test between the methods of a plan.

Methods are compared in pairs on each question (model, task and its settings). After each further seed, every pair that
is still open is tested; a method gets another seed while one of its pairs is open. The error rate is split over all
pairs (Bonferroni) and over the looks at each pair (:func:`methodbench.stats.alpha_spent`), so that the chance that
any pair at all is decided wrongly stays below it. Looks use the first k seeds in the order of the plan, whatever else
the database holds: a second call comes to the same decisions and runs nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from methodbench.engine.cell import Cell
from methodbench.engine.driver import Report
from methodbench.engine.plan import Plan
from methodbench.provenance import digest
from methodbench.stats import Array, aggregate, alpha_spent, seeds_and_units_test
from methodbench.store import MetricValue, Store

Verdict = Literal["decided", "equal", "open", "not comparable"]
#: Fewer seeds than this tell nothing about their spread.
_FIRST_LOOK = 2


@dataclass(slots=True)
class Arm:
    """One method with its settings on one question, and its cells in the order of their seeds."""

    name: str
    cells: list[Cell] = field(default_factory=list)
    seeds_used: int = 0


@dataclass(slots=True)
class PairDecision:
    """What is known of two methods on one question."""

    model: str
    task: str
    a: Arm
    b: Arm
    looks: Array
    """Significance level of each look."""
    verdict: Verdict = "open"
    better: str = ""
    """Name of the better one of a decided pair."""
    difference: float = float("nan")
    """Mean per-unit difference, ``a`` minus ``b``."""
    p_value: float = float("nan")
    seeds: int = 0
    """Seeds that the last look used."""
    note: str = ""


@dataclass(slots=True)
class Decisions:
    """What a sequential run came to."""

    report: Report
    error_rate: float
    pairs: list[PairDecision] = field(default_factory=list)
    left_out: list[Cell] = field(default_factory=list)
    """Cells that were not needed."""


def run_until_decided(
    plan: Plan, store: Store, run: Callable[[Plan], Report], *, error_rate: float = 0.05
) -> Decisions:
    """Run a plan seed by seed, and stop each method when all of its comparisons are decided.

    Args:
        plan: cells under several seeds; methods of one question are compared on the seeds that both have.
        run: runs a part of the plan and returns its report.
        error_rate: bound on the chance that any pair is decided wrongly.
    """
    arms, questions = _arms(plan.cells)
    pairs = [pair for question in questions for pair in itertools.combinations(question, 2)]
    made = []
    for a, b in pairs:
        common = min(len(a.cells), len(b.cells))
        cell = a.cells[0]
        looks = alpha_spent(error_rate / len(pairs), max(1, common - _FIRST_LOOK + 1))
        made.append(PairDecision(cell.model.name if cell.model else "", cell.task.name, a, b, looks))
    decisions = Decisions(Report(plan), error_rate, made)
    wanted = _FIRST_LOOK
    active = arms
    while active:
        for arm in active:
            arm.seeds_used = min(wanted, len(arm.cells))
        part = [cell for arm in active for cell in arm.cells[: arm.seeds_used]]
        _join(decisions.report, run(Plan(plan.suite, part, plan.skips if wanted == _FIRST_LOOK else [])))
        scores = _scores(store, decisions.report)
        for pair in made:
            if pair.verdict == "open":
                _look(pair, wanted, scores)
        wanted += 1
        contested = {
            id(arm)
            for pair in made
            if pair.verdict == "open" and min(len(pair.a.cells), len(pair.b.cells)) >= wanted
            for arm in (pair.a, pair.b)
        }
        active = [arm for arm in arms if id(arm) in contested]
    decisions.left_out = [cell for arm in arms for cell in arm.cells[arm.seeds_used :]]
    used = [cell for arm in arms for cell in arm.cells[: arm.seeds_used]]
    decisions.report.plan = Plan(plan.suite, used, plan.skips)
    return decisions


def _arms(cells: Iterable[Cell]) -> tuple[list[Arm], list[list[Arm]]]:
    """Group cells into arms, and arms into questions."""
    arms: dict[str, Arm] = {}
    questions: dict[str, dict[str, Arm]] = {}
    for cell in cells:
        identity = cell.identity()
        asked = {
            name: value
            for name, value in identity.items()
            if not name.startswith("method") and name not in ("seed", "variant")
        }
        key = digest({**identity, "seed": None})
        name = f"{cell.method.name}@{cell.variant}" if cell.variant else cell.method.name
        arm = arms.setdefault(key, Arm(name))
        arm.cells.append(cell)
        questions.setdefault(digest(asked), {})[key] = arm
    return list(arms.values()), [list(question.values()) for question in questions.values()]


def _join(report: Report, part: Report) -> None:
    report.runs |= part.runs
    report.new += part.new
    report.left_out |= part.left_out


def _scores(store: Store, report: Report) -> dict[str, MetricValue]:
    """Return the primary metric of each cell that ended well, by key."""
    keys = {run.id: key for key, run in report.runs.items() if run.status == "ok"}
    return {keys[row.run_id]: row for row in store.metrics(keys) if row.primary}


def _look(pair: PairDecision, seeds: int, scores: Mapping[str, MetricValue]) -> None:
    """Test a pair on its first ``seeds`` seeds."""
    used = list(zip(pair.a.cells[:seeds], pair.b.cells[:seeds], strict=False))
    if len(used) < seeds:
        pair.note = f"only {len(used)} seed{'s' if len(used) != 1 else ''} in the plan"
        return
    rows = [(scores.get(a.key), scores.get(b.key)) for a, b in used]
    found = [(a, b) for a, b in rows if a is not None and b is not None]
    if len(found) < len(rows):
        pair.verdict, pair.note = "not comparable", "a cell of one of them has no score"
        return
    differences = _differences(found)
    if differences is None:
        pair.verdict, pair.note = "not comparable", "they score different units, or not with finite numbers"
        return
    pair.seeds = seeds
    pair.difference, pair.p_value = seeds_and_units_test(differences)
    if not differences.any():
        pair.verdict, pair.note = "equal", "the same scores under every seed"
    elif pair.p_value <= pair.looks[seeds - _FIRST_LOOK]:
        pair.verdict = "decided"
        lower = found[0][0].direction == "lower"
        pair.better = pair.a.name if (pair.difference < 0) == lower else pair.b.name


def _differences(rows: Sequence[tuple[MetricValue, MetricValue]]) -> Array | None:
    """Return paired differences [seeds, units]; one unit where the aggregate is not a mean over units."""
    sides = []
    for side in range(2):
        values = [pair[side].unit_scores() for pair in rows]
        if len({scores.size for scores in values}) != 1:
            return None
        how = rows[0][side].aggregate
        if how not in ("mean", "exp-mean"):
            values = [np.array([aggregate(scores, how)]) for scores in values]
        sides.append(np.stack(values))
    if sides[0].shape != sides[1].shape:
        return None
    differences = sides[0] - sides[1]
    differences = differences[:, ~np.isnan(differences).any(axis=0)]
    return differences if differences.size and np.isfinite(differences).all() else None
