"""Claims: what a paper reports, what of it can be tested here, and what the records say of that.

A method's entry names its file (``claims="awq.toml"``), which lies in ``claims/`` beside the plugin's module::

    method = "some-quantizer"

    [[reported]]                       # the paper's numbers, as printed
    source = "Some Paper, arXiv 0000.00000"
    table = "Table 4"
    measured_by = "the authors"
    task = "WikiText-2 test, windows of 2048 tokens"
    metric = "perplexity"
    values = [
      { model = "Llama-2-7B", setting = "3 bits, group 128", value = 6.24, dense = 5.47 },
    ]

    [[claims]]                         # what this machine can test
    id = "w3-beats-rtn"
    text = "At 3 bits per channel, perplexity lies below rounding's on every causal language model."
    source = "Table 4"
    left = "some-quantizer@w3"
    op = "<"
    right = "rtn@w3"
    kinds = ["causal-lm"]
    tasks = ["*-ppl"]

A claim is an inequality over records. It is tested wherever both sides were run on the same question: same model,
weights, task, settings of the task, data, seeds, number type, device and threads. Each such *condition* gets a verdict
from the paired interval of ``left - right``; the claim gets the worst of them (``holds = "everywhere"``) or the best
(``holds = "somewhere"``).
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from methodbench.composition import preset_params, split_use
from methodbench.documents import Strict, line_of, parse_document
from methodbench.errors import ClaimsError, MethodbenchError
from methodbench.tuning import is_trial, regime

if TYPE_CHECKING:
    from methodbench.catalog import Catalog
    from methodbench.entries import Method
    from methodbench.store import MetricValue, Run, Store

Operator = Literal["<", "<=", ">", ">=", "=="]
Verdict = Literal["reproduced", "within interval", "not reproduced", "contradicted", "not attempted"]

#: Every verdict and what it says, from best to worst; the last stands outside of that order.
VERDICTS: Mapping[Verdict, str] = {
    "reproduced": "it holds, and the 95 % interval leaves no room for the contrary",
    "within interval": "it holds, but the 95 % interval includes the contrary",
    "not reproduced": "it does not hold, but the 95 % interval includes that it does; or the method failed",
    "contradicted": "it does not hold, and the 95 % interval leaves no room for it",
    "not attempted": "no records on both sides",
}

#: Numbers of a record that a claim may use besides metrics; ``facts.NAME`` names one that the method noted.
RECORD_FIELDS = (
    "bits_per_weight",
    "accounted_bits",
    "model_bytes",
    "peak_memory_bytes",
    "wall_seconds",
    "throughput",
)


class ReportedValue(Strict):
    """One number of a paper."""

    value: float = Field(description="the number as printed, in the unit of its table")
    model: str = Field(default="", description="the model as the paper calls it")
    setting: str = Field(default="", description="bits, group size, sparsity, learning rate ...")
    dense: float | None = Field(default=None, description="the same for the untouched model, where printed")
    task: str = Field(default="", description="where it differs from the table's")
    metric: str = Field(default="", description="where it differs from the table's")
    note: str = Field(default="", description="what a reader must know before comparing it")


class Reported(Strict):
    """Numbers of one table of a paper that share task, metric and source."""

    source: str = Field(min_length=1, description="where the number was read: paper, README, transcription")
    table: str = Field(default="", description="table, figure or section")
    measured_by: str = Field(
        min_length=1, description="who ran it: the authors, or the authors of which paper"
    )
    task: str = Field(min_length=1, description="data and protocol, as the paper has them")
    metric: str = Field(min_length=1, description="name of what was measured")
    measured_as: str = Field(
        default="", description="the metric here that measures the same, where it has another name"
    )
    unit: str = Field(default="", description="%, bits, seconds ...; empty for plain numbers")
    values: Annotated[list[ReportedValue], Field(min_length=1)] = Field(description="the numbers")


def _side(value: Any) -> Any:
    if isinstance(value, str):
        return {"method": value}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {"value": value}
    return value


class Side(Strict):
    """One side of an inequality: a method's metric, or a number; ``factor * metric + offset``.

    Sides with settings of the task compare these settings: what a protocol's paper says of one method.

    The bare ``"name"`` or ``"name@preset"`` is short for a method, a bare number for itself.
    """

    method: str = Field(default="", description="name or name@preset, or a chain of them joined by +")
    params: dict[str, Any] = Field(default={}, description="hyperparameters beyond the preset")
    free: list[str] = Field(
        default=[],
        description="hyperparameters that may have any value; others must be as the preset has them",
    )
    task_params: dict[str, Any] = Field(
        default={}, description="settings of the protocol on this side, where the sides differ in them"
    )
    factor: float = Field(default=1.0, description="multiplies the metric")
    offset: float = Field(default=0.0, description="added to the metric, in its unit")
    value: float | None = Field(default=None, description="a number instead of a method")

    @model_validator(mode="after")
    def _one_of_both(self) -> Side:
        if (self.value is None) == (not self.method):
            raise ValueError("give either a method or a value")
        others = self.params or self.free or self.task_params or self.factor != 1 or self.offset
        if self.value is not None and others:
            raise ValueError("a value stands alone, without params, free, task_params, factor or offset")
        return self

    @property
    def label(self) -> str:
        """The side as a reader would write it."""
        if self.value is not None:
            return f"{self.value:g}"
        extra = ", ".join(f"{key}={value}" for key, value in {**self.params, **self.task_params}.items())
        text = self.method + (f" ({extra})" if extra else "")
        text = text if self.factor == 1 else f"{self.factor:g} × {text}"
        return text if not self.offset else f"{text} {'+' if self.offset > 0 else '−'} {abs(self.offset):g}"


class Claim(Strict):
    """A scaled-down claim: an inequality over records of this machine."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")] = Field(
        description="short name, unique in the file"
    )
    text: str = Field(min_length=1, description="the claim in one sentence")
    source: str = Field(min_length=1, description="what in the paper it scales down: table, section, figure")
    left: Annotated[Side, BeforeValidator(_side)] = Field(
        description="left side; the method or one of its variants"
    )
    op: Operator = Field(description="<, <=, >, >= or ==")
    right: Annotated[Side, BeforeValidator(_side)] = Field(description="right side")
    metric: str = Field(
        default="",
        description="name of the metric (the task's primary one by default), a number of the record or facts.NAME",
    )
    tolerance: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="how far apart the sides of == may be, in the metric's unit"
    )
    exact: bool = Field(
        default=False, description="the metric has no sampling error here: the sign of the difference decides"
    )
    kinds: list[str] = Field(default=[], description="kinds of models; every kind by default")
    models: list[str] = Field(default=["*"], description="shell-style patterns of models' names")
    tasks: list[str] = Field(default=["*"], description="shell-style patterns of tasks' names")
    task_params: dict[str, Any] = Field(default={}, description="settings of the protocol that must be so")
    holds: Literal["everywhere", "somewhere"] = Field(
        default="everywhere", description="whether every condition must agree, or one is enough"
    )

    @model_validator(mode="after")
    def _sides(self) -> Claim:
        if self.left.value is not None:
            raise ValueError("the left side must be a method; put the number on the right")
        if self.right.value is None and set(self.left.task_params) != set(self.right.task_params):
            raise ValueError("settings of the task that one side names must be named by the other as well")
        if set(self.task_params) & {*self.left.task_params, *self.right.task_params}:
            raise ValueError("a setting of the task is either that of a side or of both")
        if self.tolerance and self.op != "==":
            raise ValueError("tolerance belongs to ==; give the side a factor or an offset instead")
        return self

    @property
    def statement(self) -> str:
        """The inequality on one line."""
        sign = {"<=": "≤", ">=": "≥", "==": "="}.get(self.op, self.op)
        within = f" ± {self.tolerance:g}" if self.tolerance else ""
        of = f"{self.metric}: " if self.metric else ""
        return f"{of}{self.left.label} {sign} {self.right.label}{within}"


