"""``claims``: what the papers say, and what the records say of that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from methodbench.cli.output import db_option, echo_json, get_catalog, interval, json_option, number, table

if TYPE_CHECKING:
    from methodbench.catalog import Catalog
    from methodbench.claims import ClaimResult, Claims, Condition, Verdict

_COLOURS: dict[Verdict, str | None] = {
    "reproduced": "green",
    "within interval": "yellow",
    "not reproduced": "yellow",
    "contradicted": "red",
    "not attempted": None,
}


@click.command()
@click.argument("method", required=False)
@db_option
@json_option
def claims(method: str | None, db: str | None, as_json: bool) -> int:
    """Say which claims of the papers the records reproduce; for METHOD, with its numbers and every condition.

    Exit code 1 when a file of claims is missing or wrong.
    """
    from methodbench.claims import judge_claims, load_claims
    from methodbench.errors import ClaimsError
    from methodbench.store import open_store
    from methodbench.store.location import default_url

    catalog = get_catalog()
    names = [method] if method else sorted(name for name, entry in catalog.methods.items() if entry.claims)
    loaded: list[Claims] = []
    wrong = 0
    for name in names:
        try:
            loaded.append(load_claims(catalog, name))
        except ClaimsError as error:
            if method:
                raise
            wrong += 1
            click.secho(str(error), fg="yellow", err=True)
    url = db or default_url()
    results: list[list[ClaimResult]]
    if "://" in url or Path(url).exists():
        with open_store(db, create=False) as store:
            results = [judge_claims(store, catalog, found) for found in loaded]
    else:
        click.secho(f"No results yet: {url} does not exist.", fg="yellow", err=True)
        results = [judge_claims(None, catalog, found) for found in loaded]
    if as_json:
        echo_json([_as_json(found, judged) for found, judged in zip(loaded, results, strict=True)])
    elif method:
        _print_one(catalog, loaded[0], results[0])
    else:
        _print_all(results)
    return 1 if wrong else 0


def _as_json(found: Claims, judged: Sequence[ClaimResult]) -> dict[str, Any]:
    import dataclasses

    return {
        **found.model_dump(exclude={"claims"}),
        "claims": [
            {
                **result.claim.model_dump(),
                "statement": result.claim.statement,
                "verdict": result.verdict,
                "conditions": [dataclasses.asdict(condition) for condition in result.conditions],
            }
            for result in judged
        ],
    }


def _print_all(results: Sequence[Sequence[ClaimResult]]) -> None:
    rows = [
        (result.method, result.verdict, _where(result), result.claim.statement, result.claim.text)
        for judged in results
        for result in judged
    ]
    if not rows:
        click.echo("No method has claims.")
        return
    table(("method", "verdict", "tested on", "statement", "claim"), rows)
    counts = Counter(row[1] for row in rows)
    click.echo(f"\n{len(rows)} claims: {_counted(counts)}. `methodbench claims METHOD` shows the evidence.")


def _where(result: ClaimResult) -> str:
    places = [c for c in result.conditions if c.verdict != "not attempted"]
    if not places:
        return "–"
    tasks = dict.fromkeys(f"{c.model} · {c.task}" if c.model else c.task for c in places)
    first, *others = tasks
    return first if not others else f"{first} and {len(others)} more"


def _counted(counts: Counter[Verdict]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in _COLOURS if counts[name])


def _print_one(catalog: Catalog, found: Claims, judged: Sequence[ClaimResult]) -> None:
    from methodbench.claims import commands_for

    entry = catalog.method(found.method)
    click.secho(found.method, bold=True)
    if entry.paper:
        click.echo(
            " ".join(filter(None, [entry.paper.title + ",", entry.paper.venue, str(entry.paper.year or "")]))
        )
    click.secho("\nReported", underline=True)
    if found.nothing_reported:
        click.echo(found.nothing_reported)
    for index, block in enumerate(found.reported):
        if index:
            click.echo()
        click.echo(", ".join(filter(None, [block.source, block.table, f"measured by {block.measured_by}"])))
        unit = f", {block.unit}" if block.unit else ""
        click.echo(f"{block.metric}{unit}: {block.task}")
        _columns(
            ("  model", "setting", "value", "dense", "metric", "task", "note"),
            [
                (
                    f"  {row.model or '–'}",
                    row.setting,
                    f"{row.value:g}",
                    "" if row.dense is None else f"{row.dense:g}",
                    row.metric,
                    row.task,
                    row.note,
                )
                for row in block.values
            ],
            right=("value", "dense"),
        )
    click.secho("\nClaims tested here", underline=True)
    if found.nothing_claimed:
        click.echo(found.nothing_claimed)
    for index, result in enumerate(judged):
        if index:
            click.echo()
        claim = result.claim
        click.echo(f"{click.style(result.verdict, fg=_COLOURS[result.verdict], bold=True)}  {claim.text}")
        click.echo(f"  {claim.statement}   ({claim.id}; {claim.source})")
        if result.conditions:
            _conditions(result)
        if result.verdict == "not attempted":
            for command in commands_for(catalog, claim):
                click.echo(f"  try: {command}")
    if judged:
        counts = Counter(result.verdict for result in judged)
        click.echo(f"\n{len(judged)} claims: {_counted(counts)}.")


def _conditions(result: ClaimResult) -> None:
    _columns(
        ("  model", "task", "settings", "metric", "left", "right", "difference", "95 % interval", "units × seeds",
         "verdict", "remark"),
        [
            (
                f"  {c.model or '–'}",
                c.task,
                _settings(result, c),
                c.metric,
                number(c.left),
                number(c.right),
                number(c.difference),
                interval(c.low, c.high),
                f"{c.units} × {c.seeds}" if c.units else "",
                c.verdict,
                c.reason,
            )
            for c in result.conditions
        ],
        right=("left", "right", "difference"),
    )  # fmt: skip


def _settings(result: ClaimResult, condition: Condition) -> str:
    """Write the settings that tell the conditions of one task apart."""
    others = [other.task_params for other in result.conditions if other.task == condition.task]
    params = condition.task_params
    varied = [key for key in params if any(other.get(key) != params[key] for other in others)]
    return ", ".join(f"{key}={params[key]}" for key in varied)


def _columns(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> None:
    """Print a table without the columns that are empty throughout."""
    kept = [index for index in range(len(headers)) if any(row[index].strip() for row in rows)]
    table([headers[index] for index in kept], [[row[index] for index in kept] for row in rows], right=right)
