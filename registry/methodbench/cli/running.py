"""``plan``, ``run`` and ``demo``."""

from __future__ import annotations

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
    from methodbench.engine.plan import Plan
    from methodbench.store import Store


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
        click.option("--dtype", default="float32", show_default=True, help="Floating-point type."),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N."),
        click.option(
            "--threads",
            type=click.IntRange(min=1),
            help="CPU threads of a cell, part of its identity.  [default: the task's own]",
        ),
        click.option(
            "--timeout",
            type=float,
            default=3600,
            show_default=True,
            help="Seconds after which a cell is killed.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def wanted_suites(suites: tuple[str, ...], chosen: dict[str, Any]) -> list[Any]:
    """Return the suites named on the command line, or one made of the options."""
    if suites and (chosen["methods"] or chosen["tasks"]):
        raise click.UsageError("Give suites, or --method and --task, not both.")
    if suites:
        return list(suites)
    if not chosen["methods"] or not chosen["tasks"]:
        raise click.UsageError("Give a suite (see `methodbench list suites`), or --method and --task.")
    from methodbench.composition import split_use

    params = _assignments(chosen["params"], "--param")
    methods = []
    for name in chosen["methods"]:
        method, preset = split_use(name)
        methods.append({"name": method, "presets": [preset] if preset else [], "params": params})
    task_params = _assignments(chosen["task_params"], "--task-param")
    comparison = {
        "methods": methods,
        "models": list(chosen["models"]),
        "tasks": [{"name": name, "params": task_params} for name in chosen["tasks"]],
        "seeds": list(chosen["seeds"]) or [0],
        "dtype": chosen["dtype"],
        "device": chosen["device"],
        "threads": chosen["threads"],
        "timeout": chosen["timeout"],
    }
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
@json_option
def plan(suites: tuple[str, ...], db: str | None, as_json: bool, **chosen: Any) -> None:
    """Show the cells of SUITES (names or files): what is done, what is missing, what is skipped and why."""
    from methodbench import api
    from methodbench.engine.why import superseded
    from methodbench.store import open_store
    from methodbench.store.location import default_url

    known = get_catalog()
    made = api.plan(wanted_suites(suites, chosen), catalog=known)
    done, before = {}, {}
    url = db or default_url()
    if "://" in url or Path(url).exists():
        with open_store(db) as store:
            done = store.latest(cell.key for cell in made.cells)
            before = superseded(store, [cell for cell in made.cells if cell.key not in done])
    if as_json:
        cells = [
            {
                "key": cell.key,
                "command": cell.command(),
                "identity": cell.identity(),
                "status": _status(done, before, cell.key),
            }
            for cell in made.cells
        ]
        skips = [{name: getattr(skip, name) for name in skip.__slots__} for skip in made.skips]
        echo_json({"suite": made.suite, "cells": cells, "skipped": skips})
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
@click.option("--executor", default="local", show_default=True, help="Where workers run.")
@click.option("--cores", type=click.IntRange(min=1), help="CPU cores to use.  [default: all]")
@click.option(
    "--memory-limit",
    type=float,
    metavar="GIB",
    help="End a worker that holds more.  [default: 90 % of memory]",
)
@click.option("--retry", is_flag=True, help="Also run cells whose newest record is a failure.")
@json_option
def run(
    suites: tuple[str, ...],
    db: str | None,
    executor: str,
    cores: int | None,
    memory_limit: float | None,
    retry: bool,
    as_json: bool,
    **chosen: Any,
) -> int:
    """Run what is missing of SUITES (names or files), or the cells that the options describe.

    Cells that have a record already are not run again, failures included (see --retry).
    """
    from methodbench import api
    from methodbench.cli.progress import reporter

    report = api.run(
        wanted_suites(suites, chosen),
        db=db,
        executor=executor,
        cores=cores,
        memory_limit=int(memory_limit * 2**30) if memory_limit else None,
        retry=retry,
        reporter=reporter(quiet=as_json),
        catalog=get_catalog(),
    )
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
    report = api.run(
        [suite.name for suite in suites], db=db, cores=cores, reporter=reporter(quiet=False), catalog=known
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