class Claims(Strict):
    """The file ``claims/<method>.toml``."""

    method: str = Field(description="name of the method")
    reported: list[Reported] = Field(default=[], description="the paper's numbers")
    settings: dict[str, dict[str, Any]] = Field(
        default={},
        description="what a setting of the reported numbers is in hyperparameters of the method; records with these "
        "stand beside the number",
    )
    nothing_reported: str = Field(default="", description="why there are no numbers of the paper")
    claims: list[Claim] = Field(default=[], description="what can be tested here")
    nothing_claimed: str = Field(default="", description="why nothing can be tested here")

    @model_validator(mode="after")
    def _says_something(self) -> Claims:
        for found, excuse, what in (
            (self.reported, self.nothing_reported, "reported"),
            (self.claims, self.nothing_claimed, "claims"),
        ):
            reason = "nothing_" + what.replace("claims", "claimed")
            if bool(found) == bool(excuse):
                raise ValueError(f"give [[{what}]], or say in {reason!r} why there are none")
        used = {row.setting for block in self.reported for row in block.values}
        unused = sorted(set(self.settings) - used)
        if unused:
            raise ValueError(f"settings names {unused[0]!r}, which no reported number has")
        seen: set[str] = set()
        for claim in self.claims:
            if claim.id in seen:
                raise ValueError(f"two claims have the id {claim.id!r}")
            seen.add(claim.id)
        return self


