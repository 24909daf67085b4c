"""``list`` and ``show``: what there is."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import click

from methodbench.cli.output import db_option, echo_json, get_catalog, json_option, table

if TYPE_CHECKING:
    from methodbench.catalog import Catalog
    from methodbench.contract import CheckRecord
    from methodbench.entries import Method, Model, SuiteFile, Task
    from methodbench.store import Witness

WHAT = ("methods", "models", "tasks", "suites", "plugins")


@click.command("list")
@click.argument("what", type=click.Choice(WHAT), required=False)
@click.option("--family", help="Only methods of this family.")
@click.option("--kind", help="Only methods of this kind.")
@json_option
def list_entries(what: str | None, family: str | None, kind: str | None, as_json: bool) -> None:
    """List methods, models, tasks, suites or plugins; everything by default."""
    catalog = get_catalog()
    methods = [
        method
        for method in catalog.methods.values()
        if family in (None, method.family) and kind in (None, method.kind)
    ]
    if as_json:
        everything: dict[str, list[Any]] = {
            "methods": methods,
            "models": list(catalog.models.values()),
            "tasks": list(catalog.tasks.values()),
            "suites": list(catalog.suites.values()),
            "plugins": catalog.plugins,
        }
        rows = {name: [dataclasses.asdict(row) for row in found] for name, found in everything.items()}
        echo_json(rows[what] if what else rows)
        return
    tables: dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]] = {
        "methods": (
            ("method", "family", "kind", "applies to", "checked against", "summary"),
            [
                (m.name, m.family, m.kind, ", ".join(m.applies_to) or "its own", m.fidelity, m.summary)
                for m in sorted(methods, key=lambda m: (m.family, m.name))
            ],
        ),
        "models": (
            ("model", "kind", "source", "summary"),
            [(m.name, m.kind, m.source.partition("!")[0], m.summary) for m in catalog.models.values()],
        ),
        "tasks": (
            ("task", "evaluates", "accepts", "metric", "summary"),
            [
                (t.name, ", ".join(t.kinds), ", ".join(t.accepts) or "–", t.primary.name, t.summary)
                for t in catalog.tasks.values()
            ],
        ),
        "suites": (("suite", "summary"), [(s.name, s.summary) for s in catalog.suites.values()]),
        "plugins": (
            ("plugin", "version", "distribution", "module"),
            [(p.name, p.version, p.distribution, p.module) for p in catalog.plugins],
        ),
    }
    for index, name in enumerate([what] if what else WHAT[:4]):
        headers, lines = tables[name]
        if index:
            click.echo()
        table(headers, lines)


@click.command()
@click.argument("name")
@db_option
@json_option
def show(name: str, db: str | None, as_json: bool) -> None:
    """Show a method, model, task or suite by its name, or a run by the first digits of its id."""
    catalog = get_catalog()
    if name in catalog.methods:
        _show_method(catalog, catalog.methods[name], as_json)
    elif name in catalog.suites:
        _show_suite(catalog, catalog.suites[name], as_json)
    elif re.fullmatch(r"[0-9a-f]{4,12}", name) and name not in catalog.models and name not in catalog.tasks:
        _show_run(catalog, name, db, as_json)
    else:
        _show_model_or_task(catalog, name, as_json)


def _show_model_or_task(catalog: Catalog, name: str, as_json: bool) -> None:
    from methodbench.errors import UnknownNameError

    for lookup in (catalog.model, catalog.task):
        try:
            entry = lookup(name)
        except UnknownNameError:
            continue
        _show_entry(entry, entry.loader if hasattr(entry, "loader") else entry.impl, as_json)
        return
    raise UnknownNameError("name", name, [*catalog.methods, *catalog.models, *catalog.tasks, *catalog.suites])


def _fields(rows: list[tuple[str, Any]]) -> None:
    shown = [(label, str(value)) for label, value in rows if value not in ("", None, (), {}, [])]
    width = max(len(label) for label, _ in shown)
    for label, value in shown:
        first, *rest = value.splitlines() or [""]
        click.echo(f"{click.style(label.ljust(width), dim=True)}  {first}")
        for line in rest:
            click.echo(f"{' ' * width}  {line}")


def _parameters(owner: str, implementation: str) -> list[dict[str, Any]]:
    from methodbench.engine.probe import describe

    found: list[dict[str, Any]] = describe(owner, implementation)["params"]
    return found


def _print_parameters(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    click.echo()
    table(
        ("parameter", "type", "default", "range", "meaning"),
        [
            (
                row["name"],
                row["type"],
                "required" if row["required"] else str(row["default"]),
                row["range"],
                row["description"],
            )
            for row in rows
        ],
    )


def _show_method(catalog: Catalog, method: Method, as_json: bool) -> None:
    from methodbench.contract import check_record_of
    from methodbench.entries import FIDELITIES
    from methodbench.parity import records_of

    parameters = _parameters(method.name, method.impl)
    records = records_of(method, catalog)
    checked = check_record_of(method, catalog)
    if as_json:
        echo_json(
            {
                **dataclasses.asdict(method),
                "parameters": parameters,
                "parity_records": [dataclasses.asdict(record) for record in records],
                "check_record": dataclasses.asdict(checked) if checked else None,
            }
        )
        return
    paper = method.paper
    click.secho(method.name, bold=True)
    click.echo(method.summary + "\n")
    _fields(
        [
            (
                "paper",
                f"{paper.title}\n{' '.join(filter(None, [paper.venue, str(paper.year or '')]))}"
                if paper
                else "",
            ),
            ("link", paper.url if paper else ""),
            ("authors' code", paper.code if paper else ""),
            ("kind", method.kind),
            ("family", catalog.family(method.family).title),
            ("applies to", ", ".join(method.applies_to)),
            ("needs", ", ".join(method.needs)),
            ("checked", FIDELITIES[method.fidelity] + (f": {method.parity}" if method.parity else "")),
            ("parity", "\n".join(record.summary() for record in records)),
            ("contract", _contract(method, checked)),
            ("positions", method.positions),
            ("presets", "\n".join(f"{name}: {dict(values)}" for name, values in method.presets.items())),
            ("properties", ", ".join(method.properties)),
            ("implementation", method.impl),
        ]
    )
    _print_parameters(parameters)


def _contract(method: Method, checked: CheckRecord | None) -> str:
    if checked is None:
        return ""
    changed = "" if checked.is_of(method) else "; the method has changed since"
    lines = [f"{checked.summary()}, {checked.checked_on} with methodbench {checked.methodbench}{changed}"]
    lines += [f"{one.name} {one.status}: {one.detail}" for one in checked.wrong]
    return "\n".join([*lines, *(f"{one.name}: {one.detail}" for one in checked.scores)])


def _show_entry(entry: Model | Task, implementation: str, as_json: bool) -> None:
    parameters = _parameters(entry.name, implementation)
    if as_json:
        echo_json({**dataclasses.asdict(entry), "parameters": parameters})
        return
    click.secho(entry.name, bold=True)
    click.echo(entry.summary + "\n")
    skipped = {"name", "summary"}
    rows = []
    for field in dataclasses.fields(entry):
        value = getattr(entry, field.name)
        if field.name == "metrics":
            better = {"lower": "lower is better", "higher": "higher is better"}
            value = "\n".join(
                f"{m.name} ({better[m.direction]}{', primary' if m.primary else ''})" for m in value
            )
        elif isinstance(value, tuple):
            value = ", ".join(value)
        elif isinstance(value, dict):
            value = ", ".join(f"{key}={item}" for key, item in value.items())
        if field.name not in skipped:
            rows.append((field.name, value))
    _fields(rows)
    _print_parameters(parameters)


def _show_suite(catalog: Catalog, entry: SuiteFile, as_json: bool) -> None:
    from methodbench.suite import load_suite

    suite = load_suite(entry.name, catalog)
    if as_json:
        echo_json(suite.model_dump())
        return
    click.secho(suite.name, bold=True)
    click.echo((suite.title or entry.summary) + "\n")
    for comparison in suite.comparisons:
        click.secho(comparison.title or "comparison", underline=True)
        _fields(
            [
                ("methods", ", ".join(use.name for use in comparison.methods)),
                ("models", ", ".join(comparison.models)),
                ("tasks", ", ".join(use.name for use in comparison.tasks)),
                ("seeds", ", ".join(map(str, comparison.seeds))),
            ]
        )
        click.echo()


def _witness(row: Witness) -> str:
    where = f", parts at {row.parts_at}" if row.parts_at else ""
    return f"{row.run_id} {row.verdict}{where}"


def _show_run(catalog: Catalog, run_id: str, db: str | None, as_json: bool) -> None:
    from methodbench.cli.output import duration, interval, number, size
    from methodbench.engine.why import stale_runs
    from methodbench.store import open_store

    with open_store(db, create=False) as store:
        run = store.run(run_id)
        metrics = store.metrics([run.id])
        witnesses = store.witnesses(run.id)
        stale = stale_runs(store, catalog).get(run.id)
    if as_json:
        rows = [
            {**metric.model_dump(exclude={"scores"}), "scores": metric.unit_scores().tolist()}
            for metric in metrics
        ]
        echo_json(
            {
                **run.model_dump(),
                "metrics": rows,
                "stale": stale,
                "witnesses": [row.model_dump() for row in witnesses],
            }
        )
        return
    click.secho(f"run {run.id}", bold=True)
    values = "\n".join(
        f"{m.name} {number(m.value)} {interval(m.low, m.high)} ({m.units} units)" for m in metrics
    )
    _fields(
        [
            ("status", run.status + (f": {run.reason}" if run.reason else "")),
            ("stale", stale),
            ("method", f"{run.method} {run.variant}"),
            ("parameters", ", ".join(f"{key}={value}" for key, value in run.params.items())),
            ("model", run.model),
            ("task", f"{run.task}, protocol {run.protocol}"),
            ("settings", ", ".join(f"{key}={value}" for key, value in run.task_params.items())),
            ("seed", str(run.seed)),
            ("metrics", values),
            (
                "storage",
                run.storage
                and f"{run.storage}, {size(run.model_bytes)}, {number(run.bits_per_weight)} bits/weight",
            ),
            (
                "time",
                f"{duration(run.wall_seconds)} ({', '.join(f'{k} {duration(v)}' for k, v in run.phases.items())})",
            ),
            ("peak memory", size(run.peak_memory_bytes)),
            ("throughput", run.throughput and f"{number(run.throughput)} {run.throughput_unit}"),
            ("warnings", "\n".join(run.warnings)),
            ("witness of", run.witness_of),
            ("witnesses", "\n".join(_witness(row) for row in witnesses)),
            ("repeat with", run.command),
        ]
    )
    if run.status not in ("ok", "not-applicable") and run.log_tail:
        click.echo("\n" + click.style("end of its log", dim=True) + "\n" + run.log_tail.rstrip())
