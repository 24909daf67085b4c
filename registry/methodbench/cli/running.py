"""``plan``, ``run`` and ``demo``."""

from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from methodbench.cli.output import (
    db_option,
    duration,
    echo_json,
    get_catalog,
    interval,
    json_option,
    number,
    size,
    table,
)

if TYPE_CHECKING:
    from methodbench.catalog import Catalog
    from methodbench.engine.driver import Report
    from methodbench.engine.forecast import Budget
    from methodbench.engine.plan import Plan
    from methodbench.engine.sequential import Decisions
    from methodbench.store import Store
    from methodbench.suite import Suite


def _yaml_value(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _assignments(pairs: tuple[str, ...], option: str) -> dict[str, Any]:
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{pair!r} does not read NAME=VALUE", param_hint=option)
        values[name] = _yaml_value(value)
    return values


def cell_options(function: Any) -> Any:
    """Options that describe cells: methods, models, tasks and their settings."""
    options = [
        click.option(
            "--method",
            "methods",
            multiple=True,
            metavar="NAME[@PRESET]",
            help="A method, or a chain 'A@X + B@Y'; repeatable.",
        ),
        click.option(
            "--param", "params", multiple=True, metavar="NAME=VALUE", help="A hyperparameter of the methods."
        ),
        click.option("--model", "models", multiple=True, metavar="NAME", help="A model; repeatable."),
        click.option("--task", "tasks", multiple=True, metavar="NAME", help="A task; repeatable."),
        click.option(
            "--task-param", "task_params", multiple=True, metavar="NAME=VALUE", help="A setting of the tasks."
        ),
        click.option(
            "--seed",
            "seeds",
            multiple=True,
            type=click.IntRange(min=0),
            help="A seed; repeatable.  [default: 0]",
        ),
        click.option("--dtype", help="Floating-point type.  [default: float32]"),
        click.option("--device", help="cpu, cuda or cuda:N.  [default: cpu]"),
        click.option(
            "--threads",
            type=click.IntRange(min=1),
            help="CPU threads of a cell, part of its identity.  [default: the task's own]",
        ),
        click.option("--timeout", type=float, help="Seconds after which a cell is killed.  [default: 3600]"),
    ]
    for option in reversed(options):
        function = option(function)
    return function


#: Options that describe every cell, by the field of a comparison that they set.
_OF_EVERY_CELL = ("models", "seeds", "dtype", "device", "threads", "timeout")


class _Span(click.ParamType):
    """A span of time: 90, 90s, 40m, 1h30m."""

    name = "time"
    _form = re.compile(r"^(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?$")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        found = self._form.match(value.strip())
        hours, minutes, seconds = (float(part or 0) for part in found.groups()) if found else (0.0, 0.0, 0.0)
        total = 3600 * hours + 60 * minutes + seconds
        if not total:
            self.fail(f"{value!r} is no span of time; write 40m, 1h30m or 90s", param, ctx)
        return total


_budget_option = click.option(
    "--budget", type=_Span(), help="Take only what is expected to fit this time: 40m, 1h30m, 90s."
)
_cores_option = click.option("--cores", type=click.IntRange(min=1), help="CPU cores to use.  [default: all]")
_memory_option = click.option(
    "--memory-limit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GIB",
    help="End a cell that holds more, with all it started.  [default: 90 % of memory]",
)


def wanted_suites(suites: tuple[str, ...], chosen: dict[str, Any], catalog: Catalog) -> list[Suite]:
    """Return the suites named on the command line, or one made of the options.

    With suites, models, seeds, type, device, threads and time limit take the place of those in every comparison.
    """
    from methodbench.suite import load_suite

    set_here = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in chosen.items()
        if value not in ((), None)
    }
    of_cells = {name: set_here[name] for name in _OF_EVERY_CELL if name in set_here}
    if suites:
        if "methods" in set_here or "tasks" in set_here:
            raise click.UsageError("Give suites, or --method and --task, not both.")
        for name, option in (("params", "--param"), ("task_params", "--task-param")):
            if name in set_here:
                raise click.UsageError(f"{option} belongs to --method and --task: a suite says its own.")
        loaded = (load_suite(name, catalog) for name in suites)
        return [_validated(suite.with_settings(of_cells).model_dump()) for suite in loaded]
    if "methods" not in set_here or "tasks" not in set_here:
        raise click.UsageError("Give a suite (see `methodbench list suites`), or --method and --task.")
    from methodbench.composition import split_use

    params = _assignments(chosen["params"], "--param")
    methods = []
    for name in chosen["methods"]:
        method, preset = split_use(name)
        methods.append({"name": method, "presets": [preset] if preset else [], "params": params})
    task_params = _assignments(chosen["task_params"], "--task-param")
    tasks = [{"name": name, "params": task_params} for name in chosen["tasks"]]
    comparison = {"methods": methods, "tasks": tasks, **of_cells}
    return [_validated({"name": "command-line", "comparisons": [comparison]})]