def parse_claims(text: str, filename: str) -> Claims:
    """Parse the text of a file of claims; ``filename`` appears in messages.

    Raises:
        ClaimsError: names file, line and key.
    """
    return parse_document(text, filename, Claims, ClaimsError)


def claims_path(catalog: Catalog, method: Method) -> Path:
    """Return where a method's file of claims lies: in ``claims/`` beside the module of its plugin.

    Raises:
        ClaimsError: the entry names no file, or its plugin's module lies in none.
    """
    if not method.claims:
        raise ClaimsError(f"{method.name} has no claims", 'Its entry names no file: claims="....toml".')
    owner = catalog.owners.get(("method", method.name), "")
    module = next((plugin.module for plugin in catalog.plugins if plugin.name == owner), "")
    origin = getattr(sys.modules.get(module), "__file__", None)
    if origin is None:
        raise ClaimsError(f"cannot find the plugin of {method.name}: its module {module!r} has no file")
    return Path(origin).parent / "claims" / method.claims


def load_claims(catalog: Catalog, name: str) -> Claims:
    """Load the claims of a method, and check that the methods and presets they name exist.

    Raises:
        UnknownNameError: no such method.
        ClaimsError: it has no claims, or the file cannot be read or does not say what it must; with file and line.
    """
    method = catalog.method(name)
    path = claims_path(catalog, method)
    shown = f"{path.parent.parent.name}/claims/{path.name}"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ClaimsError(
            f"the entry of {name} names claims {method.claims!r}, but {path} does not exist"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ClaimsError(f"cannot read {path}: {error}") from error
    found = parse_claims(text, shown)
    if found.method != name:
        where = line_of(text, shown, ("method",))
        raise ClaimsError(
            f"{shown}:{where}: method: these are the claims of {found.method!r}, not of {name!r}"
        )
    for index, claim in enumerate(found.claims):
        for part in ("left", "right"):
            side: Side = getattr(claim, part)
            if side.value is None:
                try:
                    _wanted(catalog, side)
                except MethodbenchError as error:
                    where = line_of(text, shown, ("claims", index, part))
                    raise ClaimsError(
                        f"{shown}:{where}: claims.{index}.{part}: {error.message}", error.hint
                    ) from None
    return found


def _wanted(catalog: Catalog, side: Side) -> tuple[str, dict[str, Any]]:
    """Return the method and the hyperparameters that a side asks for."""
    name, preset = split_use(side.method)
    method = catalog.method(name)
    asked = {**(preset_params(method, preset) if preset else {}), **side.params}
    # Records hold what JSON makes of a setting: sequences are lists.
    return method.name, {
        key: list(value) if isinstance(value, tuple) else value for key, value in asked.items()
    }


@dataclass(frozen=True, slots=True)
class Condition:
    """One place where a claim was tested."""

    model: str
    task: str
    task_params: Mapping[str, Any]
    metric: str
    verdict: Verdict
    left: float | None
    right: float | None
    """The right side with factor and offset applied."""
    difference: float | None
    """``left - right``, both with factor and offset."""
    low: float | None = None
    high: float | None = None
    units: int = 0
    seeds: int = 0
    reason: str = ""
    runs_left: tuple[str, ...] = ()
    runs_right: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """A claim with its verdict."""

    method: str
    claim: Claim
    verdict: Verdict
    conditions: tuple[Condition, ...] = field(default=())


def judge_claims(store: Store | None, catalog: Catalog, claims: Claims) -> list[ClaimResult]:
    """Judge every claim by the records; None stands for an empty database.

    Of several runs of one cell the newest counts, a finished one before a failure.
    """
    sides = [side for claim in claims.claims for side in (claim.left, claim.right) if side.value is None]
    names = {_wanted(catalog, side)[0] for side in sides}
    runs = [run for run in store.runs() if run.method in names and not is_trial(run.variant)] if store else []
    metrics: dict[str, dict[str, MetricValue]] = {}
    if store:
        for row in store.metrics(run.id for run in runs):
            metrics.setdefault(row.run_id, {})[row.name] = row
    return [judge_claim(catalog, claims.method, claim, runs, metrics) for claim in claims.claims]


def judge_claim(
    catalog: Catalog,
    method: str,
    claim: Claim,
    runs: Sequence[Run],
    metrics: Mapping[str, Mapping[str, MetricValue]],
) -> ClaimResult:
    """Judge one claim.

    Args:
        runs: oldest first.
        metrics: the metrics of each run, by run and name.
    """
    from methodbench.comparison import question

    left = _runs_of(catalog, claim, claim.left, runs)
    right = _runs_of(catalog, claim, claim.right, runs) if claim.right.value is None else []
    # What a side leaves free may be what sets it apart: a run that both describe is of the one that says more.
    shared = {run.id for run in left} & {run.id for run in right}
    free = len(claim.left.free) - len(claim.right.free)
    left = [run for run in left if run.id not in shared or free < 0]
    right = [run for run in right if run.id not in shared or free > 0]
    groups: dict[str, tuple[list[Run], list[Run]]] = {}
    for run in left:
        groups.setdefault(question(run, claim.left.task_params), ([], []))[0].append(run)
    for run in right:
        asked = question(run, claim.right.task_params)
        if asked in groups:
            groups[asked][1].append(run)
    conditions = []
    alone = claim.right.value is not None
    for group in groups.values():
        of_left, of_right = _by_seed(group[0], claim.left), _by_seed(group[1], claim.right)
        seeds = sorted(of_left.keys() if alone else of_left.keys() & of_right.keys())
        if seeds:
            paired = [] if alone else [of_right[seed] for seed in seeds]
            condition = _judge(claim, [of_left[seed] for seed in seeds], paired, metrics)
            if condition is not None:
                conditions.append(condition)
    order = list(VERDICTS)
    judged = sorted((c.verdict for c in conditions if c.verdict != "not attempted"), key=order.index)
    verdict: Verdict = "not attempted"
    if judged:
        verdict = judged[-1] if claim.holds == "everywhere" else judged[0]
    conditions.sort(key=lambda c: (c.model, c.task, str(c.task_params)))
    return ClaimResult(method, claim, verdict, tuple(conditions))


def _runs_of(catalog: Catalog, claim: Claim, side: Side, runs: Iterable[Run]) -> list[Run]:
    """Return the newest run of each cell that a side speaks of."""
    name, wanted = _wanted(catalog, side)
    settings = {**claim.task_params, **side.task_params}
    newest: dict[str, Run] = {}
    for run in runs:
        if (
            run.method == name
            and all(run.params.get(key) == value for key, value in wanted.items() if key not in side.free)
            and not set(run.params_passed) - set(wanted) - set(side.free)
            and (not claim.kinds or run.model_kind in claim.kinds)
            and any(fnmatchcase(run.model, pattern) for pattern in claim.models)
            and any(fnmatchcase(run.task, pattern) for pattern in claim.tasks)
            and all(run.task_params.get(key) == value for key, value in settings.items())
        ):
            before = newest.get(run.cell_key)
            if before is None or run.status == "ok" or before.status != "ok":
                newest[run.cell_key] = run
    return list(newest.values())


def _by_seed(runs: Iterable[Run], side: Side) -> dict[int, Run]:
    """Return the newest run of each seed; where a side leaves hyperparameters free, the newest that was tuned."""

    def order(run: Run) -> tuple[bool, Any]:
        return bool(side.free) and regime(run.variant) == "tuned", run.started_at

    return {run.seed: run for run in sorted(runs, key=order)}


def _judge(
    claim: Claim,
    of_left: Sequence[Run],
    of_right: Sequence[Run],
    metrics: Mapping[str, Mapping[str, MetricValue]],
) -> Condition | None:
    """Judge a claim on one question; None where the task has no such metric."""
    first = of_left[0]
    where: dict[str, Any] = {
        "model": first.model,
        "task": first.task,
        "task_params": first.task_params,
        "runs_left": tuple(run.id for run in of_left),
        "runs_right": tuple(run.id for run in of_right),
    }
    unknown = {**where, "metric": claim.metric, "left": None, "right": None, "difference": None}
    for runs, side, verdict in (
        (of_left, claim.left, "not reproduced"),
        (of_right, claim.right, "not attempted"),
    ):
        broken = [run for run in runs if run.status != "ok"]
        if broken:
            reason = f"{side.label}: {broken[0].status}, {broken[0].reason}".rstrip(", ")
            return Condition(**unknown, verdict=verdict, reason=reason)  # type: ignore[arg-type]
    if claim.metric in RECORD_FIELDS or claim.metric.startswith("facts."):
        left, right = _fact(claim, of_left), _fact(claim, of_right)
        names = claim.metric
    else:
        rows_left, rows_right = _rows(claim, of_left, metrics), _rows(claim, of_right, metrics)
        if rows_left is None or rows_right is None:
            return None
        names = rows_left[0].name
        if len({row.units for row in (*rows_left, *rows_right)}) != 1:
            return Condition(**unknown, verdict="not attempted", reason="the sides scored different units")
        left, right = _scores(rows_left), _scores(rows_right)
    where["metric"] = names
    if left is None or (right is None and claim.right.value is None):
        return Condition(
            **{**unknown, "metric": names}, verdict="not attempted", reason=f"the record has no {names}"
        )
    return Condition(**where, **_decide(claim, left, right), seeds=len(of_left))


@dataclass(frozen=True, slots=True)
class _Scores:
    """Scores per unit with the way to sum them up; ``exact`` where nothing was sampled."""

    values: Any
    aggregate: str
    exact: bool = False


def _rows(
    claim: Claim, runs: Sequence[Run], metrics: Mapping[str, Mapping[str, MetricValue]]
) -> list[MetricValue] | None:
    found = []
    for run in runs:
        of_run = metrics.get(run.id, {})
        primary = next((row for row in of_run.values() if row.primary), None)
        row = of_run.get(claim.metric) if claim.metric else primary
        if row is None:
            return None
        found.append(row)
    return found


def _scores(rows: Sequence[MetricValue]) -> _Scores | None:
    """Average scores over seeds; where each run has one score, the seeds are the units."""
    import numpy as np

    if not rows:
        return None
    scores = np.stack([row.unit_scores() for row in rows])
    if scores.shape[1] == 1:
        return _Scores(scores[:, 0], "mean" if rows[0].aggregate == "single" else rows[0].aggregate)
    return _Scores(scores.mean(axis=0), rows[0].aggregate)


def _fact(claim: Claim, runs: Sequence[Run]) -> _Scores | None:
    import numpy as np

    name = claim.metric.removeprefix("facts.")
    values = [
        run.facts.get(name) if claim.metric.startswith("facts.") else getattr(run, claim.metric)
        for run in runs
    ]
    if not values or any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in values):
        return None
    return _Scores(np.array(values, dtype=np.float64), "mean", exact=True)


