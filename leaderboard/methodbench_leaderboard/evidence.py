"""What stands behind a method besides its scores: claims with verdicts, chains, descriptions, sensitivities."""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import math
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from methodbench.catalog import Catalog
from methodbench.claims import VERDICTS, ClaimResult, Claims, Condition, judge_claim, load_claims
from methodbench.comparison import ChainResult, judge_chain
from methodbench.composition import is_chain, split_use
from methodbench.engine.probe import describe_all
from methodbench.errors import MethodbenchError
from methodbench.provenance import module_file
from methodbench.store import MetricValue, Run
from methodbench_leaderboard import diagrams, formats
from methodbench_leaderboard.aggregate import Cell, Estimate, Question, Row, Table
from methodbench_leaderboard.records import Records

#: Runs of a chain and of what stands beside it that are compared.
MOST_CHAIN_RUNS = 2_000


@dataclass(frozen=True, slots=True)
class Badge:
    """Verdicts of a method's claims in a few characters."""

    kind: str
    """``good``, ``mixed`` or ``poor``."""
    text: str
    words: str


class Evidence:
    """Claims, chains and descriptions of the methods of a catalogue, judged by the records once per build."""

    def __init__(self, records: Records, catalog: Catalog) -> None:
        self._records = records
        self._catalog = catalog

    @cached_property
    def _loaded(self) -> dict[str, Claims | str]:
        """Claims of each method that names a file, or what is wrong with it."""
        found: dict[str, Claims | str] = {}
        for name, entry in sorted(self._catalog.methods.items()):
            if entry.claims:
                try:
                    found[name] = load_claims(self._catalog, name)
                except MethodbenchError as error:
                    found[name] = error.message
        return found

    def claims(self, method: str) -> Claims | None:
        """Return the claims of a method; None where it has none that can be read."""
        found = self._loaded.get(method)
        return found if isinstance(found, Claims) else None

    def problem(self, method: str) -> str:
        """Return why the claims of a method cannot be shown; empty when nothing is wrong."""
        found = self._loaded.get(method)
        return found if isinstance(found, str) else ""

    @cached_property
    def judged(self) -> dict[str, list[ClaimResult]]:
        """Verdicts of all claims, by method."""
        files = [found for found in self._loaded.values() if isinstance(found, Claims)]
        names = {
            split_use(side.method)[0]
            for found in files
            for claim in found.claims
            for side in (claim.left, claim.right)
            if side.method
        }
        runs, metrics = self._runs_of(names)
        return {
            found.method: [
                judge_claim(self._catalog, found.method, claim, runs, metrics) for claim in found.claims
            ]
            for found in files
        }

    def _runs_of(self, methods: Iterable[str]) -> tuple[list[Run], dict[str, dict[str, MetricValue]]]:
        """Return the runs that count of some methods, oldest first, and their metrics by run and name.

        Of several runs of one cell the newest counts, a finished one before a failure.
        """
        frame = (
            self._records.frame.with_row_index("order")
            .filter(pl.col("method").is_in(sorted(methods)))
            .with_columns(is_ok=pl.col("status") == "ok")
            .sort("is_ok", "order")
            .unique("cell_key", keep="last", maintain_order=True)
            .sort("order")
        )
        return self._load(frame["id"].to_list())

    def _load(self, ids: Sequence[str]) -> tuple[list[Run], dict[str, dict[str, MetricValue]]]:
        runs = [Run.model_construct(**row._mapping) for row in self._records.details(ids)]
        metrics = {
            run_id: {row.name: row for row in rows} for run_id, rows in self._records.metrics(ids).items()
        }
        return runs, metrics

    def badge(self, method: str) -> Badge | None:
        """Return the badge of a method; None where no claim of it was tested."""
        return self._badges.get(method)

    @cached_property
    def _badges(self) -> dict[str, Badge]:
        found = {}
        for method, results in self.judged.items():
            counts = Counter(result.verdict for result in results)
            tested = len(results) - counts["not attempted"]
            if not tested:
                continue
            held = counts["reproduced"] + counts["within interval"]
            words = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
            kind = "good" if held == tested else "poor" if not held else "mixed"
            found[method] = Badge(kind, f"{held}/{tested}", f"Claims of the paper: {words}")
        return found

    @cached_property
    def descriptions(self) -> dict[str, dict[str, Any]]:
        """``{"doc", "params"}`` of the methods that were run, asked of a process of its own and cached."""
        used = set(self._records.frame["method"].unique())
        return describe_all(
            {name: entry.impl for name, entry in sorted(self._catalog.methods.items()) if name in used}
        )

    def idea(self, method: str) -> str:
        """Return what the module of a method says of it; empty where that cannot be read. Nothing is imported."""
        entry = self._catalog.methods.get(method)
        if entry is None:
            return ""
        path = module_file(entry.impl.partition(":")[0])
        return _docstring(path) if path else ""

    @cached_property
    def chains(self) -> dict[str, tuple[list[ChainResult], str]]:
        """What the links of each chain that was run do together, and what is missing to say so."""
        frame = self._records.frame.filter(pl.col("status") == "ok")
        found = {}
        for chain in sorted(name for name in frame["method"].unique() if is_chain(name)):
            links = [part.strip() for part in chain.split("+")]
            own = frame.filter(pl.col("method") == chain)
            where = own.select("task", "model", "kind").unique()
            beside = frame.join(where, on=["task", "model", "kind"], how="semi").filter(
                pl.col("method").is_in([chain, *links]) | pl.col("baseline")
            )
            ids = beside.unique("cell_key", keep="last", maintain_order=True)["id"].tail(MOST_CHAIN_RUNS)
            runs, metrics = self._load(ids.to_list())

            def metrics_of(
                wanted: list[str], known: Mapping[str, Mapping[str, MetricValue]] = metrics
            ) -> Iterator[MetricValue]:
                return (row for run_id in wanted for row in known.get(run_id, {}).values())

            found[chain] = judge_chain(runs, [run for run in runs if run.method == chain], metrics_of)
        return found