def _validated(mapping: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    from methodbench.suite import Suite

    try:
        return Suite.model_validate(mapping)
    except ValidationError as error:
        first = error.errors()[0]
        raise click.UsageError(f"{first['loc'][-1]} = {first['input']!r}: {first['msg']}") from error


@click.command()
@click.argument("suites", nargs=-1)
@cell_options
@db_option
@_budget_option
@_cores_option
@_memory_option
@json_option
def plan(
    suites: tuple[str, ...],
    db: str | None,
    budget: float | None,
    cores: int | None,
    memory_limit: float | None,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Show the cells of SUITES (names or files): what is done, what is missing, what is skipped and why.

    With --budget, also what each missing cell is expected to take, from the runs that the database holds, and what
    is left out to stay within that time.
    """
    from methodbench import api
    from methodbench.engine.why import superseded
    from methodbench.store import open_store
    from methodbench.store.location import default_url

    known = get_catalog()
    made = api.plan(wanted_suites(suites, chosen, known), catalog=known)
    done, before = {}, {}
    url = db or default_url()
    if "://" in url or Path(url).exists():
        with open_store(db) as store:
            done = store.latest(cell.key for cell in made.cells)
            before = superseded(store, [cell for cell in made.cells if cell.key not in done])
    fitted = None
    if budget is not None:
        limit = int(memory_limit * 2**30) if memory_limit else None
        fitted = api.fit_budget(made, budget, db=db, cores=cores, memory=limit)
    if as_json:
        cells = [
            {
                "key": cell.key,
                "command": cell.command(),
                "identity": cell.identity(),
                "status": _status(done, before, cell.key),
                **(_forecast_data(fitted, cell.key) if fitted else {}),
            }
            for cell in made.cells
        ]
        skips = [{name: getattr(skip, name) for name in skip.__slots__} for skip in made.skips]
        echo_json({"suite": made.suite, "cells": cells, "skipped": skips})
        return
    if fitted is not None:
        _print_budget(made, fitted, budget or 0)
        return
    table(
        ("status", "method", "variant", "model", "task", "seed"),
        [
            (
                _status(done, before, cell.key),
                cell.method.name,
                cell.variant,
                cell.model.name if cell.model else "–",
                cell.task.name,
                str(cell.seed),
            )
            for cell in made.cells
        ],
    )
    _print_skips(made)
    missing = sum(cell.key not in done for cell in made.cells)
    stale = f" ({len(before)} of them have stale records: see `why`)" if before else ""
    click.echo(
        f"\n{len(made.cells)} cells: {len(made.cells) - missing} done, {missing} to run{stale}; "
        f"{len(made.skips)} skipped"
    )
    if made.studies:
        after = sum(len(study.seeds) for study in made.studies)
        click.echo(f"{after} tuned cells follow {len(made.studies)} studies, once their trials have run")


def _forecast_data(fitted: Budget, key: str) -> dict[str, Any]:
    forecast = fitted.forecasts.get(key)
    if forecast is None:
        return {}
    return {
        "expected_seconds": forecast.seconds,
        "expected_memory_bytes": forecast.memory,
        "expected_from": f"{forecast.runs} runs: {forecast.basis}",
        "left_out": fitted.left_out.get(key, ""),
    }


def _print_budget(made: Plan, fitted: Budget, budget: float) -> None:
    """Print the cells in the order in which they fit, then those that are left out."""
    by_key = {cell.key: cell for cell in made.cells}
    order = [cell.key for cell in fitted.kept] + list(fitted.left_out)
    rows = []
    for key in order:
        cell, forecast = by_key[key], fitted.forecasts[key]
        rows.append(
            (
                "left out" if key in fitted.left_out else "to run",
                cell.method.name,
                cell.variant,
                cell.model.name if cell.model else "–",
                cell.task.name,
                str(cell.seed),
                duration(forecast.seconds),
                size(forecast.memory),
                f"{forecast.runs} × {forecast.basis}",
            )
        )
    headers = ("status", "method", "variant", "model", "task", "seed", "time", "memory", "expected from")
    table(headers, rows, right=("seed", "time", "memory"))
    _print_skips(made)
    done = len(made.cells) - len(order)
    click.echo(
        f"\n{len(fitted.kept)} cells to run, expected to take {duration(fitted.seconds)} of {duration(budget)}; "
        f"{done} done before; {len(made.skips)} skipped"
    )
    for reason, count in Counter(fitted.left_out.values()).items():
        click.echo(f"left out {count}: {reason}")


def _status(done: dict[str, Any], before: dict[str, Any], key: str) -> str:
    return done[key].status if key in done else "stale" if key in before else "to run"


def _print_skips(made: Plan) -> None:
    reasons = Counter(skip.reason for skip in made.skips)
    for reason, count in reasons.items():
        click.echo(f"skipped {count}: {reason}")


@click.command()
@click.argument("suites", nargs=-1)
@cell_options
@db_option
@click.option("--executor", default="local", show_default=True, help="Where workers run: local or ray.")
@click.option(
    "--executor-address",
    "address",
    default="",
    metavar="ADDRESS",
    help="Cluster of the executor: HOST:6379 or ray://HOST:10001.  [default: one of its own here]",
)
@_cores_option
@_memory_option
@_budget_option
@click.option(
    "--until-decided",
    is_flag=True,
    help="Go seed by seed, and stop each method when all of its comparisons are decided.",
)
@click.option(
    "--error-rate",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="With --until-decided: bound on the chance of any wrong decision.",
)
@click.option(
    "--max-seeds",
    type=click.IntRange(min=2),
    help="With --until-decided: seeds per method at most.  [default: those of the suite]",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Cells that one worker may run in turn; more than one saves time, and isolates less.",
)
@click.option("--retry", is_flag=True, help="Also run cells whose newest record is a failure.")
@json_option
def run(
    suites: tuple[str, ...],
    db: str | None,
    executor: str,
    address: str,
    cores: int | None,
    memory_limit: float | None,
    budget: float | None,
    until_decided: bool,
    error_rate: float,
    max_seeds: int | None,
    batch: int,
    retry: bool,
    as_json: bool,
    **chosen: Any,
) -> int:
    """Run what is missing of SUITES (names or files), or the cells that the options describe.

    With SUITES, options such as --model and --device take the place of what
    the suites say. Cells that have a record already are not run again,
    failures included (see --retry).
    """
    from methodbench import api
    from methodbench.cli.progress import reporter
    from methodbench.engine.processes import terminate_like_interrupt

    if until_decided and budget is not None:
        raise click.UsageError(
            "--until-decided and --budget cannot go together: one of them decides what is run."
        )
    if max_seeds and not until_decided:
        raise click.UsageError("--max-seeds belongs to --until-decided.")
    known = get_catalog()
    limit = int(memory_limit * 2**30) if memory_limit else None
    options: dict[str, Any] = {
        "executor": executor, "address": address, "cores": cores, "memory_limit": limit, "batch": batch,
        "retry": retry, "reporter": reporter(quiet=as_json),
    }  # fmt: skip
    wanted = wanted_suites(suites, chosen, known)
    with terminate_like_interrupt():
        if until_decided:
            decisions = api.run_until_decided(
                wanted, db=db, error_rate=error_rate, max_seeds=max_seeds, catalog=known, **options
            )
            return _show_decisions(decisions, as_json=as_json)
        made = api.plan(wanted, catalog=known)
        if budget is not None:
            fitted = api.fit_budget(made, budget, db=db, cores=cores, memory=limit)
            made.cells = [cell for cell in made.cells if cell.key not in fitted.left_out]
            for reason, count in Counter(fitted.left_out.values()).items():
                click.echo(f"left out {count} of {len(fitted.forecasts)} cells: {reason}", err=as_json)
        report = api.run(made, db=db, catalog=known, **options)
    if as_json:
        runs = [
            {"run": run.id, "status": run.status, "reason": run.reason, "key": key}
            for key, run in report.runs.items()
        ]
        echo_json(
            {"suite": report.plan.suite, "new": len(report.new), "runs": runs, "left_out": report.left_out}
        )
    else:
        _print_skips(report.plan)
        click.echo(_summary(report))
    return 0 if report.complete else 1


def _show_decisions(decisions: Decisions, *, as_json: bool) -> int:
    """Print what was decided, what stays open, and what was not run."""
    pairs = decisions.pairs
    if as_json:
        echo_json(
            {
                "suite": decisions.report.plan.suite,
                "error_rate": decisions.error_rate,
                "new": len(decisions.report.new),
                "pairs": [
                    {
                        "model": pair.model, "task": pair.task, "a": pair.a.name, "b": pair.b.name,
                        "verdict": pair.verdict, "better": pair.better, "difference": pair.difference,
                        "p_value": pair.p_value, "seeds": pair.seeds, "note": pair.note,
                    }
                    for pair in pairs
                ],
                "left_out": [cell.key for cell in decisions.left_out],
            }
        )  # fmt: skip
        return 0 if decisions.report.complete else 1
    _print_skips(decisions.report.plan)
    rows = []
    for pair in sorted(pairs, key=lambda pair: (pair.model, pair.task)):
        verdict = f"{pair.better} is better" if pair.verdict == "decided" else pair.verdict
        rows.append(
            (
                " · ".join(filter(None, [pair.model, pair.task])),
                pair.a.name,
                pair.b.name,
                number(pair.difference),
                number(pair.p_value),
                str(pair.seeds),
                f"{verdict} ({pair.note})" if pair.note else verdict,
            )
        )
    click.echo()
    headers = ("question", "a", "b", "a − b", "p", "seeds", "verdict")
    table(headers, rows, right=("a − b", "p", "seeds"))
    settled = sum(pair.verdict == "decided" for pair in pairs)
    still = sum(pair.verdict == "open" for pair in pairs)
    click.echo(
        f"\n{len(pairs)} pair{'s' if len(pairs) != 1 else ''}: {settled} decided, {still} open; "
        f"the chance that any is decided wrongly is at most {decisions.error_rate:g} "
        "(paired t over seeds and units, split over pairs and looks)"
    )
    arms = Counter(cell.label.rpartition(" · ")[0] for cell in decisions.left_out)
    for label, count in arms.items():
        click.echo(f"left out {count} seeds of {label}: its comparisons are decided")
    click.echo(_summary(decisions.report))
    return 0 if decisions.report.complete else 1


def _summary(report: Report) -> str:
    if not report.plan.cells:
        return "Nothing to run: no cell fits (see the reasons above)."
    if not report.new and not report.left_out:
        failed = f" {len(report.failed)} of them failed: --retry runs those again." if report.failed else ""
        return f"Nothing to do: all {len(report.runs)} cells are done.{failed}"
    parts = [f"{len(report.new)} cells run", f"{len(report.runs) - len(report.new)} were done before"]
    if report.failed:
        parts.append(f"{len(report.failed)} failed (`methodbench results --failed` says why)")
    if report.left_out:
        parts.append(f"{len(report.left_out)} left out")
    return ", ".join(parts) + "."


@click.command()
@click.option("--quick", is_flag=True, help="The short version: fewer settings, windows and seeds.")
@click.option(
    "--out", default="site", show_default=True, type=click.Path(path_type=Path), help="Folder of the site."
)
@db_option
@click.option("--cores", type=click.IntRange(min=1), help="CPU cores to use.  [default: all]")
def demo(quick: bool, out: Path, db: str | None, cores: int | None) -> int:
    """Compare published methods on real pretrained models, then build the leaderboard.

    Needs no model hub: weights come from the package index, data from installed packages. A second call does
    nothing but say so.
    """
    from methodbench import api
    from methodbench.cli.progress import reporter
    from methodbench.engine.driver import available_cores
    from methodbench.engine.processes import terminate_like_interrupt
    from methodbench.store import open_store

    begin = time.monotonic()
    known = get_catalog()
    role = "demo-quick" if quick else "demo"
    suites = [suite for suite in known.suites.values() if suite.role == role]
    if not suites:
        raise click.ClickException(
            f"No installed plugin ships a suite for `{role}`: see `methodbench doctor`."
        )
    click.echo(
        f"methodbench demo on {cores or available_cores()} cores: published methods on real pretrained models."
    )
    for suite in suites:
        click.echo(f"  {suite.name}: {suite.summary}")
    with terminate_like_interrupt():
        report = api.run(
            [suite.name for suite in suites],
            db=db,
            cores=cores,
            reporter=reporter(quiet=False),
            catalog=known,
        )
    _print_skips(report.plan)
    click.echo(_summary(report))
    with open_store(db) as store:
        _print_boards(known, report, store)
    page = api.build_site(out, db=db, catalog=known)
    click.echo(f"\nDone in {duration(time.monotonic() - begin)}. Open the leaderboard: {page}")
    click.echo(
        "Next: `methodbench compare METHOD METHOD`, `methodbench show METHOD`, CONTRIBUTING.md to add your own."
    )
    return 0 if report.complete else 1


def _print_boards(known: Catalog, report: Report, store: Store) -> None:
    """Print one table per model and task: methods in order of their primary metric."""
    metrics = {
        row.run_id: row for row in store.metrics(run.id for run in report.runs.values()) if row.primary
    }
    groups: dict[tuple[str, str], list[Any]] = {}
    for cell in report.plan.cells:
        run = report.runs.get(cell.key)
        if run is not None:
            groups.setdefault((cell.model.name if cell.model else "", cell.task.name), []).append(run)
    for (model, task), runs in groups.items():
        primary = known.task(task).primary
        sign = 1 if primary.direction == "lower" else -1

        def order(run: Any, sign: int = sign) -> float:
            found = metrics.get(run.id)
            return sign * found.value if found and found.value is not None else float("inf")

        click.echo()
        click.secho(" · ".join(filter(None, [model, task])), bold=True)
        rows = []
        for run in sorted(runs, key=order):
            found = metrics.get(run.id)
            rows.append(
                (
                    f"{run.method} {run.variant}".strip(),
                    str(run.seed),
                    number(found.value) if found else run.status,
                    interval(found.low, found.high) if found else run.reason[:60],
                    number(run.bits_per_weight, 3),
                    run.storage or "–",
                    size(run.peak_memory_bytes),
                    duration(run.wall_seconds),
                )
            )
        arrow = "↓" if primary.direction == "lower" else "↑"
        headers = (
            "method",
            "seed",
            f"{primary.label} {arrow}",
            "95 % interval",
            "bits",
            "storage",
            "memory",
            "time",
        )
        table(headers, rows, right=(headers[2], "bits", "memory", "time", "seed"))