def _decide(claim: Claim, left: _Scores, right: _Scores | None) -> dict[str, Any]:
    from methodbench import stats

    a, b = claim.left, claim.right
    value_left = a.factor * stats.aggregate(left.values, left.aggregate) + a.offset
    if right is None:
        assert b.value is not None
        value_right = b.value
    else:
        value_right = b.factor * stats.aggregate(right.values, right.aggregate) + b.offset
    difference = value_left - value_right
    reason = ""
    low: float | None = None
    high: float | None = None
    if math.isnan(difference):
        verdict: Verdict = "not reproduced" if math.isnan(value_left) else "not attempted"
        reason = f"{(a if math.isnan(value_left) else b).label}: not a number"
    elif left.exact or claim.exact:
        verdict = verdict_of(claim.op, difference, difference, difference, claim.tolerance)
    else:
        shift = a.offset - (b.offset if right is not None else value_right)
        bounds = stats.difference_interval(
            left.values,
            right.values if right is not None else None,
            left.aggregate,
            factors=(a.factor, b.factor),
            shift=shift,
        )
        if bounds is None:
            reason = "a single score has no interval"
        else:
            low, high = bounds
        verdict = verdict_of(
            claim.op,
            difference,
            -math.inf if low is None else low,
            math.inf if high is None else high,
            claim.tolerance,
        )
    return {
        "verdict": verdict,
        "left": value_left,
        "right": value_right,
        "difference": difference,
        "low": low,
        "high": high,
        "units": int(left.values.size),
        "reason": reason,
    }