def differing(condition: Condition, others: Sequence[Condition]) -> str:
    """Return the settings that tell a condition of a claim from the others on the same task."""
    params = condition.task_params
    beside = [other.task_params for other in others if other.task == condition.task]
    names = [key for key in sorted(params) if any(other.get(key) != params[key] for other in beside)]
    return ", ".join(f"{key}={formats.plain(params[key])}" for key in names)


def _docstring(path: Path) -> str:
    """Return the docstring of a module: the first token of its file, comments aside."""
    with contextlib.suppress(OSError, SyntaxError, ValueError, tokenize.TokenError), path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.STRING:
                return inspect.cleandoc(str(ast.literal_eval(token.string)))
            if token.type not in (tokenize.ENCODING, tokenize.COMMENT, tokenize.NL):
                break
    return ""


@dataclass(frozen=True, slots=True)
class Counterpart:
    """What stands beside a number of a paper: a configuration here with the same settings, and what is not the same."""

    row: Row
    question: Question
    cell: Cell
    estimate: Estimate
    untouched: Estimate | None
    """The first baseline on the same question."""
    differs: tuple[tuple[str, Any, Any], ...]
    """Hyperparameters that the paper states and this configuration has otherwise: name, there, here."""
    beyond: tuple[tuple[str, Any], ...]
    """Hyperparameters that the paper's table does not state and that are not the defaults."""