def verdict_of(op: Operator, difference: float, low: float, high: float, tolerance: float = 0.0) -> Verdict:
    """Return what ``left - right`` and its interval say of ``left op right``; see :data:`VERDICTS`."""
    if op in (">", ">="):
        difference, low, high = -difference, -high, -low
    if op == "==":
        holds, sure = abs(difference) <= tolerance, -tolerance <= low and high <= tolerance
        contrary = low > tolerance or high < -tolerance
    elif op in ("<", ">"):
        holds, sure, contrary = difference < 0, high < 0, low >= 0
    else:
        holds, sure, contrary = difference <= 0, high <= 0, low > 0
    if holds:
        return "reproduced" if sure else "within interval"
    return "contradicted" if contrary else "not reproduced"


def commands_for(catalog: Catalog, claim: Claim) -> list[str]:
    """Return command lines that make records for a claim, on the first model and task that fit."""
    sides = [side for side in (claim.left, claim.right) if side.value is None]
    methods = [catalog.method(split_use(side.method)[0]) for side in sides]
    for task in catalog.tasks.values():
        measured = (
            not claim.metric
            or claim.metric in RECORD_FIELDS
            or claim.metric.startswith("facts.")
            # What a probe measures, it names itself.
            or task.kinds == ("probe",)
            or any(metric.name == claim.metric for metric in task.metrics)
        )
        if not measured or not any(fnmatchcase(task.name, pattern) for pattern in claim.tasks):
            continue
        for model in catalog.models.values() if task.accepts else [None]:
            fits = model is None or (
                (not claim.kinds or model.kind in claim.kinds)
                and any(fnmatchcase(model.name, pattern) for pattern in claim.models)
            )
            if fits and not any(catalog.mismatch(method, model, task) for method in methods):
                where = ["--model", model.name] if model else []
                return _commands(claim, sides, [*where, "--task", task.name])
    return []


def _commands(claim: Claim, sides: Sequence[Side], where: Sequence[str]) -> list[str]:
    by_params: dict[str, list[Side]] = {}
    for side in sides:
        by_params.setdefault(repr((side.params, side.task_params)), []).append(side)
    found = []
    for group in by_params.values():
        methods = [word for name in dict.fromkeys(s.method for s in group) for word in ("--method", name)]
        params = [word for key, value in group[0].params.items() for word in ("--param", f"{key}={value}")]
        of_task = {**claim.task_params, **group[0].task_params}
        settings = [word for key, value in of_task.items() for word in ("--task-param", f"{key}={value}")]
        found.append(shlex.join(["methodbench", "run", *methods, *params, *where, *settings]))
    return found