def counterparts(
    found: Claims, results: Iterable[tuple[Table, Row]], defaults: Mapping[str, Any]
) -> dict[tuple[int, int], Counterpart]:
    """Return the configuration nearest to each reported number, by places of its block and of the number in it.

    The nearest has most of the stated hyperparameters, at least one, then the fewest that are neither stated nor the
    defaults. Numbers whose setting the file does not give as hyperparameters have none.

    Args:
        results: the configurations of the method, each with the table that it stands in.
        defaults: of the method's hyperparameters.
    """
    scored = [
        (table, row, question, estimate)
        for table, row in results
        for question in table.questions
        if question.key in row.cells
        for estimate in row.cells[question.key].estimates.values()
        if math.isfinite(estimate.value)
    ]
    pairs = {}
    for at, block in enumerate(found.reported):
        name = block.measured_as or block.metric
        candidates = [item for item in scored if item[3].metric.name == name]
        for place, reported in enumerate(block.values):
            stated = found.settings.get(reported.setting, {})
            if not stated or reported.metric:
                continue
            nearest = min(candidates, key=lambda item: _distance(item[1], stated, defaults), default=None)
            if nearest is not None and any(
                nearest[1].params.get(key) == value for key, value in stated.items()
            ):
                pairs[at, place] = _counterpart(*nearest, stated, defaults)
    return pairs


def _distance(row: Row, stated: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[int, int]:
    other = sum(row.params.get(key) != value for key, value in stated.items())
    return other, len(_beyond(row, stated, defaults))


def _beyond(row: Row, stated: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (key, value)
        for key, value in sorted(row.params.items())
        if key not in stated and key in defaults and defaults[key] != value
    )


def _counterpart(
    table: Table,
    row: Row,
    question: Question,
    estimate: Estimate,
    stated: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> Counterpart:
    untouched = next(
        (
            cell.estimates[estimate.metric.name]
            for baseline in table.baselines
            for cell in [baseline.cells.get(question.key)]
            if cell is not None and estimate.metric.name in cell.estimates
        ),
        None,
    )
    differs = tuple(
        (key, value, row.params.get(key)) for key, value in stated.items() if row.params.get(key) != value
    )
    beyond = _beyond(row, stated, defaults)
    return Counterpart(row, question, row.cells[question.key], estimate, untouched, differs, beyond)


@dataclass(frozen=True, slots=True)
class SensitivityView:
    """The primary metric of one question against one hyperparameter."""

    question: Question
    name: str
    chart: diagrams.Sensitivity


def sensitivities(results: Iterable[tuple[Row, Sequence[Question]]]) -> list[SensitivityView]:
    """Return a chart for each hyperparameter and question of which several values were run, all else equal.

    Args:
        results: configurations of one method, each with the questions of its table.
    """
    rows: dict[str, tuple[Question, dict[str, Row]]] = {}
    for row, questions in results:
        for question in questions:
            cell = row.cells.get(question.key)
            if cell is not None and cell.primary is not None:
                # A baseline is on the boards of several families.
                rows.setdefault(question.key, (question, {}))[1].setdefault(row.key, row)
    found = []
    for question, of_question in rows.values():
        names = sorted({name for row in of_question.values() for name in row.params})
        for name in names:
            lines: dict[str, list[Row]] = defaultdict(list)
            for row in of_question.values():
                if _is_number(row.params.get(name)):
                    rest = {key: value for key, value in row.params.items() if key != name}
                    lines[json.dumps(rest, sort_keys=True, default=str)].append(row)
            several = {rest: line for rest, line in lines.items() if len(line) > 1}
            rests = [json.loads(rest) for rest in several]
            chart = diagrams.sensitivity(
                [
                    (_label(rest, rests), [_setting(row, name, question) for row in line])
                    for rest, line in zip(rests, several.values(), strict=True)
                ]
            )
            if chart is not None and question.metric is not None:
                found.append(SensitivityView(question, name, chart))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _setting(row: Row, name: str, question: Question) -> diagrams.Setting:
    cell = row.cells[question.key]
    assert cell.primary is not None
    return diagrams.Setting(
        float(row.params[name]), cell.primary.value, cell.primary.low, cell.primary.high, cell.run.id
    )


def _label(rest: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """Return in what the settings of one line differ from those of the others."""
    names = [key for key in sorted(rest) if any(other.get(key) != rest[key] for other in others)]
    return ", ".join(f"{key}={formats.plain(rest[key])}" for key in names)
